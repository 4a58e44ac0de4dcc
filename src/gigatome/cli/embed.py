"""``gigatome embed``."""

from pathlib import Path

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar


def embed(
    slides: str = typer.Argument(help="Slide, folder, glob, bucket prefix or CSV."),
    encoder: str = typer.Option(..., help="Run folder, encoder folder, file of weights as FILE?model=NAME, timm:NAME."),
    out: Path = typer.Option(..., "--out", "-o", help="Job directory; the same one goes on where it stopped."),
    tile_size: int = typer.Option(256, help="Side of a tile in pixels."),
    mpp: float = typer.Option(0.5, help="Resolution of the tiles in µm per pixel; 0.5 is 20×."),
    min_tissue: float = typer.Option(0.4, help="Least share of a tile that is tissue."),
    overlap: int = typer.Option(0, help="Overlap of neighbouring tiles in pixels."),
    slide_mpp: SlideMpp = None,
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
    precision: str = typer.Option("fp32", help="fp32, bf16 or fp16."),
    batch_size: int = typer.Option(64, help="Tiles that the encoder sees at once."),
    threads: int = typer.Option(4, help="Threads that read tiles."),
    half: bool = typer.Option(False, "--half", help="Write float16 files, half as large."),
    name: str | None = typer.Option(None, help="Name of the encoder in file names."),
    shard: str = typer.Option("0/1", metavar="I/N", help="Take every N-th slide from the I-th, from 0."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace embeddings by other weights of this name."),
) -> None:
    """Embed the tissue tiles of every slide, one .h5 a slide in TRIDENT's layout."""
    from gigatome.embeddings.extract import embed as run_embed

    with progress_bar() as progress:
        store = run_embed(
            cohort_of(slides, slide_mpp),
            encoder=encoder,
            out=out,
            tile_size=tile_size,
            mpp=mpp,
            min_tissue=min_tissue,
            overlap=overlap,
            batch_size=batch_size,
            device=device,
            precision=precision,  # pyright: ignore[reportArgumentType] - checked there, with a message
            threads=threads,
            dtype="float16" if half else "float32",
            name=name,
            shard=_shard(shard),
            overwrite=overwrite,
            progress=progress,
        )
    console = Console(highlight=False)
    console.print(f"{store.folder}: embeddings of {len(store)} slides by {store.encoder}", soft_wrap=True, markup=False)
    for failure in store.failures:
        console.print(f"{failure.slide}: {failure.stage}: {failure.message}", soft_wrap=True, markup=False)
    if store.failures:
        raise typer.Exit(3 if len(store) else 1)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter("write it as I/N with I from 0 to N − 1, such as 0/4", param_hint="--shard")
    return int(index), int(count)

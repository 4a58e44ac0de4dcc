"""``gigatome embed``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from gigatome.cli.options import SlideMpp, cohort_of
from gigatome.cli.progress import progress_bar

if TYPE_CHECKING:
    from gigatome.core.logs import Failure


def embed(
    slides: str = typer.Argument(help="Slide, folder, glob, bucket prefix or CSV."),
    encoder: str = typer.Option(..., help="Run folder, encoder folder, file of weights as FILE?model=NAME, timm:NAME."),
    out: Path = typer.Option(..., "--out", "-o", help="Job directory; the same one goes on where it stopped."),
    level: str = typer.Option("tile", help="tile, or region: grids of the embeddings of a region's tiles."),
    tile_size: int = typer.Option(256, help="Side of a tile in pixels."),
    mpp: float = typer.Option(0.5, help="Resolution of the tiles in µm per pixel; 0.5 is 20×."),
    min_tissue: float = typer.Option(0.4, help="Least share of a tile that is tissue."),
    overlap: int = typer.Option(0, help="Overlap of neighbouring tiles in pixels; of level tile."),
    slide_mpp: SlideMpp = None,
    region_encoder: str | None = typer.Option(
        None, help="Embed the regions too: run folder, its encoder folder, or HIPT's file of weights."
    ),
    region_tiles: int = typer.Option(16, help="Tiles along a region's side."),
    min_tiles: int = typer.Option(16, help="Tiles with tissue that a region must have."),
    background: str = typer.Option("mask", help="A region's other tiles: mask leaves them out, encode reads them."),
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
    precision: str = typer.Option("fp32", help="fp32, bf16 or fp16."),
    batch_size: int = typer.Option(64, help="Tiles that the encoder sees at once."),
    threads: int = typer.Option(4, help="Threads that read tiles."),
    half: bool = typer.Option(False, "--half", help="Write float16 files, half as large."),
    name: str | None = typer.Option(None, help="Name of the encoder in file names."),
    region_name: str | None = typer.Option(None, help="Name of tile and region encoder together, likewise."),
    augmentations: int | None = typer.Option(
        None, help="Embed so many draws of augmented tiles instead, in float16; the paper's number is 50."
    ),
    tiles: int | None = typer.Option(None, help="Tiles of a draw; 256 by default."),
    augmentation: str | None = typer.Option(None, help="shared by the tiles of a draw, the default, or each its own."),
    augment_as: str | None = typer.Option(None, help="paper, by default, or code, which neither flips nor turns."),
    seed: int | None = typer.Option(None, help="Of the draws; 0 by default."),
    shard: str = typer.Option("0/1", metavar="I/N", help="Take every N-th slide from the I-th, from 0."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace embeddings by other weights of this name."),
) -> None:
    """Embed the tissue tiles or the regions of every slide, one .h5 a slide in TRIDENT's layout."""
    arguments: dict[str, Any] = {
        "cohort": cohort_of(slides, slide_mpp),
        "encoder": encoder,
        "out": out,
        "tile_size": tile_size,
        "mpp": mpp,
        "min_tissue": min_tissue,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "threads": threads,
        "dtype": "float16" if half else "float32",
        "name": name,
        "shard": _shard(shard),
        "overwrite": overwrite,
    }
    regions = {"tiles": region_tiles, "min_tiles": min_tiles, "background": background}
    draws = {"augmentations": augmentations, "tiles": tiles, "augmentation": augmentation, "seed": seed}
    _check_level(level, overlap, region_encoder, {**draws, "augment-as": augment_as})
    if level == "region":
        _embed_regions(arguments, region_encoder, region_name, regions)
    elif augmentations is not None:
        _embed_augmented(arguments, overlap, draws, augment_as or "paper")
    else:
        _embed_tiles(arguments, overlap)


def _check_level(level: str, overlap: int, region_encoder: str | None, draws: dict[str, Any]) -> None:
    """Refuses a level that there is not, and options of another one."""
    given = [f"--{key}" for key, value in draws.items() if value is not None]
    if level not in ("tile", "region"):
        raise typer.BadParameter(f"there is no level {level}; there are tile, region", param_hint="--level")
    if level == "region" and overlap:
        raise typer.BadParameter("regions are made of tiles side by side", param_hint="--overlap")
    if level == "region" and given:
        raise typer.BadParameter("is of --level tile", param_hint=given[0])
    if level == "tile" and region_encoder is not None:
        raise typer.BadParameter("is of --level region", param_hint="--region-encoder")
    if given and draws["augmentations"] is None:
        raise typer.BadParameter("goes with --augmentations alone", param_hint=given[0])


def _embed_tiles(arguments: dict[str, Any], overlap: int) -> None:
    from gigatome.embeddings.extract import embed as run_embed

    with progress_bar() as progress:
        store = run_embed(**arguments, overlap=overlap, progress=progress)
    _say([f"{store.folder}: embeddings of {len(store)} slides by {store.encoder}"], store.failures, len(store))


def _embed_augmented(arguments: dict[str, Any], overlap: int, draws: dict[str, Any], kind: str) -> None:
    from gigatome.selfsup.embed_augmented import embed_augmented
    from gigatome.selfsup.tile_augment import TileAugmentOptions

    presets = {"paper": TileAugmentOptions.paper, "code": TileAugmentOptions.code}
    if kind not in presets:
        raise typer.BadParameter(f"there is no {kind}; there are paper, code", param_hint="--augment-as")
    given = {key: value for key, value in draws.items() if value is not None}
    del arguments["dtype"]
    with progress_bar() as progress:
        store = embed_augmented(**arguments, **given, overlap=overlap, options=presets[kind](), progress=progress)
    slides = len(store.names())
    _say([f"{store.folder}: augmented tiles of {slides} slides by {store.encoder}"], store.failures, slides)


def _embed_regions(
    arguments: dict[str, Any], region_encoder: str | None, region_name: str | None, regions: dict[str, Any]
) -> None:
    from gigatome.embeddings.extract_regions import embed_regions
    from gigatome.tiles.regions import RegionOptions

    try:
        options = RegionOptions(**regions)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with progress_bar() as progress:
        made = embed_regions(
            **arguments, region_encoder=region_encoder, region_name=region_name, regions=options, progress=progress
        )
    lines = [f"{made.grids.folder}: grids of {len(made.grids)} slides by {made.grids.encoder}"]
    if made.vectors:
        lines.append(f"{made.vectors.folder}: regions of {len(made.vectors)} slides by {made.vectors.encoder}")
    _say(lines, made.failures, len(made.vectors or made.grids))


def _say(lines: Sequence[str], failures: Sequence["Failure"], done: int) -> None:
    """Prints what was made and what was not, and exits accordingly."""
    console = Console(highlight=False)
    for line in (*lines, *(f"{failure.slide}: {failure.stage}: {failure.message}" for failure in failures)):
        console.print(line, soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(3 if done else 1)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter("write it as I/N with I from 0 to N − 1, such as 0/4", param_hint="--shard")
    return int(index), int(count)

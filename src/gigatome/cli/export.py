"""``gigatome export``."""

from pathlib import Path

import typer
from rich.console import Console


def export(
    encoder: str = typer.Argument(
        help="Run folder, or anything else that `gigatome embed --encoder` takes; for patho-bench slide embeddings."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="Folder to write; a new one."),
    to: list[str] = typer.Option(
        ["timm"], help="timm, trident, eva or lazyslide; may be given several times. Or patho-bench, alone."
    ),
) -> None:
    """Write a trained encoder for timm, TRIDENT, eva or LazySlide, and check that it computes the same there.

    Or write slide embeddings as Patho-Bench reads them.
    """
    if to == ["patho-bench"]:
        _pooled(encoder, out)
        return
    from gigatome.encoders.export import export_encoder

    exported = export_encoder(encoder, out, to=tuple(to))  # pyright: ignore[reportArgumentType] - checked there
    console = Console(highlight=False)
    console.print(f"{exported.folder}: {exported.card.name}, {', '.join(exported.files)}", soft_wrap=True, markup=False)
    console.print(
        f"timm and gigatome embed {exported.tiles} random tiles alike: they differ by {exported.difference:.1e} at "
        f"most, the largest number is {exported.scale:.3g}",
        soft_wrap=True,
        markup=False,
    )
    console.print(f'timm.create_model("local-dir:{exported.folder}", pretrained=True)', soft_wrap=True, markup=False)


def _pooled(slides: str, out: Path) -> None:
    from gigatome.embeddings.slide_store import SlideStore

    store = SlideStore.open(slides)
    console = Console(highlight=False)
    console.print(f"{store.write_pooled(out)}: {len(store)} slides by {store.encoder}", soft_wrap=True, markup=False)

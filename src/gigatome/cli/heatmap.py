"""``gigatome heatmap``."""

import typer
from rich.console import Console

from gigatome.cli.progress import progress_bar


def heatmap(
    slide: str = typer.Argument(help="Path or URI of a slide."),
    model: str = typer.Option(..., "--model", help="Run folder, encoder folder, FILE?model=NAME, or timm:NAME."),
    out: str = typer.Option(..., "--out", "-o", help="A .png, a .geojson for QuPath, or a folder."),
    mpp: float = typer.Option(0.5, help="µm per pixel of the tiles."),
    tile_size: int | None = typer.Option(None, help="px of a tile; by default what the encoder was made for."),
    geojson: bool = typer.Option(False, "--geojson", help="Write objects for QuPath into the folder too."),
    rank: str = typer.Option(
        "tile", help="Compare patches inside each tile, over the slide, or none: tile|slide|none."
    ),
    shifts: int = typer.Option(2, help="Passes along each axis that are averaged; 1 is fast and shows seams."),
    head: int | None = typer.Option(None, help="Draw one attention head instead of the mean of all."),
    slide_mpp: float | None = typer.Option(None, help="µm per level-0 pixel, if the file states none or a wrong one."),
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
) -> None:
    """Show where an encoder looks on a slide."""
    from gigatome import config
    from gigatome.heatmaps.attention import AttentionOptions
    from gigatome.heatmaps.render import OverlayOptions
    from gigatome.heatmaps.run import heatmap as make_heatmap
    from gigatome.slides.slide import open_slide

    with progress_bar() as progress, open_slide(slide, mpp=slide_mpp) as opened:
        make_heatmap(
            opened,
            model,
            out,
            tile_size=tile_size,
            mpp=mpp,
            geojson=geojson,
            attention=config.parse(AttentionOptions, {"rank": rank, "shifts": shifts}, source="heatmap"),
            overlay=OverlayOptions(channel=head),
            device=device,
            progress=progress,
        )
    Console(highlight=False).print(out, soft_wrap=True)

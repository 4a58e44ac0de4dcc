"""``gigatome heatmap``."""

from typing import Any

import typer
from rich.console import Console

from gigatome.cli.progress import progress_bar


def heatmap(
    slide: str = typer.Argument(help="Path or URI of a slide."),
    model: str = typer.Option(
        ...,
        "--model",
        help="Run folder, encoder folder, FILE?model=NAME, or timm:NAME; for the level tile, of a region encoder.",
    ),
    out: str = typer.Option(..., "--out", "-o", help="A .png, a .geojson for QuPath, or a folder."),
    mpp: float | None = typer.Option(None, help="µm per pixel of the tiles; 0.5, or what the region encoder wants."),
    tile_size: int | None = typer.Option(None, help="px of a tile; by default what the encoder was made for."),
    geojson: bool = typer.Option(False, "--geojson", help="Write objects for QuPath into the folder too."),
    rank: str = typer.Option(
        "tile", help="Compare patches inside each tile, and so on up, over the slide, or none: tile|slide|none."
    ),
    shifts: int = typer.Option(2, help="Passes along each axis that are averaged; 1 is fast and shows seams."),
    head: int | None = typer.Option(None, help="Draw one attention head instead of the mean of all."),
    levels: str = typer.Option(
        "cell", help="Of cell, tile, region, with commas: attention inside tiles, regions, slide."
    ),
    tile_encoder: str | None = typer.Option(
        None, help="Whose embeddings the region encoder takes, if not kept with it."
    ),
    slide_model: str | None = typer.Option(None, help="Heads of regions that evaluate wrote, for the level region."),
    combine: str = typer.Option("mean", help="How levels are put together: mean of the maps, or product of attention."),
    weights: str = typer.Option("", metavar="LEVEL=W,…", help="Weights of the levels in the mean, such as tile=2."),
    label: str | None = typer.Option(None, help="Class whose attention the slide model shows, if it has one each."),
    region_shifts: int = typer.Option(4, help="Grids of regions along each axis that are averaged."),
    ome: bool = typer.Option(False, "--ome", help="Write the picture as pyramidal OME-TIFF into the folder too."),
    values: bool = typer.Option(False, "--values", help="Write all channels as OME-TIFF into the folder too."),
    slide_mpp: float | None = typer.Option(None, help="µm per level-0 pixel, if the file states none or a wrong one."),
    device: str = typer.Option("cpu", help="Where the encoder runs, such as cuda."),
) -> None:
    """Show where an encoder looks on a slide."""
    from gigatome import config
    from gigatome.heatmaps.attention import AttentionOptions
    from gigatome.heatmaps.chain import is_region_model
    from gigatome.heatmaps.hierarchy import HierarchyOptions
    from gigatome.heatmaps.render import OverlayOptions
    from gigatome.heatmaps.run import heatmap as make_heatmap
    from gigatome.heatmaps.run import hierarchical_heatmap
    from gigatome.slides.slide import open_slide

    wanted = [level.strip() for level in levels.split(",") if level.strip()]
    attention = config.parse(AttentionOptions, {"rank": rank, "shifts": shifts}, source="heatmap")
    shared: dict[str, Any] = {
        "tile_size": tile_size, "geojson": geojson, "attention": attention, "device": device
    }  # fmt: skip
    hierarchy: dict[str, Any] = {"region_shifts": region_shifts, "combine": combine, "label": label}
    hierarchy["weights"] = _weights(weights)
    if head is not None:
        hierarchy["heads"] = {level: head for level in wanted if level != "region"}
    options = config.parse(HierarchyOptions, hierarchy, source="heatmap")
    with progress_bar() as progress, open_slide(slide, mpp=slide_mpp) as opened:
        if wanted == ["cell"] and not (ome or values or tile_encoder or slide_model or is_region_model(model)):
            overlay = OverlayOptions(channel=head)
            scale = 0.5 if mpp is None else mpp
            make_heatmap(opened, model, out, mpp=scale, overlay=overlay, progress=progress, **shared)
        else:
            hierarchical_heatmap(
                opened, model, out, levels=wanted, tile_encoder=tile_encoder, slide_model=slide_model, mpp=mpp,
                ome=ome, values=values, hierarchy=options, progress=progress, **shared,
            )  # fmt: skip
    Console(highlight=False).print(out, soft_wrap=True)


def _weights(text: str) -> dict[str, str]:
    """``tile=2,cell=1`` as a mapping; what is no number is left for the options to refuse."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return {level.strip(): value.strip() for level, _, value in pairs}

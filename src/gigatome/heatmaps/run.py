"""The attention heat-map of a slide, from the slide to the files."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.core.logs import Progress, silent
from gigatome.encoders.device import usable_device
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.heatmaps.attention import AttentionOptions, HeatMap, attention_map
from gigatome.heatmaps.chain import Chain, open_chain
from gigatome.heatmaps.hierarchy import HierarchyOptions, LevelMaps
from gigatome.heatmaps.levels import level_maps
from gigatome.heatmaps.ome import write_ome_overlay, write_ome_values
from gigatome.heatmaps.render import OverlayOptions, write_geojson, write_overlay
from gigatome.slides.slide import Slide, open_slide
from gigatome.tiles.grid import GridOptions, make_grid
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.segment import segment


def heatmap(
    slide: str | Path | Slide,
    model: str | Path | TileEncoder,
    out: str | Path,
    *,
    tile_size: int | None = None,
    mpp: float = 0.5,
    geojson: bool = False,
    mask: TissueMask | None = None,
    patches_per_object: int = 4,
    attention: AttentionOptions | None = None,
    overlay: OverlayOptions | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> HeatMap:
    """Shows where an encoder looks on a slide.

    Args:
        slide: path, URI or open slide.
        model: run folder, encoder folder or anything else that :func:`gigatome.encoders.zoo.load_encoder` takes.
        out: ``.png`` for a picture, ``.geojson`` for objects for QuPath, or a folder, which gets ``<slide>.png`` and,
            with ``geojson``, ``<slide>.geojson``.
        tile_size: px of a tile; the size that the encoder was made for by default.
        mpp: µm per pixel of the tiles; best one that the encoder was trained at.
        geojson: whether a folder gets the objects too.
        mask: its tissue; found here if not given.
        patches_per_object: side of an object in patches; attention is averaged over it.
        attention: how the map is made.
        overlay: how the picture is drawn.
        device: where the encoder runs.
        progress: called after each batch of tiles.

    Returns:
        The map. The objects count from the corner of the slide's bounds, as QuPath does; a slide without bounds begins
        at (0, 0).

    Raises:
        ConfigError: ``geojson`` with a single file; the device cannot be used; the tile size or the channel does not
            suit the encoder.
        SlideError: the slide cannot be read, states no mpp or has no tissue.
        StoreError: the encoder cannot be found or read.
        RunError: the folder holds no encoder.
    """
    out = Path(out)
    folder = out.suffix not in (".png", ".geojson")
    if geojson and not folder:
        raise ConfigError(f"{out}: give a folder to have both the picture and the objects for QuPath")
    encoder = load_encoder(model).to(usable_device(device))
    overlay = overlay or OverlayOptions()
    if overlay.channel is not None and not 0 <= overlay.channel < encoder.heads:
        raise ConfigError(f"{encoder.name} has attention heads 0 to {encoder.heads - 1}, not {overlay.channel}")
    size = encoder.config.image_size if tile_size is None else tile_size
    options = config.parse(GridOptions, {"tile_size": size, "mpp": mpp}, source="heat-map")
    with contextlib.nullcontext(slide) if isinstance(slide, Slide) else open_slide(slide) as opened:
        mask = segment(opened) if mask is None else mask
        grid = make_grid(opened, mask, options)
        heat = attention_map(opened, encoder, grid, attention or AttentionOptions(), progress=progress).within(mask)
        if out.suffix != ".geojson":
            write_overlay(out / f"{opened.name}.png" if folder else out, opened, heat, overlay)
        if out.suffix == ".geojson" or geojson:
            write_geojson(
                out / f"{opened.name}.geojson" if folder else out,
                heat,
                slide=opened.name,
                cell=patches_per_object * heat.cell,
                origin=(opened.bounds.x, opened.bounds.y),
            )
    return heat


def hierarchical_heatmap(
    slide: str | Path | Slide,
    model: str | Path | TileEncoder | Chain,
    out: str | Path,
    *,
    levels: Sequence[str] = ("cell", "tile"),
    tile_encoder: str | Path | TileEncoder | None = None,
    slide_model: str | Path | None = None,
    tile_size: int | None = None,
    mpp: float | None = None,
    geojson: bool = False,
    ome: bool = False,
    values: bool = False,
    mask: TissueMask | None = None,
    attention: AttentionOptions | None = None,
    hierarchy: HierarchyOptions | None = None,
    overlay: OverlayOptions | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> LevelMaps:
    """Shows where the encoders of a hierarchy look on a slide, level by level and together.

    Args:
        slide: path, URI or open slide.
        model: what :func:`~gigatome.heatmaps.chain.open_chain` takes, or a chain itself.
        out: folder, which gets ``<slide>_<level>.png`` for each level, and ``<slide>_combined.png`` of several.
        levels: of ``"cell"``, ``"tile"`` and ``"region"``.
        tile_encoder: of the region encoder, where none is kept with it.
        slide_model: folder of saved heads, for the level region.
        tile_size: px of a tile; by default that of the region encoder's card, or what the tile encoder was made for.
        mpp: µm per pixel of the tiles; by default that of the card, or 0.5.
        geojson: write ``<slide>.geojson``, a square a tile with the measurements of all channels.
        ome: write ``<slide>_overlay.ome.tif``, the last of the pictures as a pyramid.
        values: write ``<slide>_values.ome.tif``, all channels.
        mask: its tissue; found here if not given.
        attention: how each level's map is made.
        hierarchy: which regions there are, and how the levels are combined.
        overlay: how the pictures are drawn; heads are chosen in ``hierarchy``, not here.
        device: where the encoders run.
        progress: called after each batch of tiles.

    Returns:
        The maps, without the glass inside the tiles.

    Raises:
        ConfigError: there is no model of a level, models do not belong together, or an option does not suit them.
        EvaluationError: the slide model learnt from other embeddings.
        SlideError: the slide cannot be read, states no mpp or has no tissue.
        StoreError: a model cannot be found or read.
        RunError: a folder holds no such model.
    """
    out, overlay = Path(out), overlay or OverlayOptions()
    if out.suffix in (".png", ".geojson", ".tif", ".tiff"):
        raise ConfigError(f"{out}: maps of levels are several files; give a folder")
    if overlay.channel is not None:
        raise ConfigError("the head to draw is chosen for each level, in the options of the hierarchy")
    chain = model if isinstance(model, Chain) else open_chain(model, tile_encoder=tile_encoder, slide_model=slide_model)
    chain.check(levels)
    chain.to(usable_device(device))
    card = chain.card
    default = (chain.tile.config.image_size, 0.5) if card is None else (card.tile_size, card.mpp)
    size, scale = (
        given if given is not None else usual for given, usual in zip((tile_size, mpp), default, strict=True)
    )
    options = config.parse(GridOptions, {"tile_size": size, "mpp": scale}, source="heat-map")
    with contextlib.nullcontext(slide) if isinstance(slide, Slide) else open_slide(slide) as opened:
        mask = segment(opened) if mask is None else mask
        grid = make_grid(opened, mask, options)
        maps = level_maps(opened, chain, grid, levels, attention, hierarchy, progress=progress).within(mask)
        for picture in maps.pictures:
            write_overlay(out / f"{opened.name}_{picture}.png", opened, maps.heat(picture), overlay)
        if geojson:
            origin = (opened.bounds.x, opened.bounds.y)
            write_geojson(out / f"{opened.name}.geojson", maps.tiles(), slide=opened.name, origin=origin)
        if ome:
            write_ome_overlay(out / f"{opened.name}_overlay.ome.tif", opened, maps.heat(maps.pictures[-1]), overlay)
        if values:
            write_ome_values(out / f"{opened.name}_values.ome.tif", opened, maps.channels, maps.heat)
    return maps

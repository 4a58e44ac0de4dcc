"""The attention heat-map of a slide, from the slide to the files."""

import contextlib
from pathlib import Path

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.core.logs import Progress, silent
from gigatome.encoders.device import usable_device
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.heatmaps.attention import AttentionOptions, HeatMap, attention_map
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

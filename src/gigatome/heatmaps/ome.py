"""Heat-maps as pyramidal OME-TIFF: a picture over the slide, and the values themselves, written as a stream.

Each level of a pyramid is made from the slide and the map anew, chunk by chunk, so that no picture is ever in memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import ConfigError
from gigatome.core.geometry import level0_length
from gigatome.heatmaps.attention import HeatMap
from gigatome.heatmaps.render import OverlayOptions, blend, colours_of, drawn, limits_of, sample
from gigatome.slides.slide import Slide

_CHUNK = 512
_BIG = 1 << 30  # bytes of pixels above which the classic TIFF limit of 4 GiB may come near
_THREADS = 4


def write_ome_overlay(
    path: str | Path,
    slide: Slide,
    heat: HeatMap,
    options: OverlayOptions | None = None,
    *,
    mpp: float = 2.0,
    compression: Literal["jpeg", "deflate"] = "jpeg",
    quality: int = 90,
) -> None:
    """Writes the slide with a heat-map over it as OME-TIFF, RGB, whole or not at all.

    Args:
        path: ``.ome.tif`` to write.
        slide: the slide of the map.
        heat: the map.
        options: how it is drawn; there is no legend. Without limits, the colours end at the 1st and the 99th percentile
            of the cells.
        mpp: µm per pixel of the largest level; each further one is half as large, down to a chunk of 512 px.
        compression: of the chunks; deflate loses nothing.
        quality: of JPEG.

    Raises:
        ConfigError: ``mpp`` is not positive, or the map has no such channel.
        SlideError: the slide cannot be read.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise ConfigError(f"mpp is µm per pixel of the picture and must be positive, not {mpp}")
    options = options or OverlayOptions()
    heat.check_channel(options.channel)
    step = level0_length(1, mpp, slide.mpp)
    base = max(1, round(slide.height / step)), max(1, round(slide.width / step))
    shapes = _pyramid(base)
    limits = options.limits or limits_of(drawn(heat, options.channel, 1.0).values)
    colours = colours_of(options.colormap)

    def level(index: int) -> Iterator[NDArray[np.uint8]]:
        scale = 2**index
        single = drawn(heat, options.channel, step * scale)

        def chunk(corner: tuple[int, int]) -> NDArray[np.uint8]:
            y, x = (round(edge * step * scale) for edge in corner)
            image = slide.read_tile(x, y, _CHUNK, mpp * scale, exact=False)
            values = sample(single, (x, y), (step * scale, step * scale), _CHUNK, _CHUNK)
            return blend(image, values, limits, colours, options.alpha)

        return _each(chunk, shapes[index])

    coding: dict[str, Any] = {"compression": "zlib", "predictor": True}
    if compression == "jpeg":
        coding = {"compression": "jpeg", "compressionargs": {"level": quality}}
    _write(
        path,
        [(*shape, 3) for shape in shapes],
        np.dtype(np.uint8),
        level,
        {"axes": "YXS", **_sizes(mpp), "Name": slide.name},
        {"photometric": "rgb", **coding},
    )


def write_ome_values(
    path: str | Path,
    slide: Slide,
    channels: Sequence[str],
    heat: Callable[[str], HeatMap],
) -> None:
    """Writes the values of a map as OME-TIFF, float32, a channel each, whole or not at all.

    A pixel is a cell of the map. The picture begins at the slide's corner and covers the slide, so that it fits the
    slide once it is scaled by the pixel size. NaN stands where there is no value.

    Args:
        path: ``.ome.tif`` to write.
        slide: the slide of the map.
        channels: names, in this order.
        heat: gives the map of one of them, such as :meth:`~gigatome.heatmaps.hierarchy.LevelMaps.heat`; all on the same
            raster. One is in memory at a time.
    """
    first = heat(channels[0])
    left, top = round(first.x / first.cell), round(first.y / first.cell)
    rows, columns = first.values.shape[1:]
    base = (
        max(math.ceil(slide.height / first.cell), top + rows),
        max(math.ceil(slide.width / first.cell), left + columns),
    )
    shapes = _pyramid(base)

    def level(index: int) -> Iterator[NDArray[np.float32]]:
        for name in channels:
            values = np.full(base, np.nan, np.float32)
            values[top : top + rows, left : left + columns] = heat(name).values[0]
            whole = HeatMap(values[None], (name,), 0, 0, 1.0, 1.0).coarser(2**index).values[0]
            yield from _each(lambda corner, whole=whole: _cut(whole, corner), shapes[index])

    _write(
        path,
        [(len(channels), *shape) for shape in shapes],
        np.dtype(np.float32),
        level,
        {"axes": "CYX", **_sizes(first.mpp), "Channel": {"Name": list(channels)}, "Name": slide.name},
        {"photometric": "minisblack", "compression": "zlib", "predictor": True},
    )


def _write(
    path: str | Path,
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    level: Callable[[int], Iterator[NDArray[Any]]],
    metadata: dict[str, Any],
    coding: dict[str, Any],
) -> None:
    size = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    shared = {"dtype": dtype, "tile": (_CHUNK, _CHUNK), "software": "gigatome", **coding}
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=size > _BIG, ome=True) as tiff:
        tiff.write(level(0), shape=shapes[0], subifds=len(shapes) - 1, metadata=metadata, **shared)
        for index in range(1, len(shapes)):
            tiff.write(level(index), shape=shapes[index], subfiletype=1, metadata=None, **shared)


def _pyramid(base: tuple[int, int]) -> list[tuple[int, int]]:
    """Heights and widths of the levels, each half of the one before, until one chunk holds all."""
    shapes = [base]
    while max(shapes[-1]) > _CHUNK:
        scale = 2 ** len(shapes)
        shapes.append((math.ceil(base[0] / scale), math.ceil(base[1] / scale)))
    return shapes


def _each(chunk: Callable[[tuple[int, int]], NDArray[Any]], shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """The chunks of a picture in the order of a TIFF, a row of them at a time, made by threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for top in range(0, shape[0], _CHUNK):
            yield from pool.map(chunk, [(top, left) for left in range(0, shape[1], _CHUNK)])


def _cut(values: NDArray[np.float32], corner: tuple[int, int]) -> NDArray[np.float32]:
    top, left = corner
    part = values[top : top + _CHUNK, left : left + _CHUNK]
    below, right = (_CHUNK - extent for extent in part.shape)
    return np.pad(part, ((0, below), (0, right)), constant_values=np.nan)


def _sizes(mpp: float) -> dict[str, Any]:
    unit = {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    return {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp, **unit}

"""Area-averaged and bilinear resampling of a raster that is read in pieces.

An output pixel is the mean of the source under it, with the pixels on its edges weighted by the part that lies
inside: a box filter with fractional edges. Where output pixels are smaller than source pixels it is bilinear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import cv2
import numpy as np

WHITE = 255
# Source pixels along one side of a block: bounds the memory of reading a whole slide for a thumbnail.
_BLOCK_SIDE = 4096
# Positions closer than this to whole pixels are whole ones: floating-point noise must not blur an exact read.
_TOLERANCE = 1e-3
# OpenCV gives each thread this many output pixels. The callers have threads of their own, so it gets no more at a time.
_CV2_STRIPE = 1 << 16

ReadPixels = Callable[[int, int, int, int], np.ndarray]


@final
@dataclass(frozen=True)
class Axis:
    """Where the output pixels of one axis lie: pixel i covers [start + i·step, start + (i + 1)·step) of the source."""

    start: float
    step: float
    count: int

    def part(self, first: int, count: int) -> "Axis":
        """The pixels ``first`` … ``first + count``."""
        return Axis(self.start + first * self.step, self.step, count)

    @property
    def whole(self) -> int:
        """The step as a whole number if all edges fall on source pixels, else 0."""
        step = round(self.step)
        aligned = abs(self.start - round(self.start)) < _TOLERANCE
        return step if aligned and abs(self.step - step) * self.count < _TOLERANCE else 0


@final
@dataclass(frozen=True)
class _Taps:
    """Weighted source pixels of each output pixel: ``first`` int, ``index`` [n, k] from there, ``weight`` [n, k]."""

    first: int
    last: int
    index: np.ndarray
    weight: np.ndarray
    cover: np.ndarray


def resample(read: ReadPixels, size: tuple[int, int], extent: tuple[float, float], x: Axis, y: Axis) -> np.ndarray:
    """Resamples a source of ``size`` pixels.

    Args:
        read: ``read(x, y, width, height)`` → uint8 [height, width, 3] for any piece that lies inside ``size``.
        size: width and height of the source in pixels.
        extent: width and height of the part that is picture, in source pixels, which differs from ``size`` by less
            than one at a level whose size was rounded; beyond it is white.
        x: the columns of the output.
        y: the rows of the output.

    Returns:
        uint8 [y.count, x.count, 3].
    """
    output = np.full((y.count, x.count, 3), WHITE, np.uint8)
    columns, rows = (max(1, int(_BLOCK_SIDE / max(axis.step, 1.0))) for axis in (x, y))
    for top in range(0, y.count, rows):
        y_part = y.part(top, min(rows, y.count - top))
        for left in range(0, x.count, columns):
            x_part = x.part(left, min(columns, x.count - left))
            block = _block(read, size, extent, x_part, y_part)
            if block is not None:
                output[top : top + y_part.count, left : left + x_part.count] = block
    return output


def _block(read: ReadPixels, size: tuple[int, int], extent: tuple[float, float], x: Axis, y: Axis) -> np.ndarray | None:
    """One block of the output; None if it is all white."""
    step = x.whole
    if step and step == y.whole and all(_inside(axis, side) for axis, side in zip((x, y), size, strict=True)):
        pixels = read(round(x.start), round(y.start), x.count * step, y.count * step)
        return pixels if step == 1 else _shrink(pixels, x.count, y.count)
    across, down = _taps(x, size[0], extent[0]), _taps(y, size[1], extent[1])
    if across is None or down is None:
        return None
    pixels = read(across.first, down.first, across.last - across.first, down.last - down.first)
    # Weighted sums go over rows, which lie together in memory, hence the transposition.
    mean = cv2.transpose(_apply(cv2.transpose(_apply(pixels, down)), across))
    cover = down.cover[:, None, None] * across.cover[None, :, None]
    if cover.min() < 1:
        mean = mean * cover + np.float32(WHITE) * (1 - cover)
    return (mean + np.float32(0.5)).astype(np.uint8)


def _inside(axis: Axis, side: int) -> bool:
    start = round(axis.start)
    return start >= 0 and start + axis.count * round(axis.step) <= side


def _shrink(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mean of each step × step pixels."""
    output = np.empty((height, width, 3), np.uint8)
    step = len(pixels) // height
    rows = max(1, _CV2_STRIPE // width)
    for top in range(0, height, rows):
        band = output[top : top + rows]
        piece = pixels[top * step : (top + len(band)) * step]
        cv2.resize(piece, (width, len(band)), dst=band, interpolation=cv2.INTER_AREA)
    return output


def _taps(axis: Axis, side: int, extent: float) -> _Taps | None:
    """Source pixels and weights along one axis; None if no output pixel touches the source."""
    edges = axis.start + axis.step * np.arange(axis.count + 1)
    low, high = edges[:-1].clip(0, extent), edges[1:].clip(0, extent)
    cover = (high - low) / axis.step
    touched = cover > 0
    if not touched.any():
        return None
    if axis.step >= 1:
        first = np.floor(low).astype(np.int64)
        index = first[:, None] + np.arange(int(np.ceil(axis.step)) + 1)
        weight = np.minimum(high[:, None], index + 1) - np.maximum(low[:, None], index)
        weight = weight.clip(0) / np.where(touched, high - low, 1.0)[:, None]
    else:
        centre = ((edges[:-1] + edges[1:]) / 2 - 0.5).clip(0, side - 1)
        first = np.floor(centre).astype(np.int64)
        index = first[:, None] + np.arange(2)
        weight = np.abs(index[:, ::-1] - centre[:, None])
    index = index.clip(0, side - 1)
    used = index[weight > 0]
    start, stop = int(used.min()), int(used.max()) + 1
    relative = (index - start).clip(0, stop - start - 1)
    return _Taps(start, stop, relative, weight.astype(np.float32), cover.clip(0, 1).astype(np.float32))


def _apply(pixels: np.ndarray, taps: _Taps) -> np.ndarray:
    """Weighted sum of the taps along the first axis; float32."""
    total = np.zeros((len(taps.index), *pixels.shape[1:]), np.float32)
    for index, weight in zip(taps.index.T, taps.weight.T, strict=True):
        total += pixels.take(index, axis=0) * weight[:, None, None]
    return total

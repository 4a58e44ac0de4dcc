"""Area-averaged and bilinear resampling of a raster that is read in pieces.

An output pixel is the mean of the source under it, with the pixels on its edges weighted by the part that lies
inside: a box filter with fractional edges. Where output pixels are smaller than source pixels it is bilinear.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import cv2
import numpy as np

from gigatome.core.native import NATIVE

WHITE = 255
# Source pixels along one side of a block: bounds the memory of reading a whole slide for a thumbnail.
BLOCK_SIDE = 4096
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

    def within(self, extent: float) -> bool:
        """Whether all pixels lie within 0 and ``extent``."""
        return self.start > -_TOLERANCE and self.start + self.count * self.step < extent + _TOLERANCE

    def snapped(self, extent: float) -> "Axis":
        """The same axis from the nearest whole pixel if its step is a whole number, else as it is.

        What lies within ``extent`` stays within it.
        """
        step = round(self.step)
        if not step or abs(self.step - step) * self.count >= _TOLERANCE:
            return self
        start = round(self.start)
        if self.within(extent):
            start = min(start, math.floor(extent + _TOLERANCE - self.count * self.step))
        return Axis(float(start), self.step, self.count)

    @property
    def whole(self) -> int:
        """The step as a whole number if all edges fall on source pixels, else 0."""
        step = round(self.step)
        aligned = abs(self.start - round(self.start)) < _TOLERANCE
        return step if aligned and abs(self.step - step) * self.count < _TOLERANCE else 0


@final
@dataclass(frozen=True, eq=False)
class _Taps:
    """The source pixels of each output pixel of one axis.

    Attributes:
        first, last: the source pixels that are looked at, ``last`` excluded.
        index: int32 [n, k], counted from ``first``.
        weight: float32 [n, k].
        cover: float32 [n], the share of each output pixel that is picture.
    """

    first: int
    last: int
    index: np.ndarray
    weight: np.ndarray
    cover: np.ndarray


@final
@dataclass(frozen=True)
class Window:
    """The source pixels that a block of output pixels needs, and how they become it; made by :func:`window`.

    Attributes:
        x, y, width, height: of the source, in its pixels; inside it.
        across, down: the axes of the output.
        taps: weighted pixels along x and y; None where each output pixel is the mean of whole pixels.
    """

    x: int
    y: int
    width: int
    height: int
    across: Axis
    down: Axis
    taps: tuple[_Taps, _Taps] | None

    @property
    def as_read(self) -> bool:
        """Whether the output is the source pixels themselves."""
        return self.taps is None and self.width == self.across.count and self.height == self.down.count

    def render(self, pixels: np.ndarray, output: np.ndarray | None = None) -> np.ndarray:
        """The block, uint8 [down.count, across.count, 3], of the source pixels uint8 [height, width, 3].

        Args:
            pixels: the source.
            output: where to put it; contiguous.
        """
        if output is None:
            output = np.empty((self.down.count, self.across.count, 3), np.uint8)
        if self.as_read:
            if output is not pixels:
                output[:] = pixels
        elif self.taps is None:
            _shrink(pixels, output)
        else:
            (_apply if NATIVE is None else _apply_native)(pixels, *self.taps, output)
        return output


def window(size: tuple[int, int], extent: tuple[float, float], x: Axis, y: Axis) -> Window | None:
    """What a block of output pixels needs of a source; None if it lies wholly outside. See :func:`resample`."""
    step = x.whole
    if step and step == y.whole and all(_inside(axis, side) for axis, side in zip((x, y), size, strict=True)):
        return Window(round(x.start), round(y.start), x.count * step, y.count * step, x, y, None)
    across, down = _taps(x, size[0], extent[0]), _taps(y, size[1], extent[1])
    if across is None or down is None:
        return None
    return Window(across.first, down.first, across.last - across.first, down.last - down.first, x, y, (across, down))


def resample(read: ReadPixels, size: tuple[int, int], extent: tuple[float, float], x: Axis, y: Axis) -> np.ndarray:
    """Resamples a source of ``size`` pixels, a block at a time.

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
    for top, y_part in _blocks(y):
        for left, x_part in _blocks(x):
            block = window(size, extent, x_part, y_part)
            if block is not None:
                pixels = block.render(read(block.x, block.y, block.width, block.height))
                output[top : top + y_part.count, left : left + x_part.count] = pixels
    return output


def one_block(x: Axis, y: Axis) -> bool:
    """Whether :func:`resample` reads all of it at once."""
    return all(axis.count * max(axis.step, 1.0) <= BLOCK_SIDE for axis in (x, y))


def _blocks(axis: Axis) -> Iterator[tuple[int, Axis]]:
    most = max(1, int(BLOCK_SIDE / max(axis.step, 1.0)))
    for first in range(0, axis.count, most):
        yield first, axis.part(first, min(most, axis.count - first))


def _inside(axis: Axis, side: int) -> bool:
    start = round(axis.start)
    return start >= 0 and start + axis.count * round(axis.step) <= side


def _shrink(pixels: np.ndarray, output: np.ndarray) -> None:
    """Mean of each step × step pixels."""
    height, width = output.shape[:2]
    step = len(pixels) // height
    rows = max(1, _CV2_STRIPE // width)
    for top in range(0, height, rows):
        band = output[top : top + rows]
        piece = pixels[top * step : (top + len(band)) * step]
        cv2.resize(piece, (width, len(band)), dst=band, interpolation=cv2.INTER_AREA)


def _taps(axis: Axis, side: int, extent: float) -> _Taps | None:
    """Source pixels and weights along one axis; None if no output pixel touches the source."""
    whole = math.floor(axis.start)
    if whole >= 2 and axis.start + axis.step * axis.count <= min(side, extent) - 2:
        # Far from the edges only the fraction of the start counts, and few of those occur.
        taps = _inner_taps(Axis(axis.start - whole + 2, axis.step, axis.count))
        return replace(taps, first=taps.first + whole - 2, last=taps.last + whole - 2)
    return _edge_taps(axis, side, extent)


@lru_cache(maxsize=1024)
def _inner_taps(axis: Axis) -> _Taps:
    far = math.ceil(axis.start + axis.step * axis.count) + 2
    taps = _edge_taps(axis, far, far)
    assert taps is not None  # noqa: S101 - it lies inside
    return taps


def _edge_taps(axis: Axis, side: int, extent: float) -> _Taps | None:
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
    cover = np.where(cover > 1 - _TOLERANCE**2, 1, cover).astype(np.float32)
    return _Taps(start, stop, relative.astype(np.int32), weight.astype(np.float32), cover)


def _apply(pixels: np.ndarray, across: _Taps, down: _Taps, output: np.ndarray) -> None:
    """Weighted sums of the source pixels, and white for the share that is no picture."""
    # Sums go over rows, which lie together in memory, hence the transposition.
    mean = cv2.transpose(_sums(cv2.transpose(_sums(pixels, down)), across))
    cover = down.cover[:, None, None] * across.cover[None, :, None]
    if cover.min() < 1:
        mean = mean * cover + np.float32(WHITE) * (1 - cover)
    output[:] = (mean + np.float32(0.5)).astype(np.uint8)


def _sums(pixels: np.ndarray, taps: _Taps) -> np.ndarray:
    """Weighted sum of the taps along the first axis; float32."""
    total = np.zeros((len(taps.index), *pixels.shape[1:]), np.float32)
    for index, weight in zip(taps.index.T, taps.weight.T, strict=True):
        total += pixels.take(index, axis=0) * weight[:, None, None]
    return total


def _apply_native(pixels: np.ndarray, across: _Taps, down: _Taps, output: np.ndarray) -> None:
    """As :func:`_apply`, bit for bit, in C and without the GIL."""
    NATIVE.resample(
        np.ascontiguousarray(pixels),
        across.index,
        across.weight,
        across.cover,
        down.index,
        down.weight,
        down.cover,
        output,
    )

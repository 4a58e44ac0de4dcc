"""Resampling in pieces: a pixel does not depend on which others are read with it.

Edges of output pixels are whole multiples of 2⁻²⁴ source pixels, so that sums of them are exact in float64 and a piece
has them where the whole has. What lies inside the source, on its edge and beyond it is resampled apart, as a mean of
whole pixels is rounded in another way inside than on the edge.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from gigatome.slides.resample import BLOCK_SIDE, WHITE, Axis, ReadPixels, resample
from gigatome.slides.tile_plan import Source

_UNIT = 1 << 24
# Steps this close to whole source pixels are whole: 0.5 source pixels over 32,768 output pixels.
_WHOLE_STEP = _UNIT >> 16
# Starts this close to whole source pixels are whole where steps are, as for any other read.
_WHOLE_START = _UNIT // 1000


def read_pieces(read: ReadPixels, source: Source, x: Axis, y: Axis) -> np.ndarray:
    """Resamples a source so that parts of the axes give exactly the pixels of the whole.

    That holds for parts of rows of any number and of at least 66 columns; in narrower ones a pixel may differ by one
    grey level where steps are nearly whole.

    Args:
        read: gives pieces of the source, as :func:`~gigatome.slides.resample.resample` takes it.
        source: where it reads.
        x: the columns, in level-0 pixels.
        y: the rows, likewise.

    Returns:
        uint8 [y.count, x.count, 3], white outside the source.
    """
    output = np.full((y.count, x.count, 3), WHITE, np.uint8)
    across, down = _placed(x, source.scale_x), _placed(y, source.scale_y)
    for top, rows in _pieces(down, source.size[1]):
        for first, columns in _pieces(across, source.size[0]):
            for left, part in _blocks(columns):
                pixels = resample(read, source.size, source.extent, part, rows)
                output[top : top + rows.count, first + left : first + left + part.count] = pixels
    return output


def _placed(axis: Axis, scale: float) -> Axis:
    """An axis of level-0 pixels in source pixels, of ``scale`` of them each, with exact edges.

    It is counted from the pixel that holds level-0 pixel 0, which all parts of an axis have in common.
    """
    index, phase = divmod(axis.start, axis.step)
    step, start = max(1, round(axis.step / scale * _UNIT)), round(phase / scale * _UNIT)
    if (near := _nearest(step)) and abs(step - near) <= _WHOLE_STEP:
        step = near
        start = _nearest(start) if abs(start - _nearest(start)) <= _WHOLE_START else start
    return Axis((start + round(index) * step) / _UNIT, step / _UNIT, axis.count)


def _nearest(value: int) -> int:
    """The nearest whole pixel."""
    return (value + _UNIT // 2) // _UNIT * _UNIT


def _pieces(axis: Axis, side: int) -> Iterator[tuple[int, Axis]]:
    """The pixel on the near edge of the source, those inside, and that on the far edge, each with its number."""
    first = min(axis.count, max(0, -int(axis.start // axis.step)))
    last = min(axis.count, max(first, int((side - axis.start) // axis.step)))
    for start, stop in ((max(first - 1, 0), first), (first, last), (last, min(last + 1, axis.count))):
        if start < stop:
            yield start, axis.part(start, stop - start)


def _blocks(axis: Axis) -> Iterator[tuple[int, Axis]]:
    """Parts of nearly one width, each of which is resampled at once: none is so narrow that its step seems whole."""
    most = max(1, int(BLOCK_SIDE / max(axis.step, 1.0)))
    bounds = np.linspace(0, axis.count, -(-axis.count // most) + 1).astype(int).tolist()
    for first, last in itertools.pairwise(bounds):
        yield first, axis.part(first, last - first)

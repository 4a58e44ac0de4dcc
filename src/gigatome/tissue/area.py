"""Exact area of polygons inside many rectangles at once.

By Green's theorem the area of a polygon inside a rectangle is the sum over its edges of ∫ clip(x(y), x0, x1) − x0 dy
within y0 ≤ y ≤ y1, which has a closed form for a straight edge. Edges are cut into pieces that are not high and sorted
by their tops, so that a rectangle looks only at the pieces beside it: no raster, and no error but that of floating
point.
"""

from collections.abc import Sequence
from typing import final

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon
from shapely.geometry.polygon import orient

Floats = NDArray[np.float64]

_PAIRS = 50_000  # (rectangle, piece) pairs at a time: fits the second-level cache, 4 times as fast as 2 million
_BANDS = 512  # a piece is at most this part of the polygons' height …
_HEIGHT = 64.0  # … but need not be less high than this


@final
class AreaIndex:
    """The edges of polygons, cut and sorted for :meth:`area`.

    Args:
        pieces: as :attr:`pieces`; :meth:`of` makes them.

    Attributes:
        pieces: float64 [4, E], x and y at which each piece starts and at which it ends; sorted by the lesser y.
    """

    def __init__(self, pieces: Floats):
        self.pieces = pieces
        self._tops = np.minimum(pieces[1], pieces[3])
        self._height = float(np.abs(pieces[3] - pieces[1]).max(initial=0.0))

    @property
    def nbytes(self) -> int:
        """Memory that it takes, bytes."""
        return self.pieces.nbytes + self._tops.nbytes

    @classmethod
    def of(cls, polygons: Sequence[Polygon]) -> "AreaIndex":
        """Index of valid polygons that do not overlap."""
        start, end = _edges(polygons)
        if not len(start):
            return cls(np.empty((4, 0)))
        height = max(float(np.ptp(start[:, 1])) / _BANDS, _HEIGHT)
        counts = np.ceil(np.abs(end - start)[:, 1] / height).astype(np.int64)
        edge, number = np.repeat(np.arange(len(counts)), counts), _counting(counts)
        begin, run, parts = start[edge], (end - start)[edge], counts[edge]
        first = begin + run * (number / parts)[:, None]
        last = np.where((number + 1 == parts)[:, None], end[edge], begin + run * ((number + 1) / parts)[:, None])
        order = np.argsort(np.minimum(first, last)[:, 1], kind="stable")
        return cls(np.concatenate([first, last], axis=1)[order].T.copy())

    def area(self, x0: Floats, y0: Floats, x1: Floats, y1: Floats) -> Floats:
        """Area of the polygons inside each rectangle, float64 [N]; all arguments float64 [N]."""
        first, last = self._tops.searchsorted(y0 - self._height), self._tops.searchsorted(y1)
        counts = np.maximum(last - first, 0)  # of a rectangle that is turned over there are none
        boxes = np.stack([x0, y0, x1, y1])
        ends = np.cumsum(counts)
        sums = np.zeros(len(x0))
        begin = 0
        while begin < len(x0):
            limit = _PAIRS + (ends[begin - 1] if begin else 0)
            stop = max(begin + 1, int(ends.searchsorted(limit, side="right")))
            part = slice(begin, stop)
            piece = np.repeat(first[part], counts[part]) + _counting(counts[part])
            sums[part] = _sums(self.pieces.take(piece, axis=1), counts[part], boxes[:, part])
            begin = stop
        return sums

    def beside(self, y0: float, y1: float) -> Floats:
        """The pieces, float64 [4, K], that a rectangle between these heights has to look at."""
        return self.pieces[:, self._tops.searchsorted(y0 - self._height) : self._tops.searchsorted(y1)]


def area_of_each(indices: Sequence[AreaIndex], boxes: Floats) -> Floats:
    """Area inside rectangle n of the polygons of index n, float64 [N].

    Args:
        indices: one for each rectangle; a test of many slides at once costs some µs a rectangle.
        boxes: float64 [4, N]: x0, y0, x1 and y1.
    """
    if not indices:
        return np.empty(0)
    beside = [index.beside(y0, y1) for index, y0, y1 in zip(indices, boxes[1].tolist(), boxes[3].tolist(), strict=True)]
    counts = np.array([pieces.shape[1] for pieces in beside])
    return _sums(np.concatenate(beside, axis=1), counts, boxes)


def _sums(pieces: Floats, counts: NDArray[np.int64], boxes: Floats) -> Floats:
    """Area inside each rectangle, from the pieces beside the first, those beside the second, and so on."""
    box = np.repeat(np.arange(len(counts)), counts)
    x0, y0, x1, y1 = boxes.take(box, axis=1)
    from_x, from_y, to_x, to_y = pieces
    top = np.minimum(np.maximum(from_y, y0), y1)
    rise = np.minimum(np.maximum(to_y, y0), y1) - top
    mean = np.minimum(np.maximum(from_x, x0), x1)
    slanted = np.flatnonzero((mean != np.minimum(np.maximum(to_x, x0), x1)) & (rise != 0))
    mean -= x0
    if len(slanted):
        from_x, from_y, to_x, to_y = pieces[:, slanted]
        slope = (to_x - from_x) / (to_y - from_y)
        start = from_x + (top[slanted] - from_y) * slope - x0[slanted]
        mean[slanted] = _mean_clipped(start, rise[slanted] * slope, (x1 - x0)[slanted])
    sums = np.bincount(box, rise * mean, minlength=len(counts))
    return np.minimum(np.maximum(sums, 0), (boxes[2] - boxes[0]) * (boxes[3] - boxes[1]))


def _mean_clipped(start: Floats, run: Floats, width: Floats) -> Floats:
    """Mean of clip(x, 0, width) while x goes from ``start`` to ``start + run`` evenly."""
    end = start + run
    a, b = np.minimum(np.maximum(start, 0), width), np.minimum(np.maximum(end, 0), width)
    level = np.abs(run) < 1e-6
    integral = (b - a) * (b + a) / 2 + width * (np.maximum(end - width, 0) - np.maximum(start - width, 0))
    return np.where(level, (a + b) / 2, integral / np.where(level, 1, run))


def _edges(polygons: Sequence[Polygon]) -> tuple[Floats, Floats]:
    """Starts and ends [E, 2] of all edges that are not horizontal, outer rings turning one way and holes the other."""
    rings = [ring for polygon in polygons for ring in _rings(orient(polygon, 1.0))]
    if not rings:
        return np.empty((0, 2)), np.empty((0, 2))
    points = [shapely.get_coordinates(ring) for ring in rings]
    start, end = np.concatenate([p[:-1] for p in points]), np.concatenate([p[1:] for p in points])
    slanted = start[:, 1] != end[:, 1]
    return start[slanted], end[slanted]


def _rings(polygon: Polygon) -> list:
    return [] if polygon.is_empty else [polygon.exterior, *polygon.interiors]


def _counting(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … count − 1 for each of ``counts``, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)

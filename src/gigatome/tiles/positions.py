"""All positions at which a tile holds enough tissue, to draw from uniformly.

The positions of a slide are cut into cells, like a quadtree. What a cell's tiles cover together bounds the tissue of
each of them from both sides, so that many cells are soon known to hold only good positions, or none. A draw takes a
cell by its number of positions, and a position in it; in cells in doubt that is tested, and if it fails another is
drawn. So every good position is equally likely and no other is ever drawn: exactly, not to the resolution of a raster.
The cells need only be so small that most draws are good: a test is cheaper than many cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from gigatome.tissue.area import AreaIndex, area_of_each
from gigatome.tissue.mask import OVERLAP_TOLERANCE

Sides = TypeVar("Sides", float, NDArray[np.float64])

_GOOD, _CELLS = 0.75, 2048  # stop when about this share of the positions is good, or at more cells; 24 bytes each
_SURE, _FEW = 0.5, 256  # but with few cells, so much must be sure as well
_SEARCH = 65_536  # cells that are looked at before the slide is given up as having no position at all


@final
@dataclass(frozen=True, eq=False)
class Positions:
    """Where tiles of one size may lie on one slide; made by :func:`find_positions`.

    Attributes:
        tissue: the outlines.
        side: of the tiles in level-0 pixels.
        least: area of tissue that a tile must hold, in level-0 pixels.
        cells: int32 [C, 4], the least x and y of each cell and its width and height, in level-0 pixels.
        ends: int64 [C], positions up to and with each cell.
        sure: so many cells, the first ones, hold only good positions.
    """

    tissue: AreaIndex
    side: float
    least: float
    cells: NDArray[np.int32]
    ends: NDArray[np.int64]
    sure: int


def find_positions(tissue: AreaIndex, width: int, height: int, side: float, min_tissue: float) -> Positions | None:
    """Finds all positions, in whole level-0 pixels, at which a tile lies wholly on the slide and holds enough tissue.

    Args:
        tissue: the outlines.
        width: of the slide, level-0 pixels.
        height: of the slide, level-0 pixels.
        side: of the tiles in level-0 pixels.
        min_tissue: share of a tile that must be tissue, 0 to 1.

    Returns:
        The positions; None if there are none, as on a slide smaller than a tile.
    """
    columns, rows = math.floor(width - side + 1e-6) + 1, math.floor(height - side + 1e-6) + 1
    if columns <= 0 or rows <= 0:
        return None
    least = least_tissue(side, min_tissue)
    size = 1 << (max(columns, rows) - 1).bit_length()
    doubtful = np.array([[0, 0, columns, rows]], np.int64)
    sure = np.empty((0, 4), np.int64)
    while len(doubtful):
        bare, held = _bounds(tissue, doubtful, side)
        good = side**2 - bare >= least
        sure = np.concatenate([sure, doubtful[good]])
        keep = (held >= least) & ~good
        doubtful, share = doubtful[keep], (held / (held + bare))[keep]
        if size == 1 or not len(doubtful) or _enough(tissue, sure, doubtful, share, side, least):
            break
        size //= 2
        doubtful = _quarter(doubtful, size)
    cells = np.concatenate([sure, doubtful])
    if not len(cells) or (not len(sure) and not _any_good(tissue, doubtful, side, least)):
        return None
    ends = np.cumsum(cells[:, 2] * cells[:, 3])
    return Positions(tissue, side, least, cells.astype(np.int32), ends, len(sure))


def least_tissue(side: Sides, min_tissue: float) -> Sides:
    """Area of tissue that a tile of this side must hold, less what floating point may lose of it."""
    return (min_tissue - OVERLAP_TOLERANCE) * side**2


def draw(
    positions: Sequence[Positions], numbers: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """One good position of each of ``positions``, each as likely as any other.

    Args:
        positions: N slides and resolutions to draw from.
        numbers: float64 [N, T], uniform in [0, 1); each gives one position, and the first good one is taken.

    Returns:
        bool [N], whether one of them is good; int64 [N], its x; int64 [N], its y.
    """
    total = np.array([p.ends[-1] for p in positions])
    index = (numbers * total[:, None]).astype(np.int64)
    cell, end, sure = np.empty((*index.shape, 4), np.int64), np.empty_like(index), np.empty(index.shape, bool)
    for row, p in enumerate(positions):
        found = p.ends.searchsorted(index[row], side="right")
        cell[row], end[row], sure[row] = p.cells[found], p.ends[found], found < p.sure
    x, y, width, height = np.moveaxis(cell, -1, 0)
    down, right = np.divmod(index - (end - width * height), width)
    x, y = x + right, y + down
    good = _tested(positions, x, y, sure)
    row, first = np.arange(len(good)), good.argmax(axis=1)
    return good[row, first], x[row, first], y[row, first]


def _tested(positions: Sequence[Positions], x, y, sure: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether tiles are good, [N, T]; those behind one that is sure anyway are not looked at."""
    row, column = np.nonzero(~np.logical_or.accumulate(sure, axis=1))
    asked = [positions[i] for i in row.tolist()]
    left, top = x[row, column].astype(np.float64), y[row, column].astype(np.float64)
    side, least = np.array([(p.side, p.least) for p in asked]).reshape(-1, 2).T
    good = sure.copy()
    good[row, column] = area_of_each([p.tissue for p in asked], np.stack([left, top, left + side, top + side])) >= least
    return good


def _bounds(
    tissue: AreaIndex, cells: NDArray[np.int64], side: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What all tiles of each cell together cover: the area without tissue, and the area of tissue.

    A tile holds no more tissue than they, and no less than it would if all that is bare there lay in it.
    """
    x0, y0 = cells[:, 0].astype(float), cells[:, 1].astype(float)
    width, height = (cells[:, 2] - 1 + side).astype(float), (cells[:, 3] - 1 + side).astype(float)
    held = tissue.area(x0, y0, x0 + width, y0 + height)
    return width * height - held, held


def _enough(tissue: AreaIndex, sure, doubtful, share: NDArray[np.float64], side: float, least: float) -> bool:
    """Whether the cells need not be divided further; of those in doubt, ``share`` guesses what part is good."""
    certain, doubt = (sure[:, 2] * sure[:, 3]).sum(), doubtful[:, 2] * doubtful[:, 3]
    count, total = len(sure) + len(doubtful), certain + doubt.sum()
    poor, unsure = certain + doubt @ share < _GOOD * total, certain < _SURE * total
    if (poor and count <= _CELLS) or (unsure and count <= _FEW):
        return False
    return bool(certain) or count > _SEARCH or _any_good(tissue, doubtful, side, least)


def _any_good(tissue: AreaIndex, cells: NDArray[np.int64], side: float, least: float) -> bool:
    """Whether the middle position of any cell is good."""
    x, y = (cells[:, :2] + cells[:, 2:] // 2).T.astype(float)
    return bool((tissue.area(x, y, x + side, y + side) >= least).any())


def _quarter(cells: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Divides cells into four of at most ``size`` by ``size``; those that come out empty are left out."""
    x, y, width, height = cells.T
    w0, h0 = np.minimum(width, size), np.minimum(height, size)
    parts = [
        (x, y, w0, h0),
        (x + w0, y, width - w0, h0),
        (x, y + h0, w0, height - h0),
        (x + w0, y + h0, width - w0, height - h0),
    ]
    divided = np.concatenate([np.stack(part, axis=1) for part in parts])
    return divided[(divided[:, 2] > 0) & (divided[:, 3] > 0)]

"""All positions at which a tile holds enough tissue, to draw from uniformly.

The positions of a slide are cut into cells, like a quadtree. What a cell's tiles cover together bounds the tissue of
each of them from both sides, so most cells are soon known to hold only good positions, or none. A draw takes a cell by
its number of positions, and a position in it; only in the few cells in doubt is that tested, and if it fails all is
drawn anew. So every good position is equally likely and no other is ever drawn: exactly, not to the resolution of a
raster.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.tissue.mask import OVERLAP_TOLERANCE, TissueMask

_CELLS = 4096  # about the most a slide and resolution may have; 25 bytes each
_DOUBT = 0.1  # stop when no more than this share of the positions is in doubt
_SEARCH = 16  # times as many cells may be looked at before the slide is given up as having no position at all


@final
@dataclass(frozen=True, eq=False)
class Positions:
    """Where tiles of one size may lie on one slide; made by :func:`find_positions`.

    Attributes:
        mask: the tissue.
        side: of the tiles in level-0 pixels.
        min_tissue: share of a tile that must be tissue.
        cells: int32 [C, 4], the least x and y of each cell and its width and height, in level-0 pixels.
        sure: bool [C], whether every position of the cell is good.
        ends: int64 [C], positions up to and with each cell.
    """

    mask: TissueMask
    side: float
    min_tissue: float
    cells: NDArray[np.int32]
    sure: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """One of all good positions (x, y), each as likely as any other."""
        while True:
            index = int(rng.random() * self.ends[-1])
            cell = int(self.ends.searchsorted(index, side="right"))
            x, y, width, _ = self.cells[cell].tolist()
            row, column = divmod(index - (int(self.ends[cell - 1]) if cell else 0), width)
            if self.sure[cell] or self.holds(x + column, y + row):
                return x + column, y + row

    def holds(self, x: int, y: int) -> bool:
        """Whether a tile at (x, y) holds enough tissue."""
        return bool(self.mask.overlap(x, y, self.side)[0] >= self.min_tissue - OVERLAP_TOLERANCE)


def find_positions(mask: TissueMask, side: float, min_tissue: float) -> Positions | None:
    """Finds all positions, in whole level-0 pixels, at which a tile lies wholly on the slide and holds enough tissue.

    Args:
        mask: the tissue.
        side: of the tiles in level-0 pixels.
        min_tissue: share of a tile that must be tissue, 0 to 1.

    Returns:
        The positions; None if there are none, as on a slide smaller than a tile.
    """
    columns, rows = math.floor(mask.width - side + 1e-6) + 1, math.floor(mask.height - side + 1e-6) + 1
    if columns <= 0 or rows <= 0:
        return None
    size = 1 << (max(columns, rows) - 1).bit_length()
    doubtful = np.array([[0, 0, columns, rows]], np.int64)
    sure = np.empty((0, 4), np.int64)
    while len(doubtful):
        good, possible = _judge(mask, doubtful, side, min_tissue)
        sure = np.concatenate([sure, doubtful[good]])
        doubtful = doubtful[possible & ~good]
        if size == 1 or not len(doubtful) or _enough(mask, sure, doubtful, side, min_tissue):
            break
        size //= 2
        doubtful = _quarter(doubtful, size)
    cells = np.concatenate([sure, doubtful])
    if not len(cells) or (not len(sure) and not _any_good(mask, doubtful, side, min_tissue)):
        return None
    ends = np.cumsum(cells[:, 2] * cells[:, 3])
    return Positions(mask, side, min_tissue, cells.astype(np.int32), np.arange(len(cells)) < len(sure), ends)


def has_positions(mask: TissueMask, side: float, min_tissue: float) -> bool:
    """Whether :func:`find_positions` finds any; quick where the largest piece of tissue holds one."""
    if not mask.polygons or side > min(mask.width, mask.height):
        return find_positions(mask, side, min_tissue) is not None
    middle = mask.polygons[0].representative_point()
    x = round(min(max(middle.x - side / 2, 0), math.floor(mask.width - side)))
    y = round(min(max(middle.y - side / 2, 0), math.floor(mask.height - side)))
    enough = bool(mask.overlap(x, y, side)[0] >= min_tissue)
    return enough or find_positions(mask, side, min_tissue) is not None


def _judge(
    mask: TissueMask, cells: NDArray[np.int64], side: float, min_tissue: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether all positions of each cell are good, and whether any can be.

    A tile holds no more tissue than all tiles of its cell together, and no less than it would if all that is bare
    there lay in it.
    """
    x0, y0 = cells[:, 0].astype(float), cells[:, 1].astype(float)
    width, height = (cells[:, 2] - 1 + side).astype(float), (cells[:, 3] - 1 + side).astype(float)
    tissue = mask.areas(x0, y0, x0 + width, y0 + height)
    slack = OVERLAP_TOLERANCE * side**2
    good = side**2 - (width * height - tissue) >= min_tissue * side**2 - slack
    return good, tissue >= min_tissue * side**2 - slack


def _enough(mask: TissueMask, sure, doubtful, side: float, min_tissue: float) -> bool:
    """Whether the cells need not be divided further."""
    certain, doubt = (sure[:, 2] * sure[:, 3]).sum(), (doubtful[:, 2] * doubtful[:, 3]).sum()
    if certain:
        return bool(doubt <= _DOUBT * (certain + doubt) or len(sure) + len(doubtful) > _CELLS)
    if len(doubtful) > _SEARCH * _CELLS:
        return True
    return len(doubtful) > _CELLS and _any_good(mask, doubtful, side, min_tissue)


def _any_good(mask: TissueMask, cells: NDArray[np.int64], side: float, min_tissue: float) -> bool:
    """Whether the middle position of any cell is good."""
    middle = cells[:, :2] + cells[:, 2:] // 2
    return bool((mask.overlap(middle[:, 0], middle[:, 1], side) >= min_tissue - OVERLAP_TOLERANCE).any())


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

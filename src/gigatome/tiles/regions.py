"""Regions of a slide: square blocks of the tiles of its grid.

A region begins at a whole number of regions from the level-0 origin, so each tile of the grid lies in one region and
at one place of it. Which tiles are there does not depend on the regions: those that the tile level would embed.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError
from gigatome.core.geometry import level0_length
from gigatome.tiles.grid import TileGrid


@dataclass(frozen=True)
class RegionOptions:
    """Which regions a slide has, and which of their tiles are read.

    Attributes:
        tiles: tiles along each side of a region; 16 tiles of 256 px at 0.5 mpp are HIPT's regions of 4096 px.
        min_tiles: tissue tiles that a region must have, a sixteenth of its tiles by default. The fullest region of a
            slide is kept whatever it has, so that no slide is lost for being small.
        background: what becomes of the tiles of a region that hold too little tissue: ``"mask"`` leaves them out;
            ``"encode"`` reads them like the others, as HIPT's authors do, save those that lie beyond the slide.
    """

    tiles: int = 16
    min_tiles: int | None = None
    background: Literal["mask", "encode"] = "mask"

    def __post_init__(self):
        if self.tiles < 1 or not 1 <= self.least_tiles <= self.tiles**2:
            raise ValueError(
                f"tiles must be at least 1 and min_tiles from 1 to tiles², not {self.tiles} and {self.min_tiles}"
            )
        if self.background not in ("mask", "encode"):
            raise ValueError(f"background is mask or encode, not {self.background}")

    @property
    def least_tiles(self) -> int:
        """Tissue tiles that a region must have."""
        return max(1, self.tiles**2 // 16) if self.min_tiles is None else self.min_tiles


@final
@dataclass(frozen=True, eq=False)
class RegionGrid:
    """The regions of one slide, R of them with T = ``options.tiles``² places for tiles each, row by row.

    Attributes:
        grid: the tiles of the slide.
        options: which regions.
        coords: int64 [R, 2], (x, y) of each region's top-left corner, level-0 pixels.
        tile_coords: int64 [R, T, 2], the same of each tile; some may lie beyond the slide.
        mask: bool [R, T], the tiles that are read; the others are background.
    """

    grid: TileGrid
    options: RegionOptions
    coords: NDArray[np.int64]
    tile_coords: NDArray[np.int64]
    mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def tile_size(self) -> int:
        """Side of a region, pixels at the tiles' mpp."""
        return self.options.tiles * self.grid.tile_size

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the regions and with which of their tiles are read."""
        return sha256(self.coords.tobytes() + np.packbits(self.mask).tobytes()).hexdigest()[:16]

    def read_tiles(self) -> TileGrid:
        """The tiles that are read, region by region; what they hold of tissue is not said."""
        return self._at(self.tile_coords[self.mask], self.grid.tile_size)

    def as_tiles(self) -> TileGrid:
        """The regions as if they were tiles themselves."""
        return self._at(self.coords, self.tile_size)

    def _at(self, coords: NDArray[np.int64], tile_size: int) -> TileGrid:
        unknown = np.full(len(coords), np.nan, np.float32)
        return replace(self.grid, coords=coords, tissue_fraction=unknown, tile_size=tile_size)


def make_regions(
    grid: TileGrid, options: RegionOptions = RegionOptions(), *, shift: tuple[int, int] = (0, 0)
) -> RegionGrid:
    """Gathers the tiles of a slide into regions.

    Args:
        grid: the tiles, without overlap, at least one.
        options: which regions.
        shift: tiles, in x and y, by which the regions begin before the level-0 origin, each from 0 to
            ``options.tiles`` - 1; for averaging over several grids of regions.

    Raises:
        ConfigError: the tiles overlap, or do not lie on a grid that begins at the slide's corner.
    """
    if grid.overlap:
        raise ConfigError(f"regions are made of tiles side by side, not of tiles that overlap by {grid.overlap} px")
    step = level0_length(grid.tile_size, grid.mpp, grid.slide_mpp)
    places = np.rint(grid.coords / step).astype(np.int64)
    if np.abs(np.rint(places * step) - grid.coords).max(initial=0) > 1:
        raise ConfigError(
            "the tiles do not lie on a grid from the slide's corner; remove their file to have it made anew"
        )
    side, offset = options.tiles, np.array(shift)
    blocks, slots = np.divmod(places + offset, side)
    corners, region = np.unique(blocks[:, ::-1], axis=0, return_inverse=True)  # row by row
    tissue = np.zeros((len(corners), side * side), bool)
    tissue[region.ravel(), slots[:, 1] * side + slots[:, 0]] = True
    count = tissue.sum(1)
    kept = count >= min(options.least_tiles, count.max(initial=0))
    corners, tissue = corners[kept][:, ::-1], tissue[kept]
    rows, columns = np.divmod(np.arange(side * side), side)
    index = (corners * side - offset)[:, None] + np.stack([columns, rows], 1)
    tile_coords = np.rint(index * step).astype(np.int64)
    inside = np.all((index >= 0) & (tile_coords < (grid.slide_width, grid.slide_height)), axis=2)
    mask = inside if options.background == "encode" else tissue
    return RegionGrid(grid, options, tile_coords[:, 0], tile_coords, mask)

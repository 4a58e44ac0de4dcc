"""The tiles of regions, for whatever learns from tiles: one file of regions serves both."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import StoreError
from gigatome.core.geometry import level0_length
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.regions import read_mask
from gigatome.tiles.grid import read_grid


@final
class RegionTiles:
    """The tiles of the regions of some slides, region by region, each as :class:`BagReader` has tiles.

    Places of a region without a tile are left out.

    Args:
        regions: of slides whose files hold regions.

    Attributes:
        names: of the slides.
        sizes: int64 [N], tiles of each, at least 1.
        shape: of an instance, (D,).
        dim: size D of an embedding.
        encoder: name of the tile encoder.
        weights: hash of its weights; "" if no file says.
        side: tiles along a region's side.

    Raises:
        StoreError: a file holds no regions, or a slide has no tile in any.
    """

    def __init__(self, regions: BagReader):
        self._regions = regions
        self._masks = [_mask(regions, index) for index in range(len(regions))]
        self.names, self.dim, self.shape = regions.names, regions.dim, (regions.dim,)
        self.encoder, self.weights = regions.encoder, regions.weights
        self.side = round(regions.shape[0] ** 0.5)
        self.sizes = np.array([np.count_nonzero(mask) for mask in self._masks], np.int64)
        for name in (name for name, size in zip(self.names, self.sizes, strict=True) if not size):
            raise StoreError(f"{name}: no region has a tile, and an empty bag cannot be used; leave the slide out")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32] | NDArray[np.float16]:
        """As :meth:`BagReader.read`: embeddings [n, D] of tiles."""
        values: NDArray[Any] = self._regions.read(index)
        values = values.reshape(-1, self.dim)
        mask = self._masks[index]
        if rows is None:
            return values if mask.all() else values[mask]
        return values[np.flatnonzero(mask)[rows]]

    def coords(self, index: int) -> NDArray[np.int64]:
        """Corners of the tiles of one slide, (x, y) in level-0 pixels, int64 [n, 2]; as the grid of tiles has them."""
        grid = read_grid(self._regions.path(index))
        step = level0_length(grid.tile_size / self.side, grid.mpp, grid.slide_mpp)
        rows, columns = np.divmod(np.arange(self.side**2), self.side)
        places = np.rint(grid.coords / step)[:, None] + np.stack([columns, rows], 1)
        return np.rint(places.reshape(-1, 2)[self._masks[index]] * step).astype(np.int64)


def _mask(regions: BagReader, index: int) -> NDArray[np.bool_]:
    """Places with a tile, bool [R × T]."""
    path, shape = regions.path(index), (regions.sizes[index], *regions.shape[:-1])
    mask = read_mask(path)
    if mask.shape != shape:
        raise StoreError(f"{path}: its mask {mask.shape} does not fit its regions {shape}; embed the slide again")
    return mask.ravel()

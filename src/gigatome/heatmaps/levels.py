"""Attention of a hierarchy over a whole slide: to cells of tiles, to tiles of regions, to the slide's regions.

At every level attention is a softmax among the members of one parent, see :mod:`gigatome.heatmaps.attention`. Each
level is summed on a raster of its own. What all levels say together is worked out for one channel at a time, on the
finest of the rasters, so that a large slide needs no more memory than its per-head maps.

Smoothing. The passes of the cell level are shifted by parts of a tile, as :class:`AttentionOptions` says. For each of
them the tiles' embeddings are computed once, and regions are laid over them at several shifts by whole tiles, for which
the region encoder alone runs again. Every pass sees what lies under it, and its attention is put back there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.core.errors import ConfigError
from gigatome.core.logs import Progress, silent
from gigatome.embeddings.encoding import encode_grids
from gigatome.embeddings.regions import TILES
from gigatome.heatmaps.attention import (
    AttentionOptions,
    HeatMap,
    Raster,
    evaluating,
    patches_along,
    ranks,
    read_tiles,
    shifts_of,
)
from gigatome.heatmaps.chain import LEVELS, Chain
from gigatome.heatmaps.hierarchy import HierarchyOptions, LevelMaps
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import TileGrid
from gigatome.tiles.regions import RegionGrid, RegionOptions, make_regions

_REGIONS = 64  # that the region encoder sees at once
_LEAST = 1e-30  # attention, so that members of which none gets any share alike
_FAR = 1 << 20  # tiles; more than a slide has along a side


def level_maps(
    slide: Slide,
    chain: Chain,
    grid: TileGrid,
    levels: Sequence[str],
    attention: AttentionOptions | None = None,
    options: HierarchyOptions | None = None,
    *,
    progress: Progress = silent,
) -> LevelMaps:
    """Attention of each level over all tiles of a slide.

    Source: the hierarchical heat-maps of HIPT (arXiv:2206.02647 and its released code), which are of one region;
    :func:`gigatome.heatmaps.hipt.hipt_region_map` makes those. Differs: whole slides; shifted passes of the region
    level along both axes; places without tissue are not attended to; attention of the slide model; the product.

    Args:
        slide: the slide.
        chain: used on the device where it is.
        grid: the tiles, without overlap.
        levels: of :data:`~gigatome.heatmaps.chain.LEVELS`, in any order.
        attention: ``rank="tile"`` ranks cells among those of their tile, tiles among those of their region, and regions
            among those of the slide; ``"slide"`` ranks all of a level together. ``shifts`` are those of the tiles.
        options: of the regions and of the combination.
        progress: called after each batch of tiles.

    Returns:
        The maps. A tile that no region holds, since its regions have too few tiles, is NaN at the levels tile and
        region.

    Raises:
        ConfigError: there is no model of a level, or the sizes do not fit.
        EvaluationError: the slide model learnt from other regions.
        NoTissueError: there are no tiles.
        SlideError: a tile cannot be read.
    """
    attention, options = attention or AttentionOptions(), options or HierarchyOptions()
    chain.check(levels)
    side = patches_along(slide, grid, chain.tile, attention)
    regions = options.regions or _regions_of(chain)
    _check(chain, levels, grid, regions, options)
    work = _Work(slide, chain, grid, levels, attention, options, regions, progress)
    shifts = shifts_of(side, attention.shifts)
    with evaluating(chain.tile, *([] if chain.region is None else [chain.region])), torch.inference_mode():
        for shift in shifts if work.cell or work.tile else shifts[:1]:
            work.run(shift)
    return work.finish()


def _regions_of(chain: Chain) -> RegionOptions:
    """Regions as the encoders and heads were trained on."""
    origin = None if chain.slide is None else chain.slide.origin
    learnt = 16 if origin is None else int(origin.tiling.get(TILES, 16))
    encoded = origin is not None and origin.background == "encode"
    return RegionOptions(learnt if chain.card is None else chain.card.tiles, background="encode" if encoded else "mask")


def _check(
    chain: Chain, levels: Sequence[str], grid: TileGrid, regions: RegionOptions, options: HierarchyOptions
) -> None:
    if "region" in levels:
        size = regions.tiles * grid.tile_size
        chain.check_slide({"patch_size": size, "target_mpp": grid.mpp, TILES: regions.tiles})
    if "tile" in levels and options.region_shifts > regions.tiles:
        raise ConfigError(f"regions of {regions.tiles} tiles have no {options.region_shifts} shifts; give fewer")
    for level, head in options.heads.items():
        count = chain.heads(level) if level in levels else math.inf
        if not 0 <= head < count:
            raise ConfigError(f"the level {level} has attention heads 0 to {count - 1}, not {head}")
    if not sum(options.weights.get(level, 1.0) for level in levels):
        raise ConfigError(f"all of the levels {', '.join(levels)} weigh nothing; give one a weight")


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """Which tiles are embedded, and where each lies in regions.

    Attributes:
        coords: int64 [M, 2] of the tiles, level-0 pixels: those of the grid first, then background that regions want.
        first: the regions without a shift.
        rows: of each shift, int64 [R, T], row in ``coords`` of each place's tile; -1 where there is none.
    """

    coords: NDArray[np.int64]
    first: RegionGrid
    rows: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(cls, grid: TileGrid, options: RegionOptions, shifts: int) -> "_Plan":
        found = [make_regions(grid, options, shift=(int(i), int(j))) for i, j in shifts_of(options.tiles, shifts)]
        wanted = [_keys(regions.tile_coords, grid.side) for regions in found]
        own = _keys(grid.coords, grid.side)
        masked = [keys[regions.mask] for keys, regions in zip(wanted, found, strict=True)]
        extra = np.setdiff1d(np.concatenate(masked), own)
        places = np.stack([extra % (2 * _FAR), extra // (2 * _FAR)], 1) - _FAR
        known = np.concatenate([own, extra])
        order = np.argsort(known)
        rows = [
            np.where(regions.mask, order[np.searchsorted(known, keys, sorter=order) % len(order)], -1)
            for keys, regions in zip(wanted, found, strict=True)
        ]
        coords = np.concatenate([grid.coords, np.rint(places * grid.side).astype(np.int64)])
        return cls(coords, found[0], tuple(rows))


def _keys(coords: NDArray[np.int64], side: float) -> NDArray[np.int64]:
    """One number for each place of the grid of tiles, int64 [...]; ascending row by row."""
    places = np.rint(coords / side).astype(np.int64) + _FAR
    return places[..., 1] * (2 * _FAR) + places[..., 0]


@final
class _Work:
    """The passes over a slide, which add to the rasters of the levels."""

    def __init__(
        self,
        slide: Slide,
        chain: Chain,
        grid: TileGrid,
        levels: Sequence[str],
        attention: AttentionOptions,
        options: HierarchyOptions,
        regions: RegionOptions,
        progress: Progress,
    ):
        self.slide, self.chain, self.grid = slide, chain, grid
        self.attention, self.options, self.regions, self.progress = attention, options, regions, progress
        self.side = grid.tile_size // chain.tile.patch_size
        # the widest cells that both tiles and their shifts are made of
        unit = math.gcd(self.side, *(int(shift[0]) for shift in shifts_of(self.side, attention.shifts)))
        self.cell = Raster(grid, self.side) if "cell" in levels else None
        self.tile = Raster(grid, self.side // unit) if "tile" in levels else None
        self.region = Raster(grid, 1) if "region" in levels else None
        shifts = options.region_shifts if self.tile else 1
        self.plan = _Plan.of(grid, regions, shifts) if self.tile or self.region else None
        tiles = len(grid) if self.plan is None else len(self.plan.coords)
        each = tiles if self.tile else len(grid)  # of a shifted pass
        shifted = attention.shifts**2 - 1 if self.cell or self.tile else 0
        self.done, self.total = 0, tiles + shifted * each

    def run(self, shift: NDArray[np.int64]) -> None:
        """One pass over all tiles, shifted by (x, y) patches."""
        first = not shift.any()
        plan = self.plan if self.tile or first else None
        coords = self.grid.coords if plan is None else plan.coords
        places = np.rint(coords + shift * (self.grid.side / self.side)).astype(np.int64)
        embeddings = None if plan is None else torch.zeros(len(coords) + 1, self.chain.tile.dim)
        done = 0
        for images in read_tiles(self.slide, places, self.grid, self.attention):
            normalised = self.chain.tile.normalise(torch.from_numpy(images))
            if self.cell and done < len(self.grid):
                self._add_cells(self.cell, normalised[: len(self.grid) - done], done, shift)
            if embeddings is not None:
                embeddings[done : done + len(images)] = self.chain.tile(normalised).float().cpu()
            done += len(images)
            self.done += len(images)
            self.progress("attention", self.done, self.total)
        if embeddings is not None and self.tile:
            self._add_tiles(self.tile, embeddings, shift)
        if embeddings is not None and self.region and first:
            self._add_regions(self.region, embeddings)

    def finish(self) -> LevelMaps:
        found: dict[str, HeatMap] = {}
        densities: dict[str, NDArray[np.float32]] = {}
        for level, raster in zip(LEVELS, (self.cell, self.tile, self.region), strict=True):
            if raster is None:
                continue
            heads = raster.channels - (self.options.combine == "product")
            names = ("region",) if level == "region" else tuple(f"{level}_h{head}" for head in range(heads))
            heat = raster.finish(names)
            if self.options.combine == "product":
                densities[level] = heat.values[-1]
            heat = replace(heat, values=heat.values[:heads])
            if self.attention.rank == "slide":
                for channel in heat.values:
                    present = np.isfinite(channel)
                    channel[present] = ranks(torch.from_numpy(channel[present])).numpy()
            found[level] = heat
        return LevelMaps(found, densities, self.options, self.grid.side)

    def _add_cells(self, raster: Raster, images: Tensor, done: int, shift: NDArray[np.int64]) -> None:
        weights = self.chain.tile.attention(images)
        blocks = self._shown("cell", weights.flatten(2)).unflatten(2, weights.shape[2:]).cpu().numpy()
        for place, block in zip(raster.places[done:] + shift, blocks, strict=False):
            raster.add(place, block)

    def _add_tiles(self, raster: Raster, embeddings: Tensor, shift: NDArray[np.int64]) -> None:
        """Attention within the regions of all shifts, put back where the tiles of this pass lie."""
        region, plan = self.chain.region, self.plan
        assert region is not None and plan is not None  # noqa: S101, PT018 - there is no raster without them
        count = len(self.grid)
        sums = np.zeros((count, region.config.heads + (self.options.combine == "product")), np.float32)
        passes = np.zeros(count, np.int64)
        for rows in plan.rows:
            for part in np.split(rows, range(_REGIONS, len(rows), _REGIONS)):
                weights = region.attention(*self._grids(embeddings, part)).flatten(2).cpu()
                for own, row in zip(weights, part, strict=True):
                    values = self._shown("tile", own[:, row >= 0]).numpy()
                    inside = row[row >= 0]
                    sums[inside[inside < count]] += values[:, inside < count].T
                    passes[inside[inside < count]] += 1
        places = raster.places + shift * raster.side // self.side
        for place, total, number in zip(places, sums, passes.tolist(), strict=True):
            if number:
                block = np.broadcast_to(total[:, None, None], (len(total), raster.side, raster.side))
                raster.add(place, block, number)

    def _add_regions(self, raster: Raster, embeddings: Tensor) -> None:
        """Attention of the slide model, as values of the tiles in each region."""
        chain, plan = self.chain, self.plan
        assert plan is not None  # noqa: S101 - there is no raster without it
        rows = plan.rows[0]
        x = embeddings[torch.from_numpy(rows)].numpy()  # row -1 is of zeros
        if not chain.on_grids:
            assert chain.region is not None  # noqa: S101 - open_chain has seen to it
            x = encode_grids(chain.region, x, rows >= 0, device=str(chain.device))
        weights = chain.attend(x, plan.first.coords, label=self.options.label)
        values = ranks(torch.from_numpy(weights)).numpy() if self.attention.rank == "tile" else weights
        tissue = (rows >= 0) & (rows < len(self.grid))
        sizes = tissue.sum(1)
        # of a tile's share, relative to that of a slide on which all tiles have the same
        density = weights * sizes.sum() / np.maximum(sizes, 1)
        block = np.stack([values, density] if self.options.combine == "product" else [values])
        for index, row in enumerate(rows):
            for tile in row[tissue[index]]:
                raster.add(raster.places[tile], block[:, index, None, None])

    def _grids(self, embeddings: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """What the region encoder takes for regions of the tiles ``rows`` [R, T]: grids and mask."""
        size = (self.regions.tiles, self.regions.tiles)
        index = torch.from_numpy(rows)  # -1 is the last row, of zeros
        grids = embeddings[index].mT.unflatten(2, size)
        return grids.to(self.chain.device), (index >= 0).unflatten(1, size).to(self.chain.device)

    def _shown(self, level: str, weights: Tensor) -> Tensor:
        """What is drawn of the attention [..., heads, n] to n members of a parent; for a product, then the density."""
        shown = ranks(weights) if self.attention.rank == "tile" else weights
        if self.options.combine != "product":
            return shown
        weights = weights.clamp(min=_LEAST)
        relative = weights / weights.mean(-1, keepdim=True)
        head = self.options.heads.get(level)
        density = relative.mean(-2, keepdim=True) if head is None else relative[..., head : head + 1, :]
        return torch.cat([shown, density], -2)

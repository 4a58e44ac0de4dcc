"""The maps of several levels of a slide, and what they say together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError
from gigatome.heatmaps.attention import HeatMap
from gigatome.heatmaps.chain import LEVELS
from gigatome.tiles.regions import RegionOptions
from gigatome.tissue.mask import TissueMask

COMBINED = "combined"
"""Name of the channel that holds what all levels say together."""

_NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
_NO_HEADS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class HierarchyOptions:
    """What regions there are and how the levels are put together.

    Attributes:
        regions: which regions; None takes regions of the size on the region encoder's card, or else of those that the
            slide model learnt from, a sixteenth of each tissue at least.
        region_shifts: grids of regions along each axis, each shifted by another ``1 / region_shifts`` of a region and
            all averaged.
        combine: ``"mean"``, the weighted mean of the levels' maps as they are drawn, which is HIPT's; or
            ``"product"``: the share of the slide's attention that reaches a cell through its region and its tile,
            relative to a share that is the same everywhere.
        weights: of levels in the mean; 1 for those that are not named.
        heads: by level, the one head that is drawn and combined; the mean of all where none is named.
        label: class whose attention a slide model with a branch for each class shows; the predicted one by default.
    """

    regions: RegionOptions | None = None
    region_shifts: int = 4
    combine: Literal["mean", "product"] = "mean"
    weights: Mapping[str, float] = field(default_factory=lambda: _NO_WEIGHTS)
    heads: Mapping[str, int] = field(default_factory=lambda: _NO_HEADS)
    label: str | None = None

    def __post_init__(self):
        if self.region_shifts < 1:
            raise ValueError(f"region_shifts must be at least 1, not {self.region_shifts}")
        if unknown := {*self.weights, *self.heads} - set(LEVELS):
            raise ValueError(f"there is no level {min(unknown)}; there are {', '.join(LEVELS)}")
        if any(not (math.isfinite(weight) and weight >= 0) for weight in self.weights.values()):
            raise ValueError(f"weights must not be negative: {dict(self.weights)}")
        if self.weights and self.combine == "product":
            raise ValueError("weights are of the mean; a product has none")


@final
@dataclass(frozen=True, eq=False)
class LevelMaps:
    """The maps of several levels of one slide; all begin at the same corner.

    Attributes:
        levels: by level from the finest, the map of its heads on its own raster: ``cell_h0`` …, ``tile_h0`` …,
            ``region``.
        densities: by level, float32 of its raster, attention relative to uniform; for ``combine="product"`` alone.
        options: how they are put together.
        tile: side of a tile, level-0 pixels; not rounded.
        shown: bool [rows, columns], cells of the finest raster that are shown; None for all.
    """

    levels: Mapping[str, HeatMap]
    densities: Mapping[str, NDArray[np.float32]]
    options: HierarchyOptions
    tile: float
    shown: NDArray[np.bool_] | None = None

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Every head of every level, then :data:`COMBINED` if there is more than one level."""
        heads = [channel for heat in self.levels.values() for channel in heat.channels]
        return (*heads, COMBINED) if len(self.levels) > 1 else tuple(heads)

    @property
    def pictures(self) -> tuple[str, ...]:
        """What is drawn, one picture each: the levels, and :data:`COMBINED` if there is more than one."""
        return (*self.levels, COMBINED) if len(self.levels) > 1 else tuple(self.levels)

    def heat(self, name: str) -> HeatMap:
        """One channel on the finest raster, NaN where it says nothing or is not shown.

        Args:
            name: one of :attr:`channels`, or a level, for its chosen head or the mean of its heads.

        Raises:
            ConfigError: there is no such channel.
        """
        if name == COMBINED and len(self.levels) > 1:
            values = self._combined()
        else:
            level = name.rpartition("_h")[0] or name
            heat = self.levels.get(level)
            if heat is None or name not in (level, *heat.channels):
                raise ConfigError(f"there is no channel {name}; there are {', '.join([*self.channels, *self.levels])}")
            single = heat.values[heat.channels.index(name)] if name in heat.channels else self._drawn(level)
            values = self._fine(single)
        if self.shown is not None:
            values = np.where(self.shown, values, np.float32(np.nan))
        return replace(self._finest, values=values[None], channels=(name,))

    def tiles(self) -> HeatMap:
        """All channels, the mean over each tile."""
        factor = round(self.tile / self._finest.cell)
        parts = [self.heat(name).coarser(factor) for name in self.channels]
        return replace(parts[0], values=np.concatenate([part.values for part in parts]), channels=self.channels)

    def within(self, mask: TissueMask, *, min_tissue: float = 0.5) -> "LevelMaps":
        """The maps without the cells of the finest raster of which less than ``min_tissue`` is tissue."""
        kept = replace(self._finest, values=self._finest.mean[None]).within(mask, min_tissue=min_tissue)
        return replace(self, shown=np.isfinite(kept.values[0]))

    @property
    def _finest(self) -> HeatMap:
        return next(iter(self.levels.values()))

    def _drawn(self, level: str) -> NDArray[np.float32]:
        """The chosen head of a level, or the mean of its heads, on its own raster."""
        heat = self.levels[level]
        head = self.options.heads.get(level)
        return heat.mean if head is None or level == "region" else heat.values[head]

    def _fine(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of a coarser raster on the finest one."""
        rows = self._finest.values.shape[1]
        factor = rows // len(values)
        return values if factor == 1 else values.repeat(factor, 0).repeat(factor, 1)

    def _combined(self) -> NDArray[np.float32]:
        shape = self._finest.values.shape[1:]
        if self.options.combine == "product":
            total = np.ones(shape, np.float32)
            for density in self.densities.values():
                total *= self._fine(density)
            return total
        weights = {level: self.options.weights.get(level, 1.0) for level in self.levels}
        total = np.zeros(shape, np.float32)
        for level, weight in weights.items():
            if weight:
                total += np.float32(weight / sum(weights.values())) * self._fine(self._drawn(level))
        return total

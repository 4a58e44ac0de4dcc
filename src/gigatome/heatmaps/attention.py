"""Maps over a slide: where the encoder looked inside its tiles, and any value that belongs to a tile.

What an attention map can say. Inside a tile, the attention of the class token is a softmax: it sums to about one
whatever the tile shows. So raw values compare patches of one tile and never tiles with each other, and no stitching
changes that. Two ways of ranking make them visible:

* ``rank="tile"`` (HIPT's): percentile ranks among the patches of each tile. It answers "what in this tile?"; every
  tile, also a dull one, has its share of hot patches.
* ``rank="slide"``: percentile ranks among all patches of the slide. It answers "where is attention most
  concentrated?"; tiles with even attention come out in the middle, tiles with a sharp focus at both ends of the scale.

Neither says which tiles matter to a prediction. For that, give :func:`tile_map` one value a tile, such as what the tile
adds to the logit of a probe.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gigatome.blob.store import redact
from gigatome.core.errors import ConfigError, NoTissueError
from gigatome.core.logs import Progress, silent
from gigatome.encoders.vit import TileEncoder
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import TileGrid
from gigatome.tissue.mask import TissueMask


@dataclass(frozen=True)
class AttentionOptions:
    """How an attention map is made.

    Attributes:
        rank: how values become comparable, see the module; ``"none"`` leaves the softmax values.
        shifts: passes along each axis, each shifted by another ``1 / shifts`` of a tile and all averaged, which takes
            the seams between tiles away and ``shifts²`` times as long; 1 is a single pass.
        batch_size: tiles of one forward pass.
        threads: that read tiles.
    """

    rank: Literal["tile", "slide", "none"] = "tile"
    shifts: int = 2
    batch_size: int = 32
    threads: int = 4

    def __post_init__(self):
        if min(self.shifts, self.batch_size, self.threads) < 1:
            raise ValueError("shifts, batch_size and threads must be at least 1")


@dataclass(frozen=True)
class HeatMap:
    """Values on a raster of square cells that lies over a slide.

    Attributes:
        values: float32 [channels, rows, columns]; NaN where there is no tissue tile.
        channels: name of each channel, such as ``attention_h0``.
        x: left edge of the raster, level-0 pixels.
        y: top edge of the raster, level-0 pixels.
        cell: side of a cell, level-0 pixels; not rounded.
        slide_mpp: µm per level-0 pixel.
    """

    values: np.ndarray
    channels: tuple[str, ...]
    x: int
    y: int
    cell: float
    slide_mpp: float

    @property
    def mpp(self) -> float:
        """Side of a cell in µm."""
        return self.cell * self.slide_mpp

    @property
    def mean(self) -> np.ndarray:
        """Mean over the channels, float32 [rows, columns]."""
        return self.values.mean(0)

    def check_channel(self, channel: int | None) -> None:
        """Raises :class:`ConfigError` if there is no such channel; None is the mean of all."""
        if channel is not None and not 0 <= channel < len(self.channels):
            raise ConfigError(f"the heat-map has channels 0 to {len(self.channels) - 1}, not {channel}")

    def coarser(self, factor: int) -> "HeatMap":
        """The map with cells ``factor`` times as wide, each the mean of those in it that are not NaN."""
        if factor == 1:
            return self
        _, rows, columns = self.values.shape
        padding = ((0, 0), (0, -rows % factor), (0, -columns % factor))
        padded = np.pad(self.values, padding, constant_values=np.nan)
        blocks = padded.reshape(len(padded), padded.shape[1] // factor, factor, padded.shape[2] // factor, factor)
        present = np.isfinite(blocks).sum((2, 4))
        sums = np.nansum(blocks, (2, 4))
        values = np.divide(sums, present, out=np.full_like(sums, np.nan), where=present > 0)
        return replace(self, values=values, cell=self.cell * factor)

    def within(self, mask: TissueMask, *, min_tissue: float = 0.5) -> "HeatMap":
        """The map without the cells of which less than ``min_tissue`` is tissue: the glass inside the tiles."""
        present = np.isfinite(self.mean)
        rows, columns = np.nonzero(present)
        tissue = mask.overlap(self.x + columns * self.cell, self.y + rows * self.cell, self.cell)
        present[rows, columns] = tissue >= min_tissue
        return replace(self, values=np.where(present, self.values, np.float32(np.nan)))


def attention_map(
    slide: Slide,
    encoder: TileEncoder,
    grid: TileGrid,
    options: AttentionOptions = AttentionOptions(),
    *,
    progress: Progress = silent,
) -> HeatMap:
    """Attention of the encoder's last block from the class token to the patches, over all tiles of a slide.

    Source: the heat-maps of HIPT (arXiv:2206.02647 and its released code): ranks inside each tile, averaged over passes
    shifted by half a tile. Differs: any number of heads and patches; equal values share their rank; what lies outside
    the tissue tiles is left out.

    Args:
        slide: the slide.
        encoder: used on the device where it is.
        grid: the tiles; their size must be a multiple of the encoder's patch size.
        options: how to make the map.
        progress: called after each batch.

    Returns:
        One channel a head, with cells of one patch.

    Raises:
        ConfigError: the tile size does not suit the encoder, or the encoder has no plain attention.
        NoTissueError: there are no tiles.
        SlideError: a tile cannot be read.
    """
    side = patches_along(slide, grid, encoder, options)
    raster = Raster(grid, side)
    shifts = shifts_of(side, options.shifts)
    places = np.concatenate([raster.places + shift for shift in shifts])
    coords = np.concatenate([np.rint(grid.coords + shift * raster.cell).astype(np.int64) for shift in shifts])
    done = 0
    with evaluating(encoder):
        for images in read_tiles(slide, coords, grid, options):
            with torch.inference_mode():
                attention = encoder.attention(encoder.normalise(torch.from_numpy(images)))
            blocks = ranks(attention.flatten(2)).view_as(attention) if options.rank == "tile" else attention
            for place, block in zip(places[done : done + len(images)], blocks.cpu().numpy(), strict=True):
                raster.add(place, block)
            done += len(images)
            progress("attention", done, len(coords))
    heat = raster.finish(tuple(f"attention_h{head}" for head in range(raster.channels)))
    if options.rank == "slide":
        for channel in heat.values:
            present = np.isfinite(channel)
            channel[present] = ranks(torch.from_numpy(channel[present])).numpy()
    return heat


def patches_along(slide: Slide, grid: TileGrid, encoder: TileEncoder, options: AttentionOptions) -> int:
    """Patches along a tile's side; raises as :func:`attention_map` where there can be no map."""
    if not len(grid):
        message = f"no tile has {grid.min_tissue:.0%} of tissue; lower min_tissue or the tile size"
        raise NoTissueError(redact(slide.uri), message)
    side = grid.tile_size // encoder.patch_size
    if grid.tile_size % encoder.patch_size or options.shifts > side:
        raise ConfigError(
            f"attention map: tiles of {grid.tile_size} px do not go with patches of {encoder.patch_size} px and "
            f"{options.shifts} shifts; the tile size must be a multiple of the patch size, with at most a shift a patch"
        )
    return side


def shifts_of(side: int, count: int) -> list[np.ndarray]:
    """The ``count²`` shifts (x, y) of passes over blocks of ``side``, (0, 0) first."""
    return [np.array(pair) * side // count for pair in itertools.product(range(count), repeat=2)]


def tile_map(grid: TileGrid, values: np.ndarray, *, channels: Sequence[str] = ("value",)) -> HeatMap:
    """Values that belong to tiles, as a map; where tiles overlap, their mean.

    Args:
        grid: the tiles.
        values: [N] or [N, channels], one row a tile.
        channels: name of each channel.

    Raises:
        ValueError: there are no tiles, or the number of values or of names does not fit.
    """
    rows = np.asarray(values, np.float32)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if len(rows) != len(grid) or rows.shape[1] != len(channels):
        raise ValueError(f"{len(grid)} tiles and {len(channels)} channels do not fit values {np.shape(values)}")
    # the widest cell that both the tile and its step are made of, or a sixteenth of a tile where that would be tiny
    cell = max(math.gcd(grid.tile_size, grid.overlap), grid.tile_size // 16, 1)
    raster = Raster(grid, max(1, round(grid.tile_size / cell)))
    for place, row in zip(raster.places, rows, strict=True):
        raster.add(place, np.broadcast_to(row[:, None, None], (len(row), raster.side, raster.side)))
    return raster.finish(tuple(channels))


class Raster:
    """Sums the blocks of tiles where they lie; a tile is ``side`` × ``side`` cells."""

    def __init__(self, grid: TileGrid, side: int):
        if not len(grid):
            raise ValueError("a map needs at least one tile")
        self.side = side
        self.cell = grid.side / side
        self.slide_mpp = grid.slide_mpp
        self.origin = grid.coords.min(0)
        self.places = np.rint((grid.coords - self.origin) / self.cell).astype(np.int64)  # (column, row) of each tile
        columns, rows = self.places.max(0) + 2 * side  # shifted tiles reach up to one tile beyond the last one
        self.tissue = np.zeros((rows, columns), bool)
        for column, row in self.places:
            self.tissue[row : row + side, column : column + side] = True
        self.counts = np.zeros((rows, columns), np.uint16)
        self.sums = np.zeros((0, rows, columns), np.float32)

    @property
    def channels(self) -> int:
        """How many there are; none before the first block."""
        return len(self.sums)

    def add(self, place: np.ndarray, block: np.ndarray, count: int = 1) -> None:
        """Adds a block [channels, side, side], the sum of ``count``, with its first cell at ``place`` (column, row)."""
        if not self.channels:
            self.sums = np.zeros((len(block), *self.counts.shape), np.float32)
        column, row = place
        window = (slice(row, row + self.side), slice(column, column + self.side))
        self.sums[:, *window] += block
        self.counts[window] += count

    def finish(self, channels: tuple[str, ...]) -> HeatMap:
        """Mean of all that was added, on the cells of tissue tiles; the sums are gone afterwards."""
        rows, columns = (extent - self.side for extent in self.counts.shape)
        counts = self.counts[:rows, :columns]
        present = self.tissue[:rows, :columns] & (counts > 0)
        values = self.sums[:, :rows, :columns]
        np.divide(values, counts, out=values, where=present)
        values[:, ~present] = np.nan
        return HeatMap(values, channels, int(self.origin[0]), int(self.origin[1]), self.cell, self.slide_mpp)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """The modules in evaluation mode; as they were before, afterwards."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def ranks(values: Tensor) -> Tensor:
    """Percentile ranks in (0, 1) along the last axis, equal values sharing the middle of theirs."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below, upto = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return ((below + upto) / (2 * values.shape[-1])).to(values.dtype)


def read_tiles(slide: Slide, coords: np.ndarray, grid: TileGrid, options: AttentionOptions) -> Iterator[np.ndarray]:
    """Batches of tiles, uint8 [B, size, size, 3], read ahead by threads."""
    pending: deque[list[Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(options.threads) as pool:
        try:
            for start in range(0, len(coords), options.batch_size):
                batch = coords[start : start + options.batch_size].tolist()
                pending.append(
                    [pool.submit(slide.read_tile, x, y, grid.tile_size, grid.mpp, exact=False) for x, y in batch]
                )
                if len(pending) > 2:
                    yield np.stack([tile.result() for tile in pending.popleft()])
            while pending:
                yield np.stack([tile.result() for tile in pending.popleft()])
        finally:
            for tile in itertools.chain.from_iterable(pending):
                tile.cancel()

"""The hierarchical heat-map of one region exactly as HIPT's authors make it, but with each pass on its own pixels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.core.errors import ConfigError
from gigatome.heatmaps.attention import HeatMap, evaluating, ranks
from gigatome.heatmaps.chain import Chain
from gigatome.heatmaps.hierarchy import COMBINED
from gigatome.slides.slide import Slide

_WHITE = 255


@dataclass(frozen=True)
class HiptMapOptions:
    """How the authors make a map; the defaults are theirs.

    Attributes:
        scale: pixels of the region along a cell of the map; patches and offsets are multiples of it.
        tile_offsets: of the passes whose attention to tiles is averaged, pixels along both axes.
        cell_offsets: the same of the attention to cells.
        weighting: how the two levels are weighed in the combination. ``"helpers"``: their functions count each pass of
            the cell level twice, so that two of them weigh as much as four of the tile level. ``"class"``: their class
            HIPT_4K counts each pass once, so that the tile level weighs twice as much.
        batch_size: tiles of one forward pass.
    """

    scale: int = 4
    tile_offsets: tuple[int, ...] = (0, 128, 256, 384)
    cell_offsets: tuple[int, ...] = (0, 128)
    weighting: Literal["helpers", "class"] = "helpers"
    batch_size: int = 64

    def __post_init__(self):
        if min(self.scale, self.batch_size) < 1 or min(self.tile_offsets + self.cell_offsets, default=-1) < 0:
            raise ValueError("scale and batch_size must be at least 1, offsets at least 0")
        if 0 not in self.tile_offsets or 0 not in self.cell_offsets:
            raise ValueError("one pass of each level must have no offset, so that it covers the whole region")


def hipt_region_map(
    slide: Slide, chain: Chain, x: int, y: int, options: HiptMapOptions | None = None, *, mpp: float | None = None
) -> HeatMap:
    """Attention of both encoders over one region, and of both together.

    Source: the heat-map functions of HIPT's released code. Maps are enlarged to the nearest cell and become percentile
    ranks, those of cells within each tile, those of tiles within the region. Further passes see the region shifted to
    the left and up, filled up with white; they are shifted back, and averaged by how many cover a place. Differs: each
    pass sees the pixels that it is put back on, while the authors' class HIPT_4K gives the unshifted region to all;
    each is filled up to the region's size, while their functions add 512 px to the pass with offset 384.

    Args:
        slide: the slide.
        chain: of a tile and a region encoder.
        x: left edge of the region, level-0 pixels.
        y: top edge of the region, level-0 pixels.
        options: how the map is made.
        mpp: µm per pixel of the region; that of the region encoder's card by default.

    Returns:
        Channels ``cell_h0`` …, ``tile_h0`` …, ``combined``; cells of ``options.scale`` pixels, ranks from 0 to 1.
        ``combined`` is of the mean of each level's heads, and so the mean of the authors' maps of pairs of heads.

    Raises:
        ConfigError: there is no region encoder, or the sizes do not fit.
        SlideError: the region cannot be read.
    """
    options = options or HiptMapOptions()
    chain.check(["tile"])
    assert chain.card is not None  # noqa: S101 - comes with the region encoder
    mpp = chain.card.mpp if mpp is None else mpp
    image = slide.read_tile(x, y, chain.card.tiles * chain.card.tile_size, mpp, exact=False)
    cells, tiles, cell_passes, tile_passes = _passes(image, chain, options)
    double = 2 if options.weighting == "helpers" else 1
    both = (tiles.mean(0) + double * cells.mean(0)) / (tile_passes + double * cell_passes)
    values = np.concatenate([cells / cell_passes, tiles / tile_passes, both[None]])
    names = *(f"cell_h{head}" for head in range(len(cells))), *(f"tile_h{head}" for head in range(len(tiles)))
    return HeatMap(values, (*names, COMBINED), x, y, options.scale * mpp / slide.mpp, slide.mpp)


def _passes(image: NDArray[np.uint8], chain: Chain, options: HiptMapOptions) -> tuple[NDArray[np.float32], ...]:
    """Sums of ranks over the passes, of cells and of tiles, [heads, S, S], and how many passes cover each [S, S]."""
    size, scale = len(image), options.scale
    offsets = sorted({*options.cell_offsets, *options.tile_offsets})
    if chain.tile.patch_size % scale or any(offset % scale or offset >= size for offset in offsets):
        raise ConfigError(
            f"patches of {chain.tile.patch_size} px and offsets {offsets} must be multiples of scale {scale}, and "
            f"offsets less than the region's {size} px"
        )
    sums: dict[str, NDArray[np.float32]] = {}
    counts = {level: np.zeros((size // scale, size // scale), np.float32) for level in ("cell", "tile")}
    for offset in offsets:
        seen = np.full_like(image, _WHITE)
        seen[: size - offset, : size - offset] = image[offset:, offset:]
        start = offset // scale
        for level, scores in zip(("cell", "tile"), _scores(seen, chain, options), strict=True):
            if offset in (options.cell_offsets if level == "cell" else options.tile_offsets):
                total = sums.setdefault(level, np.zeros_like(scores))
                total[:, start:, start:] += scores[:, : scores.shape[1] - start, : scores.shape[2] - start]
                counts[level][start:, start:] += 1
    return sums["cell"], sums["tile"], counts["cell"], counts["tile"]


def _scores(image: NDArray[np.uint8], chain: Chain, options: HiptMapOptions) -> tuple[NDArray[np.float32], ...]:
    """Ranks of the attention to cells and to tiles, float32 [heads, S, S] each."""
    assert chain.region is not None and chain.card is not None  # noqa: S101, PT018 - checked by the caller
    side, size = chain.card.tiles, chain.card.tile_size
    tiles = image.reshape(side, size, side, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    cells, embeddings = [], []
    with evaluating(chain.tile, chain.region), torch.inference_mode():
        for part in np.split(tiles, range(options.batch_size, len(tiles), options.batch_size)):
            images = chain.tile.normalise(torch.from_numpy(np.ascontiguousarray(part)))
            cells.append(chain.tile.attention(images).cpu())
            embeddings.append(chain.tile(images).float())
        grid = torch.cat(embeddings).unflatten(0, (side, side)).permute(2, 0, 1)[None]
        region = chain.region.attention(grid)[0].cpu()
    cell = torch.cat(cells)  # [side², heads, c, c]
    enlarged = chain.tile.patch_size // options.scale, size // options.scale
    ranked = _percentiles(cell.flatten(2), enlarged[0]).view_as(cell)
    whole = ranked.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    over = _percentiles(region.flatten(1), enlarged[1]).view_as(region)
    return _enlarge(whole, enlarged[0]), _enlarge(over, enlarged[1])


def _percentiles(values: Tensor, enlarged: int) -> Tensor:
    """What the mean rank over the number of values is, once each stands there ``enlarged²`` times."""
    return ranks(values) + 0.5 / (values.shape[-1] * enlarged**2)


def _enlarge(values: Tensor, factor: int) -> NDArray[np.float32]:
    return values.repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy()

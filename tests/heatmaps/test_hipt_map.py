"""HIPT's map of one region, compared with its definition worked out pixel by pixel."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from made_chains import PATCH, SIDE, TILE, NoiseSlide, make_chain

from gigatome.core.errors import ConfigError
from gigatome.heatmaps.hipt import HiptMapOptions, hipt_region_map

SIZE, SCALE = SIDE * TILE, 4
OPTIONS = HiptMapOptions(scale=SCALE, tile_offsets=(0, 16, 32, 48), cell_offsets=(0, 16), batch_size=3)


@pytest.fixture(scope="module")
def chain():
    return make_chain()


def percentiles(values):
    return scipy.stats.rankdata(values, "average").reshape(values.shape) / values.size


def scores(chain, image):
    """Ranks of both levels for one region, [heads, S, S] in pixels of the map: enlarged first, ranked then."""
    side, block = SIZE // SCALE, TILE // SCALE
    cells, grid = np.zeros((2, side, side)), torch.zeros(1, chain.tile.dim, SIDE, SIDE)
    for row, column in np.ndindex(SIDE, SIDE):
        tile = image[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        with torch.inference_mode():
            normalised = chain.tile.normalise(torch.from_numpy(tile.copy())[None])
            attention = chain.tile.attention(normalised)[0].numpy()
            grid[0, :, row, column] = chain.tile(normalised)[0]
        for head in range(2):
            large = np.kron(attention[head], np.ones((PATCH // SCALE, PATCH // SCALE)))
            place = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
            cells[(head, *place)] = percentiles(large)
    with torch.inference_mode():
        over = chain.region.attention(grid)[0].numpy()
    return cells, np.stack([percentiles(np.kron(head, np.ones((block, block)))) for head in over])


def by_definition(chain, x, y):
    image, side = NoiseSlide().read_tile(x, y, SIZE, 0.5), SIZE // SCALE
    sums = {"cell": np.zeros((2, side, side)), "tile": np.zeros((2, side, side))}
    counts = {"cell": np.zeros((side, side)), "tile": np.zeros((side, side))}
    for offset in (0, 16, 32, 48):
        shifted = np.pad(image[offset:, offset:], ((0, offset), (0, offset), (0, 0)), constant_values=255)
        cells, tiles = scores(chain, shifted)
        for level, found in {"cell": cells, "tile": tiles}.items():
            if level == "tile" or offset in (0, 16):
                for row, column in np.ndindex(side - offset // SCALE, side - offset // SCALE):
                    place = row + offset // SCALE, column + offset // SCALE
                    sums[level][:, *place] += found[:, row, column]
                    counts[level][place] += 1
    return sums, counts


def test_map_of_a_region_equals_its_definition(chain):
    sums, counts = by_definition(chain, 64, 128)
    heat = hipt_region_map(NoiseSlide(), chain, 64, 128, OPTIONS)
    assert heat.channels == ("cell_h0", "cell_h1", "tile_h0", "tile_h1", "combined")
    assert (heat.x, heat.y, heat.cell, heat.mpp) == (64, 128, 2 * SCALE, 2.0)
    np.testing.assert_allclose(heat.values[:2], sums["cell"] / counts["cell"], atol=1e-6)
    np.testing.assert_allclose(heat.values[2:4], sums["tile"] / counts["tile"], atol=1e-6)
    pairs = [
        (sums["tile"][j] + 2 * sums["cell"][i]) / (counts["tile"] + 2 * counts["cell"])
        for i in range(2)
        for j in range(2)
    ]
    np.testing.assert_allclose(heat.values[4], np.mean(pairs, 0), atol=1e-6)
    assert 0 < heat.values.min() < heat.values.max() <= 1


def test_weighting_of_the_authors_class(chain):
    sums, counts = by_definition(chain, 0, 0)
    heat = hipt_region_map(NoiseSlide(), chain, 0, 0, replace(OPTIONS, weighting="class"))
    expected = (sums["tile"].mean(0) + sums["cell"].mean(0)) / (counts["tile"] + counts["cell"])
    np.testing.assert_allclose(heat.values[4], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"scale": 3}, "multiples of scale 3"), ({"tile_offsets": (0, 64)}, "less than the region's 64 px")],
)
def test_sizes_that_do_not_fit(chain, changes, message):
    with pytest.raises(ConfigError, match=message):
        hipt_region_map(NoiseSlide(), chain, 0, 0, replace(OPTIONS, **changes))


def test_options_that_make_no_sense(chain):
    with pytest.raises(ValueError, match="covers the whole region"):
        HiptMapOptions(cell_offsets=(128,))
    with pytest.raises(ConfigError, match="needs a region encoder"):
        hipt_region_map(NoiseSlide(), replace(chain, region=None), 0, 0)

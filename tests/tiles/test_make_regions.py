"""Regions gathered from grids of tiles: which, with which tiles, and where."""

import math

import numpy as np
import pytest

from gigatome.core.errors import ConfigError
from gigatome.tiles.grid import TileGrid
from gigatome.tiles.regions import RegionOptions, make_regions


def grid_of(places, *, tile_size=256, slide_mpp=0.5, columns=12, rows=9, overlap=0):
    """Tiles at (column, row) of a slide that ends half a tile after the last of them."""
    step = tile_size * 0.5 / slide_mpp
    coords = np.rint(np.array(places, float).reshape(-1, 2) * step).astype(np.int64)
    return TileGrid(
        coords=coords,
        tissue_fraction=np.ones(len(coords), np.float32),
        tile_size=tile_size,
        mpp=0.5,
        overlap=overlap,
        slide_mpp=slide_mpp,
        slide_width=round((columns - 0.5) * step),
        slide_height=round((rows - 0.5) * step),
    )


def some_places(share, columns=12, rows=9, seed=0):
    taken = np.random.default_rng(seed).random((rows, columns)) < share
    return [(x, y) for y in range(rows) for x in range(columns) if taken[y, x]]


@pytest.mark.parametrize("slide_mpp", [0.25, 0.5, 0.2527, 1.03])
@pytest.mark.parametrize("shift", [(0, 0), (1, 3), (3, 0)])
def test_every_tile_has_one_place(slide_mpp, shift):
    places = some_places(0.4)
    grid = grid_of(places, slide_mpp=slide_mpp)
    regions = make_regions(grid, RegionOptions(4, 1), shift=shift)
    expected = {}
    for (x, y), corner in zip(places, grid.coords, strict=True):
        region = (y + shift[1]) // 4, (x + shift[0]) // 4
        expected.setdefault(region, {})[(y + shift[1]) % 4 * 4 + (x + shift[0]) % 4] = tuple(corner)
    assert len(regions) == len(expected)
    for number, region in enumerate(sorted(expected)):  # row by row
        found = {int(slot): tuple(regions.tile_coords[number, slot]) for slot in np.flatnonzero(regions.mask[number])}
        assert found == expected[region]
    np.testing.assert_array_equal(regions.coords, regions.tile_coords[:, 0])
    assert sorted(map(tuple, regions.read_tiles().coords)) == sorted(map(tuple, grid.coords))


@pytest.mark.parametrize(("slide_mpp", "side"), [(0.25, 8192), (0.5, 4096), (1.0, 2048)])
def test_regions_of_hipt(slide_mpp, side):
    places = some_places(0.7, columns=40, rows=33)
    regions = make_regions(grid_of(places, slide_mpp=slide_mpp, columns=40, rows=33))
    assert (regions.tile_size, regions.as_tiles().side) == (4096, side)
    corners = [(x * side, y * side) for y in range(2) for x in range(3)]  # the last row of tiles makes no region
    assert list(map(tuple, regions.coords)) == corners
    assert regions.mask.shape[1] == 256


def test_the_least_number_of_tiles():
    places = [(0, 0), (1, 1), (4, 0), (5, 0), (4, 1), (0, 4)]  # 2, 3 and 1 in regions of 4
    for least, kept in [(1, 3), (2, 2), (3, 1), (16, 1)]:  # the fullest is always kept
        regions = make_regions(grid_of(places), RegionOptions(4, least))
        assert len(regions) == kept
        assert regions.mask.sum(1).max() == 3


def test_background_is_read_when_asked_for_but_not_beyond_the_slide():
    grid = grid_of([(0, 0), (9, 6)], slide_mpp=0.25, columns=10, rows=7)
    regions = make_regions(grid, RegionOptions(4, 1, "encode"))
    assert regions.mask[0].all()
    expected = np.array([[8 + x < 10 and 4 + y < 7 for x in range(4)] for y in range(4)])
    np.testing.assert_array_equal(regions.mask[1].reshape(4, 4), expected)
    assert make_regions(grid, RegionOptions(4, 1)).mask.sum() == 2
    odd = make_regions(grid_of([(0, 0)], slide_mpp=128 / 512.4), RegionOptions(4, 1, "encode"), shift=(1, 1))
    assert odd.mask.reshape(-1, 4, 4)[0, 0].sum() == odd.mask.reshape(-1, 4, 4)[0, :, 0].sum() == 0
    shifted = make_regions(grid, RegionOptions(4, 1, "encode"), shift=(2, 1))
    assert shifted.coords[0].tolist() == [-2 * 512, -512]
    np.testing.assert_array_equal(
        shifted.mask[0].reshape(4, 4), np.outer([False, True, True, True], [False, False, True, True])
    )


def test_a_slide_without_tiles_has_no_regions():
    regions = make_regions(grid_of([]))
    assert len(regions) == 0
    assert regions.mask.shape == (0, 256)


def test_the_digest_changes_with_regions_and_tiles():
    grid = grid_of(some_places(0.5))
    plain = make_regions(grid, RegionOptions(4, 1))
    assert plain.digest == make_regions(grid, RegionOptions(4, 1)).digest
    others = [RegionOptions(4, 9), RegionOptions(4, 1, "encode"), RegionOptions(3, 1)]
    assert len({plain.digest, *(make_regions(grid, options).digest for options in others)}) == 4


def test_grids_that_do_not_do():
    with pytest.raises(ConfigError, match="tiles that overlap by 64 px"):
        make_regions(grid_of([(0, 0)], overlap=64))
    odd = grid_of([(0, 0), (1, 0)])
    odd.coords[1, 0] += 40
    with pytest.raises(ConfigError, match="do not lie on a grid from the slide's corner"):
        make_regions(odd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": 0}, "tiles must be at least 1"),
        ({"min_tiles": 0}, "min_tiles from 1 to tiles²"),
        ({"tiles": 3, "min_tiles": 10}, "not 3 and 10"),
        ({"background": "white"}, "background is mask or encode, not white"),
    ],
)
def test_options_that_do_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        RegionOptions(**options)


def test_rounding_never_moves_a_tile_to_another_place():
    """A step of 512.3 px: the last of 400 columns lies 119 px from where a rounded step would have it."""
    step = 256 * 0.5 / 0.24986
    columns = np.arange(400)
    coords = np.stack([np.rint(columns * step), np.zeros(400)], 1).astype(np.int64)
    grid = TileGrid(coords, np.ones(400, np.float32), 256, 0.5, 0, 0.24986, math.ceil(400 * step), 600)
    regions = make_regions(grid, RegionOptions(16, 1))
    assert len(regions) == 25
    np.testing.assert_array_equal(regions.mask.sum(1), 16)
    np.testing.assert_array_equal(regions.tile_coords[:, :16, 0].ravel(), coords[:, 0])

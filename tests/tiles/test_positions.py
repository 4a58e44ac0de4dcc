import numpy as np
import pytest
import shapely

from gigatome.tiles.positions import find_positions, has_positions
from gigatome.tissue.mask import TissueMask

WIDTH, HEIGHT = 300, 240


def truth(mask, side, minimum):
    """Whether each position is good, bool [rows, columns], one by one."""
    columns, rows = np.meshgrid(
        np.arange(mask.width - int(np.ceil(side)) + 1), np.arange(mask.height - int(np.ceil(side)) + 1)
    )
    share = mask.overlap(columns.ravel(), rows.ravel(), side)
    return (share >= minimum - 1e-9).reshape(columns.shape)


def covered(positions, shape):
    """How often each position is in a cell, and in a sure one."""
    all_cells, sure = np.zeros(shape, int), np.zeros(shape, int)
    for (x, y, width, height), good in zip(positions.cells, positions.sure, strict=True):
        all_cells[y : y + height, x : x + width] += 1
        sure[y : y + height, x : x + width] += good
    return all_cells, sure


MASKS = {
    "with a hole": shapely.Point(140, 120).buffer(100).difference(shapely.box(110, 90, 180, 160)),
    "two pieces": shapely.box(5, 5, 90, 200).union(shapely.Point(220, 100).buffer(55)),
    "everything": shapely.box(0, 0, WIDTH, HEIGHT),
    "a thread": shapely.LineString([(10, 20), (280, 200)]).buffer(9),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("side", "minimum"), [(8, 0.4), (33.7, 0.4), (33.7, 1.0), (120, 0.25), (120, 0.0)])
def test_cells_hold_every_good_position_once_and_sure_ones_no_other(name, side, minimum):
    mask = TissueMask.of([MASKS[name]], WIDTH, HEIGHT)
    good = truth(mask, side, minimum)
    positions = find_positions(mask, side, minimum)
    assert has_positions(mask, side, minimum) == good.any() == (positions is not None)
    if positions is None:
        return
    cells, sure = covered(positions, good.shape)
    assert cells.max() == 1
    assert cells[good].all()
    assert good[sure > 0].all()
    assert positions.ends[-1] == cells.sum()


@pytest.mark.parametrize("side", [24.0, 60.5])
def test_draws_are_uniform_over_the_good_positions(side):
    mask = TissueMask.of([MASKS["with a hole"]], WIDTH, HEIGHT)
    good = truth(mask, side, 0.4)
    positions = find_positions(mask, side, 0.4)
    assert positions is not None
    rng = np.random.default_rng(3)
    draws = np.array([positions.draw(rng) for _ in range(20_000)])
    assert good[draws[:, 1], draws[:, 0]].all()
    bin_of = np.add.outer(np.arange(good.shape[0]) // 24 * 100, np.arange(good.shape[1]) // 24)
    expected = np.bincount(bin_of[good], minlength=2000) * len(draws) / good.sum()
    counts = np.bincount(bin_of[draws[:, 1], draws[:, 0]], minlength=2000)
    full = expected >= 5
    statistic = ((counts - expected)[full] ** 2 / expected[full]).sum()
    freedom = full.sum() - 1
    assert freedom > 20
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_a_single_good_position_is_found():
    mask = TissueMask.of([shapely.box(101, 57, 117, 73)], WIDTH, HEIGHT)
    positions = find_positions(mask, 16, 1.0)
    assert positions is not None
    assert {positions.draw(np.random.default_rng(seed)) for seed in range(5)} == {(101, 57)}


@pytest.mark.parametrize("side", [240.5, 301, 5000])
def test_a_tile_larger_than_the_slide_has_no_position(side):
    mask = TissueMask.of([MASKS["everything"]], WIDTH, HEIGHT)
    assert find_positions(mask, side, 0.1) is None
    assert not has_positions(mask, side, 0.1)


def test_a_tile_as_large_as_the_slide_has_one():
    mask = TissueMask.of([shapely.box(0, 0, 240, 240)], 240, 240)
    positions = find_positions(mask, 240, 0.4)
    assert positions is not None
    assert positions.draw(np.random.default_rng(0)) == (0, 0)


@pytest.mark.parametrize("polygons", [[], [shapely.box(10, 10, 14, 14)]])
def test_too_little_tissue_has_no_position(polygons):
    mask = TissueMask.of(polygons, WIDTH, HEIGHT)
    assert find_positions(mask, 32, 0.4) is None
    assert not has_positions(mask, 32, 0.4)


def test_tissue_just_below_the_minimum_everywhere_ends_the_search():
    stripes = [shapely.box(0, y, 20_000, y + 3.9) for y in range(0, 4000, 10)]
    assert find_positions(TissueMask.of(stripes, 20_000, 4000), 500.0, 0.4) is None

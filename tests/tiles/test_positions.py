import numpy as np
import pytest
import scipy.stats
import shapely

from gigatome.tiles.positions import draw, find_positions
from gigatome.tissue.area import AreaIndex
from gigatome.tissue.mask import TissueMask

WIDTH, HEIGHT = 300, 240


def find(mask, side, minimum):
    return find_positions(AreaIndex.of(mask.polygons), mask.width, mask.height, side, minimum)


def draws(positions, count, seed=0):
    """Good positions [N, 2] of ``count`` numbers."""
    found, x, y = draw([positions] * count, np.random.default_rng(seed).random((count, 1)))
    return np.stack([x, y], axis=1)[found]


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
    for index, (x, y, width, height) in enumerate(positions.cells):
        all_cells[y : y + height, x : x + width] += 1
        sure[y : y + height, x : x + width] += index < positions.sure
    return all_cells, sure


MASKS = {
    "with a hole": shapely.Point(140, 120).buffer(100).difference(shapely.box(110, 90, 180, 160)),
    "two pieces": shapely.box(5, 5, 90, 200).union(shapely.Point(220, 100).buffer(55)),
    "everything": shapely.box(0, 0, WIDTH, HEIGHT),
    "a thread": shapely.LineString([(10, 20), (280, 200)]).buffer(9),
    "slivers": shapely.union_all([shapely.box(20 + 9.3 * i, 15, 23.1 + 9.3 * i, 220 - i) for i in range(28)]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("side", "minimum"), [(8, 0.4), (33.7, 0.4), (33.7, 1.0), (120, 0.25), (120, 0.0)])
def test_cells_hold_every_good_position_once_and_sure_ones_no_other(name, side, minimum):
    mask = TissueMask.of([MASKS[name]], WIDTH, HEIGHT)
    good = truth(mask, side, minimum)
    positions = find(mask, side, minimum)
    assert good.any() == (positions is not None)
    if positions is None:
        return
    cells, sure = covered(positions, good.shape)
    assert cells.max() == 1
    assert cells[good].all()
    assert good[sure > 0].all()
    assert positions.ends[-1] == cells.sum()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("side", "minimum"), [(24.0, 0.4), (60.5, 0.3)])
def test_draws_are_uniform_over_the_good_positions(name, side, minimum):
    mask = TissueMask.of([MASKS[name]], WIDTH, HEIGHT)
    good = truth(mask, side, minimum)
    positions = find(mask, side, minimum)
    if positions is None:
        assert not good.any()
        return
    drawn = draws(positions, 40_000)
    assert len(drawn) > 5_000
    assert good[drawn[:, 1], drawn[:, 0]].all()
    bins = np.add.outer(np.arange(good.shape[0]) // 16 * 100, np.arange(good.shape[1]) // 16)
    expected = np.bincount(bins[good], minlength=2000) * len(drawn) / good.sum()
    counts = np.bincount(bins[drawn[:, 1], drawn[:, 0]], minlength=2000)
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    assert large.sum() > 20
    some = wanted > 0
    assert scipy.stats.chisquare(observed[some], wanted[some]).pvalue > 1e-4


def test_the_first_good_number_is_taken():
    mask = TissueMask.of([MASKS["slivers"]], WIDTH, HEIGHT)
    positions = find(mask, 33.7, 0.3)
    numbers = np.random.default_rng(1).random((500, 5))
    found, x, y = draw([positions] * 500, numbers)
    single = [draw([positions] * 500, numbers[:, [column]]) for column in range(5)]
    for row in range(500):
        good = [column for column in range(5) if single[column][0][row]]
        assert found[row] == bool(good)
        if good:
            assert (x[row], y[row]) == (single[good[0]][1][row], single[good[0]][2][row])
    assert 0 < sum(single[0][0]) < 500


def test_slides_are_drawn_from_together():
    one, other = (TissueMask.of([MASKS[name]], WIDTH, HEIGHT) for name in ("a thread", "with a hole"))
    where = [find(one, 16, 0.4), find(other, 40.5, 0.4)] * 200
    found, x, y = draw(where, np.random.default_rng(0).random((400, 3)))
    for row in np.flatnonzero(found):
        assert (other if row % 2 else one).overlap(x[row], y[row], 40.5 if row % 2 else 16)[0] >= 0.4 - 1e-9


def test_a_single_good_position_is_found():
    mask = TissueMask.of([shapely.box(101, 57, 117, 73)], WIDTH, HEIGHT)
    positions = find(mask, 16, 1.0)
    assert positions is not None
    assert {tuple(position) for position in draws(positions, 200).tolist()} == {(101, 57)}


@pytest.mark.parametrize("side", [240.5, 301, 5000])
def test_a_tile_larger_than_the_slide_has_no_position(side):
    mask = TissueMask.of([MASKS["everything"]], WIDTH, HEIGHT)
    assert find(mask, side, 0.1) is None


def test_a_tile_as_large_as_the_slide_has_one():
    mask = TissueMask.of([shapely.box(0, 0, 240, 240)], 240, 240)
    positions = find(mask, 240, 0.4)
    assert positions is not None
    assert {tuple(position) for position in draws(positions, 3).tolist()} == {(0, 0)}


@pytest.mark.parametrize("polygons", [[], [shapely.box(10, 10, 14, 14)]])
def test_too_little_tissue_has_no_position(polygons):
    mask = TissueMask.of(polygons, WIDTH, HEIGHT)
    assert find(mask, 32, 0.4) is None


def test_tissue_just_below_the_minimum_everywhere_ends_the_search():
    stripes = [shapely.box(0, y, 20_000, y + 3.9) for y in range(0, 4000, 10)]
    assert find(TissueMask.of(stripes, 20_000, 4000), 500.0, 0.4) is None

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import scipy.stats
import shapely

from gigatome.core.errors import CohortError, NoTissueError, StoreError
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.sampler import TileSampler
from gigatome.tissue.mask import TissueMask


def tissue(name="a", mpp=0.25, width=6000, height=5000, shape=None):
    shape = shape or shapely.Point(3000, 2500).buffer(2200).difference(shapely.Point(3000, 2500).buffer(900))
    return SlideTissue.of(name, mpp, TissueMask.of([shape], width, height, mpp=mpp))


def scattered(name):
    """Area enough for a tile of 512 px, but in dots so far apart that no tile holds 40 %."""
    dots = [shapely.box(x, y, x + 40, y + 40) for x in range(0, 5900, 100) for y in range(0, 4900, 100)]
    return tissue(name, shape=shapely.union_all(dots))


def drawn(sampler, steps, batch=64):
    return [request for step in range(steps) for request in sampler.requests(step, batch)]


@pytest.fixture(scope="module")
def slides():
    small = shapely.box(100, 100, 1300, 1200)
    return [tissue("a"), tissue("b", mpp=0.5), tissue("c", shape=small)]


def test_every_tile_has_the_minimum_of_tissue_and_lies_on_its_slide(slides):
    comb = shapely.union_all([shapely.box(200, y, 5800, y + 310) for y in range(100, 4800, 700)])
    slides = [*slides, tissue("d", shape=comb)]
    sampler = TileSampler(slides, 256, (0.25, 0.5, 1.0, 2.0), seed=5)
    seen = drawn(sampler, 50)
    for request in seen:
        slide = slides[request.slide]
        side = 256 * request.mpp / slide.mpp
        tile = shapely.box(request.x, request.y, request.x + side, request.y + side)
        inside = shapely.area(shapely.intersection(shapely.union_all(slide.load().polygons), tile))
        assert inside >= (0.4 - 1e-8) * side**2
        assert 0 <= request.x <= slide.width - side
        assert 0 <= request.y <= slide.height - side
    assert {(request.slide, request.mpp) for request in seen} >= {(3, 0.25), (3, 0.5), (3, 1.0), (3, 2.0), (2, 0.25)}


def test_a_part_of_a_batch_is_the_same_as_in_the_whole(slides):
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    whole = sampler.requests(7, 60)
    for first, last in [(0, 60), (0, 1), (13, 14), (20, 47), (59, 60), (30, 30)]:
        assert TileSampler(slides, 256, (0.5, 1.0), seed=1).requests(7, 60, first, last) == whole[first:last]
    assert sampler.requests(7, 500)[:60] == whole
    assert [sampler.request(7, place) for place in reversed(range(60))] == whole[::-1]
    with pytest.raises(ValueError, match="places 50 to 61 are not in a batch of 60"):
        sampler.requests(7, 60, 50, 61)


def test_steps_attempts_and_seeds_give_other_tiles(slides):
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    whole = sampler.requests(7, 60)
    attempts = [[sampler.request(7, place, attempt) for place in range(60)] for attempt in (1, 2)]
    others = [*attempts, sampler.requests(8, 60), TileSampler(slides, 256, (0.5, 1.0), seed=2).requests(7, 60)]
    for index, other in enumerate(others):
        assert not set(other) & set(whole)
        assert not any(set(other) & set(later) for later in others[index + 1 :])
    assert len(set(whole)) == 60
    assert sampler.request(7, 5, attempt=1) == attempts[0][5]


def test_batches_do_not_depend_on_what_is_kept_in_memory(slides):
    forward = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    small = TileSampler(slides, 256, (0.5, 1.0), seed=1, memory=0)
    found = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    found.find_all()
    assert forward.requests(0, 40) == small.requests(0, 40) == found.requests(0, 40)
    assert len(small._store._kept) == 1


PROCESS = """
import shapely
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.sampler import TileSampler
from gigatome.tissue.mask import TissueMask
mask = TissueMask.of([shapely.Point(3000, 2500).buffer(2200)], 6000, 5000)
for r in TileSampler([SlideTissue.of("a", 0.25, mask)], 256, (0.5, 1.0), seed=3).requests(4, 9):
    print(r.slide, r.x, r.y, r.mpp)
"""


def test_another_process_draws_the_same():
    mask = TissueMask.of([shapely.Point(3000, 2500).buffer(2200)], 6000, 5000)
    here = TileSampler([SlideTissue.of("a", 0.25, mask)], 256, (0.5, 1.0), seed=3).requests(4, 9)
    there = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True).stdout
    assert there.splitlines() == [f"{r.slide} {r.x} {r.y} {r.mpp}" for r in here]


def fits(values, expected):
    """Whether ``values`` came by the probabilities of ``expected``."""
    counts = [values.count(value) for value in expected]
    assert sum(counts) == len(values)
    return scipy.stats.chisquare(counts, np.array(list(expected.values())) * len(values)).pvalue > 1e-4


def test_slides_and_resolutions_come_by_their_weights(slides):
    requests = drawn(TileSampler(slides, 128, (0.5, 1.0), (1, 3), (2, 1, 1), seed=0), 100)
    assert fits([r.slide for r in requests], {0: 0.5, 1: 0.25, 2: 0.25})
    assert fits([r.mpp for r in requests], {0.5: 0.25, 1.0: 0.75})
    for slide in range(3):
        assert fits([r.mpp for r in requests if r.slide == slide], {0.5: 0.25, 1.0: 0.75})


def test_no_weight_is_never_drawn(slides):
    requests = drawn(TileSampler(slides, 128, (0.25, 0.5, 1.0), (0, 1, 1), (1, 0, 1), seed=0), 20)
    assert {(r.slide, r.mpp) for r in requests} == {(0, 0.5), (0, 1.0), (2, 0.5), (2, 1.0)}


def test_a_resolution_that_is_not_possible_gives_its_weight_to_the_others(slides):
    requests = drawn(TileSampler(slides, 256, (0.25, 0.5, 2.0, 12.0), (1, 1, 1, 1), seed=0), 100)
    by_slide = [[r.mpp for r in requests if r.slide == slide] for slide in range(3)]
    assert fits(by_slide[0], {0.25: 1 / 3, 0.5: 1 / 3, 2.0: 1 / 3})
    assert fits(by_slide[1], {0.5: 0.5, 2.0: 0.5})  # 0.25 is no 0.5
    assert fits(by_slide[2], {0.25: 0.5, 0.5: 0.5})  # no 2 mpp tile holds 40 % of it


def test_positions_are_uniform_over_what_the_polygons_allow():
    hole = shapely.box(300, 300, 1400, 1300).difference(shapely.Point(800, 800).buffer(260))
    sliver = shapely.box(1500, 200, 1590, 1400)
    slide = tissue(width=1700, height=1500, shape=hole.union(sliver))
    x, y = np.meshgrid(np.arange(1700 - 128 + 1), np.arange(1500 - 128 + 1))
    good = (slide.load().overlap(x.ravel(), y.ravel(), 128) >= 0.4 - 1e-9).reshape(x.shape)
    requests = drawn(TileSampler([slide], 64, (0.5,), seed=0), 20, batch=2000)
    left, top = np.array([(r.x, r.y) for r in requests]).T
    bins = y // 60 * 100 + x // 60
    expected = np.bincount(bins[good], minlength=3000) * len(requests) / good.sum()
    counts = np.bincount(bins[top, left], minlength=3000)
    large = expected >= 5
    observed, wanted = (
        np.append(counts[large], counts[~large].sum()),
        np.append(expected[large], expected[~large].sum()),
    )
    assert large.sum() > 200
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-4
    assert not counts[expected == 0].any()


def test_a_slightly_coarser_slide_still_counts():
    sampler = TileSampler([tissue(mpp=0.58)], 256, (0.5,), seed=0)
    assert sampler.request(0, 0).mpp == 0.5
    with pytest.raises(NoTissueError):
        TileSampler([tissue(mpp=0.68)], 256, (0.5,), seed=0)


def test_a_slide_without_a_tile_is_left_out_and_listed(slides, caplog):
    speck = tissue("speck", shape=shapely.box(0, 0, 60, 60))
    sampler = TileSampler([speck, *slides], 256, (0.5,), seed=0)
    assert [(f.slide, f.error) for f in sampler.failures] == [("speck", "NoTissueError")]
    assert "speck" in caplog.text
    assert {r.slide for r in drawn(sampler, 5)} == {1, 2, 3}


def gone():
    raise StoreError("a.geojson: cannot be read")


def test_slides_that_fail_later_leave_the_weights_of_the_others_as_they_are(slides, caplog):
    broken = SlideTissue("broken", 0.25, 6000, 5000, 1e7, gone)
    all_slides = [scattered("dots"), broken, *slides]
    requests = drawn(sampler := TileSampler(all_slides, 256, (0.5,), None, (5, 2, 2, 1, 1), seed=0), 80)
    assert fits([r.slide for r in requests], {2: 0.5, 3: 0.25, 4: 0.25})
    assert sorted((f.slide, f.error) for f in sampler.failures) == [("broken", "StoreError"), ("dots", "NoTissueError")]
    assert caplog.text.count("dots") == 1
    known = TileSampler(all_slides, 256, (0.5,), None, (5, 2, 2, 1, 1), seed=0)
    known.find_all()
    assert len(known.failures) == 2
    assert drawn(known, 80) == requests


def test_a_slide_that_is_all_but_never_drawn_is_found_in_the_end(slides):
    sampler = TileSampler([scattered("dots"), slides[0]], 256, (0.5,), None, (1, 1e-12), seed=0)
    assert {r.slide for r in sampler.requests(0, 8)} == {1}
    assert sampler.requests(0, 8, 3, 5) == sampler.requests(0, 8)[3:5]


def test_no_slide_with_a_tile_is_an_error():
    specks = [tissue(name, shape=shapely.box(0, 0, 60, 60)) for name in ("one", "two")]
    with pytest.raises(NoTissueError, match=r"one, two: no tile of 256 px holds 40% of tissue at 0\.5, 1 mpp"):
        TileSampler(specks, 256, (0.5, 1.0))
    sampler = TileSampler([scattered("dots"), scattered("points")], 256, (0.5,))
    with pytest.raises(NoTissueError, match="dots, points: no tile of 256 px"):
        sampler.requests(0, 4)


def test_no_slides_is_an_error():
    with pytest.raises(CohortError, match="no slides"):
        TileSampler([], 256, (0.5,))


@pytest.mark.parametrize(
    "bad",
    [
        {"tile_size": 0},
        {"mpps": ()},
        {"mpps": (0.5, -1)},
        {"mpps": (math.inf,)},
        {"mpp_weights": (1, 2)},
        {"mpp_weights": (0,)},
        {"mpp_weights": (-1,)},
        {"slide_weights": (1, 2)},
        {"slide_weights": (math.nan,)},
        {"min_tissue": 1.5},
    ],
)
def test_wrong_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|need"):
        TileSampler([tissue()], **{"tile_size": 256, "mpps": (0.5,)} | bad)


def test_outlines_are_read_only_of_slides_that_are_drawn(tmp_path):
    tissue().load().write(tmp_path / "a.geojson")
    asked = []

    def load(index):
        asked.append(index)
        return TissueMask.read(tmp_path / "a.geojson")

    slides = [SlideTissue(f"s{index}", 0.25, 6000, 5000, 1.2e7, partial(load, index)) for index in range(30_000)]
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=0, memory=1 << 17)
    assert not asked
    requests = sampler.requests(0, 20)
    assert sorted(asked) == sorted({r.slide for r in requests})
    assert len(sampler._store._kept) < 20
    assert sampler._store.nbytes <= 1 << 17


def test_limited_tiles_are_drawn_again_and_again(slides):
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=1, limit_tiles=50)
    seen = drawn(sampler, 20)
    assert set(seen) == set(TileSampler(slides, 256, (0.5, 1.0), seed=1).requests(0, 50))
    counts = [seen.count(request) for request in set(seen)]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert sampler.requests(7, 60, 20, 47) == sampler.requests(7, 500)[20:47]
    assert [sampler.request(7, place) for place in range(60)] == sampler.requests(7, 60)


def test_a_limited_tile_has_the_same_substitutes_wherever_it_is_drawn(slides):
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=1, limit_tiles=3)
    substitutes = {(sampler.request(step, 0), sampler.request(step, 0, attempt=1)) for step in range(60)}
    assert len(substitutes) == 3
    with pytest.raises(ValueError, match="limit_tiles must be at least 1"):
        TileSampler(slides, 256, (0.5, 1.0), limit_tiles=0)


def test_enlarging_is_refused_unless_it_is_allowed():
    slides = [tissue("a", mpp=0.5), tissue("b", mpp=0.6)]
    with pytest.raises(
        NoTissueError, match=r"a, b: 0\.5 mpp is the finest .* enlarged .* 1\.25 times.*max_enlargement"
    ):
        TileSampler(slides, 64, (0.25,))
    assert {request.slide for request in drawn(TileSampler(slides, 64, (0.25,), max_enlargement=2), 2)} == {0}

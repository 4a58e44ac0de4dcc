import math
import time

import numpy as np
import pytest
import shapely

from gigatome.core.errors import CohortError, NoTissueError
from gigatome.tiles.sampler import SlideTissue, TileSampler
from gigatome.tissue.mask import TissueMask


def tissue(name="a", mpp=0.25, width=6000, height=5000, shape=None):
    shape = shape or shapely.Point(3000, 2500).buffer(2200).difference(shapely.Point(3000, 2500).buffer(900))
    return SlideTissue(name, mpp, TissueMask.of([shape], width, height, mpp=mpp))


@pytest.fixture(scope="module")
def slides():
    small = shapely.box(100, 100, 1300, 1200)
    return [tissue("a"), tissue("b", mpp=0.5), tissue("c", shape=small)]


def test_every_tile_has_the_minimum_of_tissue_and_lies_on_its_slide(slides):
    sampler = TileSampler(slides, 256, (0.25, 0.5, 1.0, 2.0), seed=5)
    for index in range(3000):
        request = sampler.request(index)
        slide = slides[request.slide]
        side = 256 * request.mpp / slide.mpp
        assert slide.mask.overlap(request.x, request.y, side)[0] >= 0.4 - 1e-9
        assert 0 <= request.x <= slide.mask.width - side
        assert 0 <= request.y <= slide.mask.height - side


def test_a_request_depends_on_seed_and_index_alone(slides):
    sampler = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    forward = [sampler.request(index) for index in range(200)]
    other = TileSampler(slides, 256, (0.5, 1.0), seed=1)
    assert [other.request(index) for index in reversed(range(200))] == forward[::-1]
    reseeded = TileSampler(slides, 256, (0.5, 1.0), seed=2)
    assert not set(forward) & {reseeded.request(index) for index in range(200)}
    assert len(set(forward)) == 200
    assert sampler.request(7, attempt=1) != forward[7]


def share(requests, key):
    values, counts = np.unique([key(request) for request in requests], return_counts=True)
    return dict(zip(values.tolist(), counts / len(requests), strict=True))


def test_slides_and_resolutions_come_by_their_weights(slides):
    draw = TileSampler(slides, 128, (0.5, 1.0), (1, 3), (2, 1, 1), seed=0)
    requests = [draw.request(index) for index in range(6000)]
    assert share(requests, lambda r: r.slide) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.25}, abs=0.03)
    assert share(requests, lambda r: r.mpp) == pytest.approx({0.5: 0.25, 1.0: 0.75}, abs=0.03)


def test_slides_come_by_their_area_in_microns(slides):
    sampler = TileSampler(slides, 128, (0.5,), slide_weights="tissue", seed=0)
    area = np.array([s.mask.area * s.mpp**2 for s in slides])
    expected = dict(enumerate(area / area.sum()))
    requests = [sampler.request(index) for index in range(6000)]
    assert share(requests, lambda r: r.slide) == pytest.approx(expected, abs=0.03)


def test_a_resolution_that_is_not_possible_gives_its_weight_to_the_others(slides):
    sampler = TileSampler(slides, 256, (0.25, 0.5, 2.0, 12.0), (1, 1, 1, 1), seed=0)
    requests = [sampler.request(index) for index in range(6000)]
    by_slide = [[r for r in requests if r.slide == slide] for slide in range(3)]
    third = {0.25: 1 / 3, 0.5: 1 / 3, 2.0: 1 / 3}
    assert share(by_slide[0], lambda r: r.mpp) == pytest.approx(third, abs=0.05)
    assert share(by_slide[1], lambda r: r.mpp) == pytest.approx({0.5: 0.5, 2.0: 0.5}, abs=0.05)  # 0.25 is no 0.5
    assert set(share(by_slide[2], lambda r: r.mpp)) == {0.25, 0.5}  # no 2 mpp tile holds 40 % of it


def test_a_slightly_coarser_slide_still_counts():
    sampler = TileSampler([tissue(mpp=0.58)], 256, (0.5,), seed=0)
    assert sampler.request(0).mpp == 0.5
    with pytest.raises(NoTissueError):
        TileSampler([tissue(mpp=0.68)], 256, (0.5,), seed=0)


def test_a_slide_without_a_tile_is_left_out_and_listed(slides, caplog):
    speck = tissue("speck", shape=shapely.box(0, 0, 60, 60))
    sampler = TileSampler([speck, *slides], 256, (0.5,), seed=0)
    assert [(f.slide, f.error) for f in sampler.failures] == [("speck", "NoTissueError")]
    assert "speck" in caplog.text
    assert {sampler.request(index).slide for index in range(300)} == {1, 2, 3}


def test_no_slide_with_a_tile_is_an_error():
    specks = [tissue(name, shape=shapely.box(0, 0, 60, 60)) for name in ("one", "two")]
    with pytest.raises(NoTissueError, match=r"one, two: no tile of 256 px holds 40% of tissue at 0\.5, 1 mpp"):
        TileSampler(specks, 256, (0.5, 1.0))


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


def test_requests_are_no_bottleneck(slides):
    sampler = TileSampler(slides, 256, (0.25, 0.5, 1.0, 2.0), seed=0)
    for index in range(300):  # the positions are found when first needed
        sampler.request(index)
    begin = time.thread_time()
    for index in range(3000):
        sampler.request(index)
    assert 3000 / (time.thread_time() - begin) > 4000  # 20,000 a second on a quiet core; a core decodes 2,000 tiles

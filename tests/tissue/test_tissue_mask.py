import json
import math
import time
import uuid

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon, box

from gigatome.core.errors import StoreError
from gigatome.tissue.area import AreaIndex, area_of_each
from gigatome.tissue.mask import TissueMask, TissueSize


def blob(rng, x, y, radius, points, wobble=0.2):
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    order = np.arange(1, 9)[:, None]
    waves = (rng.normal(size=(8, 1)) / order) * np.sin(order * angle + rng.uniform(0, 6, (8, 1)))
    reach = radius * (1 + wobble * waves.sum(0))
    return Polygon(np.c_[x + reach * np.cos(angle), y + reach * np.sin(angle)]).buffer(0)


@pytest.fixture(scope="module")
def slide_mask():
    """Tissue of about 4,000 vertices with holes, on a slide of 100,000 × 80,000 px."""
    rng = np.random.default_rng(0)
    large = blob(rng, 40_000, 35_000, 25_000, 3000)
    large = large.difference(blob(rng, 30_000, 30_000, 4_000, 400)).difference(blob(rng, 55_000, 40_000, 3_000, 300))
    return TissueMask.of([large, blob(rng, 85_000, 10_000, 6_000, 500)], 100_000, 80_000, mpp=0.25)


def exact(mask, x, y, side):
    tiles = shapely.box(x, y, x + side, y + side)
    return shapely.area(shapely.intersection(tiles, shapely.union_all(mask.polygons))) / side**2


@pytest.mark.parametrize("side", [1.0, 256.0, 1024.7, 9000.0, 150_000.0])
def test_overlap_is_the_exact_area_of_intersection(slide_mask, side):
    rng = np.random.default_rng(1)
    x, y = rng.integers(-2_000, 100_000, 800), rng.integers(-2_000, 80_000, 800)
    assert slide_mask.overlap(x, y, side) == pytest.approx(exact(slide_mask, x, y, side), abs=1e-9)


def test_overlap_of_one_tile_and_of_many_agree(slide_mask):
    x, y = np.array([14_000, 30_000, 64_000]), np.array([30_000, 30_000, 41_000])
    one_by_one = [slide_mask.overlap(a, b, 700.5)[0] for a, b in zip(x, y, strict=True)]
    assert slide_mask.overlap(x, y, 700.5).tolist() == pytest.approx(one_by_one, abs=1e-12)


def test_areas_on_many_slides_at_once(slide_mask):
    other = TissueMask.of([box(0, 0, 90_000, 70_000).difference(box(30_000, 20_000, 50_000, 60_000))], 100_000, 80_000)
    rng = np.random.default_rng(2)
    masks = [(slide_mask, other, TissueMask((), 100_000, 80_000))[kind] for kind in rng.integers(0, 3, 300)]
    corner, side = rng.uniform(-500, 90_000, (2, 300)), rng.uniform(1, 5_000, 300)
    found = area_of_each([AreaIndex.of(mask.polygons) for mask in masks], np.concatenate([corner, corner + side]))
    expected = [exact(mask, x, y, s) * s**2 for mask, x, y, s in zip(masks, *corner, side, strict=True)]
    assert found == pytest.approx(np.array(expected), rel=1e-7, abs=1e-3)
    assert area_of_each([], np.empty((4, 0))).shape == (0,)


def test_overlap_of_a_hundred_thousand_tiles_takes_seconds(slide_mask):
    x, y = np.meshgrid(np.arange(320) * 310, np.arange(320) * 248)
    begin = time.thread_time()
    share = slide_mask.overlap(x.ravel(), y.ravel(), 256)
    assert time.thread_time() - begin < 10
    assert share.mean() == pytest.approx(slide_mask.fraction, abs=0.01)


@st.composite
def polygons(draw):
    points = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=9, unique=True))
    return Polygon(points).buffer(0)


@settings(max_examples=150, deadline=None)
@given(st.lists(polygons(), max_size=3), st.integers(-5, 42), st.integers(-5, 42), st.floats(0.1, 60))
def test_overlap_of_any_polygon_is_exact(shapes, x, y, side):
    mask = TissueMask.of(shapes, 40, 40)
    expected = shapely.union_all(mask.polygons).intersection(box(x, y, x + side, y + side)).area / side**2
    assert mask.overlap(x, y, side)[0] == pytest.approx(expected, abs=1e-7)


def test_no_polygon_means_no_overlap():
    mask = TissueMask((), 10, 10)
    assert mask.fraction == 0
    assert mask.overlap([0, 3], [0, 3], 5).tolist() == [0, 0]
    assert AreaIndex.of(()).area(*np.zeros((4, 0))).shape == (0,)
    assert AreaIndex.of(()).area(*np.array([[0.0], [0], [5], [5]])).tolist() == [0]


@pytest.mark.parametrize("side", [0, -1, math.nan])
def test_a_side_must_be_positive(slide_mask, side):
    with pytest.raises(ValueError, match="positive side"):
        slide_mask.overlap(0, 0, side)


def test_of_repairs_merges_and_cuts():
    bow_tie = Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    mask = TissueMask.of([bow_tie, box(5, 0, 20, 10), box(15, 0, 40, 10)], 30, 10)
    assert sum(polygon.area for polygon in mask.polygons) == pytest.approx(shapely.union_all(mask.polygons).area)
    assert all(polygon.is_valid for polygon in mask.polygons)
    assert mask.polygons[0].bounds[2] == 30
    assert [polygon.area for polygon in mask.polygons] == sorted((p.area for p in mask.polygons), reverse=True)


def test_geojson_reads_back_as_it_was(tmp_path, slide_mask):
    path = tmp_path / "a" / "slide.geojson"
    slide_mask.write(path)
    again = TissueMask.read(path)
    assert again == slide_mask
    again.write(tmp_path / "again.geojson")
    assert (tmp_path / "again.geojson").read_bytes() == path.read_bytes()


def test_size_is_told_without_the_outlines(tmp_path, slide_mask):
    path = tmp_path / "slide.geojson"
    slide_mask.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert TissueSize.peek(path) == TissueSize.of(slide_mask) == TissueSize(100_000, 80_000, 0.25, slide_mask.area)
    TissueMask((), 10, 20, note={"options": "x" * 9000}).write(path)
    assert TissueSize.peek(path) is None
    path.write_text('{"type":"FeatureCollection","features":[]}')
    assert TissueSize.peek(path) is None
    with pytest.raises(StoreError, match="cannot be read"):
        TissueSize.peek(tmp_path / "none.geojson")


def test_geojson_has_what_qupath_and_trident_look_for(tmp_path):
    mask = TissueMask.of([box(0, 0, 50, 40).difference(box(10, 10, 20, 20)), box(60, 0, 70, 10)], 100, 80, mpp=0.5)
    mask.write(tmp_path / "s.geojson")
    document = json.loads((tmp_path / "s.geojson").read_text())
    assert document["type"] == "FeatureCollection"
    assert document["crs"]["properties"]["name"].endswith("3857")
    first, second = document["features"]
    assert first["geometry"]["type"] == "Polygon"
    assert [len(ring) for ring in first["geometry"]["coordinates"]] == [5, 5]
    assert all(type(value) is int for ring in first["geometry"]["coordinates"] for point in ring for value in point)
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"]["name"] == "Tissue"
    assert len(first["properties"]["classification"]["color"]) == 3
    assert first["properties"]["isLocked"] is False
    assert [f["properties"]["tissue_id"] for f in (first, second)] == [0, 1]
    assert uuid.UUID(first["id"]) != uuid.UUID(second["id"])


def test_reads_what_qupath_exports(tmp_path):
    square = [[[0, 0], [20, 0], [20, 20], [0, 20], [0, 0]]]
    other = [[[30, 0], [40, 0], [40, 10], [30, 10], [30, 0]]]
    cell = [[[50, 50], [52, 50], [52, 52], [50, 50]]]
    features = [
        {"type": "Feature", "id": "a-b-c", "geometry": {"type": "MultiPolygon", "coordinates": [square, other]},
         "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "colorRGB": -3140401}}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": square}, "properties": None},
        {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}, "properties": {}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": cell}, "properties": {"objectType": "cell"}},
        {"type": "Feature", "geometry": None, "properties": {}},
    ]  # fmt: skip
    path = tmp_path / "export.geojson"
    for document in (features, {"type": "FeatureCollection", "features": features}):
        path.write_text(json.dumps(document))
        mask = TissueMask.read(path, width=100, height=100)
        assert [polygon.area for polygon in mask.polygons] == [400, 100]
    path.write_text(json.dumps(features[0]))
    assert TissueMask.read(path, width=100, height=100).area == 500
    path.write_text(json.dumps({"type": "Polygon", "coordinates": square}))
    assert TissueMask.read(path, width=100, height=100).area == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not GeoJSON"),
        ("[1, 2]", "not GeoJSON"),
        ('{"features": []}', "not GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1]]]}', "not GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}', "size of its slide"),
    ],
)
def test_a_file_that_is_no_outline_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.geojson"
    path.write_text(text)
    with pytest.raises(StoreError, match=message):
        TissueMask.read(path)


def test_a_missing_file_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        TissueMask.read(tmp_path / "none.geojson", width=1, height=1)

import csv
import json

import cv2
import numpy as np
import pytest
import shapely
import tifffile

from gigatome.core.errors import CohortError, MissingMppError, NoTissueError
from gigatome.core.geometry import Box
from gigatome.core.job import Job
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import open_slide
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.segment import SegmentOptions, draw, outlines, segment, segment_cohort

FACTOR = 8  # level-0 pixels a pixel of the pictures: slides of 1 mpp from pictures at 8


def disk(shape, x, y, radius):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def write_slide(path, picture, levels=(1, 4)):
    rgb = cv2.resize(picture.rgb, None, fx=FACTOR, fy=FACTOR, interpolation=cv2.INTER_NEAREST)
    with tifffile.TiffWriter(path) as tiff:
        for level in levels:
            part = cv2.resize(rgb, None, fx=1 / level, fy=1 / level, interpolation=cv2.INTER_AREA)
            tiff.write(part, tile=(256, 256), compression="deflate", photometric="rgb", subfiletype=int(level > 1))
    return path


@pytest.fixture
def slides(tmp_path, picture):
    """Three slides: two with tissue, one of bare glass."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for index, name in enumerate(["a", "b"]):
        scene = picture()
        hole = disk(scene.tissue.shape, 120, 120, 20)
        scene.add_tissue(disk(scene.tissue.shape, 120 + 30 * index, 120, 70) & ~hole)
        write_slide(folder / f"{name}.tif", scene)
    write_slide(folder / "glass.tif", picture())
    entries = [CohortSlide(str(folder / f"{name}.tif"), name, name, 1.0) for name in ("a", "b", "glass")]
    return Cohort(tuple(entries), "three slides")


def test_polygons_follow_the_pixels_edges():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[10:20, 20:30] = False
    (polygon,) = outlines(mask, 16.0)
    assert polygon.bounds == (160, 80, 800, 480)
    assert polygon.area == pytest.approx(mask.sum() * 256, rel=0.01)  # the corners of holes are cut
    assert len(polygon.interiors) == 1


@pytest.mark.parametrize("scale", [1.0, 15.87, 64.0])
def test_polygons_are_valid_and_within_a_pixel(scale):
    rng = np.random.default_rng(0)
    for _ in range(5):
        noise = cv2.GaussianBlur(rng.normal(size=(120, 150)), (0, 0), 4)
        mask = noise > 0.05
        found = outlines(mask, scale)
        merged = shapely.union_all(found)
        assert all(polygon.is_valid for polygon in found)
        assert merged.area == pytest.approx(sum(polygon.area for polygon in found))
        assert merged.area == pytest.approx(mask.sum() * scale**2, rel=0.03)
        inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5)), borderValue=0)
        rows, columns = np.nonzero(inside)
        assert shapely.contains_xy(merged, (columns + 0.5) * scale, (rows + 0.5) * scale).all()


def test_no_pixel_gives_no_polygon():
    assert outlines(np.zeros((5, 5), bool), 2.0) == []


def test_segment_gives_polygons_in_level_0_pixels(slides):
    with slides.slides[0].open() as slide:
        mask = segment(slide)
    assert (mask.width, mask.height, mask.mpp) == (2560, 1920, 1.0)
    (polygon,) = mask.polygons
    assert polygon.bounds == pytest.approx((50 * 8, 50 * 8, 191 * 8, 191 * 8), abs=20)
    assert len(polygon.interiors) == 1
    assert mask.area == pytest.approx(np.pi * (70**2 - 20**2) * 64, rel=0.06)


def test_a_slide_read_in_blocks_gives_the_same_mask(slides, monkeypatch):
    with slides.slides[0].open() as slide:
        whole = segment(slide)
        monkeypatch.setattr("gigatome.tissue.segment._BLOCK", 300)
        blocks = segment(slide)
    different = shapely.union_all(whole.polygons) ^ shapely.union_all(blocks.polygons)
    assert different.area < 0.01 * whole.area


def test_a_slide_coarser_than_asked_is_taken_as_it_is(tmp_path, picture):
    scene = picture(100, 120)
    scene.add_tissue(disk(scene.tissue.shape, 60, 50, 30))
    with open_slide(write_slide(tmp_path / "a.tif", scene, levels=(1,)), mpp=20.0) as slide:
        assert segment(slide).fraction == pytest.approx(scene.tissue.mean(), rel=0.08)


def test_bare_glass_and_missing_mpp_are_errors(slides):
    with slides.slides[2].open() as slide, pytest.raises(NoTissueError, match=r"glass\.tif: no tissue found"):
        segment(slide)
    with open_slide(slides.slides[0].uri) as slide, pytest.raises(MissingMppError):
        segment(slide)


def test_cohort_writes_tridents_layout_and_lists_failures(slides, tmp_path):
    job = Job(tmp_path / "job")
    seen = []
    masks, failures = segment_cohort(slides, job, progress=lambda *a: seen.append(a))
    assert list(masks) == ["a", "b"]
    assert [(f.slide, f.stage, f.error) for f in failures] == [("glass", "tissue", "NoTissueError")]
    assert seen[0] == ("tissue", 0, 3)
    assert seen[-1] == ("tissue", 3, 3)
    for name in masks:
        assert TissueMask.read(job.tissue(name)) == masks[name]
        thumbnail, contours = (cv2.imread(str(p)) for p in (job.thumbnail(name), job.contours(name)))
        assert thumbnail.shape == contours.shape == (768, 1024, 3)
        assert np.abs(thumbnail.astype(int) - contours).max() > 100
    assert not job.tissue("glass").exists()
    assert not job.contours("glass").exists()
    assert not list(job.path.rglob("*.tmp*"))


def test_cohort_goes_on_where_it_was(slides, tmp_path, monkeypatch):
    job = Job(tmp_path / "job")
    masks, _ = segment_cohort(slides.select(["a"]), job)
    written = job.tissue("a").stat().st_mtime_ns
    opened = []
    monkeypatch.setattr(CohortSlide, "open", lambda self, real=CohortSlide.open: opened.append(self.name) or real(self))
    again, _ = segment_cohort(slides.select(["a", "b"]), job)
    assert opened == ["b"]
    assert again["a"] == masks["a"]
    assert job.tissue("a").stat().st_mtime_ns == written


def test_cohort_keeps_edited_outlines_and_redoes_its_own_of_other_options(slides, tmp_path):
    job = Job(tmp_path / "job")
    cohort = slides.select(["a", "b"])
    segment_cohort(cohort, job)
    square = [[[0, 0], [900, 0], [900, 900], [0, 900], [0, 0]]]
    job.tissue("a").write_text(
        json.dumps([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": square}}])
    )
    before = job.tissue("b").read_bytes()
    masks, _ = segment_cohort(cohort, job, options=SegmentOptions(min_hole=1e6))
    assert masks["a"].area == 900 * 900
    assert not masks["b"].polygons[0].interiors
    assert job.tissue("b").read_bytes() != before


def test_empty_outlines_count_as_no_tissue(slides, tmp_path):
    job = Job(tmp_path / "job")
    job.tissue("a").parent.mkdir(parents=True)
    job.tissue("a").write_text('{"type": "FeatureCollection", "features": []}')
    masks, failures = segment_cohort(slides.select(["a"]), job)
    assert not masks
    assert failures[0].error == "NoTissueError"


def test_one_bad_slide_does_not_stop_the_others(slides, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"II*\0not a slide")
    gone = CohortSlide(str(tmp_path / "gone.svs"), "gone", "gone", 0.5)
    cohort = Cohort((CohortSlide(str(bad), "bad", "bad"), gone, *slides.slides[:1]))
    masks, failures = segment_cohort(cohort, None)
    assert list(masks) == ["a"]
    assert [failure.slide for failure in failures] == ["bad", "gone"]
    assert failures[1].error == "StoreError"


def test_an_empty_cohort_is_an_error(tmp_path):
    with pytest.raises(CohortError, match="empty"):
        segment_cohort(Cohort(()), Job(tmp_path))


def test_drawing_leaves_the_picture_alone(slides):
    with slides.slides[0].open() as slide:
        mask, picture = segment(slide), slide.thumbnail(256)
    before = picture.copy()
    assert (draw(mask, picture) != picture).any()
    assert (picture == before).all()


WHOLE = {"PDAC-tru-cut-HE3": (0.07, 0.12), "lung-SCC-HE3": (0.18, 0.23)}


@pytest.mark.parametrize("table", ["regions.csv", "whole.csv"])
def test_real_slides(shared_data, table):
    """Outlines hold tissue and the small lumens in it, so they cover somewhat more than the pixels counted there."""
    with (shared_data / table).open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        with open_slide(shared_data / row["slide"], mpp=float(row["mpp"])) as slide:
            mask = segment(slide)
        if row["tissue_fraction"]:
            reference = float(row["tissue_fraction"])
            assert reference - 0.03 <= mask.fraction <= min(1.0, reference + 0.24), row["slide"]
            if reference > 0.96:
                assert mask.fraction > 0.99, row["slide"]
        else:
            low, high = WHOLE[slide.name]
            assert low < mask.fraction < high


def test_whole_slides_with_fat_pen_dust_and_a_cover_slip(shared_data):
    pytest.importorskip("openslide")
    with open_slide(shared_data / "formats/camelyon_jpeg2000.dcm") as slide:
        mask = segment(slide)
        assert slide.read(Box(x=197, y=8, width=40, height=10))[..., 2].max() > 150  # the blue pen is there
    assert 0.35 < mask.fraction < 0.45
    assert mask.overlap(150, 0, 75)[0] < 1e-9  # pen mark and edge of the cover slip
    assert mask.overlap(1080, 270, 80)[0] > 0.9  # lymph node
    assert mask.overlap(500, 150, 40)[0] > 0.8  # fat

import h5py
import numpy as np
import pytest
import shapely

from gigatome.core.errors import CohortError, MissingMppError, StoreError
from gigatome.core.job import Job
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import open_slide
from gigatome.tiles.grid import GridOptions, make_grid, read_grid, tile_cohort, write_grid
from gigatome.tissue.mask import TissueMask

TRIDENT = (
    "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name", "savetodir",
    "level0_width", "level0_height",
)  # fmt: skip


class FakeSlide:
    """All that a grid needs to know of a slide."""

    def __init__(self, mpp=0.2527, width=100_000, height=80_000):
        self.mpp, self.width, self.height = mpp, width, height


def everything(slide):
    return TissueMask.of([shapely.box(0, 0, slide.width, slide.height)], slide.width, slide.height, mpp=slide.mpp)


def test_coordinates_never_drift():
    slide = FakeSlide()
    grid = make_grid(slide, everything(slide), GridOptions(mpp=0.5))
    step = 256 * 0.5 / 0.2527
    assert grid.side == step
    columns, rows = np.unique(grid.coords[:, 0]), np.unique(grid.coords[:, 1])
    assert np.abs(columns - np.arange(len(columns)) * step).max() <= 0.5
    assert np.abs(rows - np.arange(len(rows)) * step).max() <= 0.5
    assert grid.coords.dtype == np.int64
    assert len(columns) == 198


def test_overlap_is_in_pixels_of_the_tile():
    slide = FakeSlide(mpp=0.25, width=10_000, height=600)
    grid = make_grid(slide, everything(slide), GridOptions(mpp=0.5, overlap=64))
    assert np.unique(grid.coords[:, 0])[:3].tolist() == [0, 384, 768]


def test_tiles_may_hang_over_the_edge_with_enough_tissue():
    slide = FakeSlide(mpp=0.5, width=1000, height=1000)
    grid = make_grid(slide, everything(slide), GridOptions(min_tissue=0.4))
    last = grid.coords == [768, 768]
    assert last.all(axis=1).any()
    assert grid.tissue_fraction[last.all(axis=1)][0] == pytest.approx((232 / 256) ** 2)
    fuller = make_grid(slide, everything(slide), GridOptions(min_tissue=0.95))
    assert fuller.coords.max() == 512


@pytest.mark.parametrize("minimum", [0.0, 0.1, 0.4, 1.0])
def test_tiles_are_those_with_enough_tissue(masks, minimum):
    slide, mask = FakeSlide(0.5, 1600, 1200), masks["s0"]
    grid = make_grid(slide, mask, GridOptions(tile_size=64, min_tissue=minimum))
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(25) * 64, np.arange(19) * 64))
    share = shapely.area(shapely.intersection(shapely.box(x, y, x + 64, y + 64), mask.polygons[0])) / 64**2
    expected = share >= minimum - 1e-9
    assert grid.coords.tolist() == np.stack([x, y], 1)[expected].tolist()
    assert grid.tissue_fraction == pytest.approx(share[expected], abs=1e-6)


def test_a_file_reads_back_exactly(tmp_path):
    slide = FakeSlide()
    mask = TissueMask.of([shapely.Point(30_000, 30_000).buffer(9_000)], slide.width, slide.height)
    grid = make_grid(slide, mask, GridOptions(tile_size=224, mpp=0.4321, overlap=32))
    write_grid(tmp_path / "a_patches.h5", grid, "a")
    again = read_grid(tmp_path / "a_patches.h5")
    assert again.coords.tolist() == grid.coords.tolist()
    assert again.tissue_fraction.tolist() == grid.tissue_fraction.tolist()
    for name in ("tile_size", "mpp", "overlap", "slide_mpp", "slide_width", "slide_height", "min_tissue", "tissue"):
        assert getattr(again, name) == getattr(grid, name), name
    assert again.side == grid.side


def test_other_tools_can_read_the_file(tmp_path):
    slide = FakeSlide(mpp=0.2485, width=20_000, height=10_000)
    grid = make_grid(slide, everything(slide), GridOptions(mpp=0.5))
    path = tmp_path / "case_patches.h5"
    write_grid(path, grid, "case")
    with h5py.File(path, "r") as file:
        assets = {key: file[key][:] for key in file}  # GigaPath's loader reads every key so
        attributes = dict(file["coords"].attrs)
        assert not file.attrs
    assert assets["coords"].dtype == np.int64
    assert assets["coords"].shape == (len(grid), 2)
    assert assets["tissue_fraction"].shape == (len(grid),)
    assert set(TRIDENT) <= set(attributes)
    assert attributes["patch_size"] == 256
    assert attributes["patch_size_level0"] == round(256 * 0.5 / 0.2485)
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (40, 20)  # within 1 %
    assert attributes["name"] == "case"
    assert attributes["savetodir"] == str(tmp_path)
    assert attributes["target_mpp"] == 0.5
    assert attributes["mpp_level0"] == 0.2485


def test_an_odd_resolution_is_stated_exactly_to_trident(tmp_path):
    slide = FakeSlide(mpp=0.265, width=5_000, height=5_000)
    write_grid(tmp_path / "a.h5", make_grid(slide, everything(slide), GridOptions(mpp=0.37)), "a")
    with h5py.File(tmp_path / "a.h5") as file:
        attributes = dict(file["coords"].attrs)
    assert 10 / attributes["level0_magnification"] == pytest.approx(0.265, rel=1e-12)
    assert 10 / attributes["target_magnification"] == pytest.approx(0.37, rel=1e-12)


def test_a_file_of_trident_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        coords = file.create_dataset("coords", data=np.array([[0, 512], [512, 512]]))
        values = (256, 512, 40, 20, 0, "a", "x", 9_000, 8_000)
        coords.attrs.update(dict(zip(TRIDENT, values, strict=True)))
    grid = read_grid(tmp_path / "a.h5")
    assert (grid.tile_size, grid.mpp, grid.slide_mpp, grid.side) == (256, 0.5, 0.25, 512)
    assert np.isnan(grid.tissue_fraction).all()


def test_an_empty_grid_has_the_right_shape(tmp_path):
    slide = FakeSlide()
    grid = make_grid(slide, TissueMask((), slide.width, slide.height))
    write_grid(tmp_path / "a.h5", grid, "a")
    assert read_grid(tmp_path / "a.h5").coords.shape == (0, 2)


@pytest.mark.parametrize("damage", ["missing", "no hdf5", "no coords", "no attributes"])
def test_a_file_that_is_no_grid_is_refused(tmp_path, damage):
    path = tmp_path / "a.h5"
    if damage == "no hdf5":
        path.write_bytes(b"nothing")
    elif damage != "missing":
        with h5py.File(path, "w") as file:
            file["coords" if damage == "no attributes" else "other"] = np.zeros((3, 2))
    with pytest.raises(StoreError, match=r"a\.h5"):
        read_grid(path)


@pytest.mark.parametrize(
    "bad",
    [{"tile_size": 0}, {"mpp": 0}, {"mpp": float("nan")}, {"overlap": 256}, {"overlap": -1}, {"min_tissue": 1.1}],
)
def test_wrong_options_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        GridOptions(**bad)


def test_a_slide_without_mpp_is_refused(cohort, masks):
    with open_slide(cohort.slides[0].uri) as slide, pytest.raises(MissingMppError):
        make_grid(slide, masks["s0"])


@pytest.fixture
def job(tmp_path, masks):
    """A job directory in which the tissue is known."""
    job = Job(tmp_path / "job")
    for name, mask in masks.items():
        mask.write(job.tissue(name))
    return job


def test_cohort_writes_one_file_a_slide_and_reads_it_back(cohort, job, monkeypatch):
    seen = []
    options = GridOptions(tile_size=128)
    grids, failures = tile_cohort(cohort, job, options=options, progress=lambda *a: seen.append(a))
    assert list(grids) == ["s0", "s1", "s2", "s3"]
    assert not failures
    assert seen[-1] == ("tiles", 4, 4)
    path = job.path / "20x_128px_0px_overlap" / "patches" / "s2_patches.h5"
    assert read_grid(path).coords.tolist() == grids["s2"].coords.tolist()
    monkeypatch.setattr("gigatome.tiles.grid._lay", None)  # nothing is laid again
    again, failures = tile_cohort(cohort, job, options=options)
    assert not failures
    assert again["s2"].coords.tolist() == grids["s2"].coords.tolist()


def test_a_grid_is_laid_again_if_outlines_or_minimum_changed(cohort, job):
    first, _ = tile_cohort(cohort, job, options=GridOptions(tile_size=128))
    stricter, _ = tile_cohort(cohort, job, options=GridOptions(tile_size=128, min_tissue=1.0))
    assert len(stricter["s0"]) < len(first["s0"])
    TissueMask.of([shapely.box(0, 0, 256, 256)], 1600, 1200, mpp=0.5).write(job.tissue("s0"))
    edited, _ = tile_cohort(cohort, job, options=GridOptions(tile_size=128, min_tissue=1.0))
    assert len(edited["s0"]) == 4
    assert len(edited["s1"]) == len(stricter["s1"])


def test_a_damaged_file_is_made_again(cohort, job):
    grids, _ = tile_cohort(cohort, job)
    path = job.tiles(256, 0.5).coords("s1")
    path.write_bytes(path.read_bytes()[:100])
    again, failures = tile_cohort(cohort, job)
    assert not failures
    assert again["s1"].coords.tolist() == grids["s1"].coords.tolist()


def test_slides_without_a_tile_are_failures(cohort, job, tmp_path):
    gone = CohortSlide(str(tmp_path / "gone.svs"), "gone", "gone", 0.5)
    TissueMask.of([shapely.box(0, 0, 20, 20)], 1600, 1200, mpp=0.5).write(job.tissue("s3"))
    grids, failures = tile_cohort(Cohort((*cohort.slides, gone)), job)
    assert list(grids) == ["s0", "s1", "s2"]
    assert {(f.slide, f.stage, f.error) for f in failures} == {
        ("gone", "tissue", "StoreError"),
        ("s3", "tiles", "NoTissueError"),
    }


def test_an_empty_cohort_is_an_error(tmp_path):
    with pytest.raises(CohortError, match="empty"):
        tile_cohort(Cohort(()), Job(tmp_path))

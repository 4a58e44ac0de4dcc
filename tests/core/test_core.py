import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest

import gigatome
from gigatome.core import errors
from gigatome.core.extras import require
from gigatome.core.geometry import Box, level0_length, nominal_magnification
from gigatome.core.job import Job, slide_id
from gigatome.core.logs import Failure, write_failures
from gigatome.core.seeding import generator, torch_seed


def test_public_names_are_locked():
    assert gigatome.__all__ == sorted(gigatome.__all__)
    assert set(gigatome.__all__) == {
        "Box", "Cohort", "EmbeddingStore", "GigatomeError", "Slide", "SlideStore", "StudyOptions", "SurvivalTarget",
        "TileStream", "TissueMask", "check_cohort", "embed", "embed_augmented", "embed_regions", "embed_slide_vectors",
        "evaluate", "heatmap", "hierarchical_heatmap",
        "load_encoder", "load_recipe", "make_grid", "open_slide", "open_zarr", "predict_slides", "run_study", "segment",
        "train",
    }  # fmt: skip
    for name in gigatome.__all__:
        assert getattr(gigatome, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gigatome.nothing  # pyright: ignore


def test_import_is_light():
    code = "import gigatome, sys; print([m for m in ('torch', 'numpy', 'timm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_error_tree_is_drawn_as_it_is():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.GigatomeError)]
    assert len(classes) == 12
    for kind in classes:
        assert kind is errors.GigatomeError or kind.__name__ in (errors.__doc__ or "")


def test_errors_name_the_slide_and_survive_a_process():
    error = pickle.loads(pickle.dumps(errors.MissingMppError("a.svs", "states no resolution")))
    assert str(error) == "a.svs: states no resolution"
    extra = pickle.loads(pickle.dumps(errors.MissingExtraError("torch", "learn", "train")))
    assert "pip install 'gigatome[learn]'" in str(extra)


def test_missing_extra_says_what_to_install():
    with pytest.raises(errors.MissingExtraError, match=r"no_such_package is needed to read .*gigatome\[openslide\]"):
        require("no_such_package", "openslide", "read NDPI slides")


def test_box_refuses_nothing():
    with pytest.raises(ValueError, match="positive"):
        Box(0, 0, 0, 5)


def test_level0_length_is_exact():
    assert level0_length(256, 0.5, 0.2527) == 256 * 0.5 / 0.2527


@pytest.mark.parametrize(
    ("mpp", "expected"), [(0.5, 20), (0.499, 20), (0.25, 40), (1.0, 10), (8.0, 1.25), (2.0, 5), (0.2265, 44), (0.9, 11)]
)
def test_nominal_magnification_snaps_within_a_percent(mpp, expected):
    value = nominal_magnification(mpp)
    assert value == pytest.approx(expected, rel=0.011)
    assert abs(value - 10 / mpp) <= 0.01 * 10 / mpp


def test_odd_resolution_is_kept():
    assert nominal_magnification(0.68) == 10 / 0.68


def test_generators_depend_on_every_key_and_on_nothing_else():
    first = generator(3, "tiles", 7).random(4)
    np.random.default_rng(1).random(4)
    assert np.array_equal(first, generator(3, "tiles", 7).random(4))
    others = [generator(4, "tiles", 7), generator(3, "views", 7), generator(3, "tiles", 8), generator(3, "tiles", 7, 0)]
    assert all(not np.array_equal(first, other.random(4)) for other in others)
    assert 0 <= torch_seed(0, "x") < 2**63


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://b/TCGA-3C-AALI-01Z.F6E9.svs", "TCGA-3C-AALI-01Z.F6E9"),
        ("/x/a.ome.tif", "a"),
        ("a.OME.TIFF", "a"),
        ("https://h/b.svs?token=secret", "b"),
        ("plain", "plain"),
    ],
)
def test_slide_id_strips_only_the_extension(uri, name):
    assert slide_id(uri) == name


def test_job_layout_is_tridents(tmp_path):
    tiles = Job(tmp_path).tiles(256, 0.499)
    assert tiles.path.name == "20x_256px_0px_overlap"
    assert tiles.coords("a") == tiles.path / "patches" / "a_patches.h5"
    assert Job(tmp_path).tiles(224, 8.0, 16).path.name == "1.25x_224px_16px_overlap"


def test_failures_are_written_and_cleared(tmp_path):
    path = tmp_path / "job" / "failures.csv"
    write_failures(path, [Failure.of("a.svs", "tissue", errors.NoTissueError("a.svs", "no tissue, really"))])
    assert path.read_text().splitlines()[1] == 'a.svs,tissue,NoTissueError,"no tissue, really"'
    write_failures(path, [])
    assert not path.exists()

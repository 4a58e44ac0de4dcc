"""Studies from options to files: arms, null rows, learning curves, an external cohort, omics, attended tiles."""

import json

import numpy as np
import pytest
from made_stores import TILING, make

from gigatome import config
from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.core.job import Job
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.evaluation.predict import predict_slides
from gigatome.evaluation.split_tables import read_splits
from gigatome.evaluation.study_options import StudyOptions
from gigatome.evaluation.study_run import run_study
from gigatome.evaluation.units import ClassTarget, make_units
from gigatome.slides.cohort import Cohort, CohortSlide

FAST = {"fit": {"epochs": 5, "lr": 3e-3, "batch_bags": 4}}


def options(made, **values):
    given = {
        "embeddings": [str(made.store.folder)],
        "labels": str(made.labels),
        "target": "subtype",
        "splits": {"folds": 3},
        "resamples": 60,
        "tiles": 0,
    }
    return config.parse(StudyOptions, given | values)


def test_a_study_from_two_encoders(tmp_path):
    good = make(tmp_path, patients=30)
    poor = make(tmp_path, patients=30, shift=0.0, encoder="poor")
    values = {
        "embeddings": [str(good.store.folder), str(poor.store.folder)],
        "heads": ["linear", "abmil"],
        "options": {"abmil": FAST},
        "few_shot": [6, 12, 1000],
        "repeats": 2,
        "reproduces": [{"head": "linear", "value": 0.9, "sd": 0.05, "source": "nobody's, table 1"}],
    }
    study = run_study(options(good, **values), tmp_path / "study", command="gigatome evaluate …")
    labels = [arm.label for arm in study.arms]
    assert labels == ["linear on enc", "abmil on enc", "linear on poor", "abmil on poor", "linear, shuffled outcomes"]
    assert [arm.null for arm in study.arms] == [False] * 4 + [True]
    assert [arm.reported for arm in study.arms] == [0.9, None, None, None, None]
    assert len({arm.result.split_hash for arm in study.arms}) == 1
    assert study.arms[0].result.auroc > 0.85
    assert abs(study.arms[2].result.auroc - 0.5) < 0.3
    assert {test.second for test in study.comparisons} == set(labels[1:])
    assert {point.n_train for point in study.few_shot} >= {6, 12}
    folder = tmp_path / "study"
    assert (folder / "report.html").stat().st_size > 20_000
    saved = json.loads((folder / "study.json").read_text())
    assert saved["settings"]["study"]["heads"] == ["linear", "abmil"]
    assert saved["settings"]["splits"]["digest"] == study.arms[0].result.split_hash
    assert sorted(path.name for path in (folder / "models").iterdir()) == [
        "abmil_on_enc", "abmil_on_poor", "linear_on_enc", "linear_on_poor",
    ]  # fmt: skip
    units = make_units(good.cohort, ClassTarget("subtype"))
    assert read_splits(folder / "splits.tsv", units).digest == study.arms[0].result.split_hash
    _, rows, _ = predict_slides(folder, good.store, arm="linear_on_enc")
    assert len(rows) == 30


def test_heads_by_other_names_on_some_of_the_embeddings(tmp_path):
    good, poor = make(tmp_path, patients=20), make(tmp_path, patients=20, dim=5, encoder="poor")
    one, two = str(good.store.folder), str(poor.store.folder)
    values = {
        "embeddings": [one, two, f"{one} + {two}"],
        "heads": ["narrow", "wide", "near"],
        "options": {
            "narrow": {"model": "abmil", "options": {"hidden": 4}, "fit": {"epochs": 1}},
            "wide": {"model": "abmil", "options": {"hidden": 8}},
            "near": {"model": "knn", "k": 3},
        },
        "only": {"narrow": [1], "wide": [0], "near": [0, 2]},
        "fit": {"epochs": 2},
        "reproduces": [
            {"head": "narrow", "value": 0.7},
            {"head": "near", "value": 0.8, "embeddings": f"{one} + {two}"},
        ],
        "few_shot": [10], "repeats": 1,
    }  # fmt: skip
    study = run_study(options(good, **values), tmp_path / "study")
    labels = ["wide on enc", "near on enc", "narrow on poor", "near on enc+poor", "narrow, shuffled outcomes"]
    assert [arm.label for arm in study.arms] == labels
    assert [arm.reported for arm in study.arms] == [None, None, 0.7, 0.8, None]
    assert [arm.result.encoder for arm in study.arms] == ["enc", "enc", "poor", "enc+poor", "poor"]
    assert [arm.result.options.get("fit", {}).get("epochs") for arm in study.arms] == [2, None, 1, None, 1]
    assert study.arms[1].result.options["k"] == 3
    assert {item.first for item in study.comparisons} == {"narrow on poor"}
    assert {item.second for item in study.comparisons} == set(labels) - {"narrow on poor"}
    assert {point.label for point in study.few_shot} == {"wide", "near"}


def test_stores_with_different_slides_are_compared_on_those_of_both(tmp_path):
    good, poor = make(tmp_path, patients=20), make(tmp_path, patients=20, encoder="poor")
    poor.store.path("s003_0").unlink()
    stores = [str(good.store.folder), str(poor.store.folder)]
    study = run_study(options(good, embeddings=stores, shuffled=False), tmp_path / "study")
    assert [arm.result.n_slides for arm in study.arms] == [19, 19]
    assert study.excluded["no embeddings"] == ("s003_0",)
    bag = poor.store.read("s004_0")
    write_bag(poor.store.path("s004_0"), Bag("s004_0", "poor", bag.coords[:0], bag.embeddings[:0], TILING))
    with pytest.raises(EvaluationError, match="usable embeddings of different slides, such as s004_0"):
        run_study(options(good, embeddings=stores), tmp_path / "other")


def test_heads_are_tested_on_another_cohort(tmp_path):
    home, away = make(tmp_path / "home", patients=30), make(tmp_path / "away", patients=20, first=100)
    external = {"embeddings": [str(away.store.folder)], "labels": str(away.labels)}
    study = run_study(options(home, external=external, shuffled=False), tmp_path / "study")
    _, outside = study.arms
    assert outside.label == "linear, tested on labels.csv"
    assert outside.result.n_slides == 20
    assert [(fold.n_train, fold.n_test) for fold in outside.result.folds] == [(30, 20)]
    assert outside.result.auroc > 0.8
    assert not study.comparisons
    same = {"embeddings": [str(home.store.folder)], "labels": str(home.labels)}
    with pytest.raises(EvaluationError, match="p000"):
        run_study(options(home, external=same, shuffled=False), tmp_path / "leak")


def test_survival_with_omics(tmp_path):
    made = make(tmp_path, patients=24, hazard=3.0)
    rng = np.random.default_rng(0)
    lines = ["case_id,A_rnaseq,B_rnaseq,C_rnaseq"]
    lines += [f"p{i:03},{','.join(f'{v:.3f}' for v in rng.normal([9 * (i % 2), 0, 0]))}" for i in range(23)]
    (tmp_path / "omics.csv").write_text("\n".join(lines))
    groups = ["a", "b", "c", "d", "e", "f"]
    (tmp_path / "signatures.csv").write_text(f"{','.join(groups)}\nA,B,C,A,B,C\n")
    values = {
        "target": None,
        "survival": {"time": "survival_months", "censorship": "censorship"},
        "heads": ["mcat", "abmil"],
        "options": {"mcat": {**FAST, "options": {"hidden": 16, "heads": 2}}, "abmil": FAST},
        "omics": str(tmp_path / "omics.csv"),
        "signatures": str(tmp_path / "signatures.csv"),
        "splits": {"folds": 2},
        "shuffled": False,
    }
    study = run_study(options(made, **values), tmp_path / "study")
    assert study.excluded == {"no omics": ("p023",)}
    assert [arm.result.n_patients for arm in study.arms] == [23, 23]
    card = json.loads((tmp_path / "study" / "models" / "abmil" / "model.json").read_text())
    assert card["members"][0]["head"]["model"] == "abmil"


def test_attended_tiles_are_shown(tmp_path, synthetic_cohort_with_embeddings):
    cohort, store = synthetic_cohort_with_embeddings
    values = options_of(store, tmp_path)
    study = run_study(values, tmp_path / "study", cohort=cohort)
    assert {tile.slide for tile in study.tiles} <= {slide.name for slide in cohort}
    assert {tile.top for tile in study.tiles} == {True, False}
    top = min(tile.attention for tile in study.tiles if tile.top)
    assert all(tile.image.shape == (192, 192, 3) for tile in study.tiles)
    assert top >= max(tile.attention for tile in study.tiles if not tile.top) or len({t.slide for t in study.tiles}) > 1
    assert "data:image/jpeg" in (tmp_path / "study" / "report.html").read_text()


def options_of(store, tmp_path):
    return config.parse(
        StudyOptions,
        {
            "embeddings": [str(store.folder)], "labels": str(tmp_path / "none.csv"), "target": "kind",
            "heads": ["abmil"], "options": {"abmil": FAST}, "splits": {"folds": 2}, "shuffled": False, "tiles": 4,
            "resamples": 9,
        },
    )  # fmt: skip


@pytest.fixture
def synthetic_cohort_with_embeddings(tmp_path):
    """Four small slides, and embeddings made up for a grid on each."""
    from gigatome.slides.synthetic import SyntheticOptions, make_slide
    from gigatome.slides.synthetic_scene import KINDS

    tiles = Job(tmp_path / "job").tiles(128, 1.0)
    slides, rng = [], np.random.default_rng(0)
    for number in range(4):
        kind = KINDS[number % 2]
        path = make_slide(tmp_path / f"s{number}.svs", kind, number, SyntheticOptions(width=1024, height=1024))
        slides.append(CohortSlide(str(path), f"s{number}", f"p{number}", None, {"kind": kind}))
        with slides[-1].open() as slide:
            side = round(128 / slide.mpp)
            columns, rows = slide.width // side, slide.height // side
            mpp0, attrs = slide.mpp, {"level0_width": slide.width, "level0_height": slide.height}
        x, y = np.meshgrid(np.arange(columns), np.arange(rows))
        coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64) * side
        attrs |= {
            "patch_size": 128, "patch_size_level0": side, "level0_magnification": 10 / mpp0,
            "target_magnification": 10.0, "overlap": 0, "name": f"s{number}", "savetodir": "",
        }  # fmt: skip
        embeddings = rng.normal(size=(len(coords), 4)).astype(np.float32) + number % 2
        write_bag(tiles.features("enc") / f"s{number}.h5", Bag(f"s{number}", "enc", coords, embeddings, attrs))
    return Cohort(tuple(slides), "made"), EmbeddingStore.open(tmp_path / "job")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": None}, "either target"),
        ({"survival": {"time": "t", "event": "e"}}, "either target"),
        ({"heads": []}, "at least one"),
        ({"options": {"abmil": {}}}, "options of abmil, which is none of the heads"),
        ({"only": {"abmil": [0]}}, "embeddings for abmil, which is none of the heads"),
        ({"only": {"linear": [1]}}, r"only.linear must be numbers of embeddings, 0 to 0"),
        ({"only": {"linear": []}}, r"only.linear must be numbers of embeddings"),
        ({"reproduces": [{"head": "linear", "value": 1, "embeddings": "x"}]}, "names x, which is none of embeddings"),
        ({"omics": "o.csv"}, "omics and signatures"),
        ({"few_shot": [0]}, "at least 1"),
        ({"external": {"embeddings": [], "labels": "x.csv"}}, "one folder for each"),
        ({"head": "linear"}, "unknown key head; did you mean heads"),
    ],
)
def test_studies_that_make_no_sense(tmp_path, values, message):
    made = make(tmp_path, patients=4)
    with pytest.raises(ConfigError, match=message):
        options(made, **values)

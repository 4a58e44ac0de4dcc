"""Giga-SSL's linear evaluation as studies: the paper's numbers, and that each runs on tiles and slides of one job."""

import re
import sys
from pathlib import Path

import pytest

from gigatome.core.errors import ConfigError
from gigatome.embeddings.slide_vectors import embed_slide_vectors
from gigatome.evaluation.heads import find_head
from gigatome.evaluation.probes import PROBES, LinearProbe
from gigatome.evaluation.study_run import run_study
from gigatome.recipes.schema import recipe_header, recipe_text, study_names
from gigatome.recipes.studies import load_study, read_study

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from made_stores import make

TASKS = ("nsclc", "brca", "rcc", "brca_molecular", "brca_mhrd", "brca_thrd")  # in the order of the paper's rows
TABLE_2 = [f"gigassl/table2_{task}_{share}" for task in TASKS for share in (100, 25)]
TABLE_3 = [f"gigassl/table3_{task}_50" for task in ("nsclc", "rcc", "brca")]  # in the order of its columns
FIRST = ("gigassl/table2_brca_25", "gigassl/table2_rcc_100", "gigassl/table3_brca_50")
PAPERS = Path(__file__).resolve().parents[3] / "shared" / "papers"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A job with tiles and slides, and labels of two and of three classes."""
    cohort = make(tmp_path_factory.mktemp("made"), patients=66)
    embed_slide_vectors(cohort.store, slide_encoder=None)
    labels = {}
    for classes in (2, 3):
        labels[classes] = cohort.labels.with_name(f"labels_{classes}.csv")
        rows = (f"{name},{k % classes}\n" for k, name in enumerate(cohort.store.names()))
        labels[classes].write_text("ID,label\n" + "".join(rows))
    return cohort, labels


def test_the_builtin_studies():
    assert [name for name in study_names() if name.startswith("gigassl/")] == sorted(TABLE_2 + TABLE_3)


@pytest.mark.parametrize("name", TABLE_2 + TABLE_3)
def test_a_builtin_study_states_its_source_and_the_papers_heads(name):
    study = read_study(name)
    assert list(recipe_header(name))[:6] == ["paper", "table", "command", "hardware", "hours", "status"]
    assert study.command.startswith(f"gigatome evaluate {name} --embeddings JOB --labels ")
    assert len(recipe_text(name).splitlines()) <= 60
    assert find_head("giga") == ("giga", LinearProbe(C=10.0, scale=False, balanced=True, max_iter=1000))
    assert find_head("average", study.study["options"]["average"])[1] == LinearProbe(10.0, True, True)
    assert PROBES["giga"].C == 10
    splits = study.study["splits"]
    fewer = {"100": {}, "25": {"train_fraction": 0.25}, "50": {"train_units": 50}}[name.rpartition("_")[2]]
    assert splits == {"kind": "monte_carlo", "folds": 10, "test_fraction": 0.1, **fewer}


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in TABLE_2 + TABLE_3]
)
def test_a_builtin_study_runs(name, made, tmp_path):
    cohort, labels = made
    changes = ["splits.folds=2", "resamples=9", "compare=false", "shuffled=false", "options.deepmil.fit.epochs=1"]
    table = labels[3 if "rcc" in name else 2]
    options = load_study(name, embeddings=[cohort.store.job], labels=table, assignments=changes)
    study = run_study(options, tmp_path)
    assert [arm.label for arm in study.arms] == ["giga on mean-enc", "average on enc", "deepmil on enc"]
    assert {arm.label.split()[0]: arm.reported for arm in study.arms if arm.reported} == {
        row.head: row.value for row in read_study(name).reproduces
    }
    trained = study.arms[0].result.folds[0].n_train
    assert trained == {"100": 59, "25": 15, "50": 50}[name.rpartition("_")[2]]


def test_slides_alone_will_do_and_two_sets_of_them_will_not(made, tmp_path):
    cohort, labels = made
    slides = next(cohort.store.tiles.path.glob("slide_features_*"))
    study = load_study(TABLE_2[0], embeddings=[slides], labels=labels[2])
    assert (study.heads, study.embeddings) == (("giga",), (str(slides),))
    embed_slide_vectors(cohort.store, slide_encoder=None, name="again", out=tmp_path)
    with pytest.raises(ConfigError, match="are both slides; give --embeddings the folder of one"):
        load_study(TABLE_2[0], embeddings=[cohort.store.job, tmp_path], labels=labels[2])
    with pytest.raises(ConfigError, match="it needs slides, tiles: embed the slides with level slide"):
        load_study(TABLE_2[0], embeddings=[tmp_path / "nothing"], labels=labels[2])


@pytest.fixture(scope="module")
def paper():
    if not PAPERS.is_dir():
        pytest.skip("the papers' texts are not on this machine")
    return next(PAPERS.glob("002_*")).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("share", [100, 25])
def test_the_numbers_of_table_2(paper, share):
    start = next(i for i, line in enumerate(paper) if line.strip() == "Task % data")
    rows = [line for line in paper[start:] if line.startswith(f"{share} 0.")][:6]
    printed = [[tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ± ([\d.]+)", row)][:3] for row in rows]
    names = [name for name in TABLE_2 if name.endswith(f"_{share}")]
    assert [[(row.value, row.sd) for row in read_study(name).reproduces] for name in names] == printed


def test_the_numbers_of_table_3(paper):
    row = next(line for line in paper if re.match(r"Giga-SSL 0\.\d+ 0\.\d+ 0\.\d+ 0", line))
    assert [read_study(name).reproduces[0].value for name in TABLE_3] == [float(x) for x in row.split()[4:]]

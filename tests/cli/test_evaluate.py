"""``gigatome evaluate`` and ``gigatome predict`` as a user runs them."""

import csv
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import EvaluationError

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from made_stores import make

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), patients=24, hazard=3.0, share=1.0, weights="w1")


def run(*arguments):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_classes_on_the_screen_and_in_a_file(made, tmp_path):
    said = run("evaluate", made.store.job, "--labels", made.labels, "--target", "subtype", "--folds", 4)
    assert said.exit_code == 0
    assert "24 slides of 24 patients" in " ".join(said.output.split())
    arguments = ["evaluate", made.store.job, "--labels", made.labels, "--target", "subtype", "--folds", 4]
    said = run(*arguments, "--json", "-o", tmp_path / "scores.json")
    assert json.loads(said.stdout)["scores"] == json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert len(list(csv.DictReader((tmp_path / "scores.csv").open()))) == 24


def test_survival_of_either_sign(made, tmp_path):
    flipped = tmp_path / "events.csv"
    rows = list(csv.DictReader(made.labels.open()))
    lines = [f"{r['case_id']},{r['slide_id']},{r['survival_months']},{1 - int(r['censorship'])}" for r in rows]
    flipped.write_text("\n".join(["case_id,slide_id,months,dead", *lines]))
    scores = []
    for labels, columns in (
        (made.labels, ["--time", "survival_months", "--censorship", "censorship"]),
        (flipped, ["--time", "months", "--event", "dead"]),
    ):
        said = run("evaluate", made.store.job, "--labels", labels, *columns, "--head", "cox", "--folds", 3, "--json")
        found = json.loads(said.stdout)
        scores.append(found["scores"]["c_index"])
        assert found["target"] == f"{columns[1]}, event if {columns[3]} = {int(columns[2] == '--event')}"
    assert scores[0] == scores[1] > 0.6


def test_a_study_and_new_slides(made, tmp_path):
    said = run(
        "evaluate", made.store.job, "--labels", made.labels, "--target", "subtype",
        "--head", "linear", "--head", "abmil", "--folds", 3, "--shuffled", "-o", tmp_path / "study",
        "--set", "options.abmil.fit.epochs=2", "--set", "resamples=50", "--set", "tiles=0",
    )  # fmt: skip
    assert said.exit_code == 0
    output = " ".join(said.output.split())
    assert "linear, shuffled" in output
    assert "linear − abmil: auroc" in output
    assert (tmp_path / "study" / "report.html").exists()
    new = make(tmp_path / "new", patients=5, first=100, weights="w1")
    said = run("predict", tmp_path / "study", new.store.folder, "--arm", "linear", "-o", tmp_path / "new.csv")
    assert said.exit_code == 0
    assert len(list(csv.DictReader((tmp_path / "new.csv").open()))) == 5
    other = make(tmp_path / "other", patients=2, weights="w2")
    with pytest.raises(EvaluationError, match="weights w2"):
        run("predict", tmp_path / "study", other.store.folder, "--arm", "linear", "-o", tmp_path / "no.csv")
    assert not (tmp_path / "no.csv").exists()


def test_a_study_from_a_file(made, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        f"embeddings: [{made.store.folder}]\nlabels: {made.labels}\ntarget: subtype\nheads: [linear]\n"
        "splits: {kind: monte_carlo, folds: 3, test_fraction: 0.25}\nresamples: 20\nshuffled: false\n"
    )
    said = run("evaluate", study, "--set", "seed=5", "-o", tmp_path / "out")
    assert said.exit_code == 0
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert saved["settings"]["study"]["seed"] == 5
    assert "3 random splits" in saved["settings"]["splits"]["name"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--labels", "x.csv"],
        ["--labels", "x.csv", "--target", "a", "--time", "t"],
        ["--labels", "x.csv", "--target", "a", "--compare"],
        ["--labels", "x.csv", "--target", "a", "--level", "tile", "--head", "knn", "--head", "linear", "-o", "out"],
    ],
)
def test_wrong_usage(made, arguments):
    assert run("evaluate", made.store.job, *arguments).exit_code == 2

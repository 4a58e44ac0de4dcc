"""Studies made up of drawn predictions: what their pages, files and figures say, and what they refuse."""

import csv
import dataclasses
import html
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_studies import class_result, class_study, survival_result, survival_study, tissue

from gigatome.core.errors import EvaluationError
from gigatome.evaluation import metrics
from gigatome.evaluation.calibration import calibration
from gigatome.evaluation.canvas import safe_svg
from gigatome.evaluation.result import plain
from gigatome.evaluation.study import Arm, AttendedTile, Study
from gigatome.evaluation.study_files import (
    file_names,
    headline,
    interval,
    p_value,
    spelt,
    spread,
)
from gigatome.evaluation.study_report import write_study
from gigatome.evaluation.survival_result import SurvivalPredictions

NAN = float("nan")
HOSTILE = "<script>alert(1)</script>\"' onload='x' $\\frac{ 組織"


class Attributes(html.parser.HTMLParser):
    """Names of all elements and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(class_study(), folder)
    return folder


def page_of(folder):
    return html.unescape((folder / "report.html").read_text(encoding="utf-8")).replace("\N{NO-BREAK SPACE}", " ")


def cells(page):
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)]


def rows_of(page):
    return [cells(row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)]


def test_a_study_is_a_folder_of_known_files(written):
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    tables = {name for name in names if name.endswith(".csv")}
    assert tables == {
        "predictions_abmil_on_vits16.csv",
        "predictions_clam_sb_on_vits16.csv",
        "predictions_mean_pooling_linear.csv",
        "predictions_abmil_permuted_labels.csv",
    }
    figures = {name for name in names if name.startswith("figures/")}
    assert {"figures/scores.svg", "figures/differences.svg", "figures/roc.svg"} <= figures
    assert {"figures/precision_recall.svg", "figures/few_shot_per_class.svg"} <= figures
    assert {"figures/calibration_abmil_on_vits16.svg", "figures/confusion_mean_pooling_linear.svg"} <= figures
    assert names == {"report.html", "study.json", *tables, *figures}
    assert set(json.loads((written / "study.json").read_text())["figures"]) == figures
    for name in figures:
        safe_svg((written / name).read_text(encoding="utf-8"))


def test_the_tables_say_what_was_found(written):
    study, rows = class_study(), rows_of(page_of(written))
    first = study.arms[0].result
    mean, sd = first.fold_auroc
    low, high = first.auroc_ci
    line = next(row for row in rows if row[0] == "ABMIL on vits16")
    assert line[1] == f"{mean:.3f} ± {sd:.3f}"
    assert line[2] == f"{first.auroc:.3f} ({low:.3f} to {high:.3f})"
    assert any(row[0] == "ABMIL, permuted labels (null)" for row in rows)
    beside = next(row for row in rows if "HIPT, Table 1" in row)
    assert beside[1:4] == [f"{mean:.3f} ± {sd:.3f}", "0.874 ± 0.060", f"{mean - 0.874:+.3f}"]
    fold = next(row for row in rows if row[0] == "3" and len(row) == 7)
    assert fold[3] == f"{first.folds[2].auroc:.3f}"


def test_comparisons_speak_of_their_number(written):
    page = page_of(written)
    rows = rows_of(page)
    line = next(row for row in rows if row[0] == "ABMIL on vits16 − Mean pooling, linear")
    assert line == [line[0], "AUROC", "+0.071", "+0.026 to +0.111", "0.004", "0.012", "paired bootstrap over patients"]
    assert "3 tests were made. If all arms were alike, 0.15 of 3 such tests" in page
    assert "these differ: ABMIL on vits16 and Mean pooling, linear; ABMIL on vits16 and ABMIL, permuted" in page
    marked = re.findall(r'<tr class="highlight">(.*?)</tr>', page, re.DOTALL)
    assert not any("ABMIL on vits16 − CLAM-SB" in row for row in marked)
    assert any("ABMIL on vits16 − Mean pooling" in row for row in marked)


def test_no_difference_is_not_called_sameness(tmp_path):
    study = class_study()
    only = dataclasses.replace(study.comparisons[0], ci=(NAN, NAN))
    write_study(dataclasses.replace(study, comparisons=(only,)), tmp_path)
    page = page_of(tmp_path)
    assert "One test was made. At that level no two arms differ by more than chance" in page
    assert "does not say that they are alike" in page
    assert next(row for row in rows_of(page) if row[0].startswith("ABMIL on vits16 −"))[3] == "–"


def test_everything_left_out_and_set_is_named(written):
    page, rows = page_of(written), rows_of(page_of(written))
    assert ["no label", "2", "TCGA-9001, TCGA-9002"] in rows
    line = next(row for row in rows if row[0] == "no embeddings")
    assert line[1] == "60"
    assert line[2].endswith("TCGA-8039 and 20 more, in study.json")
    for row in (["fit.lr", "0.0002"], ["fit.clip", "–"], ["splits.kind", "kfold"], ["embeddings.tile_size", "256"]):
        assert row in rows
    assert any(row[-1] == "3f7a9c0d2b1e4f56" and "hidden 384, gated yes" in row[3] for row in rows)
    assert "gigatome evaluate emb/vits16 --labels brca.csv" in page
    assert len(json.loads((written / "study.json").read_text())["excluded"]["no embeddings"]) == 60


def test_attended_tiles_are_pictures(written):
    page = page_of(written)
    assert page.count('class="zoom"') == 24
    assert "2 % of the attention · x 0, y 2,048" in page
    assert page.index("Looked at most") < page.index("Looked at least")


def test_the_json_is_strict_and_whole(written):
    def refuse(name):
        raise AssertionError(name)

    found = json.loads((written / "study.json").read_text(encoding="utf-8"), parse_constant=refuse)
    study = class_study()
    assert [arm["label"] for arm in found["arms"]] == [arm.label for arm in study.arms]
    assert [arm["null"] for arm in found["arms"]] == [False, False, False, True]
    first = found["arms"][0]
    assert first["score"]["pooled"] == pytest.approx(study.arms[0].result.auroc)
    assert first["difference"] == pytest.approx(study.arms[0].result.fold_auroc[0] - 0.874)
    assert first["result"]["split_hash"] == "3f7a9c0d2b1e4f56"
    assert found["arms"][2]["reported"] is None
    assert found["comparisons"][1]["p_adjusted"] == pytest.approx(0.012)
    assert found["settings"]["fit"] == {"epochs": 20, "lr": 2e-4, "clip": None, "sampling": "balanced"}
    assert found["tiles"][0] == {
        "slide": "TCGA-0000", "x": 0, "y": 2048, "attention": 0.02, "top": True, "label": "ILC, predicted ILC"
    }  # fmt: skip
    assert len(found["few_shot"]) == 18


def test_predictions_give_the_scores_again(written):
    with (written / "predictions_mean_pooling_linear.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    result = class_study().arms[2].result
    y = np.array([int(row["subtype"] == "ILC") for row in rows])
    p = np.array([float(row["p_ILC"]) for row in rows])
    assert metrics.auroc(y, p) == pytest.approx(result.auroc, abs=1e-5)
    assert [row["slide"] for row in rows] == list(result.predictions.slides)
    assert {row["predicted"] for row in rows} == {"IDC", "ILC"}


@pytest.mark.parametrize(
    ("level", "head"),
    [
        ("slide", "slide,patient,fold"),
        ("patient", "patient,fold"),
        ("tile", "slide,tile,patient,fold"),
    ],
)
def test_predictions_name_what_was_predicted(level, head):
    result = class_result(1, n=60, folds=3, level=level)
    first, second = result.predictions_csv().splitlines()[:2]
    assert first == f"{head},subtype,predicted,p_IDC,p_ILC"
    assert second.split(",")[head.split(",").index("patient")] == "TCGA-0000"


def test_survival_predictions_have_the_bins_of_their_fold():
    result = survival_result(0.8, n=10, folds=2)
    rows = result.predictions
    survival = np.tile([0.75, 0.5], (10, 1))
    edges = np.where(rows.folds[:, None] == 0, [12.0, 30.0], [9.5, 24.0])
    result = dataclasses.replace(result, predictions=dataclasses.replace(rows, survival=survival, edges=edges))
    table = list(csv.DictReader(result.predictions_csv().splitlines()))
    assert list(table[0])[-5:] == ["group", "end_0", "survival_0", "end_1", "survival_1"]
    assert [row["end_1"] for row in table[:3]] == ["30", "24", "30"]
    assert {(row["survival_0"], row["survival_1"]) for row in table} == {("0.75", "0.5")}


def test_calibration_is_told_with_its_slope(written, tmp_path):
    rows = class_study().arms[0].result.predictions
    found = calibration(rows.y == 1, rows.probabilities[:, 1], patients=rows.patients)
    ends = "{:.2f} to {:.2f}".format(*found.slope_ci)
    assert f"Slope {found.slope:.2f} ({ends}), intercept" in page_of(written).replace("−", "-")
    result = class_result(1, n=60, folds=3)
    sure = np.where(result.predictions.y[:, None] == [0, 1], 0.9, 0.1)
    apart = dataclasses.replace(result.predictions, probabilities=sure)
    one = dataclasses.replace(apart, y=np.zeros_like(apart.y))
    for name, predictions, told in (("apart", apart, True), ("one", one, False)):
        write_study(Study("t", (Arm("a", dataclasses.replace(result, predictions=predictions)),)), tmp_path / name)
        assert ("No slope, as the classes are perfectly separated" in page_of(tmp_path / name)) == told
        assert not any("nan" in words for words in re.findall("<figcaption.*?</figcaption>", page_of(tmp_path / name)))


def test_tiles_are_called_tiles_and_slides_are_scored_by_them(tmp_path):
    result = class_result(1, n=60, folds=3)
    tiles = dataclasses.replace(result, level="tile", by_slide={"mean": result.scores, "majority": result.scores})
    write_study(Study("t", (Arm("a", tiles),)), tmp_path)
    page = page_of(tmp_path)
    assert "Pooled test predictions of tiles;" in page
    low, high = result.auroc_ci
    assert ["a", "majority vote", f"{result.auroc:.3f} ({low:.3f} to {high:.3f})"] in [r[:3] for r in rows_of(page)]


def test_the_same_study_is_the_same_files(written, tmp_path):
    write_study(class_study(), tmp_path)
    for path in written.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_survival_has_curves_with_numbers_at_risk(tmp_path):
    write_study(survival_study(), tmp_path)
    page, rows = page_of(tmp_path), rows_of(page_of(tmp_path))
    line = next(row for row in rows if row[0] == "ABMIL on vits16")
    scores = ["0.700 ± 0.032", "0.683 (0.620 to 0.740)", "0.671 (0.610 to 0.730)", "1.900 (1.400 to 2.600)"]
    assert line[1:] == [*scores, "< 0.001"]
    assert ["ABMIL on vits16", "0.710", "0.690", "–"] in rows
    assert "survival_months, event if censorship = 0 of 260 patients" in page
    assert page.count("log-rank p < 0.001") >= 4  # in two charts, and for those who cannot see them
    assert page.count(">at risk<") == 2
    assert "Median survival: low" in page
    with (tmp_path / "predictions_cox_on_mean.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 260
    assert sum(int(row["event"]) for row in table) == survival_result(0.8).predictions.event.sum()
    found = json.loads((tmp_path / "study.json").read_text())["arms"][0]
    assert found["result"]["fold_c_index"]["mean"] == pytest.approx(0.70)
    assert found["result"]["scores"]["auroc_at"][2] is None
    assert found["score"]["metric"] == "c-index"


def test_patients_tested_repeatedly_count_once_in_a_survival_curve(tmp_path):
    result = survival_result(0.8, n=60)
    rows = result.predictions
    twice = SurvivalPredictions(
        *(rows.names * 2, rows.patients * 2),
        *(np.tile(getattr(rows, name), 2) for name in ("folds", "time", "event", "risk", "high")),
        *[np.zeros((120, 0))] * 2,
    )
    pages = []
    for name, predictions in (("once", rows), ("twice", twice)):
        arm = Arm("a", dataclasses.replace(result, predictions=predictions))
        write_study(Study("t", (arm,)), tmp_path / name)
        pages.append((tmp_path / name / "figures" / "survival_a.svg").read_text())
    words = [re.findall("<text[^>]*>([^<]*)<", page) for page in pages]
    assert words[0] == words[1]


def test_several_classes_have_a_mean_and_each_its_curve(tmp_path):
    classes = ("breast", "colon", "kidney")
    write_study(Study("organ", (Arm("kNN", class_result(2, classes=classes, n=120, folds=4)),)), tmp_path)
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"roc", "roc_0", "roc_1", "roc_2", "precision_recall", "confusion_knn", "calibration_knn"} <= figures
    page = page_of(tmp_path)
    assert "ROC, colon against the rest" in page
    assert "probability of the predicted class" in page
    assert "differences" not in figures
    assert "Is the difference real?" not in page


def test_hostile_names_stay_words(tmp_path):
    arms = (Arm(HOSTILE, class_result(1, classes=(HOSTILE, "b"), n=60, folds=3, head=HOSTILE, options={HOSTILE: 1})),)
    tile = AttendedTile(HOSTILE, 0, 0, 0.5, True, tissue(0, 16), HOSTILE)
    study = Study(HOSTILE, arms, tiles=(tile,), excluded={HOSTILE: (HOSTILE,)}, settings={HOSTILE: [HOSTILE]})
    write_study(study, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in source
    parser = Attributes()
    parser.feed(source)
    assert "script" in parser.tags
    assert not {name for name in parser.names if name.startswith("on")}
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "study.json", "figures", "predictions_script_alert_1_script_onload_x_frac.csv"
    }  # fmt: skip
    assert json.loads((tmp_path / "study.json").read_text())["title"] == HOSTILE


def test_what_cannot_be_a_study_is_refused(tmp_path):
    result = class_result(1, n=60, folds=3)
    with pytest.raises(EvaluationError, match="has no arm"):
        write_study(Study("t", ()), tmp_path)
    with pytest.raises(EvaluationError, match="two arms of the study are called 'a'"):
        write_study(Study("t", (Arm("a", result), Arm("a", result))), tmp_path)
    with pytest.raises(EvaluationError, match="either classes or survival"):
        write_study(Study("t", (Arm("a", result), Arm("b", survival_result(1)))), tmp_path)
    assert not list(tmp_path.iterdir())


def test_arms_on_different_splits_are_told(tmp_path):
    result = class_result(1, n=60, folds=3)
    other = dataclasses.replace(result, split_hash="other")
    write_study(Study("t", (Arm("a", result), Arm("b", other))), tmp_path)
    assert "not all tested on the same splits" in page_of(tmp_path)
    write_study(Study("t", (Arm("a", result), Arm("b", other, null=True))), tmp_path)
    assert "not all tested on the same splits" not in page_of(tmp_path)


def test_scores_that_are_not_defined_are_dashes(tmp_path):
    result = class_result(1, n=60, folds=3)
    folds = tuple(dataclasses.replace(fold, auroc=NAN) for fold in result.folds)
    scores = dataclasses.replace(result.scores, auroc_ci=(NAN, NAN))
    arm = Arm("a", dataclasses.replace(result, folds=folds, scores=scores), reported=0.9)
    write_study(Study("t", (arm,)), tmp_path)
    rows = rows_of(page_of(tmp_path))
    assert next(row[1:3] for row in rows if row[0] == "a") == ["–", f"{result.auroc:.3f}"]
    assert next(row for row in rows if row[0] == "a" and "0.900" in row)[3] == f"{result.auroc - 0.9:+.3f}".replace(
        "-", "−"
    )
    assert headline(arm.result).value == result.auroc


def test_many_arms_draw_the_first_four(tmp_path):
    result = class_result(1, n=60, folds=3)
    write_study(Study("t", tuple(Arm(f"arm {k}", result) for k in range(6))), tmp_path)
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert "confusion_arm_3" in figures
    assert "confusion_arm_4" not in figures
    assert "The first 4 arms are drawn." in page_of(tmp_path)
    assert len(list(tmp_path.glob("predictions_*.csv"))) == 6


def test_file_names_of_any_labels_differ():
    names = file_names(["A b", "a-B", "組織", "", "../../etc", "x" * 300])
    assert names["A b"] == "a_b"
    assert names["../../etc"] == "etc"
    assert len(set(names.values())) == 6
    assert all(re.fullmatch(r"[a-z0-9_]{1,64}", name) for name in names.values())


def test_words_of_numbers():
    assert spread(0.8744, 0.0601).replace("\N{NO-BREAK SPACE}", " ") == "0.874 ± 0.060"
    assert (spread(0.8744, NAN), spread(NAN, NAN)) == ("0.874", "–")
    assert interval((-0.02, 0.1), plus=True).replace("\N{NO-BREAK SPACE}", " ") == "−0.020 to +0.100"
    assert [p_value(p) for p in (0.2, 0.00099, NAN)] == ["0.200", "<\N{NO-BREAK SPACE}0.001", "–"]
    assert [spelt(v) for v in (True, None, 2e-4, [1, 2], {}, "x")] == ["yes", "–", "0.0002", "1, 2", "–", "x"]
    assert plain({"a": np.float32(0.5), 1: float("inf"), "b": {2, 1}, "c": np.arange(2)}) == {
        "a": 0.5, "1": None, "b": [1, 2], "c": [0, 1]
    }  # fmt: skip


def test_importing_it_loads_nothing_heavy():
    code = "import sys, gigatome.evaluation.study_report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "jinja2", "sklearn"} & set(loaded)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page_without_complaint(written):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    page = (written / "report.html").as_uri()
    shown = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.count("<figure") > 20
    assert "CONSOLE" not in shown.stderr

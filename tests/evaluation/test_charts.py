import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import cv2
import matplotlib
import numpy as np
import pytest

from gigatome.core.errors import MissingExtraError
from gigatome.evaluation.canvas import PALETTE
from gigatome.evaluation.charts import RocCurve, ScoreRow, roc_curves, score_intervals, training_curves
from gigatome.evaluation.metrics import auroc
from gigatome.evaluation.report import Chart

NAN = float("nan")


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def records(count, first=1):
    rng = np.random.default_rng(0)
    return [{"step": step, "loss": 5 + rng.normal(), "lr": 1e-4 * step} for step in range(first, first + count)]


def all_charts(label="a"):
    truth = np.arange(40) % 2 == 0
    return [
        training_curves(records(300)),
        score_intervals([ScoreRow(label, 0.8, 0.7, 0.9, label)]),
        roc_curves([RocCurve(label, truth, np.random.default_rng(0).random(40))]),
    ]


def test_charts_are_the_same_bytes_whatever_the_reader_set():
    before = all_charts()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert all_charts() == before
        assert matplotlib.rcParams["font.size"] == 30
    assert all_charts() == before


def test_charts_follow_the_scheme_and_stay_clear():
    for svg in all_charts():
        outside_style = re.sub(r"<style.*?</style>", "", svg)
        assert set(re.findall(r"#[0-9a-f]{6}\b", outside_style)) == set()  # every colour is a property
        assert "prefers-color-scheme:dark" in svg
        assert 'width="1056"' in svg
        backgrounds = [path for path in re.findall(r"<path[^>]*>", svg) if "L 1056" in path and "M 0 " in path]
        assert all("fill: none" in path for path in backgrounds)
        assert "*{stroke" not in svg.replace(".gt-chart *{stroke", "")  # matplotlib's rule would restyle the page
        Chart(svg, "", "passes the report's own check")


SIGHT = {  # linear RGB as it is seen; Machado, Oliveira and Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", [0, 1])
def test_series_are_told_apart_by_all_eyes(sight, scheme):
    names = [name for name in PALETTE if name.startswith("series")]
    srgb = np.array([[int(PALETTE[name][scheme][i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in names])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHT[sight]).T, 0, 1)
    seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    distances = [np.linalg.norm(one - other) for one, other in itertools.combinations(lab, 2)]
    assert min(distances) > 20  # about 2 can just be told apart side by side


def test_ids_of_two_charts_never_meet():
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in all_charts()]
    assert all(ids)
    assert len(set().union(*ids)) == sum(map(len, ids))
    for svg, own in zip(all_charts(), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= own


@pytest.mark.parametrize(
    "label", ["$\\frac{$", "<script>alert(1)</script>", "caf\udce9\0\x07", "組織 #000001", "x" * 500, ""]
)
def test_labels_are_only_words(label):
    for svg in all_charts(label)[1:]:
        words = texts(svg)
        assert "<script" not in svg
        assert max(len(word or "") for word in words) <= 64
        assert label == "" or any((word or "")[:3] == label[:3] for word in words)


@pytest.mark.parametrize(
    ("svg", "words"),
    [
        (training_curves([]), "No training records yet"),
        (
            training_curves([{"step": 1}, {"loss": 2.0}, {"step": 2, "loss": NAN}, {"step": 3, "loss": "x"}]),
            "No training records yet",
        ),
        (score_intervals([]), "No scores yet"),
        (roc_curves([]), "No predictions yet"),
        (training_curves([{"step": 7, "loss": 2.5}]), "7"),
        (training_curves([{"step": 1, "lr": 0.0}, {"step": 2, "lr": 0.0}]), "Learning rate"),
        (score_intervals([ScoreRow("nothing", NAN)], chance=None), "none"),
        (score_intervals([ScoreRow("no interval", 0.7)]), "no interval"),
        (score_intervals([ScoreRow("flat", 1.0, 1.0, 1.0)], chance=1.0), "1.000 to 1.000"),
        (roc_curves([RocCurve("one class", np.ones(3, bool), np.arange(3.0))]), "undefined"),
        (roc_curves([RocCurve("empty", np.zeros(0, bool), np.zeros(0))]), "undefined"),
        (roc_curves([RocCurve("nan", np.array([True, False]), np.array([NAN, 1.0]))]), "undefined"),
    ],
)
def test_little_to_show_is_shown(svg, words):
    assert words in texts(svg)


def test_training_curves_show_what_was_logged():
    svg = training_curves([{**record, "kl": 0.5, "epoch": 3} for record in records(20)])
    assert [word for word in texts(svg) if word in ("Loss", "KL to the teacher, nats", "Learning rate")] == [
        "Loss",
        "KL to the teacher, nats",
        "Learning rate",
    ]
    assert "epoch" not in svg
    assert "2e-3" in texts(svg)  # the last learning rate


def test_a_resumed_run_counts_each_step_once():
    once = training_curves(records(10))
    assert training_curves([*records(10)[:7], {"step": 6, "loss": 99.0, "lr": 9.0}, *records(10)[5:]]) == once


def test_a_long_run_is_a_small_chart_that_keeps_its_extremes():
    long = records(50_000)
    long[31_000]["loss"] = 500.0
    svg = training_curves(long)
    assert len(svg) < 60_000
    assert max(int(word) for word in texts(svg) if word.isdecimal()) >= 400  # the median hides it, the band does not


def test_the_axis_of_scores_holds_all_intervals_and_chance():
    svg = score_intervals([ScoreRow("a", 0.85, 0.62, 0.93), ScoreRow("b", 0.9, 0.88, 0.97)], chance=0.5)
    ticks = [float(word) for word in texts(svg) if re.fullmatch(r"\d\.\d", word)]
    assert min(ticks) == pytest.approx(0.4)
    assert max(ticks) == pytest.approx(1.0)
    assert "chance" in texts(svg)
    assert "0.620 to 0.930" in texts(svg)
    assert "chance" not in texts(score_intervals([ScoreRow("a", 0.85)], chance=None))


def test_the_area_of_a_curve_is_the_auroc_with_ties():
    rng = np.random.default_rng(1)
    truth = rng.random(200) < 0.3
    score = np.round(truth * 0.4 + rng.random(200), 1)
    assert f"{auroc(truth.astype(int), score):.3f}" in texts(roc_curves([RocCurve("a", truth, score)]))


def test_a_curve_needs_one_score_each():
    with pytest.raises(ValueError, match="one length"):
        RocCurve("a", np.ones(3, bool), np.ones(2))


def test_matplotlib_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"gigatome\[learn\]"):
        training_curves([])


def test_drawing_leaves_pyplot_alone():
    code = "import sys; from gigatome.evaluation import charts; charts.training_curves([]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "matplotlib.figure" in loaded
    assert "matplotlib.pyplot" not in loaded

"""Panels of a study, and the numbers behind them against hand counts, scikit-learn and simulation."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from gigatome.evaluation import metrics
from gigatome.evaluation.calibration import reliability
from gigatome.evaluation.canvas import MUTED
from gigatome.evaluation.curves import (
    CurveBand,
    confusion,
    curve_band,
    learning_curves,
)
from gigatome.evaluation.metrics import patient_weights
from gigatome.evaluation.report import Chart
from gigatome.evaluation.study import FewShot
from gigatome.evaluation.study_charts import (
    Dot,
    Group,
    Line,
    calibration_panel,
    confusion_panel,
    curve_panel,
    dots_panel,
    learning_panel,
    survival_panel,
)
from gigatome.evaluation.study_panel import Style, round_limits, styles
from gigatome.evaluation.survival_curves import kaplan_meier

NAN = float("nan")
STYLE = styles([False])[0]


def texts(svg):
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def drawn(n=400, *, classes=2, strength=1.5, seed=0, each=1):
    """Labels, probabilities and patients with ``each`` slides, all alike of one patient."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n // each)
    logits = rng.normal(size=(n // each, classes)) + strength * np.eye(classes)[y]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    patients = [f"p{k}" for k in range(n // each)]
    return np.repeat(y, each), np.repeat(p, each, 0), list(np.repeat(patients, each))


def all_panels(label="a"):
    y, p, patients = drawn(120)
    band = curve_band("roc", y, p, patients, positive=1, seed=0, resamples=50)
    time = np.random.default_rng(0).exponential(30, 80)
    curve = kaplan_meier(time, np.arange(80) % 3 > 0)
    points = [FewShot(label, n, (0.6, 0.65, 0.7)) for n in (1, 10, 100)]
    return [
        dots_panel("title", [Dot(label, 0.8, 0.7, 0.9, STYLE, (0.75, NAN, 0.85), 0.78)], line=0.5),
        curve_panel("title", [Line(label, band, STYLE, "0.9")], axes_names=("x", "y"), baseline=None, heading="area"),
        calibration_panel(
            label,
            reliability(y == 1, p[:, 1], patients=patients),
            STYLE,
            shares=np.full(20, 0.05),
            error=0.1,
            axes_names=("x", "y"),
        ),
        confusion_panel(label, confusion(y, p), ("no", label), STYLE),
        survival_panel(label, [Group("high", curve, STYLE)], unit="months", note="p = 0.010"),
        learning_panel("title", [(learning_curves(points)[0], STYLE)], axis="training slides", chance=0.5),
    ]


def test_panels_are_the_same_bytes_and_follow_the_scheme():
    panels = all_panels()
    assert panels == all_panels()
    for svg in panels:
        assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"<style.*?</style>", "", svg))) == set()
        assert 'class="gt-chart panel"' in svg
        assert 'width="448"' in svg
        Chart(svg, "", "passes the report's own check")


@pytest.mark.parametrize("label", ["$\\frac{$", "<script>alert(1)</script>", "caf\udce9\0", "組織", "x" * 500, ""])
def test_labels_are_only_words(label):
    for svg in all_panels(label):
        assert "<script" not in svg
        assert max(map(len, texts(svg))) <= 64


def test_little_to_show_is_shown():
    nothing = np.full(3, NAN)
    undefined = CurveBand(np.arange(3.0), nothing, np.arange(3.0), nothing, nothing, NAN, (NAN, NAN))
    panel = curve_panel("t", [Line("a", undefined, STYLE, "x")], axes_names=("x", "y"), baseline=0.3)
    assert "undefined" in texts(panel)
    assert "none" in texts(dots_panel("t", [Dot("a", NAN, NAN, NAN, STYLE)]))
    assert "no interval" in texts(dots_panel("t", [Dot("a", 0.7, NAN, NAN, STYLE)], line=0.5))
    assert "−0.100 to +0.020" in texts(dots_panel("t", [Dot("a", -0.04, -0.1, 0.02, STYLE)], line=0.0, signed=True))
    assert "t" in texts(dots_panel("t", []))
    one = kaplan_meier(np.array([3.0]), np.array([True]))
    assert "high" in texts(survival_panel("t", [Group("high", one, STYLE)], unit="days"))
    assert "0.600" in texts(
        learning_panel("t", [(learning_curves([FewShot("a", 5, (0.6,))])[0], STYLE)], axis="slides")
    )


def test_a_long_name_gets_a_line_of_its_own():
    short, long = (
        dots_panel("t", [Dot(name, 0.8, 0.7, 0.9, STYLE)]) for name in ("a − b", "ABMIL on vits16 − CLAM-SB on vits16")
    )
    assert "ABMIL on vits16 − CLAM-SB on vits16" in texts(long)
    assert float(ET.fromstring(long).get("height")) > float(ET.fromstring(short).get("height"))


def test_arms_keep_apart_and_null_arms_are_grey():
    found = styles([False, True, *[False] * 7, True])
    known = [found[0], *found[2:9]]
    assert len(set(known)) == len(known)
    assert {found[1].color, found[9].color} == {MUTED}
    assert MUTED not in {style.color for style in known}


def test_limits_hold_all_values_and_shares_stay_shares():
    assert round_limits([0.62, 1.0]) == (pytest.approx(0.5), 1.0)
    low, high = round_limits([-0.04, 0.12, NAN])
    assert low <= -0.04
    assert high >= 0.12
    assert round_limits([0.5, 0.5])[0] < 0.5 < round_limits([0.5, 0.5])[1]
    assert round_limits([]) == (0.0, 1.0)


def test_a_confusion_matrix_counts_rows_as_truth():
    y = np.array([0, 0, 0, 1, 1, 2])
    p = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    matrix = confusion(y, p)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    words = texts(confusion_panel("t", matrix, ("a", "b", "c"), STYLE))
    assert "67\N{SPACE}%" in words  # two of three
    assert words.index("a") < words.index("b") < words.index("c")


@pytest.mark.parametrize("kind", ["roc", "precision_recall"])
@pytest.mark.parametrize("classes", [2, 4])
def test_curves_and_areas_are_those_of_scikit_learn(kind, classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    y, p, patients = drawn(300, classes=classes)
    p = np.round(p, 2)  # ties
    band = curve_band(kind, y, p, patients, positive=1, seed=0, resamples=20)
    if kind == "roc":
        false, true, _ = sklearn.roc_curve(y == 1, p[:, 1], drop_intermediate=False)
        np.testing.assert_allclose(band.x, false)
        np.testing.assert_allclose(band.y, true)
        assert band.area == pytest.approx(sklearn.roc_auc_score(y == 1, p[:, 1]))
        macro = metrics.weighted_auroc(y, p, np.ones((1, len(y))))[0] if classes > 2 else None
    else:
        precision, recall, _ = sklearn.precision_recall_curve(y == 1, p[:, 1])
        whole = recall[:-1] < 1
        np.testing.assert_allclose(band.x[1:-1], recall[:-1][whole][::-1])
        np.testing.assert_allclose(band.y[1:-1], precision[:-1][whole][::-1])
        assert band.area == pytest.approx(sklearn.average_precision_score(y == 1, p[:, 1]))
        macro = np.mean([sklearn.average_precision_score(y == c, p[:, c]) for c in range(classes)])
    if classes > 2:
        mean = curve_band(kind, y, p, patients, positive=None, seed=0, resamples=20)
        assert mean.area == pytest.approx(macro)


@pytest.mark.parametrize("kind", ["roc", "precision_recall"])
def test_a_band_holds_the_curve_and_the_truth_where_it_should(kind):
    """Pointwise coverage over draws of 150 patients, also where the curve is pressed to an edge."""
    y, p, patients = drawn(40_000, strength=1.0)
    truth = curve_band(kind, y, p, patients, positive=1, seed=0, resamples=1)
    places, inside, draws = [10, 20, 40, 60, 80], np.zeros(5), 60
    for seed in range(draws):
        y, p, patients = drawn(150, strength=1.0, seed=1 + seed)
        band = curve_band(kind, y, p, patients, positive=1, seed=0, resamples=200)
        middle = np.interp(band.at[places], truth.x, truth.y)
        inside += (band.low[places] <= middle) & (middle <= band.high[places])
        assert band.area_ci[0] <= band.area <= band.area_ci[1]
    assert np.all(inside / draws >= 0.87)
    assert np.mean(inside / draws) <= 0.995  # it is not everything


def test_a_band_knows_that_slides_of_one_patient_are_alike():
    y, p, patients = drawn(400, each=4)
    grouped = curve_band("roc", y, p, patients, positive=1, seed=0, resamples=200)
    alone = curve_band("roc", y, p, [str(k) for k in range(400)], positive=1, seed=0, resamples=200)
    np.testing.assert_allclose(grouped.y, alone.y)
    wide, narrow = (np.mean(band.high - band.low) for band in (grouped, alone))
    assert 1.6 < wide / narrow < 2.4  # as four times as many patients would


def test_weights_are_whole_patients():
    patients = ["a", "a", "b", "c", "c", "c"]
    weights = np.concatenate(list(patient_weights(patients, 0, 300)))
    assert weights.shape == (300, 6)
    assert np.all(weights[:, 0] == weights[:, 1])
    assert np.all(weights[:, 3] == weights[:, 5])
    assert np.all(weights[:, [0, 2, 3]].sum(1) == 3)


def test_one_class_has_no_curve_and_few_patients_no_band():
    y, p, patients = drawn(50)
    assert np.isnan(curve_band("roc", np.zeros(50, int), p, patients, positive=1, seed=0).area)
    y = np.r_[1, np.zeros(49, int)]
    rare = curve_band("roc", y, p, ["one"] + ["other"] * 49, positive=1, seed=0, resamples=200)
    assert np.isfinite(rare.area)
    lone = curve_band("roc", y, p, [f"p{k % 2}" for k in range(50)], positive=1, seed=0, resamples=200)
    assert np.isfinite(lone.area)
    none = curve_band("roc", y, p, ["one"] * 50, positive=1, seed=0, resamples=200)
    assert none.area_ci[0] == none.area_ci[1] == pytest.approx(none.area)  # nothing to resample


def test_learning_curves_gather_repetitions():
    points = [
        FewShot("b", 8, (0.7,)),
        FewShot("a", 16, (0.8, 0.9)),
        FewShot("a", 4, (0.6, 0.7, 0.8, NAN)),
        FewShot("c", 4, (NAN,)),
    ]
    b, a = learning_curves(points)
    assert (b.label, a.label) == ("b", "a")
    assert a.n_train.tolist() == [4, 16]
    np.testing.assert_allclose(a.mean, [0.7, 0.85])
    np.testing.assert_allclose(a.sd, [0.1, np.std([0.8, 0.9], ddof=1)])
    assert a.repetitions.tolist() == [3, 2]
    assert np.isnan(b.sd[0])


def test_the_number_at_risk_stands_below_its_time():
    curve = kaplan_meier(np.arange(1.0, 11.0), np.ones(10, bool))
    words = texts(survival_panel("t", [Group("all", curve, Style(MUTED))], unit="months"))
    row = words[words.index("all") + 1 :]
    assert row[:6] == ["10", "9", "7", "5", "3", "1"]  # at 0, 2, 4, 6, 8 and 10


def test_a_curve_of_many_predictions_stays_small():
    y, p, patients = drawn(60_000)
    band = curve_band("roc", y, p, patients, positive=1, seed=0, resamples=5)
    assert len(band.x) <= 3000
    assert (band.x[0], band.y[-1]) == (0, 1)

"""Calibration against scikit-learn, by hand, and on probabilities that are right."""

import logging
import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.calibration import calibration, expected_calibration_error, reliability


def right(seed, n=1000):
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 1, n)
    return (rng.random(n) < p).astype(int), p


@pytest.mark.parametrize(("by", "strategy"), [("quantile", "quantile"), ("width", "uniform")])
def test_the_curve_is_that_of_scikit_learn(by, strategy):
    y, p = right(0)
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy=strategy)
    found = reliability(y, p, by=by)
    np.testing.assert_allclose(found.observed, observed, atol=0.011)  # a sample on an edge may lie on either side
    np.testing.assert_allclose(found.predicted, predicted, atol=0.011)
    assert found.n.sum() == 1000


def test_bins_by_hand():
    found = reliability([0, 1, 1, 1], [0.1, 0.2, 0.9, 0.9], bins=2, by="width")
    np.testing.assert_allclose(found.predicted, [0.15, 0.9])
    np.testing.assert_allclose(found.observed, [0.5, 1.0])
    np.testing.assert_allclose(found.n, [2, 2])
    assert expected_calibration_error([0, 1, 1, 1], [0.1, 0.2, 0.9, 0.9], bins=2) == pytest.approx(0.35 / 2 + 0.1 / 2)


def test_ece_of_several_classes_is_of_the_confidence():
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.6, 0.2]])
    assert expected_calibration_error([0, 2], p) == pytest.approx(0.1)


def test_equal_probabilities_are_one_bin():
    found = reliability([0, 1, 1, 0], [0.5] * 4)
    assert (found.n.tolist(), found.observed.tolist()) == ([4], [0.5])
    assert found.low[0] < 0.5 < found.high[0]


def test_a_band_over_patients_knows_that_copies_add_nothing():
    y, p = right(1, 200)
    patients = [f"p{i}" for i in range(200)]
    once = reliability(y, p, bins=4, patients=patients)
    copies = reliability(np.repeat(y, 5), np.repeat(p, 5), bins=4, patients=np.repeat(patients, 5).tolist())
    wilson = reliability(np.repeat(y, 5), np.repeat(p, 5), bins=4)
    width = [(found.high - found.low).mean() for found in (once, copies, wilson)]
    assert width[1] == pytest.approx(width[0], rel=0.05)
    assert width[2] < 0.6 * width[1]


def test_few_distinct_probabilities_each_have_a_bin():
    y, p = right(4, 20_000)
    patients = [str(k) for k in range(20_000)]
    found = reliability(y, p, patients=patients)
    assert len(found.predicted) == 10
    assert np.mean((found.low <= found.predicted) & (found.predicted <= found.high)) >= 0.8
    assert expected_calibration_error(y, p) < 0.015
    sure = np.where(p > 0.5, 0.99, 0.01)
    found = reliability(y, sure, patients=patients)
    np.testing.assert_allclose(found.predicted, [0.01, 0.99])
    np.testing.assert_allclose(found.observed, [0.25, 0.75], atol=0.02)
    assert expected_calibration_error(y, sure) == pytest.approx(0.24, abs=0.02)
    lopsided = reliability([0, 0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1, 0.9])
    assert (lopsided.n.tolist(), lopsided.observed.tolist()) == ([4, 1], [0, 1])


def test_a_bin_in_which_resamples_do_not_vary_counts_patients():
    found = reliability([1] * 8, [0.6] * 8, patients=["a", "b"] * 4)
    z = 1.959963984540054  # Wilson's with two patients, not eight slides
    assert (found.n.tolist(), found.observed.tolist()) == ([8], [1.0])
    assert (found.low[0], found.high[0]) == (pytest.approx(1 / (1 + z * z / 2)), pytest.approx(1))


def test_wilson_by_hand():
    """8 of 10: the interval of the textbooks is .490 to .943."""
    found = reliability([1] * 8 + [0] * 2, [0.5] * 10)
    assert (found.low[0], found.high[0]) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))


def test_the_slope_is_that_of_a_logistic_regression():
    y, p = right(2)
    p = 1 / (1 + np.exp(-(2 * np.log(p / (1 - p)) + 0.5)))
    logit = np.log(p / (1 - p))
    expected = LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000).fit(logit[:, None], y)
    assert calibration(y, p).slope == pytest.approx(expected.coef_[0, 0], rel=1e-4)
    assert calibration(y, p).slope == pytest.approx(0.5, abs=0.06)


def test_right_probabilities_are_found_right_as_often_as_it_says():
    hits = np.zeros(2)
    for seed in range(300):
        found = calibration(*right(seed, 200))
        hits += [found.slope_ci[0] <= 1 <= found.slope_ci[1], found.intercept_ci[0] <= 0 <= found.intercept_ci[1]]
    assert (hits >= 275).all()
    assert (hits <= 297).all()


def test_copies_of_a_patients_slides_make_a_slope_no_surer():
    y, p = right(5, 300)
    patients = [f"p{i}" for i in range(300)]
    once = calibration(y, p, patients=patients)
    copies = calibration(np.tile(y, 4), np.tile(p, 4), patients=patients * 4)
    np.testing.assert_allclose(copies.slope_ci, once.slope_ci, rtol=1e-6)
    np.testing.assert_allclose(copies.intercept_ci, once.intercept_ci, rtol=1e-6)
    alone = calibration(y, p)
    assert np.ptp(once.slope_ci) == pytest.approx(np.ptp(alone.slope_ci), rel=0.15)
    assert np.ptp(calibration(np.tile(y, 4), np.tile(p, 4)).slope_ci) == pytest.approx(np.ptp(alone.slope_ci) / 2)


def test_slopes_of_patients_slides_hold_the_truth_as_often_as_they_say():
    """Four slides of a patient share an outcome and nearly a probability."""
    hits = np.zeros(2)
    for seed in range(300):
        y, p = right(seed, 150)
        patients = np.repeat(np.arange(150), 4).astype(str).tolist()
        found = calibration(np.repeat(y, 4), np.repeat(p, 4), patients=patients)
        hits += [found.slope_ci[0] <= 1 <= found.slope_ci[1], found.intercept_ci[0] <= 0 <= found.intercept_ci[1]]
    assert (hits >= 270).all()
    assert (hits <= 297).all()


def test_said_too_seldom():
    y, p = right(3, 2000)
    shifted = 1 / (1 + np.exp(-(np.log(p / (1 - p)) - 1)))
    found = calibration(y, shifted)
    assert found.intercept_ci[0] < 1 < found.intercept_ci[1]


def test_separated_classes_have_no_slope(caplog):
    with caplog.at_level(logging.WARNING, "gigatome"):
        found = calibration([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert math.isnan(found.slope)
    assert "no calibration slope" in caplog.text
    assert math.isfinite(calibration([0, 1, 1, 0], [0.0, 1.0, 0.6, 0.7]).intercept)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reliability([0, 1], [0.5, 1.5]), EvaluationError, "from 0 to 1"),
        (lambda: reliability([0, 1], [0.5, math.nan]), EvaluationError, "from 0 to 1"),
        (lambda: reliability([0, 2], [0.5, 0.5]), EvaluationError, "outcomes are 0 or 1"),
        (lambda: reliability([0, 1], [0.5]), ValueError, "need outcomes"),
        (lambda: reliability([], []), EvaluationError, "needs samples"),
        (lambda: reliability([0, 1], [0.5, 0.5], bins=0), EvaluationError, "at least one bin"),
        (lambda: calibration([1, 1], [0.5, 0.6]), EvaluationError, "with and without"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

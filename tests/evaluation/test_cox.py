"""Cox's regression against plain loops, an optimiser and scikit-survival."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.cox import Cox, FittedCox, fit_cox, hazard_ratio, log_likelihood
from gigatome.evaluation.survival import c_index


def cohort(seed, n=120, dim=6, ties=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) * np.arange(1, dim + 1) + 3
    risk = (x[:, 0] - 3) - 0.3 * (x[:, 1] - 3)
    life, lost = rng.exponential(np.exp(-risk)), rng.exponential(1.5, n)
    time = np.minimum(life, lost)
    return x, np.ceil(time * 6) / 6 if ties else time, life <= lost


def plain_likelihood(time, event, risk):
    total = 0.0
    for t in np.unique(time[event]):
        dead, left = (time == t) & event, time >= t
        total += risk[dead].sum()
        for k in range(dead.sum()):
            total -= math.log(np.exp(risk[left]).sum() - k / dead.sum() * np.exp(risk[dead]).sum())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [True, False])
def test_the_likelihood_is_that_of_a_loop(seed, ties):
    x, time, event = cohort(seed, 40, ties=ties)
    risk = x[:, 0] * 0.7
    assert log_likelihood(time, event, risk) == pytest.approx(plain_likelihood(time, event, risk), abs=1e-10)


def test_efron_by_hand():
    """Two of three die at once: 1/3 · 1/2 · … with shares 0 and 1/2 of the tied."""
    found = log_likelihood([1, 1, 2], [1, 1, 0], [0, 0, 0])
    assert found == pytest.approx(-math.log(3) - math.log(3 - 0.5 * 2))


@pytest.mark.parametrize(("n", "dim"), [(120, 6), (40, 60)])
def test_the_optimum_is_that_of_an_optimiser(n, dim):
    """With fewer features than samples, and with more."""
    x, time, event = cohort(1, n, dim)
    z = (x - x.mean(0)) / x.std(0)

    def loss(beta):
        return dim / 2 * 0.5 * beta @ beta - plain_likelihood(time, event, z @ beta)

    best = minimize(loss, np.zeros(dim), tol=1e-10).x
    fitted = fit_cox(Cox(penalty=0.5), x, time, event)
    np.testing.assert_allclose(fitted.coefficients * x.std(0), best, atol=2e-4)
    np.testing.assert_allclose(fitted.predict(x), z @ best, atol=1e-3)
    assert fitted.median == pytest.approx(np.median(fitted.predict(x)))


@pytest.mark.parametrize("ties", [True, False])
def test_coefficients_are_those_of_scikit_survival(ties):
    linear = pytest.importorskip("sksurv.linear_model")
    util = pytest.importorskip("sksurv.util")
    x, time, event = cohort(2, ties=ties)
    theirs = linear.CoxPHSurvivalAnalysis(ties="efron", tol=1e-12).fit(x, util.Surv.from_arrays(event, time))
    ours = fit_cox(Cox(penalty=1e-9, scale=False), x, time, event)
    np.testing.assert_allclose(ours.coefficients, theirs.coef_, rtol=1e-4, atol=1e-6)


def test_a_hazard_ratio_is_found():
    x, time, event = cohort(3, 4000, 2, ties=False)
    found = fit_cox(Cox(penalty=1e-6, scale=False), x, time, event).coefficients
    np.testing.assert_allclose(found, [1, -0.3], atol=0.08)


def test_many_features_still_predict():
    x, time, event = cohort(4, 300, 200)
    x_test, time_test, event_test = cohort(5, 300, 200)
    fitted = fit_cox(Cox(), x, time, event)
    assert c_index(time_test, event_test, fitted.predict(x_test)) > 0.6


def test_order_and_constant_features_change_nothing():
    x, time, event = cohort(6)
    order = np.random.default_rng(0).permutation(len(x))
    one = fit_cox(Cox(), x, time, event)
    two = fit_cox(Cox(), x[order], time[order], event[order])
    np.testing.assert_allclose(two.coefficients, one.coefficients, atol=1e-9)
    padded = fit_cox(Cox(penalty=6 / 7), np.c_[x, np.full(len(x), 0.1)], time, event)
    np.testing.assert_allclose(padded.coefficients, [*one.coefficients, 0], atol=1e-8)


def test_perfect_order_stays_finite():
    x = np.arange(30.0)[:, None]
    fitted = fit_cox(Cox(penalty=1e-3), x, 30 - x[:, 0], np.ones(30))
    assert np.isfinite(fitted.coefficients).all()
    assert c_index(30 - x[:, 0], np.ones(30), fitted.predict(x)) == 1.0


def test_saved_and_restored():
    x, time, event = cohort(7)
    fitted = fit_cox(Cox(penalty=2.0), x, time, event)
    again = FittedCox.from_tensors(json.loads(json.dumps(fitted.saved())), fitted.tensors())
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    assert (again.options, again.median) == (fitted.options, fitted.median)


@pytest.mark.parametrize("options", [{"kind": "linear"}, {"kind": "cox", "C": 1.0}, {}])
def test_options_of_something_else(options):
    x, time, event = cohort(8)
    tensors = fit_cox(Cox(), x, time, event).tensors()
    with pytest.raises(EvaluationError, match="these are not the options"):
        FittedCox.from_tensors(options, tensors)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, t, e: fit_cox(Cox(), x, t, np.zeros(len(t))), EvaluationError, "all training samples are censored"),
        (lambda x, t, e: fit_cox(Cox(), x * np.nan, t, e), EvaluationError, "embeddings are not finite"),
        (lambda x, t, e: fit_cox(Cox(), x, t * np.inf, e), EvaluationError, "not finite"),
        (lambda x, t, e: fit_cox(Cox(), x[:5], t, e), ValueError, "need embeddings"),
        (lambda x, t, e: fit_cox(Cox(), x, t, e).predict(x[:, :2]), EvaluationError, r"takes embeddings \[M, 6\]"),
        (lambda x, t, e: Cox(penalty=0), EvaluationError, "penalty > 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*cohort(9))


def test_a_hazard_ratio_by_hand():
    """x = 0, 1, 0 die in turn: the likelihood r / ((2 + r)(1 + r)) is highest at r² = 2."""
    found = hazard_ratio([1, 2, 3], [1, 1, 1], [0, 1, 0])
    assert found.value == pytest.approx(2**0.5, rel=1e-8)
    p, q = found.value / (2 + found.value), found.value / (1 + found.value)
    deviation = (p * (1 - p) + q * (1 - q)) ** -0.5
    np.testing.assert_allclose(np.log(np.divide(found.ci, found.value)), [-1.959964 * deviation, 1.959964 * deviation])


@pytest.mark.parametrize("seed", range(6))
def test_a_hazard_ratio_is_that_of_scikit_survival(seed):
    linear, util = pytest.importorskip("sksurv.linear_model"), pytest.importorskip("sksurv.util")
    rng = np.random.default_rng(seed)
    x = rng.normal(size=80) * 10.0 ** (seed - 3) if seed % 2 else (rng.random(80) < 0.4).astype(float)
    time = np.ceil(rng.exponential(np.exp(-x / x.std()), 80) * (4 if seed < 3 else 1000))  # many ties, or few
    event = rng.random(80) < 0.7
    theirs = linear.CoxPHSurvivalAnalysis(ties="efron", tol=1e-12).fit(
        x[:, None] / x.std(), util.Surv.from_arrays(event, time)
    )
    beta, d = theirs.coef_[0] / x.std(), 1e-3 / x.std()
    found = hazard_ratio(time, event, x)
    assert np.log(found.value) == pytest.approx(beta, rel=1e-6)
    around = [log_likelihood(time, event, b * x) for b in (beta - d, beta, beta + d)]
    deviation = (-(around[0] - 2 * around[1] + around[2]) / d**2) ** -0.5
    assert np.log(found.ci[1] / found.value) == pytest.approx(1.959964 * deviation, rel=1e-4)


def test_slides_of_a_patient_do_not_make_a_hazard_ratio_surer():
    x, time, event = cohort(4, 150, ties=False)
    risk = x[:, 0] - 3
    names = [str(i) for i in range(150)]
    once = hazard_ratio(time, event, risk > 0, clusters=names)
    plain = hazard_ratio(time, event, risk > 0)
    assert np.ptp(np.log(once.ci)) == pytest.approx(np.ptp(np.log(plain.ci)), rel=0.15)
    many = [np.tile(value, 3) for value in (time + 1e-9 * np.arange(150), event, risk > 0)]
    copies, wrong = hazard_ratio(*many, clusters=names * 3), hazard_ratio(*many)
    assert copies.value == pytest.approx(once.value, rel=0.02)
    assert np.ptp(np.log(copies.ci)) == pytest.approx(np.ptp(np.log(once.ci)), rel=0.05)
    assert np.ptp(np.log(wrong.ci)) < 0.65 * np.ptp(np.log(once.ci))


def test_hazard_ratios_without_an_end():
    assert hazard_ratio([1, 2, 3, 4], [1, 1, 0, 0], [1, 1, 0, 0]).value == math.inf
    assert hazard_ratio([1, 2, 3, 4], [1, 1, 0, 0], [0, 0, 1, 1]).value == 0
    for nothing in (
        hazard_ratio([1, 2, 3], [1, 1, 0], [1, 1, 1]),
        hazard_ratio([1, 2, 3, 4], [1, 1, 1, 1], [0, 0, 1, 1], strata=[0, 0, 1, 1]),
        hazard_ratio([1, 2], [0, 0], [0, 1]),
    ):
        assert np.isnan([nothing.value, *nothing.ci]).all()


def test_bad_hazard_ratios():
    with pytest.raises(EvaluationError, match="not finite"):
        hazard_ratio([1, 2], [1, 1], [0, math.nan])
    with pytest.raises(ValueError, match="need a cluster"):
        hazard_ratio([1, 2], [1, 1], [0, 1], clusters=["a"])

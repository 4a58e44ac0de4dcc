"""Concordance, curves and tests of survival: by hand, against plain loops, and against scikit-survival where it is."""

import dataclasses
import math

import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.cox import log_likelihood
from gigatome.evaluation.survival import (
    auroc_at,
    brier_at,
    c_index,
    censoring_survival,
    integrated_brier,
    kaplan_meier,
    logrank,
    score_folds,
    score_survival,
    uno_c_index,
    uno_weights,
    weighted_auroc_at,
    weighted_c_index,
)
from gigatome.evaluation.survival_result import SurvivalPredictions


def cohort(seed, n=80, *, ties=True, effect=1.0):
    """Times, events and risks, with ties of each kind."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    life = rng.exponential(np.exp(-effect * risk))
    lost = rng.exponential(1.5, n)
    time = np.minimum(life, lost)
    if ties:
        time, risk = np.ceil(time * 8) / 8, risk.round(1)
    return time, life <= lost, risk


def plain_c_index(time, event, risk, weight, strata):
    right = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            comparable = time[j] > time[i] or (time[j] == time[i] and not event[j])
            if event[i] and strata[i] == strata[j] and comparable:
                gap = risk[i] - risk[j]
                pairs += weight[i] * weight[j]
                right += weight[i] * weight[j] * (0.5 if abs(gap) <= 1e-8 else gap > 0)
    return right / pairs


def surv(time, event):
    return pytest.importorskip("sksurv.util").Surv.from_arrays(event, time)


def test_c_index_by_hand():
    assert c_index([1, 2, 3], [1, 1, 1], [3, 2, 1]) == 1.0
    assert c_index([1, 2, 3], [1, 1, 1], [1, 2, 3]) == 0.0
    assert c_index([1, 2, 3], [1, 1, 1], [0, 0, 0]) == 0.5
    assert c_index([1, 2, 3], [0, 1, 1], [9, 2, 1]) == 1.0  # one lost first is compared with nobody
    assert c_index([2, 2], [1, 0], [1, 0]) == 1.0  # an event and one lost at the same time
    assert math.isnan(c_index([2, 2], [1, 1], [1, 0]))  # two events at the same time
    assert c_index([1, 2, 2, 4], [1, 1, 0, 1], [5, 1, 2, 9]) == pytest.approx(3 / 5 - 1 / 5)
    assert c_index([1, 2], [1, 1], [1, 1 + 1e-9]) == 0.5


def test_nothing_to_compare_is_no_number():
    assert math.isnan(c_index([1, 2], [0, 0], [1, 2]))
    assert math.isnan(c_index([1, 2], [1, 1], [1, 2], strata=[0, 1]))


@pytest.mark.parametrize("seed", range(5))
def test_weighted_and_stratified_c_index_is_that_of_a_loop(seed, monkeypatch):
    monkeypatch.setattr("gigatome.evaluation.survival._CELLS_AT_ONCE", 200)  # several chunks
    time, event, risk = cohort(seed, 40)
    rng = np.random.default_rng(seed)
    weights, strata = rng.integers(0, 4, (3, 40)).astype(float), rng.integers(0, 3, 40)
    found = weighted_c_index(time, event, risk, weights, strata=strata)
    expected = [plain_c_index(time, event, risk, row, strata) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_whole_weights_are_copies():
    time, event, risk = cohort(3, 50)
    weights = np.random.default_rng(0).integers(0, 3, 50)
    copied = c_index(*(np.repeat(value, weights) for value in (time, event, risk)))
    assert weighted_c_index(time, event, risk, weights[None].astype(float))[0] == pytest.approx(copied, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [True, False])
def test_c_indices_are_those_of_scikit_survival(seed, ties):
    metrics = pytest.importorskip("sksurv.metrics")
    time, event, risk = cohort(seed, ties=ties)
    assert c_index(time, event, risk) == pytest.approx(
        metrics.concordance_index_censored(event, time, risk)[0], abs=1e-12
    )
    train_time, train_event, _ = cohort(seed + 100, 120, ties=ties)
    tau = 0.8 * min(time.max(), train_time.max())
    expected = metrics.concordance_index_ipcw(surv(train_time, train_event), surv(time, event), risk, tau=tau)[0]
    assert uno_c_index((train_time, train_event), time, event, risk, tau=tau) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_auroc_at_times_is_that_of_scikit_survival(seed):
    metrics = pytest.importorskip("sksurv.metrics")
    train = cohort(seed + 50, 150)[:2]
    time, event, risk = cohort(seed)
    inside = time < 0.8 * train[0].max()
    time, event, risk = time[inside], event[inside], risk[inside]
    times = np.quantile(time, [0.2, 0.5, 0.8])
    times = times[times < time.max()]
    expected = metrics.cumulative_dynamic_auc(surv(*train), surv(time, event), risk, times)[0]
    np.testing.assert_allclose(auroc_at(train, time, event, risk, times), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_brier_is_that_of_scikit_survival(seed):
    metrics = pytest.importorskip("sksurv.metrics")
    train = cohort(seed + 50, 150)[:2]
    time, event, _ = cohort(seed)
    inside = time < 0.8 * train[0].max()
    time, event = time[inside], event[inside]
    times = np.linspace(0.2, 0.9, 5) * time.max()
    survival = np.sort(np.random.default_rng(seed).random((len(time), 5)), axis=1)[:, ::-1]
    expected = metrics.brier_score(surv(*train), surv(time, event), survival, times)[1]
    np.testing.assert_allclose(brier_at(train, time, event, survival, times), expected, atol=1e-12)
    whole = metrics.integrated_brier_score(surv(*train), surv(time, event), survival, times)
    assert integrated_brier(train, time, event, survival, times) == pytest.approx(whole, abs=1e-12)


def test_auroc_at_by_hand():
    time, event = np.array([1.0, 2, 3, 4]), np.array([True, True, False, True])
    everyone = (time, np.ones(4, bool))  # nobody is lost: no weights
    found = auroc_at(everyone, time, event, [4, 1, 2, 3], [0.5, 1, 2, 4])
    np.testing.assert_allclose(found, [np.nan, 1.0, 0.5, np.nan])


def test_auroc_at_stays_within_strata_and_weighs():
    time, event, risk = cohort(1, 60)
    strata = np.arange(60) % 2
    inverse = uno_weights((time, event), time, event)
    found = weighted_auroc_at(time, event, risk + 100 * strata, np.ones((1, 60)), [0.5], inverse, strata=strata)
    same = weighted_auroc_at(time, event, risk, np.ones((1, 60)), [0.5], inverse, strata=strata)
    np.testing.assert_allclose(found, same, atol=1e-12)
    mixed = weighted_auroc_at(time, event, risk + 100 * strata, np.ones((1, 60)), [0.5], inverse)
    assert abs(mixed[0, 0] - same[0, 0]) > 0.05
    weights = np.random.default_rng(0).integers(0, 3, 60)
    copied = (np.repeat(value, weights) for value in (time, event, risk))
    t, e, r = copied
    expected = weighted_auroc_at(t, e, r, np.ones((1, len(t))), [0.5], np.repeat(inverse, weights))
    ours = weighted_auroc_at(time, event, risk, weights[None].astype(float), [0.5], inverse)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_censoring_survival_by_hand():
    """Events leave before those lost at the same time."""
    train = (np.array([1.0, 2, 2, 3]), np.array([False, True, False, True]))
    np.testing.assert_allclose(censoring_survival(train, [0.5, 1, 1.5, 2, 9]), [1, 0.75, 0.75, 0.375, 0.375])
    weights = uno_weights(train, np.array([1.0, 2, 3, 9]), np.array([True, False, True, True]))
    np.testing.assert_allclose(weights, [1 / 0.75, 0, 1 / 0.375, 0])  # 9 is beyond what the training part saw
    assert uno_weights(train, np.array([3.0]), np.array([True]), tau=3.0) == [0.0]


def test_uno_does_not_depend_on_the_censoring():
    """Heavier censoring moves Harrell's c-index, and Uno's less."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=4000)
    life = rng.weibull(0.7 + 1.5 * (risk > 0)) * np.exp(-0.5 * risk)  # hazards that cross
    whole = c_index(life, np.ones(4000), risk)
    lost = rng.exponential(0.7, 4000)
    time, event = np.minimum(life, lost), life <= lost
    harrell, uno = c_index(time, event, risk), uno_c_index((time, event), time, event, risk)
    assert abs(harrell - whole) > 0.03
    assert abs(uno - whole) < 0.5 * abs(harrell - whole)


def test_kaplan_meier_by_hand():
    curve = kaplan_meier([1, 2, 2, 3, 4], [1, 1, 0, 0, 1])
    np.testing.assert_allclose(curve.times, [1, 2, 3, 4])
    np.testing.assert_allclose(curve.survival, [0.8, 0.6, 0.6, 0.0])
    np.testing.assert_allclose(curve.at_risk, [5, 4, 2, 1])
    np.testing.assert_allclose(curve.events, [1, 1, 0, 1])
    np.testing.assert_allclose(curve.censored, [0, 1, 1, 0])
    np.testing.assert_allclose(curve.at([0, 1, 1.5, 2.5, 9]), [1, 0.8, 0.8, 0.6, 0])
    np.testing.assert_allclose(curve.at_risk_at([0, 1, 2, 2.5, 9]), [5, 5, 4, 2, 0])
    assert curve.median == 4
    assert kaplan_meier([1, 2], [1, 0]).median == 1
    assert math.isinf(kaplan_meier([1, 2, 3], [1, 0, 0]).median)


def test_kaplan_meier_intervals_are_those_of_scikit_survival():
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    time, event, _ = cohort(2)
    times, survival, (low, high) = nonparametric.kaplan_meier_estimator(event, time, conf_type="log-log")
    curve = kaplan_meier(time, event)
    alive = survival > 0
    np.testing.assert_allclose(curve.times, times)
    np.testing.assert_allclose(curve.survival, survival, atol=1e-12)
    np.testing.assert_allclose(curve.low[alive], low[alive], atol=1e-9)
    np.testing.assert_allclose(curve.high[alive], high[alive], atol=1e-9)
    assert np.isnan(curve.low[~alive]).all()


def test_a_curve_of_weights_is_one_of_copies():
    time, event, _ = cohort(4, 30)
    weights = np.random.default_rng(0).integers(0, 3, 30)
    found = kaplan_meier(time, event, weights)
    expected = kaplan_meier(np.repeat(time, weights), np.repeat(event, weights))
    for name in ("times", "survival", "low", "high", "at_risk"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12)


def test_greenwood_intervals_cover():
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        life, lost = rng.exponential(1, 60), rng.exponential(2, 60)
        curve = kaplan_meier(np.minimum(life, lost), life <= lost)
        k = np.searchsorted(curve.times, 0.7, side="right") - 1
        covered += curve.low[k] <= math.exp(-0.7) <= curve.high[k]
    assert 275 <= covered <= 296


@pytest.mark.parametrize("groups", [2, 4])
def test_logrank_is_that_of_scikit_survival(groups):
    compare = pytest.importorskip("sksurv.compare")
    time, event, risk = cohort(5, 120)
    group = np.digitize(risk, np.quantile(risk, np.linspace(0, 1, groups + 1)[1:-1]))
    statistic, p = compare.compare_survival(surv(time, event), group)
    found = logrank(time, event, group)
    assert (found.statistic, found.df) == (pytest.approx(statistic, rel=1e-9), groups - 1)
    assert found.p == pytest.approx(p, rel=1e-6)
    assert sum(found.observed) == pytest.approx(sum(found.expected))


def test_logrank_by_hand():
    """Times 1 (group a), 2 (b), 3 (a, lost), 4 (b): expected in a 1/2 + 1/3 + 0, variance 1/4 + 2/9."""
    found = logrank([1, 2, 3, 4], [1, 1, 0, 1], ["a", "b", "a", "b"])
    assert found.expected[0] == pytest.approx(5 / 6)
    assert found.statistic == pytest.approx((1 - 5 / 6) ** 2 / (1 / 4 + 2 / 9))


def test_a_stratified_logrank_sums_over_strata():
    time, event, risk = cohort(6, 100)
    group, strata = risk > 0, np.arange(100) % 2
    parts = [logrank(time[strata == k], event[strata == k], group[strata == k]) for k in (0, 1)]
    found = logrank(time, event, group, strata=strata)
    np.testing.assert_allclose(found.expected, np.sum([part.expected for part in parts], axis=0))
    same = logrank(np.r_[time, time], np.r_[event, event], np.r_[group, group], strata=np.repeat([0, 1], 100))
    assert same.statistic == pytest.approx(2 * logrank(time, event, group).statistic)


def test_logrank_of_nothing_is_right_as_often_as_it_says():
    small = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        life, lost = rng.exponential(1, 50), rng.exponential(2, 50)
        small += logrank(np.minimum(life, lost), life <= lost, np.arange(50) % 2).p < 0.05
    assert 8 <= small <= 34  # 20 expected


def predictions(seed, n=120, folds=4, effect=1.0):
    time, event, risk = cohort(seed, n, effect=effect)
    fold = np.arange(n) % folds
    names = tuple(f"p{i}" for i in range(n))
    scaled = risk * 10.0**fold + 1000 * fold  # folds' models differ in scale
    high = np.array([r > np.median(risk) for r in risk])
    empty = np.zeros((n, 0))
    return SurvivalPredictions(names, names, fold, time, event, scaled, high, empty, np.zeros(0)), risk


def train_parts(rows, folds=4):
    return [(rows.time[rows.folds != k], rows.event[rows.folds != k]) for k in range(folds)]


def test_scores_compare_within_folds():
    rows, risk = predictions(7)
    scores = score_survival(rows, train_parts(rows), seed=0, resamples=300)
    assert scores.c_index == pytest.approx(c_index(rows.time, rows.event, risk, strata=rows.folds))
    assert scores.c_index_ci[0] < scores.c_index < scores.c_index_ci[1]
    assert scores.uno_ci[0] < scores.uno < scores.uno_ci[1]
    assert 0.6 < scores.c_index < 0.9
    assert scores.logrank_p < 0.001
    assert (scores.n, scores.events) == (120, int(rows.event.sum()))
    assert len(scores.times) == len(scores.auroc_at) == 3
    assert all(0.55 < value <= 1 for value in scores.auroc_at)
    folds = score_folds(rows, [90] * 4)
    first = rows.folds == 0
    assert folds[0].c_index == pytest.approx(c_index(rows.time[first], rows.event[first], risk[first]))
    assert [fold.n_test for fold in folds] == [30] * 4
    assert sum(fold.events for fold in folds) == scores.events


def test_scores_at_times_that_were_asked_for():
    rows, _ = predictions(8)
    assert score_survival(rows, train_parts(rows), times=[0.5], seed=0, resamples=20).times == (0.5,)


def test_all_censored_is_said():
    rows, _ = predictions(9)
    nobody = SurvivalPredictions(
        **{**{name: getattr(rows, name) for name in rows.__dataclass_fields__}, "event": np.zeros(120, bool)}
    )
    with pytest.raises(EvaluationError, match="all of the tested are censored"):
        score_survival(nobody, train_parts(rows), seed=0)


def test_a_wider_interval_of_every_score():
    rows, _ = predictions(7)
    plain, wide = (
        score_survival(rows, train_parts(rows), seed=0, resamples=300, inflation=inflation) for inflation in (1.0, 1.96)
    )
    for name in ("c_index", "uno"):
        assert getattr(plain, name) == getattr(wide, name)
        ends = [np.subtract(getattr(scores, f"{name}_ci"), getattr(plain, name)) for scores in (plain, wide)]
        np.testing.assert_allclose(ends[1], 1.4 * ends[0])
    ends = [np.log(np.divide(scores.hazard_ratio_ci, plain.hazard_ratio)) for scores in (plain, wide)]
    np.testing.assert_allclose(ends[1], 1.4 * ends[0])


def test_the_hazard_ratio_of_the_groups_is_within_folds():
    rows, _ = predictions(7)
    scores = score_survival(rows, train_parts(rows), seed=0, resamples=20)
    model = coefficient_of_strata(rows.time, rows.event, rows.high.astype(float), rows.folds)
    assert np.log(scores.hazard_ratio) == pytest.approx(model, abs=1e-3)
    assert 1 < scores.hazard_ratio_ci[0] < scores.hazard_ratio < scores.hazard_ratio_ci[1]
    alike = dataclasses.replace(rows, high=np.ones(len(rows), bool))
    none = score_survival(alike, train_parts(rows), seed=0, resamples=20)
    assert np.isnan([none.hazard_ratio, *none.hazard_ratio_ci]).all()


def coefficient_of_strata(time, event, x, strata):
    """Cox's coefficient by search, of strata that :func:`log_likelihood` knows one by one."""
    tried = np.linspace(-4, 4, 801)
    groups = [strata == k for k in np.unique(strata)]
    value = [sum(log_likelihood(time[g], event[g], b * x[g]) for g in groups) for b in tried]
    k = int(np.argmax(value))
    a, b, c = value[k - 1 : k + 2]
    return tried[k] + 0.5 * (tried[1] - tried[0]) * (a - c) / (a - 2 * b + c)


@pytest.mark.slow
def test_intervals_of_the_c_index_cover():
    """Patients of two slides each: the interval over patients holds the true c-index 95 % of the time, or nearly."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=20_000)
    life, lost = rng.exponential(np.exp(-risk)), rng.exponential(1.5, 20_000)
    rows = np.arange(6000)
    truth = c_index(np.minimum(life, lost)[rows], (life <= lost)[rows], risk[rows])
    covered = 0
    for seed in range(200):
        time, event, r = cohort(seed + 1000, 80, ties=False)
        names = tuple(str(i) for i in range(80))
        twice = SurvivalPredictions(
            names * 2, names * 2, np.zeros(160, int), np.tile(time, 2), np.tile(event, 2), np.tile(r, 2),
            np.tile(r > 0, 2), np.zeros((160, 0)), np.zeros(0),
        )  # fmt: skip
        low, high = score_survival(twice, [(time, event)], seed=seed, resamples=500).c_index_ci
        covered += low <= truth <= high
    assert 178 <= covered <= 199


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: c_index([1, math.nan], [1, 1], [0, 1]), EvaluationError, "not finite"),
        (lambda: c_index([1, 2], [1, 1], [0, math.inf]), EvaluationError, "not finite"),
        (lambda: c_index([1, 2], [1, 2], [0, 1]), EvaluationError, "an event is 0 or 1"),
        (lambda: c_index([1, 2], [1], [0, 1]), ValueError, "need times, events"),
        (lambda: c_index([1, 2], [1, 1], [0, 1], strata=[0]), ValueError, "need a stratum"),
        (lambda: logrank([1, 2], [1, 1], ["a", "a"]), EvaluationError, "at least two groups"),
        (lambda: logrank([1, 2], [1, 1], ["a"]), ValueError, "need a group"),
        (lambda: kaplan_meier([], []), EvaluationError, "at least one patient"),
        (lambda: integrated_brier(([1.0], [True]), [1], [1], [[0.5]], [1]), EvaluationError, "at least two times"),
        (lambda: brier_at(([1.0], [True]), [1], [1], [0.5], [1]), ValueError, "need survival"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Tests of differences: by hand, against plain loops, and right as often as they say when nothing differs."""

import math

import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation import metrics
from gigatome.evaluation.comparison import (
    Comparison,
    adjusted,
    compare_results,
    corrected_t,
    holm,
    permutation_test,
)
from gigatome.evaluation.delong import delong, delong_test
from gigatome.evaluation.probes import LinearProbe, fit_predict
from gigatome.evaluation.result import EvaluationResult, FoldScore, Predictions, score
from gigatome.evaluation.survival import c_index, score_folds, score_survival
from gigatome.evaluation.survival_result import SurvivalPredictions, SurvivalResult


def class_result(p, y, folds, *, encoder="enc", patients=None, split="h", trained=None):
    names = tuple(f"s{i}" for i in range(len(y)))
    patients = names if patients is None else tuple(patients)
    count = folds.max() + 1
    rows = Predictions(names, patients, np.full(len(y), -1), folds, y, p)
    parts = []
    for k in range(count):
        mine = folds == k
        scores = [f(y[mine], p[mine]) for f in (metrics.auroc, metrics.balanced_accuracy)]
        parts.append(FoldScore(k, trained or int((~mine).sum()), int(mine.sum()), *scores))
    return EvaluationResult(
        target="t", head="linear", options={}, encoder=encoder, level="slide", classes=("a", "b", "c")[: p.shape[1]],
        n_slides=len(y), n_patients=len(set(patients)), scores=score(y, p, patients, seed=0, resamples=2), by_slide={},
        folds=tuple(parts), predictions=rows, seed=0, split="", split_hash=split, unlabelled=0, without_embeddings=(),
    )  # fmt: skip


def survival_result(risk, time, event, folds, *, split="h"):
    names = tuple(f"p{i}" for i in range(len(time)))
    rows = SurvivalPredictions(
        names, names, folds, time, event, risk, risk > np.median(risk), np.zeros((len(time), 0)), np.zeros(0)
    )
    train = [(time[folds != k], event[folds != k]) for k in range(folds.max() + 1)]
    return SurvivalResult(
        target="t", unit="months", head="cox", options={}, encoder="enc", level="patient", n_slides=len(time),
        n_patients=len(time), scores=score_survival(rows, train, seed=0, resamples=2),
        folds=score_folds(rows, [len(part[0]) for part in train]), predictions=rows, seed=0, split="",
        split_hash=split, excluded={},
    )  # fmt: skip


def two(score):
    return np.stack([1 - score, score], axis=1)


def squash(x):
    return 1 / (1 + np.exp(-x))


def pair(seed, *, gain=1.0, n=120):
    """Two results of one cohort; the first is better by ``gain``."""
    rng = np.random.default_rng(seed)
    y, folds = np.arange(n) % 2, np.arange(n) // 2 % 5
    hard = rng.normal(size=n)
    a, b = (squash(hard + g * y + 0.7 * rng.normal(size=n)) for g in (0.8 + gain, 0.8))
    return class_result(two(a), y, folds), class_result(two(b), y, folds)


def survival_pair(seed, n=300):
    rng = np.random.default_rng(seed)
    risk, folds = rng.normal(size=n), np.arange(n) % 5
    life, lost = rng.exponential(np.exp(-1.2 * risk)), rng.exponential(2, n)
    time, event = np.minimum(life, lost), life <= lost
    noisy = 100 * folds + (risk + 6 * rng.normal(size=n)) * 10.0**folds
    return survival_result(risk, time, event, folds), survival_result(noisy, time, event, folds)


def by_test(found):
    return {item.test: item for item in found}


def plain_delong(y, first, second):
    """Variance of the difference, from all pairs."""
    case, control = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    tens, ones = [], []
    for s in (first, second):
        psi = (s[case][:, None] > s[control]) + 0.5 * (s[case][:, None] == s[control])
        tens.append(psi.mean(1))
        ones.append(psi.mean(0))
    c = np.array([1, -1])
    return c @ (np.cov(tens) / len(case) + np.cov(ones) / len(control)) @ c


@pytest.mark.parametrize("seed", range(5))
def test_delong_is_that_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    y = np.r_[0, 0, 1, 1, rng.integers(0, 2, 40)]
    first, second = (rng.integers(0, 9, 44) / 8 for _ in range(2))
    found = delong(y, [first, two(second)], list(map(str, range(44))))
    variance = found.covariance[0, 0] + found.covariance[1, 1] - 2 * found.covariance[0, 1]
    assert variance == pytest.approx(plain_delong(y, first, second), abs=1e-12)
    np.testing.assert_allclose(found.auroc, [metrics.auroc(y, first), metrics.auroc(y, second)], atol=1e-12)


def test_delong_of_copies_is_that_of_patients():
    """Copies of a patient's slides add no certainty."""
    rng = np.random.default_rng(0)
    y, a, b = np.arange(40) % 2, rng.random(40), rng.random(40)
    patients = [str(i) for i in range(40)]
    once = delong_test(y, a, b, patients)
    copies = delong_test(np.tile(y, 5), np.tile(a, 5), np.tile(b, 5), patients * 5)
    wrong = delong_test(np.tile(y, 5), np.tile(a, 5), np.tile(b, 5), [str(i) for i in range(200)])
    assert copies.ci == pytest.approx(once.ci, abs=1e-12)
    assert wrong.ci[1] - wrong.ci[0] < 0.5 * (once.ci[1] - once.ci[0])


def test_delong_of_several_classes_has_the_spread_of_the_bootstrap():
    rng = np.random.default_rng(1)
    y = np.arange(240) % 3
    a, b = (rng.dirichlet(np.ones(3), 240) + g * np.eye(3)[y] for g in (0.4, 0.2))
    patients = [str(i // 2) for i in range(240)]
    ours = delong_test(y, a, b, patients)
    theirs = metrics.paired_difference(metrics.weighted_auroc, y, a, b, patients, seed=0)
    assert ours.value == pytest.approx(theirs.value, abs=1e-12)
    assert np.subtract(*ours.ci) == pytest.approx(np.subtract(*theirs.ci), rel=0.08)


def test_delong_of_the_same_predictions():
    y, a = np.arange(20) % 2, np.linspace(0, 1, 20)
    assert delong_test(y, a, a, list("abcdefghijklmnopqrst")).p == 1.0
    assert delong_test(y, y, 1 - y, list("abcdefghijklmnopqrst")).p == 0.0


def test_delong_needs_patients():
    with pytest.raises(EvaluationError, match="two patients with and two without class 1"):
        delong([0, 0, 1], [[0.1, 0.2, 0.3]], ["a", "b", "c"])


def test_corrected_t_by_hand():
    """Mean 2, variance 1, (1/3 + 1/2) → t = 2.19 on 2 degrees of freedom."""
    found = corrected_t([1, 2, 3], tested=50, trained=100)
    t = 2 / math.sqrt(5 / 6)
    assert found.value == 2
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # closed form for 2 degrees of freedom
    assert found.ci[1] - 2 == pytest.approx(4.302653 * math.sqrt(5 / 6), rel=1e-6)
    assert corrected_t([0, 0], tested=1, trained=1).p == 1.0
    with pytest.raises(EvaluationError, match="at least two folds"):
        corrected_t([1], tested=1, trained=1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()
    found = holm([0.02, math.nan, 0.01])
    assert (found[0], found[2]) == pytest.approx((0.02, 0.02))
    assert math.isnan(found[1])


def test_holm_is_over_the_comparisons_of_one_test():
    items = [Comparison("a", x, "auroc", t, 0.1, (0, 0.2), 0.02, 0.02) for x in "bc" for t in ("bootstrap", "delong")]
    assert [item.p_adjusted for item in adjusted(items)] == [0.04] * 4
    assert adjusted([]) == ()


def test_permutation_is_that_of_a_plain_loop():
    rng = np.random.default_rng(2)
    y, a, b = np.arange(30) % 2, rng.random(30), rng.random(30)
    patients = np.arange(30) // 2
    a = a + 0.5 * y
    y2, p2 = np.r_[y, y], two(np.r_[a, b])
    found = permutation_test(
        lambda w: metrics.weighted_auroc(y2, p2, w), patients.astype(str).tolist(), seed=0, resamples=3000
    )
    value = metrics.auroc(y, a) - metrics.auroc(y, b)
    count = 0
    for _ in range(3000):
        swap = (rng.random(15) < 0.5)[patients]
        count += abs(
            metrics.auroc(y, np.where(swap, b, a)) - metrics.auroc(y, np.where(swap, a, b))
        ) >= abs(value) - 1e-12  # fmt: skip
    assert found.value == pytest.approx(value)
    assert found.p == pytest.approx(count / 3000, abs=0.03)


def test_delong_is_left_out_where_too_few_patients_have_a_class():
    y, folds, patients = np.arange(8) // 4, np.arange(8) % 2, list("abcdeeee")
    rising = np.stack([np.linspace(0.8, 0.2, 8), np.linspace(0.2, 0.8, 8)], 1)
    first, second = (class_result(p, y, folds, patients=patients) for p in (rising, rising[:, ::-1]))
    assert "delong" not in by_test(compare_results(first, second, ("a", "b"), resamples=9))
    with pytest.raises(EvaluationError, match="two patients with and two without class 1"):
        compare_results(first, second, ("a", "b"), tests=["delong"])


def test_a_difference_is_found_by_every_test():
    first, second = pair(0, gain=2.0)
    tests = ("bootstrap", "delong", "corrected t", "permutation")
    found = by_test(compare_results(first, second, ("a", "b"), tests=tests, resamples=500))
    assert set(found) == set(tests)
    assert all(item.p < 0.05 for item in found.values())
    assert all(
        item.value == pytest.approx(first.auroc - second.auroc) for t, item in found.items() if t != "corrected t"
    )
    folds = [f.auroc - g.auroc for f, g in zip(first.folds, second.folds, strict=True)]
    assert found["corrected t"].value == pytest.approx(np.mean(folds))
    assert {(item.first, item.second, item.metric) for item in found.values()} == {("a", "b", "auroc")}
    assert math.isnan(found["permutation"].ci[0])
    assert found["bootstrap"].ci[0] > 0


def test_what_is_tested_by_default():
    first, second = pair(1)
    assert list(by_test(compare_results(first, second, ("a", "b"), resamples=50))) == [
        "bootstrap", "delong", "corrected t",
    ]  # fmt: skip
    accuracy = by_test(compare_results(first, second, ("a", "b"), metric="balanced_accuracy", resamples=50))
    assert list(accuracy) == ["bootstrap", "corrected t"]
    one = [
        class_result(r.predictions.probabilities, r.predictions.y, np.zeros(120, int), trained=200)
        for r in (first, second)
    ]
    assert list(by_test(compare_results(*one, ("a", "b"), resamples=50))) == ["bootstrap", "delong"]


def test_the_bootstrap_is_the_one_of_compare():
    from gigatome.evaluation.result import compare

    first, second = pair(2)
    ours = by_test(compare_results(first, second, ("a", "b"), seed=3, resamples=300))["bootstrap"]
    theirs = compare(first, second, seed=3, resamples=300)
    assert (ours.value, ours.ci, ours.p) == (pytest.approx(theirs.value), pytest.approx(theirs.ci), theirs.p)


def test_balanced_accuracy_by_permutation():
    first, second = pair(3, gain=3.0)
    found = compare_results(first, second, ("a", "b"), metric="balanced_accuracy", tests=["permutation"], resamples=300)
    assert found[0].value == pytest.approx(first.balanced_accuracy - second.balanced_accuracy)
    assert found[0].p < 0.05


def test_survival_is_compared_within_folds():
    first, second = survival_pair(0)
    tests = ("bootstrap", "corrected t", "permutation")
    found = by_test(compare_results(first, second, ("a", "b"), tests=tests, resamples=400))
    a, b = first.predictions, second.predictions
    value = c_index(a.time, a.event, a.risk, strata=a.folds) - c_index(b.time, b.event, b.risk, strata=b.folds)
    assert found["bootstrap"].value == pytest.approx(value)
    assert found["permutation"].value == pytest.approx(value)
    assert all(item.p < 0.05 and item.metric == "c_index" for item in found.values())
    assert list(by_test(compare_results(first, second, ("a", "b"), resamples=20))) == ["bootstrap", "corrected t"]


def test_the_same_result_has_no_difference():
    first, _ = pair(4)
    survival, _ = survival_pair(4)
    for result, tests in ((first, ("bootstrap", "delong", "corrected t", "permutation")), (survival, None)):
        assert all(item.p == 1.0 for item in compare_results(result, result, ("a", "b"), tests=tests, resamples=50))


def test_results_that_cannot_be_compared():
    first, second = pair(5)
    survival, other = survival_pair(5)
    moved = class_result(second.predictions.probabilities, second.predictions.y, first.predictions.folds, split="x")
    with pytest.raises(EvaluationError, match="not on the same units"):
        compare_results(first, moved, ("a", "b"))
    with pytest.raises(EvaluationError, match="cannot be compared with one of survival"):
        compare_results(first, survival, ("a", "b"))
    with pytest.raises(EvaluationError, match="no c_index"):
        compare_results(first, second, ("a", "b"), metric="c_index")
    with pytest.raises(EvaluationError, match="no test delong of c_index"):
        compare_results(survival, other, ("a", "b"), tests=["delong"])
    shorter = survival_result(other.predictions.risk, other.predictions.time * 2, other.predictions.event,
                              other.predictions.folds)  # fmt: skip
    with pytest.raises(EvaluationError, match="not on the same units"):
        compare_results(survival, shorter, ("a", "b"))


def null_pair(seed, signal, *, patients=120, dim=16):
    """Two encoders of one worth, whose noise differs, by cross-validated linear probes on the same folds."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(patients) % 2)
    folds = np.empty(patients, int)
    for c in (0, 1):
        folds[y == c] = rng.permutation(np.arange((y == c).sum()) % 5)
    results = []
    for _ in range(2):
        x = rng.normal(size=(patients, dim))
        x[:, 0] += signal * y
        p = np.zeros((patients, 2))
        for k in range(5):
            p[folds == k] = fit_predict(LinearProbe(), x[folds != k], y[folds != k], x[folds == k], 2)
        results.append(class_result(p, y, folds))
    return results


def false_positives(signal, cohorts, tests=("bootstrap", "delong", "corrected t", "permutation")):
    count = dict.fromkeys(tests, 0)
    for seed in range(cohorts):
        for item in compare_results(*null_pair(seed, signal), ("a", "b"), tests=tests, seed=seed, resamples=400):
            count[item.test] += item.p < 0.05
    return {test: found / cohorts for test, found in count.items()}


@pytest.mark.slow
@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_how_often_a_test_finds_what_is_not_there(signal):
    """The corrected tests keep to 5 %; the permutation test asks less, and its share says how much less."""
    found = false_positives(signal, 300)
    print(signal, found)
    for test in ("bootstrap", "delong", "corrected t"):
        assert found[test] <= 0.08
    assert found["permutation"] <= 0.25

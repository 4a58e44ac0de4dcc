"""Scores against scikit-learn, and intervals that hold what they promise."""

import logging
import math

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    roc_auc_score,
)

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.metrics import (
    accuracy,
    auprc,
    auroc,
    balanced_accuracy,
    bootstrap_ci,
    brier,
    fold_inflation,
    paired_difference,
    percentile_interval,
    quadratic_kappa,
    score_interval,
    weighted_auprc,
    weighted_auroc,
    weighted_balanced_accuracy,
    weighted_brier,
    weighted_quadratic_kappa,
)


def two_columns(score):
    return np.stack([1 - score, score], axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_auroc_is_that_of_sklearn_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    y = np.r_[0, 1, rng.integers(0, 2, rng.integers(2, 60))]
    score = rng.integers(0, rng.integers(1, 8) + 1, len(y)) / 8
    assert auroc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
    assert auroc(y, two_columns(score)) == pytest.approx(roc_auc_score(y, score), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_weighted_auroc_is_that_of_sklearn(seed):
    rng = np.random.default_rng(seed)
    y = np.r_[0, 1, rng.integers(0, 2, 30)]
    score = rng.integers(0, 7, len(y)) / 6
    weights = rng.integers(0, 4, (6, len(y))).astype(float)
    weights[:, :2] += 1  # both classes are there
    found = weighted_auroc(y, two_columns(score), weights)
    expected = [roc_auc_score(y, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_auroc_of_several_classes_is_the_macro_mean_of_sklearn():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 500), rng.dirichlet(np.ones(4), 500).round(2)
    p /= p.sum(1, keepdims=True)
    assert auroc(y, p) == pytest.approx(roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)


def test_auroc_of_known_cases():
    assert auroc([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == 1.0
    assert auroc([0, 0, 1, 1], [0.9, 0.8, 0.2, 0.1]) == 0.0
    assert auroc([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert auroc([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8]) == 1.0


def test_accuracies_are_those_of_sklearn():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200)
    assert accuracy(y, p) == accuracy_score(y, p.argmax(1))
    assert balanced_accuracy(y, p) == pytest.approx(balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
    weights = rng.integers(1, 4, (3, 200)).astype(float)
    expected = [balanced_accuracy_score(y, p.argmax(1), sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_balanced_accuracy(y, p, weights), expected, atol=1e-12)


def test_a_score_needs_every_class():
    with pytest.raises(EvaluationError, match="class 1 of 2 has no sample"):
        auroc([0, 0], [0.1, 0.2])
    with pytest.raises(EvaluationError, match="class 0 of 2 has no sample"):
        balanced_accuracy([1, 1], [0.1, 0.2])


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="not finite"):
        auroc([0, 1], [0.1, math.nan])


@pytest.mark.parametrize(("y", "p"), [([0, 1], [0.1]), ([0, 2], [0.1, 0.2]), ([[0]], [[0.1]]), ([0, -1], [0.1, 0.2])])
def test_shapes_that_do_not_fit(y, p):
    with pytest.raises(ValueError, match=r"need labels|labels must"):
        auroc(y, p)


def test_the_bootstrap_weighs_whole_patients():
    """Copies of a patient's samples add no certainty: the interval stays, where samples as patients would halve it."""
    rng = np.random.default_rng(2)
    y = np.arange(60) % 2
    score = 1 / (1 + np.exp(-rng.normal(size=60) - 0.8 * y))
    patients = [f"p{i}" for i in range(60)]
    once = bootstrap_ci(weighted_auroc, y, score, patients, seed=0)
    copies = bootstrap_ci(weighted_auroc, np.repeat(y, 4), np.repeat(score, 4), np.repeat(patients, 4).tolist(), seed=0)
    wrong = bootstrap_ci(weighted_auroc, np.repeat(y, 4), np.repeat(score, 4), [str(i) for i in range(240)], seed=0)
    assert copies == pytest.approx(once, abs=1e-12)
    assert wrong[1] - wrong[0] < 0.65 * (once[1] - once[0])


def test_the_bootstrap_is_that_of_a_plain_loop():
    rng = np.random.default_rng(3)
    y, score = np.arange(40) % 2, rng.integers(0, 9, 40) / 8
    patients = np.repeat(np.arange(20), 2)
    plain = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(0, 20, 20)])
        plain.append(auroc(y[rows], score[rows]))
    ours = bootstrap_ci(weighted_auroc, y, score, [str(p) for p in patients], seed=0)
    assert ours == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)


def test_the_interval_of_nothing_covers_one_half_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        y = np.repeat(np.arange(50) % 2, 2)
        score = 1 / (1 + np.exp(-np.repeat(rng.normal(size=50), 2) - 0.5 * rng.normal(size=100)))
        patients = [str(i // 2) for i in range(100)]
        low, high = bootstrap_ci(weighted_auroc, y, score, patients, seed=seed, resamples=400)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 199


def test_intervals_depend_on_the_seed_alone():
    rng = np.random.default_rng(4)
    y, score, patients = np.arange(50) % 2, rng.random(50), [str(i) for i in range(50)]
    assert bootstrap_ci(weighted_auroc, y, score, patients, seed=7) == bootstrap_ci(
        weighted_auroc, y, score, patients, seed=7
    )
    assert bootstrap_ci(weighted_auroc, y, score, patients, seed=7) != bootstrap_ci(
        weighted_auroc, y, score, patients, seed=8
    )


def test_resamples_without_a_class_are_left_out():
    """With 2 positive patients of 10, a tenth of the resamples have none; the interval is of the others."""
    y = np.array([1, 1, *[0] * 8])
    low, high = bootstrap_ci(weighted_auroc, y, np.linspace(1, 0, 10), [str(i) for i in range(10)], seed=0)
    assert (low, high) == (1.0, 1.0)


def test_too_few_patients_give_no_interval(caplog):
    with caplog.at_level(logging.WARNING, "gigatome"):
        bounds = bootstrap_ci(weighted_auroc, np.arange(3), np.eye(3), ["a", "b", "c"], seed=0)
    assert all(map(math.isnan, bounds))  # all three are drawn in 2 of 9 resamples
    assert "too few patients for an interval" in caplog.text


def test_a_difference_is_surer_when_paired():
    rng = np.random.default_rng(5)
    y = np.arange(80) % 2
    hard = rng.normal(size=80)  # what makes a slide hard for both
    patients = [str(i) for i in range(80)]
    good = 1 / (1 + np.exp(-(hard + 1.0 * y + 0.1 * rng.normal(size=80))))
    poor = 1 / (1 + np.exp(-(hard + 0.4 * y + 0.1 * rng.normal(size=80))))
    difference = paired_difference(weighted_auroc, y, good, poor, patients, seed=0)
    assert difference.value == pytest.approx(auroc(y, good) - auroc(y, poor))
    assert difference.ci[0] > 0
    assert difference.p < 0.01
    unpaired = [bootstrap_ci(weighted_auroc, y, p, patients, seed=0) for p in (good, poor)]
    assert unpaired[0][0] < unpaired[1][1]  # the single intervals overlap


def test_no_difference_has_no_evidence():
    rng = np.random.default_rng(6)
    y, p = np.arange(40) % 2, rng.random(40)
    same = paired_difference(weighted_auroc, y, p, p, [str(i) for i in range(40)], seed=0)
    assert (same.value, same.ci, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_p_values_of_nothing_are_spread_evenly():
    small = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        y = np.arange(60) % 2
        patients = [str(i) for i in range(60)]
        difference = paired_difference(
            weighted_auroc, y, rng.random(60), rng.random(60), patients, seed=seed, resamples=300
        )
        small += difference.p < 0.05
    assert small <= 18  # 7.5 expected


def test_the_smallest_p_value_says_how_many_resamples_there_were():
    y = np.arange(40) % 2
    found = paired_difference(
        weighted_auroc, y, y.astype(float), 1.0 - y, [str(i) for i in range(40)], seed=0, resamples=199
    )
    assert found.p == pytest.approx(2 / 200)


def test_inflation_widens_a_difference_about_its_value():
    rng = np.random.default_rng(7)
    y, patients = np.arange(60) % 2, [str(i) for i in range(60)]
    a, b = rng.random(60) + 0.3 * y, rng.random(60)
    plain, wide = (
        paired_difference(weighted_auroc, y, a, b, patients, seed=0, inflation=factor) for factor in (1.0, 2.25)
    )
    assert wide.value == plain.value
    assert np.subtract(wide.ci, wide.value) == pytest.approx(1.5 * np.subtract(plain.ci, plain.value))
    assert wide.p > plain.p


def test_a_score_interval_widens_about_its_score_and_stays_a_score():
    rng = np.random.default_rng(4)
    drawn = rng.normal(0.8, 0.05, 4000)
    plain = percentile_interval(drawn)
    assert score_interval(0.8, drawn) == plain
    wide = score_interval(0.8, drawn, inflation=2.25)
    np.testing.assert_allclose(np.subtract(wide, 0.8), 1.5 * np.subtract(plain, 0.8))
    assert score_interval(0.8, drawn, inflation=100) == (pytest.approx(0, abs=0.2), 1.0)
    assert score_interval(0.1, drawn - 0.7, inflation=100)[0] == 0.0
    assert score_interval(1.0, np.ones(50), inflation=2.25) == (1.0, 1.0)
    assert np.isnan(score_interval(0.5, np.full(50, np.nan), inflation=2.25)).all()


def test_a_bootstrap_interval_is_widened():
    rng = np.random.default_rng(5)
    y = np.arange(60) % 2
    p = np.clip(0.3 * y + rng.random(60) * 0.7, 0, 1)
    patients = [str(i) for i in range(60)]
    value = auroc(y, p)
    plain = bootstrap_ci(weighted_auroc, y, p, patients, seed=0)
    wide = bootstrap_ci(weighted_auroc, y, p, patients, seed=0, inflation=1.44)
    np.testing.assert_allclose(np.subtract(wide, value), 1.2 * np.subtract(plain, value))


@pytest.mark.parametrize(
    ("trained", "tested", "distinct", "factor"),
    [
        ([80] * 5, [20] * 5, 100, 2.25),
        ([90] * 10, [10] * 10, 100, 1 + 10 / 9),
        ([70] * 10, [10] * 10, 100, 1 + 10 / 9),  # a validation part is nothing that the folds do not share
        ([8] * 10, [10] * 10, 100, 1 + 10 / 9),  # few shots
        ([90] * 10, [10] * 10, 60, 1 + 60 / 90),  # random parts
        ([100], [50], 50, 1.0),  # one head
    ],
)
def test_the_factor_of_folds(trained, tested, distinct, factor):
    assert fold_inflation(trained, tested, distinct) == pytest.approx(factor)


@pytest.mark.parametrize("seed", range(10))
def test_auprc_is_the_average_precision_of_sklearn(seed):
    rng = np.random.default_rng(seed)
    y = np.r_[0, 1, rng.integers(0, 2, 40)]
    score = rng.integers(0, 9, 42) / 8
    assert auprc(y, score) == pytest.approx(average_precision_score(y, score), abs=1e-12)
    weights = rng.integers(0, 4, (5, 42)).astype(float)
    weights[:, :2] += 1
    expected = [average_precision_score(y, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auprc(y, two_columns(score), weights), expected, atol=1e-12)


def test_auprc_of_several_classes_is_their_mean():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 200), rng.dirichlet(np.ones(4), 200).round(2)
    assert auprc(y, p) == pytest.approx(average_precision_score(np.eye(4)[y], p, average="macro"), abs=1e-12)


def test_quadratic_kappa_is_that_of_sklearn():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 5, 100), rng.dirichlet(np.ones(5), 100)
    weights = rng.integers(0, 4, (3, 100)).astype(float)
    expected = [cohen_kappa_score(y, p.argmax(1), weights="quadratic", sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_quadratic_kappa(y, p, weights), expected, atol=1e-12)
    assert quadratic_kappa(y, np.eye(5)[y]) == 1.0


def test_brier_is_that_of_sklearn():
    rng = np.random.default_rng(2)
    y, p, weights = rng.integers(0, 2, 50), rng.random(50), rng.random((2, 50))
    assert brier(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    expected = [brier_score_loss(y, p, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_brier(y, two_columns(p), weights), expected, atol=1e-12)
    assert brier([0, 1, 2], np.eye(3)) == 0.0
    assert brier([0, 1, 2], np.eye(3)[[1, 2, 0]]) == 2.0


def test_a_patient_for_each_sample():
    for call in (
        lambda: bootstrap_ci(weighted_auroc, [0, 1], [0.1, 0.2], ["a"], seed=0),
        lambda: paired_difference(weighted_auroc, [0, 1], [0.1, 0.2], [0.1, 0.2], ["a"], seed=0),
    ):
        with pytest.raises(ValueError, match="need a patient for each of the 2 samples, not 1"):
            call()

"""Cohorts whose truth is known: the intervals of the scores hold it as often as they say.

Embeddings are Gaussian with the outcome along their first axis, so the AUROC, c-index and hazard ratio of any linear
head on all patients of that kind are known. What an interval should hold is the mean of these over cohorts: what a
head that learnt from so many patients is worth.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest

from gigatome.evaluation.cox import Cox, fit_cox, hazard_ratio
from gigatome.evaluation.crossval import FoldRun, Setting, result_of
from gigatome.evaluation.folds import patient_folds
from gigatome.evaluation.heads import Prediction
from gigatome.evaluation.metrics import fold_inflation
from gigatome.evaluation.probes import PROBES, fit_probe
from gigatome.evaluation.result import score
from gigatome.evaluation.splits import Split, Splits
from gigatome.evaluation.survival import score_survival
from gigatome.evaluation.survival_result import SurvivalPredictions
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome, Units

NORMAL = NormalDist()
FOLLOW_UP = 1.5  # mean time to censoring; of the mean patient to death, 1


@dataclass(frozen=True)
class Design:
    """A kind of cohort.

    Attributes:
        patients: how many.
        dim: of the embeddings.
        signal: distance of the class means, or log hazard ratio, along the first axis, in deviations of a patient.
        folds: 1 learns from a cohort and is tested on another of the same size.
        slides: of each patient, whose deviations about their patient are 1.
        permuted: training labels are dealt out anew.
    """

    patients: int = 120
    dim: int = 16
    signal: float = 1.2
    folds: int = 5
    slides: int = 1
    permuted: bool = False


def parts(design, labels, seed):
    """Patients who train and who are tested, of each fold."""
    if design.folds > 1:
        return patient_folds([f"p{i:03}" for i in range(design.patients)], labels.tolist(), design.folds, seed)
    return [(np.arange(design.patients), np.arange(design.patients, 2 * design.patients))]


def sizes(splits):
    tested = [len(test) for _, test in splits]
    return [len(train) for train, _ in splits], tested, sum(tested)


def direction(coefficients):
    """Cosine of the angle to the axis of the outcome."""
    length = np.linalg.norm(coefficients)
    return float(coefficients[0] / length) if length > 0 else 0.0


def class_cohort(design, seed, resamples, widen=True):
    """AUROC and balanced accuracy of one cohort, each with its interval and the truth of its heads, [2, 4]."""
    rng = np.random.default_rng(seed)
    count = design.patients * (2 if design.folds == 1 else 1)
    label = np.arange(count) % 2
    apart = design.signal * (1 if design.slides == 1 else np.sqrt(2))
    patient = np.repeat(np.arange(count), design.slides)
    x = rng.normal(size=(count, design.dim)) if design.slides > 1 else np.zeros((count, design.dim))
    x[:, 0] += apart * (label - 0.5)
    x = x[patient] + rng.normal(size=(len(patient), design.dim))
    spread = 1 if design.slides == 1 else np.sqrt(2)
    y = label[patient]
    splits = parts(design, label, seed)
    tested, p, truths = [], [], []
    for train, test in splits:
        learnt, held = (np.flatnonzero(np.isin(patient, part)) for part in (train, test))
        known = rng.permutation(y[learnt]) if design.permuted else y[learnt]
        head = fit_probe(PROBES["linear"], x[learnt], known, 2)
        w, b = head.arrays["coefficients"][:, 0], float(head.arrays["intercept"][0])
        gap, offset = apart / spread * direction(w), b / (spread * np.linalg.norm(w))
        right = (NORMAL.cdf(gap / 2 + offset) + NORMAL.cdf(gap / 2 - offset)) / 2
        truths.append((NORMAL.cdf(gap / np.sqrt(2)), right))
        tested.append(held)
        p.append(head.predict(x[held]))
    rows = np.concatenate(tested)
    found = score(
        y[rows], np.concatenate(p), [str(i) for i in patient[rows]], seed=seed, resamples=resamples,
        inflation=fold_inflation(*sizes(splits)) if widen else 1.0,
    )  # fmt: skip
    truth = np.mean(truths, axis=0)
    return [
        [found.auroc, *found.auroc_ci, truth[0]],
        [found.balanced_accuracy, *found.balanced_accuracy_ci, truth[1]],
    ]


def followed(rng, log_hazard):
    """Times and events of patients."""
    life, lost = rng.exponential(np.exp(-log_hazard)), rng.exponential(FOLLOW_UP, len(log_hazard))
    return np.minimum(life, lost), life <= lost


class Survival:
    """The truth of a linear risk, by its angle to the axis of the outcome, from many patients."""

    def __init__(self, signal, count=100_000):
        rng = np.random.default_rng(17)
        x, other = rng.normal(size=(2, count))
        time, event = followed(rng, signal * x)
        self.angles = np.linspace(0, 1, 21)
        self.c, self.log_ratio = [], []
        a, b = np.arange(count), np.roll(np.arange(count), 1)
        for angle in self.angles:
            risk = angle * x + np.sqrt(1 - angle**2) * other
            seen = event[a] & (time[a] < time[b]), event[b] & (time[b] < time[a])
            right = np.sum(seen[0] & (risk[a] > risk[b])) + np.sum(seen[1] & (risk[b] > risk[a]))
            self.c.append(right / np.sum(seen))
            self.log_ratio.append(np.log(hazard_ratio(time, event, risk > 0).value))

    def of(self, angle):
        """C-index, and log hazard ratio of those above against those below the median."""
        size, sign = abs(angle), np.sign(angle)
        c = np.interp(size, self.angles, self.c) - np.interp(0, self.angles, self.c)
        ratio = np.interp(size, self.angles, self.log_ratio) - np.interp(0, self.angles, self.log_ratio)
        return 0.5 + sign * c, sign * ratio


def survival_cohort(design, truth, seed, resamples, widen=True):
    """C-index, Uno's and log hazard ratio, each with its interval and the truth, [3, 4]."""
    rng = np.random.default_rng(seed)
    count = design.patients * (2 if design.folds == 1 else 1)
    x = rng.normal(size=(count, design.dim))
    time, event = followed(rng, design.signal * x[:, 0])
    splits = parts(design, event, seed)
    risk, high, truths, follow = [], [], [], []
    for train, test in splits:
        known = rng.permutation(train) if design.permuted else train
        head = fit_cox(Cox(), x[train], time[known], event[known])
        risk.append(head.predict(x[test]))
        high.append(risk[-1] > head.median)
        truths.append(truth.of(direction(head.coefficients)))
        follow.append((time[train], event[train]))
    rows = np.concatenate([test for _, test in splits])
    names = tuple(str(i) for i in rows)
    predictions = SurvivalPredictions(
        names, names, np.repeat(np.arange(len(splits)), sizes(splits)[1]), time[rows], event[rows],
        np.concatenate(risk), np.concatenate(high), np.zeros((len(rows), 0)), np.zeros((len(rows), 0)),
    )  # fmt: skip
    inflation = fold_inflation(*sizes(splits)) if widen else 1.0
    found = score_survival(predictions, follow, seed=seed, resamples=resamples, inflation=inflation)
    c, ratio = np.mean(truths, axis=0)
    return [
        [found.c_index, *found.c_index_ci, c],
        [found.uno, *found.uno_ci, c],
        [*np.log([found.hazard_ratio, *found.hazard_ratio_ci]), ratio],
    ]


def grouped_cohort(ratio, seed, resamples, patients=120):
    """Log hazard ratio, its interval, and the truth, [1, 4], of a cohort of two groups that the embeddings tell."""
    rng = np.random.default_rng(seed)
    group = np.arange(patients) % 2
    x = group[:, None] + 0.05 * rng.normal(size=(patients, 4))
    time, event = followed(rng, np.log(ratio) * group)
    splits = patient_folds([f"p{i:03}" for i in range(patients)], group.tolist(), 5, seed)
    heads = [fit_cox(Cox(), x[train], time[train], event[train]) for train, _ in splits]
    risk = [head.predict(x[test]) for head, (_, test) in zip(heads, splits, strict=True)]
    high = [r > head.median for r, head in zip(risk, heads, strict=True)]
    rows, names = np.concatenate([test for _, test in splits]), tuple(str(i) for i in range(patients))
    predictions = SurvivalPredictions(
        names, names, np.repeat(np.arange(5), [len(test) for _, test in splits]), time[rows], event[rows],
        np.concatenate(risk), np.concatenate(high), np.zeros((patients, 0)), np.zeros((patients, 0)),
    )  # fmt: skip
    follow = [(time[train], event[train]) for train, _ in splits]
    found = score_survival(
        predictions, follow, seed=seed, resamples=resamples, inflation=fold_inflation(*sizes(splits))
    )
    return [[*np.log([found.hazard_ratio, *found.hazard_ratio_ci]), np.log(ratio)]]


def holds(rows, *, own=False):
    """Shares [scores] of intervals in rows [cohorts, scores, 4] that hold the mean truth, or that of their heads."""
    rows = np.asarray(rows)
    truth = rows[:, :, 3] if own else rows[:, :, 3].mean(0)
    return np.mean((rows[:, :, 1] <= truth) & (truth <= rows[:, :, 2]), axis=0)


def assert_unbiased(rows, offset):
    """The scores are, on average, within ``offset`` of the truth."""
    rows = np.asarray(rows)
    assert np.abs(rows[:, :, 0].mean(0) - rows[:, :, 3].mean(0)).max() < offset


def test_an_auroc_is_recovered():
    found = np.array([class_cohort(Design(), seed, 200) for seed in range(40)])
    assert_unbiased(found, 0.04)
    assert 0.7 < found[:, 0, 3].mean() < NORMAL.cdf(1.2 / np.sqrt(2))  # of heads of 96 patients, and at best
    assert holds(found).min() >= 0.87
    assert np.mean(found[:, 0, 1] > 0.5) > 0.7  # the intervals say something


def test_a_c_index_and_a_hazard_ratio_are_recovered():
    truth = Survival(0.7)
    found = np.array([survival_cohort(Design(dim=8, signal=0.7), truth, seed, 200) for seed in range(40)])
    assert_unbiased(found[:, :2], 0.03)
    assert 0.62 < found[:, 0, 3].mean() < 0.682
    assert holds(found).min() >= 0.87
    assert np.mean(found[:, [0, 2], 1] > [0.5, 0], axis=0).min() > 0.5


def test_the_hazard_ratio_of_two_groups_is_recovered():
    found = np.array([grouped_cohort(3.0, seed, 2) for seed in range(100)])
    assert holds(found)[0] >= 0.92
    assert found[:, 0, 0].mean() == pytest.approx(np.log(3), abs=0.1)
    assert np.mean(found[:, 0, 1] > 0) > 0.7


def test_dealt_out_labels_are_worth_nothing():
    found = np.array([class_cohort(Design(dim=8, permuted=True), seed, 200) for seed in range(40)])
    assert found[:, :, 0].mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    null = Survival(0.7, 20_000)
    found = np.array([survival_cohort(Design(dim=8, signal=0.7, permuted=True), null, s, 200) for s in range(40)])
    assert found[:, :, 0].mean(0) == pytest.approx([0.5, 0.5, 0], abs=0.15)
    assert found[:, 0, 0].mean() == pytest.approx(0.5, abs=0.03)


def test_results_of_folds_have_the_wider_interval_and_one_head_has_not():
    """What crossval hands to the scores: 2.25 of five folds, 1 of one head on another cohort."""
    rng = np.random.default_rng(0)
    names = tuple(f"p{i:03}" for i in range(100))
    y = np.arange(100) % 2
    risk, setting = y + rng.normal(size=100), Setting("target", "linear", {}, "enc", 0, 200)
    time, event = followed(rng, risk)
    p = np.stack([1 - 1 / (1 + np.exp(-risk)), 1 / (1 + np.exp(-risk))], axis=1)
    slides = tuple((name,) for name in names)
    five = patient_folds(list(names), y.tolist(), 5, 0)
    for splits, factor in ((five, 2.25), ([(np.arange(40), np.arange(40, 100))], 1.0)):
        made = Splits(tuple(Split(*split) for split in splits), "made up", "0" * 16)
        runs = [
            FoldRun(split, Prediction(p[split.test], risk[split.test], np.zeros((len(split.test), 0))), risk, Mute())
            for split in made.parts
        ]
        units = Units("patient", names, names, slides, ClassOutcome(("a", "b"), y))
        found = result_of(units, made, runs, setting)
        rows = found.predictions
        given = {"seed": 0, "resamples": 200, "inflation": factor}
        assert found.scores == score(rows.y, rows.probabilities, rows.patients, **given)
        units = Units("patient", names, names, slides, SurvivalOutcome(time, event, "months", "time, event"))
        found = result_of(units, made, runs, setting)
        follow = [(time[split.train], event[split.train]) for split in made.parts]
        assert found.scores == score_survival(found.predictions, follow, **given)


class Mute:
    """A head that is not asked."""

    def predict(self, data, *, attention=False):
        raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "at_most"),
    [
        (Design(), 0.91),
        (Design(slides=3, patients=60), 0.93),
        (Design(patients=60, dim=64, signal=0.0, folds=10), 0.92),
    ],
    ids=["120 patients", "three slides each", "no signal"],
)
def test_intervals_of_classes_cover(design, at_most):
    """95 % is promised; the plain bootstrap, which knows of no other heads, does not keep it."""
    found = [class_cohort(design, seed, 300) for seed in range(300)]
    assert_unbiased(found, 0.02)
    assert holds(found).min() >= 0.92
    assert holds([class_cohort(design, seed, 300, widen=False) for seed in range(200)])[0] <= at_most


@pytest.mark.slow
@pytest.mark.parametrize("design", [Design(dim=8, signal=0.7), Design(dim=64, signal=0.7), Design(dim=8, signal=0.0)])
def test_intervals_of_survival_cover(design):
    truth = Survival(design.signal)
    found = np.array([survival_cohort(design, truth, seed, 300) for seed in range(300)])
    assert_unbiased(found[:, :2], 0.02)
    assert_unbiased(found[:, 2:], 0.15)  # Cox's coefficient is too large in strata of 24 patients
    assert holds(found).min() >= 0.92


@pytest.mark.slow
def test_one_head_on_another_cohort_needs_no_wider_interval():
    """The interval is about this head: it holds the head's own worth."""
    found = np.array([class_cohort(Design(folds=1), seed, 300) for seed in range(400)])
    assert holds(found, own=True).min() >= 0.92
    design = Design(dim=8, signal=0.7, folds=1)
    truth = Survival(0.7)
    assert holds([survival_cohort(design, truth, seed, 300) for seed in range(300)], own=True).min() >= 0.92


@pytest.mark.slow
def test_dealt_out_labels_are_worth_one_half():
    found = np.array([class_cohort(Design(permuted=True), seed, 300) for seed in range(300)])
    assert found[:, :, 0].mean(0) == pytest.approx([0.5, 0.5], abs=0.01)
    assert holds(found).min() >= 0.92
    design = Design(dim=8, signal=0.7, permuted=True)
    truth = Survival(0.7)
    found = np.array([survival_cohort(design, truth, seed, 300) for seed in range(300)])
    assert found[:, :2, 0].mean(0) == pytest.approx([0.5, 0.5], abs=0.012)
    assert found[:, 2, 0].mean() == pytest.approx(0, abs=0.08)
    assert holds(found).min() >= 0.92

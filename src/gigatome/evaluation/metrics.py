"""Scores and how sure one can be of them.

Every statistic here takes weights [R, N] and returns R values at once, so that a bootstrap over patients is one
vectorised call: a resample of patients with replacement is a row of whole-number weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.logs import log
from gigatome.core.seeding import generator

_CELLS_AT_ONCE = 4_000_000  # weights held at a time: 32 MB


class Statistic(Protocol):
    """A score of weighted predictions."""

    def __call__(
        self, y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Scores [R] for labels [N], probabilities [N, C] and weights [R, N]; NaN where a class has no weight."""
        ...


@dataclass(frozen=True)
class Difference:
    """How much better one set of predictions is than another on the same slides.

    Attributes:
        value: score of the first minus score of the second.
        ci: its percentile bootstrap interval over patients.
        p: two-sided bootstrap p-value of no difference, at least 1 / (resamples + 1).
    """

    value: float
    ci: tuple[float, float]
    p: float


def auroc(y: ArrayLike, p: ArrayLike) -> float:
    """Area under the ROC curve; ties count one half; with several classes, the macro mean of one against the rest.

    Args:
        y: labels [N], 0 … C − 1.
        p: scores of class 1, [N], or a score for each class, [N, C].

    Raises:
        EvaluationError: a class has no sample.
    """
    return _single(weighted_auroc, y, p)


def balanced_accuracy(y: ArrayLike, p: ArrayLike) -> float:
    """Mean over classes of the share of their samples whose highest score is theirs; arguments as :func:`auroc`.

    Scores of class 1 alone must be probabilities: the threshold is 0.5.

    Raises:
        EvaluationError: a class has no sample.
    """
    return _single(weighted_balanced_accuracy, y, p)


def accuracy(y: ArrayLike, p: ArrayLike) -> float:
    """Share of samples whose highest score is that of their class; arguments as :func:`balanced_accuracy`."""
    y, p = _checked(y, p)
    return float(np.mean(p.argmax(1) == y))


def auprc(y: ArrayLike, p: ArrayLike) -> float:
    """Average precision; with several classes, the macro mean of one against the rest; arguments as :func:`auroc`.

    With two classes it is that of class 1. What a classifier that knows nothing reaches is the share of the class.

    Raises:
        EvaluationError: a class has no sample.
    """
    return _single(weighted_auprc, y, p)


def quadratic_kappa(y: ArrayLike, p: ArrayLike) -> float:
    """Cohen's kappa with quadratic weights, for classes in order such as grades; arguments as :func:`auroc`.

    A prediction is the class of the highest score.

    Raises:
        EvaluationError: a class has no sample.
    """
    return _single(weighted_quadratic_kappa, y, p)


def brier(y: ArrayLike, p: ArrayLike) -> float:
    """Mean squared error of the probabilities, summed over classes and halved for two; arguments as :func:`auroc`.

    With two classes this is (p − y)² of class 1, as scikit-learn's; 0 is best.
    """
    y, p = _checked(y, p)
    return float(weighted_brier(y, p, np.ones((1, len(y))))[0])


def weighted_auroc(y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`auroc` for each row of weights; a :class:`Statistic`."""
    if p.shape[1] == 2:
        return _binary_auroc(y == 1, p[:, 1], weights)
    return np.mean([_binary_auroc(y == c, p[:, c], weights) for c in range(p.shape[1])], axis=0)


def weighted_balanced_accuracy(
    y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """:func:`balanced_accuracy` for each row of weights; a :class:`Statistic`."""
    right = p.argmax(1) == y
    members = y[:, None] == np.arange(p.shape[1])
    with np.errstate(invalid="ignore"):
        return ((weights @ (members & right[:, None])) / (weights @ members)).mean(1)


def weighted_auprc(y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`auprc` for each row of weights; a :class:`Statistic`."""
    classes = [1] if p.shape[1] == 2 else range(p.shape[1])
    return np.mean([_average_precision(y == c, p[:, c], weights) for c in classes], axis=0)


def weighted_quadratic_kappa(
    y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """:func:`quadratic_kappa` for each row of weights; a :class:`Statistic`."""
    grades = np.arange(p.shape[1], dtype=np.float64)
    guess = p.argmax(1)
    # E (y - guess)² under independence needs the first two moments alone
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        truth, said = weights @ grades[y] / total, weights @ grades[guess] / total
        squares = weights @ (grades[y] ** 2 + grades[guess] ** 2) / total
        return 1 - (weights @ (grades[y] - grades[guess]) ** 2 / total) / (squares - 2 * truth * said)


def weighted_brier(y: NDArray[np.int64], p: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`brier` for each row of weights; a :class:`Statistic`."""
    error = ((p - np.eye(p.shape[1])[y]) ** 2).sum(1) / (2 if p.shape[1] == 2 else 1)
    with np.errstate(invalid="ignore"):
        return weights @ error / weights.sum(1)


def bootstrap_ci(
    statistic: Statistic,
    y: ArrayLike,
    p: ArrayLike,
    patients: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    inflation: float = 1.0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a score, resampling whole patients.

    Slides of a patient are not independent, so patients are drawn with replacement and bring all their samples. A
    resample without any sample of some class has no score and is left out, so the interval is conditional on every
    class being seen.

    Args:
        statistic: such as :func:`weighted_auroc`.
        y: labels [N], 0 … C − 1.
        p: scores [N] of class 1, or [N, C].
        patients: patient of each sample.
        seed: of the resampling.
        resamples: how many.
        level: coverage.
        inflation: factor on the variance, see :func:`score_interval`.

    Returns:
        Lower and upper bound; NaN if fewer than half of the resamples have a score, as with very few patients.
    """
    y, p = _checked(y, p)
    _check_patients(patients, len(y))
    drawn = bootstrap(lambda weights: statistic(y, p, weights), patients, seed=seed, resamples=resamples)
    return score_interval(float(statistic(y, p, np.ones((1, len(y))))[0]), drawn, level=level, inflation=inflation)


def paired_difference(
    statistic: Statistic,
    y: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    inflation: float = 1.0,
) -> Difference:
    """Difference in score between two sets of predictions of the same samples, from the same resamples of patients.

    The p-value is twice the smaller share of resampled differences on either side of zero, each with one added, and 1
    at most.

    Args:
        statistic: such as :func:`weighted_auroc`.
        y: labels [N].
        first: scores [N] or [N, C].
        second: scores of the same shape.
        patients: patient of each sample.
        seed: of the resampling.
        resamples: how many.
        level: coverage of the interval.
        inflation: factor on the variance of the resampled differences, for what resampling does not vary, such as the
            patients that a classifier learnt from.
    """
    y, first = _checked(y, first)
    _, second = _checked(y, second)
    _check_patients(patients, len(y))
    return resampled_difference(
        lambda weights: statistic(y, first, weights),
        lambda weights: statistic(y, second, weights),
        _single(statistic, y, first) - _single(statistic, y, second),
        patients,
        seed=seed,
        resamples=resamples,
        level=level,
        inflation=inflation,
    )


def resampled_difference(
    first: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    second: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    value: float,
    patients: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    inflation: float = 1.0,
) -> Difference:
    """:func:`paired_difference` for two scores of weights, [R, N] to [R], that differ by ``value``."""
    a, b = (bootstrap(score, patients, seed=seed, resamples=resamples) for score in (first, second))
    drawn = value + (a - b - value) * inflation**0.5
    valid = drawn[np.isfinite(drawn)]
    tail = min(np.sum(valid <= 0), np.sum(valid >= 0)) + 1
    return Difference(value, percentile_interval(drawn, level), float(min(1.0, 2 * tail / (len(valid) + 1))))


def patient_weights(patients: Sequence[str], seed: int, resamples: int) -> Iterator[NDArray[np.float64]]:
    """Resamples of whole patients with replacement, a block at a time, as weights float64 [≤ resamples, N]."""
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    draws = generator(seed, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    step = max(1, _CELLS_AT_ONCE // max(1, len(patient)))
    for start in range(0, resamples, step):
        yield draws[start : start + step, patient].astype(np.float64)


def bootstrap(
    score: Callable[[NDArray[np.float64]], NDArray[np.float64]], patients: Sequence[str], *, seed: int, resamples: int
) -> NDArray[np.float64]:
    """A score of each resample of patients, [resamples, …]; the same resamples for the same patients and seed.

    Args:
        score: takes weights [R, N] and gives [R, …].
        patients: patient of each of the N samples.
        seed: of the resampling.
        resamples: how many.
    """
    return np.concatenate([score(weights) for weights in patient_weights(patients, seed, resamples)])


def percentile_interval(drawn: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of resampled scores [R]; NaN, and a warning, if fewer than half of them are numbers."""
    valid = drawn[np.isfinite(drawn)]
    if len(valid) < len(drawn) / 2:
        log.warning(
            "only %d of %d bootstrap resamples hold every class: too few patients for an interval",
            len(valid),
            len(drawn),
        )
        return float("nan"), float("nan")
    low, high = np.quantile(valid, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score_interval(
    value: float, drawn: NDArray[np.float64], *, level: float = 0.95, inflation: float = 1.0
) -> tuple[float, float]:
    """:func:`percentile_interval` of a score from 0 to 1, its spread about the score widened.

    Args:
        value: the score.
        drawn: that of resampled patients, [R].
        level: coverage.
        inflation: factor on the variance about ``value``, as :func:`fold_inflation` gives; bounds end at 0 and 1.
    """
    if inflation == 1:
        return percentile_interval(drawn, level)
    low, high = percentile_interval(value + (drawn - value) * inflation**0.5, level)
    return max(low, 0.0), min(high, 1.0)


def variance_factor(tested: float, trained: float) -> float:
    """Factor on the variance of a pooled test score for the chance in which units the classifiers learnt from.

    Source: Nadeau and Bengio, "Inference for the generalization error", Machine Learning 52, 2003, for the factor,
    which they apply to the variance over folds; here it is for that of the bootstrap or of DeLong.

    Args:
        tested: different units that all folds together tested.
        trained: units that a fold learnt from, on average.
    """
    return 1 + tested / trained


def fold_inflation(trained: Sequence[int], tested: Sequence[int], distinct: int) -> float:
    """:func:`variance_factor` for the interval of a pooled score of several folds; 1 for a single split.

    A single split, such as an external test cohort, has one head, and the interval is about this head. Folds that learn
    from few of the units that they do not test have few in common, so that what they leave out counts as learnt from.

    Args:
        trained: units that each fold learnt from.
        tested: units that each fold tested.
        distinct: different units that all folds together tested.
    """
    learnt = max(float(np.mean(trained)), distinct - float(np.mean(tested)))
    return variance_factor(distinct, learnt) if len(trained) > 1 else 1.0


def pair_sums(
    score: NDArray[np.float64], up: NDArray[np.float64], down: NDArray[np.float64], tolerance: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight of the (up, down) pairs in which up scores higher, half for ties, and of all pairs.

    Args:
        score: [N].
        up: weights [R, N] of the samples that ought to score high.
        down: weights [R, N] of those that ought to score low.
        tolerance: scores no further apart than this from their neighbour in order are tied.

    Returns:
        Two arrays float64 [R].
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > tolerance])  # the first of each run of equal scores
    up = np.add.reduceat(up[:, order], starts, axis=1)
    down = np.add.reduceat(down[:, order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return (up * below).sum(1), up.sum(1) * down.sum(1)


def _single(statistic: Statistic, y: ArrayLike, p: ArrayLike) -> float:
    y, p = _checked(y, p)
    missing = np.setdiff1d(np.arange(p.shape[1]), y)
    if len(missing):
        raise EvaluationError(f"class {missing[0]} of {p.shape[1]} has no sample; its score is not defined")
    return float(statistic(y, p, np.ones((1, len(y))))[0])


def _checked(y: ArrayLike, p: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels int64 [N] and scores float64 [N, C ≥ 2]."""
    y, p = np.asarray(y, np.int64), np.asarray(p, np.float64)
    p = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
    if y.ndim != 1 or p.ndim != 2 or len(y) != len(p) or p.shape[1] < 2:
        raise ValueError(f"need labels [N] and scores [N] or [N, C], not {y.shape} and {p.shape}")
    if not np.isfinite(p).all():
        raise EvaluationError("some predictions are not finite; look for embeddings that are not")
    if len(y) and (y.min() < 0 or y.max() >= p.shape[1]):
        raise ValueError(f"labels must be 0 … {p.shape[1] - 1}")
    return y, p


def _check_patients(patients: Sequence[str], count: int) -> None:
    if len(patients) != count:
        raise ValueError(f"need a patient for each of the {count} samples, not {len(patients)}")


def _binary_auroc(
    positive: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUROC [R] for weights [R, N]: the share of (positive, negative) pairs in the right order, half for ties."""
    right, pairs = pair_sums(score, weights * positive, weights * ~positive)
    with np.errstate(invalid="ignore"):
        return right / pairs


def _average_precision(
    positive: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision [R] for weights [R, N]: the precision at each score, weighed by the recall gained there."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) < 0])
    ranked = weights[:, order]
    found = np.add.reduceat(ranked * positive[order], starts, axis=1)
    called = np.cumsum(np.add.reduceat(ranked, starts, axis=1), axis=1)
    precision = np.cumsum(found, axis=1) / np.where(called > 0, called, 1.0)
    with np.errstate(invalid="ignore"):
        return (found * precision).sum(1) / found.sum(1)

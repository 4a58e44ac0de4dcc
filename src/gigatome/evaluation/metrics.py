"""Scores and how sure one can be of them.

Every statistic here takes weights [R, N] and returns R values at once, so that a bootstrap over patients is one
vectorised call: a resample of patients with replacement is a row of whole-number weights.
"""

from collections.abc import Sequence
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


def bootstrap_ci(
    statistic: Statistic,
    y: ArrayLike,
    p: ArrayLike,
    patients: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
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

    Returns:
        Lower and upper bound; NaN if fewer than half of the resamples have a score, as with very few patients.
    """
    y, p = _checked(y, p)
    return _interval(_bootstrap(statistic, y, [p], patients, seed, resamples)[0], level)


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
    a, b = _bootstrap(statistic, y, [first, second], patients, seed, resamples)
    value = _single(statistic, y, first) - _single(statistic, y, second)
    drawn = value + (a - b - value) * inflation**0.5
    valid = drawn[np.isfinite(drawn)]
    tail = min(np.sum(valid <= 0), np.sum(valid >= 0)) + 1
    return Difference(value, _interval(drawn, level), float(min(1.0, 2 * tail / (len(valid) + 1))))


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


def _binary_auroc(
    positive: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUROC [R] for weights [R, N]: the share of (positive, negative) pairs in the right order, half for ties."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # the first of each run of equal scores
    ranked = weights[:, order]
    up = np.add.reduceat(ranked * positive[order], starts, axis=1)
    down = np.add.reduceat(ranked * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(invalid="ignore"):
        return (up * below).sum(1) / (up.sum(1) * down.sum(1))


def _bootstrap(
    statistic: Statistic,
    y: NDArray[np.int64],
    predictions: Sequence[NDArray[np.float64]],
    patients: Sequence[str],
    seed: int,
    resamples: int,
) -> list[NDArray[np.float64]]:
    """The statistic of each set of predictions on the same resamples of patients, each [resamples]."""
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(patient) != len(y):
        raise ValueError(f"need a patient for each of the {len(y)} samples, not {len(patient)}")
    draws = generator(seed, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    step = max(1, _CELLS_AT_ONCE // max(1, len(y)))
    scores: list[list[NDArray[np.float64]]] = [[] for _ in predictions]
    for start in range(0, resamples, step):
        weights = draws[start : start + step, patient].astype(np.float64)
        for p, found in zip(predictions, scores, strict=True):
            found.append(statistic(y, p, weights))
    return [np.concatenate(found) for found in scores]


def _interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
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

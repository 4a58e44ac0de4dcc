"""DeLong's test of two AUROCs on the same samples, for whole patients and for several classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require
from gigatome.evaluation.metrics import Difference

_PURPOSE = "compare results"


@dataclass(frozen=True, eq=False)
class Delong:
    """AUROCs of several sets of predictions of the same samples.

    Attributes:
        auroc: float64 [M], as :func:`~gigatome.evaluation.metrics.auroc`.
        covariance: float64 [M, M], of them over samples of patients.
    """

    auroc: NDArray[np.float64]
    covariance: NDArray[np.float64]


def delong(y: ArrayLike, predictions: Sequence[ArrayLike], patients: Sequence[str]) -> Delong:
    """AUROCs and their covariance, without resampling.

    Source: DeLong et al., "Comparing the areas under two or more correlated receiver operating characteristic curves",
    Biometrics 44, 1988; samples of one patient are summed as in Obuchowski, Biometrics 53, 1997. Differs: the macro
    mean of several classes is the mean of their components.

    Args:
        y: labels [N], 0 … C − 1.
        predictions: M times scores [N] of class 1, or [N, C].
        patients: patient of each sample.

    Raises:
        EvaluationError: a class has fewer than two patients, or all samples.
    """
    y = np.asarray(y, np.int64)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(patient) != len(y):
        raise ValueError(f"need a patient for each of the {len(y)} samples, not {len(patient)}")
    aurocs, influences = zip(*(_influence(y, p, patient, len(names)) for p in predictions), strict=True)
    stacked = np.stack(influences)
    return Delong(np.array(aurocs), stacked @ stacked.T)


def delong_test(
    y: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: Sequence[str],
    *,
    level: float = 0.95,
    inflation: float = 1.0,
) -> Difference:
    """Difference in AUROC, its normal interval and two-sided p; ``inflation`` multiplies the variance.

    Arguments as :func:`~gigatome.evaluation.metrics.paired_difference`.
    """
    found = delong(y, [first, second], patients)
    contrast = np.array([1.0, -1.0])
    value, variance = float(contrast @ found.auroc), float(contrast @ found.covariance @ contrast) * inflation
    if variance <= 1e-24:  # the same order of all samples, or no spread of it
        return Difference(value, (value, value), 1.0 if abs(value) < 1e-12 else 0.0)
    special = require("scipy.special", "learn", _PURPOSE)
    reach = float(special.ndtri((1 + level) / 2)) * variance**0.5
    return Difference(value, (value - reach, value + reach), float(2 * special.ndtr(-abs(value) / variance**0.5)))


def _influence(
    y: NDArray[np.int64], p: ArrayLike, patient: NDArray[np.int64], count: int
) -> tuple[float, NDArray[np.float64]]:
    """The AUROC, and how much each patient moves it, [patients]; the sum of squares is its variance."""
    p = np.asarray(p, np.float64)
    if not np.isfinite(p).all():
        raise EvaluationError("some predictions are not finite; look for embeddings that are not")
    columns = [(1, p)] if p.ndim == 1 else [(1, p[:, 1])] if p.shape[1] == 2 else list(enumerate(p.T))
    aurocs, parts = zip(*(_one_class(y == c, score, patient, count, c) for c, score in columns), strict=True)
    return float(np.mean(aurocs)), np.mean(parts, axis=0)


def _one_class(
    case: NDArray[np.bool_], score: NDArray[np.float64], patient: NDArray[np.int64], count: int, name: int
) -> tuple[float, NDArray[np.float64]]:
    up, down = score[case], score[~case]
    groups = [np.unique(patient[mask]) for mask in (case, ~case)]
    if min(map(len, groups)) < 2:
        raise EvaluationError(f"DeLong's test needs two patients with and two without class {name}")
    below = _below(down, up) / len(down)  # of each case, the share of controls that it beats
    above = 1 - _below(up, down) / len(up)
    auroc = float(below.mean())
    part = np.zeros(count)
    for mask, values, members in ((case, below, groups[0]), (~case, above, groups[1])):
        moved = np.bincount(patient[mask], values - auroc, count) / mask.sum()
        part += moved * (len(members) / (len(members) - 1)) ** 0.5
    return auroc, part


def _below(known: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of ``known`` lie below each score, half for ties."""
    known = np.sort(known)
    return (np.searchsorted(known, score, side="left") + np.searchsorted(known, score, side="right")) / 2

"""Whether of the slides that are given 70 %, seven in ten have the class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require
from gigatome.core.logs import log
from gigatome.evaluation.metrics import bootstrap

_EDGE = 1e-12  # probabilities are kept this far from 0 and 1 where their logit is taken


@dataclass(frozen=True, eq=False)
class Reliability:
    """A calibration curve: what was predicted and what was so, bin by bin; empty bins are left out.

    Attributes:
        predicted: float64 [bins], mean probability.
        observed: float64 [bins], share that has the class.
        low: float64 [bins], lower bound of the 95 % band of ``observed``.
        high: float64 [bins], upper bound.
        n: int64 [bins], samples.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """Logistic recalibration of probabilities, with 95 % intervals.

    Attributes:
        slope: of the outcome on the logit; 1 is right, below 1 too sure of itself.
        slope_ci: its interval.
        intercept: on the logit scale, with the slope held at 1; 0 is right, above 0 says the class too seldom.
        intercept_ci: its interval.
    """

    slope: float
    slope_ci: tuple[float, float]
    intercept: float
    intercept_ci: tuple[float, float]


def reliability(
    y: ArrayLike,
    p: ArrayLike,
    *,
    bins: int = 10,
    by: Literal["quantile", "width"] = "quantile",
    patients: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Reliability:
    """Predicted and observed shares in bins of the probability.

    Args:
        y: whether each sample has the class, [N].
        p: probability of it, [N]; of several classes, call once for each.
        bins: how many, at most.
        by: bins of as many samples each, or of the same width.
        patients: patient of each sample, for a bootstrap band over patients; without, the band is Wilson's for
            independent samples. Where the resamples do not vary it is Wilson's with the number of the bin's patients.
        seed: of the resampling.
        resamples: how many.
        level: coverage of the band.

    Raises:
        EvaluationError: a probability is none, or there are no samples.
    """
    y, p = _checked(y, p)
    if bins < 1:
        raise EvaluationError(f"a calibration curve needs at least one bin, not {bins}")
    shares = np.arange(1, bins) / bins
    edges = np.unique(np.quantile(p, shares) if by == "quantile" else shares)
    place = np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1]
    n = np.bincount(place)
    observed, predicted = np.bincount(place, y) / n, np.bincount(place, p) / n
    independent = n
    if patients is not None:
        pairs = np.unique(np.stack([place, np.unique(np.asarray(patients), return_inverse=True)[1]]), axis=1)
        independent = np.bincount(pairs[0])
    low, high = _wilson(observed, independent, level)
    if patients is not None:
        member = (place[:, None] == np.arange(len(n))).astype(np.float64)
        with np.errstate(invalid="ignore"):
            drawn = bootstrap(
                lambda w: (w @ (member * y[:, None])) / (w @ member), patients, seed=seed, resamples=resamples
            )
        for k, values in enumerate(drawn.T):
            valid = values[np.isfinite(values)]
            if len(valid) and np.ptp(valid) > 0:
                low[k], high[k] = np.quantile(valid, [(1 - level) / 2, (1 + level) / 2])
    return Reliability(predicted, observed, low, high, n.astype(np.int64))


def expected_calibration_error(y: ArrayLike, p: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between what was predicted and what was so, over bins of equal width weighed by their samples.

    Source: Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", 2015; for several classes
    the confidence in the predicted class, as Guo et al., arXiv:1706.04599.

    Args:
        y: labels [N], 0 … C − 1.
        p: probabilities [N] of class 1, or [N, C].
        bins: how many.
    """
    p = np.asarray(p, np.float64)
    if p.ndim == 2:
        y, p = np.asarray(y) == p.argmax(1), p.max(1)
    found = reliability(y, p, bins=bins, by="width")
    return float(np.abs(found.predicted - found.observed) @ found.n / found.n.sum())


def calibration(
    y: ArrayLike, p: ArrayLike, *, patients: Sequence[str] | None = None, level: float = 0.95
) -> Calibration:
    """Slope and intercept of the outcome on the logit of its probability, with Wald intervals.

    Source: Cox, "Two further applications of a model for binary regression", 1958; Steyerberg, "Clinical prediction
    models", §15.3. With patients, standard errors are those of Liang and Zeger, "Longitudinal data analysis using
    generalized linear models", Biometrika 73, 1986, which hold for samples that are alike within a patient.

    Args:
        y: whether each sample has the class, [N].
        p: probability of it, [N].
        patients: patient of each sample; without, samples are independent.
        level: coverage of the intervals.

    Returns:
        NaN, with a warning, where the classes are perfectly separated and there is no slope.

    Raises:
        EvaluationError: all samples or none have the class, or a probability is none.
    """
    y, p = _checked(y, p)
    if y.all() or not y.any():
        raise EvaluationError("calibration needs samples with and without the class")
    p = np.clip(p, _EDGE, 1 - _EDGE)
    logit = np.log(p / (1 - p))
    reach = float(require("scipy.special", "learn", "measure calibration").ndtri((1 + level) / 2))
    whose = None if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    both = _fit(np.stack([np.ones(len(y)), logit], axis=1), y, np.zeros(len(y)), whose)
    shift = _fit(np.ones((len(y), 1)), y, logit, whose)
    slope, slope_error = (both[0][1], both[1][1]) if both else (np.nan, np.nan)
    start, start_error = (shift[0][0], shift[1][0]) if shift else (np.nan, np.nan)
    if both is None:
        log.warning("the probabilities separate the classes or are all equal: there is no calibration slope")
    return Calibration(
        slope=float(slope),
        slope_ci=(float(slope - reach * slope_error), float(slope + reach * slope_error)),
        intercept=float(start),
        intercept_ci=(float(start - reach * start_error), float(start + reach * start_error)),
    )


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], offset: NDArray[np.float64], patient: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Coefficients and standard errors of a logistic regression [N, K] without penalty; None without an optimum."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(offset + x @ beta, -500, 500)))
        information = (x.T * (p * (1 - p))) @ x
        if np.linalg.cond(information) > 1e12:
            return None
        move = np.linalg.solve(information, x.T @ (y - p))
        beta = beta + move * min(1.0, 4.0 / max(float(np.abs(move).max()), 1e-300))
        if np.abs(move).max() < 1e-10 * (1 + np.abs(beta).max()):
            covariance = np.linalg.inv(information)
            if patient is not None:
                scores = np.zeros((patient.max() + 1, x.shape[1]))
                np.add.at(scores, patient, x * (y - p)[:, None])
                covariance = covariance @ scores.T @ scores @ covariance
            return beta, np.sqrt(np.diag(covariance))
        if np.abs(beta).max() > 1e6:
            return None
    return None


def _checked(y: ArrayLike, p: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"need outcomes and probabilities [N], not {y.shape} and {p.shape}")
    if not len(y):
        raise EvaluationError("calibration needs samples")
    if not np.isin(y, (0, 1)).all() or not ((p >= 0) & (p <= 1)).all():
        raise EvaluationError("outcomes are 0 or 1 and probabilities from 0 to 1; these are not")
    return y, p


def _wilson(
    share: NDArray[np.float64], n: NDArray[np.int64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's interval of a share of n."""
    z = float(require("scipy.special", "learn", "measure calibration").ndtri((1 + level) / 2))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(middle - reach, 0.0), np.minimum(middle + reach, 1.0)

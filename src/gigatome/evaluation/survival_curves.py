"""Kaplan–Meier curves and log-rank tests; arguments as in :mod:`~gigatome.evaluation.survival`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require

_PURPOSE = "evaluate survival"


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """A Kaplan–Meier curve, a step at each time at which anyone died or left.

    Attributes:
        times: float64 [T], rising.
        survival: float64 [T], from this time on until the next.
        low: float64 [T], lower bound of its pointwise interval; NaN once nobody is left.
        high: float64 [T], upper bound.
        at_risk: float64 [T], weight of those followed until this time.
        events: float64 [T], weight of the events at it.
        censored: float64 [T], weight of those followed no longer.
    """

    times: NDArray[np.float64]
    survival: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    at_risk: NDArray[np.float64]
    events: NDArray[np.float64]
    censored: NDArray[np.float64]

    @property
    def median(self) -> float:
        """First time at which half are dead; infinite if follow-up does not reach it."""
        reached = np.flatnonzero(self.survival <= 0.5 + 1e-12)
        return float(self.times[reached[0]]) if len(reached) else float("inf")

    def at(self, times: ArrayLike) -> NDArray[np.float64]:
        """Survival at ``times``."""
        place = np.searchsorted(self.times, np.asarray(times, np.float64), side="right")
        return np.r_[1.0, self.survival][place]

    def at_risk_at(self, times: ArrayLike) -> NDArray[np.float64]:
        """Weight of those still followed just before ``times``, as printed below a figure."""
        place = np.searchsorted(self.times, np.asarray(times, np.float64), side="left")
        return np.r_[self.at_risk, 0.0][place]


@dataclass(frozen=True)
class LogRank:
    """A log-rank test of equal survival.

    Attributes:
        statistic: chi-squared.
        df: its degrees of freedom, groups − 1.
        p: two-sided.
        observed: events of each group.
        expected: those of equal survival.
    """

    statistic: float
    df: int
    p: float
    observed: tuple[float, ...]
    expected: tuple[float, ...]


def kaplan_meier(
    time: ArrayLike, event: ArrayLike, weights: ArrayLike | None = None, *, level: float = 0.95
) -> SurvivalCurve:
    """The Kaplan–Meier curve with Greenwood's variance and log-log pointwise intervals.

    Args:
        time: [N].
        event: [N].
        weights: how often each case counts, [N].
        level: coverage of the intervals.

    Raises:
        EvaluationError: there is nobody, or something is not finite.
    """
    time, event, w = checked(time, event, np.ones(np.shape(time)) if weights is None else weights)
    time, event, w = time[w > 0], event[w > 0], w[w > 0]
    if not len(time):
        raise EvaluationError("a survival curve needs at least one patient")
    unique, place = np.unique(time, return_inverse=True)
    died = np.asarray(np.bincount(place, w * event, len(unique)), np.float64)
    lost = np.asarray(np.bincount(place, w * ~event, len(unique)), np.float64)
    left = np.asarray(np.cumsum((died + lost)[::-1])[::-1], np.float64)
    survival = np.asarray(np.cumprod(1 - died / left), np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(died / (left * (left - died)))
        spread = _normal_quantile(level) * np.sqrt(greenwood) / np.log(survival)
        low, high = (np.where(survival == 1, 1.0, survival ** np.exp(sign * spread)) for sign in (-1, 1))
    gone = survival <= 0
    low, high = (np.where(gone, np.nan, bound) for bound in (low, high))
    return SurvivalCurve(unique, survival, low, high, left, died, lost)


def logrank(time: ArrayLike, event: ArrayLike, group: ArrayLike, *, strata: ArrayLike | None = None) -> LogRank:
    """Log-rank test of groups, stratified where ``strata`` are given.

    Source: Mantel, "Evaluation of survival data and two new rank order statistics", 1966; variance hypergeometric.

    Args:
        time: [N].
        event: [N].
        group: which group each belongs to, [N]; at least two.
        strata: [N]; events are expected within each stratum.

    Raises:
        EvaluationError: there is one group only, or something is not finite.
    """
    time, event, _ = checked(time, event)
    names, of = np.unique(np.asarray(group), return_inverse=True)
    if len(of) != len(time):
        raise ValueError(f"need a group for each of the {len(time)} cases, not {len(of)}")
    if len(names) < 2:
        raise EvaluationError("a log-rank test needs at least two groups")
    observed, expected = np.zeros(len(names)), np.zeros(len(names))
    covariance = np.zeros((len(names), len(names)))
    for member in members_of(strata, len(time)):
        t, dead, g = time[member], event[member], of[member]
        when = np.unique(t[dead])
        left = np.array([len(mine) - np.searchsorted(mine, when) for mine in _sorted_by(t, g, len(names))], np.float64)
        n = left.sum(0)
        d = np.bincount(np.searchsorted(when, t[dead]), minlength=len(when)).astype(np.float64)
        share = left / n
        observed += np.bincount(g[dead], minlength=len(names))
        expected += share @ d
        spread = d * (n - d) / np.maximum(n - 1, 1)
        covariance += np.diag(share @ spread) - (share * spread) @ share.T
    gap = (observed - expected)[:-1]
    statistic = float(gap @ np.linalg.pinv(covariance[:-1, :-1], hermitian=True) @ gap)
    p = float(require("scipy.special", "learn", _PURPOSE).chdtrc(len(names) - 1, statistic))
    return LogRank(statistic, len(names) - 1, p, tuple(observed.tolist()), tuple(expected.tolist()))


def checked(
    time: ArrayLike, event: ArrayLike, value: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Times float64 [N], events bool [N] and values float64 [N], zeros if none are given.

    Raises:
        EvaluationError: something is not finite, or an event is neither 0 nor 1.
    """
    time, event = np.asarray(time, np.float64), np.asarray(event)
    value = np.zeros(len(time)) if value is None else np.asarray(value, np.float64)
    if time.ndim != 1 or event.shape != time.shape or value.shape != time.shape:
        raise ValueError(f"need times, events and values [N], not {time.shape}, {event.shape} and {value.shape}")
    if not (np.isfinite(time).all() and np.isfinite(value).all()):
        raise EvaluationError("some times or risks are not finite; look for embeddings or times that are not")
    if not np.isin(event, (0, 1)).all():
        raise EvaluationError("an event is 0 or 1, or false or true")
    return time, event.astype(np.bool_), value


def members_of(strata: ArrayLike | None, count: int) -> list[NDArray[np.int64]]:
    """Rows of each stratum."""
    if strata is None:
        return [np.arange(count)]
    strata = np.asarray(strata)
    if len(strata) != count:
        raise ValueError(f"need a stratum for each of the {count} cases, not {len(strata)}")
    return [np.flatnonzero(strata == name) for name in np.unique(strata)]


def _sorted_by(t: NDArray[np.float64], g: NDArray[np.int64], groups: int) -> list[NDArray[np.float64]]:
    return [np.sort(t[g == k]) for k in range(groups)]


def _normal_quantile(level: float) -> float:
    return float(require("scipy.special", "learn", _PURPOSE).ndtri((1 + level) / 2))

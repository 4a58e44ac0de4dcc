"""Survival: how well risks order patients, and curves of who is alive when.

As in :mod:`~gigatome.evaluation.metrics`, a score takes weights [R, N] and returns R values, so that a bootstrap over
patients is one call. Risks of different folds' models have different scales: ``strata`` (the fold of each patient)
confines every comparison to pairs of one fold.

``time`` is float64 [N], to the event or to the end of follow-up, in any unit; ``event`` is bool [N]; a higher ``risk``
[N] means a shorter life.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.cox import hazard_ratio
from gigatome.evaluation.metrics import bootstrap, pair_sums, score_interval
from gigatome.evaluation.survival_curves import LogRank as LogRank
from gigatome.evaluation.survival_curves import SurvivalCurve as SurvivalCurve
from gigatome.evaluation.survival_curves import checked, logrank, members_of
from gigatome.evaluation.survival_curves import kaplan_meier as kaplan_meier
from gigatome.evaluation.survival_result import SurvivalFold, SurvivalPredictions, SurvivalScores

_TIED = 1e-8  # risks no further apart are equal
_CELLS_AT_ONCE = 4_000_000

Follow = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Times [N] and events [N]."""


def c_index(time: ArrayLike, event: ArrayLike, risk: ArrayLike, *, strata: ArrayLike | None = None) -> float:
    """Harrell's concordance: the share of comparable pairs in which the one who died first had the higher risk.

    A pair is comparable if one died before the other died or was lost; an event is comparable with a censored case of
    equal time, and not with an event of equal time. Risks within 1e-8 count one half.

    Source: Harrell et al., "Evaluating the yield of medical tests", JAMA 247, 1982; ties as scikit-survival.

    Returns:
        NaN if no pair is comparable.

    Raises:
        EvaluationError: something is not finite.
    """
    time, event, risk = checked(time, event, risk)
    return float(weighted_c_index(time, event, risk, np.ones((1, len(time))), strata=strata)[0])


def weighted_c_index(
    time: NDArray[np.float64],
    event: NDArray[np.bool_],
    risk: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    strata: ArrayLike | None = None,
    inverse: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """:func:`c_index` for each row of weights [R, N]: a pair counts as the product of its weights.

    Args:
        time: [N].
        event: [N].
        risk: [N].
        weights: [R, N].
        strata: only pairs of one stratum are compared, [N].
        inverse: a further weight for each event, [N], as :func:`uno_weights` gives.

    Returns:
        float64 [R], NaN where no pair is comparable.
    """
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for member in members_of(strata, len(time)):
        t, dead, r = time[member], event[member], risk[member]
        w = np.ascontiguousarray(weights[:, member])
        first = dead if inverse is None else dead & (inverse[member] > 0)
        first = np.flatnonzero(first)
        step = max(1, _CELLS_AT_ONCE // max(len(t), len(w)))
        for start in range(0, len(first), step):
            i = first[start : start + step]
            later = (t > t[i, None]) | ((t == t[i, None]) & ~dead)
            ahead = r[i, None] - r
            good = later * ((ahead > _TIED) + 0.5 * (np.abs(ahead) <= _TIED))
            mine = w[:, i] if inverse is None else w[:, i] * inverse[member][i]
            right += (mine * (w @ good.T)).sum(1)
            pairs += (mine * (w @ later.astype(np.float64).T)).sum(1)
    with np.errstate(invalid="ignore"):
        return right / pairs


def uno_c_index(
    train: Follow,
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    *,
    tau: float | None = None,
) -> float:
    """Uno's concordance, which does not depend on the censoring: each event counts 1 / G², G the chance to be seen.

    Source: Uno et al., "On the C-statistics for evaluating overall adequacy of risk prediction procedures with
    censored survival data", Statistics in Medicine 30, 2011.

    Args:
        train: times and events from which the censoring is estimated.
        time: [N].
        event: [N].
        risk: [N].
        tau: only events before this time count; see :func:`uno_weights`.

    Returns:
        NaN if no pair is comparable.
    """
    time, event, risk = checked(time, event, risk)
    inverse = uno_weights(train, time, event, tau=tau) ** 2
    return float(weighted_c_index(time, event, risk, np.ones((1, len(time))), inverse=inverse)[0])


def uno_weights(
    train: Follow, time: NDArray[np.float64], event: NDArray[np.bool_], *, tau: float | None = None
) -> NDArray[np.float64]:
    """One over the chance not to be censored until then, for each event; 0 for others.

    Events after the last time of ``train``, or where nobody of it is left uncensored, or not before ``tau``, count 0:
    nothing says how many of their like were lost. scikit-survival refuses those, and needs a ``tau``.

    Returns:
        float64 [N].
    """
    chance = censoring_survival(train, time)
    seen = event & (chance > 0) & (time <= np.max(train[0]))
    if tau is not None:
        seen &= time < tau
    return np.where(seen, 1 / np.where(chance > 0, chance, 1.0), 0.0)


def censoring_survival(train: Follow, times: ArrayLike) -> NDArray[np.float64]:
    """Chance not to be censored up to and including ``times``, by Kaplan–Meier; of one time, events come first."""
    time, event, _ = checked(*train)
    unique, place = np.unique(time, return_inverse=True)
    died = np.bincount(place, event, len(unique))
    lost = np.bincount(place, ~event, len(unique))
    left = np.cumsum((died + lost)[::-1])[::-1] - died
    chance = np.cumprod(1 - lost / np.where(left > 0, left, 1.0))
    return np.r_[1.0, chance][np.searchsorted(unique, np.asarray(times, np.float64), side="right")]


def auroc_at(
    train: Follow, time: ArrayLike, event: ArrayLike, risk: ArrayLike, times: ArrayLike
) -> NDArray[np.float64]:
    """Cumulative/dynamic AUROC: how well the risk tells who died by each of ``times`` from who lived longer.

    Source: Uno et al., "Evaluating prediction rules for t-year survivors with censored regression models", JASA 102,
    2007; Hung and Chiang, Canadian Journal of Statistics 38, 2010.

    Args:
        train: times and events from which the censoring is estimated.
        time: [N].
        event: [N].
        risk: [N].
        times: [T].

    Returns:
        float64 [T]; NaN at times by which nobody died, or after which nobody lived.
    """
    time, event, risk = checked(time, event, risk)
    inverse = uno_weights(train, time, event)
    return weighted_auroc_at(time, event, risk, np.ones((1, len(time))), np.atleast_1d(times), inverse)[0]


def weighted_auroc_at(
    time: NDArray[np.float64],
    event: NDArray[np.bool_],
    risk: NDArray[np.float64],
    weights: NDArray[np.float64],
    times: ArrayLike,
    inverse: NDArray[np.float64],
    *,
    strata: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """:func:`auroc_at` [R, T] for weights [R, N], with ``inverse`` [N] of :func:`uno_weights`, by strata."""
    times = np.asarray(times, np.float64)
    right, pairs = np.zeros((2, len(weights), len(times)))
    for member in members_of(strata, len(time)):
        w = weights[:, member]
        for k, t in enumerate(times):
            case = (time[member] <= t) & event[member]
            found = pair_sums(risk[member], w * (case * inverse[member]), w * (time[member] > t), _TIED)
            right[:, k] += found[0]
            pairs[:, k] += found[1]
    with np.errstate(invalid="ignore"):
        return right / pairs


def brier_at(
    train: Follow, time: ArrayLike, event: ArrayLike, survival: ArrayLike, times: ArrayLike
) -> NDArray[np.float64]:
    """Mean squared error of predicted survival [N, T] at ``times`` [T], float64 [T], corrected for censoring.

    Source: Graf et al., "Assessment and comparison of prognostic classification schemes for survival data", 1999.
    """
    time, event, _ = checked(time, event)
    survival, times = np.asarray(survival, np.float64), np.asarray(times, np.float64)
    if survival.shape != (len(time), len(times)):
        raise ValueError(f"need survival [{len(time)}, {len(times)}], not {survival.shape}")
    chance = censoring_survival(train, times)
    cases = (time[:, None] <= times) * uno_weights(train, time, event)[:, None]
    controls = (time[:, None] > times) / np.where(chance > 0, chance, np.inf)
    return np.mean(survival**2 * cases + (1 - survival) ** 2 * controls, axis=0)


def integrated_brier(train: Follow, time: ArrayLike, event: ArrayLike, survival: ArrayLike, times: ArrayLike) -> float:
    """:func:`brier_at` averaged over the span of ``times``, at least two, by the trapezoid rule."""
    times = np.asarray(times, np.float64)
    if len(times) < 2:
        raise EvaluationError("an integrated Brier score needs at least two times")
    return float(np.trapezoid(brier_at(train, time, event, survival, times), times) / (times[-1] - times[0]))


def score_survival(
    predictions: SurvivalPredictions,
    train: Sequence[Follow],
    *,
    times: Sequence[float] | None = None,
    seed: int,
    resamples: int = 2000,
    inflation: float = 1.0,
) -> SurvivalScores:
    """All scores of out-of-fold risks; pairs, curves and tests within folds, intervals over patients.

    With the ``inflation`` of cross-validation, the intervals are about what is expected of a head that learns from as
    many patients of this kind. In 8 kinds of simulated cohorts (60 to 240 patients, 8 or 64 dimensions, 5 or 10 folds,
    log hazard ratios of 0 to 1.2 a deviation, linear Cox, 200 cohorts each) they held the expected c-index in 97 to 100
    of 100 and hazard ratio in 98 to 100: they are wider than they need be. Without, in 89 to 96 and 83 to 95; about one
    fixed head on another cohort, in 92 to 94 and 94 to 96. In small strata a hazard ratio is somewhat too far from 1.

    Args:
        predictions: of every test unit.
        train: times and events of the training part of each fold, in order.
        times: at which to give the AUROC; by default the quartiles of the times of the events.
        seed: of the resampling.
        resamples: how many.
        inflation: factor on the variance of all scores, for the chance in which patients the heads learnt from, as
            :func:`~gigatome.evaluation.metrics.fold_inflation` gives; 1 for one fixed head.

    Raises:
        EvaluationError: nobody had the event.
    """
    rows = predictions
    if not rows.event.any():
        raise EvaluationError("all of the tested are censored: there is nothing to score; look at the event column")
    inverse = np.zeros(len(rows))
    for k in np.unique(rows.folds):
        mine = rows.folds == k
        inverse[mine] = uno_weights(train[k], rows.time[mine], rows.event[mine])
    at = np.quantile(rows.time[rows.event], [0.25, 0.5, 0.75]) if times is None else np.asarray(times, np.float64)

    def both(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        case = (rows.time, rows.event, rows.risk, weights)
        given = (None, inverse**2)
        return np.stack([weighted_c_index(*case, strata=rows.folds, inverse=w) for w in given], axis=1)

    one = np.ones((1, len(rows)))
    value = both(one)[0]
    drawn = bootstrap(both, rows.patients, seed=seed, resamples=resamples)
    c_ci, uno_ci = (score_interval(float(value[k]), drawn[:, k], inflation=inflation) for k in range(2))
    split = len(np.unique(rows.high)) == 2
    clusters = rows.patients if len(set(rows.patients)) < len(rows) else None
    ratio = hazard_ratio(rows.time, rows.event, rows.high, strata=rows.folds, clusters=clusters, inflation=inflation)
    return SurvivalScores(
        n=len(rows),
        events=int(rows.event.sum()),
        c_index=float(value[0]),
        c_index_ci=c_ci,
        uno=float(value[1]),
        uno_ci=uno_ci,
        times=tuple(at.tolist()),
        auroc_at=tuple(
            weighted_auroc_at(rows.time, rows.event, rows.risk, one, at, inverse, strata=rows.folds)[0].tolist()
        ),
        logrank_p=logrank(rows.time, rows.event, rows.high, strata=rows.folds).p if split else float("nan"),
        hazard_ratio=ratio.value,
        hazard_ratio_ci=ratio.ci,
    )


def score_folds(predictions: SurvivalPredictions, n_train: Sequence[int]) -> tuple[SurvivalFold, ...]:
    """Harrell's concordance of each fold; ``n_train`` says how many units each learnt from."""
    found: list[SurvivalFold] = []
    for k, count in enumerate(n_train):
        mine = predictions.folds == k
        time, event, risk = predictions.time[mine], predictions.event[mine], predictions.risk[mine]
        found.append(SurvivalFold(k, count, int(mine.sum()), int(event.sum()), c_index(time, event, risk)))
    return tuple(found)

"""Cox's regression on frozen embeddings: the linear probe of survival."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require
from gigatome.core.logs import log
from gigatome.evaluation.survival_curves import checked, members_of

_PURPOSE = "fit Cox's regression"


@dataclass(frozen=True)
class Cox:
    """Cox's proportional hazards with Efron's ties and an L2 penalty.

    The penalty grows with the number of features, so that the log-risk has the same spread beforehand whatever the
    encoder's width: a deviation of 1 / √penalty if features are independent and of unit variance. It is fixed in
    advance and not searched for, as that of the linear probe.

    Attributes:
        penalty: strength for each feature, above 0.
        scale: standardise each feature with the mean and deviation of the training samples.
        max_iter: most Newton steps.
    """

    penalty: float = 1.0
    scale: bool = True
    max_iter: int = 100

    def __post_init__(self):
        if self.penalty <= 0 or self.max_iter < 1:
            raise EvaluationError(f"Cox needs penalty > 0 and max_iter ≥ 1, not {self.penalty} and {self.max_iter}")


@dataclass(frozen=True, eq=False)
class FittedCox:
    """Cox's regression that has learnt; made by :func:`fit_cox`.

    Attributes:
        options: as it was fitted.
        coefficients: float64 [D], for embeddings as they come.
        mean: float64 [D], the embedding of log-risk 0.
        median: median log-risk of the training samples, above which a risk is high.
    """

    options: Cox
    coefficients: NDArray[np.float64]
    mean: NDArray[np.float64]
    median: float

    def predict(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """Log-risk float64 [M] of embeddings [M, D]; higher for a shorter life.

        Raises:
            EvaluationError: the embeddings have another width than those it learnt from.
        """
        if np.ndim(x) != 2 or np.shape(x)[1] != len(self.mean):
            raise EvaluationError(
                f"this probe takes embeddings [M, {len(self.mean)}], not {np.shape(x)}; is it of this encoder?"
            )
        return (np.asarray(x, np.float64) - self.mean) @ self.coefficients

    def saved(self) -> dict[str, Any]:
        """Options as JSON holds them; for :meth:`from_tensors`."""
        return {"kind": "cox", **asdict(self.options)}

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """What it learnt, to be saved without pickle."""
        return {"coefficients": self.coefficients, "mean": self.mean, "median": np.asarray(self.median)}

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> "FittedCox":
        """The regression of :meth:`saved` and :meth:`tensors`.

        Raises:
            EvaluationError: they are not of one.
        """
        given = {name: value for name, value in options.items() if name != "kind"}
        if options.get("kind") != "cox" or set(tensors) != {"coefficients", "mean", "median"}:
            raise EvaluationError(f"these are not the options and tensors of Cox's regression: {dict(options)}")
        try:
            known = Cox(**given)
        except TypeError as error:
            raise EvaluationError(f"these are not the options of Cox's regression: {dict(options)}") from error
        return cls(known, np.asarray(tensors["coefficients"]), np.asarray(tensors["mean"]), float(tensors["median"]))


def fit_cox(options: Cox, x: NDArray[np.floating], time: ArrayLike, event: ArrayLike) -> FittedCox:
    """Maximises the partial likelihood less penalty · D / 2 · |coefficients|².

    Source: Cox, "Regression models and life-tables", 1972; ties as Efron, "The efficiency of Cox's likelihood function
    for censored data", 1977.

    Args:
        options: penalty and scaling.
        x: training embeddings [N, D].
        time: to event or censoring, [N].
        event: whether the event was seen, [N].

    Raises:
        EvaluationError: all are censored, or something is not finite.
    """
    time, event, _ = checked(time, event)
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) != len(time):
        raise ValueError(f"need embeddings [{len(time)}, D], not {x.shape}")
    if not np.isfinite(x).all():
        raise EvaluationError("some training embeddings are not finite; leave those slides out")
    if not event.any():
        raise EvaluationError("all training samples are censored: Cox's regression has nothing to learn from")
    mean, deviation = x.mean(0), x.std(0)
    deviation = np.where(deviation <= 1e-10 * np.abs(mean), np.inf, deviation)  # a constant feature has no coefficient
    z = (x - mean) / deviation if options.scale else x - mean
    back = None
    if len(z) < z.shape[1]:  # the optimum lies in the span of the samples: regress there
        values, vectors = np.linalg.eigh(z @ z.T)
        kept = values > 1e-12 * max(values[-1], 1e-300)
        root = np.sqrt(values[kept])
        z, back = vectors[:, kept] * root, z.T @ (vectors[:, kept] / root)
    beta = _maximise(z, time, event, options.penalty * x.shape[1], options.max_iter)
    beta = beta if back is None else back @ beta
    coefficients = np.asarray(beta / deviation if options.scale else beta, np.float64)
    return FittedCox(options, coefficients, mean, float(np.median((x - mean) @ coefficients)))


def log_likelihood(time: ArrayLike, event: ArrayLike, risk: ArrayLike) -> float:
    """Cox's partial log-likelihood of log-risks [N], Efron's ties."""
    time, event, risk = checked(time, event, risk)
    ties = _Ties(time, event)
    return ties.value(risk[ties.order])


@dataclass(frozen=True)
class HazardRatio:
    """How many times as often those die whose covariate is one higher.

    Attributes:
        value: e to the power of Cox's coefficient.
        ci: its Wald interval.
    """

    value: float
    ci: tuple[float, float]


def hazard_ratio(
    time: ArrayLike,
    event: ArrayLike,
    x: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    inflation: float = 1.0,
    level: float = 0.95,
) -> HazardRatio:
    """Cox's regression on one covariate without a penalty, such as a group, or a risk in deviations.

    Source: Cox, "Regression models and life-tables", 1972, Efron's ties; for clusters the robust variance of Lin and
    Wei, "The robust inference for the Cox proportional hazards model", JASA 84, 1989.

    Args:
        time: to event or censoring, [N].
        event: whether the event was seen, [N].
        x: covariate, [N]; a bool compares true with false.
        strata: each has a hazard of its own, [N].
        clusters: the patient of each sample, [N], where patients have several.
        inflation: factor on the variance of the coefficient, for what it does not know of.
        level: coverage of the interval.

    Returns:
        NaN if nothing is compared, as where all are in one group; infinite or 0, with no interval, if at each event
        the highest, or lowest, of those at risk died.

    Raises:
        EvaluationError: something is not finite.
    """
    time, event, x = checked(time, event, x)
    if clusters is not None and len(clusters) != len(time):
        raise ValueError(f"need a cluster for each of the {len(time)} samples, not {len(clusters)}")
    reach = float(np.ptp(x)) if len(x) else 0.0
    z = (x - x.min()) / reach if reach > 0 else np.zeros(len(x))
    groups = [rows for rows in members_of(strata, len(time)) if event[rows].any()]
    cases = [(ties, z[rows][ties.order]) for rows in groups for ties in [_Ties(time[rows], event[rows])]]
    above = sum(float(np.sum(np.maximum.accumulate(z)[t.last] - z[t.dead])) for t, z in cases)
    below = sum(float(np.sum(z[t.dead] - np.minimum.accumulate(z)[t.last])) for t, z in cases)
    if above == 0 or below == 0:
        value = float("nan") if above == below else (float("inf") if above == 0 else 0.0)
        return HazardRatio(value, (float("nan"), float("nan")))
    beta, information = _single_coefficient(cases)
    variance = 1 / information
    if clusters is not None:
        residual = np.zeros(len(time))
        for rows, (ties, values) in zip(groups, cases, strict=True):
            residual[rows[ties.order]] = _residuals(ties, values, beta)
        _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
        variance = float(np.sum(np.bincount(cluster, residual) ** 2)) / information**2
    wide = NormalDist().inv_cdf((1 + level) / 2) * (variance * inflation) ** 0.5
    low, value, high = (float(np.exp(b / reach)) for b in (beta - wide, beta, beta + wide))
    return HazardRatio(value, (low, high))


class _Ties:
    """The risk sets of a cohort sorted by time from the last to the first, and Efron's term of each event."""

    def __init__(self, time: NDArray[np.float64], event: NDArray[np.bool_]):
        self.order = np.lexsort((~event, -time))
        time, self.event = time[self.order], event[self.order]
        dead = np.flatnonzero(self.event)
        _, first, place, count = np.unique(-time[dead], return_index=True, return_inverse=True, return_counts=True)
        self.start = dead[first]  # row of the first event of each tied time
        self.group = place  # tied time of each event
        self.share = (np.arange(len(dead)) - first[place]) / count[place]  # what Efron takes of the tied
        self.dead = dead
        self.last = np.searchsorted(-time, -time[dead], side="right") - 1  # row that ends the risk set of each event

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of ``values`` [N, …] over the risk set of each event less Efron's share of the tied, [events, …]."""
        tied = np.add.reduceat(values[self.dead], np.searchsorted(self.dead, self.start), axis=0)[self.group]
        share = self.share.reshape(-1, *([1] * (values.ndim - 1)))
        return np.cumsum(values, axis=0)[self.last] - share * tied

    def spread(self, inverse: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each sample [N] the sum of ``inverse`` [events] over the risk sets that it is in, less Efron's share."""
        ends = np.bincount(self.last, inverse, len(self.event))
        total = np.cumsum(ends[::-1])[::-1].astype(np.float64)
        total[self.dead] -= np.bincount(self.group, inverse * self.share)[self.group]
        return np.asarray(total, np.float64)

    def value(self, risk: NDArray[np.float64]) -> float:
        top = risk.max()
        return float(np.sum(risk[self.dead] - top) - np.sum(np.log(self.sums(np.exp(risk - top)))))


def _maximise(
    z: NDArray[np.float64], time: NDArray[np.float64], event: NDArray[np.bool_], penalty: float, max_iter: int
) -> NDArray[np.float64]:
    ties = _Ties(time, event)
    z = z[ties.order]
    beta = np.zeros(z.shape[1])
    linalg = require("scipy.linalg", "learn", _PURPOSE)
    value = ties.value(z @ beta)
    for _ in range(max_iter):
        risk = z @ beta
        hazard = np.exp(risk - risk.max())
        inverse = 1 / ties.sums(hazard)
        expected = hazard * ties.spread(inverse)
        gradient = z.T @ (ties.event - expected) - penalty * beta
        means = ties.sums(hazard[:, None] * z) * inverse[:, None]
        hessian = (z.T * expected) @ z - means.T @ means
        hessian[np.diag_indices(len(beta))] += penalty
        move = linalg.solve(hessian, gradient, assume_a="pos")
        gain, length = float(gradient @ move), 1.0
        while True:
            tried = beta + length * move
            new = ties.value(z @ tried) - penalty / 2 * float(tried @ tried)
            if new >= value + 1e-4 * length * gain - 1e-10 * abs(value) or length < 1e-6:
                break
            length /= 2
        beta, value = tried, new
        if gain <= 1e-12 * (1 + abs(value)):
            return beta
    log.warning("Cox's regression has not converged in %d steps; raise max_iter or penalty", max_iter)
    return beta


_Case = tuple[_Ties, NDArray[np.float64]]
"""The risk sets of a stratum, and the covariate [N] in their order."""


def _single_coefficient(cases: Sequence[_Case]) -> tuple[float, float]:
    """Coefficient of one covariate from 0 to 1, which must be finite, and the information there."""
    low, high, beta = -np.inf, np.inf, 0.0
    while True:
        gradient = information = 0.0
        for ties, z in cases:
            hazard = np.exp(beta * z - max(beta, 0.0))
            total = ties.sums(hazard)
            mean, square = ties.sums(hazard * z) / total, ties.sums(hazard * z**2) / total
            gradient += float(np.sum(z[ties.dead] - mean))
            information += float(np.sum(square - mean**2))
        move = float(np.clip(gradient / max(information, 1e-300), -2.0, 2.0))
        if abs(move) <= 1e-10 * (1 + abs(beta)):
            return beta, information
        low, high = (beta, high) if gradient > 0 else (low, beta)  # the gradient falls: a bracket of its zero
        new = beta + move if low < beta + move < high else (low + high) / 2
        if abs(new - beta) <= 1e-10 * (1 + abs(beta)):
            return beta, information
        beta = new


def _residuals(ties: _Ties, z: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """What each sample [N], in the order of ``ties``, adds to the gradient, with the chance in who is at risk."""
    hazard = np.exp(beta * z - max(beta, 0.0))
    total = ties.sums(hazard)
    mean = ties.sums(hazard * z) / total
    residual = -hazard * (z * ties.spread(1 / total) - ties.spread(mean / total))
    residual[ties.dead] += z[ties.dead] - (np.bincount(ties.group, mean) / np.bincount(ties.group))[ties.group]
    return residual

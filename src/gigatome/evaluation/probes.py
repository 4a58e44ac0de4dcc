"""Simple classifiers on frozen embeddings; :mod:`~gigatome.evaluation.cox` has the one for survival."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require
from gigatome.evaluation.logistic import LARGE, fit_logistic, probabilities

_PURPOSE = "evaluate embeddings"


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression with an L2 penalty, multinomial for several classes.

    ``C`` is fixed in advance and not searched for: with the few patients of most cohorts a search costs more in
    honesty than it brings.

    Attributes:
        C: inverse strength of the penalty, on features of unit variance if ``scale``.
        scale: standardise each feature with the mean and deviation of the training samples.
        balanced: weigh classes by the inverse of their frequency. Probabilities then are those of equally frequent
            classes.
        max_iter: most steps of the solver.
    """

    C: float = 1.0
    scale: bool = True
    balanced: bool = False
    max_iter: int = 1000

    def __post_init__(self):
        if self.C <= 0 or self.max_iter < 1:
            raise EvaluationError(f"a linear probe needs C > 0 and max_iter ≥ 1, not {self.C} and {self.max_iter}")


@dataclass(frozen=True)
class Knn:
    """The nearest neighbours vote, each with the same weight.

    Attributes:
        k: how many.
        metric: ``"cosine"`` or ``"euclidean"`` distance.
    """

    k: int = 5
    metric: Literal["cosine", "euclidean"] = "cosine"

    def __post_init__(self):
        if self.k < 1 or self.metric not in ("cosine", "euclidean"):
            raise EvaluationError(f"kNN needs k ≥ 1 and metric cosine or euclidean, not {self.k} and {self.metric}")


@dataclass(frozen=True)
class Prototype:
    """The nearest class mean, which needs no more than one training sample a class.

    Probabilities are the softmax of the similarities to the class means over ``temperature``.

    Source: Snell et al., "Prototypical networks for few-shot learning", 2017; centred as Wang et al., "SimpleShot",
    arXiv:1911.04623.

    Attributes:
        metric: ``"cosine"`` similarity, or minus the squared ``"euclidean"`` distance over its mean in training.
        center: subtract the mean of the training samples first.
        temperature: above 0.
    """

    metric: Literal["cosine", "euclidean"] = "cosine"
    center: bool = True
    temperature: float = 0.1

    def __post_init__(self):
        if self.metric not in ("cosine", "euclidean") or self.temperature <= 0:
            raise EvaluationError(
                f"a prototype needs metric cosine or euclidean and temperature > 0, not {self.metric} and "
                f"{self.temperature}"
            )


Probe = LinearProbe | Knn | Prototype

_KINDS = MappingProxyType({"linear": LinearProbe, "knn": Knn, "prototype": Prototype})

PROBES = MappingProxyType(
    {
        "linear": LinearProbe(),
        "knn": Knn(),
        # Source: Giga-SSL, linear evaluation script: no scaling, balanced class weights.
        "giga": LinearProbe(C=10.0, scale=False, balanced=True),
        # Source: HIPT, 3-Self-Supervised-Eval: scikit-learn's defaults on the mean of a slide's vectors.
        "hipt": Knn(k=5, metric="euclidean"),
        "prototype": Prototype(),
    }
)
"""Probes by name."""


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A probe that has learnt; made by :func:`fit_probe`.

    Attributes:
        probe: which classifier.
        classes: how many classes there are.
        arrays: what it learnt, by name.
    """

    probe: Probe
    classes: int
    arrays: Mapping[str, NDArray[Any]]

    def predict(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities float64 [M, classes] of embeddings [M, D].

        Raises:
            EvaluationError: the embeddings have another width than those it learnt from.
        """
        known = self.arrays["coefficients" if isinstance(self.probe, LinearProbe) else "mean"]
        width = known.shape[0]
        if np.ndim(x) != 2 or np.shape(x)[1] != width:
            raise EvaluationError(
                f"this probe takes embeddings [M, {width}], not {np.shape(x)}; is it of this encoder?"
            )
        x = _floating(x)
        if isinstance(self.probe, LinearProbe):
            return probabilities(x @ self.arrays["coefficients"] + self.arrays["intercept"])
        return _vote(self.probe, self, x) if isinstance(self.probe, Knn) else _nearest(self.probe, self, x)

    def options(self) -> dict[str, Any]:
        """Kind, number of classes and options, as JSON holds them; for :meth:`from_tensors`."""
        kind, _ = find_probe(self.probe)
        return {"kind": kind, "classes": self.classes, **asdict(self.probe)}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What it learnt, contiguous, to be saved without pickle."""
        return {name: np.ascontiguousarray(value) for name, value in self.arrays.items()}

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> "FittedProbe":
        """The probe of :meth:`options` and :meth:`tensors`.

        Raises:
            EvaluationError: they are not of a probe.
        """
        given = dict(options)
        kind, classes = given.pop("kind", None), given.pop("classes", 0)
        try:
            probe = _KINDS[kind](**given)  # type: ignore[index]
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"these are not the options of a probe: {dict(options)}") from error
        wanted = _ARRAYS[kind]  # type: ignore[index]
        if set(tensors) != wanted:
            raise EvaluationError(f"a {kind} probe has {', '.join(sorted(wanted))}, not {', '.join(sorted(tensors))}")
        return cls(probe, int(classes), dict(tensors))


_ARRAYS = MappingProxyType(
    {
        "linear": frozenset(("coefficients", "intercept")),
        "knn": frozenset(("x", "y", "mean")),
        "prototype": frozenset(("prototypes", "mean", "spread")),
    }
)


def find_probe(head: str | Probe) -> tuple[str, Probe]:
    """Name and options of a probe; raises :class:`EvaluationError` for a name that is not in :data:`PROBES`."""
    if not isinstance(head, str):
        return next(name for name, kind in _KINDS.items() if isinstance(head, kind)), head
    if head not in PROBES:
        raise EvaluationError(f"there is no head {head}; there are {', '.join(PROBES)}")
    return head, PROBES[head]


def fit_predict(
    probe: Probe, x: NDArray[np.floating], y: NDArray[np.int64], x_test: NDArray[np.floating], classes: int
) -> NDArray[np.float64]:
    """Learns from training samples and predicts test samples; everything is fitted to the training samples alone.

    Args:
        probe: which classifier.
        x: training embeddings [N, D].
        y: their labels [N], 0 … classes − 1; every class present.
        x_test: test embeddings [M, D].
        classes: how many classes there are.

    Returns:
        Probabilities float64 [M, classes].

    Raises:
        EvaluationError: a class has no training sample, or there are fewer of them than neighbours.
    """
    return fit_probe(probe, x, y, classes).predict(x_test)


def fit_probe(probe: Probe, x: NDArray[np.floating], y: NDArray[np.int64], classes: int) -> FittedProbe:
    """Learns from training samples alone.

    Args:
        probe: which classifier.
        x: training embeddings [N, D].
        y: their labels [N], 0 … classes − 1; every class present.
        classes: how many classes there are, at least 2.

    Raises:
        EvaluationError: a class has no training sample, there are fewer samples than neighbours, or an embedding is
            not finite.
    """
    y = np.asarray(y)
    missing = np.setdiff1d(np.arange(classes), y)
    if len(missing):
        raise EvaluationError(f"class {missing[0]} has no training sample; use other folds")
    if classes < 2:
        raise EvaluationError("a probe needs at least two classes")
    x = _floating(x)
    if not np.isfinite(np.einsum("nd->n", x)).all():
        raise EvaluationError("some training embeddings are not finite; leave those slides out")
    if isinstance(probe, LinearProbe):
        return FittedProbe(probe, classes, _linear(probe, x, y, classes))
    if isinstance(probe, Prototype):
        return FittedProbe(probe, classes, _prototypes(probe, x, y, classes))
    if len(x) < probe.k:
        raise EvaluationError(
            f"{probe.k} nearest neighbours among {len(x)} training samples are too many; use a smaller k"
        )
    # on the unit sphere, Euclidean order is cosine order
    arrays = {"x": _unit(x) if probe.metric == "cosine" else x, "y": y.astype(np.int64), "mean": np.zeros(x.shape[1])}
    return FittedProbe(probe, classes, arrays)


def _floating(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """In float64, or as it is if it is large."""
    x = np.asarray(x)
    return x if x.dtype == np.float32 and x.size > LARGE else x.astype(np.float64, copy=False)


def _linear(
    probe: LinearProbe, x: NDArray[np.floating], y: NDArray[np.int64], classes: int
) -> dict[str, NDArray[np.float64]]:
    """Coefficients [D, K] and intercepts [K] for embeddings as they come, the scaling within them."""
    mean, deviation = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if probe.scale:
        mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        deviation[deviation <= 1e-10 * np.abs(mean)] = np.inf  # a constant feature says nothing: no coefficient
        if x.dtype == np.float32:  # rounding is no spread
            deviation[deviation <= 1e-6 * np.abs(mean)] = np.inf
        x = (x - mean.astype(x.dtype)) / deviation.astype(x.dtype)
    weights = len(y) / (classes * np.bincount(y, minlength=classes))[y] if probe.balanced else None
    coefficients, intercept = fit_logistic(x, y, classes, penalty=1 / probe.C, weights=weights, max_iter=probe.max_iter)
    coefficients = coefficients / deviation[:, None]
    return {"coefficients": coefficients, "intercept": intercept - mean @ coefficients}


def _prototypes(
    probe: Prototype, x: NDArray[np.floating], y: NDArray[np.int64], classes: int
) -> dict[str, NDArray[np.float64]]:
    mean = x.mean(0, dtype=np.float64) if probe.center else np.zeros(x.shape[1])
    x = x - mean
    x = _unit(x) if probe.metric == "cosine" else x
    prototypes = np.stack([x[y == c].mean(0) for c in range(classes)])
    spread = np.asarray(((x - prototypes[y]) ** 2).sum(1).mean())
    if probe.metric == "cosine" or spread <= 0:
        spread = np.ones(())
    return {"prototypes": prototypes, "mean": mean, "spread": spread}


def _nearest(probe: Prototype, fitted: FittedProbe, x: NDArray[np.floating]) -> NDArray[np.float64]:
    x, prototypes = x - fitted.arrays["mean"], fitted.arrays["prototypes"]
    if probe.metric == "cosine":
        return probabilities(_two_up(_unit(x) @ _unit(prototypes).T / probe.temperature))
    distance = -2 * x @ prototypes.T + (prototypes**2).sum(1)  # less |x|², which softmax does not see
    return probabilities(_two_up(-distance / (fitted.arrays["spread"] * probe.temperature)))


def _two_up(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits [N, K] with one column for two classes."""
    return logits[:, 1:] - logits[:, :1] if logits.shape[1] == 2 else logits


def _vote(probe: Knn, fitted: FittedProbe, x: NDArray[np.floating]) -> NDArray[np.float64]:
    neighbours = require("sklearn.neighbors", "learn", _PURPOSE)
    known, y = fitted.arrays["x"], fitted.arrays["y"]
    x = _unit(x) if probe.metric == "cosine" else x
    near = neighbours.NearestNeighbors(n_neighbors=probe.k).fit(known).kneighbors(x, return_distance=False)
    return np.eye(fitted.classes)[y[near]].mean(1)


def _unit(x: NDArray[np.floating]) -> NDArray[np.floating]:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)

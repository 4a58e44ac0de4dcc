"""Simple classifiers on frozen embeddings."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.extras import require

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


Probe = LinearProbe | Knn

PROBES = MappingProxyType(
    {
        "linear": LinearProbe(),
        "knn": Knn(),
        # Source: Giga-SSL, linear evaluation script: no scaling, balanced class weights.
        "giga": LinearProbe(C=10.0, scale=False, balanced=True),
        # Source: HIPT, 3-Self-Supervised-Eval: scikit-learn's defaults on the mean of a slide's vectors.
        "hipt": Knn(k=5, metric="euclidean"),
    }
)
"""Probes by name."""


def find_probe(head: str | Probe) -> tuple[str, Probe]:
    """Name and options of a probe; raises :class:`EvaluationError` for a name that is not in :data:`PROBES`."""
    if not isinstance(head, str):
        return "linear" if isinstance(head, LinearProbe) else "knn", head
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
    missing = np.setdiff1d(np.arange(classes), y)
    if len(missing):
        raise EvaluationError(f"class {missing[0]} has no training sample; use other folds")
    x, x_test = np.asarray(x, np.float64), np.asarray(x_test, np.float64)
    if isinstance(probe, Knn):
        return _knn(probe, x, y, x_test, classes)
    if probe.scale:
        mean, deviation = x.mean(0), x.std(0)
        deviation[deviation <= 1e-10 * np.abs(mean)] = 1.0  # a constant feature says nothing, and rounding is no spread
        x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    linear = require("sklearn.linear_model", "learn", _PURPOSE)
    weight = "balanced" if probe.balanced else None
    return (
        linear.LogisticRegression(C=probe.C, class_weight=weight, max_iter=probe.max_iter)
        .fit(x, y)
        .predict_proba(x_test)
    )


def _knn(
    probe: Knn, x: NDArray[np.floating], y: NDArray[np.int64], x_test: NDArray[np.floating], classes: int
) -> NDArray[np.float64]:
    if len(x) < probe.k:
        raise EvaluationError(
            f"{probe.k} nearest neighbours among {len(x)} training samples are too many; use a smaller k"
        )
    neighbours = require("sklearn.neighbors", "learn", _PURPOSE)
    if probe.metric == "cosine":
        x, x_test = _unit(x), _unit(x_test)  # on the unit sphere, Euclidean order is cosine order
    near = neighbours.NearestNeighbors(n_neighbors=probe.k).fit(x).kneighbors(x_test, return_distance=False)
    return np.eye(classes)[y[near]].mean(1)


def _unit(x: NDArray[np.floating]) -> NDArray[np.floating]:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)

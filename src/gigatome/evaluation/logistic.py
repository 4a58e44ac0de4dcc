"""Logistic regression with an L2 penalty: the optimum of scikit-learn's, in a tenth of the time.

Newton steps by conjugate gradients, preconditioned with the Cholesky factor of the Hessian at zero. That factor and the
products of the inner loop are in float32, which only the speed depends on; the gradient, and so the optimum, is in
float64 (in float32 for more than :data:`LARGE` values). With fewer samples than features the same problem is solved in
the space that the samples span.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigatome.core.extras import require
from gigatome.core.logs import log

LARGE = 2**26
"""Values of ``x`` from which on float32 is kept as float32."""

_STEP = 1e-4  # a Newton step that moves no training logit by more is the last
_ROWS_AT_ONCE = 4096
_INNER = 200  # steps of conjugate gradients in a Newton step, at most
_ALONE = 2**22  # values of x up to which one thread does
_PURPOSE = "fit a linear probe"


def fit_logistic(
    x: NDArray[np.floating],
    y: NDArray[np.int64],
    classes: int,
    *,
    penalty: float,
    weights: NDArray[np.float64] | None = None,
    max_iter: int = 1000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minimises Σ weight · cross-entropy + penalty / 2 · |coefficients|²; the intercept is free.

    Two classes have one column of coefficients, for the logit of class 1; more have a column each, as scikit-learn.

    Args:
        x: [N, D].
        y: [N], 0 … classes − 1.
        classes: how many, at least 2.
        penalty: above 0; 1 / C in scikit-learn's words.
        weights: of the samples, [N].
        max_iter: most Newton steps; a warning says if they did not do.

    Returns:
        Coefficients float64 [D, K] and intercepts [K]; K is 1 for two classes.
    """
    x = np.ascontiguousarray(x, np.float32 if x.dtype == np.float32 and x.size > LARGE else np.float64)
    target = (y == 1).astype(x.dtype)[:, None] if classes == 2 else np.eye(classes, dtype=x.dtype)[y]
    weight = np.ones((len(x), 1), x.dtype) if weights is None else weights.astype(x.dtype)[:, None]
    if len(x) < x.shape[1]:
        z, back = _span(x)
        coefficients, intercept = fit_logistic(z, y, classes, penalty=penalty, weights=weights, max_iter=max_iter)
        return np.asarray(back @ coefficients, np.float64), intercept
    with _threads(x.size):
        return _newton(x, target, weight, penalty, max_iter)


def probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities float64 [N, classes] of logits [N, K] as :func:`fit_logistic` has them."""
    p = np.asarray(_probabilities(np.asarray(logits, np.float64)), np.float64)
    return np.concatenate([1 - p, p], axis=1) if p.shape[1] == 1 else p


def _newton(
    x: NDArray[np.floating],
    target: NDArray[np.floating],
    weight: NDArray[np.floating],
    penalty: float,
    max_iter: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same for targets [N, K] and weights [N, 1]."""
    problem = _Problem(x, target, weight, penalty)
    theta = np.zeros((x.shape[1] + 1, target.shape[1]))
    logits = np.zeros(target.shape, x.dtype)
    value, first = problem.value(logits, theta), 0.0
    for step in range(max_iter):
        p = _probabilities(logits)
        gradient = problem.gradient(p, theta)
        size = float(np.abs(gradient).max())
        first = first or size
        move = problem.solve(p, gradient, max(0.01, min(0.1, (size / first) ** 0.5)) if first else 1.0)
        change, length = problem.times(move), 1.0
        slope = float(np.sum(gradient * move))
        while True:
            new = problem.value(logits + length * change, theta + length * move)
            if new <= value + 1e-4 * length * slope + 1e-10 * abs(value) or length < 1e-6:
                break
            length /= 2
        theta, logits, value = theta + length * move, logits + (length * change).astype(x.dtype), new
        if length * float(np.abs(change).max()) <= _STEP * (1 if x.dtype == np.float64 else 30):
            break
        if step + 1 == max_iter:
            log.warning("the linear probe has not converged in %d steps; raise max_iter or lower C", max_iter)
    return theta[:-1], theta[-1]


class _Problem:
    """One regression: its value, gradient and Newton steps at any point; theta [D + 1, K] ends with the intercept."""

    def __init__(
        self, x: NDArray[np.floating], target: NDArray[np.floating], weight: NDArray[np.floating], penalty: float
    ):
        self.x, self.target, self.weight = x, target, weight
        self.small = x.astype(np.float32, copy=False)
        self.small_weight = weight.astype(np.float32)
        self.penalty = np.full((x.shape[1] + 1, 1), penalty)
        self.penalty[-1] = 0.0
        self.linalg = require("scipy.linalg", "learn", _PURPOSE)
        self.factor = self._factor()

    def _factor(self) -> NDArray[np.floating]:
        """Cholesky factor of the Hessian at zero, of at most as many rows as say what it is."""
        count, dim = self.x.shape
        rows = slice(None, None, max(1, count // max(_ROWS_AT_ONCE, 4 * dim)))
        part, weight = self.small[rows], self.small_weight[rows]
        scale = count / len(part) * (0.25 if self.target.shape[1] == 1 else 1 / self.target.shape[1])
        part = np.concatenate([part, np.ones((len(part), 1), np.float32)], axis=1) * np.sqrt(weight * np.float32(scale))
        hessian = part.T @ part
        for jitter in (1e-6, 1e-4, 1e-2, 1.0):
            tried = hessian + np.diag((self.penalty[:, 0] + jitter * np.diag(hessian).mean()).astype(np.float32))
            try:
                return self.linalg.cholesky(tried, lower=True, overwrite_a=True, check_finite=False)
            except np.linalg.LinAlgError:
                continue
        return np.diag(np.sqrt(np.diag(hessian) + self.penalty[:, 0] + 1e-12)).astype(np.float32)

    def value(self, logits: NDArray[np.floating], theta: NDArray[np.float64]) -> float:
        if logits.shape[1] == 1:
            loss = np.logaddexp(0, np.where(self.target > 0, -logits, logits))
        else:
            top = logits.max(1, keepdims=True)
            loss = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
            loss = loss - (logits * self.target).sum(1, keepdims=True)
        return float(np.sum(self.weight * loss, dtype=np.float64) + np.sum(self.penalty * theta**2) / 2)

    def gradient(self, p: NDArray[np.floating], theta: NDArray[np.float64]) -> NDArray[np.float64]:
        error = self.weight * (p - self.target)
        return np.concatenate([self.x.T @ error, error.sum(0, keepdims=True)]) + self.penalty * theta

    def times(self, move: NDArray[np.floating]) -> NDArray[np.floating]:
        """Change of the logits [N, K]."""
        move = move.astype(self.x.dtype)
        return self.x @ move[:-1] + move[-1]

    def solve(self, p: NDArray[np.floating], gradient: NDArray[np.float64], accuracy: float) -> NDArray[np.float64]:
        """The Newton step, to a relative accuracy in the preconditioner's norm."""
        p = p.astype(np.float32)
        penalty = self.penalty.astype(np.float32)
        move = np.zeros(gradient.shape, np.float32)
        unit = float(np.abs(gradient).max()) or 1.0  # keeps float32 from running out
        rest = (-gradient / unit).astype(np.float32)
        pulled = self._precondition(rest)
        direction, size = pulled.copy(), float(np.sum(rest * pulled))
        target = size * accuracy**2
        for _ in range(_INNER):
            if size <= max(target, 1e-30):
                break
            change = self.small @ direction[:-1] + direction[-1]
            change = p * (1 - p) * change if p.shape[1] == 1 else p * (change - (p * change).sum(1, keepdims=True))
            change *= self.small_weight
            bent = np.concatenate([self.small.T @ change, change.sum(0, keepdims=True)]) + penalty * direction
            curve = float(np.sum(direction * bent))
            if curve <= 0:
                break
            move += (size / curve) * direction
            rest -= (size / curve) * bent
            pulled = self._precondition(rest)
            before, size = size, float(np.sum(rest * pulled))
            direction = pulled + (size / before) * direction
        return move.astype(np.float64) * unit

    def _precondition(self, rest: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.linalg.cho_solve((self.factor, True), rest, check_finite=False)


def _probabilities(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    if logits.shape[1] == 1:
        tail = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1.0, tail) / (1 + tail)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def _threads(cells: int) -> AbstractContextManager[Any]:
    """One thread where the products are so small that waiting for others costs more than they bring."""
    if cells > _ALONE:
        return nullcontext()
    return require("threadpoolctl", "learn", _PURPOSE).threadpool_limits(1, user_api="blas")


def _span(x: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Samples [N, R] in axes of the space that they span, R ≤ N, and those axes [D, R]."""
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    kept = values > 1e-12 * max(values[-1], 1e-300)
    root = np.sqrt(values[kept])
    return vectors[:, kept] * root, x.T @ (vectors[:, kept] / root)

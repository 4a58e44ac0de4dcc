"""How good embeddings look without labels: effective rank, correlation between samples, spread.

Each figure is a function of a matrix [N, D], and a class that takes the matrix in parts and gives the same figure. It
holds a few thousand rows and a D × D matrix at most, whatever N is; so a file mapped into memory will do.
"""

from abc import ABC, abstractmethod
from typing import Any, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError

_ROWS = 1024  # kept before they are worked into a D × D matrix, or 2 D if that is more


def rankme(embeddings: ArrayLike, *, eps: float = 1e-7) -> float:
    """Effective rank: the exponential of the entropy of the normalised singular values.

    Between 1, all embeddings on one line, and min(N, D). It compares runs of one method and one dimension only.

    Args:
        embeddings: [N, D], of samples drawn at random; an array, or what can be sliced into arrays.
        eps: added to each normalised singular value.

    Raises:
        EvaluationError: there are no embeddings, or all are zero, or some are not finite.

    Source: Garrido et al., "RankMe", ICML 2023, eq. 1; kaiko, arXiv 2404.15217, IV-D1.
    """
    return RankMe(eps=eps).add(embeddings).value()


def odcorr(embeddings: ArrayLike) -> float:
    """Off-diagonal correlation: root mean square of Pearson's correlation between the embeddings of two samples.

    Between 0, samples are unrelated, and 1, all are the same up to scale and offset. Lower is better, and it compares
    encoders of different dimensions. All N (N − 1) pairs count, though N × N numbers are never held.

    Args:
        embeddings: [N, D] with N ≥ 2, of samples drawn at random; an array, or what can be sliced into arrays.

    Raises:
        EvaluationError: there are fewer than two, some are not finite, or one is constant over its dimensions and
            thus has no correlation with another.

    Source: kaiko, arXiv 2404.15217, eq. 1.
    """
    return ODCorr().add(embeddings).value()


def embedding_std(embeddings: ArrayLike, *, unit: bool = False) -> float:
    """Standard deviation over samples, mean over dimensions.

    Args:
        embeddings: [N, D], of samples drawn at random; an array, or what can be sliced into arrays.
        unit: scale every embedding to unit length first and multiply the result by √D. It then lies between 0, all
            samples in one direction, and 1, directions spread evenly.

    Raises:
        EvaluationError: there are no embeddings, some are not finite, or, with ``unit``, one is zero.

    Source: the scaled form: Chen and He, "SimSiam", arXiv 2011.10566, section 4.1.
    """
    return EmbeddingStd(unit=unit).add(embeddings).value()


class StreamingFigure(ABC):
    """A figure of embeddings [N, D] that come in parts."""

    _least = 1

    def __init__(self):
        self.count, self.dim = 0, 0
        self._rows: list[NDArray[np.float64]] = []
        self._held = 0

    def add(self, embeddings: Any) -> Self:
        """Takes more rows, [n, D], and returns itself.

        Raises:
            EvaluationError: some rows are not finite, or have no such figure.
            ValueError: they are no matrix, or D is not that of the rows before.
        """
        shape = np.shape(embeddings)
        if len(shape) != 2 or (self.dim and shape[1] != self.dim):
            raise ValueError(f"need embeddings [N, {self.dim or 'D'}], not {shape}")
        self.dim = shape[1]
        block = max(_ROWS, 2 * self.dim)
        for start in range(0, shape[0], block):
            rows = np.asarray(embeddings[start : start + block], np.float64)
            if not np.isfinite(rows).all():
                raise EvaluationError("some embeddings are not finite")
            self._rows.append(self._prepare(rows))
            self.count += len(rows)
            self._held += len(rows)
            if self._held >= block:
                self._fold(self._pending())
                self._rows, self._held = [], 0
        return self

    def value(self) -> float:
        """The figure of all rows so far; raises :class:`EvaluationError` if they have none."""
        if self.count < self._least or not self.dim:
            raise EvaluationError(f"need at least {self._least} embeddings, not {self.count} of size {self.dim}")
        return self._value(self._pending())

    def _pending(self) -> NDArray[np.float64]:
        return np.concatenate(self._rows) if self._rows else np.empty((0, self.dim))

    def _prepare(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows

    @abstractmethod
    def _fold(self, rows: NDArray[np.float64]) -> None:
        """Takes rows into what is kept of all before."""

    @abstractmethod
    def _value(self, rows: NDArray[np.float64]) -> float:
        """The figure of what is kept and of ``rows``; must change nothing."""


@final
class RankMe(StreamingFigure):
    """:func:`rankme` of rows in parts.

    What is kept is the R of a QR decomposition, which has the singular values of all rows. Their squares, the
    eigenvalues of a covariance, would lose those below 1e-8 of the greatest, and a collapse is about the small ones.

    Args:
        eps: added to each normalised singular value.
    """

    def __init__(self, *, eps: float = 1e-7):
        super().__init__()
        self._eps = eps
        self._triangle: NDArray[np.float64] | None = None

    def _all(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows if self._triangle is None else np.concatenate([self._triangle, rows])

    def _fold(self, rows: NDArray[np.float64]) -> None:
        self._triangle = np.asarray(np.linalg.qr(self._all(rows), mode="r"))

    def _value(self, rows: NDArray[np.float64]) -> float:
        values = np.linalg.svd(self._all(rows), compute_uv=False)
        if values.sum() == 0:
            raise EvaluationError("all embeddings are zero; they have no rank")
        share = values / values.sum() + self._eps
        return float(np.exp(-np.sum(share * np.log(share))))


@final
class ODCorr(StreamingFigure):
    """:func:`odcorr` of rows in parts.

    With rows of mean 0 and length 1, correlations are the entries of Z Zᵀ, and the sum of their squares is that of the
    D × D matrix Zᵀ Z, to which every part adds.
    """

    _least = 2

    def __init__(self):
        super().__init__()
        self._gram: NDArray[np.float64] | None = None
        self._constant: int | None = None  # the first row that has no correlation

    def _prepare(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        size = np.linalg.norm(rows, axis=1)
        rows = rows - rows.mean(1, keepdims=True)
        length = np.linalg.norm(rows, axis=1)
        constant = np.flatnonzero(length <= 1e-12 * size)  # rounding leaves a little of a constant
        if len(constant) and self._constant is None:
            self._constant = self.count + int(constant[0])
        return rows / np.maximum(length, 1e-300)[:, None]

    def _fold(self, rows: NDArray[np.float64]) -> None:
        gram = rows.T @ rows
        self._gram = gram if self._gram is None else self._gram + gram

    def _value(self, rows: NDArray[np.float64]) -> float:
        if self._constant is not None:
            raise EvaluationError(
                f"embedding {self._constant} is the same in every dimension; it has no correlation with others"
            )
        if self._gram is None and len(rows) < self.dim:
            gram = rows @ rows.T
        else:
            gram = rows.T @ rows + (0 if self._gram is None else self._gram)
        pairs = self.count * (self.count - 1)
        return float(np.sqrt(max(0.0, np.sum(gram**2) - self.count) / pairs))


@final
class EmbeddingStd(StreamingFigure):
    """:func:`embedding_std` of rows in parts.

    Args:
        unit: as there.
    """

    def __init__(self, *, unit: bool = False):
        super().__init__()
        self._unit = unit
        self._folded = 0
        self._mean: NDArray[np.float64] | float = 0.0
        self._squares: NDArray[np.float64] | float = 0.0  # of deviations from the mean

    def _prepare(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self._unit:
            return rows
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        if not length.all():
            raise EvaluationError(f"embedding {self.count + int(np.argmin(length))} is zero; it has no direction")
        return rows / length

    def _fold(self, rows: NDArray[np.float64]) -> None:
        self._folded, self._mean, self._squares = self._joined(rows)

    def _joined(self, rows: NDArray[np.float64]) -> tuple[int, Any, Any]:
        """Count, mean and squares of what is kept and of ``rows``.

        Source: Chan et al., "Updating formulae … for computing sample variances", 1979.
        """
        if not len(rows):
            return self._folded, self._mean, self._squares
        count, mean = self._folded + len(rows), rows.mean(0)
        shift = mean - self._mean
        squares = self._squares + ((rows - mean) ** 2).sum(0) + shift**2 * (self._folded * len(rows) / count)
        return count, self._mean + shift * (len(rows) / count), squares

    def _value(self, rows: NDArray[np.float64]) -> float:
        count, _, squares = self._joined(rows)
        spread = float(np.sqrt(squares / count).mean())
        return spread * self.dim**0.5 if self._unit else spread

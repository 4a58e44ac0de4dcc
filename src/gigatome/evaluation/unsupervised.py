"""How good embeddings look without labels: effective rank, and correlation between samples."""

import numpy as np
from numpy.typing import ArrayLike

from gigatome.core.errors import EvaluationError


def rankme(embeddings: ArrayLike, *, eps: float = 1e-7) -> float:
    """Effective rank: the exponential of the entropy of the normalised singular values.

    Between 1, all embeddings on one line, and min(N, D). It compares runs of one method and one dimension only.

    Args:
        embeddings: [N, D], of samples drawn at random.
        eps: added to each normalised singular value.

    Raises:
        EvaluationError: there are no embeddings, or all are zero, or some are not finite.

    Source: Garrido et al., "RankMe", ICML 2023, eq. 1; kaiko, arXiv 2404.15217, IV-D1.
    """
    z = _checked(embeddings, at_least=1)
    values = np.linalg.svd(z, compute_uv=False)
    if values.sum() == 0:
        raise EvaluationError("all embeddings are zero; they have no rank")
    share = values / values.sum() + eps
    return float(np.exp(-np.sum(share * np.log(share))))


def odcorr(embeddings: ArrayLike) -> float:
    """Off-diagonal correlation: root mean square of Pearson's correlation between the embeddings of two samples.

    Between 0, samples are unrelated, and 1, all are the same up to scale and offset. Lower is better, and it compares
    encoders of different dimensions.

    Args:
        embeddings: [N, D] with N ≥ 2, of samples drawn at random.

    Raises:
        EvaluationError: there are fewer than two, some are not finite, or one is constant over its dimensions and
            thus has no correlation with another.

    Source: kaiko, arXiv 2404.15217, eq. 1.
    """
    z = _checked(embeddings, at_least=2)
    size = np.linalg.norm(z, axis=1)
    z = z - z.mean(1, keepdims=True)
    length = np.linalg.norm(z, axis=1)
    constant = np.flatnonzero(length <= 1e-12 * size)  # rounding leaves a little of a constant
    if len(constant):
        raise EvaluationError(
            f"embedding {constant[0]} is the same in every dimension; it has no correlation with others"
        )
    z = z / length[:, None]
    count, dim = z.shape
    gram = z.T @ z if dim < count else z @ z.T  # the sum of squares of both is that of all correlations
    return float(np.sqrt(max(0.0, np.sum(gram**2) - count) / (count * (count - 1))))


def _checked(embeddings: ArrayLike, *, at_least: int) -> np.ndarray:
    z = np.asarray(embeddings, np.float64)
    if z.ndim != 2:
        raise ValueError(f"need embeddings [N, D], not {z.shape}")
    if len(z) < at_least or z.shape[1] == 0:
        raise EvaluationError(f"need at least {at_least} embeddings, not {len(z)} of size {z.shape[1]}")
    if not np.isfinite(z).all():
        raise EvaluationError("some embeddings are not finite")
    return z

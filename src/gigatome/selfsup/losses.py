"""Losses of the self-supervised methods, as pure functions of logits."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor

from gigatome.distributed import gather

_KOLEO_EPS = 1e-8


def teacher_probabilities(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    """What the student is to predict: the centred and sharpened softmax of the teacher's logits.

    Args:
        teacher: logits [..., K].
        center: [1, K], subtracted from the logits.
        temperature: the softmax's; low is sharp.

    Returns:
        float32 [..., K], rows sum to 1; no gradient flows through it.

    Source: arXiv 2104.14294, eq. 1 and section 3.1.
    """
    return ((teacher.detach().float() - center) / temperature).softmax(-1)


def sinkhorn_knopp(teacher: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """What the student is to predict: the teacher's answers, balanced so that all prototypes are used alike.

    The columns and then the rows of exp(logits / temperature) are scaled to equal sums, a few times, over the batches
    of all processes together.

    Args:
        teacher: logits [N, K]; N ≥ 1 may differ between processes.
        temperature: low is sharp.
        iterations: of columns and rows.

    Returns:
        float32 [N, K], rows sum to 1; no gradient flows through it.

    Source: arXiv 2006.09882 (SwAV), section 3.1, as the code of DINOv2 has it; differs: computed in logarithms, which
    neither overflow nor underflow.
    """
    log_q_NK = teacher.detach().float() / temperature
    for _ in range(iterations):
        columns_1K = log_q_NK.logsumexp(0, keepdim=True)
        log_q_NK = (log_q_NK - gather(columns_1K).logsumexp(0, keepdim=True)).log_softmax(1)
    return log_q_NK.exp()


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the teacher's view and the student's, over all pairs of different views.

    ``loss = mean over b and over pairs g ≠ v of −Σ_k targets[g, b, k] · log softmax(student[v, b] / temperature)[k]``

    Args:
        student: logits [V, B, K] of V views of B images; its first G views are the teacher's.
        targets: probabilities [G, B, K] of :func:`teacher_probabilities`.
        temperature: of the student's softmax.

    Returns:
        float32 scalar.

    Source: arXiv 2104.14294, eq. 3; the mean over pairs, where the equation has a sum, is the authors' code.
    """
    views, batch, _ = student.shape
    log_p_VBK = (student.float() / temperature).log_softmax(-1)
    with torch.autocast(student.device.type, enabled=False):
        pairs_GV = -(targets.flatten(1) @ log_p_VBK.flatten(1).T) / batch
    different_GV = 1 - torch.eye(len(targets), views, device=student.device)
    return (pairs_GV * different_GV).sum() / different_GV.sum()


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between what the teacher sees in masked patches and what the student makes of their neighbours.

    ``loss = Σ_m weights[m] · −Σ_k targets[m, k] · log softmax(student[m] / temperature)[k]``

    Args:
        student: logits [M, K] of the M masked patches of N views.
        targets: the teacher's probabilities [M, K].
        weights: [M], 1 / N / masked patches of the patch's view: all views that have masks count alike, and those
            without count as 0.
        temperature: of the student's softmax.

    Returns:
        float32 scalar.

    Source: arXiv 2111.07832 (iBOT), eq. 2; the weights are those of DINOv2's code.
    """
    log_p_MK = (student.float() / temperature).log_softmax(-1)
    return -((targets * log_p_MK).sum(-1) * weights).sum()


def koleo_loss(embeddings: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour: less, the wider a batch is spread.

    Args:
        embeddings: [B, D], B ≥ 2, of different images; normalised here.

    Returns:
        float32 scalar.

    Source: arXiv 1806.03198, eq. 2, with the constants of DINOv2's code.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=-1, eps=_KOLEO_EPS)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
        distances = F.pairwise_distance(x, x[nearest], eps=_KOLEO_EPS)
        return -(distances + _KOLEO_EPS).log().mean()


def kde_loss(embeddings: Tensor, concentration: float = 5.0) -> Tensor:
    """Mean logarithm of the batch's density at its own points: less, the wider it is spread.

    The density is estimated by a von Mises-Fisher kernel on the sphere. Two tiles that look alike do not make its
    gradient explode, as they do with :func:`koleo_loss`.

    ``loss = mean over i of log (mean over j of exp(concentration · cos(x_i, x_j)))``, j = i among them

    Args:
        embeddings: [B, D], B ≥ 2, of different images; normalised here.
        concentration: of the kernel; high is narrow.

    Returns:
        float32 scalar, from −concentration to concentration.

    Source: arXiv 2408.00738 (Virchow2), section 5.2, which Midnight (arXiv 2504.05186) uses; constants are left out.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=-1)
        return (concentration * x @ x.T).logsumexp(1).mean() - math.log(len(x))


def update_center(center: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """Moving average of the teacher's mean logits, which keeps one dimension from winning everywhere.

    Args:
        center: [1, K].
        teacher: logits [..., K] of the step.
        momentum: share of the old centre.

    Returns:
        float32 [1, K], new.

    Source: arXiv 2104.14294, eq. 4.
    """
    mean = teacher.detach().float().flatten(0, -2).mean(0, keepdim=True)
    return center * momentum + mean * (1 - momentum)


def entropy(probabilities: Tensor) -> Tensor:
    """Mean Shannon entropy, in nats, of the rows [..., K]; ln K when they are uniform, 0 when they are one-hot."""
    return torch.special.entr(probabilities).sum(-1).mean()

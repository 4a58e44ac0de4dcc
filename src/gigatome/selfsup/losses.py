"""Losses of the self-supervised methods, as pure functions of logits."""

import torch
from torch import Tensor


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

"""Contrastive losses: a view's vector is to lie nearer to that of the same tile than to those of others."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor


def ntxent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss: each of the 2N vectors is to find its partner among the 2N − 1 others, by cosine similarity.

    Args:
        first: vectors [N, D] of N images, of any length.
        second: the same for another view of each.
        temperature: of the softmax.

    Returns:
        float32 scalar, the mean over the 2N vectors.

    To contrast over the processes of a run, give it what :func:`gigatome.distributed.gather_with_gradient` gives.

    Source: arXiv 2002.05709 (SimCLR), eq. 1.
    """
    return ntxent_and_accuracy(first, second, temperature)[0]


def ntxent_and_accuracy(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As :func:`ntxent`; and the share of the vectors whose partner is the nearest of all, without gradient."""
    vectors = F.normalize(torch.cat([first, second]).float(), dim=-1)
    with torch.autocast(vectors.device.type, enabled=False):
        logits = (vectors @ vectors.T / temperature).fill_diagonal_(float("-inf"))
    rows = torch.arange(len(vectors), device=vectors.device)
    return _cross_entropy(logits, rows.roll(len(first)))


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """MoCo's loss: a query is to find its positive among negatives that it shares with all queries.

    Args:
        query: unit vectors [B, D].
        positive: unit vectors [B, D], one for each query.
        negatives: unit vectors [K, D].
        temperature: of the softmax.

    Returns:
        float32 scalar, the mean over the queries; and the share of the queries nearer to their positive than to any
        negative, without gradient.

    Source: arXiv 1911.05722 (MoCo), eq. 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        own_B1 = (query * positive).sum(-1, keepdim=True)
        logits = torch.cat([own_B1, query @ negatives.T], 1) / temperature
    return _cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def info_nce_in_batch(query: Tensor, keys: Tensor, temperature: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """MoCo v3's loss: the positive of query b is key ``first`` + b, and all other keys are its negatives.

    Args:
        query: unit vectors [B, D].
        keys: unit vectors [N, D], N ≥ B.
        temperature: of the softmax.
        first: where the keys of these queries begin.

    Returns:
        As of :func:`info_nce`; the factor 2 · temperature is left to the caller.

    Source: arXiv 2104.02057 (MoCo v3), algorithm 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ keys.T / temperature
    return _cross_entropy(logits, torch.arange(first, first + len(query), device=query.device))


def spread(vectors: Tensor) -> Tensor:
    """How far unit vectors [N, D] point apart: near 1 when all over the sphere, 0 when all alike."""
    return (1 - vectors.mean(0).square().sum()).clamp(min=0).sqrt()


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, targets), (logits.detach().argmax(-1) == targets).float().mean()

"""Heads that stand on an encoder while it learns."""

import itertools
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn


@final
class DinoHead(nn.Module):
    """DINO's projection head: an MLP, a unit sphere, and a layer of prototypes.

    State-dict keys are those of the authors' ``DINOHead``: ``mlp.0.weight`` …, ``last_layer.weight_g``,
    ``last_layer.weight_v``; with batch norm, its running statistics are not kept.

    Args:
        dim: size D of an embedding.
        prototypes: K, number of outputs.
        generator: for the initial weights.
        hidden_dim: width of the MLP.
        bottleneck_dim: size of the space in which embeddings meet prototypes.
        layers: linear layers of the MLP, at least 1; GELU between them.
        batch_norm: normalise over the batch before each GELU. The authors' ``use_bn_in_head``; they leave it off for
            ViTs, but it keeps a run that is too short for that from giving all images one answer. It always takes
            the statistics of the batch at hand.
        norm_last_layer: keep the prototypes at unit length; otherwise their lengths are learnt.

    Source: arXiv 2104.14294, appendix C, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        generator: torch.Generator,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        widths = [dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        with torch.random.fork_rng(devices=[]):  # making a layer draws from the global generator
            linears = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            nn.init.zeros_(linear.bias)
        modules: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            if batch_norm:
                modules.append(nn.BatchNorm1d(hidden_dim, track_running_stats=False))
            modules += [nn.GELU(), linear]
        self.mlp = nn.Sequential(*modules)
        self.last_layer = _Prototypes(bottleneck_dim, prototypes, generator, learn_length=not norm_last_layer)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits [B, K] of embeddings [B, D]."""
        return self.last_layer(F.normalize(self.mlp(embeddings), dim=-1))


class _Prototypes(nn.Module):
    """Linear layer without bias whose rows are ``weight_v``, rescaled to the lengths ``weight_g``."""

    def __init__(self, dim: int, count: int, generator: torch.Generator, *, learn_length: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_length)
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        # scaling the few outputs, not the many weights
        return F.linear(x, self.weight_v) * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)).squeeze(1)

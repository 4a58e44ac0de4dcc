"""VarMIL, of DeepSMILE: attention-weighted mean and variance of a bag."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_pool, segment_softmax, segment_sum


@final
@dataclass(frozen=True)
class VarMilOptions:
    """What makes a VarMIL.

    Attributes:
        attention: size of the attention network.
    """

    attention: int = 128


@final
class VarMil(BagModel):
    """A linear layer on the mean m = Σ a h of a bag and on its variance Σ a (h − m)² / ((N − 1) / N · Σ a).

    N is the number of weights that are not zero; the variance of a single instance is 0. State-dict keys are the
    authors': ``attention.{0,2}``, ``classifier.0``.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag.

    Source: arXiv 2107.09405 and the authors' code, which has the variance where the paper has the deviation; differs:
    a bag of one instance gives 0, not 0/0.
    """

    def __init__(self, options: VarMilOptions, dim: int, outputs: int):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(dim, options.attention), nn.Tanh(), nn.Linear(options.attention, 1))
        self.classifier = nn.Sequential(nn.Linear(2 * dim, outputs))

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and weights [T, 1]."""
        attention = segment_softmax(self.attention(bags.x), bags)
        x = bags.x.to(attention.dtype)
        mean = segment_pool(attention, x, bags).squeeze(1)
        # the weights sum to 1, so that the gradient through this mean is zero
        squares = (x - mean.detach()[bags.bag]).square()
        count = segment_sum((attention.detach() != 0).to(attention.dtype), bags)
        variance = segment_pool(attention, squares, bags).squeeze(1) * (count / (count - 1).clamp(min=1))
        return BagOutput(self.classifier(torch.cat([mean, variance], 1)).float(), attention)

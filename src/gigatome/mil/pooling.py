"""Bag models without attention: mean of the embeddings, best instance, Deep Sets."""

from dataclasses import dataclass
from typing import Literal, Self, final

import torch
from torch import Tensor, nn

from gigatome.mil.abmil import xavier_linear
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_argmax, segment_mean, segment_sum


@final
@dataclass(frozen=True)
class MeanOptions:
    """What makes a mean pool.

    Attributes:
        hidden: size of a layer with ReLU on each instance; 0 leaves it out, and the model is linear.
        dropout: after that layer.
    """

    hidden: int = 0
    dropout: float = 0.0


@final
class MeanPool(BagModel):
    """A linear layer on the mean of a bag's instances; no authors' key names.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag.
    """

    def __init__(self, options: MeanOptions, dim: int, outputs: int):
        super().__init__()
        hidden = options.hidden
        layer = [nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Dropout(options.dropout)] if hidden else []
        self.phi = nn.Sequential(*layer)
        self.classifier = nn.Linear(hidden or dim, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs]."""
        return BagOutput(self.classifier(segment_mean(self.phi(bags.x), bags)).float())


@final
@dataclass(frozen=True)
class MaxOptions:
    """What makes a max pool.

    Attributes:
        hidden: size of the layer on each instance; 0 for the size of an embedding, as in HIPT's tables.
        dropout: after that layer.
        best: the instance that speaks for the bag: of the highest "probability" of class 1 (two classes) or of any
            class (more), as the authors have it; or of the highest "risk", for time bins, −Σ of the survival curve.
            The one logit of a Cox model is its risk either way.
    """

    hidden: int = 0
    dropout: float = 0.25
    best: Literal["probability", "risk"] = "probability"

    @classmethod
    def clam(cls) -> Self:
        """CLAM's ``MIL_fc``."""
        return cls(hidden=512)


@final
class MaxPool(BagModel):
    """Max-pool multiple-instance learning: the logits of a bag are those of its best instance.

    The row "MIL" of HIPT's tables. State-dict keys are the authors': ``classifier.{0,3}`` with up to two outputs
    (``classifier.{0,2}`` without dropout), ``fc.0`` and ``classifiers.<c>`` with more.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag.

    Source: CLAM's and HIPT's code, ``MIL_fc`` and ``MIL_fc_mc``.
    """

    def __init__(self, options: MaxOptions, dim: int, outputs: int):
        super().__init__()
        self.best = options.best
        hidden = options.hidden or dim
        dropout = [nn.Dropout(options.dropout)] if options.dropout else []
        layers = [nn.Linear(dim, hidden), nn.ReLU(inplace=True), *dropout]
        self.many = outputs > 2
        if self.many:
            self.fc = nn.Sequential(*layers)
            self.classifiers = nn.ModuleList([nn.Linear(hidden, 1) for _ in range(outputs)])
        else:
            self.classifier = nn.Sequential(*layers, nn.Linear(hidden, outputs))
        xavier_linear(self)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs]; attention [T, 1], all of it on the best instance; logits of all instances."""
        if self.many:
            h = self.fc(bags.x)
            instances = torch.cat([classifier(h) for classifier in self.classifiers], 1).float()
        else:
            instances = self.classifier(bags.x).float()
        best = segment_argmax(self._score(instances.detach()), bags)
        attention = instances.new_zeros(len(instances), 1).scatter_(0, best, 1)
        return BagOutput(instances[best.squeeze(1)], attention, instances)

    def _score(self, logits: Tensor) -> Tensor:
        """Score [T, 1] by which the best instance is chosen."""
        if logits.shape[1] == 1:
            return logits
        if self.best == "risk":
            return -(1 - logits.sigmoid()).cumprod(1).sum(1, keepdim=True)
        if self.many:
            return logits.log_softmax(1).amax(1, keepdim=True)
        return logits[:, 1:] - logits[:, :1]  # grows with P(class 1), and does not saturate


@final
@dataclass(frozen=True)
class DeepSetsOptions:
    """What makes a Deep Sets model.

    Attributes:
        hidden: size of the layer on each instance.
        rho: size of the layer on the bag.
        dropout: after both.
        pool: "mean"; or "sum", as published, which over thousands of tiles drives every sigmoid to 0 or 1.
    """

    hidden: int = 512
    rho: int = 256
    dropout: float = 0.25
    pool: Literal["mean", "sum"] = "mean"

    @classmethod
    def mcat(cls) -> Self:
        """As in MCAT's and Patch-GCN's survival tables."""
        return cls(pool="sum")


@final
class DeepSets(BagModel):
    """ρ(Σ φ(x)), with one layer each.

    State-dict keys are those of MCAT's code: ``phi.0``, ``rho.0``, ``classifier``.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag.

    Source: arXiv 1703.06114, theorem 2; sizes from the code of arXiv 2108.02278, which sums; differs: the mean unless
    asked otherwise.
    """

    def __init__(self, options: DeepSetsOptions, dim: int, outputs: int):
        super().__init__()
        self.pool = options.pool
        dropout = options.dropout
        self.phi = nn.Sequential(nn.Linear(dim, options.hidden), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.rho = nn.Sequential(nn.Linear(options.hidden, options.rho), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(options.rho, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs]."""
        h = self.phi(bags.x)
        pooled = segment_sum(h, bags) if self.pool == "sum" else segment_mean(h, bags)
        return BagOutput(self.classifier(self.rho(pooled)).float())

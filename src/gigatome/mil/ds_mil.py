"""DS-MIL: one stream finds the critical instance of each class, the other attends to what resembles it."""

from dataclasses import dataclass
from typing import Literal, Self, final

import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.mil.model import BagBatch, BagModel, BagOutput, Criterion, Targets
from gigatome.mil.segments import segment_argmax, segment_dot, segment_pool, segment_softmax


@final
@dataclass(frozen=True)
class DsMilOptions:
    """What makes a DS-MIL.

    Attributes:
        query: size of the queries.
        query_network: how an embedding becomes a query: "linear", or "mlp": Linear, ReLU, Linear, tanh.
        value_network: how it becomes a value: "identity", "linear", or "relu": Linear, ReLU.
        dropout: before the layer of the values.
        loss: of the two streams: "joint", the criterion on the mean of their logits, which is also the prediction;
            "separate", the mean of the criterion on each; or "separate_bce", the same with binary cross-entropy of
            each class in place of the criterion. With the last two the prediction is that of the attending stream.
    """

    query: int = 128
    query_network: Literal["linear", "mlp"] = "linear"
    value_network: Literal["identity", "linear", "relu"] = "linear"
    dropout: float = 0.0
    loss: Literal["joint", "separate", "separate_bce"] = "joint"

    @classmethod
    def hipt(cls) -> Self:
        """As in HIPT's tables."""
        return cls()

    @classmethod
    def original(cls) -> Self:
        """As the authors' weights for Camelyon16 and TCGA lung have it."""
        return cls(query_network="mlp", value_network="identity", loss="separate_bce")


@final
class DsMil(BagModel):
    """Dual-stream multiple-instance learning.

    A linear layer scores each instance; for each class the best one is critical. The weight of an instance is the
    softmax of the product of its query with that of the critical one; a convolution over the C pooled vectors gives
    C logits. State-dict keys are the authors': ``i_classifier.fc.0``, ``b_classifier.q`` (``q.{0,2}``),
    ``b_classifier.v.1``, ``b_classifier.fcc``.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: C logits of a bag.

    Source: arXiv 2011.08939, eqs. 4–8, and the authors' code; the defaults are those of HIPT's copy of it.
    """

    def __init__(self, options: DsMilOptions, dim: int, outputs: int):
        super().__init__()
        self.kind = options.loss
        self.i_classifier = nn.ModuleDict({"fc": nn.Sequential(nn.Linear(dim, outputs))})
        self.b_classifier = _BagStream(options, dim, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, C]; weights [T, C], one for each class; and the critical instances' logits [B, C]."""
        scores = self.i_classifier["fc"](bags.x)
        critical = segment_argmax(scores.detach(), bags)
        best = scores.gather(0, critical).float()
        logits, attention = self.b_classifier(bags, critical)
        return BagOutput((logits + best) / 2 if self.kind == "joint" else logits, attention, best)

    def loss(self, output: BagOutput, targets: Targets, criterion: Criterion) -> Tensor:
        """The loss of the options; binary cross-entropy is of classes only."""
        if self.kind == "joint" or output.instances is None:
            return criterion(output.logits, targets)
        if self.kind == "separate_bce" and targets.event is None:
            classes = F.one_hot(targets.y, output.logits.shape[1]).to(output.logits.dtype)
            streams = [
                F.binary_cross_entropy_with_logits(logits, classes) for logits in (output.logits, output.instances)
            ]
        else:
            streams = [criterion(logits, targets) for logits in (output.logits, output.instances)]
        return (streams[0] + streams[1]) / 2


@final
class _BagStream(nn.Module):
    def __init__(self, options: DsMilOptions, dim: int, outputs: int):
        super().__init__()
        width = options.query
        self.q = (
            nn.Linear(dim, width)
            if options.query_network == "linear"
            else nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        )
        if options.value_network != "identity":
            after = [nn.ReLU()] if options.value_network == "relu" else []
            self.v = nn.Sequential(nn.Dropout(options.dropout), nn.Linear(dim, dim), *after)
        self.fcc = nn.Conv1d(outputs, outputs, kernel_size=dim)
        self.value_network = options.value_network

    def forward(self, bags: BagBatch, critical: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and weights [T, C], from the rows of the critical instances [B, C]."""
        queries = self.q(bags.x)
        keys = queries[critical] / queries.shape[1] ** 0.5
        attention = segment_softmax(segment_dot(queries, keys, bags), bags)
        if self.value_network == "linear":  # a linear layer on the mean is the mean of the linear layer
            dropout, linear = self.v
            pooled = linear(segment_pool(attention, dropout(bags.x), bags))
        else:
            values = bags.x if self.value_network == "identity" else self.v(bags.x)
            pooled = segment_pool(attention, values, bags)
        logits = F.linear(pooled.flatten(1), self.fcc.weight.flatten(1), self.fcc.bias)
        return logits.float(), attention

"""DeepAttnMISL: a network for each cluster of instances, and attention over the clusters."""

from dataclasses import dataclass
from typing import Literal, Self, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.core.errors import EvaluationError
from gigatome.mil.abmil import embed_and_score, embedded_attention
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_mean, segment_pool, segment_softmax


@final
@dataclass(frozen=True)
class DeepAttnMislOptions:
    """What makes a DeepAttnMISL.

    Attributes:
        clusters: how many k-means clusters the instances of the training slides were put into.
        hidden: size of an instance after its cluster's network; 0 for the size of an embedding.
        attention: size of the attention network, and of the layer on the bag.
        dropout: after every layer ("mcat"), or in the last network ("original").
        empty: what a cluster without instances is to a bag: "ignored", or "zeros", a vector that takes part in the
            attention, as in MCAT's and HIPT's code.
        form: whose layers and key names: "mcat", a network for each cluster; or "original", one small one for all.
    """

    clusters: int = 10
    hidden: int = 512
    attention: int = 256
    dropout: float = 0.25
    empty: Literal["ignored", "zeros"] = "ignored"
    form: Literal["mcat", "original"] = "mcat"

    @classmethod
    def mcat(cls) -> Self:
        """As in MCAT's survival tables."""
        return cls(empty="zeros")

    @classmethod
    def hipt(cls) -> Self:
        """As in HIPT's tables, on embeddings of 384."""
        return cls(hidden=0, empty="zeros")

    @classmethod
    def original(cls) -> Self:
        """As its authors published it, on VGG-16 embeddings of 4,096."""
        return cls(hidden=64, attention=32, dropout=0.5, form="original")


@final
class DeepAttnMisl(BagModel):
    """The mean of each cluster's instances after its network, and attention pooling over the clusters.

    State-dict keys are those of MCAT's and HIPT's code, ``phis.<cluster>.{0,3}``, ``attention_net.{0,3}``, ``rho.0``,
    ``classifier``; or the authors', ``embedding_net.0``, ``attention.{0,2}``, ``fc6.{0,3}``.

    Args:
        options: see there.
        dim: size D of an embedding.
        outputs: logits of a bag.

    Source: arXiv 2009.11169, the authors' code, and that of arXiv 2108.02278.
    """

    needs = frozenset({"clusters"})

    def __init__(self, options: DeepAttnMislOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        hidden, width, dropout = options.hidden or dim, options.attention, options.dropout
        if options.form == "original":
            self.embedding_net = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU())
            self.attention = nn.Sequential(nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, 1))
            self.fc6 = nn.Sequential(
                nn.Linear(hidden, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, outputs)
            )
            return
        self.phis = nn.ModuleList([_phi(dim, hidden, dropout) for _ in range(options.clusters)])
        self.attention_net = embedded_attention(hidden, hidden, width, dropout=dropout)
        self.rho = nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs]; weights [T, 1], the share of each instance in its cluster's weight.

        Raises:
            EvaluationError: the batch has no clusters, or some outside 0 … ``clusters`` − 1.
        """
        sizes, order, cluster = self._sort(bags)
        by_cluster = BagBatch(bags.x[order], F.pad(sizes.flatten().cumsum(0), (1, 0)))
        means = segment_mean(self._embed(by_cluster.x, sizes), by_cluster)
        means = means.view(self.options.clusters, len(bags), -1).transpose(0, 1).flatten(0, 1)  # of bag 0, of bag 1, …
        bounds = torch.arange(0, len(means) + 1, self.options.clusters, device=means.device)
        of_bags = BagBatch(means, bounds)
        if self.options.form == "original":
            h, scores = means, self.attention(means)
        else:
            h, scores = embed_and_score(self.attention_net, means)
        sizes_of_bags = sizes.T.reshape(-1, 1)
        if self.options.empty == "ignored":
            scores = scores.float().masked_fill(sizes_of_bags == 0, float("-inf"))
        attention = segment_softmax(scores, of_bags)
        pooled = segment_pool(attention, h, of_bags).squeeze(1)
        head = self.fc6 if self.options.form == "original" else nn.Sequential(self.rho, self.classifier)
        shares = self._shares(attention, sizes_of_bags)
        return BagOutput(head(pooled).float(), shares[cluster])

    def _sort(self, bags: BagBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Tells the clusters of the bags apart.

        Returns:
            int64 [clusters, B], instances of each cluster of each bag; int64 [T], the order of the instances by cluster
            and, within one, by bag; and int64 [T], the row of each instance's cluster in a table by bag and cluster.

        Raises:
            EvaluationError: as of :meth:`forward`.
        """
        if bags.clusters is None:
            raise EvaluationError("deep_attn_misl needs the cluster of every embedding, and the batch has none")
        lowest, highest = (int(end) for end in bags.clusters.aminmax())
        if lowest < 0 or highest >= self.options.clusters:
            raise EvaluationError(
                f"deep_attn_misl has {self.options.clusters} clusters, 0 to {self.options.clusters - 1}, but the "
                f"embeddings are of {lowest} to {highest}: give the model and the clustering one number of clusters"
            )
        key = bags.clusters * len(bags) + bags.bag
        sizes = torch.bincount(key, minlength=self.options.clusters * len(bags))
        cluster = bags.bag * self.options.clusters + bags.clusters
        return sizes.view(self.options.clusters, len(bags)), key.argsort(stable=True), cluster

    def _embed(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Embeddings [T, hidden] of instances that lie by cluster."""
        if self.options.form == "original":
            weight, bias = self.embedding_net.parameters()  # of a convolution over single pixels
            return F.linear(x, weight.flatten(1), bias).relu()
        parts = zip(self.phis, x.split(sizes.sum(1).tolist()), strict=True)
        return torch.cat([phi(part) for phi, part in parts])

    def _shares(self, attention: Tensor, sizes: Tensor) -> Tensor:
        """Weight [B · clusters, 1] of one instance of each cluster; the weight of empty clusters is left out."""
        attention = attention.where(sizes > 0, 0).view(-1, self.options.clusters)
        return (attention / attention.sum(1, keepdim=True)).view(-1, 1) / sizes.clamp(min=1)


def _phi(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
    )

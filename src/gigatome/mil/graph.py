"""Graph networks over the instances of a bag: DeepGraphConv and Patch-GCN."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.mil.abmil import GatedAttention
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_pool, segment_softmax

_LEAST_MESSAGE = 1e-7
_FURTHEST = 600.0  # exponents below the bag's highest, of float64's 745


@dataclass(frozen=True)
class DeepGraphConvOptions:
    """Options of :class:`DeepGraphConv`; the defaults are the published ones.

    Attributes:
        hidden: width of the graph layers, of the attention and of what is classified.
        dropout: in the attention and before the classifier.
        graph: what neighbours are near in: ``"embeddings"``, or ``"coords"`` on the slide. For those who make the
            edges (:func:`gigatome.mil.neighbours.knn_edges`).
        neighbours: of an instance, likewise.
    """

    hidden: int = 256
    dropout: float = 0.25
    graph: Literal["coords", "embeddings"] = "embeddings"
    neighbours: int = 8


@dataclass(frozen=True)
class PatchGcnOptions:
    """Options of :class:`PatchGcn`; the defaults are the published ones.

    Attributes:
        hidden: width of the graph layers; what is pooled has (layers + 1) times as many channels.
        layers: graph layers.
        dropout: after the first and the last layers and in the attention.
        layer_dropout: after each graph layer but the first.
        graph: as in :class:`DeepGraphConvOptions`.
        neighbours: likewise.
    """

    hidden: int = 128
    layers: int = 3
    dropout: float = 0.25
    layer_dropout: float = 0.1
    graph: Literal["coords", "embeddings"] = "coords"
    neighbours: int = 8


@final
class DeepGraphConv(BagModel):
    """Three graph isomorphism convolutions, then gated attention; the tables' "GCN-MIL".

    State-dict keys are those of the authors' ``DeepGraphConv_Surv``: ``conv1.eps``, ``conv1.nn.0.weight`` …,
    ``path_attention_head.attention_a.0.weight`` …, ``path_rho.0.weight``, ``classifier.weight``.

    Args:
        options: sizes.
        dim: size D of an embedding.
        outputs: number of logits.

    Source: Li et al., MICCAI 2018, as in the code of Patch-GCN; differs: neighbours by embedding are found among
    embeddings, where the authors' notebook asks an index of embeddings for coordinates.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"edges"})

    def __init__(self, options: DeepGraphConvOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        width = options.hidden
        self.conv1 = _IsomorphismConv(dim, width)
        self.conv2 = _IsomorphismConv(width, width)
        self.conv3 = _IsomorphismConv(width, width)
        self.path_attention_head = GatedAttention(width, width, dropout=options.dropout)
        self.path_rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(options.dropout))
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1].

        Raises:
            ValueError: the bags have no edges.
        """
        graph, x = _graph(bags), bags.x
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x, graph))
        attention = segment_softmax(self.path_attention_head(x), bags)
        pooled = segment_pool(attention, x, bags).squeeze(1)
        return BagOutput(self.classifier(self.path_rho(pooled)), attention)


@final
class PatchGcn(BagModel):
    """Residual graph convolutions over neighbouring tiles, all their outputs pooled together.

    State-dict keys are those of the authors' ``PatchGCN_Surv`` with PyTorch Geometric 1.6: ``fc.0.weight``,
    ``layers.0.conv.t``, ``layers.0.conv.mlp.0.weight`` …, ``layers.0.norm.weight`` (which is not used),
    ``path_phi.0.weight``, ``path_attention_head.…``, ``path_rho.0.weight``, ``classifier.weight``.

    Args:
        options: sizes.
        dim: size D of an embedding.
        outputs: number of logits.

    Source: Chen et al., "Whole Slide Images are 2D Point Clouds", MICCAI 2021, and the authors' code; the convolution
    is that of arXiv 2006.07739.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"edges"})

    def __init__(self, options: PatchGcnOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        width, wide = options.hidden, options.hidden * (options.layers + 1)
        self.fc = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(options.dropout))
        self.layers = nn.ModuleList(_ResidualLayer(width, options.layer_dropout) for _ in range(options.layers))
        self.path_phi = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(options.dropout))
        self.path_attention_head = GatedAttention(wide, wide, dropout=options.dropout)
        self.path_rho = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(options.dropout))
        self.classifier = nn.Linear(wide, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1].

        Raises:
            ValueError: the bags have no edges.
        """
        graph, x = _graph(bags), self.fc(bags.x)
        outputs = [x]
        for layer in cast("list[_ResidualLayer]", list(self.layers)):
            # the first is a convolution alone, as the authors have it
            x = layer(x, graph) if len(outputs) > 1 else layer.conv(x, graph)
            outputs.append(x)
        x = self.path_phi(torch.cat(outputs, 1))
        attention = segment_softmax(self.path_attention_head(x), bags)
        pooled = segment_pool(attention, x, bags).squeeze(1)
        return BagOutput(self.classifier(self.path_rho(pooled)), attention)


@dataclass(frozen=True, eq=False)
class _Graph:
    """Edges by where they end, and by where they begin.

    Attributes:
        sources: int64 [E], where the edges come from, ordered by where they end.
        ends: int64 [T], place in ``sources`` of the first edge to each instance.
        targets: int64 [E], where they end, ordered by where they come from.
        starts: int64 [T], place in ``targets`` of the first edge from each instance.
    """

    sources: Tensor
    ends: Tensor
    targets: Tensor
    starts: Tensor


def _graph(bags: BagBatch) -> _Graph:
    if bags.edges is None:
        raise ValueError("a graph model needs the edges of the bags; make them with gigatome.mil.neighbours.knn_edges")
    source, target = bags.edges
    rows = torch.arange(len(bags.x), device=target.device)
    to_target, by_target = target.sort(stable=True)
    to_source, by_source = source.sort(stable=True)
    return _Graph(
        source[by_target], torch.searchsorted(to_target, rows), target[by_source], torch.searchsorted(to_source, rows)
    )


class _Gather(torch.autograd.Function):
    """Sum [T, D] over the edges to each instance of the values [T, D] they come from, never [E, D] in memory."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        with torch.autocast(values.device.type, enabled=False):
            return _sums(values, graph.sources, graph.ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _sums(grads[0], ctx.graph.targets, ctx.graph.starts), None


def _sums(values: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    if not len(rows):
        return torch.zeros_like(values)
    return F.embedding_bag(rows, values.contiguous(), offsets, mode="sum")


def _gather(values: Tensor, graph: _Graph) -> Tensor:
    return cast(Tensor, _Gather.apply(values, graph))


class _IsomorphismConv(nn.Module):
    """MLP((1 + ε) x_i + Σ x_j) over the edges j → i."""

    eps: Tensor

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.register_buffer("eps", torch.zeros(1))

    def forward(self, x: Tensor, graph: _Graph) -> Tensor:
        first = cast(nn.Linear, self.nn[0])
        # the sum of products is the product of the sum, and narrower
        h = F.linear(x, first.weight).to(first.weight.dtype)
        return self.nn[2](F.relu((1 + self.eps) * h + _gather(h, graph) + first.bias))


class _GeneralConv(nn.Module):
    """MLP(x_i + Σ softmax_j(t m_j) m_j) over the edges j → i, with m = ReLU(x) + ε, for each channel by itself."""

    def __init__(self, dim: int):
        super().__init__()
        self.t = nn.Parameter(torch.ones(1))
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.ReLU(), nn.Dropout(0.0), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor, graph: _Graph) -> Tensor:
        messages = F.relu(x).double() + _LEAST_MESSAGE
        exponents = self.t.double() * messages
        # a message goes the same way along all its edges, and so is weighted once, not once an edge; in float64 one
        # shift does for all neighbourhoods
        highest = exponents.detach().amax(0)
        weights = (exponents - highest).clamp(min=-_FURTHEST).exp()
        sums = _gather(torch.cat([weights, weights * messages], 1), graph)
        weight, weighted = sums.chunk(2, 1)
        # without edges both are 0
        return self.mlp(x + (weighted / torch.where(weight > 0, weight, 1.0)).to(x.dtype))


class _ResidualLayer(nn.Module):
    """Convolution, norm, ReLU, and what came in added."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.conv = _GeneralConv(dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, x: Tensor, graph: _Graph) -> Tensor:
        h = x + F.relu(self.norm(self.conv(x, graph)))
        return F.dropout(h, self.dropout, self.training)

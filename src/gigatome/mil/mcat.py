"""Bags together with genomic profiles: MCAT's co-attention, and late fusion for any other model."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.mil.abmil import GatedAttention
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_dot, segment_pool, segment_softmax

_BRANCH = 8  # times narrower than its input is each side of the outer product


@dataclass(frozen=True)
class McatOptions:
    """Options of :class:`Mcat`; the defaults are the published ones.

    Attributes:
        omic_sizes: values in each group of genes, in the order of :attr:`BagBatch.omics`. Published are six: tumour
            suppressors, oncogenes, kinases, differentiation markers, transcription factors, cytokines.
        hidden: width of everything, a multiple of ``heads``.
        heads: of the two transformers; the co-attention has one.
        layers: of the two transformers.
        fusion: of the two vectors at the end: side by side, or by their gated outer product.
        dropout: of all layers.
    """

    omic_sizes: tuple[int, ...] = ()
    hidden: int = 256
    heads: int = 8
    layers: int = 2
    fusion: Literal["concat", "bilinear"] = "concat"
    dropout: float = 0.25

    @classmethod
    def blca(cls) -> Self:
        """With the groups of the authors' table of bladder cancer."""
        return cls(omic_sizes=(94, 334, 521, 468, 1496, 479))

    @classmethod
    def luad(cls) -> Self:
        """With the groups of the authors' table of lung adenocarcinoma."""
        return cls(omic_sizes=(89, 334, 534, 471, 1510, 482))

    @classmethod
    def ucec(cls) -> Self:
        """With the groups of the authors' table of endometrial cancer."""
        return cls(omic_sizes=(3, 24, 21, 22, 65, 15))


@dataclass(frozen=True)
class LateFusionOptions:
    """Options of :class:`LateFusion`; the defaults are those of MCAT's comparisons.

    Attributes:
        omic_sizes: values in each group of genes; the groups are put side by side.
        hidden: size of the vectors that are fused; the bag model must have as many outputs.
        fusion: as in :class:`McatOptions`.
        dropout: of all layers.
    """

    omic_sizes: tuple[int, ...] = ()
    hidden: int = 256
    fusion: Literal["concat", "bilinear"] = "concat"
    dropout: float = 0.25


@final
class Mcat(BagModel):
    """Groups of genes attend to the instances; two transformers over groups; gated attention; fusion.

    State-dict keys are those of the authors' ``MCAT_Surv``: ``wsi_net.0.weight``, ``sig_networks.0.0.0.weight`` …,
    ``coattn.in_proj_weight``, ``path_transformer.layers.0.…``, ``path_attention_head.attention_a.0.weight`` …,
    ``path_rho.0.weight``, ``omic_transformer.…``, ``omic_attention_head.…``, ``omic_rho.0.weight``, ``mm.0.weight``,
    ``classifier.weight``.

    Args:
        options: sizes.
        dim: size D of an embedding.
        outputs: number of logits.

    Raises:
        ConfigError: no groups of genes.

    Source: Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images",
    ICCV 2021, and the authors' code.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"omics"})

    def __init__(self, options: McatOptions, dim: int, outputs: int):
        super().__init__()
        _check_sizes(options.omic_sizes)
        self.options = options
        width, dropout = options.hidden, options.dropout
        self.wsi_net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.sig_networks = nn.ModuleList(_omic_network(size, width, dropout) for size in options.omic_sizes)
        self.coattn = nn.MultiheadAttention(width, 1)
        self.path_transformer = _transformer(options)
        self.path_attention_head = GatedAttention(width, width, dropout=dropout)
        self.path_rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.omic_transformer = _transformer(options)
        self.omic_attention_head = GatedAttention(width, width, dropout=dropout)
        self.omic_rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.mm = _fusion(options.fusion, width, dropout)
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and co-attention [T, groups] of each group of genes to the instances.

        Raises:
            EvaluationError: the groups of genes are not those that the model was made for.
        """
        groups = _check_omics(bags, self.options.omic_sizes)
        nets = zip(self.sig_networks, groups, strict=True)
        omics = torch.stack([net(group) for net, group in nets], 1)  # [B, groups, hidden]
        path, attention = self._attend(omics, self.wsi_net(bags.x), bags)
        path = _pool(self.path_attention_head, self.path_transformer(path))
        omic = _pool(self.omic_attention_head, self.omic_transformer(omics))
        fused = self.mm(torch.cat([self.path_rho(path), self.omic_rho(omic)], 1))
        return BagOutput(self.classifier(fused), attention)

    def _attend(self, queries: Tensor, h: Tensor, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Means [B, groups, hidden] of the instances ``h`` [T, hidden] for each group, and weights [T, groups].

        The projections of keys and values are applied to the queries and to the means, which are few, not to the
        instances: q · (K h + c) is (Kᵀ q) · h and a number that the softmax does not see, and weights sum to 1.
        """
        layer = self.coattn
        w_query, w_key, w_value = layer.in_proj_weight.chunk(3)
        b_query, _, b_value = layer.in_proj_bias.chunk(3)
        q = F.linear(queries, w_query, b_query) * w_query.shape[0] ** -0.5
        weights = segment_softmax(segment_dot(h, F.linear(q, w_key.T), bags), bags)
        means = segment_pool(weights, h, bags)
        return layer.out_proj(F.linear(means, w_value, b_value)), weights


@final
class LateFusion(BagModel):
    """Another model's vector of a bag, and a network's of all genes, fused before the classifier.

    A loss of its own that the bag model has, such as CLAM's of instances, is not part of this model's.

    Args:
        options: sizes.
        bag_model: gives ``options.hidden`` outputs, which count as the bag's vector.
        outputs: number of logits.

    Attributes:
        bag_model: the model of the bags.
        needs: what that one needs, and "omics".

    Raises:
        ConfigError: no groups of genes.

    Source: the comparisons of Chen et al., ICCV 2021 (MCAT), and the authors' code; differs: the bag's vector is a
    layer above what the bag model pools, so that any model can be had.
    """

    def __init__(self, options: LateFusionOptions, bag_model: BagModel, outputs: int):
        super().__init__()
        _check_sizes(options.omic_sizes)
        self.options = options
        self.bag_model = bag_model
        vars(self)["needs"] = bag_model.needs | {"omics"}  # a class's own elsewhere
        width, dropout = options.hidden, options.dropout
        self.dropout = nn.Dropout(dropout)
        self.fc_omic = _omic_network(sum(options.omic_sizes), width, dropout)
        self.mm = _fusion(options.fusion, width, dropout)
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs], and the attention of the bag model.

        Raises:
            EvaluationError: the groups of genes are not those that the model was made for.
        """
        groups = _check_omics(bags, self.options.omic_sizes)
        output = self.bag_model(bags)
        path = self.dropout(F.relu(output.logits))
        fused = self.mm(torch.cat([path, self.fc_omic(torch.cat(groups, 1))], 1))
        return BagOutput(self.classifier(fused), output.attention)


class _Bilinear(nn.Module):
    """Gated outer product of two vectors, by the keys of the authors' ``BilinearFusion``.

    Source: Chen et al., arXiv 1912.08937 (Pathomic Fusion), eqs. 2–4.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.dim, narrow = dim, dim // _BRANCH
        for side in ("1", "2"):
            self.add_module(f"linear_h{side}", nn.Sequential(nn.Linear(dim, narrow), nn.ReLU()))
            self.add_module(f"linear_z{side}", nn.Sequential(nn.Linear(2 * dim, narrow)))
            self.add_module(f"linear_o{side}", nn.Sequential(nn.Linear(narrow, narrow), nn.ReLU(), nn.Dropout(dropout)))
        self.dropout = nn.Dropout(dropout)
        self.encoder1 = nn.Sequential(nn.Linear((narrow + 1) ** 2, 256), nn.ReLU(), nn.Dropout(dropout))
        self.encoder2 = nn.Sequential(nn.Linear(256, dim), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, both: Tensor) -> Tensor:
        """Of two vectors side by side [B, 2 dim]: [B, dim]."""
        first, second = both.split(self.dim, 1)
        a, b = self._side("1", first, both), self._side("2", second, both)
        product = (a[:, :, None] * b[:, None]).flatten(1)
        return self.encoder2(self.encoder1(self.dropout(product)))

    def _side(self, side: str, x: Tensor, both: Tensor) -> Tensor:
        """[B, narrow + 1], a 1 at the end, so that the product holds each side by itself too."""
        h, gate = self.get_submodule(f"linear_h{side}")(x), self.get_submodule(f"linear_z{side}")(both)
        out = self.get_submodule(f"linear_o{side}")(gate.sigmoid() * h)
        return F.pad(out, (0, 1), value=1.0)


def _fusion(kind: Literal["concat", "bilinear"], dim: int, dropout: float) -> nn.Module:
    """Of two vectors side by side, [B, 2 dim] → [B, dim]."""
    if kind == "bilinear":
        return _Bilinear(dim, dropout)
    return nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())


def _omic_network(size: int, width: int, dropout: float) -> nn.Sequential:
    """Two layers of a self-normalising network (arXiv 1706.02515)."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(before, width), nn.ELU(), nn.AlphaDropout(dropout)) for before in (size, width))
    )


def _transformer(options: McatOptions) -> nn.TransformerEncoder:
    width = options.hidden
    layer = nn.TransformerEncoderLayer(width, options.heads, 2 * width, options.dropout, batch_first=True)
    return nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)


def _pool(attention: GatedAttention, x: Tensor) -> Tensor:
    """Mean [B, D] of [B, groups, D] by attention."""
    weights = attention(x).float().softmax(1).to(x.dtype)
    return cast(Tensor, (weights.mT @ x).squeeze(1))


def _check_sizes(sizes: tuple[int, ...]) -> None:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"omic_sizes must be the values in each group of genes, not {sizes}")


def _check_omics(bags: BagBatch, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    found = tuple(group.shape[1] for group in bags.omics)
    if found != sizes:
        raise EvaluationError(f"the bags have groups of {found} genomic values, the model was made for {sizes}")
    return bags.omics

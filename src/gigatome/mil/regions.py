"""Models of slides as sets of regions: the upper levels of HIPT, and a plain transformer over regions."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigatome.core.errors import ConfigError
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import open_region_encoder
from gigatome.mil.abmil import GatedAttention
from gigatome.mil.model import BagBatch, BagModel, BagOutput
from gigatome.mil.segments import segment_dot, segment_max, segment_pool, segment_softmax

_REGIONS = 64  # that the region encoder sees at once
_QUERIES = 1024  # of a long bag that attend at once, where dropout keeps PyTorch from fusing the attention


@dataclass(frozen=True)
class HiptOptions:
    """Options of :class:`HiptLgpFc` and :class:`HiptGpFc`; the defaults are the published ones but for ``skip_empty``.

    Attributes:
        rows: rows of the grid of tiles in a region, of which an instance is a row-major list; None for a square one.
        weights: of the region encoder to start from, whatever
            :func:`~gigatome.encoders.region_zoo.open_region_encoder` takes; None for random ones.
        encoder: sizes of a region encoder with random weights, but for ``input_dim``; None for those of HIPT, or of
            ``weights``.
        freeze: leave the region encoder as it is. :class:`HiptGpFc` on embeddings of regions by that encoder is then
            the same model, and computes them once.
        skip_empty: tiles whose embedding is all zeros, which are background or beyond the slide, are not attended to.
        dropout: of all layers above the region encoder, and of the attention weights among regions.
        layers: of the transformer over regions.
        heads: of its attention.
    """

    rows: int | None = None
    weights: str | None = None
    encoder: RegionVitConfig | None = None
    freeze: bool = False
    skip_empty: bool = True
    dropout: float = 0.25
    layers: int = 2
    heads: int = 3

    @classmethod
    def hipt(cls) -> Self:
        """As the authors' code, which attends to every place of a region."""
        return cls(skip_empty=False)

    @classmethod
    def pretrained(cls, weights: str) -> Self:
        """The best of the paper's table: ViT4096 trained on regions, and not changed any more."""
        return cls(weights=weights, freeze=True)


@dataclass(frozen=True)
class HiptNoneOptions:
    """Options of :class:`HiptNoneFc`; the defaults are the published ones but for ``skip_empty``.

    Attributes:
        hidden: width of all layers.
        skip_empty: as in :class:`HiptOptions`.
        dropout: of all layers.
    """

    hidden: int = 256
    skip_empty: bool = True
    dropout: float = 0.25

    @classmethod
    def hipt(cls) -> Self:
        """As the authors' code, which attends to every place of a region."""
        return cls(skip_empty=False)


@dataclass(frozen=True)
class RegionTransformerOptions:
    """Options of :class:`RegionTransformer`.

    Attributes:
        hidden: width of a token, a multiple of 4 and of ``heads``.
        layers: of the transformer.
        heads: of its attention.
        dropout: of all its layers.
        pitch: level-0 pixels that count as one step of the position encoding, such as the side of a region.
    """

    hidden: int = 192
    layers: int = 2
    heads: int = 3
    dropout: float = 0.1
    pitch: float = 4096.0

    def __post_init__(self):
        if self.hidden % 4 or self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of 4 and of heads, not {self.hidden} of {self.heads}")


class _HiptGlobal(BagModel):
    """HIPT above the regions: a layer, a transformer over regions without positions, gated attention, a layer."""

    def __init__(self, options: HiptOptions, dim: int, outputs: int):
        super().__init__()
        if dim % options.heads:
            raise ConfigError(f"region embeddings of {dim} do not divide into {options.heads} heads; give other heads")
        self.options = options
        dropout = options.dropout
        self.global_phi = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.global_transformer = _Transformer(dim, dim, options.layers, options.heads, dropout, norm_first=False)
        self.global_attn_pool = GatedAttention(dim, dim, dropout=dropout)
        self.global_rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(dim, outputs)

    def _aggregate(self, x: Tensor, bags: BagBatch) -> BagOutput:
        """Of region embeddings [T, dim]."""
        x, _ = self.global_transformer(self.global_phi(x), _spans(bags.bounds, len(x)))
        attention = segment_softmax(self.global_attn_pool(x), bags)
        pooled = segment_pool(attention, x, bags).squeeze(1)
        return BagOutput(self.classifier(self.global_rho(pooled)), attention)


@final
class HiptLgpFc(_HiptGlobal):
    """HIPT with its region encoder: an instance is a region, a grid of tile embeddings.

    State-dict keys are those of the authors' ``HIPT_LGP_FC``: ``local_vit.…`` (those of
    :class:`~gigatome.encoders.region_vit.RegionVit`), ``global_phi.0.weight``,
    ``global_transformer.layers.0.self_attn.in_proj_weight`` …, ``global_attn_pool.attention_a.0.weight`` …,
    ``global_rho.0.weight``, ``classifier.weight``.

    Args:
        options: sizes.
        dim: size D of a tile's embedding; 384 for the authors' weights.
        outputs: number of logits.

    Raises:
        StoreError: the weights cannot be read.
        RunError: they are those of another model.
        ConfigError: they are of a region encoder of other sizes.

    Source: Chen et al., CVPR 2022 (HIPT), and the authors' code; differs: places without a tile are not attended to,
    save with :meth:`HiptOptions.hipt`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"regions"})

    def __init__(self, options: HiptOptions, dim: int, outputs: int):
        config = replace(options.encoder or RegionVitConfig(), input_dim=dim)
        local_vit = RegionVit(config) if options.weights is None else _region_encoder(options, config)
        super().__init__(options, local_vit.dim, outputs)
        self.local_vit = local_vit
        if options.freeze:
            self.local_vit.requires_grad_(False)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1] of regions [T, tiles, D]."""
        rows = _rows(bags.x, self.options.rows)
        parts = bags.x.split(_REGIONS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.options.freeze):
            regions = torch.cat([self._region(part, rows) for part in parts])
        return self._aggregate(regions, bags)

    def _region(self, x: Tensor, rows: int) -> Tensor:
        grids = x.mT.unflatten(2, (rows, -1))
        mask = _present(x).unflatten(1, (rows, -1)) if self.options.skip_empty else None
        return self.local_vit(grids, mask)


@final
class HiptGpFc(_HiptGlobal):
    """HIPT above the regions alone: an instance is a region's embedding [192].

    Its keys are those of :class:`HiptLgpFc` without ``local_vit``, as in the authors' ``HIPT_GP_FC``.

    Args:
        options: sizes; those of the region encoder do not matter.
        dim: size D of a region's embedding, a multiple of the heads.
        outputs: number of logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"region embeddings"})

    def __init__(self, options: HiptOptions, dim: int, outputs: int):
        super().__init__(options, dim, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1] of region embeddings [T, D]."""
        return self._aggregate(bags.x, bags)


@final
class HiptNoneFc(BagModel):
    """HIPT without transformers: gated attention over the tiles of each region, then over regions.

    State-dict keys are those of the authors' ``HIPT_None_FC``: ``local_phi.0.weight``,
    ``local_attn_pool.attention_a.0.weight`` …, ``global_phi.0.weight``, ``global_attn_pool.…``,
    ``global_rho.0.weight``, ``classifier.weight``.

    Args:
        options: sizes.
        dim: size D of a tile's embedding.
        outputs: number of logits.

    Source: Chen et al., CVPR 2022 (HIPT), table 1, and the authors' code; differs as :class:`HiptLgpFc` does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"regions"})

    def __init__(self, options: HiptNoneOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        width, dropout = options.hidden, options.dropout
        self.local_phi = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.local_attn_pool = GatedAttention(width, width, dropout=dropout)
        self.global_phi = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.global_attn_pool = GatedAttention(width, width, dropout=dropout)
        self.global_rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1] of regions [T, tiles, D]."""
        _rows(bags.x, 1)
        tiles = self.local_phi(bags.x)
        scores = self.local_attn_pool(tiles).float()
        if self.options.skip_empty:
            # finite, so that a region without any tile has a mean too
            scores = scores.masked_fill(~_present(bags.x)[..., None], -1e9)
        x = self.global_phi((scores.softmax(1).to(tiles.dtype).mT @ tiles).squeeze(1))
        attention = segment_softmax(self.global_attn_pool(x), bags)
        pooled = segment_pool(attention, x, bags).squeeze(1)
        return BagOutput(self.classifier(self.global_rho(pooled)), attention)


@final
class RegionTransformer(BagModel):
    """A class token and all regions, which know where they lie, through a pre-norm transformer.

    Positions are sines and cosines of the distance in ``pitch`` from the bag's left and top, so that they mean the
    same on slides of any size. Memory grows linearly with the regions, time with their square.

    Args:
        options: sizes.
        dim: size D of a region's embedding.
        outputs: number of logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"coords", "region embeddings"})

    def __init__(self, options: RegionTransformerOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        width = options.hidden
        self.proj = nn.Linear(dim, width)
        self.cls_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.transformer = _Transformer(
            width, 4 * width, options.layers, options.heads, options.dropout, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1] of region embeddings [T, D].

        The attention is how the class token attends to regions in the last layer, the mean over heads.

        Raises:
            ValueError: the bags have no coordinates.
        """
        if bags.coords is None:
            raise ValueError("the transformer over regions needs the coordinates of the instances")
        corner = -segment_max(-bags.coords.float(), bags)
        steps = (bags.coords - corner[bags.bag]) / self.options.pitch
        x = self.proj(bags.x)
        x = x + _sines(steps, x.shape[1]).to(x.dtype)
        # each bag's class token stands before its regions
        count = torch.arange(len(bags) + 1, device=x.device)
        bounds = bags.bounds + count
        rows = torch.arange(len(x), device=x.device) + bags.bag + 1
        tokens = x.new_empty(len(x) + len(bags), x.shape[1])
        tokens = tokens.index_copy(0, rows, x).index_copy(
            0, bounds[:-1], self.cls_token.to(x.dtype).expand(len(bags), -1)
        )
        out, entered = self.transformer(tokens, _spans(bounds, len(tokens)))
        attention = self._seen(entered, rows, bounds[:-1], bags)
        return BagOutput(self.classifier(self.norm(out[bounds[:-1]])), attention)

    @torch.no_grad()
    def _seen(self, x: Tensor, rows: Tensor, first: Tensor, bags: BagBatch) -> Tensor:
        """Attention [T, 1] of class tokens, rows ``first``, to regions, ``rows``, of what enters the last layer."""
        q, k, _ = self.transformer.project(len(self.transformer.layers) - 1, x)
        scale = q.shape[-1] ** -0.5
        heads = zip(q[first].unbind(1), k[rows].unbind(1), strict=True)
        scores = torch.cat([segment_dot(key.float(), query[:, None].float(), bags) for query, key in heads], 1)
        return segment_softmax(scores * scale, bags).mean(1, keepdim=True)


class _Transformer(nn.Module):
    """Layers of PyTorch's transformer, by its keys, over tokens of several bags one after the other."""

    def __init__(self, dim: int, hidden: int, layers: int, heads: int, dropout: float, *, norm_first: bool):
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(dim, heads, hidden, dropout) for _ in range(layers))

    def forward(self, x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Of tokens [T, D]: what comes out, and what entered the last layer, both [T, D]."""
        entered = x
        for index, layer in enumerate(cast("list[nn.TransformerEncoderLayer]", list(self.layers))):
            entered = x
            if self.norm_first:
                x = x + layer.dropout1(self._attend(index, x, spans))
                x = x + self._feed(layer, layer.norm2(x))
            else:
                x = layer.norm1(x + layer.dropout1(self._attend(index, x, spans)))
                x = layer.norm2(x + self._feed(layer, x))
        return x, entered

    def project(self, index: int, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [T, heads, d] of layer ``index`` for what enters it, [T, D]."""
        layer = cast(nn.TransformerEncoderLayer, self.layers[index])
        x = layer.norm1(x) if self.norm_first else x
        attention = layer.self_attn
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(1, (3, self.heads, -1)).unbind(1)

    def _attend(self, index: int, x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        attention = cast(nn.TransformerEncoderLayer, self.layers[index]).self_attn
        q, k, v = (part.transpose(0, 1)[None] for part in self.project(index, x))  # [1, heads, T, d]
        dropout = attention.dropout if self.training else 0.0
        parts = [_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], dropout) for a, b in spans]
        return attention.out_proj(torch.cat(parts, 2)[0].transpose(0, 1).flatten(1))

    @staticmethod
    def _feed(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        return layer.dropout2(layer.linear2(layer.dropout(F.relu(layer.linear1(x)))))


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention [1, heads, n, d] with no [n, n] in memory for long."""
    if not dropout or q.shape[2] <= _QUERIES or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    parts = [
        checkpoint(F.scaled_dot_product_attention, part, k, v, dropout_p=dropout, use_reentrant=False)
        for part in q.split(_QUERIES, 2)
    ]
    return torch.cat(cast("list[Tensor]", parts), 2)


def _spans(bounds: Tensor, size: int) -> list[tuple[int, int]]:
    """Where each bag begins and ends; one bag is known without asking the device."""
    return [(0, size)] if len(bounds) == 2 else list(itertools.pairwise(bounds.tolist()))


def _sines(steps: Tensor, dim: int) -> Tensor:
    """Sines and cosines float32 [T, dim] of places [T, 2] at wavelengths from 2π to 20,000π."""
    frequencies = 10_000 ** -(torch.arange(dim // 4, device=steps.device) / (dim // 4))
    angles = (steps.float()[:, :, None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _present(x: Tensor) -> Tensor:
    """Tiles bool [T, tiles] whose embedding is not all zeros."""
    return (x != 0).any(2)


def _region_encoder(options: HiptOptions, config: RegionVitConfig) -> RegionVit:
    """The region encoder of ``options.weights``, which takes what ``config`` says."""
    encoder, _ = open_region_encoder(options.weights or "")
    wanted = replace(encoder.config, input_dim=config.input_dim) if options.encoder is None else config
    if encoder.config != wanted:
        raise ConfigError(
            f"{options.weights}: is a region encoder of {encoder.config}, and {wanted} is wanted; leave the option "
            "encoder out, and embed the tiles with the encoder that it was trained on"
        )
    return encoder.train()


def _rows(x: Tensor, rows: int | None) -> int:
    """Rows of the grids of regions [T, tiles, D]; of a square grid if nobody says."""
    if x.ndim == 3 and x.shape[1]:
        found = math.isqrt(x.shape[1]) if rows is None else rows
        if x.shape[1] % found == 0 and (rows is not None or found**2 == x.shape[1]):
            return found
    raise ConfigError(
        f"this model takes regions [T, tiles, D] of {rows or 'as many'} rows of tiles"
        f"{'' if rows else ' as columns'}, not {list(x.shape)}; embeddings of tiles are for other models"
    )

"""TransMIL: a transformer over all instances of a bag, by Nyström attention."""

import itertools
import math
from dataclasses import dataclass
from typing import cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.mil.model import BagBatch, BagModel, BagOutput

_ITERATIONS = 6  # of the pseudo-inverse
_KERNEL = 33  # of the convolution along the instances


@dataclass(frozen=True)
class TransMilOptions:
    """Options of :class:`TransMil`; the defaults are the published ones.

    Attributes:
        hidden: width of an instance; a multiple of ``heads``.
        heads: of the attention.
        landmarks: queries and keys that stand for all others; None for half of ``hidden``, as published.
        dropout: after each attention.
    """

    hidden: int = 512
    heads: int = 8
    landmarks: int | None = None
    dropout: float = 0.1

    def __post_init__(self):
        if self.hidden % self.heads or self.hidden < 2:
            raise ValueError(f"hidden must be a multiple of heads, not {self.hidden} of {self.heads}")


@final
class TransMil(BagModel):
    """A class token and all instances through Nyström attention, a convolution over a square, and attention again.

    State-dict keys are the authors': ``_fc1.0.weight``, ``cls_token``, ``layer1.norm.weight``,
    ``layer1.attn.to_qkv.weight``, ``layer1.attn.to_out.0.weight``, ``layer1.attn.res_conv.weight``,
    ``pos_layer.proj.weight`` (7 × 7), ``proj1`` (5 × 5), ``proj2`` (3 × 3), ``layer2.…``, ``norm.weight``,
    ``_fc2.weight``.

    The square is filled with the instances in the order in which they come and has nothing to do with where they lie.
    Its last places are taken by the first instances once more. Time and memory grow linearly with the instances.

    Args:
        options: sizes.
        dim: size D of an embedding.
        outputs: number of logits.

    Source: Shao et al., arXiv 2106.00908, and the authors' code; the attention is that of arXiv 2102.03902, eq. 14, as
    in the library that they use: zeros stand before the first token to make up whole landmarks, and are attended to.
    """

    def __init__(self, options: TransMilOptions, dim: int, outputs: int):
        super().__init__()
        self.options = options
        width = options.hidden
        self.pos_layer = _PositionConv(width)
        self._fc1 = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.layer1 = _Layer(options)
        self.layer2 = _Layer(options)
        self.norm = nn.LayerNorm(width)
        self._fc2 = nn.Linear(width, outputs)

    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits [B, outputs] and attention [T, 1].

        The attention is how the class token attends in the second layer, the mean over heads; it is not computed in
        training. Nyström's approximation of it may be negative: such values count as zero.
        """
        h = self._fc1(bags.x)
        whole = [0, len(h)]
        bounds = whole if len(bags) == 1 else bags.bounds.tolist()
        found = [self._bag(h[start:stop]) for start, stop in itertools.pairwise(bounds)]
        logits = self._fc2(self.norm(torch.stack([token for token, _ in found])))
        seen = [attention for _, attention in found if attention is not None]
        return BagOutput(logits, torch.cat(seen)[:, None] if seen else None)

    def _bag(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class token [D] that comes out for the instances [n, D] of one bag, and its attention [n]."""
        n, side = len(h), math.isqrt(len(h) - 1) + 1
        x = torch.cat([self.cls_token[0].to(h.dtype), h, h[: side**2 - n]])
        x = self.layer1(x)
        x = torch.cat([x[:1], self.pos_layer(x[1:], side)])
        token, attention = self.layer2.first(x, look=not self.training)
        if attention is None:
            return token, None
        seen = attention[1 : n + 1].clone()
        seen[: side**2 - n] += attention[n + 1 :]  # those that stand there twice
        seen = seen.clamp(min=0)
        total = seen.sum()
        return token, torch.where(total > 0, seen / total.clamp(min=1e-30), 1 / n)


class _PositionConv(nn.Module):
    """Three depth-wise convolutions and the square itself, added: one convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Of [side², D], the same shape."""
        kernel = self.proj.weight + F.pad(self.proj1.weight, [1] * 4) + F.pad(self.proj2.weight, [2] * 4)
        one = torch.zeros_like(kernel[:1])
        one[..., 3, 3] = 1
        bias = sum(cast(Tensor, conv.bias) for conv in (self.proj, self.proj1, self.proj2))
        square = x.T.reshape(1, -1, side, side)
        return F.conv2d(square, kernel + one, cast(Tensor, bias), padding=3, groups=len(kernel)).flatten(2)[0].T


class _Layer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, options: TransMilOptions):
        super().__init__()
        self.norm = nn.LayerNorm(options.hidden)
        self.attn = _NystromAttention(options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))

    def first(self, x: Tensor, *, look: bool) -> tuple[Tensor, Tensor | None]:
        """Of the first token alone: what comes out, [D], and, if asked for, how it attends to all tokens, [n]."""
        out, attention = self.attn.first(self.norm(x), look=look)
        return x[0] + out, attention


class _NystromAttention(nn.Module):
    """Attention of n tokens through m landmarks, the means of tokens that follow one another."""

    def __init__(self, options: TransMilOptions):
        super().__init__()
        dim, self.heads = options.hidden, options.heads
        self.landmarks = options.landmarks or dim // 2
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(options.dropout))
        self.res_conv = nn.Conv2d(
            self.heads, self.heads, (_KERNEL, 1), padding=(_KERNEL // 2, 0), groups=self.heads, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of [n, D], the same shape."""
        q, k, v, q_land, k_land = self._project(x)
        # softmax(q k̃ᵀ) · (softmax(q̃ k̃ᵀ)⁺ · (softmax(q̃ kᵀ) · v)): no product has n × m numbers in memory
        summary = _product(_inverse(q_land, k_land), _attend(q_land, k, v))
        out = _attend(q[:, -len(x) :], k_land, summary) + self.res_conv(v[None])[0, :, -len(x) :]
        return self.to_out(out.transpose(0, 1).flatten(1))

    def first(self, x: Tensor, *, look: bool) -> tuple[Tensor, Tensor | None]:
        """Of the first of the tokens [n, D] alone: what comes out, [D], and the mean over heads of its attention, [n].

        The attention has no gradient, and is None unless asked for.
        """
        q, k, v, q_land, k_land = self._project(x)
        place, reach = k.shape[1] - len(x), _KERNEL // 2
        inverse = _inverse(q_land, k_land)
        query = q[:, place : place + 1]
        near = F.pad(v, (0, 0, reach, reach))[:, place : place + _KERNEL]
        residual = torch.einsum("hkd,hk->hd", near, self.res_conv.weight[:, 0, :, 0].to(v.dtype))
        out = _attend(query, k_land, _product(inverse, _attend(q_land, k, v)))[:, 0] + residual
        return self.to_out(out.flatten()), _seen(query, k_land, inverse, q_land, k)[place:] if look else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [heads, padded n, d], and landmarks of queries and keys [heads, m, d]."""
        m = self.landmarks
        every = math.ceil(len(x) / m)
        x = F.pad(x, (0, 0, every * m - len(x), 0))
        q, k, v = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        q = q * q.shape[-1] ** -0.5
        return q, k, v, q.unflatten(1, (m, every)).mean(2), k.unflatten(1, (m, every)).mean(2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0]


def _product(inverse: Tensor, v: Tensor) -> Tensor:
    """The pseudo-inverse times values; it has large numbers of both signs, and needs its float32."""
    with torch.autocast(v.device.type, enabled=False):
        return (inverse @ v.float()).to(v.dtype)


@torch.no_grad()
def _seen(query: Tensor, k_land: Tensor, inverse: Tensor, q_land: Tensor, k: Tensor) -> Tensor:
    """Attention [padded n] of one query [heads, 1, d] to all keys, the mean over heads."""
    with torch.autocast(k.device.type, enabled=False):
        weights = (query.float() @ k_land.float().mT).softmax(-1) @ inverse  # [heads, 1, m]
        # a head at a time: m × n numbers each
        heads = zip(weights, q_land.float(), k.float(), strict=True)
        return torch.stack([(w @ (landmark @ key.T).softmax(-1))[0] for w, landmark, key in heads]).mean(0)


def _inverse(q: Tensor, k: Tensor) -> Tensor:
    """Approximate pseudo-inverse float32 [heads, m, m] of the attention among landmarks.

    Source: arXiv 2102.03902, eq. 11; the start of the iteration takes the largest sums over all heads, as in the
    library.
    """
    with torch.autocast(q.device.type, enabled=False):
        a = (q.float() @ k.float().mT).softmax(-1)
        z = a.mT / (a.sum(-1).max() * a.sum(-2).max())
        one = torch.eye(a.shape[-1], device=a.device)
        for _ in range(_ITERATIONS):
            az = a @ z
            z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
        return z

"""LongNet's dilated attention: each head attends within segments of several lengths, to every r-th token of each.

Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486, and torchscale's code.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigatome.core.errors import ConfigError
from gigatome.encoders.dilated_kernels import Gradients, kernel_for

_ROWS = 2**20  # tokens × heads of whole segments that a kernel sees at once, which bounds what is copied for it


@final
@dataclass(frozen=True)
class DilatedOptions:
    """What attends to what.

    A branch is a segment length and a ratio r: the sequence is cut into segments, and in each of them a head sees the
    tokens at its offset o, o + r, o + 2r, …. A token that several branches show to a head counts once for each.

    Attributes:
        segments: length in tokens of each branch's segments; sequences that are shorter are one segment.
        ratios: of each branch.
        heads: attention heads.
        offsets: offset of head j: ``"torchscale"`` is j // ceil(heads / r), as published weights have it, and
            ``"paper"`` is j mod r.
        padding: what stands beyond the end of the sequence in its last segment: ``"masked"`` is nothing, and
            ``"torchscale"`` is keys and values of zero, which take a share of the softmax.
        merge: branches are weighted by their softmax denominators; ``"gradient"`` differentiates these weights, and
            ``"detached"`` holds them for constants, as torchscale does.

    Raises:
        ConfigError: the branches do not pair up, or a number is not positive.
    """

    segments: tuple[int, ...]
    ratios: tuple[int, ...]
    heads: int
    offsets: Literal["torchscale", "paper"] = "torchscale"
    padding: Literal["masked", "torchscale"] = "masked"
    merge: Literal["gradient", "detached"] = "gradient"

    def __post_init__(self):
        if len(self.segments) != len(self.ratios) or not self.segments:
            raise ConfigError(
                f"dilated attention needs as many ratios as segments, and one at least, not segments {self.segments} "
                f"and ratios {self.ratios}"
            )
        if min(*self.segments, *self.ratios, self.heads) < 1:
            raise ConfigError(f"segments {self.segments}, ratios {self.ratios} and heads {self.heads} must be positive")

    @classmethod
    def compat(cls, segments: tuple[int, ...], ratios: tuple[int, ...], heads: int) -> Self:
        """As torchscale computes it: for what was trained with it, and is to be trained on as it was.

        One difference is meant: where a segment is no multiple of its ratio, torchscale shifts the outputs of every
        segment but the first, and these here stay in their places.
        """
        return cls(segments, ratios, heads, offsets="torchscale", padding="torchscale", merge="detached")


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions) -> Tensor:
    """Dilated attention of a sequence of any length.

    Only the arguments, the output and one log-sum-exp a token and head are kept for the gradient, so that memory grows
    linearly with the tokens. Sums are float32 at least. Tokens that no branch shows to a head get 0.

    Args:
        q: queries, float [B, N, heads, d].
        k: keys, likewise.
        v: values, likewise.
        options: what attends to what.

    Returns:
        [B, N, heads, d].

    Raises:
        ConfigError: the tensors have another number of heads than the options.
    """
    if q.shape[2] != options.heads:
        raise ConfigError(f"queries of {q.shape[2]} heads, but dilated attention is set for {options.heads}")
    return _Dilated.apply(q, k, v, options)  # pyright: ignore[reportReturnType]


@final
class DilatedAttention(nn.Module):
    """Multi-head dilated self-attention with its projections.

    State-dict keys are torchscale's: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``inner_attn_ln``.

    Args:
        dim: width of a token.
        options: what attends to what.
        inner_norm: whether the heads' outputs go through a norm before the last projection (SubLN).

    Raises:
        ConfigError: the heads do not divide ``dim``.
    """

    def __init__(self, dim: int, options: DilatedOptions, *, inner_norm: bool = True):
        super().__init__()
        if dim % options.heads:
            raise ConfigError(f"dim must be a multiple of heads, not {dim} of {options.heads}")
        self.options = options
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(dim, eps=1e-5) if inner_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, dim] of tokens [B, N, dim]."""
        return self.project_out(dilated_attention(*self.project_in(x), self.options))

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, heads, d]."""
        heads = (self.options.heads, -1)
        return (
            self.q_proj(x).unflatten(2, heads),
            self.k_proj(x).unflatten(2, heads),
            self.v_proj(x).unflatten(2, heads),
        )

    def project_out(self, out: Tensor) -> Tensor:
        """Tokens [B, N, dim] of the heads' outputs [B, N, heads, d]."""
        out = out.flatten(2)
        return self.out_proj(out if self.inner_attn_ln is None else self.inner_attn_ln(out))


@final
@dataclass(frozen=True)
class Part:
    """Segments of one branch, and heads, in which each head sees equally many tokens.

    Heads come in groups, whose offsets follow each other: group g has offset ``offset + g`` and the heads ``head +
    g × group_step + m × member_step``.

    Attributes:
        start: first token of the first segment, of those at hand.
        segments: how many.
        length: tokens of a segment.
        ratio: step from one seen token to the next.
        offset: of the first group, from ``start``.
        tokens: that a head sees in a segment, of those at hand.
        seen: likewise in each piece of a segment that is cut, of which one is at hand.
        padded: tokens that it would see beyond the end of the sequence.
        head: first head.
        groups: how many.
        members: heads of a group.
        group_step: heads from one group to the next.
        member_step: heads from one member to the next.
    """

    start: int
    segments: int
    length: int
    ratio: int
    offset: int
    tokens: int
    seen: tuple[int, ...]
    padded: int
    head: int
    groups: int
    members: int
    group_step: int
    member_step: int

    def view(self, x_BNHd: Tensor) -> Tensor:
        """Its places in a tensor: [B, segments, groups, members, tokens, d], without copying."""
        b, n, h, d = x_BNHd.stride()
        return x_BNHd.as_strided(
            (len(x_BNHd), self.segments, self.groups, self.members, self.tokens, x_BNHd.shape[3]),
            (b, self.length * n, n + self.group_step * h, self.member_step * h, self.ratio * n, d),
            x_BNHd.storage_offset() + (self.start + self.offset) * n + self.head * h,
        )

    def batch(self, view: Tensor) -> Tensor:
        """[B × segments, groups × members, tokens, d] of the shape of :meth:`view`; copied only where it must be."""
        return view.flatten(2, 3).flatten(0, 1)

    def shaped(self, batch: Tensor) -> Tensor:
        """A batch in the shape of :meth:`view`."""
        return batch.unflatten(1, (self.groups, self.members)).unflatten(0, (-1, self.segments))


def tokens_at_once(heads: int) -> int:
    """Of a sequence, in a part of several segments."""
    return _ROWS // heads


def whole_parts(options: DilatedOptions, tokens: int, own: range) -> Iterator[Part]:
    """The parts of attention over those segments of a sequence that lie in ``own`` wholly.

    Those of more than one segment are of a bounded number of tokens.

    Args:
        options: what attends to what.
        tokens: of the sequence.
        own: the tokens at hand, which the parts count from.
    """
    most = tokens_at_once(options.heads)
    for segment, ratio in zip(options.segments, options.ratios, strict=True):
        segment = min(segment, tokens)
        for start, segments, length in _pieces(segment, tokens, own, most):
            yield from cut_parts(options, ratio, start - own.start, segments, (0, length), 0, -(-segment // ratio))


def _pieces(segment: int, tokens: int, own: range, most: int) -> Iterator[tuple[int, int, int]]:
    """First token, number and length of equal segments in a row."""
    if not own:
        return
    end, step = own.stop // segment, max(1, most // segment)
    for first in range(-(-own.start // segment), end, step):
        yield first * segment, min(step, end - first), segment
    if own.start <= end * segment < own.stop == tokens:
        yield end * segment, 1, tokens - end * segment


def cut_parts(
    options: DilatedOptions, ratio: int, start: int, segments: int, cuts: Sequence[int], piece: int, slots: int
) -> Iterator[Part]:
    """Heads by their offsets, in segments that may be cut into pieces.

    Args:
        options: what attends to what.
        ratio: of the branch.
        start: first token of the piece at hand, of those at hand.
        segments: how many segments; 1 if it is cut.
        cuts: where the pieces of a segment begin, and its end, in tokens from its first.
        piece: which of them is at hand.
        slots: how many tokens each head would see if the segment were whole and padded.
    """
    edges = sorted({0, ratio, *(cut % ratio for cut in cuts)})  # offsets between two see equally much of every piece
    for head, offset, groups, members, group_step, member_step in _head_groups(options, ratio):
        for low, high in pairwise(edges):
            first, last = max(offset, low), min(offset + groups, high)
            before = [-((first - cut) // ratio) for cut in cuts]  # tokens that it sees up to each cut
            seen = tuple(after - until for until, after in pairwise(before))
            if first < last and sum(seen):
                yield Part(
                    start, segments, cuts[-1], ratio, (first - cuts[piece]) % ratio, seen[piece], seen,
                    slots - sum(seen), head + (first - offset) * group_step, last - first, members, group_step,
                    member_step,
                )  # fmt: skip


def _head_groups(options: DilatedOptions, ratio: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """First head, its offset, number of groups, heads of a group, step of groups, step of heads in a group."""
    if options.offsets == "paper":
        members, rest = divmod(options.heads, ratio)
        if members:
            yield 0, 0, ratio, members, 1, ratio
        if rest:
            yield members * ratio, 0, rest, 1, 1, 1
    else:
        members = -(-options.heads // ratio)
        groups, rest = divmod(options.heads, members)
        yield 0, 0, groups, members, members, 1
        if rest:
            yield groups * members, groups, 1, rest, members, 1


@final
class _Dilated(torch.autograd.Function):
    """The branches one after the other, merged as they come.

    The gradient needs no branch's own output: a weight is exp(score - lse) with the log-sum-exp over all branches, as
    in ring attention. With detached merge weights it does, and they are computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions) -> Tensor:
        out, lse = nothing_seen(q)
        with as_they_are(q.device.type):
            for part in whole_parts(options, q.shape[1], range(q.shape[1])):
                attend(part, q, part.view(k), part.view(v), out, lse, options)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        totals = [lse.new_zeros(q.shape) for _ in range(3)]
        with as_they_are(q.device.type):
            for part in whole_parts(ctx.options, q.shape[1], range(q.shape[1])):
                own = Gradients(*map(part.view, totals))
                add_gradients(part, grad, q, part.view(k), part.view(v), out, lse, ctx.options, own)
        return *(total.to(q.dtype) for total in totals), None


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, N, heads, d] and log-sum-exp [B, N, heads, 1] before the first part, float32 or float64."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=exact, device=q.device)
    return out, torch.full((*q.shape[:3], 1), float("-inf"), dtype=exact, device=q.device)


def attend(
    part: Part, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, options: DilatedOptions
) -> None:
    """Merges what the queries of a part see into the output and the log-sum-exp.

    Args:
        part: whose queries.
        q: all queries at hand [B, N, heads, d].
        keys: that they see, [B, segments, groups, members, n, d].
        values: likewise.
        out: so far, as of :func:`nothing_seen`; changed.
        lse: likewise.
        options: what attends to what.
    """
    kernel, padded = kernel_for(q), _padded(part, options)
    own_q, out, lse = map(part.view, (q, out, lse))
    if kernel.in_place is not None:
        kernel.in_place.attend(own_q, keys, values, out, lse, padded)
        return
    own, own_lse = kernel.forward(*map(part.batch, (own_q, keys, values)))
    own, own_lse = part.shaped(own).to(out.dtype), part.shaped(own_lse)[..., None]
    if padded:
        alone, own_lse = own_lse, _with_padding(own_lse, padded)
        own = own * (alone - own_lse).exp_()
    out.lerp_(own, (own_lse - lse).sigmoid_())
    lse.copy_(torch.logaddexp(lse, own_lse))


def add_gradients(
    part: Part, grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor,
    options: DilatedOptions, totals: Gradients,
) -> None:  # fmt: skip
    """Adds a part's share of the gradients of its queries, and of the keys and values they see, to ``totals``.

    Arguments are those of :func:`attend`, with the output and its gradient [B, N, heads, d] and the log-sum-exp
    [B, N, heads, 1] of all parts together. ``totals`` is shaped as :meth:`Part.view` and the keys and values.
    """
    kernel, own_lse = kernel_for(q), part.view(lse)
    own_grad, own_q, own = map(part.view, (grad, q, out))
    if kernel.in_place is not None and options.merge == "gradient":
        kernel.in_place.add_gradients(own_grad, own_q, keys, values, own, own_lse, *totals)
        return
    own_grad, own_q, keys, values, own, own_lse = map(part.batch, (own_grad, own_q, keys, values, own, own_lse))
    if options.merge == "detached":
        own, alone = kernel.forward(own_q, keys, values)
        padded = _with_padding(alone[..., None], _padded(part, options))
        own_grad = (own_grad * (padded - own_lse).exp_()).to(q.dtype)
        own = (own * (alone[..., None] - padded).exp_()).to(q.dtype)
        own_lse = padded
    found = kernel.backward(own_grad, own_q, keys, values, own, own_lse.squeeze(-1))
    for total, gradient in zip(totals, found, strict=True):
        total.add_(part.shaped(gradient))


def as_they_are(device: str) -> AbstractContextManager[Any]:
    """No operation is cast in the block, where a device casts any."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _padded(part: Part, options: DilatedOptions) -> int:
    """How many keys and values of 0 a query of the part sees."""
    return 0 if options.padding == "masked" else part.padded


def _with_padding(lse: Tensor, padded: int) -> Tensor:
    """Log-sum-exp with so many further scores of 0."""
    return torch.logaddexp(lse, lse.new_tensor(log(padded))) if padded else lse

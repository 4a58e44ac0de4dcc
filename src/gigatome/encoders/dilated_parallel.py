"""Dilated attention of a sequence that several processes hold consecutive parts of.

A process takes from its keys and values those that heads see, and exchanges these with the processes that hold pieces
of the same segments. Segments that lie in one process's part wholly are sent nowhere. Lengths and segments may be any.

Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486, §3.1; differs: only
processes that share a segment exchange its keys, and segments may be cut anywhere.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigatome.core.errors import ConfigError
from gigatome.distributed import Exchange, SequenceGroup
from gigatome.encoders.dilated import (
    DilatedOptions,
    Part,
    add_gradients,
    as_they_are,
    attend,
    cut_parts,
    dilated_attention,
    nothing_seen,
    whole_parts,
)
from gigatome.encoders.dilated_kernels import Gradients


@final
@dataclass(frozen=True)
class Share:
    """How a sequence is shared: equally, and what does not divide to the later processes.

    Attributes:
        group: that shares it.
        count: units of the sequence, such as tokens or rows of patches.
        unit: tokens of a unit, which one process holds together.

    Raises:
        ConfigError: there are fewer units than processes.
    """

    group: SequenceGroup
    count: int
    unit: int = 1

    def __post_init__(self):
        if self.count < self.group.size:
            raise ConfigError(
                f"a sequence of {self.count} rows or tokens cannot be shared by {self.group.size} processes; give it "
                f"fewer processes, or pad it to {self.group.size}"
            )

    @property
    def bounds(self) -> tuple[int, ...]:
        """First token of each process, and the end."""
        size = self.group.size
        return tuple(self.unit * (self.count * number // size) for number in range(size + 1))

    @property
    def own(self) -> range:
        """Tokens that this process holds."""
        return range(*self.bounds[self.group.rank : self.group.rank + 2])

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.unit * self.count


def shared_dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions, share: Share | None = None
) -> Tensor:
    """Dilated attention of this process's part of a sequence to the whole of it.

    All processes of the sequence call it together, and come to the gradient together. The gradient is that of the sum
    of their losses. As with one process, only the arguments, the output and one log-sum-exp a token and head are kept
    for it; other processes' keys and values are fetched again.

    Args:
        q: queries of this process's tokens, float [B, len(share.own), heads, d].
        k: keys, likewise.
        v: values, likewise.
        options: what attends to what.
        share: how the sequence is shared; None if this process holds it all.

    Returns:
        [B, len(share.own), heads, d].

    Raises:
        ConfigError: the tensors have another number of heads or tokens.
        RunError: a process does not answer; the message names it.
    """
    if share is None or share.group.size == 1:
        return dilated_attention(q, k, v, options)
    if q.shape[2] != options.heads:
        raise ConfigError(f"queries of {q.shape[2]} heads, but dilated attention is set for {options.heads}")
    if q.shape[1] != len(share.own):
        raise ConfigError(
            f"process {share.group.rank} of {share.group.size} holds {len(share.own)} of {share.tokens} tokens, but "
            f"was given {q.shape[1]}"
        )
    return _Shared.apply(q, k, v, options, share)  # pyright: ignore[reportReturnType]


@final
@dataclass(frozen=True)
class CutSegment:
    """A segment of which several processes hold pieces.

    Attributes:
        holders: the processes, by their rank in the sequence.
        parts: of the piece at hand; ``seen`` of each goes by the holders.
    """

    holders: range
    parts: tuple[Part, ...]


def cut_segments(options: DilatedOptions, bounds: Sequence[int], rank: int) -> list[tuple[CutSegment, ...]]:
    """For each branch that any process shares segments of, those that a process holds pieces of: two at most.

    Args:
        options: what attends to what.
        bounds: first token of each process, and the end; no process has none.
        rank: which process.
    """
    total, own, found = bounds[-1], range(*bounds[rank : rank + 2]), []
    for segment, ratio in zip(options.segments, options.ratios, strict=True):
        segment = min(segment, total)
        if all(bound % segment == 0 for bound in bounds[:-1]):
            continue
        cut: list[CutSegment] = []
        for start in sorted({place - place % segment for place in (own.start, own.stop - 1)}):
            end = min(start + segment, total)
            holders = range(bisect_right(bounds, start) - 1, bisect_left(bounds, end))
            if len(holders) > 1:
                cuts = [0, *(bounds[number] - start for number in holders[1:]), end - start]
                here = max(start, own.start) - own.start
                parts = cut_parts(options, ratio, here, 1, cuts, holders.index(rank), -(-segment // ratio))
                cut.append(CutSegment(holders, tuple(parts)))
        found.append(tuple(cut))
    return found


@final
class _Branch:
    """Keys and values of a branch's cut segments, which begin to travel when it is made, and then their gradients.

    Two processes share one segment of a branch at most. Pieces of it travel flat: keys and values of its parts in turn.
    """

    def __init__(self, segments: Sequence[CutSegment], k: Tensor, v: Tensor, group: SequenceGroup):
        self._segments, self._group, self._like = segments, group, k
        self._shared = {number: segment for segment in segments for number in segment.holders if number != group.rank}
        self._own = [
            _flat([x for part in segment.parts for x in (part.view(k), part.view(v))], k) for segment in segments
        ]
        self._back: dict[int, list[Tensor]] = {number: [] for number in range(group.size)}
        sent = [k.new_empty(0)] * group.size
        for segment, own in zip(segments, self._own, strict=True):
            sent[segment.holders.start : segment.holders.stop] = [own] * len(segment.holders)
        sent[group.rank] = k.new_empty(0)
        self._travelling = Exchange(sent, [self._numbers(number, number) for number in range(group.size)], group)

    def fetched(self) -> Iterator[tuple[range, Part, Tensor, Tensor]]:
        """The holders of each part, the part, and all keys and values that its queries see."""
        received = self._travelling.received()
        for segment, own in zip(self._segments, self._own, strict=True):
            flats = [own if number == self._group.rank else received[number] for number in segment.holders]
            pieces = map(self._unpacked, flats, repeat(segment), segment.holders)
            for part, *pairs in zip(segment.parts, *pieces, strict=True):
                keys, values = (torch.cat(tensors, -2) for tensors in zip(*pairs, strict=True))
                yield segment.holders, part, keys, values

    def give(self, holders: range, part: Part, gradient: Tensor, total: Tensor) -> None:
        """Adds a part's gradient of keys, and then of values, to the ``total`` of one's own, and keeps the others'."""
        for number, piece in zip(holders, gradient.split(part.seen, -2), strict=True):
            if number != self._group.rank:
                self._back[number].append(piece.to(self._like.dtype))
            elif part.tokens:
                part.view(total).add_(piece)

    def send_back(self) -> None:
        """Sends the gradients that others are due, after the last part."""
        sent = [_flat(pieces, self._like) for pieces in self._back.values()]
        own = [self._numbers(number, self._group.rank) for number in range(self._group.size)]
        self._travelling = Exchange(sent, own, self._group)

    def take_back(self, dk: Tensor, dv: Tensor) -> None:
        """Adds the gradients that others have found for this process's keys and values."""
        received = self._travelling.received()
        for number, segment in self._shared.items():
            pieces = self._unpacked(received[number], segment, self._group.rank)
            for part, pair in zip(segment.parts, pieces, strict=True):
                for total, piece in zip((dk, dv), pair, strict=True):
                    if part.tokens:
                        part.view(total).add_(piece)

    def _numbers(self, number: int, holder: int) -> int:
        """Of a holder's piece of the segment shared with a process."""
        if number not in self._shared:
            return 0
        segment = self._shared[number]
        return sum(2 * prod(self._shape(part, segment, holder)) for part in segment.parts)

    def _unpacked(self, flat: Tensor, segment: CutSegment, holder: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each part of a holder's piece."""
        shapes = [self._shape(part, segment, holder) for part in segment.parts]
        flats = flat.split([prod(shape) for shape in shapes for _ in range(2)])
        return [(k.view(shape), v.view(shape)) for shape, k, v in zip(shapes, flats[::2], flats[1::2], strict=True)]

    def _shape(self, part: Part, segment: CutSegment, holder: int) -> tuple[int, ...]:
        """Of a holder's keys in a part, as of :meth:`Part.view`."""
        seen = part.seen[holder - segment.holders.start]
        return len(self._like), part.segments, part.groups, part.members, seen, self._like.shape[3]


def _flat(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_empty(0), *(piece.flatten() for piece in pieces)])


@final
class _Shared(torch.autograd.Function):
    """As one process does it, with the others' keys and values on their way while whole segments are worked on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions, share: Share) -> Tensor:
        out, lse = nothing_seen(q)
        with as_they_are(q.device.type):
            branches = _branches(k, v, options, share)
            for part in whole_parts(options, share.tokens, share.own):
                attend(part, q, part.view(k), part.view(v), out, lse, options)
            for branch in branches:
                for _holders, part, keys, values in branch.fetched():
                    if part.tokens:
                        attend(part, q, keys, values, out, lse, options)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.share = options, share
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        options: DilatedOptions = ctx.options
        grad = grads[0].contiguous()
        dq, dk, dv = (lse.new_zeros(q.shape) for _ in range(3))
        with as_they_are(q.device.type):
            branches = _branches(k, v, options, ctx.share)
            for part in whole_parts(options, ctx.share.tokens, ctx.share.own):
                own = Gradients(*map(part.view, (dq, dk, dv)))
                add_gradients(part, grad, q, part.view(k), part.view(v), out, lse, options, own)
            for branch in branches:
                for holders, part, keys, values in branch.fetched():
                    own_dk, own_dv = (lse.new_zeros(keys.shape) for _ in range(2))
                    if part.tokens:
                        own = Gradients(part.view(dq), own_dk, own_dv)
                        add_gradients(part, grad, q, keys, values, out, lse, options, own)
                    branch.give(holders, part, own_dk, dk)
                    branch.give(holders, part, own_dv, dv)
                branch.send_back()
            for branch in branches:
                branch.take_back(dk, dv)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None


def _branches(k: Tensor, v: Tensor, options: DilatedOptions, share: Share) -> list[_Branch]:
    segments = cut_segments(options, share.bounds, share.group.rank)
    return [_Branch(own, k, v, share.group) for own in segments]

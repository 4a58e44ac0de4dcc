"""Dilated attention of a sequence that several processes hold consecutive parts of.

A process takes from its keys and values those that heads see, and exchanges these with the processes that hold pieces
of the same segments. Segments that lie in one process's part wholly are sent nowhere. Lengths and segments may be any.

Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486, §3.1; differs: only
processes that share a segment exchange its keys, and segments may be cut anywhere.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigatome.core.errors import ConfigError
from gigatome.distributed import Exchange, SequenceGroup
from gigatome.encoders.dilated import (
    DilatedOptions,
    Part,
    as_they_are,
    attend,
    cut_parts,
    dilated_attention,
    gradients,
    nothing_seen,
    whole_parts,
)


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
                f"a sequence of {self.count} parts cannot be shared by {self.group.size} processes; start fewer of them "
                f"for a sequence, or pad it to {self.group.size}"
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
            f"process {share.group.rank} of {share.group.size} holds {len(share.own)} of {share.tokens} tokens, but was "
            f"given {q.shape[1]}"
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
    """Keys and values of a branch's cut segments, which begin to travel when it is made, and their gradients."""

    def __init__(self, segments: Sequence[CutSegment], k: Tensor, v: Tensor, group: SequenceGroup):
        self._segments, self._group, self._like = segments, group, k
        self._own = [[(part.take(k), part.take(v)) for part in segment.parts] for segment in segments]
        packed = [_packed(own, k) for own in self._own]
        self._coming = self._exchange(k, [packed] * group.size, mine=False)
        self._back: list[list[list[tuple[Tensor, Tensor]]]] = [[] for _ in range(group.size)]

    def fetched(self) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Parts with all keys and values that their queries see; :meth:`give` answers each, if there is a gradient."""
        received = self._coming.received()
        for segment, own in zip(self._segments, self._own, strict=True):
            pieces = [
                own if number == self._group.rank else self._unpacked(received[number], segment, number)
                for number in segment.holders
            ]
            for back in self._back:
                back.append([])
            for part, *pairs in zip(segment.parts, *pieces, strict=True):
                keys, values = (torch.cat(tensors, 2) for tensors in zip(*pairs, strict=True))
                yield part, keys, values

    def give(self, part: Part, dk: Tensor, dv: Tensor) -> None:
        """Takes the gradients of what :meth:`fetched` gave last."""
        holders = next(segment.holders for segment in self._segments if part in segment.parts)
        for number, *pair in zip(holders, dk.split(part.seen, 2), dv.split(part.seen, 2), strict=True):
            self._back[number][-1].append((pair[0], pair[1]))

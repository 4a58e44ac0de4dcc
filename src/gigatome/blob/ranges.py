"""The ranges of one remote object: which to ask for together, and whether what arrives is right.

A store may send a short or an altered body that looks well in every other way, and obstore hands it on. So each body's
length is compared with what was asked for, and a checksum is kept of each range, to compare when it is read again.
"""

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

from gigatome.core.errors import StoreError
from gigatome.core.logs import log

if TYPE_CHECKING:
    from gigatome.blob.remote import RemoteBlob
    from gigatome.blob.store import Blob

# Neighbours are joined over a gap if all gaps of the request stay below one part in this many of what is needed of it,
# and below the number of bytes that cost about as much as a request.
_GAP_SHARE = 20
_GAP_BYTES = 4096
# A request is not made longer than this by joining: several arrive sooner than one.
_PIECE_BYTES = 8 << 20


class BrokenBodyError(StoreError):
    """An answer broke off where obstore could not go on from there by itself."""


class Ask(NamedTuple):
    """Ranges to ask the store for in one call, ``delay`` seconds from now."""

    starts: Sequence[int]
    lengths: Sequence[int]
    delay: float


@final
@dataclass
class Traffic:
    """What was read; counted by many threads at once.

    Attributes:
        requests: ranges asked for, after joining. Those that obstore makes again by itself after an error, or that
            it makes because the wire brought none, are not counted.
        needed: bytes that the reader asked for.
        fetched: bytes that arrived, but for those of answers that broke off.
        repeated: requests made because a body was short or differed from an earlier one.
        seconds: from asking to the last byte, summed over calls; more than the clock's where calls overlap.
    """

    requests: int = 0
    needed: int = 0
    fetched: int = 0
    repeated: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, requests: int, needed: int, fetched: int, repeated: int, seconds: float) -> None:
        """Adds to each count."""
        with self._lock:
            self.requests += requests
            self.needed += needed
            self.fetched += fetched
            self.repeated += repeated
            self.seconds += seconds


class Joined(NamedTuple):
    """Requests that cover ranges.

    Attributes:
        starts, lengths: of each request.
        owner: for each range, the request that holds it; -1 if the range is empty.
        needed: bytes of all requests but the gaps.
    """

    starts: list[int]
    lengths: list[int]
    owner: list[int]
    needed: int

    def cut(self, ranges: Sequence[tuple[int, int]], bodies: Sequence[memoryview]) -> list[bytes]:
        """The bytes of each range, of the bodies of the requests."""
        parts, starts = [], self.starts or [0]
        bodies = bodies or [memoryview(b"")]
        for (offset, length), owner in zip(ranges, self.owner, strict=True):
            start = offset - starts[owner]
            parts.append(bytes(bodies[owner][start : start + length]))
        return parts


def join(ranges: Sequence[tuple[int, int]]) -> Joined:
    """Joins ``(offset, length)`` that overlap, touch or all but touch; at most 5 % of a request is not needed."""
    starts: list[int] = []
    ends: list[int] = []
    owner = [0] * len(ranges)
    total = needed = wasted = 0
    for k in sorted(range(len(ranges)), key=ranges.__getitem__):
        offset, length = ranges[k]
        end = offset + length
        if not length:
            owner[k] = -1
            continue
        if starts:
            gap = max(offset - ends[-1], 0)
            new = max(end - max(ends[-1], offset), 0)
            slack = min(_GAP_BYTES, (needed + new) // _GAP_SHARE)
            if wasted + gap <= slack and end - starts[-1] <= _PIECE_BYTES:
                ends[-1] = max(ends[-1], end)
                needed, wasted, total = needed + new, wasted + gap, total + new
                owner[k] = len(starts) - 1
                continue
        owner[k] = len(starts)
        starts.append(offset)
        ends.append(end)
        needed, wasted, total = length, 0, total + length
    return Joined(starts, [end - start for start, end in zip(starts, ends, strict=True)], owner, total)


def reading(
    blob: "RemoteBlob",
    ranges: Sequence[tuple[int, int]],
    *ledgers: Traffic,
    bodies: Sequence[memoryview] | None = None,
) -> Generator[Ask, Any, list[bytes]]:
    """Reads ranges of a remote object, whoever carries the requests.

    Yields what to ask the store for, is sent the bodies in that order or a :class:`BrokenBodyError`, and returns the
    bytes of each range.

    Args:
        blob: the object.
        ranges: ``(offset, length)`` inside it.
        *ledgers: where the traffic is noted.
        bodies: of the requests that :func:`join` makes of the ranges, if they have been read, and noted, already.

    Raises:
        StoreError: a body stays short, or three reads of a range give three contents.
    """
    joined = join(ranges)
    if not joined.starts:
        return [b""] * len(ranges)
    if bodies is None:
        bodies = yield from _whole(blob, joined.starts, joined.lengths, ledgers, needed=joined.needed)
    parts = joined.cut(ranges, bodies)
    doubtful = blob.checksums.differing([(blob.identity, place) for place in ranges], parts)
    if doubtful:
        again = yield from _whole(
            blob, [ranges[k][0] for k in doubtful], [ranges[k][1] for k in doubtful], ledgers, repeated=len(doubtful)
        )
        for k, body in zip(doubtful, again, strict=True):
            parts[k] = _majority(blob, ranges[k], parts[k], bytes(body))
    return parts


def _whole(
    blob: "RemoteBlob",
    starts: Sequence[int],
    lengths: Sequence[int],
    ledgers: Sequence[Traffic],
    needed: int = 0,
    repeated: int = 0,
) -> Generator[Ask, Any, list[memoryview]]:
    """Bodies of the lengths asked for; short ones are asked for again."""
    bodies = [memoryview(b"")] * len(starts)
    short = list(range(len(starts)))
    attempt = 0
    while True:
        began = time.perf_counter()
        answers = yield Ask([starts[k] for k in short], [lengths[k] for k in short], pause(attempt))
        broken = None
        if isinstance(answers, BrokenBodyError):
            answers, broken = [b""] * len(short), answers
        for k, answer in zip(short, answers, strict=True):
            bodies[k] = memoryview(answer)
        seconds, fetched = time.perf_counter() - began, sum(len(bodies[k]) for k in short)
        for ledger in ledgers:
            ledger.add(len(short), needed, fetched, repeated, seconds)
        short = [k for k in short if len(bodies[k]) != lengths[k]]
        if not short:
            return bodies
        attempt, needed, repeated = attempt + 1, 0, len(short)
        if attempt >= blob.options.tries:
            k = short[0]
            raise broken or short_body(blob.uri, len(bodies[k]), lengths[k], starts[k])


def _majority(blob: "RemoteBlob", place: tuple[int, int], first: bytes, again: bytes) -> bytes:
    """The right bytes of a range that did not agree with an earlier read, now that it was read once more."""
    where, key = f"{blob.uri}: bytes {place[0]} to {sum(place)}", (blob.identity, place)
    if not blob.checksums.differing([key], [again]):
        log.warning("%s arrived damaged once; read again", where)
        return again
    if again == first:
        log.warning("%s differ from an earlier read; either that was damaged or the object was replaced", where)
        blob.checksums.replace(key, again)
        return again
    raise StoreError(f"{where} arrive different each time; the network or the server damages them")


def pause(attempt: int) -> float:
    """Seconds to wait before the first (0), second … attempt."""
    return min(0.05 * 2**attempt, 1.0) if attempt else 0.0


def short_body(uri: str, arrived: int, length: int, offset: int) -> StoreError:
    """The error to raise when fewer bytes arrive than were asked for."""
    return StoreError(f"{uri}: {arrived} of {length} bytes arrived from offset {offset}; is it being written?")


def check_range(blob: "Blob", offset: int, length: int) -> None:
    """Raises :class:`StoreError` if a range lies outside the object."""
    if offset < 0 or length < 0 or offset + length > blob.size:
        raise StoreError(f"{blob.uri}: bytes {offset} to {offset + length} lie outside its {blob.size} bytes")

"""Where the time of a tile stream goes, and what would make it faster."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, final

_FAST_ENOUGH = 0.05  # share of the time that whoever uses the tiles may wait without anything being the limit
_IDLE = 0.25  # share of the time that threads may idle while they are still the limit


@final
@dataclass(frozen=True)
class StreamReport:
    """What a stream did between its first batch and now.

    Attributes:
        seconds: that passed.
        waited: seconds in which whoever uses the tiles waited for a batch.
        threads: that decode; as many others draw tiles and open slides.
        batches, tiles: handed over.
        planning: seconds in which tiles were drawn and planned, of all threads together.
        opening: seconds in which slides were opened, of all threads together.
        network: seconds in which the bytes of at least one tile were on their way.
        fetching: seconds in which they were, of all tiles together.
        disk: seconds in which local files were read, of all threads together.
        decoding: seconds in which tiles were decoded, resampled and filtered, of all threads together.
        opened: slides opened, some more than once.
        requests, fetched, needed: of the network: requests, bytes that arrived, bytes asked for.
        replaced: tiles that could not be read, or were of a slide that was given up.
        filtered: tiles that the pixel filter refused.
    """

    seconds: float = 0.0
    waited: float = 0.0
    threads: int = 1
    batches: int = 0
    tiles: int = 0
    planning: float = 0.0
    opening: float = 0.0
    network: float = 0.0
    fetching: float = 0.0
    disk: float = 0.0
    decoding: float = 0.0
    opened: int = 0
    requests: int = 0
    fetched: int = 0
    needed: int = 0
    replaced: int = 0
    filtered: int = 0

    @property
    def tiles_per_second(self) -> float:
        """Tiles handed over in a second."""
        return self.tiles / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """The slowest part: ``consumer``, ``decoding``, ``disk``, ``network``, ``opening`` or ``planning``.

        Threads that hardly ever idle are the limit. Where none are, it is what a batch spends most of its way in.
        """
        if self.waited <= _FAST_ENOUGH * self.seconds:
            return "consumer"
        decoders = {"decoding": self.decoding, "disk": self.disk}
        planners = {"opening": self.opening, "planning": self.planning}
        busiest = max(decoders, planners, key=lambda parts: sum(parts.values()))
        if self._busy(busiest.values()) > 1 - _IDLE:
            return _largest(busiest)
        batch = self.tiles / max(1, self.batches)  # the threads share a batch's decoding, but one alone plans it
        shared = {name: seconds / min(self.threads, max(1, batch)) for name, seconds in decoders.items()}
        return _largest(shared | planners | {"network": self.fetching / max(1, batch)})

    def since(self, earlier: "StreamReport") -> "StreamReport":
        """What was done after another report of the same stream."""
        sums = [item.name for item in fields(self) if item.name != "threads"]
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in sums})

    def sentence(self) -> str:
        """One sentence that says how fast the stream is and what limits it."""
        return f"{self.tiles_per_second:,.0f} tiles/s: {self._reason()}."

    def _reason(self) -> str:
        busy = self._busy((self.decoding, self.disk))
        latency = 1000 * self.fetching / max(1, self.tiles)
        more = "more threads help if there are cores for them"
        return {
            "consumer": "the stream is not the limit: whoever uses the tiles waited "
            f"{self.waited / max(1e-9, self.seconds):.1%} of the time",
            "decoding": f"decoding is the limit: its threads ({self.threads}) had work {busy:.0%} of the time; "
            + (more if busy > 1 - _IDLE else "more batches read ahead (a higher prefetch) keep them busier"),
            "disk": f"the disk is the limit: reading files took {self.disk:.1f} s of the {self.threads} threads' "
            f"{self.threads * self.seconds:.1f} s; more threads help unless it is as fast as it can be",
            "network": f"the network is the limit: the bytes of a tile took {latency:.0f} ms, and decoding threads had "
            f"work {busy:.0%} of the time; more batches read ahead (a higher prefetch) help unless the line is full",
            "opening": f"opening slides is the limit: {self.opened} openings took {self.opening:.1f} s; "
            "keep more slides open, or let their indexes be kept",
            "planning": f"drawing tiles is the limit: it took {self.planning:.1f} s; "
            "let the positions of slides be kept in a job directory",
        }[self.limit]

    def _busy(self, seconds: Iterable[float]) -> float:
        """Share of the time of ``threads`` threads."""
        return min(1.0, sum(seconds) / max(1e-9, self.threads * self.seconds))


def _largest(parts: Mapping[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])


def _kind(value: object) -> type:
    return int if isinstance(value, int) else float


@final
class Stopwatches:
    """Adds up times and counts from many threads."""

    def __init__(self):
        self._sums = {item.name: 0.0 for item in fields(StreamReport)}
        self._lock = threading.Lock()
        self._start: float | None = None
        self._out, self._out_since = 0, 0.0  # tiles whose bytes are on their way, and when that number last changed

    def start(self) -> None:
        """Begins to count time; later calls do nothing."""
        with self._lock:
            self._start = self._start or perf_counter()

    def add(self, **amounts: float) -> None:
        """Adds to fields of the report."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a field."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(**{name: perf_counter() - start})

    def request(self, change: int) -> None:
        """Notes that the bytes of so many tiles were asked for, or, negative, have come."""
        with self._lock:
            self._count_out()
            self._out += change

    def _count_out(self) -> None:
        now = perf_counter()
        if self._out:
            self._sums["network"] += now - self._out_since
            self._sums["fetching"] += self._out * (now - self._out_since)
        self._out_since = now

    def report(self, threads: int) -> StreamReport:
        """The sums so far."""
        with self._lock:
            self._count_out()
            sums: dict[str, Any] = dict(self._sums)
            sums["seconds"] = perf_counter() - self._start if self._start else 0.0
        sums["threads"] = threads
        return StreamReport(**{item.name: _kind(item.default)(sums[item.name]) for item in fields(StreamReport)})

"""Where the time of a tile stream goes, and what would make it faster."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
        threads: that decode.
        batches, tiles: handed over.
        planning: seconds in which tiles were drawn and planned, of all threads together.
        opening: seconds in which slides were opened, of all threads together.
        network: seconds in which at least one request was under way.
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
        """The slowest part: ``consumer``, ``decoding``, ``disk``, ``network``, ``opening`` or ``planning``."""
        if not self.seconds or self.waited < _FAST_ENOUGH * self.seconds:
            return "consumer"
        busy = (self.decoding + self.disk) / (self.threads * self.seconds)
        if busy > 1 - _IDLE:
            return "decoding" if self.decoding >= self.disk else "disk"
        others = {"network": self.network, "opening": self.opening, "planning": self.planning, "disk": self.disk}
        return max(others, key=lambda name: others[name])

    def sentence(self) -> str:
        """One sentence that says how fast the stream is and what limits it."""
        share = self.waited / self.seconds if self.seconds else 0.0
        rate = f"{self.tiles_per_second:,.0f} tiles/s"
        busy = f"{min(1.0, (self.decoding + self.disk) / max(1e-9, self.threads * self.seconds)):.0%}"
        reason = {
            "consumer": f"the stream is not the limit: whoever uses the tiles waited {share:.1%} of the time",
            "decoding": f"decoding is the limit: {self.threads} threads were busy {busy} of the time; "
            "more threads help if there are cores for them",
            "disk": f"the disk is the limit: reading files took {self.disk:.1f} s of {self.threads} threads' time",
            "network": f"the network is the limit: threads were busy {busy} of the time and {self.requests} requests "
            "were waited for; more requests in flight (a higher prefetch) help unless the line is full",
            "opening": f"opening slides is the limit: {self.opened} openings took {self.opening:.1f} s; "
            "keep more slides open, or let their indexes be kept",
            "planning": f"drawing tiles is the limit: it took {self.planning:.1f} s; "
            "let the positions of slides be kept in a job directory",
        }
        return f"{rate}: {reason[self.limit]}."


def _kind(value: object) -> type:
    return int if isinstance(value, int) else float


@final
class Stopwatches:
    """Adds up times and counts from many threads."""

    def __init__(self):
        self._sums = {item.name: 0.0 for item in fields(StreamReport)}
        self._lock = threading.Lock()
        self._start: float | None = None
        self._out, self._out_since = 0, 0.0

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
        """Notes that a request for bytes began (1) or ended (−1); the network counts while any is under way."""
        with self._lock:
            if not self._out:
                self._out_since = perf_counter()
            self._out += change
            if not self._out:
                self._sums["network"] += perf_counter() - self._out_since

    def report(self, threads: int) -> StreamReport:
        """The sums so far."""
        with self._lock:
            sums: dict[str, Any] = dict(self._sums)
            sums["seconds"] = perf_counter() - self._start if self._start else 0.0
            if self._out:
                sums["network"] += perf_counter() - self._out_since
        sums["threads"] = threads
        return StreamReport(**{item.name: _kind(item.default)(sums[item.name]) for item in fields(StreamReport)})

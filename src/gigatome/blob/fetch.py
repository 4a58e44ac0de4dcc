"""Ranges of many remote objects at once, hundreds of requests in flight, from one thread."""

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import final

import obstore

from gigatome.blob.ranges import BrokenBodyError, Joined, Traffic, check_range, join, reading
from gigatome.blob.remote import RemoteBlob, translated
from gigatome.blob.store import Blob
from gigatome.blob.wire import Wire
from gigatome.core.errors import StoreError

# Requests that are waited for together. Through obstore, which makes 10 of a call at a time, a request costs 0.20 ms of
# processor time in calls of 1, 0.13 in calls of 2, 0.08 of 10 and 0.07 of 20.
_TOGETHER = 40
# What obstore's threads still do in Python after the last answer must be over before the interpreter goes.
_LINGER_SECONDS = 0.02
_CLOSE_SECONDS = 10


Result = list[bytes] | StoreError
"""The bytes of each range of an entry, or why they are not to be had."""


@dataclass(eq=False, slots=True)
class _Group:
    """Entries that are waited for together: how many results are missing, and whether the first was begun."""

    results: list[Result]
    left: int
    future: Future[list[Result]] = field(default_factory=Future)
    begun: bool | None = None

    def begin(self) -> bool:
        """Whether somebody still waits."""
        if self.begun is None:
            self.begun = self.future.set_running_or_notify_cancel()
        return self.begun

    def take(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.left -= 1
        if not self.left:
            self.future.set_result(self.results)


@dataclass(eq=False, slots=True)
class _Entry:
    """Ranges of one object, and whose result they are."""

    ranges: Sequence[tuple[int, int]]
    group: _Group
    place: int

    def take(self, result: Result) -> None:
        self.group.take(self.place, result)


@dataclass(eq=False, slots=True)
class _Job:
    """Entries of one object that are read together."""

    blob: RemoteBlob
    entries: list[_Entry] = field(default_factory=list)
    requests: int = 0
    size: int = 0

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [place for entry in self.entries for place in entry.ranges]

    def take(self, parts: Sequence[bytes]) -> None:
        first = 0
        for entry in self.entries:
            last = first + len(entry.ranges)
            entry.take(list(parts[first:last]))
            first = last


@final
class Fetcher:
    """Reads ranges of many remote objects with many requests in flight.

    One thread carries the requests, as :mod:`gigatome.blob.wire` does or else through obstore, and checks what arrives
    as :mod:`gigatome.blob.ranges` says. The process's cache of bytes is neither asked nor filled. To be closed;
    dropping it, and the end of the interpreter, do it too.

    Args:
        in_flight: requests under way at most; R a second at a latency of L seconds need R × L of them.
        in_flight_bytes: bytes asked for at most. An entry that alone is over either bound is read alone.

    Attributes:
        traffic: what was asked for and what arrived, of all objects.
    """

    def __init__(self, in_flight: int = 256, in_flight_bytes: int = 64 << 20):
        if in_flight < 1:
            raise ValueError(f"in_flight is at least 1, not {in_flight}")
        self._together, self._bytes = min(_TOGETHER, in_flight), in_flight_bytes
        self._engine = _Engine(in_flight, in_flight_bytes)
        self.traffic = self._engine.traffic
        self._close = weakref.finalize(self, self._engine.stop)

    def fetch(self, wanted: Sequence[tuple[Blob, Sequence[tuple[int, int]]]]) -> Future[list[Result]]:
        """Starts reading; returns at once.

        Args:
            wanted: entries of an object and its ``(offset, length)``; those of one object share requests.

        Returns:
            A future of one result an entry, in order: the bytes of each of its ranges, or the :class:`StoreError` that
            concerns this entry. If it is cancelled before its turn it costs nothing.

        Raises:
            ValueError: a blob is local, or the fetcher is closed.
        """
        group = _Group([[]] * len(wanted), len(wanted))
        jobs: list[_Job] = []
        open_jobs: dict[int, _Job] = {}
        for place, (blob, ranges) in enumerate(wanted):
            if not isinstance(blob, RemoteBlob):
                raise ValueError(f"{blob.uri} is a local file; read it where it is decoded")
            try:
                requests, size = _demand(blob, ranges)
            except StoreError as error:
                group.results[place] = error
                group.left -= 1
                continue
            job = open_jobs.get(id(blob))
            if job is None or job.requests + requests > self._together or job.size + size > self._bytes:
                job = open_jobs[id(blob)] = _Job(blob)
                jobs.append(job)
            job.entries.append(_Entry(ranges, group, place))
            job.requests += requests
            job.size += size
        if not jobs:
            group.future.set_result(group.results)
        self._engine.submit(self._calls(jobs))
        return group.future

    def close(self) -> None:
        """Ends the thread; futures that are not done are cancelled. Harmless when called twice."""
        self._close()

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _calls(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        """Jobs that are waited for together."""
        calls: list[list[_Job]] = []
        room = room_bytes = 0
        for job in jobs:
            if not calls or job.requests > room or job.size > room_bytes:
                calls.append([])
                room, room_bytes = self._together, self._bytes
            calls[-1].append(job)
            room -= job.requests
            room_bytes -= job.size
        return calls


def _demand(blob: RemoteBlob, ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Requests, but for those that joining over gaps will spare, and bytes of ranges; checks that they lie inside."""
    requests, size, end = 0, 0, -1
    for offset, length in ranges:
        check_range(blob, offset, length)
        requests += offset != end
        size += length
        end = offset + length
    return requests, size


@final
class _Engine:
    """The thread behind a :class:`Fetcher`, which it must not refer to: dropping that ends this."""

    def __init__(self, in_flight: int, in_flight_bytes: int):
        self.traffic = Traffic()
        self._limit, self._limit_bytes = in_flight, in_flight_bytes
        self._requests = self._bytes = 0
        self._wire = Wire()
        self._waiting: deque[list[_Job]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._process, self._closed, self._lock = os.getpid(), False, threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()

    def submit(self, calls: Sequence[list[_Job]]) -> None:
        """Takes calls from any thread; raises :class:`ValueError` once it is stopped."""
        with self._lock:
            if self._closed:
                raise ValueError("the fetcher is closed")
            self._loop.call_soon_threadsafe(self._take, calls)

    def stop(self) -> None:
        """Cancels what is under way and ends the thread."""
        if os.getpid() != self._process:  # forked: the thread is the parent's
            return
        with self._lock:
            self._closed = True
        if threading.current_thread() is self._thread:  # the fetcher was dropped by a callback of its own
            self._loop.create_task(self._cancel()).add_done_callback(lambda _: self._loop.stop())
            return
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(_CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        self._loop.close()

    async def _cancel(self) -> None:
        for call in self._waiting:
            for job in call:
                for entry in job.entries:
                    entry.group.future.cancel()
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._wire.close()
        await asyncio.sleep(_LINGER_SECONDS)

    def _take(self, calls: Sequence[list[_Job]]) -> None:
        self._waiting.extend(calls)
        self._admit()

    def _admit(self) -> None:
        """Starts the calls that wait, in order, while there is room."""
        while self._waiting:
            call = self._waiting[0]
            requests, size = sum(job.requests for job in call), sum(job.size for job in call)
            fits = self._requests + requests <= self._limit and self._bytes + size <= self._limit_bytes
            if self._requests and not fits:
                return
            self._waiting.popleft()
            for job in call:
                job.entries = [entry for entry in job.entries if entry.group.begin()]
            self._requests += requests
            self._bytes += size
            task = self._loop.create_task(self._answer([job for job in call if job.entries]))
            self._running.add(task)
            task.add_done_callback(partial(self._finish, call, requests, size))

    def _finish(self, call: Sequence[_Job], requests: int, size: int, task: asyncio.Task[None]) -> None:
        failure = CancelledError() if task.cancelled() else task.exception()
        for job in call if failure else ():
            for entry in job.entries:
                if not entry.group.future.done():
                    entry.group.future.set_exception(failure)
        self._running.discard(task)
        self._requests -= requests
        self._bytes -= size
        self._admit()

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        """Reads the jobs on the wire; what it cannot have so, or is in doubt, each job reads through obstore."""
        asked = [join(job.ranges) for job in jobs]
        began = time.perf_counter()
        found = await self._wire.read(
            [(job.blob, joined.starts, joined.lengths) for job, joined in zip(jobs, asked, strict=True)]
        )
        seconds = time.perf_counter() - began
        rest = [
            self._ask_obstore(job, bodies)
            for job, joined, bodies in zip(jobs, asked, found, strict=True)
            if bodies is None or not self._hand_over(job, joined, bodies, seconds)
        ]
        if rest:
            await asyncio.gather(*rest)

    def _hand_over(self, job: _Job, joined: Joined, bodies: Sequence[memoryview], seconds: float) -> bool:
        """Gives the entries their bytes, unless some are not those of an earlier read."""
        blob, ranges = job.blob, job.ranges
        for ledger in (blob.traffic, self.traffic):
            ledger.add(len(bodies), joined.needed, sum(joined.lengths), 0, seconds)
        parts = joined.cut(ranges, bodies)
        if blob.checksums.differing([(blob.identity, place) for place in ranges], parts):
            return False
        job.take(parts)
        return True

    async def _ask_obstore(self, job: _Job, bodies: Sequence[memoryview] | None = None) -> None:
        """Reads a job, or what of its bodies is in doubt; entry by entry if that fails: each fails for itself."""
        steps = reading(job.blob, job.ranges, job.blob.traffic, self.traffic, bodies=bodies)
        try:
            ask = next(steps)
            while True:
                if ask.delay:
                    await asyncio.sleep(ask.delay)
                try:
                    with translated(job.blob.uri):
                        answer = await obstore.get_ranges_async(
                            job.blob.store, job.blob.key, starts=ask.starts, lengths=ask.lengths, coalesce=0
                        )
                except BrokenBodyError as error:
                    answer = error
                ask = steps.send(answer)
        except StopIteration as end:
            job.take(end.value)
        except StoreError as error:
            if len(job.entries) == 1:
                return job.entries[0].take(error)
            await asyncio.gather(*(self._ask_obstore(_Job(job.blob, [entry])) for entry in job.entries))
        return None

"""Batches on their way: each tile is drawn, its slide opened, its bytes fetched and decoded, by threads, out of order.

A place of a batch goes round until it holds a tile: what cannot be read, or is refused by the pixel filter, is drawn
anew with the next attempt. Which tile a place gets so depends on the slides alone, not on threads or timing.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from gigatome.blob.fetch import Fetcher, Result
from gigatome.blob.ranges import Traffic
from gigatome.core.errors import GigatomeError, StoreError
from gigatome.slides.slide import Slide
from gigatome.slides.tile_plan import TilePlan, read_tiles
from gigatome.tiles.draws import Draws
from gigatome.tiles.handles import OpenSlides
from gigatome.tiles.sampler import TileRequest
from gigatome.tiles.stream_report import Stopwatches

T = TypeVar("T")

_TASK = 16  # tiles that a thread decodes before it takes new work
_OPENING = 16  # slides opened at a time: most of the time is spent waiting
_ATTEMPTS = 1000  # draws for one place before the slides are given up


@final
@dataclass(frozen=True, eq=False)
class TileBatch:
    """One batch of tiles.

    Attributes:
        step: number of the batch.
        images: uint8 [B, H, W, 3].
        slides: int64 [B], index of each tile's slide in the cohort.
        coords: int64 [B, 2], x and y of its top-left corner in level-0 pixels.
        mpp: float64 [B], µm per pixel.
    """

    step: int
    images: NDArray[np.uint8]
    slides: NDArray[np.int64]
    coords: NDArray[np.int64]
    mpp: NDArray[np.float64]


@final
@dataclass(eq=False, slots=True)
class Pending:
    """A batch that is being filled.

    Attributes:
        batch: whole once ``done`` is.
        left: places that are not filled yet.
        done: says when; or raises what keeps the batch from being filled.
    """

    batch: TileBatch
    left: int
    done: Future[None] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False, slots=True)
class _Tile:
    """One place of a batch on its way."""

    place: int
    request: TileRequest
    attempt: int
    plan: TilePlan | None = None
    data: Sequence[bytes] | None = None


class _Lent:
    """What arrays over lent memory refer to, and nothing else does: it goes with the last of them."""

    def __init__(self, memory: NDArray[np.uint8]):
        self.__array_interface__ = memory.__array_interface__


@final
class _Memory:
    """Memory of batches that nobody holds any more, for new ones.

    The system fills with zeros what it gives, which costs a fifth of the time of reading tiles.
    """

    def __init__(self):
        self._free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], of any content."""
        memory = self._free.pop() if self._free else np.empty(size, np.uint8)
        if memory.size != size:
            memory = np.empty(size, np.uint8)
        lent = _Lent(memory)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return np.asarray(lent)


@final
class Pipeline:
    """Fills batches; to be closed.

    Args:
        draws: which tile belongs where.
        slides: the slides of the cohort; closed with the pipeline.
        watches: that times are added to.
        tile_size: side of a tile in pixels.
        dct_scaling: see :meth:`Slide.read`.
        threads: that decode.
        in_flight: requests under way at a time.
        lag: a batch is begun when that many before it may not be whole.
    """

    def __init__(
        self,
        draws: Draws,
        slides: OpenSlides,
        watches: Stopwatches,
        *,
        tile_size: int,
        dct_scaling: bool,
        threads: int,
        in_flight: int,
        lag: int,
    ):
        self._draws, self._slides, self._watches = draws, slides, watches
        self._size, self._dct_scaling, self._in_flight, self._lag = tile_size, dct_scaling, in_flight, lag
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
        self._planning = ThreadPoolExecutor(threads, thread_name_prefix="plans")
        self._opening = ThreadPoolExecutor(_OPENING, thread_name_prefix="slides")
        self._fetching: Fetcher | None = None
        self._counted = Traffic()
        self._memory = _Memory()
        self._lock = threading.Lock()
        self._closed = False

    def count_traffic(self) -> None:
        """Adds what the network has carried since the last call to the report."""
        if self._fetching is None:
            return
        with self._lock:
            now, before = replace(self._fetching.traffic), self._counted
            self._counted = now
        self._watches.add(
            requests=now.requests - before.requests,
            fetched=now.fetched - before.fetched,
            needed=now.needed - before.needed,
        )

    def submit(self, step: int, count: int) -> Pending:
        """Begins a batch of ``count`` tiles; its ``done`` says when it is whole, or raises."""
        size = self._size
        batch = TileBatch(
            step,
            self._memory.take(count * size * size * 3).reshape(count, size, size, 3),
            np.empty(count, np.int64),
            np.empty((count, 2), np.int64),
            np.empty(count, np.float64),
        )
        pending = Pending(batch, count)
        self._run(self._planning, pending, self._begin)
        return pending

    def close(self) -> None:
        """Stops; batches that are not whole stay so."""
        with self._lock:
            self._closed = True
        for pool in (self._planning, self._opening, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._fetching is not None:
            self._fetching.close()
            self.count_traffic()
        for pool in (self._planning, self._opening, self._decoding):
            pool.shutdown(wait=True)
        self._slides.close()

    def _run(self, pool: ThreadPoolExecutor, pending: Pending, work: Callable, *arguments: object) -> None:
        """Has a pool do some work for a batch; whatever it raises is raised to who waits for the batch."""

        def guarded() -> None:
            try:
                work(pending, *arguments)
            except BaseException as error:
                _fail(pending, error)

        with self._lock:
            if not self._closed:
                pool.submit(guarded)

    def _begin(self, pending: Pending) -> None:
        with self._watches.time("planning"):
            requests = self._draws.draw(pending.batch.step)
        self._read(pending, [_Tile(place, request, 0) for place, request in enumerate(requests)])

    def _read(self, pending: Pending, tiles: Sequence[_Tile]) -> None:
        """Opens the slides of some tiles, then has the bytes fetched and the tiles decoded."""
        by_slide: dict[int, list[_Tile]] = defaultdict(list)
        again = []
        for tile in tiles:
            if self._draws.given_up(tile.request.slide, pending.batch.step - self._lag):
                again.append(tile)
            else:
                by_slide[tile.request.slide].append(tile)
        opened = self._open(list(by_slide))
        ready: list[_Tile] = []
        with self._watches.time("planning"):
            for index, group in by_slide.items():
                slide = opened[index]
                for number, tile in enumerate(group):
                    try:
                        if isinstance(slide, Exception):
                            raise slide
                        if number:
                            self._slides.acquire(index)  # each tile gives its slide back by itself
                        tile.plan = self._plan(slide, tile.request)
                        ready.append(tile)
                    except (GigatomeError, OSError) as error:
                        if not isinstance(slide, Exception):
                            self._slides.release(index)
                        unopenable = isinstance(slide, Exception)
                        self._draws.failed(index, pending.batch.step, error, unopenable=unopenable)
                        again.append(tile)
        self._fetch(pending, ready)
        self._again(pending, again)

    def _open(self, indices: Sequence[int]) -> dict[int, Slide | Exception]:
        def acquire(index: int) -> Slide | Exception:
            try:
                return self._slides.acquire(index)
            except (GigatomeError, OSError) as error:
                return error

        with self._watches.time("opening"):
            missing = [index for index in indices if not self._slides.is_open(index)]
            if len(missing) < 2:
                return {index: acquire(index) for index in indices}
            found = dict(zip(missing, self._opening.map(acquire, missing), strict=True))
            return {index: found[index] if index in found else acquire(index) for index in indices}

    def _plan(self, slide: Slide, request: TileRequest) -> TilePlan:
        return slide.plan_tile(
            request.x, request.y, self._size, request.mpp, exact=False, dct_scaling=self._dct_scaling
        )

    def _fetch(self, pending: Pending, tiles: Sequence[_Tile]) -> None:
        """Has the tiles decoded: those of local slides at once, the others when their bytes are there."""
        local, remote = [], []
        for tile in tiles:
            (remote if tile.plan and tile.plan.blob and tile.plan.blob.handle < 0 else local).append(tile)
        for group in _groups(local):
            self._run(self._decoding, pending, self._decode, group)
        if not remote:
            return
        for group in _groups(remote):
            future = self._fetcher().fetch([(tile.plan.blob, tile.plan.ranges) for tile in group])
            self._watches.request(len(group))
            future.add_done_callback(partial(self._arrived, pending, group))

    def _fetcher(self) -> Fetcher:
        with self._lock:
            if self._fetching is None:
                self._fetching = Fetcher(self._in_flight)
            return self._fetching

    def _arrived(self, pending: Pending, tiles: Sequence[_Tile], results: Future[list[Result]]) -> None:
        self._watches.request(-len(tiles))
        if not results.cancelled():
            self._run(self._decoding, pending, self._take, tiles, results)

    def _take(self, pending: Pending, tiles: Sequence[_Tile], results: Future[list[Result]]) -> None:
        there, again = [], []
        for tile, result in zip(tiles, results.result(), strict=True):
            if isinstance(result, StoreError):
                self._slides.release(tile.request.slide)
                self._draws.failed(tile.request.slide, pending.batch.step, result, unopenable=False)
                again.append(tile)
                continue
            tile.data = result
            there.append(tile)
        self._decode(pending, there)
        self._again(pending, again)

    def _decode(self, pending: Pending, tiles: Sequence[_Tile]) -> None:
        batch, again = pending.batch, []
        start = perf_counter()
        plans = [tile.plan for tile in tiles if tile.plan is not None]
        errors = read_tiles(plans, [tile.data for tile in tiles], [batch.images[tile.place] for tile in tiles])
        disk = sum(plan.waited for plan in plans)
        for tile, error in zip(tiles, errors, strict=True):
            request = tile.request
            self._slides.release(request.slide)
            if error is not None:
                self._draws.failed(request.slide, batch.step, error, unopenable=False)
                again.append(tile)
                continue
            if not self._draws.keeps(batch.images[tile.place], tile.attempt):
                self._watches.add(filtered=1)
                again.append(tile)
                continue
            batch.slides[tile.place] = request.slide
            batch.coords[tile.place] = request.x, request.y
            batch.mpp[tile.place] = request.mpp
        self._watches.add(disk=disk, decoding=perf_counter() - start - disk)
        with pending.lock:
            pending.left -= len(tiles) - len(again)
            whole = pending.left == 0
        if whole and not pending.done.done():
            pending.done.set_result(None)
        self._again(pending, again)

    def _again(self, pending: Pending, tiles: Sequence[_Tile]) -> None:
        """Draws other tiles for places that did not get one."""
        if tiles:
            self._run(self._planning, pending, self._redraw, list(tiles))

    def _redraw(self, pending: Pending, tiles: Sequence[_Tile]) -> None:
        with self._watches.time("planning"):
            fresh = []
            for tile in tiles:
                attempt = tile.attempt + 1
                if attempt == _ATTEMPTS:
                    raise self._draws.exhausted()
                fresh.append(_Tile(tile.place, self._draws.redraw(pending.batch.step, tile.place, attempt), attempt))
        self._read(pending, fresh)


def _groups(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """What threads take at a time."""
    return (items[first : first + _TASK] for first in range(0, len(items), _TASK))


def _fail(pending: Pending, error: BaseException) -> None:
    with pending.lock:
        if not pending.done.done():
            pending.done.set_exception(error)

"""An endless stream of batches of random tiles, read from the slides while the last batch is being used.

Batch k is a function of the seed and k alone: it does not depend on threads, on prefetching or on where the stream was
started, so a run that goes on at step k sees what it would have seen. Nothing is stored on disk.

Source: arXiv:2404.15217, IV-B (Online Patching).
"""

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.core.errors import CohortError, GigatomeError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.handles import OpenSlides
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.sampler import TileRequest, TileSampler
from gigatome.tiles.slide_weights import slide_weights
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.segment import segment_cohort

_TASK = 8  # tiles that a thread reads before it takes new work
_ATTEMPTS = 1000  # draws for one tile before the slides are given up


@dataclass(frozen=True)
class StreamOptions:
    """Which tiles a stream draws, and how it reads them.

    Attributes:
        tile_size: side of a tile in pixels.
        mpp: resolutions to draw from, µm per pixel.
        mpp_weights: how likely each is, in proportion; equally by default.
        slide_weights: ``"uniform"``, every slide alike, or ``"tissue"``, by its area of tissue.
        min_tissue: share of a tile that must be tissue, 0 to 1.
        threads: that read and decode; the tiles do not depend on it.
        prefetch: batches read ahead; nor on this.
        open_slides: slides kept open at a time.
    """

    tile_size: int = 256
    mpp: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    mpp_weights: tuple[float, ...] | None = None
    slide_weights: Literal["uniform", "tissue"] = "uniform"
    min_tissue: float = 0.4
    threads: int = 4
    prefetch: int = 4
    open_slides: int = 128

    def __post_init__(self):
        if self.tile_size <= 0:
            raise ValueError(f"tile_size must be positive, not {self.tile_size}")
        if not self.mpp or not all(math.isfinite(mpp) and mpp > 0 for mpp in self.mpp):
            raise ValueError(f"mpp must be one or more positive numbers, not {self.mpp}")
        if self.mpp_weights is not None:
            if len(self.mpp_weights) != len(self.mpp):
                raise ValueError(f"mpp_weights must be as many as mpp ({len(self.mpp)}), not {len(self.mpp_weights)}")
            if not all(math.isfinite(w) and w >= 0 for w in self.mpp_weights) or not any(self.mpp_weights):
                raise ValueError(f"mpp_weights must not be negative, nor all zero: {self.mpp_weights}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must lie between 0 and 1, not {self.min_tissue}")
        if min(self.threads, self.prefetch, self.open_slides) < 1:
            raise ValueError("threads, prefetch and open_slides must be at least 1")


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
class TileStream:
    """Random tiles of a cohort, batch after batch without end.

    A tile that cannot be read is replaced by the next draw for its place in the batch, whatever the threads do; its
    slide is logged once and listed in ``failures``. Use it as a context, or :meth:`close` it, to give the slides back.

    Args:
        cohort: the slides, or what :meth:`~gigatome.slides.cohort.Cohort.read` takes.
        options: which tiles; or give the fields of :class:`StreamOptions` by name.
        batch_size: tiles a batch, of all ranks together.
        seed: of all draws, ≥ 0.
        masks: tissue by slide name; slides that it lacks are left out. Found here if not given.
        job: job directory to keep the tissue in, or to take it from.
        rank: of this process; it gets its consecutive part of each batch.
        world_size: number of processes.
        progress: called while tissue is searched for.
        **fields: fields of :class:`StreamOptions`, such as ``mpp=[0.5, 1]``.

    Attributes:
        cohort: the slides.
        options: which tiles.
        failures: slides that cannot be used, as far as is known yet.

    Raises:
        CohortError: no slide of the cohort can be used.
        NoTissueError: no slide holds a tile with enough tissue.
        ConfigError: a field is unknown or out of range.
    """

    def __init__(
        self,
        cohort: Cohort | str | Path,
        options: StreamOptions | None = None,
        *,
        batch_size: int = 64,
        seed: int = 0,
        masks: Mapping[str, TissueMask] | None = None,
        job: Job | str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress = silent,
        **fields: Any,
    ):
        if world_size <= 0 or batch_size <= 0 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of world_size ({world_size}), and rank ({rank}) below it"
            )
        if fields:
            fields = {**config.to_dict(options or StreamOptions()), **fields}
            options = config.parse(StreamOptions, fields, source="TileStream")
        self.cohort, self.options = Cohort.read(cohort), options or StreamOptions()
        self.batch_size, self.seed, self._share = batch_size, seed, batch_size // world_size
        self._first = rank * self._share
        self.failures: list[Failure] = []
        if masks is None:
            job = job if isinstance(job, Job) or job is None else Job(Path(job))
            masks, failures = segment_cohort(self.cohort, job, threads=self.options.threads, progress=progress)
            self.failures += failures
        tissue = self._tissue(masks)
        if not tissue:
            count = len(self.cohort)
            raise CohortError(f"{self.cohort.source}: none of the {count} slides can be used; {_last(self.failures)}")
        self._indices = np.array(list(tissue), np.int64)
        slides, labels = list(tissue.values()), [self.cohort.slides[index].labels for index in tissue]
        self._sampler = TileSampler(
            slides, self.options.tile_size, self.options.mpp, self.options.mpp_weights,
            slide_weights(self.options.slide_weights, slides, labels), self.options.min_tissue, seed,
        )  # fmt: skip
        self._sampler.failures[:0] = self.failures
        self.failures = self._sampler.failures  # one list: the sampler adds to it while it draws
        self._open = OpenSlides(self.cohort.slides, self.options.open_slides)
        self._unopenable: set[int] = set()
        self._lock = threading.Lock()

    def batches(self, start_step: int = 0) -> Iterator[TileBatch]:
        """Batches from ``start_step`` on, without end.

        Threads read ahead; they end when the iterator is closed, dropped or interrupted.

        Raises:
            CohortError: no slide can be read any more.
        """
        pool = ThreadPoolExecutor(self.options.threads, thread_name_prefix="tiles")
        pending: deque[tuple[TileBatch, list[Future[None]]]] = deque()
        try:
            for step in itertools.count(start_step):
                pending.append(self._submit(pool, step))
                if len(pending) < self.options.prefetch:
                    continue
                batch, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[TileBatch]:
        return self.batches()

    def close(self) -> None:
        """Closes the slides that are open; the stream may still be used."""
        self._open.close()

    def __enter__(self) -> "TileStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> tuple[TileBatch, list[Future[None]]]:
        size, count = self.options.tile_size, self._share
        batch = TileBatch(
            step,
            np.empty((count, size, size, 3), np.uint8),
            np.empty(count, np.int64),
            np.empty((count, 2), np.int64),
            np.empty(count, np.float64),
        )
        requests = self._sampler.requests(step, self.batch_size, self._first, self._first + count)
        return batch, [pool.submit(self._fill, batch, requests, start) for start in range(0, count, _TASK)]

    def _fill(self, batch: TileBatch, requests: list[TileRequest], start: int) -> None:
        """Reads some tiles of a batch."""
        for place in range(start, min(start + _TASK, self._share)):
            image, request = self._read(batch.step, self._first + place, requests[place])
            batch.images[place] = image
            batch.slides[place] = self._indices[request.slide]
            batch.coords[place] = request.x, request.y
            batch.mpp[place] = request.mpp

    def _read(self, step: int, place: int, request: TileRequest) -> tuple[NDArray[np.uint8], TileRequest]:
        """The tile of a place: its first draw that can be read."""
        for attempt in range(_ATTEMPTS):
            if len(self._unopenable) == len(self._indices):
                break
            if attempt:
                request = self._sampler.request(step, place, attempt)
            slide = int(self._indices[request.slide])
            if slide in self._unopenable:
                continue
            opened = None
            try:
                with self._open.use(slide) as opened:
                    return opened.read_tile(
                        request.x, request.y, self.options.tile_size, request.mpp, exact=False
                    ), request
            except (GigatomeError, OSError) as error:
                self._record(slide, error, unopenable=opened is None)
        raise CohortError(f"{self.cohort.source}: no slide can be read any more; {_last(self.failures)}")

    def _record(self, slide: int, error: Exception, *, unopenable: bool) -> None:
        """Notes that a slide failed; says so the first time."""
        name = self.cohort.slides[slide].name
        with self._lock:
            if unopenable:
                self._unopenable.add(slide)
            if any(failure.slide == name for failure in self.failures):
                return
            self.failures.append(Failure.of(name, "tiles", error))
        log.warning("%s: %s; other tiles take the place of those that cannot be read", name, error)

    def _tissue(self, masks: Mapping[str, TissueMask]) -> dict[int, SlideTissue]:
        """What the sampler needs, by index into the cohort; slides that fail are left out."""
        entries = [(index, slide) for index, slide in enumerate(self.cohort) if slide.name in masks]
        tissue = {}
        with ThreadPoolExecutor(self.options.threads, thread_name_prefix="tiles") as pool:
            tasks = [pool.submit(_resolution, slide, masks[slide.name]) for _, slide in entries]
            for (index, slide), task in zip(entries, tasks, strict=True):
                try:
                    tissue[index] = SlideTissue.of(slide.name, task.result(), masks[slide.name])
                except (GigatomeError, OSError) as error:
                    log.warning("%s: %s", slide.name, error)
                    self.failures.append(Failure.of(slide.name, "tiles", error))
        return tissue


def _resolution(entry: CohortSlide, mask: TissueMask) -> float:
    """µm per level-0 pixel of a slide, which is opened only if nobody has said."""
    mpp = entry.mpp or mask.mpp
    if mpp is not None:
        return mpp
    with entry.open() as slide:
        return slide.mpp


def _last(failures: list[Failure]) -> str:
    return f"{failures[-1].slide}: {failures[-1].message}" if failures else "none has outlines of tissue"

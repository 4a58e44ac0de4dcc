"""An endless stream of batches of random tiles, read from the slides while the last batch is being used.

Batch k is a function of the seed and k alone: it does not depend on threads, on prefetching or on where the stream was
started, so a run that goes on at step k sees what it would have seen. Nothing is stored on disk.

Source: arXiv:2404.15217, IV-B (Online Patching).
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final
from weakref import WeakSet

import numpy as np

from gigatome import config
from gigatome.core.errors import CohortError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.seeding import generator
from gigatome.slides.cohort import Cohort
from gigatome.tiles.cohort_tissue import cohort_tissue
from gigatome.tiles.draws import Draws
from gigatome.tiles.handles import OpenSlides
from gigatome.tiles.pipeline import Pending, Pipeline, TileBatch
from gigatome.tiles.pixel_filter import HsvFilter
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.sampler import MAX_ENLARGEMENT, TileSampler, possible_scales
from gigatome.tiles.slide_weights import slide_weights
from gigatome.tiles.stream_report import Stopwatches, StreamReport
from gigatome.tissue.mask import TissueMask

__all__ = ["StreamOptions", "TileBatch", "TileStream"]


@dataclass(frozen=True)
class StreamOptions:
    """Which tiles a stream draws, and how it reads them.

    Attributes:
        tile_size: side of a tile in pixels.
        mpp: resolutions to draw from, µm per pixel.
        mpp_weights: how likely each is, in proportion; equally by default.
        slide_weights: ``"uniform"``, every slide alike; ``"tissue"``, by its area of tissue; or ``"column:NAME"``, by a
            column of the cohort.
        slide_priors: with ``"column:NAME"``, how likely each value is, in proportion; equally by default.
        slide_fraction: share of the slides that is used, more than 0; which ones is drawn, and those of a smaller share
            are among those of a larger one.
        limit_tiles: number of distinct tiles that are drawn from; None for no limit. They are read anew each time.
        min_tissue: share of a tile that must be tissue, 0 to 1.
        max_enlargement: a slide gives no tiles that would be enlarged more than this; 1 is its own resolution.
        hsv: what the pixels of a tile must look like; not asked by default.
        dct_scaling: whether JPEG chunks are shrunk while they are decoded, where a tile is coarser than the level.
        quarantine: bad tiles after which a slide is given up.
        threads: that read and decode; the tiles do not depend on it.
        prefetch: batches read ahead; nor on this, but for the moment at which a slide is given up.
        open_slides: slides kept open at a time.
        in_flight: requests to buckets and web servers under way at a time.
    """

    tile_size: int = 256
    mpp: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    mpp_weights: tuple[float, ...] | None = None
    slide_weights: str = "uniform"
    slide_priors: Mapping[str, float] | None = None
    slide_fraction: float = 1.0
    limit_tiles: int | None = None
    min_tissue: float = 0.4
    max_enlargement: float = MAX_ENLARGEMENT
    hsv: HsvFilter | None = None
    dct_scaling: bool = True
    quarantine: int = 20
    threads: int = 4
    prefetch: int = 4
    open_slides: int = 128
    in_flight: int = 512

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
        if not 0 < self.slide_fraction <= 1:
            raise ValueError(f"slide_fraction must be more than 0 and at most 1, not {self.slide_fraction}")
        if self.limit_tiles is not None and self.limit_tiles < 1:
            raise ValueError(f"limit_tiles must be at least 1, not {self.limit_tiles}")
        if not self.max_enlargement >= 1:
            raise ValueError(f"max_enlargement must be at least 1, not {self.max_enlargement}")
        counts = ("quarantine", "threads", "prefetch", "open_slides", "in_flight")
        if any(getattr(self, name) < 1 for name in counts):
            raise ValueError(f"{', '.join(counts)} must be at least 1")


@final
class TileStream:
    """Random tiles of a cohort, batch after batch without end.

    Bytes are fetched from buckets and web servers with many requests under way, chunks decoded by threads. A tile that
    cannot be read is replaced by the next draw for its place in the batch; its slide is logged once and listed in
    ``failures``, and given up after ``quarantine`` such tiles. Use it as a context, or :meth:`close` it, to give the
    slides back.

    Args:
        cohort: the slides, or what :meth:`~gigatome.slides.cohort.Cohort.read` takes.
        options: which tiles; or give the fields of :class:`StreamOptions` by name.
        batch_size: tiles a batch, of all ranks together.
        seed: of all draws, ≥ 0.
        masks: tissue by slide name; slides that it lacks are left out.
        job: without masks: job directory to take the tissue from, or to keep it in when it is found here. What a
            cohort of many slides needs then stays on the disk, with the positions of its tiles.
        rank: of this process; it gets its consecutive part of each batch.
        world_size: number of processes.
        progress: called while tissue is searched for.
        **fields: fields of :class:`StreamOptions`, such as ``mpp=[0.5, 1]``.

    Attributes:
        cohort: the slides that are used.
        options: which tiles.
        failures: slides that cannot be used or gave a bad tile, as far as is known yet.

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
        self.options = options or StreamOptions()
        self.cohort = _fraction(Cohort.read(cohort), self.options.slide_fraction, seed)
        self.batch_size, self.seed, self._share = batch_size, seed, batch_size // world_size
        job = job if isinstance(job, Job) or job is None else Job(Path(job))
        tissue, failures = cohort_tissue(self.cohort, masks, job, threads=self.options.threads, progress=progress)
        if not tissue:
            count = len(self.cohort)
            raise CohortError(f"{self.cohort.source}: none of the {count} slides can be used; {_last(failures)}")
        sampler = self._sampler(tissue, job)
        sampler.failures[:0] = failures
        self._draws = Draws(
            self.cohort, sampler, list(tissue), batch_size=batch_size, first=rank * self._share, count=self._share,
            hsv=self.options.hsv, quarantine=self.options.quarantine,
        )  # fmt: skip
        self.failures = self._draws.failures
        self._watches = Stopwatches()
        self._pipelines: WeakSet[Pipeline] = WeakSet()

    def _sampler(self, tissue: Mapping[int, SlideTissue], job: Job | None) -> TileSampler:
        options, slides = self.options, list(tissue.values())
        labels = [self.cohort.slides[index].labels for index in tissue]
        for mpp in options.mpp:
            coarser = sum(slide.mpp > options.max_enlargement * mpp for slide in slides)
            if coarser:
                log.warning("%d of %d slides are too coarse for tiles at %g mpp", coarser, len(slides), mpp)
        possible = possible_scales(slides, options.tile_size, options.mpp, options.min_tissue, options.max_enlargement)
        usable = np.any(possible, axis=1)
        weights = slide_weights(options.slide_weights, slides, labels, priors=options.slide_priors, usable=usable)
        return TileSampler(
            slides, options.tile_size, options.mpp, options.mpp_weights, weights if usable.any() else None,
            options.min_tissue, self.seed, folder=job.positions if job else None, limit_tiles=options.limit_tiles,
            max_enlargement=options.max_enlargement,
        )  # fmt: skip

    def batches(self, start_step: int = 0, *, worker: int = 0, workers: int = 1) -> Iterator[TileBatch]:
        """Batches from ``start_step`` on, without end.

        Threads read ahead; they end when the iterator is closed, dropped or interrupted.

        Args:
            start_step: number of the first batch.
            worker: of several processes that share this rank's batches; it gets every ``workers``-th of them, so that
                taking one batch from each in turn, as PyTorch's DataLoader does, gives the same batches in the same
                order as one process alone.
            workers: number of such processes.

        Raises:
            CohortError: no slide can be read any more.
        """
        if not 0 <= worker < workers:
            raise ValueError(f"worker ({worker}) must lie below workers ({workers})")
        options = self.options
        self._draws.begin(start_step)
        slides = OpenSlides(self.cohort.slides, options.open_slides, lambda: self._watches.add(opened=1))
        pipeline = Pipeline(
            self._draws, slides, self._watches, tile_size=options.tile_size, dct_scaling=options.dct_scaling,
            threads=options.threads, in_flight=options.in_flight, lag=(options.prefetch - 1) * workers,
        )  # fmt: skip
        self._pipelines.add(pipeline)
        pending: deque[Pending] = deque()
        self._watches.start()
        try:
            for step in itertools.count(start_step + worker, workers):
                pending.append(pipeline.submit(step, self._share))
                if len(pending) < options.prefetch:
                    continue
                ready = pending.popleft()
                with self._watches.time("waited"):
                    ready.done.result()
                self._watches.add(batches=1, tiles=self._share)
                yield ready.batch
        finally:
            pipeline.close()

    def __iter__(self) -> Iterator[TileBatch]:
        return self.batches()

    def report(self) -> StreamReport:
        """Where the time has gone since the first batch was asked for."""
        for pipeline in list(self._pipelines):
            pipeline.count_traffic()
        return self._watches.report(self.options.threads)

    def state(self) -> dict[str, list[int]]:
        """The bad tiles so far: the steps of each, by slide; for :meth:`restore` in a run that goes on."""
        return self._draws.state()

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes up the :meth:`state` of the run before, so that the same slides are given up."""
        self._draws.restore(state)

    def close(self) -> None:
        """Ends what :meth:`batches` has begun and closes the slides; the stream may still be used."""
        for pipeline in list(self._pipelines):
            pipeline.close()

    def __enter__(self) -> "TileStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fraction(cohort: Cohort, share: float, seed: int) -> Cohort:
    """A random share of the slides, at least one of them, in the cohort's order."""
    order = generator(seed, "slide_fraction").permutation(len(cohort))
    kept = np.sort(order[: max(1, round(share * len(cohort)))])
    return replace(cohort, slides=tuple(cohort.slides[index] for index in kept.tolist()))


def _last(failures: Sequence[Failure]) -> str:
    return f"{failures[-1].slide}: {failures[-1].message}" if failures else "none has outlines of tissue"

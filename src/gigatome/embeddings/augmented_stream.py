"""An endless stream of batches of slides, each as two draws of a few of its augmented tiles.

Batch k is a function of the files, the seed and k alone. The embeddings of the whole cohort lie on the device if they
fit, and a batch is one gather there; otherwise threads read ahead from files that are mapped.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, final
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome import config
from gigatome.core.errors import StoreError
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.seeding import generator
from gigatome.embeddings.augmented import AugmentedStore
from gigatome.embeddings.augmented_files import AugmentedFiles
from gigatome.encoders.slide_zoo import Frame, frame_places

_FAST_ENOUGH = 0.05  # share of the time that whoever uses the slides may wait without the stream being the limit
_SPARE = 4 << 30  # bytes of a GPU's memory that "auto" leaves to the network
_SMALL = 2 << 30  # bytes of embeddings that "auto" holds in the memory of a CPU, where mapped files are as good


@dataclass(frozen=True)
class AugmentedStreamOptions:
    """Which tiles of a slide make a view, and how they are read.

    Attributes:
        tiles: of a view, T.
        replacement: the tiles of a view are drawn with replacement, as by the authors; without, slides that have
            fewer than T in a draw are left out.
        frame: of the places of tiles.
        sharing: embeddings whose tiles share their augmentation in another way are refused; None for any.
        resident: ``"device"``, the embeddings of all slides are loaded to the device; ``"mapped"``, they stay in the
            files; or ``"auto"``, on the device if they fit. The batches do not depend on it.
        threads: that read.
        prefetch: batches read ahead from files; nor on these two.
    """

    tiles: int = 5
    replacement: bool = True
    frame: Frame = "tile"
    sharing: Literal["shared", "each"] | None = None
    resident: Literal["auto", "device", "mapped"] = "auto"
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        if min(self.tiles, self.threads, self.prefetch) < 1:
            raise ValueError("tiles, threads and prefetch must be at least 1")


@dataclass(frozen=True, eq=False)
class AugmentedBatch:
    """One batch of slides.

    Attributes:
        step: number of the batch.
        images: float32 [B, 2, T, D + 2], for each of two views T embeddings of tiles, each followed by its column and
            row; a tensor if the embeddings are on the device.
        slides: int64 [B], index of each slide in the stream's names.
    """

    step: int
    images: NDArray[np.float32] | Tensor
    slides: NDArray[np.int64]


@dataclass(frozen=True)
class AugmentedReport:
    """What a stream did between its first batch and now.

    Attributes:
        seconds: that passed.
        waited: seconds in which whoever uses the slides waited for a batch.
        loading: seconds in which embeddings were loaded to the device, part of ``waited``.
        slides: handed over, of two views each.
    """

    seconds: float = 0.0
    waited: float = 0.0
    loading: float = 0.0
    slides: int = 0

    def sentence(self) -> str:
        """One sentence that says how fast the stream is and whether it is the limit."""
        seconds, waited = self.seconds - self.loading, self.waited - self.loading
        rate, share = 2 * self.slides / max(1e-9, seconds), waited / max(1e-9, seconds)
        loaded = f", after {self.loading:,.0f} s of loading" if self.loading else ""
        if share <= _FAST_ENOUGH:
            return f"{rate:,.0f} views/s{loaded}: the stream is not the limit: its user waited {share:.1%} of the time."
        return (
            f"{rate:,.0f} views/s{loaded}: reading is the limit: its user waited {share:.1%} of the time; pack the "
            "embeddings into one file, or use more threads."
        )


@final
@dataclass(frozen=True, eq=False)
class ResidentTable:
    """The embeddings of a cohort on one device.

    Attributes:
        embeddings: float16 [R, D].
        places: float32 [R, 2], column and row of each tile.
    """

    embeddings: Tensor
    places: Tensor

    def images(self, rows: Tensor) -> Tensor:
        """Embeddings and places float32 […, D + 2] of rows int64 […], which are on the device too."""
        flat = rows.flatten()
        parts = self.embeddings.index_select(0, flat).float(), self.places.index_select(0, flat)
        return torch.cat(parts, 1).unflatten(0, rows.shape)


@dataclass(frozen=True, eq=False)
class EpochDraws:
    """The draws of an epoch.

    Attributes:
        slides: int64 [S], all slides in the order in which they come.
        rows: int64 [S, 2, T], rows of the tiles of their views.
    """

    slides: NDArray[np.int64]
    rows: NDArray[np.int64]


def draw_epoch(
    seed: int, epoch: int, bounds: NDArray[np.int64], draws: NDArray[np.int64], tiles: NDArray[np.int64],
    options: AugmentedStreamOptions,
) -> EpochDraws:  # fmt: skip
    """What an epoch consists of.

    Args:
        seed: of the stream.
        epoch: its number.
        bounds: int64 [S + 1] or [S], the row at which each slide begins.
        draws: int64 [S], augmentations K of each.
        tiles: int64 [S], tiles N of each augmentation.
        options: of the views.
    """
    random = generator(seed, "slides", epoch)
    order = random.permutation(len(draws))
    count, shape = tiles[order][:, None], (len(order), 2)
    draw = random.integers(draws[order][:, None], size=shape)
    chosen = np.empty((*shape, options.tiles), np.int64)
    for place in range(options.tiles):
        if options.replacement:
            chosen[..., place] = random.integers(count, size=shape)
        else:  # Floyd's way: one of the first tiles, or the next of the last where that is taken already
            last = np.broadcast_to(count - options.tiles + place, shape)
            found = random.integers(last + 1)
            taken = (chosen[..., :place] == found[..., None]).any(-1)
            chosen[..., place] = np.where(taken, last, found)
    starts = bounds[order][:, None] + draw * count
    return EpochDraws(order, starts[..., None] + chosen)


@final
class AugmentedStream:
    """Slides of a cohort as pairs of draws, batch after batch without end.

    An epoch is all slides in a new order, less those that do not fill a batch, so that no slide is twice in one. Each
    view of a slide is some tiles of one augmentation; the two views may be of the same. A slide whose file is damaged
    is logged, listed in ``failures`` and left out.

    Args:
        store: augmented embeddings, as :class:`AugmentedFiles` takes them.
        options: of the views.
        batch_size: slides a batch, of all ranks together.
        seed: of all draws, ≥ 0.
        rank: of this process; it gets its consecutive part of each batch.
        world_size: number of processes.
        device: where the embeddings lie if they do not stay in the files.
        progress: told of files that are looked at and of rows that are loaded.

    Attributes:
        options: of the views.
        progress: what is told.
        where: the store's folder, or the file.
        names: of the slides that are used, sorted.
        kind: what the slides have in common: tile encoder and tiling.
        failures: slides that cannot be used.

    Raises:
        StoreError: there are too few slides for a batch, or they are of different encoders or tilings, or share
            augmentations in another way than asked. In ``batches``: a file has changed since, embeddings are not
            finite, or do not fit on the device.
    """

    def __init__(
        self,
        store: AugmentedStore | str | Path,
        options: AugmentedStreamOptions = AugmentedStreamOptions(),
        *,
        batch_size: int = 256,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        progress: Progress = silent,
    ):
        if world_size <= 0 or batch_size <= 0 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of world_size ({world_size}), and rank ({rank}) below it"
            )
        self.options, self.seed, self.progress = options, seed, progress
        self._batch, self._share, self._rank, self._device = batch_size, batch_size // world_size, rank, device
        self._files = AugmentedFiles(store, progress=progress)
        self.where, self.kind = self._files.where, self._files.kind
        if options.sharing and options.sharing != self.kind.sharing:
            raise StoreError(
                f"{self.where}: augmentations are {self.kind.sharing or 'not said to be shared or not'}, and "
                f"slides.sharing asks for {options.sharing}; embed the tiles so, or set slides.sharing=null"
            )
        self._used, lost = self._enough_tiles()
        self.failures = (*self._files.failures, *lost)
        self.names = tuple(self._files.names[slide] for slide in self._used)
        if len(self.names) < batch_size:
            last = f"; {self.failures[-1].slide}: {self.failures[-1].message}" if self.failures else ""
            raise StoreError(
                f"{self.where}: {len(self.names)} slides can be used, and a batch is of {batch_size} different "
                f"ones; use a smaller fit.batch_size{last}"
            )
        self._table: ResidentTable | None = None
        self._begun, self._waited, self._loading, self._handed = 0.0, 0.0, 0.0, 0
        self._pools: WeakSet[ThreadPoolExecutor] = WeakSet()

    def __len__(self) -> int:
        """Number of slides that are used."""
        return len(self.names)

    def digest(self) -> str:
        """Hash of all that the batches depend on beside options and seed, save the numbers in the files."""
        return config.digest([self.names, self._files.digest()])

    def batches(self, start_step: int = 0) -> Iterator[AugmentedBatch]:
        """Batches from ``start_step`` on, without end; raises :class:`StoreError` if they cannot be read.

        Where the embeddings are to be on the device, the first call loads them.
        """
        self._begun = self._begun or perf_counter()
        if self._table is None and self._resides():
            start = perf_counter()
            self._table = self._load()
            self._loading += perf_counter() - start
            self._waited += perf_counter() - start
        return self._gathered(self._table, start_step) if self._table else self._read_ahead(start_step)

    def report(self) -> AugmentedReport:
        """Where the time has gone since the first batch was asked for."""
        seconds = perf_counter() - self._begun if self._begun else 0.0
        return AugmentedReport(seconds, self._waited, self._loading, self._handed)

    def state(self) -> dict[str, list[int]]:
        """Nothing: the batches depend on their number alone."""
        return {}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes up the :meth:`state` of the run before."""

    def close(self) -> None:
        """Ends what :meth:`batches` has begun, and frees the device; the stream may still be used."""
        for pool in list(self._pools):
            pool.shutdown(wait=True, cancel_futures=True)
        self._table = None

    def __enter__(self) -> "AugmentedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enough_tiles(self) -> tuple[NDArray[np.int64], list[Failure]]:
        """Places of the slides that have enough tiles for a view, and the others."""
        files, wanted = self._files, self.options.tiles
        enough = files.tiles >= (1 if self.options.replacement else wanted)
        lost = []
        for slide in np.flatnonzero(~enough).tolist():
            message = f"draws of {files.tiles[slide]} tiles, and a view is of {wanted} different ones"
            log.warning("%s: %s; left out", files.names[slide], message)
            lost.append(Failure(files.names[slide], "augmented", StoreError.__name__, message))
        return np.flatnonzero(enough), lost

    def _resides(self) -> bool:
        """Whether the embeddings go to the device."""
        wanted, needed, device = self.options.resident, len(self._files) * (2 * self.kind.dim + 8), self._device
        if wanted != "auto":
            return wanted == "device"
        if torch.device(device).type != "cuda":
            return needed <= _SMALL
        free = torch.cuda.mem_get_info(device)[0]
        if needed + _SPARE > free:
            log.info("embeddings of %.1f GB stay in the files; %s has %.1f GB free", needed / 1e9, device, free / 1e9)
        return needed + _SPARE <= free

    def _load(self) -> ResidentTable:
        files, count = self._files, len(self._files)
        try:
            embeddings = torch.empty(count, self.kind.dim, dtype=torch.float16, device=self._device)
            places = torch.empty(count, 2, device=self._device)
        except (RuntimeError, MemoryError) as error:
            raise StoreError(
                f"{files.where}: embeddings of {count * (2 * self.kind.dim + 8) / 1e9:.1f} GB do not fit on "
                f"{self._device}; set slides.resident=mapped ({str(error).splitlines()[0]})"
            ) from error
        for first, values, coords in files.parts(self.options.threads):
            rows = slice(first, first + len(values))
            embeddings[rows] = torch.from_numpy(values)
            places[rows] = torch.from_numpy(self._places(coords, np.arange(rows.start, rows.stop)))
            self.progress("load", rows.stop, count)
        return ResidentTable(embeddings, places)

    def _places(self, coords: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Columns and rows [n, 2] of tiles at level-0 pixels."""
        sides = self._files.sides[self._files.slides_of(rows), None]
        return frame_places(coords, sides, self.options.frame).astype(np.float32)

    def _steps(self, start_step: int) -> Iterator[tuple[int, int, slice]]:
        """Number of each step, its epoch, and this rank's part of the epoch."""
        each = len(self) // self._batch
        for step in itertools.count(start_step):
            epoch, place = divmod(step, each)
            first = place * self._batch + self._rank * self._share
            yield step, epoch, slice(first, first + self._share)

    def _draw(self, epoch: int) -> EpochDraws:
        files, used = self._files, self._used
        return draw_epoch(self.seed, epoch, files.bounds[used], files.draws[used], files.tiles[used], self.options)

    def _gathered(self, table: ResidentTable, start_step: int) -> Iterator[AugmentedBatch]:
        """Batches on the device; indices travel once an epoch."""
        for epoch, steps in itertools.groupby(self._steps(start_step), key=lambda step: step[1]):
            drawn = self._draw(epoch)
            rows = torch.from_numpy(drawn.rows).to(table.embeddings.device)
            for step, _, mine in steps:
                self._handed += self._share
                yield AugmentedBatch(step, table.images(rows[mine]), drawn.slides[mine])

    def _read_ahead(self, start_step: int) -> Iterator[AugmentedBatch]:
        pool = ThreadPoolExecutor(self.options.threads, thread_name_prefix="slides")
        self._pools.add(pool)
        pending: deque[Future[AugmentedBatch]] = deque()
        try:
            for epoch, steps in itertools.groupby(self._steps(start_step), key=lambda step: step[1]):
                drawn = self._draw(epoch)
                for step, _, mine in steps:
                    pending.append(pool.submit(self._read, step, drawn.slides[mine], drawn.rows[mine]))
                    if len(pending) < self.options.prefetch:
                        continue
                    start = perf_counter()
                    batch = pending.popleft().result()
                    self._waited += perf_counter() - start
                    self._handed += self._share
                    yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int, slides: NDArray[np.int64], rows: NDArray[np.int64]) -> AugmentedBatch:
        flat = rows.ravel()
        embeddings, coords = self._files.read(flat)
        images = np.empty((len(flat), self.kind.dim + 2), np.float32)
        images[:, :-2], images[:, -2:] = embeddings, self._places(coords, flat)
        return AugmentedBatch(step, images.reshape(*rows.shape, -1), slides)

"""Tiles of slides in, one file of embeddings a slide out; killed at any moment, it goes on where it was."""

import glob
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.blob.store import write_atomic
from gigatome.core.errors import ConfigError, SlideError, StoreError
from gigatome.core.job import Job, TilesDir
from gigatome.core.logs import Failure, Progress, log, silent, write_failures
from gigatome.core.version import __version__
from gigatome.embeddings.encoding import PRECISIONS, Maker, Precision, encode, ready, try_out
from gigatome.embeddings.lock import Lock
from gigatome.embeddings.reading import SlideTiles, read_ahead
from gigatome.embeddings.store import WEIGHTS, Bag, EmbeddingStore, read_header, write_bag
from gigatome.encoders.zoo import load_encoder
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import GridOptions, TileGrid, coords_attributes, tile_cohort
from gigatome.tissue.segment import SegmentOptions

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class EmbedOptions:
    """How embeddings are computed; none of it changes what they are, save for rounding.

    Attributes:
        batch_size: tiles that the encoder sees at once, of whichever slides.
        device: where the encoder runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …
        precision: ``"fp32"``, or what PyTorch's autocast computes in.
        threads: threads that read tiles ahead of the encoder; they wait when three batches are ready, so on a CPU they
            take from the encoder no more than their tiles need.
        dtype: of the files: ``"float32"`` or ``"float16"``.
    """

    batch_size: int = 64
    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 4
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        if self.batch_size < 1 or self.threads < 1:
            raise ConfigError(f"batch_size and threads must be at least 1, not {self.batch_size} and {self.threads}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"there is no precision {self.precision}; there are {', '.join(PRECISIONS)}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"there is no dtype {self.dtype} for embeddings; there are float32, float16")


def embed(
    cohort: Cohort | str | Path,
    *,
    encoder: nn.Module | str | Path,
    out: str | Path,
    tile_size: int = 256,
    mpp: float = 0.5,
    min_tissue: float = 0.4,
    overlap: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    precision: Precision = "fp32",
    threads: int = 4,
    dtype: Literal["float32", "float16"] = "float32",
    name: str | None = None,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    segment_options: SegmentOptions | None = None,
    progress: Progress = silent,
) -> EmbeddingStore:
    """Embeds the tissue tiles of every slide of a cohort.

    Finds tissue and lays the grid where that is not done yet, then writes one file a slide, whole or not at all. Slides
    that have their embeddings already are skipped; so the same call goes on after an interruption, several processes
    may share one job directory, and none waits for another. One slide that cannot be read, or whose embeddings are
    not finite, becomes a failure, and the others go on.

    Args:
        cohort: slides, or what :meth:`Cohort.read` takes.
        encoder: what :func:`~gigatome.encoders.zoo.load_encoder` takes, or any module with ``dim``, ``normalise`` and
            ``forward`` like :class:`~gigatome.encoders.vit.TileEncoder`.
        out: job directory.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: resolution in µm per pixel.
        min_tissue: least share of a tile's area that is tissue.
        overlap: of neighbouring tiles, in pixels at ``mpp``.
        batch_size: see :class:`EmbedOptions`, as for the next four.
        device: where the encoder runs.
        precision: what it computes in.
        threads: threads that read tiles.
        dtype: of the files.
        name: of the encoder in file and folder names; the default tells encoders with other weights apart.
        shard: (i, n) takes every n-th slide from the i-th, from 0: static shards for several machines.
        overwrite: replace embeddings that other weights of the same name made.
        segment_options: how tissue is found.
        progress: called with the number of tiles done.

    Returns:
        The store; its ``failures`` are the slides that could not be embedded, also in ``failures.csv``.

    Raises:
        CohortError: there is no slide.
        ConfigError: an option or the encoder does not fit.
        StoreError: the folder holds embeddings by other weights of the same name, or cannot be written.
    """
    options = EmbedOptions(batch_size, device, precision, threads, dtype)
    try:
        grid = GridOptions(tile_size=tile_size, mpp=mpp, overlap=overlap, min_tissue=min_tissue)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cohort, job = _shard(Cohort.read(cohort), shard), Job(Path(out))
    model = load_encoder(encoder) if isinstance(encoder, str | Path) else encoder
    maker = Maker.of(model, name)
    store = EmbeddingStore(job.path, job.tiles(tile_size, mpp, overlap), maker.name)
    with ready(model, device):
        try_out(model, maker, tile_size, device=device, precision=precision)
        grids, failures = tile_cohort(
            cohort, job, options=grid, segment_options=segment_options, threads=threads, progress=progress
        )
        todo = _todo(cohort, grids, store, maker, overwrite)
        _write_config(store.tiles, maker, grid, options)
        failures = failures + _Extraction(model, maker, store, options, grids, progress).run(todo)
    write_failures(job.failures if shard[1] == 1 else job.path / f"failures_{shard[0]}_of_{shard[1]}.csv", failures)
    return replace(store, failures=tuple(failures))


@final
class _Work:
    """One slide on its way through the encoder."""

    def __init__(self, slide: CohortSlide, grid: TileGrid, lock: Lock, dim: int):
        self.slide, self.grid, self.lock = slide, grid, lock
        self.tiles = SlideTiles(slide, grid)
        self.embeddings = np.empty((len(grid), dim), np.float32)
        self.left = len(grid)


@final
class _Extraction:
    """Reads, encodes and writes; batches run across slides, so that small slides do not waste them."""

    def __init__(
        self,
        model: nn.Module,
        maker: Maker,
        store: EmbeddingStore,
        options: EmbedOptions,
        grids: Mapping[str, TileGrid],
        progress: Progress,
    ):
        self._model, self._maker, self._store, self._options = model, maker, store, options
        self._grids, self._progress = grids, progress
        self._failures: list[Failure] = []
        self._open: dict[str, _Work] = {}
        self._total = sum(map(len, grids.values()))
        self._done = 0

    def run(self, slides: Sequence[CohortSlide]) -> list[Failure]:
        """Embeds slides; returns those that could not be, those that somebody else holds among them."""
        locked = self._pass(slides)
        if locked:  # whoever held them may have finished, or died
            locked = self._pass(locked)
        return [*self._failures, *(_locked(slide, self._store) for slide in locked)]

    def _pass(self, slides: Sequence[CohortSlide]) -> list[CohortSlide]:
        """Embeds slides; returns those that somebody else holds."""
        self._done = self._total - sum(len(self._grids[slide.name]) for slide in slides)
        self._progress("embed", self._done, self._total)
        locked: list[CohortSlide] = []
        requests = ((work, work.tiles, i) for work in self._claim(slides, locked) for i in range(work.left))
        ahead = _BATCHES_AHEAD * self._options.batch_size
        waiting: deque[tuple[list[tuple[_Work, int]], Tensor]] = deque()
        try:
            with closing(read_ahead(requests, threads=self._options.threads, ahead=ahead)) as arrivals:
                for rows, images in self._batches(arrivals):
                    waiting.append((rows, self._encode(images)))
                    if len(waiting) > 1:  # a GPU works on this batch while the last one is stored
                        self._store_rows(*waiting.popleft())
            while waiting:
                self._store_rows(*waiting.popleft())
        finally:
            for work in list(self._open.values()):
                self._close(work)
        return locked

    def _claim(self, slides: Sequence[CohortSlide], locked: list[CohortSlide]) -> Iterator[_Work]:
        """Slides that this process may embed, each locked when its turn comes."""
        for slide in slides:
            lock = Lock(self._store.path(slide.name))
            if not lock.acquire():
                locked.append(slide)
                continue
            work = _Work(slide, self._grids[slide.name], lock, self._maker.dim)
            self._open[slide.name] = work
            path = self._store.path(slide.name)
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a process that was killed: the lock is ours
            if _state(path, work.grid, self._maker) == "done":  # by somebody who has just let go of it
                self._count(work.left)
                self._close(work)
            elif not work.left:
                self._finish(work)
            else:
                yield work

    def _batches(
        self, arrivals: Iterator[tuple[_Work, int, NDArray[np.uint8] | None]]
    ) -> Iterator[tuple[list[tuple[_Work, int]], NDArray[np.uint8]]]:
        """Batches of tiles that could be read, and where each belongs."""
        rows: list[tuple[_Work, int]] = []
        images: list[NDArray[np.uint8]] = []
        for work, index, image in arrivals:
            if image is None:
                self._account(work)
                continue
            rows.append((work, index))
            images.append(image)
            if len(rows) == self._options.batch_size:
                yield rows, np.stack(images)
                rows, images = [], []
        if rows:
            yield rows, np.stack(images)

    def _encode(self, images: NDArray[np.uint8]) -> Tensor:
        return encode(self._model, images, device=self._options.device, precision=self._options.precision)

    def _store_rows(self, rows: Sequence[tuple[_Work, int]], embeddings: Tensor) -> None:
        values = embeddings.cpu().numpy()
        for (work, index), value in zip(rows, values, strict=True):
            work.embeddings[index] = value
            self._account(work)

    def _account(self, work: _Work) -> None:
        """One more tile of the slide is embedded or lost."""
        work.left -= 1
        self._count(1)
        if work.left == 0:
            self._finish(work)

    def _count(self, tiles: int) -> None:
        self._done += tiles
        self._progress("embed", self._done, self._total)

    def _finish(self, work: _Work) -> None:
        """Writes the slide's file, or says why not."""
        name = work.slide.name
        error = work.tiles.error or _not_finite(work, self._options)
        if error is not None:
            self._failures.append(Failure.of(name, "embed", error))
        else:
            encoding = {WEIGHTS: self._maker.weights, "precision": self._options.precision, "version": __version__}
            attrs = coords_attributes(work.grid, name, str(self._store.folder))
            bag = Bag(name, self._maker.name, work.grid.coords, work.embeddings, attrs, encoding)
            write_bag(self._store.path(name), bag, dtype=self._options.dtype)
        self._close(work)

    def _close(self, work: _Work) -> None:
        del self._open[work.slide.name]
        work.tiles.close()
        work.lock.release()


def _shard(cohort: Cohort, shard: tuple[int, int]) -> Cohort:
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"there is no shard {index} of {count}; shards count from 0")
    return replace(cohort, slides=cohort.slides[index::count])


def _todo(
    cohort: Cohort, grids: Mapping[str, TileGrid], store: EmbeddingStore, maker: Maker, overwrite: bool
) -> list[CohortSlide]:
    """The slides without valid embeddings; dead locks of the others are removed."""
    slides = [slide for slide in cohort if slide.name in grids]
    states = {slide.name: _state(store.path(slide.name), grids[slide.name], maker) for slide in slides}
    foreign = [name for name, state in states.items() if state == "foreign"]
    if foreign and not overwrite:
        raise StoreError(
            f"{store.folder}: holds embeddings by other weights that are named {maker.name} too (slide {foreign[0]}"
            + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
            + "); give this encoder another name, or pass overwrite to replace them"
        )
    for name in (name for name, state in states.items() if state == "done"):
        Lock(store.path(name)).sweep()
    return [slide for slide in slides if states[slide.name] != "done"]


def _state(path: Path, grid: TileGrid, maker: Maker) -> Literal["missing", "foreign", "done"]:
    if not path.is_file():
        return "missing"
    try:
        header = read_header(path)
    except StoreError as error:
        log.warning("%s; it is embedded again", error)
        return "missing"
    if header.dim != maker.dim or header.weights not in ("", maker.weights):
        return "foreign"
    if not np.array_equal(header.coords, grid.coords):
        log.info("%s: was made on another grid; it is embedded again", path)
        return "missing"
    return "done"


def _not_finite(work: _Work, options: EmbedOptions) -> SlideError | None:
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(work.embeddings.astype(options.dtype)).all(1))
    if not len(bad):
        return None
    x, y = work.grid.coords[bad[0]]
    hint = (
        "" if options.precision == "fp32" and options.dtype == "float32" else "; try precision fp32 and dtype float32"
    )
    return SlideError(
        work.slide.uri, f"{len(bad)} of {len(work.grid)} embeddings are not finite, first at ({x}, {y}){hint}"
    )


def _locked(slide: CohortSlide, store: EmbeddingStore) -> Failure:
    lock = Lock(store.path(slide.name))
    message = f"held by {lock.owner()}; if that is gone for good, remove {lock.path}"
    return Failure(slide.name, "embed", "Locked", message)


def _write_config(tiles: TilesDir, maker: Maker, grid: GridOptions, options: EmbedOptions) -> None:
    """``_config_feats_<encoder>.json``, where TRIDENT keeps its own."""
    values = {"encoder": maker.name, WEIGHTS: maker.weights, "dim": maker.dim, **asdict(grid), **asdict(options)}
    text = json.dumps({**values, "gigatome": __version__}, indent=2)
    write_atomic(tiles.path / f"_config_feats_{maker.name}.json", text + "\n")

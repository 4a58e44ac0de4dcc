"""Slides through a tile encoder: tiles read ahead, batches across slides, files whole or not at all, locks, failures.

What is made of a slide's tile embeddings is for an :class:`Output` to say.
"""

import glob
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.blob.store import write_atomic
from gigatome.core.errors import ConfigError, SlideError, StoreError
from gigatome.core.job import Job, TilesDir
from gigatome.core.logs import Failure, Progress, log, write_failures
from gigatome.core.version import __version__
from gigatome.embeddings.augmented import AugmentedStore
from gigatome.embeddings.encoding import PRECISIONS, Maker, Precision, encode
from gigatome.embeddings.lock import Lock
from gigatome.embeddings.reading import SlideTiles, read_ahead
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore, read_header
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import TileGrid

State: TypeAlias = Literal["missing", "foreign", "embedded", "done"]
"""What there is of a slide: nothing that counts; files that other weights of the same name made; the embeddings of its
tiles, but not all that is made of them; everything."""

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


class Output(Protocol):
    """What is made of the tile embeddings of each slide."""

    @property
    def store(self) -> EmbeddingStore | AugmentedStore:
        """Where the tile embeddings are written; a slide's lock lies beside its file."""
        ...

    @property
    def grids(self) -> Mapping[str, TileGrid]:
        """The tiles to embed, by slide."""
        ...

    def state(self, name: str) -> State:
        """What there is of the slide ``name``."""
        ...

    def foreign(self, name: str) -> EmbeddingStore | AugmentedStore:
        """Which store holds files of the slide ``name`` that other weights made; there is one."""
        ...

    def write(self, slide: CohortSlide, embeddings: NDArray[np.float32]) -> None:
        """Writes what is missing of a slide.

        Args:
            slide: the slide, which is locked.
            embeddings: [N, D] of its tiles; without rows if they are written already.

        Raises:
            SlideError: the slide has to be left out.
        """
        ...


class Views(Protocol):
    """What the encoder sees of slides, where that is not each tile once and as it is."""

    @property
    def count(self) -> int:
        """Embeddings of each slide."""
        ...

    def tiles(self, name: str) -> Sequence[int]:
        """Which tile of the grid each embedding of the slide ``name`` is of; equal ones follow one another."""
        ...

    def make(self, rows: Sequence[tuple[str, int]], images: Tensor) -> Tensor:
        """What the encoder takes.

        Args:
            rows: slide and number of each embedding.
            images: their tiles, uint8 [B, H, W, 3], on the encoder's device.
        """
        ...


def unfinished(cohort: Cohort, output: Output) -> list[tuple[CohortSlide, int]]:
    """The slides that have tiles and are not done, and how many tiles of each have to be embedded.

    Raises:
        StoreError: there are files by other weights of the same name.
    """
    slides = [slide for slide in cohort if slide.name in output.grids]
    states = {slide.name: output.state(slide.name) for slide in slides}
    foreign = [name for name, state in states.items() if state == "foreign"]
    if foreign:
        store = output.foreign(foreign[0])
        raise StoreError(
            f"{store.folder}: holds embeddings by other weights that are named {store.encoder} too (slide {foreign[0]}"
            + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
            + "); give this encoder another name, or pass overwrite to replace them"
        )
    for name in (name for name, state in states.items() if state == "done"):
        Lock(output.store.path(name)).sweep()  # of one who died after writing
    left = {name: 0 if state == "embedded" else len(output.grids[name]) for name, state in states.items()}
    return [(slide, left[slide.name]) for slide in slides if states[slide.name] != "done"]


def embed_slides(
    todo: Sequence[tuple[CohortSlide, int]],
    model: nn.Module,
    maker: Maker,
    output: Output,
    options: EmbedOptions,
    progress: Progress,
    views: Views | None = None,
) -> list[Failure]:
    """Embeds slides; returns those that could not be, those that somebody else holds among them.

    Args:
        todo: what :func:`unfinished` found.
        model: the encoder, ready.
        maker: its name and size.
        output: what is made of the embeddings.
        options: how they are computed.
        progress: called with the number of tiles done.
        views: what the encoder sees of the tiles; ``todo`` then counts what it sees.
    """
    run = _Run(model, maker, output, options, progress, views)
    locked = run.embed(todo)
    if locked:  # whoever held them may have finished, or died
        locked = run.embed(locked)
    return [*run.failures, *(_locked(slide, output.store) for slide, _ in locked)]


@final
class _Work:
    """One slide on its way through the encoder."""

    def __init__(
        self, slide: CohortSlide, grid: TileGrid, lock: Lock, embeddings: NDArray[np.float32], order: Sequence[int]
    ):
        self.slide, self.lock, self.embeddings, self.order = slide, lock, embeddings, order
        self.coords = grid.coords
        self.tiles = SlideTiles(slide, grid)
        self.left = len(embeddings)


@final
class _Run:
    """Reads, encodes and has written; batches run across slides, so that small slides do not waste them."""

    def __init__(
        self,
        model: nn.Module,
        maker: Maker,
        output: Output,
        options: EmbedOptions,
        progress: Progress,
        views: Views | None,
    ):
        self._model, self._maker, self._output, self._options = model, maker, output, options
        self._progress, self._views = progress, views
        self._open: dict[str, _Work] = {}
        self._total = len(output.grids) * views.count if views else sum(map(len, output.grids.values()))
        self._done = 0
        self.failures: list[Failure] = []

    def embed(self, todo: Sequence[tuple[CohortSlide, int]]) -> list[tuple[CohortSlide, int]]:
        """Embeds slides; returns those that somebody else holds."""
        self._done = self._total - sum(tiles for _, tiles in todo)
        self._progress("embed", self._done, self._total)
        locked: list[tuple[CohortSlide, int]] = []
        claimed = self._claim(todo, locked)
        requests = (((work, row), work.tiles, tile) for work in claimed for row, tile in enumerate(work.order))
        ahead = _BATCHES_AHEAD * self._options.batch_size
        waiting: deque[tuple[list[tuple[_Work, int]], Tensor]] = deque()
        try:
            with closing(read_ahead(requests, threads=self._options.threads, ahead=ahead)) as arrivals:
                for rows, images in self._batches(arrivals):
                    waiting.append((rows, self._encode(rows, images)))
                    if len(waiting) > 1:  # a GPU works on this batch while the last one is stored
                        self._store_rows(*waiting.popleft())
            while waiting:
                self._store_rows(*waiting.popleft())
        finally:
            for work in list(self._open.values()):
                self._close(work)
        return locked

    def _claim(self, todo: Sequence[tuple[CohortSlide, int]], locked: list[tuple[CohortSlide, int]]) -> Iterator[_Work]:
        """Slides with tiles that this process may embed, each locked when its turn comes."""
        for slide, tiles in todo:
            path = self._output.store.path(slide.name)
            lock = Lock(path)
            if not lock.acquire():
                locked.append((slide, tiles))
                continue
            remove_leftovers(path)
            grid, state = self._output.grids[slide.name], self._output.state(slide.name)
            order: Sequence[int] = ()
            if state != "embedded":
                order = self._views.tiles(slide.name) if self._views else range(len(grid))
            work = _Work(slide, grid, lock, np.empty((len(order), self._maker.dim), np.float32), order)
            self._open[slide.name] = work
            if state == "done":  # by somebody who has just let go of it
                self._close(work)
            elif work.left:
                yield work
                continue
            else:
                self._finish(work)
            self._count(tiles)

    def _batches(
        self, arrivals: Iterator[tuple[tuple[_Work, int], int, NDArray[np.uint8] | None]]
    ) -> Iterator[tuple[list[tuple[_Work, int]], NDArray[np.uint8]]]:
        """Batches of tiles that could be read, and where each belongs."""
        rows: list[tuple[_Work, int]] = []
        images: list[NDArray[np.uint8]] = []
        for row, _, image in arrivals:
            if image is None:
                self._account(row[0])
                continue
            rows.append(row)
            images.append(image)
            if len(rows) == self._options.batch_size:
                yield rows, np.stack(images)
                rows, images = [], []
        if rows:
            yield rows, np.stack(images)

    def _encode(self, rows: Sequence[tuple[_Work, int]], images: NDArray[np.uint8]) -> Tensor:
        places = [(work.slide.name, row) for work, row in rows]
        view = partial(self._views.make, places) if self._views else None
        return encode(self._model, images, device=self._options.device, precision=self._options.precision, view=view)

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
        """Has the slide's files written, or says why not."""
        error = work.tiles.error
        if error is None:
            try:
                check_finite(work.slide, work.embeddings, work.coords[np.asarray(work.order, int)], self._options)
                self._output.write(work.slide, work.embeddings)
            except SlideError as refusal:
                error = refusal
        if error is not None:
            self.failures.append(Failure.of(work.slide.name, "embed", error))
        self._close(work)

    def _close(self, work: _Work) -> None:
        del self._open[work.slide.name]
        work.tiles.close()
        work.lock.release()


def file_state(
    store: EmbeddingStore, name: str, maker: Maker, coords: NDArray[np.int64], *, overwrite: bool
) -> Literal["missing", "foreign", "done"]:
    """What there is of a slide in one folder of embeddings.

    Args:
        store: the folder.
        name: of the slide.
        maker: whose embeddings are wanted.
        coords: int64 [N, 2], of which tiles.
        overwrite: take embeddings by other weights for missing.
    """
    path = store.path(name)
    if not path.is_file():
        return "missing"
    try:
        header = read_header(path)
    except StoreError as error:
        log.warning("%s; it is embedded again", error)
        return "missing"
    if header.dim != maker.dim or header.weights not in ("", maker.weights):
        return "missing" if overwrite else "foreign"
    if not np.array_equal(header.coords, coords):
        log.info("%s: was made on another grid; it is embedded again", path)
        return "missing"
    return "done"


def remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed left of ``path``, which is locked."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def encoding_attributes(maker: Maker, options: EmbedOptions) -> dict[str, Any]:
    """What files say of how their embeddings were made."""
    return {WEIGHTS: maker.weights, "precision": options.precision, "version": __version__}


def write_config(tiles: TilesDir, maker: Maker, *options: Any) -> None:
    """``_config_feats_<encoder>.json``, where TRIDENT keeps its own: of the last call.

    Args:
        tiles: directory of the tiling.
        maker: the encoder.
        options: dataclasses.
    """
    values = {"encoder": maker.name, WEIGHTS: maker.weights, "dim": maker.dim}
    for part in options:
        values |= asdict(part)
    text = json.dumps({**values, "gigatome": __version__}, indent=2)
    write_atomic(tiles.path / f"_config_feats_{maker.name}.json", text + "\n")


def shard_of(cohort: Cohort, shard: tuple[int, int]) -> Cohort:
    """Every n-th slide from the i-th, of ``shard`` (i, n); raises :class:`ConfigError` if there is no such shard."""
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"there is no shard {index} of {count}; shards count from 0")
    return replace(cohort, slides=cohort.slides[index::count])


def write_shard_failures(job: Job, shard: tuple[int, int], failures: Sequence[Failure]) -> None:
    """``failures.csv``, or a file for each shard, so that none overwrites another's."""
    write_failures(job.failures if shard[1] == 1 else job.path / f"failures_{shard[0]}_of_{shard[1]}.csv", failures)


def check_finite(
    slide: CohortSlide, embeddings: NDArray[np.float32], coords: NDArray[np.int64], options: EmbedOptions
) -> None:
    """Raises :class:`SlideError` if embeddings [N, D] of tiles at ``coords`` [N, 2] are not finite in the file."""
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(embeddings.astype(options.dtype)).all(1))
    if not len(bad):
        return
    x, y = coords[bad[0]]
    hint = (
        "" if options.precision == "fp32" and options.dtype == "float32" else "; try precision fp32 and dtype float32"
    )
    raise SlideError(slide.uri, f"{len(bad)} of {len(embeddings)} embeddings are not finite, first at ({x}, {y}){hint}")


def _locked(slide: CohortSlide, store: EmbeddingStore | AugmentedStore) -> Failure:
    lock = Lock(store.path(slide.name))
    message = f"held by {lock.owner()}; if that is gone for good, remove {lock.path}"
    return Failure(slide.name, "embed", "Locked", message)

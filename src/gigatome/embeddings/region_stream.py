"""An endless stream of batches of regions, read from the files of grids while the last batch is being used.

Batch k is a function of the files, the seed and k alone. The grids stay in the files, which are mapped while a region
is read, so that their number and size do not matter; the operating system keeps in memory what there is room for.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast, final
from weakref import WeakSet

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.core.errors import StoreError
from gigatome.core.logs import Failure, log
from gigatome.core.seeding import generator
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.regions import TILES
from gigatome.embeddings.store import EmbeddingStore

_FAST_ENOUGH = 0.05  # share of the time that whoever uses the regions may wait without the stream being the limit


@dataclass(frozen=True)
class RegionStreamOptions:
    """Which regions a stream draws, and how it reads them.

    Attributes:
        slide_weights: ``"regions"``, every region alike: all of them in turn, shuffled anew each time; or ``"slides"``,
            every slide alike: all of them in turn, shuffled likewise, with a random region of each.
        min_tiles: regions with fewer tiles that are there are not drawn.
        threads: that read, each a batch at a time; the regions do not depend on it.
        prefetch: batches read ahead; nor on this.
    """

    slide_weights: Literal["regions", "slides"] = "regions"
    min_tiles: int = 1
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        if min(self.min_tiles, self.threads, self.prefetch) < 1:
            raise ValueError("min_tiles, threads and prefetch must be at least 1")


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """One batch of regions.

    Attributes:
        step: number of the batch.
        images: float16 or float32 [B, rows, columns, D], grids of tile embeddings; zeros where there is no tile.
        slides: int64 [B], index of each region's slide in the stream's names.
        regions: int64 [B], its number in the slide's file.
    """

    step: int
    images: NDArray[Any]
    slides: NDArray[np.int64]
    regions: NDArray[np.int64]


@dataclass(frozen=True)
class RegionReport:
    """What a stream did between its first batch and now.

    Attributes:
        seconds: that passed.
        waited: seconds in which whoever uses the regions waited for a batch.
        reading: seconds in which batches were read, of all threads together.
        regions: handed over.
    """

    seconds: float = 0.0
    waited: float = 0.0
    reading: float = 0.0
    regions: int = 0

    def sentence(self) -> str:
        """One sentence that says how fast the stream is and whether it is the limit."""
        rate, share = self.regions / max(1e-9, self.seconds), self.waited / max(1e-9, self.seconds)
        if share <= _FAST_ENOUGH:
            return f"{rate:,.0f} regions/s: the stream is not the limit: its user waited {share:.1%} of the time."
        return (
            f"{rate:,.0f} regions/s: reading is the limit: its user waited {share:.1%} of the time; more threads help "
            "unless the disk is as fast as it can be."
        )


@final
class RegionStream:
    """Random regions of a cohort, batch after batch without end.

    A slide whose file is damaged is logged, listed in ``failures`` and left out. Slides with no region of enough tiles
    are left out too.

    Args:
        store: grids of tile embeddings, one file a slide.
        options: which regions.
        batch_size: regions a batch, of all ranks together.
        seed: of all draws, ≥ 0.
        rank: of this process; it gets its consecutive part of each batch.
        world_size: number of processes.

    Attributes:
        store: where the grids are.
        options: which regions.
        names: of the slides that are used, sorted.
        sizes: int64 [N], regions of each that are drawn from.
        encoder: name of the tile encoder.
        weights: hash of its weights; "" if no file says.
        dim: size D of a tile's embedding.
        tiles: along the side of a region.
        tile_size: side of a tile in pixels.
        mpp: of the tiles, µm per pixel.
        failures: slides that cannot be used.

    Raises:
        StoreError: the store holds embeddings of tiles, those of several encoders or regions of several sizes, or no
            slide that can be used. In ``batches``: a file has changed since, or a region of it holds NaN.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        options: RegionStreamOptions = RegionStreamOptions(),
        *,
        batch_size: int = 64,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if world_size <= 0 or batch_size <= 0 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of world_size ({world_size}), and rank ({rank}) below it"
            )
        self.store, self.options, self.seed = store, options, seed
        self._batch, self._share, self._rank = batch_size, batch_size // world_size, rank
        found, self.failures = _look(store, options.min_tiles)
        if not found:
            last = f"; {self.failures[-1].slide}: {self.failures[-1].message}" if self.failures else ""
            raise StoreError(f"{store.folder}: no slide has a region with {options.min_tiles} tiles or more{last}")
        self.names = tuple(found)
        self._reader = BagReader(store, self.names)
        self.encoder, self.weights, self.dim = self._reader.encoder, self._reader.weights, self._reader.dim
        self.tiles, self.tile_size, self.mpp = _tiling(store, found)
        self._dtype = np.result_type(*{slide.dtype for slide in found.values()})
        self._regions = [slide.regions for slide in found.values()]
        self._rows = np.concatenate([slide.rows for slide in found.values()])
        self.sizes = np.array([len(slide.rows) for slide in found.values()], np.int64)
        self._bounds = np.append(0, np.cumsum(self.sizes))
        self._lock = threading.Lock()
        self._begun, self._waited, self._reading, self._handed = 0.0, 0.0, 0.0, 0
        self._pools: WeakSet[ThreadPoolExecutor] = WeakSet()

    def __len__(self) -> int:
        """Number of regions that are drawn from."""
        return len(self._rows)

    def digest(self) -> str:
        """Hash of all that the batches depend on beside options and seed, save the numbers in the grids."""
        what = [self.names, self.sizes.tolist(), self._regions, self.tiles, self.dim, self.encoder, self.weights]
        return config.digest([*what, self.tile_size, self.mpp, str(self._dtype)])

    def batches(self, start_step: int = 0) -> Iterator[RegionBatch]:
        """Batches from ``start_step`` on, without end; raises :class:`StoreError` if a region cannot be read.

        Threads read ahead; they end when the iterator is closed, dropped or interrupted.
        """
        pool = ThreadPoolExecutor(self.options.threads, thread_name_prefix="regions")
        self._pools.add(pool)
        pending: deque[Future[RegionBatch]] = deque()
        self._begun = self._begun or perf_counter()
        try:
            for step, places in zip(itertools.count(start_step), self._places(start_step), strict=False):
                pending.append(pool.submit(self._read, step, places))
                if len(pending) < self.options.prefetch:
                    continue
                start = perf_counter()
                batch = pending.popleft().result()
                self._waited += perf_counter() - start
                self._handed += self._share
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def report(self) -> RegionReport:
        """Where the time has gone since the first batch was asked for."""
        seconds = perf_counter() - self._begun if self._begun else 0.0
        return RegionReport(seconds, self._waited, self._reading, self._handed)

    def state(self) -> dict[str, list[int]]:
        """Nothing: the batches depend on their number alone."""
        return {}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes up the :meth:`state` of the run before."""

    def close(self) -> None:
        """Ends what :meth:`batches` has begun; the stream may still be used."""
        for pool in list(self._pools):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "RegionStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _places(self, start_step: int) -> Iterator[NDArray[np.int64]]:
        """Places of this rank's regions in the list of all, int64 [share] for each step."""
        order, drawn = np.zeros(0, np.int64), -1
        for step in itertools.count(start_step):
            first = step * self._batch + self._rank * self._share
            parts, need = [], self._share
            while need:
                epoch, begin = divmod(first, len(self.sizes) if self.options.slide_weights == "slides" else len(self))
                if epoch != drawn:
                    order, drawn = self._order(epoch), epoch
                parts.append(order[begin : begin + need])
                first, need = first + len(parts[-1]), need - len(parts[-1])
            yield np.concatenate(parts)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Places of the regions of an epoch, in the order in which they are drawn."""
        random = generator(self.seed, "regions", epoch)
        if self.options.slide_weights == "regions":
            return random.permutation(len(self))
        slides = random.permutation(len(self.sizes))
        return self._bounds[slides] + random.integers(self.sizes[slides])

    def _read(self, step: int, places: NDArray[np.int64]) -> RegionBatch:
        """Copies the regions of a batch, those of one slide together, in the order in which they lie in its file."""
        start = perf_counter()
        images = np.empty((len(places), self.tiles**2, self.dim), self._dtype)
        order = np.argsort(places)
        slides, rows = np.searchsorted(self._bounds, places, side="right") - 1, self._rows[places]
        for group in np.split(order, np.flatnonzero(np.diff(slides[order])) + 1):
            images[group] = self._reader.read(int(slides[group[0]]), rows[group])
        with self._lock:
            self._reading += perf_counter() - start
        return RegionBatch(step, images.reshape(len(places), self.tiles, self.tiles, self.dim), slides, rows)


@dataclass(frozen=True, eq=False)
class _Slide:
    """What is known of a slide's file: regions with enough tiles, type of numbers, tiling, hash of coords and mask."""

    rows: NDArray[np.int64]
    dtype: np.dtype[Any]
    tiling: tuple[int, int, float]
    regions: str


def _look(store: EmbeddingStore, min_tiles: int) -> tuple[dict[str, _Slide], tuple[Failure, ...]]:
    """The slides that can be used, and the others that should have been."""
    found, failures = {}, []
    for name in store.names():
        path = store.path(name)
        try:
            with h5py.File(path, "r") as file:
                slide = _read_slide(file, path, min_tiles)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            message = f"{path} is damaged ({error}); delete it and embed the slide again"
            log.warning("%s: %s; left out", name, message)
            failures.append(Failure(name, "regions", StoreError.__name__, message))
            continue
        if len(slide.rows):
            found[name] = slide
    return found, tuple(failures)


def _read_slide(file: h5py.File, path: Path, min_tiles: int) -> _Slide:
    features, coords, mask = (cast(h5py.Dataset, file.get(key)) for key in ("features", "coords", "mask"))
    if features is None or coords is None or (mask is None and features.ndim != 2):
        raise ValueError(f"it has {', '.join(file)}, not coords, features and mask")
    if mask is None:
        raise StoreError(
            f"{path}: holds embeddings {list(features.shape)} of tiles, and regions are learnt from grids of them; "
            "embed the slides with level region"
        )
    attrs: dict[str, Any] = dict(coords.attrs)
    side = int(attrs[TILES])
    if features.shape[:2] != mask.shape or features.shape[1:2] != (side**2,) or coords.shape != (len(features), 2):
        raise ValueError(
            f"features {features.shape}, mask {mask.shape} and coords {coords.shape} are no grids of {side} × {side}"
        )
    mpp = float(attrs.get("target_mpp") or 10 / float(attrs["target_magnification"]))
    there = np.asarray(mask, bool)
    regions = sha256(np.asarray(coords, np.int64).tobytes() + np.packbits(there).tobytes()).hexdigest()[:16]
    rows = np.flatnonzero(there.sum(1) >= min_tiles)
    return _Slide(rows, features.dtype, (side, int(attrs["patch_size"]) // side, mpp), regions)


def _tiling(store: EmbeddingStore, found: Mapping[str, _Slide]) -> tuple[int, int, float]:
    """Tiles along the side of a region, size of a tile in pixels and its mpp, the same of all slides."""
    kinds = {slide.tiling: name for name, slide in found.items()}
    if len(kinds) > 1:
        both = ", ".join(
            f"{name} has {n} × {n} tiles of {px} px at {mpp:g} mpp" for (n, px, mpp), name in kinds.items()
        )
        raise StoreError(f"{store.folder}: the regions of the slides differ ({both}); embed them all alike")
    return next(iter(kinds))

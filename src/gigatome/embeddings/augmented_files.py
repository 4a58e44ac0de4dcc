"""The augmented embeddings of a cohort as rows of one long table, whether they lie in a file a slide or in one file.

Rows are copied out of files that are mapped for the moment, so that neither the number of slides nor their size
matters.
"""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.embeddings.augmented import SHARING, AugmentedStore, tile_side
from gigatome.embeddings.store import WEIGHTS

_FORMAT = "gigatome packed augmented embeddings 1"
_PART = 1 << 15  # rows that are read at once when all are
_SPECIAL = np.uint16(0x7C00)  # exponent of infinity and NaN in float16


@dataclass(frozen=True)
class AugmentedKind:
    """What the slides of a cohort have in common.

    Attributes:
        encoder: name of the tile encoder.
        weights: hash of its weights; "" if not known.
        sharing: "shared", "each", or "" if not known, as of :data:`gigatome.embeddings.augmented.SHARING`.
        dim: size D of an embedding.
        tile_size: side of a tile in pixels.
        mpp: of the tiles, µm per pixel.
    """

    encoder: str
    weights: str
    sharing: str
    dim: int
    tile_size: int
    mpp: float


@dataclass(frozen=True)
class _File:
    """A file, its state when it was looked at, and the bytes at which its embeddings and coordinates begin."""

    path: Path
    stamp: tuple[int, int, int]
    embeddings: int
    coords: int


@dataclass(frozen=True)
class _Slide:
    """Draws and tiles a draw, and the step from a tile to its neighbour in level-0 pixels."""

    draws: int
    tiles: int
    side: float


@final
class AugmentedFiles:
    """The augmented embeddings of a cohort; row ``bounds[s] + k · tiles[s] + n`` is tile n of draw k of slide s.

    A slide whose file is damaged is logged, listed in ``failures`` and left out.

    Args:
        source: a store of one file a slide, a path that :meth:`AugmentedStore.open` takes, or a file that
            :func:`pack_augmented` has written.
        progress: told of every slide that is looked at.

    Attributes:
        where: the store's folder, or the file.
        names: of the slides, sorted.
        kind: what they have in common.
        draws: int64 [S], augmentations K of each.
        tiles: int64 [S], tiles N of each draw.
        sides: float64 [S], step from a tile to its neighbour in level-0 pixels.
        bounds: int64 [S + 1], where the rows of each begin.
        failures: slides that cannot be used.

    Raises:
        StoreError: there are none that can be used, or the slides are of different encoders or tilings.
    """

    def __init__(self, source: AugmentedStore | str | Path, *, progress: Progress = silent):
        pack = None if isinstance(source, AugmentedStore) else Path(source)
        packed = pack is not None and pack.is_file()
        if pack is not None and packed:
            self.where = pack
            self.names, self.kind, slides, self._files = _open_pack(self.where)
            self.failures: tuple[Failure, ...] = ()
        else:
            store = source if isinstance(source, AugmentedStore) else AugmentedStore.open(source)
            self.where = store.folder
            found, self.failures = _look(store, progress)
            if not found:
                last = f"; {self.failures[-1].slide}: {self.failures[-1].message}" if self.failures else ""
                raise StoreError(f"{self.where}: holds no augmented embeddings that can be used{last}")
            self.names, self.kind = tuple(found), _common({name: kind for name, (_, _, kind) in found.items()})
            self._files = [file for file, _, _ in found.values()]
            slides = [slide for _, slide, _ in found.values()]
        self.draws = np.array([slide.draws for slide in slides], np.int64)
        self.tiles = np.array([slide.tiles for slide in slides], np.int64)
        self.sides = np.array([slide.side for slide in slides], np.float64)
        self.bounds = np.append(0, np.cumsum(self.draws * self.tiles))
        self._ends = self.bounds[[0, -1]] if packed else self.bounds  # where the rows of each file begin

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.bounds[-1])

    def digest(self) -> str:
        """Hash of all but the numbers of the embeddings and coordinates."""
        sizes = [values.tolist() for values in (self.draws, self.tiles, self.sides)]
        return config.digest([self.names, self.kind, sizes])

    def slides_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of the slide of each row in ``names``."""
        return np.searchsorted(self.bounds, rows, side="right") - 1

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Embeddings float16 [n, D] and coordinates int64 [n, 2] of rows in any order.

        Raises:
            StoreError: a file has changed or gone, or embeddings are not finite.
        """
        order = np.argsort(rows)
        files = np.searchsorted(self._ends, rows[order], side="right") - 1
        embeddings, coords = np.empty((len(rows), 2 * self.kind.dim), np.uint8), np.empty((len(rows), 16), np.uint8)
        for group in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(files)) + 1):
            number, places = files[group[0]], order[group]
            file, first, last = self._files[number], *self._ends[number : number + 2].tolist()
            mapped = _map(file)
            for to, offset in ((embeddings, file.embeddings), (coords, file.coords)):
                there = np.frombuffer(mapped, np.uint8, (last - first) * to.shape[1], offset)  # HDF5 aligns nothing
                to[places] = there.reshape(-1, to.shape[1]).take(rows[places] - first, 0)
        values = embeddings.view(np.float16)
        self._check_finite(values, rows)
        return values, coords.view(np.int64)

    def parts(self, threads: int, *, ahead: int = 2) -> Iterator[tuple[int, NDArray[np.float16], NDArray[np.int64]]]:
        """All rows in their order, part by part: first row, embeddings and coordinates, as of :meth:`read`."""
        spans = [
            (first, min(first + _PART, end))
            for begin, end in zip(self._ends[:-1].tolist(), self._ends[1:].tolist(), strict=True)
            for first in range(begin, end, _PART)
        ]
        with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
            pending = [pool.submit(self._span, *span) for span in spans[: threads + ahead]]
            for number, (first, _) in enumerate(spans):
                embeddings, coords = pending.pop(0).result()
                if number + threads + ahead < len(spans):
                    pending.append(pool.submit(self._span, *spans[number + threads + ahead]))
                yield first, embeddings, coords

    def _span(self, first: int, last: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Consecutive rows of one file."""
        number = int(np.searchsorted(self._ends, first, side="right")) - 1
        file, skipped, dim = self._files[number], first - int(self._ends[number]), self.kind.dim
        embeddings, coords = np.empty((last - first, dim), np.float16), np.empty((last - first, 2), np.int64)
        try:
            with file.path.open("rb") as handle:
                _check_stamp(file, handle.fileno())
                for into, offset in ((embeddings, file.embeddings), (coords, file.coords)):
                    handle.seek(offset + skipped * into.itemsize * into.shape[1])
                    handle.readinto(into.data)
        except OSError as error:
            raise StoreError(f"{file.path}: cannot be read any more ({error}); embed the slide again") from error
        self._check_finite(embeddings, np.arange(first, last))
        return embeddings, coords

    def _check_finite(self, embeddings: NDArray[np.float16], rows: NDArray[np.int64]) -> None:
        exponents = embeddings.view(np.uint16) & _SPECIAL  # the arithmetic of float16 is slow
        if exponents.max() == _SPECIAL:
            bad = rows[(exponents == _SPECIAL).any(1)]
            name = self.names[int(self.slides_of(bad[:1])[0])]
            raise StoreError(
                f"{self.where}: {name}: embeddings are not finite; embed the slide again, or take its file away"
            )


def pack_augmented(
    store: AugmentedStore | str | Path, path: str | Path, *, progress: Progress = silent
) -> AugmentedFiles:
    """Writes the augmented embeddings of a cohort as one file, which appears whole or not at all, and opens it.

    Random reads of one file are several times as fast as of one a slide. The file is HDF5 with datasets that each lie
    in one piece: ``features`` float16 [R, D] and ``coords`` int64 [R, 2], the slides one after another.

    Raises:
        StoreError: a slide cannot be read, or the file cannot be written.
    """
    path, files = Path(path), AugmentedFiles(store)
    if files.failures:
        first = files.failures[0]
        raise StoreError(f"{path}: is not written, as {first.slide} cannot be read: {first.message}")
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as pack:
            pack.attrs.update({"format": _FORMAT, **asdict(files.kind)})
            pack.create_dataset("names", data=files.names, dtype=h5py.string_dtype())
            for key in ("draws", "tiles", "sides"):
                pack.create_dataset(key, data=getattr(files, key))
            features = pack.create_dataset("features", (len(files), files.kind.dim), np.float16)
            coords = pack.create_dataset("coords", (len(files), 2), np.int64)
            for first, embeddings, places in files.parts(1):
                features[first : first + len(places)] = embeddings
                coords[first : first + len(places)] = places
                progress("pack", first + len(places), len(files))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error
    return AugmentedFiles(path)


def _look(
    store: AugmentedStore, progress: Progress
) -> tuple[dict[str, tuple[_File, _Slide, AugmentedKind]], tuple[Failure, ...]]:
    """The slides that can be used, and the others that should have been."""
    found, failures = {}, []
    names = store.names()
    for number, name in enumerate(names):
        path = store.path(name)
        try:
            with h5py.File(path, "r") as file:
                found[name] = _layout(file, path)
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            message = f"{path} is damaged ({error}); delete it and embed the slide again"
            log.warning("%s: %s; left out", name, message)
            failures.append(Failure(name, "augmented", StoreError.__name__, message))
        progress("look", number + 1, len(names))
    return found, tuple(failures)


def _layout(file: h5py.File, path: Path) -> tuple[_File, _Slide, AugmentedKind]:
    features, coords = (cast(h5py.Dataset, file[key]) for key in ("features", "coords"))
    if features.ndim != 3 or coords.shape != (*features.shape[:2], 2) or not features.size:
        raise ValueError(f"features {features.shape} and coords {coords.shape} are no [K, N, D] and [K, N, 2]")
    attrs: dict[str, Any] = dict(coords.attrs)
    encoding: dict[str, Any] = dict(features.attrs)
    draws, tiles, dim = features.shape
    weights, sharing = (str(encoding.get(key, "")) for key in (WEIGHTS, SHARING))
    kind = AugmentedKind(
        str(encoding["encoder"]), weights, sharing, dim, int(attrs["patch_size"]), float(attrs["target_mpp"])
    )
    return _file(path, features, coords), _Slide(draws, tiles, tile_side(attrs)), kind


def _file(path: Path, features: Any, coords: Any) -> _File:
    if features.dtype != np.float16 or coords.dtype != np.int64:
        raise ValueError(f"features are {features.dtype} and coords {coords.dtype}, not float16 and int64")
    offsets = [data.id.get_offset() for data in (features, coords)]
    if None in offsets:
        raise ValueError("features or coords do not lie in one piece, and cannot be mapped")
    return _File(path, _stamp(path.stat()), *offsets)


def _common(kinds: dict[str, AugmentedKind]) -> AugmentedKind:
    """The one kind of all slides; one whose weights are not known may be of any."""
    for key in asdict(next(iter(kinds.values()))):
        named = {getattr(kind, key): name for name, kind in reversed(kinds.items())}
        if key == "weights":
            named.pop("", None)
        if len(named) > 1:
            both = ", ".join(
                f"{name} {value}" for name, value in sorted((name, value) for value, name in named.items())
            )
            raise StoreError(f"augmented embeddings differ in their {key} ({both}); embed the slides all alike")
    return next((kind for kind in kinds.values() if kind.weights), next(iter(kinds.values())))


def _open_pack(path: Path) -> tuple[tuple[str, ...], AugmentedKind, list[_Slide], list[_File]]:
    try:
        with h5py.File(path, "r") as file:
            attrs = dict(file.attrs)
            if attrs.pop("format", None) != _FORMAT:
                raise ValueError("it is no packed file of augmented embeddings")
            kind = config.parse(AugmentedKind, {k: getattr(v, "item", lambda v=v: v)() for k, v in attrs.items()})
            columns = [np.asarray(file[key]).tolist() for key in ("draws", "tiles", "sides")]
            slides = [_Slide(*values) for values in zip(*columns, strict=True)]
            features, coords, names = (cast(h5py.Dataset, file[key]) for key in ("features", "coords", "names"))
            rows = sum(slide.draws * slide.tiles for slide in slides)
            if features.shape != (rows, kind.dim) or coords.shape != (rows, 2) or len(names) != len(slides):
                raise ValueError(f"features {features.shape} and coords {coords.shape} are not of {rows} tiles")
            return tuple(names.asstr()[:]), kind, slides, [_file(path, features, coords)]
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be used ({error}); pack the store again") from error


def _map(file: _File) -> mmap.mmap:
    try:
        with file.path.open("rb") as handle:
            _check_stamp(file, handle.fileno())
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise StoreError(f"{file.path}: cannot be read any more ({error}); embed the slide again") from error
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _check_stamp(file: _File, descriptor: int) -> None:
    if _stamp(os.fstat(descriptor)) != file.stamp:
        raise StoreError(f"{file.path}: has changed since it was opened; start again")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino

"""Bags read over and over, as training does: mapped into memory where the files allow it, not copied.

Files of tile embeddings are HDF5, but gigatome and TRIDENT write theirs uncompressed, so that the bytes of the
embeddings lie in the file as they are. Where they lie is asked of HDF5 once; after that the file is mapped, and the
operating system keeps in memory what there is room for. Compressed files and the like are read through HDF5.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import StoreError
from gigatome.embeddings.packed import PackedBags
from gigatome.embeddings.regions import read_mask
from gigatome.embeddings.slide_store import Embeddings, SlideStore
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore

Reason: TypeAlias = Literal["no embeddings", "no tiles", "embeddings that are not finite"]

_MAPPED = (np.dtype("<f4"), np.dtype("<f2"))


@dataclass(frozen=True)
class _Layout:
    """Where the embeddings lie in a file.

    Attributes:
        path: the file.
        shape: (N, D), or (N, T, D) of regions.
        dtype: of the values, as stored.
        starts: int64 [R], first row of each run of rows that lie one after another.
        offsets: int64 [R], byte at which each run begins; empty if the file must be read through HDF5.
        stamp: size, time of change and inode of the file.
        encoder: that made them.
        weights: hash of its weights; "" if the file does not say.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    stamp: tuple[int, int, int]
    encoder: str
    weights: str


@final
class BagReader:
    """The embeddings of some slides, each read when it is asked for.

    Args:
        source: a folder of embeddings, or a packed file (:func:`~gigatome.embeddings.packed.pack`); slide embeddings
            are bags of one.
        names: the slides.

    Attributes:
        names: of the slides.
        sizes: int64 [N], tiles of each, or regions, at least 1.
        shape: of an instance: (D,) of a tile, (T, D) of a region.
        dim: size D of an embedding.
        encoder: name of the encoder.
        weights: hash of its weights; "" if no file says.

    Raises:
        StoreError: a slide has no embeddings or no tile, a file is damaged, or embeddings differ in size or encoder.
    """

    def __init__(self, source: Embeddings | PackedBags, names: Sequence[str]):
        source = source.packed() if isinstance(source, SlideStore) else source
        self.names, self._source = tuple(names), source
        self._sound: set[int] = set()  # bags without NaN
        if isinstance(source, PackedBags):
            self._layouts, self._rows = [], source.rows(self.names)
            self.sizes, self.shape = np.diff(self._rows, axis=1)[:, 0], (source.dim,)
            self.encoder, self.weights = source.encoder, source.weights
        else:
            self._layouts = [_layout(source, name) for name in self.names]
            self.sizes = np.array([layout.shape[0] for layout in self._layouts], np.int64)
            self.shape = self._layouts[0].shape[1:] if self._layouts else (0,)
            self.encoder, self.weights = _encoder_of(self._layouts) or source.encoder, _weights_of(self._layouts)
            _check_shapes(self._layouts)
        self.dim = self.shape[-1]
        for name in (name for name, size in zip(self.names, self.sizes, strict=True) if not size):
            raise StoreError(f"{name}: has no tiles, and an empty bag cannot be used; leave the slide out")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32] | NDArray[np.float16]:
        """Embeddings of one slide, float32 or float16 [n, …]; they may be a view of the file and stay unwritten.

        Args:
            index: of the slide in ``names``.
            rows: ascending; all by default.

        Raises:
            StoreError: the file cannot be read or has changed since, or a value is not finite.
        """
        if isinstance(self._source, PackedBags):
            values = self._source.embeddings[slice(*self._rows[index])]
            values = values if rows is None else values[rows]
        else:
            values = _read(self._layouts[index], rows)
        if index not in self._sound:
            _check_finite(values, self.names[index])
            if rows is None:
                self._sound.add(index)
        return values

    def path(self, index: int) -> Path:
        """File of one slide; the packed file, where there is one."""
        return self._source.path if isinstance(self._source, PackedBags) else self._layouts[index].path

    def coords(self, index: int) -> NDArray[np.int64]:
        """Corners of the tiles of one slide, (x, y) in level-0 pixels, int64 [n, 2]."""
        if isinstance(self._source, PackedBags):
            return np.asarray(self._source.coords[slice(*self._rows[index])])
        path = self._layouts[index].path
        try:
            with h5py.File(path, "r") as file:
                return np.array(file["coords"], np.int64)
        except (OSError, KeyError) as error:
            raise StoreError(f"{path}: cannot be read any more ({error})") from error


def check_bags(
    store: Embeddings, names: Sequence[str] | None = None, *, values: bool = True
) -> Mapping[Reason, tuple[str, ...]]:
    """Which slides cannot be used as bags, by reason; empty if all can.

    Args:
        store: embeddings.
        names: which slides; all that have embeddings by default.
        values: look for values that are not finite too, which reads every file whole.

    Raises:
        StoreError: a file is damaged.
    """
    if isinstance(store, SlideStore):
        return _check_slides(store, store.names() if names is None else names)
    found: dict[Reason, list[str]] = {}
    for name in store.names() if names is None else names:
        if not store.path(name).is_file():
            found.setdefault("no embeddings", []).append(name)
            continue
        layout = _layout(store, name)
        if not layout.shape[0] or (len(layout.shape) == 3 and not read_mask(layout.path).any()):
            found.setdefault("no tiles", []).append(name)
        elif values and not _finite(_read(layout, None)).all():
            found.setdefault("embeddings that are not finite", []).append(name)
    return {reason: tuple(listed) for reason, listed in found.items()}


def _check_slides(store: SlideStore, names: Sequence[str]) -> Mapping[Reason, tuple[str, ...]]:
    finite = np.all(np.isfinite(store.embeddings), axis=1)
    sound = dict(zip(store.slides, finite.tolist(), strict=True))
    found: dict[Reason, tuple[str, ...]] = {
        "no embeddings": tuple(name for name in names if name not in sound),
        "embeddings that are not finite": tuple(name for name in names if not sound.get(name, True)),
    }
    return {reason: listed for reason, listed in found.items() if listed}


def _layout(store: EmbeddingStore, name: str) -> _Layout:
    path = store.path(name)
    if not path.is_file():
        raise StoreError(f"{store.folder}: holds no embeddings of slide {name}; embed it first")
    stamp = _stamp(path.stat())
    try:
        with h5py.File(path, "r") as file:
            features, coords = file.get("features"), file.get("coords")
            if not isinstance(features, h5py.Dataset) or features.ndim not in (2, 3):
                raise StoreError(f"{path}: holds no tile embeddings [N, D], nor regions [N, T, D], under features")
            if not isinstance(coords, h5py.Dataset) or coords.shape != (len(features), 2):
                raise StoreError(f"{path}: its coords do not fit its features {features.shape}")
            starts, offsets = _runs(file, features)
            encoder = str(features.attrs.get("encoder", store.encoder))
            weights = str(features.attrs.get(WEIGHTS, ""))
            return _Layout(path, features.shape, features.dtype, starts, offsets, stamp, encoder, weights)
    except (OSError, KeyError, RuntimeError) as error:
        raise StoreError(
            f"{path}: is damaged and cannot be read ({error}); delete it and embed the slide again"
        ) from error


def _runs(file: h5py.File, features: h5py.Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row and byte of each run of rows; empty if they cannot be mapped."""
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows, *item = features.shape
    plain = features.dtype in _MAPPED and not file.userblock_size and features.size
    if not plain or features.id.get_create_plist().get_nfilters():
        return nothing
    if features.chunks is None:
        offset = features.id.get_offset()
        starts, offsets = ([], []) if offset is None else ([0], [offset])
    else:
        step, *width = features.chunks
        chunks: list[tuple[int, int]] = []
        features.id.chunk_iter(lambda chunk: chunks.append((chunk.chunk_offset[0], chunk.byte_offset)))
        chunks.sort()
        if width != item or len(chunks) != -(-rows // step):  # some were never written
            return nothing
        starts, offsets = (list(part) for part in zip(*chunks, strict=True))
    first, byte = np.array(starts, np.int64), np.array(offsets, np.int64)
    begins = np.append(True, np.diff(byte) != np.diff(first) * math.prod(item) * features.dtype.itemsize)[: len(byte)]
    return first[begins], byte[begins]


def _read(layout: _Layout, rows: NDArray[np.int64] | None) -> NDArray[Any]:
    """Embeddings in the file's own precision, or float32 where that is neither float16 nor float32."""
    try:
        with layout.path.open("rb") as handle:
            if _stamp(os.fstat(handle.fileno())) != layout.stamp:
                raise StoreError(f"{layout.path}: has changed since it was opened; start again")
            if not len(layout.offsets):
                with h5py.File(handle, "r") as file:
                    values = np.array(file["features"])
                values = values if values.dtype in _MAPPED else values.astype(np.float32)
                return values if rows is None else values[rows]
            return _map(handle, layout, rows)
    except (OSError, KeyError, ValueError) as error:
        raise StoreError(f"{layout.path}: cannot be read any more ({error}); embed the slide again") from error


def _map(handle: Any, layout: _Layout, rows: NDArray[np.int64] | None) -> NDArray[Any]:
    count, *item = layout.shape
    mapped = np.memmap(handle, np.uint8, "c")
    stops = np.append(layout.starts[1:], count)
    size = math.prod(item) * layout.dtype.itemsize
    parts = []
    for start, stop, offset in zip(layout.starts, stops, layout.offsets, strict=True):
        run = np.asarray(mapped[offset : offset + (stop - start) * size])
        run = run.copy() if offset % layout.dtype.itemsize else run  # HDF5 aligns nothing
        run = run.view(layout.dtype).reshape(-1, *item)
        if rows is not None:
            run = run[rows[slice(*np.searchsorted(rows, (start, stop)))] - start]
        parts.append(run)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row is finite, bool [N]; or one True, where a sum says that all are."""
    values = values.reshape(len(values), -1)
    items = tuple(range(1, values.ndim))
    if values.dtype == np.float16:  # whose sums overflow, and whose arithmetic is slow: look at the bits
        return np.all((np.ascontiguousarray(values).view(np.uint16) & 0x7C00) != 0x7C00, axis=items)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return np.ones(1, bool)
    return np.all(np.isfinite(values), axis=items)


def _check_finite(values: NDArray[Any], name: str) -> None:
    finite = _finite(values)
    if not finite.all():
        raise StoreError(
            f"{name}: {np.count_nonzero(~finite)} of {len(finite)} embeddings are not finite; embed the slide again, "
            "or leave it out"
        )


def _check_shapes(layouts: Sequence[_Layout]) -> None:
    shapes = {layout.shape[1:]: layout.path.stem for layout in reversed(layouts)}
    if len(shapes) > 1:
        both = ", ".join(f"{name} has {' × '.join(map(str, shape))}" for shape, name in shapes.items())
        raise StoreError(f"embeddings differ in size ({both}); they are of different encoders, or of tiles and regions")


def _encoder_of(layouts: Sequence[_Layout]) -> str:
    """The one encoder that the files name; "" without files."""
    named = {layout.encoder: layout.path.stem for layout in layouts}
    if len(named) > 1:
        both = ", ".join(f"{name} by {encoder}" for encoder, name in named.items())
        raise StoreError(f"embeddings are by different encoders ({both}); embed the slides by one of them")
    return next(iter(named), "")


def _weights_of(layouts: Sequence[_Layout]) -> str:
    """The one hash of weights that the files name; files without one say nothing against it."""
    named = {layout.weights: layout.path.stem for layout in layouts if layout.weights}
    if len(named) > 1:
        both = ", ".join(f"{name} by {weights}" for weights, name in named.items())
        raise StoreError(f"embeddings are by encoders of different weights ({both}); embed the slides by one of them")
    return next(iter(named), "")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino

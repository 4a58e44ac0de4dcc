"""A cohort's embeddings in one file, to be mapped into memory whole.

The file is HDF5 with datasets that each lie in one piece: ``embeddings`` float16 or float32 [T, D], the slides one
after another; ``coords`` int64 [T, 2]; ``bounds`` int64 [S + 1]; ``names``. Its attributes name the encoder, its
weights and a hash of all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.core.logs import Progress, silent
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore

_FORMAT = "gigatome packed bags 1"


@final
@dataclass(frozen=True, eq=False)
class PackedBags:
    """A packed file, mapped.

    Attributes:
        path: the file.
        encoder: name of the encoder.
        weights: hash of its weights; "" if unknown.
        digest: hash of names, coordinates and embeddings: 16 hexadecimal digits.
        names: of the slides, in the order of the rows.
        bounds: int64 [S + 1]; slide s is rows ``bounds[s]`` to ``bounds[s + 1]``.
        embeddings: float16 or float32 [T, D].
        coords: int64 [T, 2].
    """

    path: Path
    encoder: str
    weights: str
    digest: str
    names: tuple[str, ...]
    bounds: NDArray[np.int64]
    embeddings: NDArray[Any]
    coords: NDArray[np.int64]

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self.embeddings.shape[1]

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """First row of each slide and the one after its last, int64 [N, 2].

        Raises:
            StoreError: a slide is not in the file.
        """
        places = {name: place for place, name in enumerate(self.names)}
        missing = [name for name in names if name not in places]
        if missing:
            raise StoreError(f"{self.path}: holds no embeddings of {_some(missing)}; pack the store again")
        order = np.array([places[name] for name in names], np.int64)
        return np.stack([self.bounds[order], self.bounds[order + 1]], 1)


def pack(
    store: EmbeddingStore,
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    progress: Progress = silent,
) -> PackedBags:
    """Writes a cohort's embeddings as one file, which appears whole or not at all, and opens it.

    Args:
        store: embeddings.
        path: the file; another one there is replaced.
        names: which slides; all that have a tile by default.
        dtype: ``"float16"`` halves the file and the time to read it.
        progress: told of every slide.

    Raises:
        StoreError: a slide has no tile or values that are not finite or too large for ``dtype``; embeddings differ in
            size or in the encoder's weights; or the file cannot be written.
    """
    path = Path(path)
    given = names is not None
    bags = [(name, *_shape(store, name)) for name in (store.names() if names is None else names)]
    bags = bags if given else [bag for bag in bags if bag[1]]
    _check(store, bags)
    bounds = np.cumsum([0, *(rows for _, rows, _, _ in bags)], dtype=np.int64)
    digest = hashlib.sha256()
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            total, dim = int(bounds[-1]), bags[0][2]
            embeddings = file.create_dataset("embeddings", (total, dim), dtype)
            coords = file.create_dataset("coords", (total, 2), np.int64)
            file["bounds"] = bounds
            file["names"] = [name.encode() for name, *_ in bags]
            for place, (name, *_) in enumerate(bags):
                bag = store.read(name)
                values = _cast(bag.embeddings, dtype, name)
                rows = slice(bounds[place], bounds[place + 1])
                embeddings[rows], coords[rows] = values, bag.coords
                for part in (name.encode(), bag.coords.tobytes(), values.tobytes()):
                    digest.update(part)
                progress("pack", place + 1, len(bags))
            weights = next((weights for *_, weights in bags if weights), "")
            file.attrs.update(
                {"format": _FORMAT, "encoder": store.encoder, WEIGHTS: weights, "digest": digest.hexdigest()[:16]}
            )
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error
    return open_packed(path)


def open_packed(path: str | Path, *, encoder: str | None = None, weights: str | None = None) -> PackedBags:
    """Maps a file that :func:`pack` wrote.

    Args:
        path: the file.
        encoder: the encoder that its embeddings must be of; any by default.
        weights: the hash of weights that they must be of.

    Raises:
        StoreError: there is no such file, it is no packed file, or it is of another encoder.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != _FORMAT:
                raise StoreError(f"{path}: is no file of packed embeddings")
            attrs = {key: str(file.attrs[key]) for key in ("encoder", WEIGHTS, "digest")}
            names = tuple(name.decode() for name in np.array(file["names"]).tolist())
            bounds = np.array(file["bounds"], np.int64)
            embeddings, coords = _mapped(path, file["embeddings"]), _mapped(path, file["coords"])
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as packed embeddings ({error}); pack the store again") from error
    if len(bounds) != len(names) + 1 or bounds[-1] != len(embeddings) or len(coords) != len(embeddings):
        raise StoreError(f"{path}: is damaged: its parts do not fit together; pack the store again")
    for asked, has in ((encoder, attrs["encoder"]), (weights, attrs[WEIGHTS])):
        if asked is not None and asked != has:
            raise StoreError(f"{path}: holds embeddings of encoder {has or 'unknown'}, not of {asked}")
    return PackedBags(path, attrs["encoder"], attrs[WEIGHTS], attrs["digest"], names, bounds, embeddings, coords)


def _mapped(path: Path, values: Any) -> NDArray[Any]:
    offset = values.id.get_offset()
    if offset is None:
        raise StoreError(f"{path}: is damaged: it holds no values; pack the store again")
    return np.asarray(np.memmap(path, values.dtype, "c", offset, values.shape))


def _shape(store: EmbeddingStore, name: str) -> tuple[int, int, str]:
    """Rows, size of an embedding, and hash of the encoder's weights."""
    if not store.path(name).is_file():
        raise StoreError(f"{store.folder}: holds no embeddings of slide {name}; embed it first")
    try:
        with h5py.File(store.path(name), "r") as file:
            features: Any = file["features"]
            return features.shape[0], features.shape[1], str(features.attrs.get(WEIGHTS, ""))
    except (OSError, KeyError, IndexError, RuntimeError) as error:
        raise StoreError(f"{store.path(name)}: holds no tile embeddings that can be read ({error})") from error


def _check(store: EmbeddingStore, bags: Sequence[tuple[str, int, int, str]]) -> None:
    if not bags:
        raise StoreError(f"{store.folder}: holds no slide with tiles to pack")
    for what, column in (("size", 2), ("the encoder's weights", 3)):
        kinds = {bag[column]: bag[0] for bag in bags if bag[column] != ""}
        if len(kinds) > 1:
            both = ", ".join(f"{name} has {kind}" for kind, name in kinds.items())
            raise StoreError(f"{store.folder}: embeddings differ in {what} ({both}) and cannot be packed together")
    if empty := [name for name, rows, *_ in bags if not rows]:
        raise StoreError(f"{_some(empty)}: no tiles, and an empty bag cannot be used; leave it out")


def _cast(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise StoreError(f"{name}: has embeddings that are not finite; embed the slide again, or leave it out")
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype)
    if not np.isfinite(cast).all():
        raise StoreError(f"{name}: has embeddings up to {np.abs(values).max():.3g}, too large for {dtype}; use float32")
    return cast


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"

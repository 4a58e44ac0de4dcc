"""Slide embeddings: one vector a slide, of gigatome or of other tools, in memory.

A cohort of TCGA's size is 24 MB, so all of it is read at once. Per-slide files are TRIDENT's: ``features`` float32 (D,)
in ``slide_features_<encoder>/<slide>.h5``; ours state their tiling and their encoder in attributes of ``features``, and
have nothing else at their root.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.core.extras import require
from gigatome.core.logs import Failure, log
from gigatome.embeddings.packed import PackedBags
from gigatome.embeddings.store import WEIGHTS, EmbeddingStore

PATIENT = "case_id"
"""Attribute of ``features``, and column of the table, that names a slide's patient."""

TABLE = "embeddings.parquet"
"""Name of a cohort's table in the folder of its per-slide files."""

_KEYS = ("features", "feats")  # TRIDENT's and ours; STAMP's
_OF_THE_FILE = ("encoder", "name", "savetodir", WEIGHTS, PATIENT)
_FOLDER = "slide_features_"
_ARRAYS = "ids.npy", "embeddings.npy"


@final
@dataclass(frozen=True, eq=False)
class SlideStore:
    """The embeddings of a cohort's slides by one encoder, one vector each.

    Attributes:
        folder: where they lie: a folder of per-slide files or of two arrays, or a table.
        encoder: name of the slide encoder.
        weights: hash of all that made the vectors, the tile encoder included; "" if unknown.
        slides: names, sorted.
        embeddings: float32 [S, D].
        patients: of the slides whose files name one.
        stated: what else the file of each slide states, such as the tiling.
        failures: slides that the embedding which made this object could not process.
    """

    folder: Path
    encoder: str
    weights: str
    slides: tuple[str, ...]
    embeddings: NDArray[np.float32]
    patients: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, encoder: str | None = None) -> "SlideStore":
        """Reads slide embeddings.

        Args:
            path: a job directory, a tiling's directory in it, a folder ``slide_features_<encoder>``; another folder of
                ``.h5`` with one vector each, as TRIDENT, Patho-Bench (``pooled``) and STAMP write them; a ``.parquet``
                with columns ``slide_id``, ``f0``, ``f1`` …; or a folder with ``ids.npy`` and ``embeddings.npy``, as
                Giga-SSL's authors published theirs.
            encoder: which encoder's, where there are several.

        Raises:
            StoreError: there are none, or several to choose from; a file is damaged or holds no vector; or vectors
                differ in size or encoder, or a slide is there twice.
            MissingExtraError: pyarrow is not installed, which reads a table.
        """
        given = Path(path).absolute()
        if given.suffix == ".parquet":
            return _read_table(given)
        if all((given / name).is_file() for name in _ARRAYS):
            return _read_arrays(given)
        folders = [given] if _holds_files(given) else slide_folders(given)
        named = [folder for folder in folders if encoder in (None, folder.name.removeprefix(_FOLDER))]
        if len(named) != 1:
            there = ", ".join(map(str, folders)) or "nothing; gigatome embed --level slide makes them"
            raise StoreError(f"{path}: name one set of slide embeddings; there are {there}")
        return _read_files(named[0])

    def __len__(self) -> int:
        return len(self.slides)

    def names(self) -> list[str]:
        """Names of the slides, sorted."""
        return list(self.slides)

    def attributes(self, name: str) -> Mapping[str, Any]:
        """What is stated of one slide's tiling."""
        return self.stated.get(name, {})

    def slide_vectors(self, names: Sequence[str] | None = None) -> tuple[list[str], NDArray[np.float32]]:
        """Names and vectors float32 [S, D], as of :meth:`EmbeddingStore.slide_vectors`; those not finite are left out.

        Raises:
            StoreError: a slide is not there.
        """
        rows = self.packed().rows(self.slides if names is None else names)[:, 0]
        finite = np.isfinite(self.embeddings[rows]).all(1)
        for row in rows[~finite]:
            log.warning("%s: has an embedding that is not finite; left out", self.slides[row])
        return [self.slides[row] for row in rows[finite]], self.embeddings[rows[finite]]

    def packed(self) -> PackedBags:
        """Each slide as a bag of one."""
        count = len(self)
        coords, bounds = np.zeros((count, 2), np.int64), np.arange(count + 1)
        return PackedBags(self.folder, self.encoder, self.weights, "", self.slides, bounds, self.embeddings, coords)

    def write_table(self, path: str | Path) -> None:
        """Writes one Parquet: ``slide_id``, ``case_id``, and ``f0`` to ``f<D − 1>`` float32, a row a slide.

        The encoder, its hash, and what all slides state alike are in its metadata, as JSON under ``gigatome``.

        Raises:
            MissingExtraError: pyarrow is not installed.
            StoreError: it cannot be written.
        """
        arrow, parquet = (require(name, "tables", "write a table of slide embeddings") for name in _ARROW)
        ids = {"slide_id": list(self.slides), PATIENT: [self.patients.get(name, "") for name in self.slides]}
        columns = ids | {f"f{k}": values for k, values in enumerate(np.asfortranarray(self.embeddings).T)}
        about = {"encoder": self.encoder, WEIGHTS: self.weights, "tiling": self._alike()}
        table = arrow.table(columns).replace_schema_metadata({"gigatome": json.dumps(about)})
        try:
            with atomic_path(path) as temporary:
                parquet.write_table(table, temporary, compression="none", use_dictionary=False, write_statistics=False)
        except (OSError, arrow.ArrowException) as error:
            raise StoreError(f"{path}: cannot be written ({error})") from error

    def write_pooled(self, folder: str | Path) -> Path:
        """Writes ``pooled/<slide>.h5`` with ``features`` (1, D), which Patho-Bench reads; (D,) it does not.

        Returns:
            The folder ``pooled``.

        Raises:
            StoreError: a file cannot be written.
        """
        pooled = Path(folder) / "pooled"
        for name, vector in zip(self.slides, self.embeddings, strict=True):
            write_slide_vector(
                pooled / f"{name}.h5", vector[None], encoder=self.encoder, weights=self.weights,
                patient=self.patients.get(name, ""), stated=self.attributes(name),
            )  # fmt: skip
        return pooled

    def _alike(self) -> dict[str, Any]:
        """What the files of all slides state alike, as JSON holds it."""
        first = self.attributes(self.slides[0]) if self.slides else {}
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in first.items()}
        plain = {key: value for key, value in plain.items() if isinstance(value, str | int | float)}
        known = [self.attributes(name) for name in self.slides]
        return {key: value for key, value in plain.items() if all(of.get(key) == value for of in known)}


Embeddings: TypeAlias = EmbeddingStore | SlideStore
"""Of tiles or regions, or one of each slide."""

_ARROW = "pyarrow", "pyarrow.parquet"


def open_store(path: str | Path, *, encoder: str | None = None) -> Embeddings:
    """The embeddings at ``path``: of tiles or regions if there are such, otherwise of slides.

    Args:
        path: what :meth:`EmbeddingStore.open` or :meth:`SlideStore.open` takes.
        encoder: which encoder's, of tiles or of slides.

    Raises:
        StoreError: as both do.
        MissingExtraError: as :meth:`SlideStore.open`.
    """
    given = Path(path).absolute()
    tiles, slides = EmbeddingStore.find(given), slide_folders(given)
    if encoder is not None and all(store.encoder != encoder for store in tiles):
        tiles = [] if any(folder.name == f"{_FOLDER}{encoder}" for folder in slides) else tiles
    if (slides or _is_foreign(given)) and not tiles:
        return SlideStore.open(given, encoder=encoder)
    return EmbeddingStore.open(path, encoder=encoder)


def holds_embeddings(path: str | Path) -> bool:
    """Whether :func:`open_store` finds embeddings at ``path``, one set or several."""
    given = Path(path).absolute()
    return bool(EmbeddingStore.find(given) or slide_folders(given) or _is_foreign(given))


def slide_folders(path: Path) -> list[Path]:
    """Folders of per-slide files that ``path`` is, or that are in a job or the directory of a tiling."""
    if path.name.startswith(_FOLDER) and path.is_dir():
        return [path]
    return sorted(f for pattern in (f"{_FOLDER}*", f"*/{_FOLDER}*") for f in path.glob(pattern) if f.is_dir())


def write_slide_vector(
    path: str | Path,
    vector: NDArray[np.float32],
    *,
    encoder: str,
    weights: str,
    patient: str,
    stated: Mapping[str, Any],
) -> None:
    """Writes one slide's vector, (D,) or (1, D), as ``.h5``, whole or not at all; raises :class:`StoreError`."""
    path = Path(path)
    own = {"encoder": encoder, "name": path.stem, "savetodir": str(path.parent), WEIGHTS: weights, PATIENT: patient}
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            features = file.create_dataset("features", data=np.asarray(vector, np.float32))
            features.attrs.update({**stated, **own})
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error


def read_slide_vector(path: str | Path) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Reads one slide's vector and all that its file states.

    Returns:
        float32 [D], and the attributes of ``features`` and, where other tools have them, of ``coords`` and the root.

    Raises:
        StoreError: the file is damaged, or holds no vector (D,) or (1, D).
    """
    try:
        with h5py.File(path, "r") as file:
            found = next((item for key in _KEYS if isinstance(item := file.get(key), h5py.Dataset)), None)
            if found is None or found.shape not in ((found.size,), (1, found.size)):
                held = list(file) if found is None else found.shape
                raise StoreError(f"{path}: holds no slide embedding (D,) or (1, D), but {held}")
            coords = dict(file["coords"].attrs) if "coords" in file else {}
            attrs = {**file.attrs, **coords, **found.attrs}
            return np.asarray(found, np.float32).reshape(-1), attrs
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise StoreError(f"{path}: is damaged and cannot be read ({error}); embed the slide again") from error


def _is_foreign(path: Path) -> bool:
    return path.suffix == ".parquet" or any((path / name).is_file() for name in _ARRAYS) or _holds_files(path)


def _holds_files(path: Path) -> bool:
    """Whether ``path`` is itself a folder of slides' files."""
    return path.is_dir() and not path.name.startswith("features_") and next(path.glob("*.h5"), None) is not None


def _read_files(folder: Path) -> SlideStore:
    names = sorted(path.stem for path in folder.glob("*.h5") if not path.name.startswith("."))
    vectors: list[NDArray[np.float32]] = []
    stated: dict[str, dict[str, Any]] = {}
    encoders: dict[str, str] = {}
    hashes: dict[str, str] = {}
    patients: dict[str, str] = {}
    for name in names:
        vector, attrs = read_slide_vector(folder / f"{name}.h5")
        encoder = attrs.get("encoder", attrs.get("extractor", folder.name.removeprefix(_FOLDER)))
        encoders.setdefault(str(encoder), name)
        hashes.setdefault(str(attrs.get(WEIGHTS, "")), name)
        if attrs.get(PATIENT):
            patients[name] = str(attrs[PATIENT])
        stated[name] = {key: value for key, value in attrs.items() if key not in _OF_THE_FILE}
        vectors.append(vector)
    hashes.pop("", None)
    for what, found in (("encoders", encoders), ("weights", hashes)):
        if len(found) > 1:
            both = ", ".join(f"{name} by {value}" for value, name in found.items())
            raise StoreError(f"{folder}: slide embeddings are by different {what} ({both}); embed the slides by one")
    encoder = next(iter(encoders), folder.name.removeprefix(_FOLDER))
    return SlideStore(
        folder, encoder, next(iter(hashes), ""), tuple(names), _stacked(vectors, names, folder), patients, stated
    )


def _read_arrays(folder: Path) -> SlideStore:
    try:
        ids, values = (np.load(folder / name, allow_pickle=False) for name in _ARRAYS)
        if values.ndim != 2 or ids.shape != (len(values),):
            raise ValueError(f"{ids.shape} names of {values.shape} embeddings")
        return _sorted(folder, folder.name, "", [str(name) for name in ids.tolist()], values.astype(np.float32))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: {' and '.join(_ARRAYS)} cannot be read as slide embeddings ({error})") from error


def _read_table(path: Path) -> SlideStore:
    arrow, parquet = (require(name, "tables", f"read {path.name}") for name in _ARROW)
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file")
    try:
        table = parquet.read_table(path, use_threads=False)
        width = sum(name[:1] == "f" and name[1:].isdecimal() for name in table.column_names)
        values = np.empty((len(table), width), np.float32)
        for k in range(width):
            values[:, k] = table.column(f"f{k}").to_numpy()
        names = [str(name) for name in table.column("slide_id").to_pylist()]
        patients = table.column(PATIENT).to_pylist() if PATIENT in table.column_names else []
        about = json.loads((table.schema.metadata or {}).get(b"gigatome", b"{}"))
    except (OSError, KeyError, ValueError, TypeError, arrow.ArrowException) as error:
        raise StoreError(
            f"{path}: cannot be read as slide embeddings ({error}); columns slide_id, f0, f1 … are needed"
        ) from error
    tiling = about.get("tiling", {})
    return _sorted(
        path, about.get("encoder", path.stem), about.get(WEIGHTS, ""), names, values,
        {name: str(patient) for name, patient in zip(names, patients, strict=False) if patient},
        dict.fromkeys(names, tiling),
    )  # fmt: skip


def _sorted(
    source: Path, encoder: str, weights: str, names: Sequence[str], values: NDArray[np.float32], *rest: Any
) -> SlideStore:
    twice = next((name for name in _repeated(names)), None)
    if twice is not None:
        raise StoreError(f"{source}: slide {twice} is there twice; keep one row")
    order = sorted(range(len(names)), key=names.__getitem__)
    slides = tuple(names[i] for i in order)
    return SlideStore(source, encoder, weights, slides, values[np.array(order, np.int64)], *rest)


def _repeated(names: Iterable[str]) -> Iterable[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _stacked(vectors: Sequence[NDArray[np.float32]], names: Sequence[str], folder: Path) -> NDArray[np.float32]:
    sizes = {len(vector): name for vector, name in zip(vectors, names, strict=True)}
    if len(sizes) > 1:
        both = ", ".join(f"{name} has {size}" for size, name in sizes.items())
        raise StoreError(f"{folder}: embeddings differ in size ({both}); they are of different encoders")
    return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

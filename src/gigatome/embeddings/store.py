"""Tile embeddings on disk: one ``.h5`` a slide, in the layout of TRIDENT, which other tools read as it is.

A file holds ``features`` float32 [N, D] with attributes ``encoder``, ``name``, ``savetodir``, and ``coords`` int64
[N, 2] with the attributes of the tiling. There are never groups or scalars at its root: GigaPath's loader slices every
key. Source: TRIDENT, ``WSI.py`` and ``IO.py``; ours differs in the chunks, 512 rows in place of one, which no reader
notices and which read four times as fast.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.core.job import TilesDir
from gigatome.core.logs import Failure, log

WEIGHTS = "encoder_weights"
"""Attribute of ``features`` that holds the hash of the encoder's weights."""

_CHUNK_ROWS = 512
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Bag:
    """The tile embeddings of a slide.

    Attributes:
        name: the slide.
        encoder: name of the encoder that made them.
        coords: int64 [N, 2], (x, y) of each tile's top-left corner in level-0 pixels.
        embeddings: float32 [N, D]; N is 0 for a slide without tiles.
        attrs: attributes of the tiling, such as ``patch_size`` and ``target_magnification``.
        encoding: further attributes of the embeddings, such as ``encoder_weights`` and ``precision``.
    """

    name: str
    encoder: str
    coords: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.embeddings.ndim != 2 or self.coords.shape != (len(self.embeddings), 2):
            raise ValueError(
                f"{self.name}: a bag needs coords [N, 2] and embeddings [N, D], "
                f"not {self.coords.shape} and {self.embeddings.shape}"
            )

    def __len__(self) -> int:
        return len(self.embeddings)


def write_bag(path: str | Path, bag: Bag, *, dtype: str = "float32") -> None:
    """Writes a bag as one ``.h5``; the file appears whole or not at all.

    Args:
        path: the file; its folders are made.
        bag: what to write.
        dtype: ``"float32"``, or ``"float16"`` to halve the file at a cost in precision.

    Raises:
        StoreError: the file cannot be written.
    """
    path = Path(path)
    shared = {"name": bag.name, "savetodir": str(path.parent)}
    rows, dim = bag.embeddings.shape
    chunks = (min(rows, _CHUNK_ROWS), dim) if rows and dim else None
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=bag.coords.astype(np.int64))
            coords.attrs.update({**shared, **bag.attrs})
            features = file.create_dataset("features", data=bag.embeddings.astype(dtype), chunks=chunks)
            features.attrs.update({"encoder": bag.encoder, **shared, **bag.encoding})
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error


def read_bag(path: str | Path) -> Bag:
    """Reads the tile embeddings of one slide, whether gigatome or TRIDENT wrote them; float16 becomes float32.

    Raises:
        StoreError: the file is missing, damaged, or holds no tile embeddings.
    """
    path = Path(path)
    with _features(path) as (features, coords):
        if features.ndim == 3:
            raise StoreError(f"{path}: holds regions {features.shape}, not tiles; read it with read_regions")
        attrs, encoding = dict(coords.attrs), dict(features.attrs)
        name = str(encoding.pop("name", path.stem))
        encoder = str(encoding.pop("encoder", path.parent.name.removeprefix("features_")))
        encoding.pop("savetodir", None)
        return Bag(name, encoder, coords[:].astype(np.int64), features[:].astype(np.float32), attrs, encoding)


@dataclass(frozen=True)
class BagHeader:
    """What a file of tile embeddings says about itself, without the embeddings.

    Attributes:
        encoder: name of the encoder.
        weights: hash of its weights; empty if the file does not say, as TRIDENT's do not.
        dim: size of an embedding.
        coords: int64 [N, 2], as in :class:`Bag`.
    """

    encoder: str
    weights: str
    dim: int
    coords: NDArray[np.int64]


def read_header(path: str | Path) -> BagHeader:
    """Reads what :func:`read_bag` does save the embeddings; raises :class:`StoreError` likewise."""
    path = Path(path)
    with _features(path) as (features, coords):
        attrs = features.attrs
        encoder = str(attrs.get("encoder", path.parent.name.removeprefix("features_")))
        return BagHeader(encoder, str(attrs.get(WEIGHTS, "")), features.shape[-1], coords[:].astype(np.int64))


@dataclass(frozen=True)
class EmbeddingStore:
    """The tile embeddings of a cohort by one encoder.

    Attributes:
        job: the job directory.
        tiles: the directory of the tiling in it.
        encoder: name of the encoder.
        failures: slides that the extraction which made this object could not process.
    """

    job: Path
    tiles: TilesDir
    encoder: str
    failures: tuple[Failure, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, encoder: str | None = None) -> "EmbeddingStore":
        """Finds the embeddings in a folder.

        Args:
            path: a job directory, the directory of a tiling in it, or a folder ``features_<encoder>`` itself.
            encoder: which encoder's, where there are several.

        Raises:
            StoreError: there are none, or several to choose from; the message lists them.
        """
        folders = _feature_folders(Path(path).absolute())
        named = [folder for folder in folders if encoder is None or folder.name == f"features_{encoder}"]
        if not folders:
            raise StoreError(
                f"{path}: holds no tile embeddings; expected a job directory with <tiling>/features_<encoder>/, "
                "as gigatome embed writes it"
            )
        if not named:
            raise StoreError(f"{path}: holds no embeddings of encoder {encoder}; there are {_listed(folders)}")
        if len(named) > 1:
            raise StoreError(f"{path}: holds {len(named)} sets of embeddings; name one of them: {_listed(named)}")
        folder = named[0]
        return cls(folder.parent.parent, TilesDir(folder.parent), folder.name.removeprefix("features_"))

    @classmethod
    def find(cls, path: str | Path) -> "list[EmbeddingStore]":
        """All embeddings below ``path``, which is what :meth:`open` takes; none if there are none."""
        folders = _feature_folders(Path(path).absolute())
        return [cls(f.parent.parent, TilesDir(f.parent), f.name.removeprefix("features_")) for f in folders]

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.tiles.features(self.encoder)

    @property
    def encoder_folder(self) -> Path:
        """Where a copy of the encoder lies, so that regions can be embedded without looking for it; if there is one."""
        return self.folder / "encoder"

    def path(self, name: str) -> Path:
        """File of the slide ``name``, whether or not it exists."""
        return self.folder / f"{name}.h5"

    def names(self) -> list[str]:
        """Names of the slides that have embeddings, sorted; those without any tile too."""
        return sorted(path.stem for path in self.folder.glob("*.h5") if not path.name.startswith("."))

    def __len__(self) -> int:
        return len(self.names())

    def read(self, name: str) -> Bag:
        """Embeddings of the tiles of one slide; raises :class:`StoreError` if there are none or they are damaged."""
        if not self.path(name).is_file():
            raise StoreError(f"{self.folder}: holds no embeddings of slide {name}; embed it first")
        return read_bag(self.path(name))

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of the tiling of one slide; raises :class:`StoreError` as :meth:`read` does."""
        with _features(self.path(name)) as (_, coords):
            return dict(coords.attrs)

    def slide_vectors(self, names: Sequence[str] | None = None) -> tuple[list[str], NDArray[np.float32]]:
        """The mean embedding of each slide: of its tiles, or, where a file holds regions, of the tiles in them.

        Slides without tiles have none and are left out, as are slides with embeddings that are not finite; both are
        logged.

        Args:
            names: which slides; all by default.

        Returns:
            Names of the slides, and float32 [S, D].

        Raises:
            StoreError: a file is damaged, or files hold embeddings of different sizes.
        """
        vectors: dict[str, NDArray[np.float32]] = {}
        for name in self.names() if names is None else names:
            with _features(self.path(name)) as (features, _):
                vector = _mean(features)
            if vector is None:
                log.warning("%s: has no tiles; left out", name)
            elif not np.isfinite(vector).all():
                log.warning("%s: has embeddings that are not finite; left out: embed it again", name)
            else:
                vectors[name] = vector
        sizes = {len(vector): name for name, vector in vectors.items()}
        if len(sizes) > 1:
            both = ", ".join(f"{name} has {size}" for size, name in sizes.items())
            raise StoreError(f"{self.folder}: embeddings differ in size ({both}); they are of different encoders")
        return list(vectors), np.stack(list(vectors.values())) if vectors else np.zeros((0, 0), np.float32)


def _mean(features: h5py.Dataset) -> NDArray[np.float32] | None:
    """Mean over tiles, float32 [D]; places of a region without a tile hold zeros and do not count."""
    total, count = np.zeros(features.shape[-1]), 0
    step = max(1, _ROWS_AT_ONCE // math.prod(features.shape[1:-1]))
    for start in range(0, len(features), step):
        rows = features[start : start + step].reshape(-1, features.shape[-1])
        total += rows.sum(0, dtype=np.float64)
        count += len(rows) if features.ndim == 2 else np.count_nonzero(rows.any(1))
    return (total / count).astype(np.float32) if count else None


@contextmanager
def _features(path: Path) -> Iterator[tuple[h5py.Dataset, h5py.Dataset]]:
    """The ``features`` and ``coords`` of a file of tile embeddings, checked against one another."""
    try:
        with h5py.File(path, "r") as file:
            features, coords = file.get("features"), file.get("coords")
            if not isinstance(features, h5py.Dataset) or not isinstance(coords, h5py.Dataset):
                raise StoreError(f"{path}: holds no tile embeddings: it has {_listed(file)}, not features and coords")
            if features.ndim not in (2, 3) or coords.shape != (len(features), 2):
                raise StoreError(
                    f"{path}: features {features.shape} and coords {coords.shape} are no tile embeddings [N, D], nor "
                    "regions [N, T, D], with [N, 2]; slide embeddings lie in slide_features_<encoder>"
                )
            yield features, coords
    except (OSError, KeyError, RuntimeError) as error:
        raise StoreError(
            f"{path}: is damaged and cannot be read ({error}); delete it and embed the slide again"
        ) from error


def _feature_folders(path: Path) -> list[Path]:
    if path.name.startswith("features_") and path.is_dir():
        return [path]
    folders = sorted(f for pattern in ("features_*", "*/features_*") for f in path.glob(pattern) if f.is_dir())
    return [folder for folder in folders if any(folder.glob("*.h5"))] or folders


def _listed(items: Any) -> str:
    return ", ".join(str(item) for item in items) or "nothing"

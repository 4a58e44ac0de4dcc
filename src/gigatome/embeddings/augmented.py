"""Embeddings of augmented tiles: for each slide K draws of N tiles, each draw with colours and geometry of its own.

Slide-level pretraining needs many augmented views of a slide, and embedding them anew at each step would cost more than
all else; so they are embedded once. A file holds ``features`` float16 [K, N, D] in one piece, to be mapped, with the
attributes that files of tile embeddings have, and ``coords`` int64 [K, N, 2], (x, y) of each tile's top-left corner in
level-0 pixels. Source: Giga-SSL (arXiv:2212.03273) and its code, which writes two ``.npy`` files for each draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.core.job import TilesDir
from gigatome.core.logs import Failure

SHARING = "augmentation"
"""Attribute of ``features`` that says whether the tiles of a draw share one augmentation: "shared" or "each"."""


@dataclass(frozen=True, eq=False)
class AugmentedBag:
    """The augmented tile embeddings of a slide.

    Attributes:
        name: the slide.
        encoder: name of the tile encoder.
        coords: int64 [K, N, 2], (x, y) of each tile's top-left corner in level-0 pixels.
        embeddings: float16 [K, N, D].
        attrs: attributes of the tiling, such as ``patch_size`` and ``target_mpp``.
        encoding: further attributes of the embeddings, such as ``encoder_weights`` and :data:`SHARING`.
    """

    name: str
    encoder: str
    coords: NDArray[np.int64]
    embeddings: NDArray[np.float16]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.embeddings.ndim != 3 or self.coords.shape != (*self.embeddings.shape[:2], 2):
            raise ValueError(
                f"{self.name}: augmented embeddings need [K, N, D] with coords [K, N, 2], "
                f"not {self.embeddings.shape} and {self.coords.shape}"
            )

    @property
    def cells(self) -> NDArray[np.int64]:
        """Where the tiles lie in steps of one tile, int64 [K, N, 2]: the grid's column and row of each."""
        return tile_cells(self.coords, self.attrs)


def tile_cells(coords: NDArray[np.int64], attrs: Mapping[str, Any]) -> NDArray[np.int64]:
    """Column and row of tiles in the grid of their slide, from level-0 pixels int64 […, 2] and the tiling's attributes.

    Neighbouring tiles are 1 apart whatever the scanner's resolution. Giga-SSL's authors divide level-0 pixels by 224
    in training, which puts neighbours 4 apart, and by 896 at inference: other values, which no option mends afterwards.
    """
    return np.rint(coords / tile_side(attrs)).astype(np.int64)


def tile_side(attrs: Mapping[str, Any]) -> float:
    """Step from a tile to its neighbour in level-0 pixels, from the tiling's attributes, also from TRIDENT's alone."""
    step = float(attrs["patch_size"]) - float(attrs.get("overlap", 0))
    if "target_mpp" in attrs:
        return step * float(attrs["target_mpp"]) / float(attrs["mpp_level0"])
    return step * float(attrs["level0_magnification"]) / float(attrs["target_magnification"])


def write_augmented(path: str | Path, bag: AugmentedBag) -> None:
    """Writes a slide's augmented embeddings as one ``.h5``, whole or not at all; raises :class:`StoreError`."""
    path = Path(path)
    shared = {"name": bag.name, "savetodir": str(path.parent)}
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=bag.coords.astype(np.int64))
            coords.attrs.update({**shared, **bag.attrs})
            features = file.create_dataset("features", data=bag.embeddings.astype(np.float16))
            features.attrs.update({"encoder": bag.encoder, **shared, **bag.encoding})
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error


def read_augmented(path: str | Path) -> AugmentedBag:
    """Reads what :func:`write_augmented` wrote; raises :class:`StoreError` if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file; embed the slide with augmentations first")
    try:
        with h5py.File(path, "r") as file:
            attrs, encoding = dict(file["coords"].attrs), dict(file["features"].attrs)
            coords, embeddings = (np.asarray(file[key]) for key in ("coords", "features"))
        encoding.pop("savetodir", None)
        name, encoder = str(encoding.pop("name", path.stem)), str(encoding.pop("encoder", ""))
        return AugmentedBag(name, encoder, coords.astype(np.int64), embeddings, attrs, encoding)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"{path}: is damaged or holds no augmented embeddings ({error}); delete it and embed the slide again"
        ) from error


@final
@dataclass(frozen=True)
class AugmentedStore:
    """The augmented tile embeddings of a cohort by one encoder.

    Attributes:
        job: the job directory.
        tiles: the directory of the tiling in it.
        encoder: name of the tile encoder.
        failures: slides that the extraction which made this object could not process.
    """

    job: Path
    tiles: TilesDir
    encoder: str
    failures: tuple[Failure, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, encoder: str | None = None) -> "AugmentedStore":
        """Finds them in a job directory, a tiling's directory in it, or a folder ``augmented_<encoder>`` itself.

        Raises:
            StoreError: there are none, or several to choose from; the message lists them.
        """
        given = Path(path).absolute()
        folders = _folders(given, f"augmented_{encoder or '*'}")
        if len(folders) != 1:
            there = ", ".join(map(str, folders or _folders(given, "augmented_*")))
            what = f"holds {len(folders)} sets of augmented embeddings" if folders else "holds no augmented embeddings"
            wanted = f" by {encoder}" if encoder else ""
            hint = f"; name one of them: {there}" if there else "; make them with gigatome embed --augmentations"
            raise StoreError(f"{path}: {what}{wanted}{hint}")
        folder = folders[0]
        return cls(folder.parent.parent, TilesDir(folder.parent), folder.name.removeprefix("augmented_"))

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.tiles.augmented(self.encoder)

    @property
    def encoder_folder(self) -> Path:
        """Where a copy of the tile encoder lies, if there is one."""
        return self.folder / "encoder"

    def path(self, name: str) -> Path:
        """File of the slide ``name``, whether or not it exists."""
        return self.folder / f"{name}.h5"

    def names(self) -> list[str]:
        """Names of the slides, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.h5") if not path.name.startswith("."))

    def read(self, name: str) -> AugmentedBag:
        """Augmented embeddings of one slide; raises :class:`StoreError` as :func:`read_augmented`."""
        return read_augmented(self.path(name))


def _folders(path: Path, pattern: str) -> Sequence[Path]:
    if path.name.startswith("augmented_") and path.is_dir():
        return [path] if path.match(pattern) else []
    return sorted(folder for glob in (pattern, f"*/{pattern}") for folder in path.glob(glob) if folder.is_dir())

"""Grids of tile embeddings, one for each region of a slide: a ``.h5`` a slide beside those of tile embeddings.

A file holds ``features`` [R, T, D] with the attributes that files of tile embeddings have, ``coords`` int64 [R, 2] of
the regions, whose ``patch_size`` is a region's, and ``mask`` uint8 [R, T], 1 for the tiles that are there. The
embeddings of the others are zeros. Region embeddings [R, D] are written as those of tiles are, a region for a tile.
Both say which regions they are of, in the attributes of :func:`region_attributes`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path
from gigatome.core.errors import StoreError
from gigatome.tiles.grid import coords_attributes
from gigatome.tiles.regions import RegionGrid

BACKGROUND = "region_background"
"""Attribute of ``coords`` that says what became of tiles without tissue: "mask" or "encode"."""

TILES = "region_tiles"
"""Attribute of ``coords`` that holds the tiles along a region's side."""

REGIONS = "region_digest"
"""Attribute of ``coords`` that changes with the regions and with which of their tiles are there."""


@dataclass(frozen=True, eq=False)
class RegionBag:
    """The regions of a slide, each a grid of tile embeddings.

    Attributes:
        name: the slide.
        encoder: name of the tile encoder.
        coords: int64 [R, 2], (x, y) of each region's top-left corner in level-0 pixels.
        grids: float [R, T, D], row by row; zeros where ``mask`` is false.
        mask: bool [R, T], tiles that are there.
        attrs: attributes of the tiling, such as ``patch_size`` and ``target_mpp`` of the regions, and :data:`TILES`.
        encoding: further attributes of the embeddings, such as ``encoder_weights``.
    """

    name: str
    encoder: str
    coords: NDArray[np.int64]
    grids: NDArray[np.floating]
    mask: NDArray[np.bool_]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.grids.ndim != 3 or self.mask.shape != self.grids.shape[:2] or self.coords.shape != (len(self.grids), 2):
            raise ValueError(
                f"{self.name}: regions need coords [R, 2], grids [R, T, D] and mask [R, T], "
                f"not {self.coords.shape}, {self.grids.shape} and {self.mask.shape}"
            )

    def __len__(self) -> int:
        return len(self.grids)


def write_regions(path: str | Path, bag: RegionBag, *, dtype: str = "float32") -> None:
    """Writes regions as one ``.h5``, whole or not at all; raises :class:`StoreError`.

    Args:
        path: the file; its folders are made.
        bag: what to write.
        dtype: ``"float32"``, or ``"float16"`` to halve the file at a cost in precision.
    """
    path = Path(path)
    shared = {"name": bag.name, "savetodir": str(path.parent)}
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            coords = file.create_dataset("coords", data=bag.coords.astype(np.int64))
            coords.attrs.update({**shared, **bag.attrs})
            file.create_dataset("mask", data=bag.mask.astype(np.uint8))
            features = file.create_dataset("features", data=bag.grids.astype(dtype))  # in one piece, to be mapped
            features.attrs.update({"encoder": bag.encoder, **shared, **bag.encoding})
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be written ({error})") from error


def region_attributes(regions: RegionGrid, name: str, folder: str) -> dict[str, Any]:
    """The attributes of a dataset ``coords`` of regions: those of tiles of their size, and ours.

    Args:
        regions: the regions.
        name: of the slide.
        folder: where the file is.
    """
    options = regions.options
    return {
        **coords_attributes(regions.as_tiles(), name, folder),
        TILES: options.tiles,
        "region_min_tiles": options.least_tiles,
        BACKGROUND: options.background,
        REGIONS: regions.digest,
    }


def read_mask(path: str | Path) -> NDArray[np.bool_]:
    """Which tiles are there, bool [R, T], without the embeddings; raises as :func:`read_regions`."""
    with _opened(Path(path)) as file:
        return np.asarray(file["mask"], bool)


def read_regions(path: str | Path) -> RegionBag:
    """Reads the regions of one slide; raises :class:`StoreError` if there is no such file or it holds none."""
    path = Path(path)
    with _opened(path) as file:
        attrs, encoding = dict(file["coords"].attrs), dict(file["features"].attrs)
        coords, mask, grids = (np.asarray(file[key]) for key in ("coords", "mask", "features"))
    name, encoder = str(encoding.pop("name", path.stem)), str(encoding.pop("encoder", ""))
    encoding.pop("savetodir", None)
    return RegionBag(name, encoder, coords.astype(np.int64), grids, mask.astype(bool), attrs, encoding)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A file of regions, open."""
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file; embed the slide with level region first")
    try:
        with h5py.File(path, "r") as file:
            if "mask" not in file:
                raise StoreError(
                    f"{path}: holds embeddings of tiles, not of regions; embed the slide with level region"
                )
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise StoreError(
            f"{path}: is damaged and cannot be read ({error}); delete it and embed the slide again"
        ) from error

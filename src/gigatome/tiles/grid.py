"""Tiles of a slide on a regular grid: where they are, how much tissue they hold, and the file that says so.

The grid is anchored at the level-0 origin. Its step is exact, ``(tile_size - overlap) · mpp / slide.mpp`` level-0
pixels with a fraction, and each coordinate is rounded by itself, so that tiles never drift from the resolution asked
for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import atomic_path, redact
from gigatome.core.errors import NoTissueError, StoreError
from gigatome.core.geometry import level0_length, magnification
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.version import __version__
from gigatome.slides.batch import each_slide
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tissue.mask import OVERLAP_TOLERANCE, TissueMask
from gigatome.tissue.segment import SegmentOptions, segment_cohort


@dataclass(frozen=True)
class GridOptions:
    """Which tiles a grid has.

    Attributes:
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: µm per pixel of the tiles.
        overlap: pixels at ``mpp`` that neighbouring tiles share.
        min_tissue: share of a tile's area that must be tissue, 0 to 1.
    """

    tile_size: int = 256
    mpp: float = 0.5
    overlap: int = 0
    min_tissue: float = 0.4

    def __post_init__(self):
        if self.tile_size <= 0:
            raise ValueError(f"tile_size must be positive, not {self.tile_size}")
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ValueError(f"mpp is µm per pixel and must be positive, not {self.mpp}")
        if not 0 <= self.overlap < self.tile_size:
            raise ValueError(
                f"overlap must be at least 0 and less than tile_size ({self.tile_size}), not {self.overlap}"
            )
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must lie between 0 and 1, not {self.min_tissue}")


@final
@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one slide.

    Attributes:
        coords: int64 [N, 2], x and y of each tile's top-left corner in level-0 pixels, row by row.
        tissue_fraction: float32 [N], share of each tile that is tissue; NaN where a foreign file does not say.
        tile_size: side in pixels at ``mpp``.
        mpp: µm per pixel of the tiles.
        overlap: pixels at ``mpp`` that neighbours share.
        slide_mpp: µm per level-0 pixel.
        slide_width: level-0 pixels.
        slide_height: level-0 pixels.
        min_tissue: share of tissue that was asked for.
        tissue: digest of the outlines that were used.
    """

    coords: NDArray[np.int64]
    tissue_fraction: NDArray[np.float32]
    tile_size: int
    mpp: float
    overlap: int
    slide_mpp: float
    slide_width: int
    slide_height: int
    min_tissue: float = 0.0
    tissue: str = ""

    @property
    def side(self) -> float:
        """Side of a tile in level-0 pixels; not rounded."""
        return level0_length(self.tile_size, self.mpp, self.slide_mpp)

    def __len__(self) -> int:
        return len(self.coords)


def make_grid(slide: Slide, mask: TissueMask, options: GridOptions | None = None) -> TileGrid:
    """Lays tiles over the tissue of a slide.

    As in CLAM and TRIDENT, the last column and row may reach beyond the slide: what lies there is not tissue, and
    reads as white.

    Args:
        slide: an open slide, whose mpp is known.
        mask: its tissue.
        options: size, resolution and minimum of tissue.

    Returns:
        The tiles with at least ``options.min_tissue`` of tissue; there may be none.

    Raises:
        MissingMppError: the slide states no resolution.
    """
    return _lay(mask, slide.mpp, slide.width, slide.height, options or GridOptions())


def _lay(mask: TissueMask, slide_mpp: float, width: int, height: int, options: GridOptions) -> TileGrid:
    side = level0_length(options.tile_size, options.mpp, slide_mpp)
    step = level0_length(options.tile_size - options.overlap, options.mpp, slide_mpp)
    columns = np.rint(np.arange(math.ceil(width / step)) * step).astype(np.int64)
    coords, fractions = [], []
    for y in np.rint(np.arange(math.ceil(height / step)) * step).astype(np.int64):
        share = mask.overlap(columns, np.full_like(columns, y), side)
        kept = share >= options.min_tissue - OVERLAP_TOLERANCE
        coords.append(np.stack([columns[kept], np.full(kept.sum(), y)], axis=1))
        fractions.append(share[kept])
    return TileGrid(
        coords=np.concatenate(coords).astype(np.int64),
        tissue_fraction=np.concatenate(fractions).astype(np.float32),
        tile_size=options.tile_size,
        mpp=options.mpp,
        overlap=options.overlap,
        slide_mpp=slide_mpp,
        slide_width=width,
        slide_height=height,
        min_tissue=options.min_tissue,
        tissue=mask_digest(mask),
    )


def mask_digest(mask: TissueMask) -> str:
    """16 hexadecimal digits that change with the outlines."""
    digest = sha256()
    for polygon in mask.polygons:
        digest.update(polygon.wkb)
    return digest.hexdigest()[:16]


def write_grid(path: str | Path, grid: TileGrid, name: str) -> None:
    """Writes the coordinates as TRIDENT does, for its readers and CLAM's, GigaPath's and Patho-Bench's.

    ``coords`` int64 [N, 2] with TRIDENT's nine attributes and ours, ``tissue_fraction`` float32 [N]; nothing else at
    the root, because some loaders read every key as an array.

    Args:
        path: ``.h5`` file; written whole or not at all.
        grid: the tiles.
        name: of the slide.
    """
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=grid.coords)
        file.create_dataset("tissue_fraction", data=grid.tissue_fraction)
        coords.attrs.update(coords_attributes(grid, name, str(Path(path).parent)))


def coords_attributes(grid: TileGrid, name: str, folder: str) -> dict[str, Any]:
    """The attributes of a dataset ``coords``: the nine of TRIDENT, then ours, which hold the exact values.

    Args:
        grid: the tiles.
        name: of the slide.
        folder: where the file is.
    """
    return {
        "patch_size": grid.tile_size,
        "patch_size_level0": round(grid.side),
        "level0_magnification": _magnification(grid.slide_mpp),
        "target_magnification": _magnification(grid.mpp),
        "overlap": grid.overlap,
        "name": name,
        "savetodir": folder,
        "level0_width": grid.slide_width,
        "level0_height": grid.slide_height,
        "mpp_level0": grid.slide_mpp,
        "target_mpp": grid.mpp,
        "tissue_fraction_min": grid.min_tissue,
        "tissue_digest": grid.tissue,
        "gigatome_version": __version__,
    }


def read_grid(path: str | Path) -> TileGrid:
    """Reads coordinates written by :func:`write_grid`, or by TRIDENT, or the ``coords`` of a file of embeddings.

    Raises:
        StoreError: the file is missing or damaged, or its coordinates lack what TRIDENT states.
    """
    try:
        with h5py.File(path) as file:
            dataset = file["coords"]
            attributes = dict(dataset.attrs)  # type: ignore[union-attr]
            coords = np.asarray(dataset[:], np.int64)  # type: ignore[index]
            fraction = file["tissue_fraction"][:] if "tissue_fraction" in file else None  # type: ignore[index]
        return _grid_of(coords.reshape(-1, 2), fraction, attributes)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: there is no such file") from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise StoreError(
            f"{path}: is no file of tile coordinates ({error}); remove it to have it made again"
        ) from error


def _grid_of(coords: NDArray[np.int64], fraction: Any, attributes: Mapping[str, Any]) -> TileGrid:
    if fraction is None:
        fraction = np.full(len(coords), np.nan)
    slide_mpp = attributes.get("mpp_level0") or 10 / float(attributes["level0_magnification"])
    mpp = attributes.get("target_mpp") or 10 / float(attributes["target_magnification"])
    return TileGrid(
        coords=coords,
        tissue_fraction=np.asarray(fraction, np.float32),
        tile_size=int(attributes["patch_size"]),
        mpp=float(mpp),
        overlap=int(attributes["overlap"]),
        slide_mpp=float(slide_mpp),
        slide_width=int(attributes["level0_width"]),
        slide_height=int(attributes["level0_height"]),
        min_tissue=float(attributes.get("tissue_fraction_min", 0.0)),
        tissue=str(attributes.get("tissue_digest", "")),
    )


def tile_cohort(
    cohort: Cohort | str | Path,
    job: Job,
    *,
    options: GridOptions | None = None,
    segment_options: SegmentOptions | None = None,
    threads: int = 2,
    progress: Progress = silent,
) -> tuple[dict[str, TileGrid], list[Failure]]:
    """Finds the tissue of every slide and lays tiles over it; what was done before is read back.

    Writes ``<tiling>/patches/<slide>_patches.h5`` below the job directory, beside what
    :func:`~gigatome.tissue.segment.segment_cohort` writes. A file is made again if the outlines or the minimum of
    tissue have changed since.

    Args:
        cohort: the slides, or what :meth:`~gigatome.slides.cohort.Cohort.read` takes.
        job: the job directory.
        options: of the grid.
        segment_options: of the segmentation.
        threads: slides worked on at a time.
        progress: called after each slide, with stage ``"tissue"`` and then ``"tiles"``.

    Returns:
        The grids by slide name, in the order of the cohort, and the slides that failed, those without a tile included.

    Raises:
        CohortError: the cohort is empty.
    """
    cohort = Cohort.read(cohort)
    options = options or GridOptions()
    masks, failures = segment_cohort(cohort, job, options=segment_options, threads=threads, progress=progress)
    slides = [slide for slide in cohort if slide.name in masks]
    grids, unusable = each_slide(
        slides,
        lambda slide: _tile_one(slide, masks[slide.name], job, options),
        stage="tiles",
        threads=threads,
        progress=progress,
    )
    return grids, failures + unusable


def _tile_one(entry: CohortSlide, mask: TissueMask, job: Job, options: GridOptions) -> TileGrid:
    path = job.tiles(options.tile_size, options.mpp, options.overlap).coords(entry.name)
    grid = _known(path, mask, options, entry)
    if grid is None:
        mpp = entry.mpp or mask.mpp
        if mpp is None:
            with entry.open() as slide:
                mpp = slide.mpp
        grid = _lay(mask, mpp, mask.width, mask.height, options)
        write_grid(path, grid, entry.name)
    if not len(grid):
        what = f"no tile of {options.tile_size} px at {options.mpp:g} mpp holds {options.min_tissue:.0%} of tissue"
        raise NoTissueError(redact(entry.uri), f"{what}; lower min_tissue, or leave the slide out")
    return grid


def _known(path: Path, mask: TissueMask, options: GridOptions, entry: CohortSlide) -> TileGrid | None:
    """The grid that is there already, if it is the one that would be made."""
    if not path.is_file():
        return None
    try:
        grid = read_grid(path)
    except StoreError as error:
        log.warning("%s", error)
        return None
    if not grid.tissue:  # another tool's: taken as it is
        return grid
    mpp = entry.mpp or mask.mpp or grid.slide_mpp
    wanted = GridOptions(grid.tile_size, grid.mpp, grid.overlap, grid.min_tissue)
    return grid if wanted == options and grid.tissue == mask_digest(mask) and grid.slide_mpp == mpp else None


def _magnification(mpp: float) -> float | int:
    """Magnification for the attributes: 40, 20, 10 … where it is off by less than 1 %, and exact otherwise.

    Other tools compute with it, so an odd resolution is not rounded to a whole number.
    """
    exact = magnification(mpp)
    plain = 40.0 * 2.0 ** round(math.log2(exact / 40))
    value = plain if abs(plain - exact) < 0.01 * exact else exact
    return int(value) if value.is_integer() else value

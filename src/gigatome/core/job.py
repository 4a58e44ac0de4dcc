"""Where the files of a cohort lie: the job directory, laid out as TRIDENT lays out its own.

Both tools may work in one directory. Slides are told apart by their name without extension.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gigatome.core.geometry import nominal_magnification

_COMPOUND = (".ome.tif", ".ome.tiff", ".ome.zarr")


def slide_id(uri: str) -> str:
    """Name of a slide: the last part of its path or URI without extension; other dots are kept.

    ``s3://b/TCGA-3C-AALI-01Z.F6E9.svs`` gives ``TCGA-3C-AALI-01Z.F6E9``; ``a.ome.tif`` gives ``a``.
    """
    name = PurePosixPath(str(uri).replace("\\", "/").split("?", 1)[0]).name
    for suffix in _COMPOUND:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return PurePosixPath(name).stem


@dataclass(frozen=True)
class TilesDir:
    """The part of a job that belongs to one tiling, ``20x_256px_0px_overlap`` and the like."""

    path: Path

    def coords(self, slide: str) -> Path:
        """Tile coordinates of a slide, ``.h5``."""
        return self.path / "patches" / f"{slide}_patches.h5"

    def features(self, encoder: str) -> Path:
        """Folder of the tile embeddings of one encoder, one ``.h5`` a slide."""
        return self.path / f"features_{encoder}"

    def augmented(self, encoder: str) -> Path:
        """Folder of the embeddings of augmented tiles by one encoder, one ``.h5`` a slide."""
        return self.path / f"augmented_{encoder}"

    def slide_features(self, encoder: str) -> Path:
        """Folder of the slide embeddings of one encoder, one ``.h5`` a slide."""
        return self.path / f"slide_features_{encoder}"


@dataclass(frozen=True)
class Job:
    """A job directory."""

    path: Path

    def thumbnail(self, slide: str) -> Path:
        """Picture of the slide, ``.jpg``."""
        return self.path / "thumbnails" / f"{slide}.jpg"

    def contours(self, slide: str) -> Path:
        """Picture of the slide with its tissue outlined, ``.jpg``; TRIDENT takes its presence for "segmented"."""
        return self.path / "contours" / f"{slide}.jpg"

    def tissue(self, slide: str) -> Path:
        """Tissue polygons, ``.geojson``."""
        return self.path / "contours_geojson" / f"{slide}.geojson"

    @property
    def positions(self) -> Path:
        """Folder of the positions that tiles may be drawn from, one file a slide and kind of tile."""
        return self.path / "positions"

    @property
    def failures(self) -> Path:
        """Table of the slides that could not be processed."""
        return self.path / "failures.csv"

    def tiles(self, tile_size: int, mpp: float, overlap: int = 0) -> TilesDir:
        """Directory of one tiling; ``overlap`` in pixels at ``mpp``."""
        return TilesDir(self.path / f"{nominal_magnification(mpp):g}x_{tile_size}px_{overlap}px_overlap")

"""Finds the tissue of slides and keeps it in a job directory.

The picture of the whole slide is read once at a few µm per pixel; :mod:`gigatome.tissue.pixels` marks the tissue in it;
its outlines become polygons in level-0 pixels.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from gigatome import config
from gigatome.blob.store import redact, write_atomic
from gigatome.core.errors import NoTissueError, StoreError
from gigatome.core.geometry import Box
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.slides.batch import each_slide
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.pixels import SegmentOptions, tissue_pixels

__all__ = ["SegmentOptions", "outlines", "segment", "segment_cohort", "tissue_pixels"]

_BLOCK = 4096  # pixels of a level read at a time, so that a slide without a pyramid fits into memory


def segment(slide: Slide, options: SegmentOptions | None = None) -> TissueMask:
    """Finds the tissue of a slide.

    Args:
        slide: an open slide with a known mpp.
        options: resolution, thresholds and sizes.

    Returns:
        Polygons in level-0 pixels, true to about one pixel of ``options.mpp``.

    Raises:
        NoTissueError: nothing on the slide counts as tissue.
        MissingMppError: the slide states no resolution.
    """
    options = options or SegmentOptions()
    step = max(1.0, options.mpp / slide.mpp)
    mask = tissue_pixels(_picture(slide, step), step * slide.mpp, options)
    note = {"options": config.digest(options)}
    found = TissueMask.of(outlines(mask, step), slide.width, slide.height, mpp=slide.mpp, note=note)
    if not found.polygons:
        raise NoTissueError(redact(slide.uri), "no tissue found; outline it in QuPath and put the GeoJSON into the job "
                            "directory's contours_geojson/, or leave the slide out")  # fmt: skip
    return found


def outlines(mask: NDArray[np.bool_], scale: float) -> list[Polygon]:
    """Polygons with holes around the True pixels of a mask, along the edges of the pixels, then made smoother.

    Args:
        mask: bool [H, W].
        scale: level-0 pixels a pixel of the mask.

    Returns:
        Valid polygons, level-0 pixels at whole numbers, each within 0.75 mask pixels of the pixels' edges.
    """
    # Contours run through the middle of border pixels; in a doubled picture that is a quarter of a pixel inside.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = hierarchy[0, :, 3].tolist() if len(contours) else []
    rings = [(contour[:, 0].astype(np.float64) + 0.5) / 2 for contour in contours]
    polygons = []
    for index, ring in enumerate(rings):
        if parents[index] >= 0:
            continue
        holes = [hole for hole, parent in zip(rings, parents, strict=True) if parent == index]
        exact = Polygon(ring, holes).buffer(0.25, join_style="mitre")
        level0 = shapely.transform(shapely.simplify(exact, 0.75), lambda points: points * scale)
        polygons.append(shapely.set_precision(level0, 1.0))
    return [polygon for polygon in polygons if not polygon.is_empty]


def segment_cohort(
    cohort: Cohort | str | Path,
    job: Job | None,
    *,
    options: SegmentOptions | None = None,
    threads: int = 2,
    progress: Progress = silent,
) -> tuple[dict[str, TissueMask], list[Failure]]:
    """Finds the tissue of every slide; slides that were done before are read back.

    Writes ``thumbnails/``, ``contours_geojson/`` and ``contours/`` of the job directory, in TRIDENT's layout. Outlines
    already there are kept, whoever made them, unless options are given and they are gigatome's own by others.

    Args:
        cohort: the slides, or what :meth:`~gigatome.slides.cohort.Cohort.read` takes.
        job: where to keep the outlines; None to keep nothing.
        options: of the segmentation; None takes the outlines that are there, and the defaults where none are.
        threads: slides worked on at a time.
        progress: called after each slide with stage ``"tissue"``.

    Returns:
        The masks by slide name, in the order of the cohort, and the slides that failed, those without tissue included.

    Raises:
        CohortError: the cohort is empty.
    """
    cohort = Cohort.read(cohort)
    return each_slide(
        cohort.slides,
        lambda slide: _segment_one(slide, job, options),
        stage="tissue",
        threads=threads,
        progress=progress,
    )


def _segment_one(entry: CohortSlide, job: Job | None, options: SegmentOptions | None) -> TissueMask:
    known = _known(entry, job, options)
    if known is not None:
        return known
    with entry.open() as slide:
        mask = segment(slide, options)
        if job is not None:
            _keep(mask, slide, entry.name, job)
    return mask


def _known(entry: CohortSlide, job: Job | None, options: SegmentOptions | None) -> TissueMask | None:
    """Outlines that are in the job directory already; None if there are none or they were made otherwise."""
    if job is None or not job.tissue(entry.name).is_file():
        return None
    path = job.tissue(entry.name)
    try:
        mask = TissueMask.read(path)
    except StoreError:
        with entry.open() as slide:  # outlines of another tool do not state the slide's size
            mask = TissueMask.read(path, width=slide.width, height=slide.height)
    if options is not None and mask.note.get("options") not in (None, config.digest(options)):
        log.info("%s: tissue was found with other options; it is searched again", entry.name)
        return None
    if not mask.polygons:
        raise NoTissueError(redact(entry.uri), f"{path} holds no polygon; remove it to have the tissue searched again")
    return mask


def _keep(mask: TissueMask, slide: Slide, name: str, job: Job) -> None:
    thumbnail = slide.thumbnail(1024)
    write_atomic(job.thumbnail(name), _jpeg(thumbnail))
    mask.write(job.tissue(name))
    write_atomic(job.contours(name), _jpeg(draw(mask, thumbnail)))  # last: TRIDENT takes it for "done"


def draw(mask: TissueMask, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture of a whole slide with the outlines of its tissue, holes in another colour; uint8 [H, W, 3]."""
    canvas = np.ascontiguousarray(picture)
    canvas = canvas.copy() if canvas is picture else canvas
    scale = np.array([picture.shape[1] / mask.width, picture.shape[0] / mask.height])
    thickness = max(1, round(max(picture.shape) / 500))
    for polygon in mask.polygons:
        for ring, colour in [(polygon.exterior, (0, 170, 80)), *((hole, (230, 120, 0)) for hole in polygon.interiors)]:
            points = np.rint(shapely.get_coordinates(ring) * scale).astype(np.int32)
            cv2.polylines(canvas, [points], isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA)
    return canvas


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not encoded:
        raise StoreError("a picture could not be written as JPEG")
    return data.tobytes()


def _picture(slide: Slide, step: float) -> NDArray[np.uint8]:
    """The whole slide, one pixel for ``step`` level-0 pixels, read block by block."""
    width, height = math.ceil(slide.width / step), math.ceil(slide.height / step)
    level = max((item.downsample for item in slide.levels if item.downsample <= step * 1.01), default=1.0)
    side = max(1, int(_BLOCK * level / step))
    picture = np.empty((height, width, 3), np.uint8)
    for top, rows in _blocks(height, side):
        for left, columns in _blocks(width, side):
            box = Box(round(left * step), round(top * step), max(1, round(columns * step)), max(1, round(rows * step)))
            block = slide.read(box, mpp=step * slide.mpp, exact=False)
            if block.shape[:2] != (rows, columns):
                block = cv2.resize(block, (columns, rows), interpolation=cv2.INTER_AREA)
            picture[top : top + rows, left : left + columns] = block
    return picture


def _blocks(length: int, side: int) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces that ``length`` is cut into."""
    return ((start, min(side, length - start)) for start in range(0, length, side))

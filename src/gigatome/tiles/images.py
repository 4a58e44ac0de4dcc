"""Tiles as picture files, for tools that can read nothing else. Training and embedding need none."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2

from gigatome.blob.store import write_atomic
from gigatome.core.job import TilesDir
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.slides.cohort import Cohort
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import TileGrid


def save_images(
    cohort: Cohort,
    grids: Mapping[str, TileGrid],
    tiles: TilesDir,
    *,
    threads: int = 2,
    progress: Progress = silent,
) -> list[Failure]:
    """Writes each tile as ``images/<slide>/<x>_<y>.png``, without loss; files already there are kept.

    Args:
        cohort: the slides.
        grids: tiles by slide name.
        tiles: directory of the tiling.
        threads: that read and write.
        progress: called after each slide with stage ``"images"``.

    Returns:
        The slides of which not all tiles could be written.
    """
    failures: list[Failure] = []
    slides = [slide for slide in cohort if slide.name in grids]
    progress("images", 0, len(slides))
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="images") as pool:
        for done, entry in enumerate(slides, start=1):
            grid = grids[entry.name]
            paths = [tiles.path / "images" / entry.name / f"{x}_{y}.png" for x, y in grid.coords.tolist()]
            missing = [index for index, path in enumerate(paths) if not path.is_file()]
            try:
                if missing:
                    with entry.open() as slide:
                        tasks = [pool.submit(_save, slide, grid, index, paths[index]) for index in missing]
                        _finish(tasks)
            except Exception as error:  # one bad slide must not end a night's work
                log.warning("%s: %s", entry.name, error)
                failures.append(Failure.of(entry.name, "images", error))
            progress("images", done, len(slides))
    return failures


def _finish(tasks: list) -> None:
    """Waits for all tasks, so that the slide is not closed under them; then raises what one of them raised."""
    errors = [error for task in tasks if (error := task.exception()) is not None]
    if errors:
        raise errors[0]


def _save(slide: Slide, grid: TileGrid, index: int, path: Path) -> None:
    x, y = grid.coords[index].tolist()
    image = slide.read_tile(x, y, grid.tile_size, grid.mpp, exact=False)
    encoded, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise OSError(f"{path}: the tile could not be encoded")
    write_atomic(path, data.tobytes())

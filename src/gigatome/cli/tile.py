"""``gigatome tile``: lays a grid of tiles over the tissue of every slide."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gigatome import config
from gigatome.cli.options import SegmentSet, SlideMpp, SlideThreads, cohort_of
from gigatome.cli.progress import progress_bar
from gigatome.cli.tissue import finish, segment_options
from gigatome.core.job import Job
from gigatome.tiles.grid import GridOptions, tile_cohort
from gigatome.tiles.images import save_images


def tile(
    slides: Annotated[str, typer.Argument(help="A slide, a folder, a glob, a bucket prefix or a CSV.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Job directory; the same one goes on where it stopped.")],
    tile_size: Annotated[int, typer.Option(min=1, help="Side of a tile in pixels.")] = 256,
    mpp: Annotated[float, typer.Option(help="Resolution of the tiles in µm per pixel; 0.5 is 20×.")] = 0.5,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Least share of a tile that is tissue.")] = 0.4,
    overlap: Annotated[int, typer.Option(min=0, help="Overlap of neighbouring tiles in pixels.")] = 0,
    images: Annotated[
        bool, typer.Option("--save-images", help="Also write each tile as PNG; gigatome itself needs none.")
    ] = False,
    slide_mpp: SlideMpp = None,
    assignments: SegmentSet = None,
    threads: SlideThreads = 2,
) -> None:
    """Lay a grid of tiles over the tissue of every slide; one .h5 a slide, as CLAM's and TRIDENT's users know it.

    Exit code: 0 all is well, 1 no slide could be used, 3 some were skipped (see failures.csv).
    """
    values = {"tile_size": tile_size, "mpp": mpp, "overlap": overlap, "min_tissue": min_tissue}
    options = config.parse(GridOptions, values, source="gigatome tile")
    cohort, job = cohort_of(slides, slide_mpp), Job(out)
    tiles = job.tiles(tile_size, mpp, overlap)
    with progress_bar() as progress:
        grids, failures = tile_cohort(
            cohort,
            job,
            options=options,
            segment_options=segment_options(assignments),
            threads=threads,
            progress=progress,
        )
        if images:
            failures += save_images(cohort, grids, tiles, threads=threads, progress=progress)
    count = sum(len(grid) for grid in grids.values())
    console = Console(highlight=False, markup=False)
    if grids:
        console.print(f"{tiles.path}: {count:,} tiles of {len(grids)} slides", soft_wrap=True)
    finish(job, failures, usable=len(grids))

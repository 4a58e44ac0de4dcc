"""``gigatome tissue``: outlines the tissue of every slide."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gigatome import config
from gigatome.cli.options import SegmentSet, SlideMpp, SlideThreads, cohort_of
from gigatome.cli.progress import progress_bar
from gigatome.core.job import Job
from gigatome.core.logs import Failure, write_failures
from gigatome.tissue.segment import SegmentOptions, segment_cohort


def tissue(
    slides: Annotated[str, typer.Argument(help="A slide, a folder, a glob, a bucket prefix or a CSV.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Job directory; the same one goes on where it stopped.")],
    slide_mpp: SlideMpp = None,
    assignments: SegmentSet = None,
    threads: SlideThreads = 2,
) -> None:
    """Outline the tissue of every slide, as GeoJSON for QuPath and TRIDENT and as a picture.

    Exit code: 0 all is well, 1 no slide could be used, 3 some were skipped (see failures.csv).
    """
    job = Job(out)
    with progress_bar() as progress:
        masks, failures = segment_cohort(
            cohort_of(slides, slide_mpp),
            job,
            options=segment_options(assignments),
            threads=threads,
            progress=progress,
        )
    console = Console(highlight=False, markup=False)
    pixels = sum(mask.width * mask.height for mask in masks.values())
    if pixels:
        share = sum(mask.area for mask in masks.values()) / pixels
        console.print(f"{out}: tissue of {len(masks)} slides, {share:.1%} of their area", soft_wrap=True)
    finish(job, failures, usable=len(masks))


def segment_options(assignments: list[str] | None) -> SegmentOptions | None:
    """Options of the segmentation with ``--set`` applied; None, which takes what is there, without any."""
    if not assignments:
        return None
    values: dict[str, Any] = {}
    for assignment in assignments:
        config.assign(values, assignment)
    return config.parse(SegmentOptions, values, source="--set")


def finish(job: Job, failures: list[Failure], *, usable: int) -> None:
    """Lists the slides that failed and ends with the right exit code."""
    write_failures(job.failures, failures)
    console = Console(highlight=False, markup=False)
    for failure in failures:
        console.print(f"{failure.slide}: {failure.stage}: {failure.message}", soft_wrap=True)
    if failures:
        console.print(f"skipped: {len(failures)} slides, listed in {job.failures}", soft_wrap=True)
        raise typer.Exit(3 if usable else 1)

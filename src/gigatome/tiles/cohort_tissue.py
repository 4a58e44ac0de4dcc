"""The tissue of a cohort's slides, as the sampler needs it: in memory, or in a job directory and read on demand."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from gigatome.core.errors import GigatomeError, MissingMppError, StoreError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.position_store import SlideTissue
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.segment import segment_cohort


def cohort_tissue(
    cohort: Cohort,
    masks: Mapping[str, TissueMask] | None = None,
    job: Job | None = None,
    *,
    threads: int = 2,
    progress: Progress = silent,
) -> tuple[dict[int, SlideTissue], list[Failure]]:
    """Finds what of the tissue is not known yet, and leaves it on the disk where there is a job directory.

    Args:
        cohort: the slides.
        masks: tissue by slide name; slides that it lacks are left out. None to take or make it as ``job`` says.
        job: job directory with outlines; slides that it lacks are segmented. None to segment all and keep nothing.
        threads: slides worked on at a time.
        progress: called while tissue is searched for.

    Returns:
        Tissue by index into the cohort, and the slides that cannot be used.
    """
    failures: list[Failure] = []
    if masks is None:
        unknown = tuple(slide for slide in cohort if job is None or not job.tissue(slide.name).is_file())
        found: dict[str, TissueMask] = {}
        if unknown:
            found, failures = segment_cohort(replace(cohort, slides=unknown), job, threads=threads, progress=progress)
        if job is None:
            masks = found
    if masks is None and job is not None:
        lost = {failure.slide for failure in failures}
        entries = [(index, slide) for index, slide in enumerate(cohort) if slide.name not in lost]
        tissue_of = partial(_stored, job)
    else:
        masks = masks or {}
        entries = [(index, slide) for index, slide in enumerate(cohort) if slide.name in masks]
        tissue_of = partial(_held, masks)
    tissue: dict[int, SlideTissue] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="tissue") as pool:
        tasks = [pool.submit(tissue_of, slide) for _, slide in entries]
        for (index, slide), task in zip(entries, tasks, strict=True):
            try:
                tissue[index] = task.result()
            except (GigatomeError, OSError) as error:
                log.warning("%s: %s", slide.name, error)
                failures.append(Failure.of(slide.name, "tiles", error))
    return tissue, failures


def _held(masks: Mapping[str, TissueMask], entry: CohortSlide) -> SlideTissue:
    """Tissue in memory; the slide is opened only if nobody has said its resolution."""
    mask = masks[entry.name]
    mpp = entry.mpp or mask.mpp
    if mpp is None:
        with entry.open() as slide:
            mpp = slide.mpp
    return SlideTissue.of(entry.name, mpp, mask)


def _stored(job: Job, entry: CohortSlide) -> SlideTissue:
    """Tissue in a file; the slide is opened only if the file of another tool does not state size and resolution."""
    path = job.tissue(entry.name)
    try:
        return SlideTissue.stored(entry.name, path, mpp=entry.mpp)
    except (StoreError, MissingMppError):
        with entry.open() as slide:
            return SlideTissue.stored(entry.name, path, mpp=slide.mpp, width=slide.width, height=slide.height)

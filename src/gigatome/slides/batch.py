"""The same work for every slide of a cohort, where one bad slide does not stop the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gigatome.core.logs import Failure, Progress, log
from gigatome.slides.cohort import CohortSlide

T = TypeVar("T")


def each_slide(
    slides: Sequence[CohortSlide], work: Callable[[CohortSlide], T], *, stage: str, threads: int, progress: Progress
) -> tuple[dict[str, T], list[Failure]]:
    """Does ``work`` for every slide, in threads.

    Args:
        slides: the slides.
        work: called with one slide, from several threads at a time.
        stage: name of the work, for progress, failures and the log.
        threads: slides worked on at a time, at least 1.
        progress: called before the first slide and after each.

    Returns:
        What ``work`` returned, by slide name in the order of the slides, and the slides on which it raised.
    """
    results: dict[str, T] = {}
    failures: list[Failure] = []
    progress(stage, 0, len(slides))
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix=stage) as pool:
        try:
            tasks = [(slide, pool.submit(work, slide)) for slide in slides]
            for done, (slide, task) in enumerate(tasks, start=1):
                try:
                    results[slide.name] = task.result()
                except Exception as error:  # one bad slide must not end a night's work
                    log.warning("%s: %s", slide.name, error)
                    failures.append(Failure.of(slide.name, stage, error))
                progress(stage, done, len(slides))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results, failures

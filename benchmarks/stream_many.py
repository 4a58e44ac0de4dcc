"""A cohort of very many slides: ``python -m benchmarks.stream_many [--many 30000]``; prints JSON.

A few small pyramids are made on the spot, with the outlines of their tissue; each slide of the cohort is one more name
(a hard link) of one of them, and so are its outlines in the job directory. Nearly every tile then comes from a slide
that is not open, as in a real cohort of that size, but all bytes are in the system's memory.

Measured, each time in a new process: how long it takes until there is a stream and a first batch; and over some time
the rate, the memory of the process and its open files. At first nothing is kept but the outlines, then the positions of
all slides are in the job directory, then their indexes are kept too.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_stream import BATCH
from gigatome.core.job import Job
from gigatome.slides.cohort import Cohort
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from gigatome.tiles.bench_result import machine
from gigatome.tiles.stream import StreamOptions, TileStream
from gigatome.tissue.segment import segment_cohort

FILES, SIDE = 6, 4096
_MOMENTS = 12  # at which figures are taken


@dataclass(frozen=True)
class Course:
    """One stream over time.

    Attributes:
        slides: of the cohort.
        kept: of all slides before, beside their outlines.
        cohort_seconds: to read the table of slides.
        stream_seconds: then to make the stream.
        first_batch_seconds: then to have a batch.
        tiles_per_second: from then on.
        seconds, rates, megabytes, files: at some moments, the tiles a second since the one before, the memory of the
            process, and its open files.
        limit: what the stream's report says.
        report: its figures.
    """

    slides: int
    kept: str
    cohort_seconds: float
    stream_seconds: float
    first_batch_seconds: float
    tiles_per_second: float
    seconds: list[float]
    rates: list[float]
    megabytes: list[float]
    files: list[int]
    limit: str
    report: dict[str, Any]


def measure_many(
    count: int,
    folder: Path,
    *,
    seconds: float,
    threads: int,
    side: int = SIDE,
    open_slides: int = StreamOptions.open_slides,
) -> list[Course]:
    """All courses, of a cohort of ``count`` slides made in ``folder``."""
    os.environ["GIGATOME_INDEX_CACHE"] = str(folder / "indexes")
    table, job, kinds = make(count, folder, side)
    courses = []
    for kept, keep in (
        ("nothing", lambda: None),
        ("positions", partial(_keep_positions, job, kinds, count)),
        ("positions and indexes", partial(_keep_indexes, table)),
    ):
        keep()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # whose memory is measured
            task = process.submit(_course, kept, table, job, seconds, threads=threads, open_slides=open_slides)
            courses.append(task.result())
    return courses


def make(count: int, folder: Path, side: int) -> tuple[Path, Job, Sequence[str]]:
    """The table of slides, the job directory, and the names of the slides that the others are copies of."""
    originals = folder / "originals"
    with ThreadPoolExecutor(2) as pool:
        options = SyntheticOptions(side, side, mpp=0.25)
        kinds = ("glandular", "solid")
        tasks = [
            pool.submit(make_slide, originals / f"o{k}.svs", kinds[k % 2], k, options) for k in range(min(FILES, count))
        ]
        paths = [task.result() for task in tasks]
    job = Job(folder / "job")
    _, failures = segment_cohort(Cohort.read(originals), job)
    if failures:
        raise SystemExit(failures[0].message)
    slides = folder / "slides"
    slides.mkdir(parents=True)
    names = [f"s{k:06d}" for k in range(count)]
    for k, name in enumerate(names):
        os.link(paths[k % len(paths)], slides / f"{name}.svs")
        os.link(job.tissue(f"o{k % len(paths)}"), job.tissue(name))
    table = folder / "slides.csv"
    table.write_text("\n".join(["slide", *(f"slides/{name}.svs" for name in names)]) + "\n", encoding="utf-8")
    return table, job, names[: len(paths)]


def _keep_positions(job: Job, kinds: Sequence[str], count: int) -> None:
    """Gives all slides positions: those that the first ones, of the same files, were found to have."""
    (folder,) = job.positions.iterdir()
    slides = [job.path.parent / "slides" / f"{name}.svs" for name in kinds]
    shutil.rmtree(folder)
    for slide in slides:
        with TileStream(Cohort.read(slide), job=job, batch_size=1) as stream:
            next(stream.batches())
    for k in range(len(kinds), count):
        os.link(folder / f"{kinds[k % len(kinds)]}.bin", folder / f"s{k:06d}.bin")


def _keep_indexes(table: Path) -> None:
    """Opens all slides once."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda slide: slide.open().close(), Cohort.read(table)))


def _course(kept: str, table: Path, job: Job, seconds: float, *, threads: int, open_slides: int) -> Course:
    times = [time.perf_counter()]
    cohort = Cohort.read(table)
    times.append(time.perf_counter())
    stream = TileStream(cohort, job=job, batch_size=BATCH, threads=threads, open_slides=open_slides)
    times.append(time.perf_counter())
    with stream:
        batches = stream.batches()
        next(batches)
        times.append(time.perf_counter())
        before, moments = stream.report(), [(0.0, 0, _megabytes(), _files())]
        while moments[-1][0] < seconds:
            due = moments[-1][0] + seconds / _MOMENTS
            taken = moments[-1][1]
            while (spent := time.perf_counter() - times[3]) < due:
                taken += len(next(batches).slides)
            moments.append((spent, taken, _megabytes(), _files()))
        report = stream.report().since(before)
    at, taken, megabytes, files = (np.array(column) for column in zip(*moments, strict=True))
    return Course(
        len(cohort),
        kept,
        *(round(float(part), 3) for part in np.diff(times)),
        round(taken[-1] / at[-1], 1),
        np.round(at, 2).tolist(),
        np.round(np.diff(taken) / np.diff(at), 1).tolist(),
        np.round(megabytes, 1).tolist(),
        files.tolist(),
        report.sentence(),
        asdict(report),
    )


def _megabytes() -> float:
    """Memory of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def many_markdown(courses: Sequence[Course]) -> list[str]:
    """A table of courses."""
    lines = [
        f"## {courses[0].slides:,} slides",
        "",
        f"Names of {FILES} small pyramids; hardly any tile comes from a slide that is open. *memory* and",
        "*files*: of the process, after the first batch, half way and at the end.",
        "",
        "| kept | to read the table | to make the stream | first batch | tiles/s | memory | files |",
        f"|{'---|' * 7}",
    ]
    for course in courses:
        places = (0, len(course.seconds) // 2, -1)
        lines.append(
            f"| {course.kept} | {course.cohort_seconds:.2f} s | {course.stream_seconds:.2f} s "
            f"| {course.first_batch_seconds:.2f} s | {course.tiles_per_second:.0f} "
            f"| {', '.join(f'{course.megabytes[k]:.0f}' for k in places)} MB "
            f"| {', '.join(str(course.files[k]) for k in places)} |"
        )
    return [*lines, "", *(f"- {course.limit}" for course in courses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", type=int, default=30_000, help="slides (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of each course (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="that decode (default: %(default)s)")
    default = StreamOptions.open_slides
    parser.add_argument("--open-slides", type=int, default=default, help="at a time (default: %(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, help="level-0 pixels along each side of a slide")
    parser.add_argument("--folder", type=Path, help="where the cohort is made; removed after")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        courses = measure_many(
            options.many, Path(folder), seconds=options.seconds, threads=options.threads, side=options.side,
            open_slides=options.open_slides,
        )  # fmt: skip
    print(json.dumps({"machine": machine(), "courses": [asdict(course) for course in courses]}, indent=2))


if __name__ == "__main__":
    main()

"""Streaming random tiles, gigatome and its peers: ``python -m benchmarks.bench_stream [--write]``; prints JSON.

:mod:`benchmarks.peers_stream` says what each reads. In each round every stream is begun anew, warmed up and then taken
from for some seconds, in turn; figures are medians over the rounds, ratios medians of the rounds' ratios. Rates are
given by the clock, and by processor time (of all processes), which others on the machine do not touch.

Then: what drawing, planning and reading a tile cost; how much faster two threads on two cores are than one on one,
beside hashing, which shows what the machine has to give; and, with ``--many``, :mod:`benchmarks.stream_many`.

Peers: ``pip install openslide-python openslide-bin wsistream``.
"""

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.output import add_slides, add_write, listed, write_result
from benchmarks.peers_stream import AHEAD, BATCH, GIGATOME, TILE, Contender, contenders, difference, on_level
from benchmarks.servers import _cpu_seconds
from benchmarks.slides import ensure_slides
from benchmarks.stream_many import many_markdown, measure_many
from gigatome.core.job import Job
from gigatome.core.native import NATIVE
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.bench_result import machine
from gigatome.tiles.bench_stream import bench_stream
from gigatome.tiles.cohort_tissue import cohort_tissue
from gigatome.tiles.sampler import TileSampler
from gigatome.tiles.stream import TileStream

MIXES = ((0.25, 0.5, 1.0, 2.0), (0.5,))
_WRONG = 8.0  # grey levels, mean absolute: what differs by more is another picture
_ROUND = 10_000  # batches from the first of one round to the first of the next
_LISTED = 64  # batches of a round that peers read, again and again if that is too few
_HASHED = bytes(1 << 20)


@dataclass(frozen=True)
class Rate:
    """What one stream does.

    Attributes:
        stream: its name.
        tiles_per_second: by the clock; median.
        tiles_per_cpu_second: of processor time, all processes together; median.
        gigatome_times, gigatome_times_cpu: how many times its rate gigatome's is, by either; median of the rounds.
        difference: mean absolute difference of its first tile from gigatome's pixels, grey levels; greatest of the
            rounds.
    """

    stream: str
    tiles_per_second: float
    tiles_per_cpu_second: float
    gigatome_times: float
    gigatome_times_cpu: float
    difference: float


def compare(cohort: Cohort, job: Job, mpps: Sequence[float], options: argparse.Namespace) -> tuple[list[Rate], dict]:
    """All streams at a mixture of resolutions, and which are left out."""
    ahead = AHEAD * options.threads
    stream = TileStream(cohort, batch_size=BATCH, job=job, mpp=mpps, threads=options.threads, prefetch=ahead)
    sampler, uris = make_sampler(cohort, job, mpps)
    with ExitStack() as stack:
        slides = {slide.uri: stack.enter_context(slide.open()) for slide in cohort}

        @cache
        def tiles(number: int) -> list:
            steps = range(number * _ROUND, number * _ROUND + _LISTED)
            drawn = [request for step in steps for request in sampler.requests(step, BATCH)]
            return [on_level(slides[uris[request.slide]], request, uris[request.slide]) for request in drawn]

        order, left_out = contenders(stream, lambda number: number * _ROUND, tiles, mpps)
        found: dict[str, list[tuple[float, float, float]]] = {contender.name: [] for contender in order}
        for number in range(options.rounds):
            first = number % len(order)
            for contender in order[first:] + order[:first]:
                found[contender.name].append(_timed(contender, number, 2 * ahead, options.seconds, slides))
            print(f"{mpps}: round {number + 1} of {options.rounds}", file=sys.stderr)
    return [_rate(name, rounds, found[GIGATOME]) for name, rounds in found.items()], left_out


def _timed(
    contender: Contender, number: int, warm_up: int, seconds: float, slides: Mapping[str, Any]
) -> tuple[float, float, float]:
    """Tiles a second, tiles a second of processor time, and the difference of the first tile."""
    with contender.start(number) as batches:
        wrong = difference(next(batches), slides)
        if wrong > _WRONG:
            raise SystemExit(f"{contender.name}: its pixels differ by {wrong:.1f} grey levels on average")
        for _ in range(warm_up - 1):
            next(batches)
        began, used = time.perf_counter(), _cpu()
        count, spent = 0, 0.0
        while spent < seconds:
            count += len(next(batches).images)
            spent = time.perf_counter() - began
        return count / spent, count / (_cpu() - used), wrong


def _rate(name: str, rounds: Sequence[tuple[float, ...]], ours: Sequence[tuple[float, ...]]) -> Rate:
    rates, per_cpu, differences = zip(*rounds, strict=True)
    times = [median(mine[k] / its[k] for mine, its in zip(ours, rounds, strict=True)) for k in (0, 1)]
    return Rate(name, median(rates), median(per_cpu), *times, max(differences))


def _cpu() -> float:
    """Processor time of this process and those that it has running."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    workers = [child.pid for child in multiprocessing.active_children() if child.pid]
    return used.ru_utime + used.ru_stime + sum(map(_cpu_seconds, workers))


def two_threads(cohort: Cohort, job: Job, options: argparse.Namespace) -> dict[str, float]:
    """How many times the rate of one thread on one core two reach on two, gigatome's stream and hashing.

    The fastest round of each counts, which whatever else the machine does disturbs least.
    """
    rates: dict[tuple[str, int], list[float]] = {}
    cores = sorted(os.sched_getaffinity(0))
    for number in range(options.rounds):
        for count in (1, 2):
            os.sched_setaffinity(0, cores[:count])  # for the threads that are begun from now on
            try:
                stream = TileStream(cohort, batch_size=BATCH, seed=number, job=job, threads=count)
                rate = bench_stream(stream, seconds=options.seconds).tiles_per_second
                rates.setdefault((GIGATOME, count), []).append(rate)
                rates.setdefault(("hashing", count), []).append(_hashes(count, options.seconds / 4))
            finally:
                os.sched_setaffinity(0, cores)
    return {name: max(rates[name, 2]) / max(rates[name, 1]) for name in (GIGATOME, "hashing")}


def _hashes(count: int, seconds: float) -> float:
    """Hashes a second of some threads; hashing needs no lock of Python's."""
    end = time.perf_counter() + seconds

    def hash_on() -> int:
        done = 0
        while time.perf_counter() < end:
            hashlib.sha256(_HASHED)
            done += 1
        return done

    with ThreadPoolExecutor(count) as pool:
        return sum(task.result() for task in [pool.submit(hash_on) for _ in range(count)]) / seconds


def costs(cohort: Cohort, job: Job, mpps: Sequence[float], batches: int = 40) -> dict[str, float]:
    """Processor time, µs a tile, of drawing, planning and reading tiles one after another; medians."""
    sampler, uris = make_sampler(cohort, job, mpps)
    spent: dict[str, list[float]] = {"drawing": [], "planning": [], "reading": []}
    with ExitStack() as stack:
        slides = {slide.uri: stack.enter_context(slide.open()) for slide in cohort}
        for step in range(batches):
            times = [time.thread_time()]
            drawn = sampler.requests(step, BATCH)
            times.append(time.thread_time())
            plans = [slides[uris[r.slide]].plan_tile(r.x, r.y, TILE, r.mpp, exact=False) for r in drawn]
            times.append(time.thread_time())
            for plan in plans:
                plan.read()
            times.append(time.thread_time())
            for name, begin, end in zip(spent, times, times[1:], strict=False):
                spent[name].append(1e6 * (end - begin) / BATCH)
    return {name: round(median(values), 1) for name, values in spent.items()}


def make_sampler(cohort: Cohort, job: Job, mpps: Sequence[float]) -> tuple[TileSampler, list[str]]:
    """The sampler that a stream has, with all positions found, and where its slides are."""
    tissue, _ = cohort_tissue(cohort, None, job)
    sampler = TileSampler(list(tissue.values()), TILE, mpps, folder=job.positions)
    sampler.find_all()
    return sampler, [cohort.slides[index].uri for index in tissue]


def markdown(result: Mapping[str, Any], command: str) -> str:
    """The tables."""
    lines = [
        "# Streaming random tiles",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(result['conditions'])}.",
        "",
        f"Batches of {BATCH} tiles of {TILE}² pixels at random on the tissue of the three benchmark slides, the page",
        "cache warm; every stream in turn in each round, medians. *gigatome ×*: how many times this stream's rate",
        "gigatome's is, by the clock and by processor time. *difference*: greatest mean absolute one of a tile from",
        "gigatome's pixels, grey levels. `benchmarks/peers_stream.py` says what each reads, and how.",
    ]
    for mix in result["mixes"]:
        cost = mix["cpu_us"]
        lines += [
            "",
            f"## {', '.join(f'{mpp:g}' for mpp in mix['mpp'])} mpp",
            "",
            "| stream | tiles/s | tiles/s of CPU | gigatome × | gigatome × (CPU) | difference |",
            f"|{'---|' * 6}",
            *(
                f"| {rate.stream} | {rate.tiles_per_second:.0f} | {rate.tiles_per_cpu_second:.0f} "
                f"| {rate.gigatome_times:.2f} | {rate.gigatome_times_cpu:.2f} | {rate.difference:.2f} |"
                for rate in mix["streams"]
            ),
            "",
            f"Processor time a tile: drawing {cost['drawing']:.0f} µs, planning {cost['planning']:.0f} µs, reading "
            f"{cost['reading']:.0f} µs; drawing is {cost['drawing'] / cost['reading']:.1%} of reading.",
        ]
    gain = result["two_threads"]
    lines += [
        "",
        f"Two threads on two cores against one on one: {gain[GIGATOME]:.2f} times, hashing {gain['hashing']:.2f}.",
    ]
    if result["many"]:
        lines += ["", *many_markdown(result["many"])]
    lines += ["", *(f"- {name} is left out: {why}." for name, why in result["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_slides(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5, help="of each stream in a round")
    parser.add_argument("--threads", type=int, default=2, help="of gigatome, and workers of its peers")
    parser.add_argument("--many", type=int, default=0, help="also a cohort of so many slides, for a minute, twice")
    parser.add_argument("--many-seconds", type=float, default=60)
    add_write(parser)
    options = parser.parse_args()
    paths = ensure_slides(options.slides, options.side)
    cohort = Cohort(tuple(CohortSlide(str(path), name, name) for name, path in paths.items()), "the benchmark slides")
    conditions = machine() | {"gigatome's extension": NATIVE is not None, "threads and workers": options.threads}
    result: dict[str, Any] = {"conditions": conditions, "mixes": [], "many": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GIGATOME_INDEX_CACHE"] = f"{folder}/indexes"
        job = Job(Path(folder) / "job")
        for mpps in MIXES:
            rates, result["left_out"] = compare(cohort, job, mpps, options)
            result["mixes"].append({"mpp": mpps, "streams": rates, "cpu_us": costs(cohort, job, mpps)})
        result["two_threads"] = two_threads(cohort, job, options)
        if options.many:
            result["many"] = measure_many(
                options.many, Path(folder) / "many", seconds=options.many_seconds, threads=options.threads
            )
    print(json.dumps(result, default=asdict, indent=2, ensure_ascii=False))
    if options.write:
        command = f"python -m benchmarks.bench_stream --rounds {options.rounds} --seconds {options.seconds:g}"
        command += f" --many {options.many}" if options.many else ""
        write_result(options.write, "stream", markdown(result, command), conditions)


if __name__ == "__main__":
    main()

"""How fast a local slide is read, tile by tile, beside the other readers that are installed.

Tiles of 256² pixels lie at random on tissue, at whole pixels of their own resolution and unaligned to chunks: between
the pixels of a level OpenSlide interpolates, which is slower, and gigatome moves to a whole one. In each round every
reader reads the same new tiles, in turn, from a file that the system has in memory, on one core. What counts is the
processor time that the process uses, threads of the readers included; figures are medians over the rounds, and ratios
medians of the rounds' ratios, which drift of the machine does not touch.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import cv2
import numpy as np

from gigatome.blob.store import is_remote, local_path, redact
from gigatome.core.errors import NoTissueError, SlideError
from gigatome.core.logs import Progress, silent
from gigatome.core.native import NATIVE
from gigatome.core.seeding import generator
from gigatome.slides.slide import Slide, open_slide
from gigatome.tiles.bench_readers import (
    GIGATOME,
    LIMIT,
    OPENSLIDE,
    OURS,
    TILE,
    Case,
    Reader,
    box_filter,
    open_openslide,
    open_readers,
)
from gigatome.tiles.bench_result import CaseResult, Rate, Reading, machine
from gigatome.tissue.segment import segment

_COARSEST = 2.2  # mpp; coarser tiles are seldom trained on
_MIN_SIDE = 4  # tiles that a level must hold along each side
_MIN_TISSUE = 0.4
_DRAWS = 100  # times as many positions as are wanted, before a slide is said to hold too little tissue
_WRONG = 6.0  # grey levels, mean absolute: what differs by more is another picture
_COMPARED = 8  # tiles that a reader must read right before it is timed
_OPENINGS = 50
_BLOCK = 1 << 24  # bytes

_HASHED = bytes(1 << 20)

Position = tuple[int, int]
_GROUP = 16  # tiles that a thread of the stream takes at a time
_Draw = Callable[[Case, int | str, int], list[Position]]  # of a key, so many; in pixels of the case's level


def bench_read(
    slide: str | os.PathLike[str],
    *,
    mpp: float | None = None,
    rounds: int = 9,
    tiles: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> Reading:
    """Measures gigatome and the readers beside it on one slide.

    Levels of up to 2.2 mpp are read as they are, and shrunk to half where the next level is coarser than that.

    Args:
        slide: local path.
        mpp: µm per level-0 pixel; wins over what the file states.
        rounds: more of them make the medians surer.
        tiles: read by each reader in each round.
        seed: of the positions, ≥ 0.
        progress: called after each case with stage ``"reading"``.

    Raises:
        SlideError: the slide is remote, too small, or cannot be read.
        MissingMppError: it states no resolution and none is given.
        NoTissueError: it holds too little tissue.
    """
    uri = os.fspath(slide)
    if is_remote(uri):
        raise SlideError(redact(uri), "is remote, and peers read local files only; copy it first")
    path, cores = local_path(uri), _cores()
    with ExitStack() as stack:
        own = stack.enter_context(open_slide(path, mpp=mpp))
        cases, draw = _cases(own), _drawer(own, seed)
        _warm(path)
        with _on(cores[:1]):
            readers, left_out = open_readers(path, mpp)
            for reader in readers:
                stack.callback(reader.close)
            results = []
            for number, case in enumerate(cases, start=1):
                right = _reading_right(own, readers, case, draw(case, "check", _COMPARED), left_out)
                results.append(_measure(right, case, [draw(case, turn, tiles) for turn in range(rounds)]))
                progress("reading", number, len(cases))
            opening = _opening(path)
        sharing = [*(r for r in readers if r.name in (*OURS, OPENSLIDE) and r.name not in left_out), _CONTROL]
        return Reading(
            slide=own.name,
            levels=_levels(own),
            rounds=rounds,
            tiles=tiles,
            seed=seed,
            native=NATIVE is not None,
            cases=tuple(results),
            two_threads=_two_threads(sharing, cases[0], draw, rounds, tiles) if len(cores) > 1 else {},
            opening_ms=opening,
            left_out=left_out,
            versions={reader.name: reader.version for reader in readers},
            machine=machine(),
        )


def _cases(slide: Slide) -> list[Case]:
    """Levels as they are, and shrunk to half where no level serves; finest first."""
    mpps = [slide.mpp * level.downsample for level in slide.levels]
    cases = []
    for index, level in enumerate(slide.levels):
        coarser = mpps[index + 1] if index + 1 < len(mpps) else math.inf
        for shrink in (1, 2):
            case = Case(index, mpps[index], shrink)
            fits = min(level.width, level.height) >= _MIN_SIDE * case.side
            if fits and case.mpp <= _COARSEST and (shrink == 1 or coarser > 1.01 * case.mpp):
                cases.append(case)
    if not cases:
        raise SlideError(
            slide.name, f"has no level of {_MIN_SIDE * TILE} px or more a side at up to {_COARSEST} mpp to measure on"
        )
    return cases


def _drawer(slide: Slide, seed: int) -> _Draw:
    """Draws positions on tissue, from a key."""
    mask = segment(slide)

    def draw(case: Case, key: int | str, count: int) -> list[Position]:
        rng = generator(seed, "bench", case.level, case.shrink, key)
        level = slide.levels[case.level]
        found: list[Position] = []
        for _ in range(_DRAWS):
            x, y = (
                case.shrink * rng.integers((side - case.side) // case.shrink + 1, size=count)
                for side in (level.width, level.height)
            )
            share = mask.overlap(x * level.scale_x, y * level.scale_y, case.side * level.downsample)
            found += [(int(x[i]), int(y[i])) for i in np.flatnonzero(share >= _MIN_TISSUE)]
            if len(found) >= count:
                return found[:count]
        raise NoTissueError(slide.name, f"hardly any tile of {TILE} px at {case.mpp:g} mpp holds 40 % of tissue")

    return draw


def _reading_right(
    slide: Slide, readers: Sequence[Reader], case: Case, positions: Sequence[Position], left_out: dict[str, str]
) -> dict[Reader, float | None]:
    """Mean absolute difference of each reader from the level's pixels; those that are wrong go into ``left_out``."""
    true = [box_filter(slide.read_level(case.level, x, y, case.side, case.side), case.shrink) for x, y in positions]
    right: dict[Reader, float | None] = {}
    for reader in readers:
        try:
            found = [reader.read(case, x, y) for x, y in positions]
            differences = [
                float(np.abs(tile.astype(np.int16) - wanted).mean())
                for tile, wanted in zip(found, true, strict=True)
                if tile is not None
            ]
        except Exception as error:
            if reader.name in OURS:
                raise
            left_out[reader.name] = f"at {case.mpp:g} mpp: {type(error).__name__}: {error}".splitlines()[0]
            continue
        difference = fmean(differences) if differences else None
        if difference is not None and difference > _WRONG:
            left_out[reader.name] = f"at {case.mpp:g} mpp its pixels differ by {difference:.1f} grey levels on average"
        else:
            right[reader] = difference
    return right


def _measure(readers: dict[Reader, float | None], case: Case, rounds: Sequence[Sequence[Position]]) -> CaseResult:
    order = list(readers)
    cpu: dict[str, list[float]] = {reader.name: [] for reader in order}
    wall: dict[str, list[float]] = {reader.name: [] for reader in order}
    for turn, positions in enumerate(rounds):
        first = turn % len(order)
        for reader in order[first:] + order[:first]:
            started, begun = time.perf_counter(), time.process_time()
            _read(reader, case, positions)
            cpu[reader.name].append(time.process_time() - begun)
            wall[reader.name].append(time.perf_counter() - started)

    def times(name: str, other: str | None) -> float | None:
        """How many times the rate of ``other`` that of ``name`` is."""
        if other is None or other not in cpu:
            return None
        return median(theirs / its for its, theirs in zip(cpu[name], cpu[other], strict=True))

    count = len(rounds[0])
    peers = [reader.name for reader in order if reader.name not in (*OURS, LIMIT)]
    best = min(peers, key=lambda name: median(cpu[name]), default=None)
    rates = tuple(
        Rate(
            reader.name,
            count / median(cpu[reader.name]),
            count / median(wall[reader.name]),
            times(reader.name, OPENSLIDE),
            times(reader.name, best),
            times(reader.name, LIMIT),
            difference,
        )
        for reader, difference in readers.items()
    )
    return CaseResult(case.mpp, case.level_mpp, rates, best)


def _read(reader: Reader, case: Case, positions: Sequence[Position]) -> None:
    for x, y in positions:
        reader.read(case, x, y)


def _read_many(reader: Reader, case: Case, positions: Sequence[Position]) -> None:
    """As :func:`_read`, a group of tiles at a time where the reader can."""
    if reader.read_many is None:
        return _read(reader, case, positions)
    for first in range(0, len(positions), _GROUP):
        reader.read_many(case, positions[first : first + _GROUP])
    return None


def _hash(case: Case, x: int, y: int) -> None:
    hashlib.sha256(_HASHED)


# Hashing needs no lock of Python's: what two threads gain by it is what the machine has to give at the moment.
_CONTROL = Reader("SHA-256 alone", "", _hash, lambda: None)


def _two_threads(readers: Sequence[Reader], case: Case, draw: _Draw, rounds: int, tiles: int) -> dict[str, float]:
    """How many times the rate of one thread two threads reach, by the clock; gigatome reads as its stream does.

    The fastest round of each counts, which whatever else the machine does disturbs least.
    """
    one: dict[str, list[float]] = {reader.name: [] for reader in readers}
    two: dict[str, list[float]] = {reader.name: [] for reader in readers}
    with ThreadPoolExecutor(2) as pool:
        for turn in range(rounds):
            shares = [draw(case, f"thread {turn} {part}", tiles) for part in range(3)]
            for reader in readers:
                one[reader.name].append(_clock(pool, reader, case, shares[:1]))
                two[reader.name].append(_clock(pool, reader, case, shares[1:]))
    return {name: 2 * min(one[name]) / min(two[name]) for name in one}


def _clock(pool: ThreadPoolExecutor, reader: Reader, case: Case, shares: Sequence[Sequence[Position]]) -> float:
    """Seconds until each share is read by a thread of its own."""
    started = time.perf_counter()
    for future in [pool.submit(_read_many, reader, case, share) for share in shares]:
        future.result()
    return time.perf_counter() - started


def _opening(path: Path) -> dict[str, float]:
    """Milliseconds to open and close the slide, in turn; median."""
    openers: dict[str, Callable[[], Any]] = {GIGATOME: lambda: open_slide(path)}
    with suppress(Exception):  # not installed, or not its format; open_readers says so
        open_openslide(path).close()
        openers[OPENSLIDE] = lambda: open_openslide(path)
    seconds: dict[str, list[float]] = {name: [] for name in openers}
    for _ in range(_OPENINGS):
        for name, opener in openers.items():
            started = time.perf_counter()
            opener().close()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * median(values) for name, values in seconds.items()}


def _warm(path: Path) -> None:
    """Has the system read the file into memory."""
    with path.open("rb") as file:
        while file.read(_BLOCK):
            pass


def _cores() -> list[int]:
    """The cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Keeps this thread, and those that it starts, on some cores, if any are given; OpenCV on this thread."""
    before, threads = _cores(), cv2.getNumThreads()
    cv2.setNumThreads(1)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)
        cv2.setNumThreads(threads)


def _levels(slide: Slide) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "width": level.width,
            "height": level.height,
            "mpp": slide.mpp * level.downsample,
            "chunk": [level.chunk_width, level.chunk_height],
            "compression": level.compression,
        }
        for level in slide.levels
    )

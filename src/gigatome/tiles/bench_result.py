"""What was measured on one slide, as numbers and as a table, and on which machine."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np


@final
@dataclass(frozen=True)
class Rate:
    """What one reader does.

    Attributes:
        reader: its name.
        tiles_per_cpu_second: tiles a second of processor time; median.
        tiles_per_second: tiles a second of the clock, on one core that others may use too; median.
        times_openslide: how many times OpenSlide's rate; None where it is not installed.
        times_best_peer: how many times the rate of the fastest reader that is not gigatome; None if there is none.
        times_limit: how many times the rate of decoding whole every chunk that a tile touches with simplejpeg, and
            doing nothing else; None for a slide whose chunks are not JPEG.
        difference: mean absolute difference in grey levels from the level's own pixels, averaged; None of the limit.
    """

    reader: str
    tiles_per_cpu_second: float
    tiles_per_second: float
    times_openslide: float | None
    times_best_peer: float | None
    times_limit: float | None
    difference: float | None


@final
@dataclass(frozen=True)
class CaseResult:
    """All readers at one resolution.

    Attributes:
        mpp: µm per pixel of the tiles.
        level_mpp: of the level that they are made from.
        rates: of each reader that reads right.
        best_peer: the fastest that is not gigatome; None if there is none.
    """

    mpp: float
    level_mpp: float
    rates: tuple[Rate, ...]
    best_peer: str | None


@final
@dataclass(frozen=True)
class Reading:
    """What :func:`~gigatome.tiles.bench.bench_read` measured.

    Attributes:
        slide: its name.
        levels: width, height, mpp, chunk size and compression of each.
        rounds, tiles, seed: as asked for; ``tiles`` are read in each round.
        native: whether gigatome decodes with its extension.
        cases: finest first.
        two_threads: how many times the rate of one thread two threads reach, by the clock, fastest rounds: by reader,
            and hashing alone, which shows whether the machine had a second core to give.
        opening_ms: milliseconds to open and close the slide, which was opened before, by reader; median.
        left_out: readers that are not installed, cannot open the slide or give other pixels, and why.
        versions, machine: where it was measured.
    """

    slide: str
    levels: tuple[dict[str, Any], ...]
    rounds: int
    tiles: int
    seed: int
    native: bool
    cases: tuple[CaseResult, ...]
    two_threads: dict[str, float]
    opening_ms: dict[str, float]
    left_out: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


HEADINGS = ("mpp", "reader", "tiles/s of CPU", "× OpenSlide", "× best peer", "× decode limit", "difference")
"""Of the columns of :func:`rows`."""


def rows(reading: Reading) -> list[tuple[str, ...]]:
    """The rates as text, a row for each case and reader."""
    return [
        (
            f"{case.mpp:.4g}" + ("" if case.mpp == case.level_mpp else f" from {case.level_mpp:.4g}"),
            rate.reader,
            f"{rate.tiles_per_cpu_second:.0f}",
            *(
                "–" if value is None else f"{value:.2f}"
                for value in (rate.times_openslide, rate.times_best_peer, rate.times_limit, rate.difference)
            ),
        )
        for case in reading.cases
        for rate in case.rates
    ]


def remarks(reading: Reading) -> list[str]:
    """What the table does not hold, a sentence each."""
    machine, extension = reading.machine, "with" if reading.native else "without"
    said = [
        f"Medians of {reading.rounds} rounds of {reading.tiles} tiles, one core; gigatome {extension} its extension.",
        f"Opening: {_listed(reading.opening_ms, '{:.2f} ms')}.",
    ]
    if reading.two_threads:
        said.append(f"Two threads against one: {_listed(reading.two_threads, '{:.2f} times')}.")
    said += [f"{name} is left out: {why}." for name, why in reading.left_out.items()]
    said.append(f"Versions: {_listed(reading.versions, '{}')}, Python {machine['python']}, NumPy {machine['numpy']}.")
    said.append(f"Machine: {machine['processor']}, {machine['cores']} cores, load {machine['load']}.")
    return said


def _listed(values: Mapping[str, object], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())


def machine() -> dict[str, Any]:
    """The hardware, and how busy others keep it."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()

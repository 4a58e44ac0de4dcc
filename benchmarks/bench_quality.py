"""What shrinking JPEG chunks as they are decoded costs: ``python -m benchmarks.bench_quality [--write]``; prints JSON.

Tiles of 256² pixels on tissue, read shrunk by 2, 4 and 8, are compared with the same tiles decoded at full size and
averaged, and with the mean of level 0 (``exact=True``). The slide is read as if the level measured were its coarsest,
because a tile that a coarser level serves is read from that level. Pixels next to the border of a chunk are counted
apart too, where a seam would show. Slides: real ones of ``--data`` where it is there, and the benchmark's own.
"""

import argparse
import datetime
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import add_slides, add_write, row, write_result
from benchmarks.slides import TISSUE, ensure_slides
from gigatome.core.native import NATIVE
from gigatome.core.seeding import generator
from gigatome.core.version import __version__
from gigatome.slides.cohort import Cohort
from gigatome.slides.reader import TiffReader
from gigatome.slides.slide import Slide, open_slide
from gigatome.tissue.segment import segment

TILE, MIN_TISSUE, SEED = 256, 0.4, 0
CASES = ((0, 2), (0, 4), (0, 8), (1, 2))
"""Level and shrink."""
HEADINGS = (
    "slides", "level", "shrink", "tiles", "PSNR, dB", "of the worst slide", "mean abs. difference", "colour shift",
    "largest", "at chunk borders", "inside", "from the mean of level 0: shrunk", "averaged",
)  # fmt: skip


@dataclass
class Difference:
    """Sums over pixels and colours of what one picture has more than another."""

    count: int = 0
    absolute: int = 0
    squares: int = 0
    largest: int = 0
    signed: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))

    def add(self, difference: np.ndarray) -> None:
        """Adds pixels, int [N, 3]."""
        if difference.size:
            self.count += difference.size
            self.absolute += int(np.abs(difference).sum())
            self.squares += int(np.square(difference).sum())
            self.largest = max(self.largest, int(np.abs(difference).max()))
            self.signed += difference.sum(axis=0)

    def join(self, other: "Difference") -> None:
        """Adds what another has counted."""
        self.count, self.absolute = self.count + other.count, self.absolute + other.absolute
        self.squares, self.largest = self.squares + other.squares, max(self.largest, other.largest)
        self.signed = self.signed + other.signed

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite without any difference."""
        return 10 * math.log10(255**2 * self.count / self.squares) if self.squares else math.inf

    @property
    def mean(self) -> float:
        """Mean absolute difference in grey levels."""
        return self.absolute / self.count

    @property
    def shift(self) -> list[float]:
        """Mean signed difference of red, green and blue."""
        return (3 * self.signed / self.count).tolist()


PAIRS = ("averaged", "borders", "inside", "exact", "averaged from exact")


@dataclass
class Measured:
    """One slide, level and shrink; a difference for each of :data:`PAIRS`, shrunk minus averaged or exact."""

    group: str
    slide: str
    level: int
    shrink: int
    tiles: int
    differences: dict[str, Difference]

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        of = self.differences
        return {
            "slide": self.slide,
            "level": self.level,
            "shrink": self.shrink,
            "tiles": self.tiles,
            "psnr": round(of["averaged"].psnr, 2),
            "mean_absolute_difference": round(of["averaged"].mean, 3),
            "colour_shift": [round(value, 3) for value in of["averaged"].shift],
            "largest_difference": of["averaged"].largest,
            **{f"mean_absolute_difference_{name}": round(of[name].mean, 3) for name in ("borders", "inside")},
            "mean_absolute_difference_from_exact": round(of["exact"].mean, 3),
            "mean_absolute_difference_of_averaged_from_exact": round(of["averaged from exact"].mean, 3),
        }


def measure(slide: Slide, group: str, tiles: int) -> Iterator[Measured]:
    """Each case that the slide has room for."""
    for level, shrink in CASES:
        if level >= len(slide.levels) or shrink not in slide.levels[level].shrinks:
            continue
        places = tissue_places(slide, level, shrink, tiles)
        if places:
            differences = _differences(slide, level, shrink, places)
            yield Measured(group, slide.name, level, shrink, len(places), differences)


def tissue_places(slide: Slide, level: int, shrink: int, count: int) -> list[tuple[int, int]]:
    """Corners of random tiles on tissue, in pixels of the level divided by ``shrink``; none where none has room."""
    part = slide.levels[level]
    rng = generator(SEED, "quality", slide.name, level, shrink)
    room = part.width // shrink - TILE, part.height // shrink - TILE
    if min(room) < 0:
        return []
    x, y = (rng.integers(most + 1, size=20 * count) for most in room)
    scales = shrink * part.scale_x, shrink * part.scale_y
    share = segment(slide).overlap(x * scales[0], y * scales[1], TILE * max(scales))
    chosen = np.flatnonzero(share >= MIN_TISSUE)[:count]
    return [(int(x[k]), int(y[k])) for k in chosen]


def _differences(slide: Slide, level: int, shrink: int, places: Sequence[tuple[int, int]]) -> dict[str, Difference]:
    part = slide.levels[level]
    mpp = slide.mpp * part.downsample * shrink
    found = {name: Difference() for name in PAIRS}
    coarsest = _up_to(slide, level)
    for x, y in places:
        corner = round(x * shrink * part.scale_x), round(y * shrink * part.scale_y)
        scaled = coarsest.read_tile(*corner, TILE, mpp, exact=False).astype(np.int32)
        averaged = coarsest.read_tile(*corner, TILE, mpp, exact=False, dct_scaling=False).astype(np.int32)
        exact = slide.read_tile(*corner, TILE, mpp).astype(np.int32)
        beside = (
            _beside_borders(x, part.chunk_width // shrink) | _beside_borders(y, part.chunk_height // shrink)[:, None]
        )
        found["averaged"].add((scaled - averaged).reshape(-1, 3))
        found["borders"].add((scaled - averaged)[beside])
        found["inside"].add((scaled - averaged)[~beside])
        found["exact"].add((scaled - exact).reshape(-1, 3))
        found["averaged from exact"].add((averaged - exact).reshape(-1, 3))
    return found


def _up_to(slide: Slide, level: int) -> Slide:
    """The same slide without its coarser levels."""
    source = slide.source
    assert source is not None
    blob, index = source
    return Slide(slide.uri, TiffReader(blob, slide.name, replace(index, levels=index.levels[: level + 1])), slide.mpp)


def _beside_borders(start: int, side: int) -> np.ndarray:
    """Which pixels of an axis lie beside the border of a chunk: bool [TILE]."""
    return np.isin((start + np.arange(TILE)) % side, (0, side - 1))


def slides(folder: Path, side: int, data: Path) -> Iterator[tuple[str, Slide]]:
    """Slides with their group; each is closed after its turn."""
    for table in ("regions", "whole"):
        if (data / f"{table}.csv").is_file():
            for item in Cohort.read(data / f"{table}.csv").slides:
                with item.open() as slide:
                    yield table, slide
    own = ensure_slides(folder, side, data).values()
    for path in [*sorted(data.glob("formats/*.svs")), *sorted(data.glob("formats/*.tif")), *own]:
        with open_slide(path) as slide:
            if slide.source is not None and slide.has_mpp:
                yield slide.name, slide


def table(results: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One row for each group of slides, level and shrink; pixels of a group count alike."""
    groups: dict[tuple[str, int, int], list[Measured]] = defaultdict(list)
    for item in results:
        groups[item.group, item.level, item.shrink].append(item)
    rows = []
    for (group, level, shrink), items in groups.items():
        of = {name: Difference() for name in PAIRS}
        for item in items:
            for name in PAIRS:
                of[name].join(item.differences[name])
        whole = of["averaged"]
        rows.append(
            (
                group if len(items) == 1 else f"{group} ({len(items)})",
                str(level),
                str(shrink),
                str(sum(item.tiles for item in items)),
                f"{whole.psnr:.1f}",
                f"{min(item.differences['averaged'].psnr for item in items):.1f}",
                f"{whole.mean:.2f}",
                " ".join(f"{value:+.2f}" for value in whole.shift),
                str(whole.largest),
                *(f"{of[name].mean:.2f}" for name in PAIRS[1:]),
            )
        )
    return rows


def markdown(results: Sequence[Measured], command: str) -> str:
    """The table with what it says."""
    extension = "with" if NATIVE is not None else "without"
    lines = [
        "# Shrinking chunks while they are decoded",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}, gigatome {__version__} {extension} its extension",
        "(the pixels are the same without it). Tiles of 256² pixels on tissue, read with `exact=False`, against the",
        "same tiles decoded at full size and averaged (`dct_scaling=False`), over all pixels and colours, in grey",
        "levels of 255. `colour shift` is the mean signed difference of red, green and blue, `largest` that of the",
        "worst single value. `at chunk borders` is the mean absolute difference of pixels that touch a border,",
        "`inside` of the others. The last two columns compare with `exact=True`, the mean of level 0: levels above it",
        "were compressed anew, and that loss is in their pixels however they are averaged. `benchmarks/slides.py` made",
        "the last three slides.",
        "",
        row(HEADINGS),
        row("---" for _ in HEADINGS),
        *(row(cells) for cells in table(results)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_slides(parser)
    parser.add_argument("--data", type=Path, default=TISSUE, help="folder of real slides (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=16, help="of each slide, level and shrink")
    add_write(parser)
    options = parser.parse_args()
    results: list[Measured] = []
    for group, slide in slides(options.slides, options.side, options.data):
        print(f"reading {slide.name} …", file=sys.stderr)
        results += measure(slide, group, options.tiles)
    print(json.dumps([item.as_json() for item in results], indent=2, ensure_ascii=False))
    if options.write:
        command = f"python -m benchmarks.bench_quality --tiles {options.tiles}"
        write_result(options.write, "quality", markdown(results, command))


if __name__ == "__main__":
    main()

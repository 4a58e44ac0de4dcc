"""Reading random tiles, gigatome and its peers: ``python -m benchmarks.bench_read [--write]``; prints JSON.

:mod:`gigatome.tiles.bench` says what is measured. Peers: ``pip install -r benchmarks/requirements.txt``.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.slides import SIDE, ensure_slides
from gigatome.blob.store import write_atomic
from gigatome.tiles.bench import bench_read
from gigatome.tiles.bench_result import HEADINGS, Reading, remarks, rows

RESULTS = Path(__file__).parent / "results"


def markdown(readings: dict[str, Reading], command: str) -> str:
    """The tables of all slides."""
    lines = [
        "# Reading random tiles",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. Tiles of 256² pixels at random on tissue, unaligned to",
        "chunks; tiles a second of processor time on one core, the page cache warm, all readers in turn in each round.",
        "`difference` is the mean absolute one from the level's own pixels in grey levels; the decode limit is the",
        "rate of decoding whole, with simplejpeg, every chunk that a tile touches. `benchmarks/slides.py` makes the",
        "slides.",
    ]
    for name, reading in readings.items():
        lines += ["", f"## {name}", "", _row(HEADINGS), _row("---" for _ in HEADINGS)]
        lines += [_row(row) for row in rows(reading)]
        lines += ["", *(f"- {remark}" for remark in remarks(reading))]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def result_name(reading: Reading) -> str:
    """Name of the file that holds the results of this machine and month."""
    machine = reading.machine
    name = re.sub(r"\((R|TM|C)\)|CPU|Processor|@.*", " ", machine["processor"], flags=re.IGNORECASE)
    hardware = "-".join([*re.findall(r"[a-z0-9]+", name.lower()), f"{machine['cores']}-cores"])
    return f"read_{hardware}_{datetime.date.today():%Y%m}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--slides",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gigatome-bench",
        help="folder of the benchmark slides, made there where missing (default: %(default)s)",
    )
    parser.add_argument("--side", type=int, default=SIDE, help="level-0 pixels along each side of the slides")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiles", type=int, default=100, help="each reader reads in a round")
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        const=RESULTS,
        help="also write the tables, to benchmarks/results unless a folder is named",
    )
    options = parser.parse_args()
    readings = {}
    for name, path in ensure_slides(options.slides, options.side).items():
        print(f"reading {name} …", file=sys.stderr)
        readings[name] = bench_read(path, rounds=options.rounds, tiles=options.tiles)
    print(json.dumps({name: reading.as_json() for name, reading in readings.items()}, indent=2, ensure_ascii=False))
    if options.write:
        command = f"python -m benchmarks.bench_read --rounds {options.rounds} --tiles {options.tiles}"
        options.write.mkdir(parents=True, exist_ok=True)
        write_atomic(options.write / result_name(next(iter(readings.values()))), markdown(readings, command))


if __name__ == "__main__":
    main()

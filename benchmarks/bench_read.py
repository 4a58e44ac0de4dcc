"""Reading random tiles, gigatome and its peers: ``python -m benchmarks.bench_read [--write]``; prints JSON.

:mod:`gigatome.tiles.bench` says what is measured. Peers: ``pip install -r benchmarks/requirements.txt``.
"""

import argparse
import datetime
import json
import sys

from benchmarks.output import add_slides, add_write, row, write_result
from benchmarks.slides import ensure_slides
from gigatome.tiles.bench import bench_read
from gigatome.tiles.bench_result import HEADINGS, Reading, remarks, rows


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
        lines += ["", f"## {name}", "", row(HEADINGS), row("---" for _ in HEADINGS)]
        lines += [row(cells) for cells in rows(reading)]
        lines += ["", *(f"- {remark}" for remark in remarks(reading))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_slides(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiles", type=int, default=100, help="each reader reads in a round")
    add_write(parser)
    options = parser.parse_args()
    readings = {}
    for name, path in ensure_slides(options.slides, options.side).items():
        print(f"reading {name} …", file=sys.stderr)
        readings[name] = bench_read(path, rounds=options.rounds, tiles=options.tiles)
    print(json.dumps({name: reading.as_json() for name, reading in readings.items()}, indent=2, ensure_ascii=False))
    if options.write:
        command = f"python -m benchmarks.bench_read --rounds {options.rounds} --tiles {options.tiles}"
        facts = next(iter(readings.values())).machine
        write_result(options.write, "read", markdown(readings, command), facts)


if __name__ == "__main__":
    main()

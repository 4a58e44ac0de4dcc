"""What drawing tiles costs: ``python -m benchmarks.bench_sampler [--slides 30000] [--repeats 40] [--tissue DIR]``.

Outlines are those of two real whole slides, as they are and mosaicked to the size of a resection at 0.26 mpp; where
they are missing, a synthetic slide supplies them. An index of many slides points at these few files. Prints JSON; times
are of one thread, CPU µs a tile, for batches of 64 at four resolutions:

- ``hit``: all positions in memory. ``hit_share_8``: a rank's 8 of 64 tiles.
- ``file``: none in memory, each slide read from its file of positions.
- ``new``: no file either; outlines read, positions found and kept.
- ``many``: an index of many slides: time to make it, memory after drawing from nearly all of them.
"""

import argparse
import csv
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from shapely import affinity

from benchmarks.slides import TISSUE
from gigatome.slides.slide import open_slide
from gigatome.slides.synthetic import SyntheticOptions, make_slide
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.sampler import TileSampler
from gigatome.tissue.mask import TissueMask
from gigatome.tissue.segment import segment

MPPS, TILE, BATCH = (0.25, 0.5, 1.0, 2.0), 256, 64


def masks(tissue: Path, scratch: Path) -> dict[str, TissueMask]:
    """Outlines to draw from, by name."""
    table = tissue / "whole.csv"
    if not table.is_file():
        path = make_slide(scratch / "synthetic.svs", "glandular", 0, SyntheticOptions(mpp=2.0))
        with open_slide(path) as slide:
            mask = segment(slide)
        return {"synthetic": mask, "synthetic_mosaic": mosaic(mask, 4, 2)}
    found = {}
    for row in csv.DictReader(table.open()):
        with open_slide(str(tissue / row["slide"]), mpp=float(row["mpp"])) as slide:
            mask = segment(slide)
        found |= {slide.name: mask, f"{slide.name}_mosaic": mosaic(mask, 4, 2)}
    return found


def mosaic(mask: TissueMask, count: int, scale: int) -> TissueMask:
    """``count`` × ``count`` copies on a slide of a finer resolution."""
    width, height = mask.width * scale, mask.height * scale
    large = [affinity.scale(polygon, scale, scale, origin=(0, 0)) for polygon in mask.polygons]
    copies = [
        affinity.translate(polygon, column * width, row * height)
        for column in range(count) for row in range(count) for polygon in large
    ]  # fmt: skip
    return TissueMask.of(copies, count * width, count * height, mpp=(mask.mpp or 0.5) / scale)


def cost(draw: Callable[[int], object], repeats: int, tiles: int = BATCH) -> float:
    """Median CPU µs a tile of ``draw(step)``."""
    times = []
    for step in range(repeats):
        begin = time.thread_time()
        draw(step)
        times.append(time.thread_time() - begin)
    return round(float(np.median(times)) / tiles * 1e6, 1)


def one_file(path: Path, scratch: Path, repeats: int) -> dict[str, float]:
    """Costs with the outlines of one file, as 64 slides."""
    known = SlideTissue.stored("slide", path)
    slides = [replace(known, name=f"{path.stem}_{index}") for index in range(BATCH)]
    new = cost(lambda step: sampler(slides[step : step + 1], scratch).request(step, 0), 4, 1)
    warm = sampler(slides, scratch)
    warm.find_all(threads=1)
    warm.requests(0, BATCH)
    cold = sampler(slides, scratch, memory=0)
    files = [file.stat().st_size for file in scratch.rglob(f"{path.stem}_*.bin")]
    return {
        "vertices": sum(len(ring.coords) for p in known.load().polygons for ring in (p.exterior, *p.interiors)),
        "bytes_a_slide": int(np.mean(files)),
        "hit": cost(lambda step: warm.requests(step, BATCH), repeats),
        "hit_share_8": cost(lambda step: warm.requests(step, BATCH, 8, 16), repeats, 8),
        "replacement": cost(lambda step: warm.request(step, step % BATCH, 1), repeats, 1),
        "file": cost(lambda step: cold.requests(step, BATCH), repeats),
        "new": new,
    }


def sampler(slides: list[SlideTissue], folder: Path, memory: int = 1 << 30) -> TileSampler:
    return TileSampler(slides, TILE, MPPS, folder=folder, memory=memory)


def many(paths: list[Path], count: int, scratch: Path) -> dict[str, float]:
    """An index of ``count`` slides whose outlines and positions lie in few files, each with many names."""
    outlines = [scratch / f"many_{index}.geojson" for index in range(count)]
    for index, path in enumerate(outlines):
        os.link(paths[index % len(paths)], path)
    before, begin = resident(), time.thread_time()
    slides = [SlideTissue.stored(path.stem, path) for path in outlines]
    indexed = time.thread_time()
    draws = TileSampler(slides, TILE, MPPS, folder=scratch, memory=256 << 20)
    ready = time.thread_time()
    at_start = resident()
    for index in range(len(paths)):
        draws._store.get(index)  # writes the files that all others are names of
    folder = next(scratch.rglob("many_0.bin")).parent
    for index in range(len(paths), count):
        os.link(folder / f"many_{index % len(paths)}.bin", folder / f"many_{index}.bin")
    steps = 2 * count // BATCH
    begin_draws = time.thread_time()
    for step in range(steps):
        draws.requests(step, BATCH)
    spent = time.thread_time() - begin_draws
    return {
        "slides": count,
        "index_seconds": round(indexed - begin, 2),
        "sampler_seconds": round(ready - indexed, 2),
        "index_and_sampler_mb": round(at_start - before, 1),
        "draws": steps * BATCH,
        "us_a_tile": round(spent / steps / BATCH * 1e6, 1),
        "grown_mb_after_draws": round(resident() - before, 1),
        "positions_mb": round(draws._store.nbytes / 1e6, 1),
    }


def resident() -> float:
    """Memory of the process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--tissue", type=Path, default=TISSUE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = []
        for name, mask in masks(arguments.tissue, scratch).items():
            mask.write(scratch / f"{name}.geojson")
            paths.append(scratch / f"{name}.geojson")
        result = {
            "machine": platform.processor() or platform.machine(),
            "numpy": np.__version__,
            "tile_size": TILE,
            "mpps": MPPS,
            "files": {path.stem: one_file(path, scratch, arguments.repeats) for path in paths},
            "many": many(paths, arguments.slides, scratch),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

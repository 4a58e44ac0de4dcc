"""Whole slides as square images, gigatome's and LongViT's way: ``python -m benchmarks.bench_slide_images [SLIDE …]``.

LongViT's way is written here as its authors order it: OpenSlide reads a whole level, Pillow makes it a square by its
bicubic filter, and it is saved as JPEG of Pillow's default quality, which training loads; *in memory* is the same
without the JPEG. The authors say the level by hand: here it is the coarsest that is no smaller than the image, else
level 0. gigatome's is ``read_slide_image`` of the square (``aspect="stretch"``), which shows the same. Interleaved
rounds, medians; files in memory. Without slides those of :mod:`benchmarks.slides` are made. Prints JSON; ``--write``
writes the table too.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_longnet import timed
from benchmarks.output import add_slides, add_write, listed, row, write_result
from benchmarks.slides import ensure_slides
from gigatome.slides.slide import open_slide
from gigatome.tiles.bench_result import machine
from gigatome.tiles.slide_images import SlideImageOptions, read_slide_image, slide_frame

JPEG, IN_MEMORY, OURS = "LongViT's way", "LongViT's way, in memory", "gigatome"


def authors_way(path: str, size: int, *, jpeg: bool) -> np.ndarray:
    """A whole level, read and squeezed to uint8 [size, size, 3]."""
    import openslide
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with openslide.OpenSlide(path) as slide:
        enough = [k for k, sides in enumerate(slide.level_dimensions) if min(sides) >= size]
        level = max(enough, default=0)
        image = slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB")
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if not jpeg:
        return np.asarray(image)
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder) / "slide.jpg")
        del image
        with Image.open(Path(folder) / "slide.jpg") as saved:
            return np.asarray(saved.convert("RGB"))


def own_way(path: str, size: int, *, threads: int) -> np.ndarray:
    """The same from the stored level that suits, in pieces."""
    with open_slide(path, keep_index=False) as slide, ThreadPoolExecutor(threads) as pool:
        frame = slide_frame(slide, SlideImageOptions(size, "stretch"))
        return read_slide_image(slide, frame, pool=pool).pixels


def measure(path: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All ways on one slide at one size."""
    arms: dict[str, Callable[[], np.ndarray]] = {
        JPEG: partial(authors_way, str(path), size, jpeg=True),
        IN_MEMORY: partial(authors_way, str(path), size, jpeg=False),
        OURS: partial(own_way, str(path), size, threads=options.threads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    used: dict[str, list[float]] = {name: [] for name in arms}
    memory: dict[str, list[float]] = {name: [] for name in arms}
    images: dict[str, np.ndarray] = {}
    for number in range(options.rounds + 1):
        for name, job in arms.items():
            if not number:  # the first round is to warm up, and brings the files into memory
                images[name] = job()
                continue
            before = time.process_time()
            taken, added = timed(job, "cpu")
            used[name].append(time.process_time() - before)
            seconds[name].append(taken)
            memory[name] += [] if added is None else [added]
    return {
        "slide": path.stem,
        "size": size,
        "arms": {
            name: {
                "seconds": round(statistics.median(seconds[name]), 3),
                "cpu_seconds": round(statistics.median(used[name]), 3),
                "mib": round(statistics.median(memory[name])) if memory[name] else None,
                "times": round(statistics.median(a / b for a, b in zip(seconds[JPEG], taken, strict=True)), 2),
                "difference": _difference(images[name], images[IN_MEMORY]),
            }
            for name, taken in seconds.items()
        },
    }


def _difference(image: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    rows = range(0, len(image), 256)
    sums = [np.abs(image[k : k + 256].astype(np.int16) - other[k : k + 256]).sum() for k in rows]
    return round(float(np.sum(sums)) / image.size, 2)


def markdown(measured: Sequence[dict[str, Any]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Whole slides as square images",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "*LongViT's way*: OpenSlide reads a whole level, Pillow resizes it to a square by its bicubic filter, and it "
        "is saved as JPEG and loaded, see `benchmarks/bench_slide_images.py`; *in memory*: without the JPEG. *MiB*: "
        "what a reading adds at its peak, the image itself included. ×: how many times faster than LongViT's way. "
        f"*Difference*: mean absolute one from *{IN_MEMORY}* in grey levels; the filters are not the same. Medians of "
        "interleaved rounds, files in memory.",
        "",
        "| slide | size | | seconds | of all cores | MiB | × | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in measured:
        for name, cells in item["arms"].items():
            memory = "" if cells["mib"] is None else f"{cells['mib']:,}"
            shown = f"{cells['seconds']:g}", f"{cells['cpu_seconds']:g}", memory, f"{cells['times']:.2f}"
            lines.append(row([item["slide"], f"{item['size']:,}", name, *shown, f"{cells['difference']:g}"]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("files", metavar="SLIDE", nargs="*", type=Path, help="local slides that OpenSlide can read")
    add_slides(made)
    made.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192], help="of the image in pixels")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of gigatome")
    made.add_argument("--tiny", action="store_true", help="small images in one round, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.tiny:
        options.side, options.sizes, options.rounds = 1920, [96, 2048], 1
    paths = options.files or list(ensure_slides(options.slides, options.side).values())
    conditions = {**machine(), "threads": options.threads}
    measured = [measure(path, size, options) for path in paths for size in options.sizes]
    if options.write:
        command = f"python -m benchmarks.bench_slide_images --rounds {options.rounds}"
        write_result(options.write, "slide-images", markdown(measured, command, conditions), conditions)
    return {"conditions": conditions, "measured": measured}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2, ensure_ascii=False))

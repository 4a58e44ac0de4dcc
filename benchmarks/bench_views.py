"""DINO's views on a CPU, gigatome's and the usual ones: ``python -m benchmarks.bench_views [--write]``; prints JSON.

Everyone makes two global views of 224 pixels and eight local ones of 96 of each tile, uint8 of 256 pixels at hand,
with the same options, and gives normalised float32 batches. The usual pipelines go image by image:

- Pillow: torchvision's transforms on Pillow images, blurred and solarised by Pillow, as DINO's program does it.
- torchvision: the same with torchvision's own blur and solarisation, as DINOv2's does it.
- torchvision v2: the same on uint8 tensors.

First on one core; then gigatome in as many threads as there are cores, and the others in as many workers of a
DataLoader. All in turn in each round; medians, and the medians of the rounds' ratios, by the clock and by processor
time (of all processes), which others on the machine hardly touch.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from benchmarks.output import add_write, listed, write_result
from benchmarks.servers import _cpu_seconds
from benchmarks.slides import _REAL, TISSUE, _source
from gigatome.core.native import NATIVE
from gigatome.core.seeding import generator
from gigatome.selfsup.views import ViewOptions, multi_crop
from gigatome.tiles.bench_result import machine

TILE, TILES = 256, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = ViewOptions.dino()
_GIGATOME = "gigatome"

Transform = Callable[[np.ndarray], torch.Tensor]


@dataclass(frozen=True)
class Rate:
    """What one pipeline does on so many cores.

    Attributes:
        pipeline: its name.
        cores: threads, or workers.
        images: a second.
        images_of_cpu: a second of processor time.
        times: gigatome's rate over this one.
        times_of_cpu: the same by processor time.
    """

    pipeline: str
    cores: int
    images: float
    images_of_cpu: float
    times: float
    times_of_cpu: float


def tiles() -> np.ndarray:
    """Tiles uint8 [TILES, TILE, TILE, 3] of a real slide; where it is missing, of a synthetic one."""
    source, draw = _source(next(TISSUE.rglob(_REAL), None)), generator(0, "bench_views")
    corners = draw.integers(0, np.array(source.shape[:2]) - TILE, (TILES, 2))
    return np.stack([source[y : y + TILE, x : x + TILE] for y, x in corners])


class PillowBlur:
    """Pillow's, by chance."""

    def __init__(self, chance: float):
        self.chance = chance

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.chance:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*OPTIONS.blur_sigma)))


def _jitter(library: Any) -> list[Any]:
    jitter = library.ColorJitter(OPTIONS.brightness, OPTIONS.contrast, OPTIONS.saturation, OPTIONS.hue)
    return [
        library.RandomHorizontalFlip(OPTIONS.horizontal_flip),
        library.RandomApply([jitter], OPTIONS.jitter),
        library.RandomGrayscale(OPTIONS.grayscale),
    ]


def pillow(kind: int, size: int, scale: tuple[float, float]) -> Transform:
    crop = transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
    solarize = transforms.RandomApply([ImageOps.solarize], OPTIONS.solarize[kind])
    end = [PillowBlur(OPTIONS.blur[kind]), solarize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([Image.fromarray, crop, *_jitter(transforms), *end])


def torchvision(kind: int, size: int, scale: tuple[float, float]) -> Transform:
    crop = transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
    blur = transforms.RandomApply([transforms.GaussianBlur(9, OPTIONS.blur_sigma)], OPTIONS.blur[kind])
    solarize = transforms.RandomSolarize(128, OPTIONS.solarize[kind])
    end = [blur, solarize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([Image.fromarray, crop, *_jitter(transforms), *end])


def _planes(tile: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tile).permute(2, 0, 1)


def torchvision_v2(kind: int, size: int, scale: tuple[float, float]) -> Transform:
    crop = v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
    blur = v2.RandomApply([v2.GaussianBlur(9, OPTIONS.blur_sigma)], OPTIONS.blur[kind])
    solarize = v2.RandomSolarize(128, OPTIONS.solarize[kind])
    end = [blur, solarize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return transforms.Compose([_planes, crop, *_jitter(v2), *end])


PEERS = {"Pillow": pillow, "torchvision": torchvision, "torchvision v2": torchvision_v2}


class Views(IterableDataset):
    """All views of one tile after the other, without end."""

    def __init__(self, make: Callable[..., Transform], pixels: np.ndarray):
        self.pixels = pixels
        size, local = OPTIONS.global_size, OPTIONS.local_size
        self.views = [make(kind, size, OPTIONS.global_scale) for kind in (0, 1)]
        self.views += [make(2, local, OPTIONS.local_scale)] * OPTIONS.local_views

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        while True:
            for tile in self.pixels:
                yield [view(tile) for view in self.views]


def theirs(
    make: Callable[..., Transform], pixels: np.ndarray, workers: int, batch: int
) -> Iterator[list[torch.Tensor]]:
    """Batches of a usual pipeline; in this process if there are no workers."""
    dataset = Views(make, pixels)
    yield from DataLoader(dataset, batch, num_workers=workers, collate_fn=default_collate)


def ours(pixels: np.ndarray, threads: int, batch: int) -> Iterator[list[torch.Tensor]]:
    """Batches of gigatome's."""
    images, draw = torch.from_numpy(pixels), torch.Generator().manual_seed(0)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.set_num_threads(threads)
    while True:
        for part in images.split(batch):
            yield multi_crop(part, OPTIONS, draw, mean, std)


def _timed(batches: Iterator[list[torch.Tensor]], warm: int, seconds: float) -> tuple[float, float]:
    """Images a second, and a second of processor time."""
    for _ in range(warm):
        next(batches)
    workers = [child.pid for child in multiprocessing.active_children() if child.pid]

    def spent() -> float:
        return time.process_time() + sum(_cpu_seconds(worker) for worker in workers)

    begin, cpu, images = time.perf_counter(), spent(), 0
    while time.perf_counter() - begin < seconds:
        images += len(next(batches)[0])
    return images / (time.perf_counter() - begin), images / (spent() - cpu)


def compare(pixels: np.ndarray, cores: int, options: argparse.Namespace) -> list[Rate]:
    """Everyone on so many cores."""
    batch, workers = options.batch_size, cores if cores > 1 else 0
    makers = {_GIGATOME: partial(ours, pixels, cores, batch)}
    makers |= {name: partial(theirs, peer, pixels, workers, batch) for name, peer in PEERS.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(options.rounds):
        for name, make in makers.items():
            torch.set_num_threads(1)
            rounds[name].append(_timed(make(), 2 * max(1, workers), options.seconds))
    rates = []
    for name, seen in rounds.items():
        wall, cpu = (median(values) for values in zip(*seen, strict=True))
        ratios = [
            [a / b for a, b in zip(mine, other, strict=True)]
            for mine, other in zip(rounds[_GIGATOME], seen, strict=True)
        ]
        rates.append(Rate(name, cores, wall, cpu, *(median(values) for values in zip(*ratios, strict=True))))
    return rates


def markdown(rates: list[Rate], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# DINO's views on a CPU",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Two views of 224² and eight of 96² pixels of each tile of 256², normalised, in float32. *cores*:",
        "gigatome's threads, the others' DataLoader workers (on one core, none). *gigatome ×*: how many times this",
        "pipeline's rate gigatome's is, by the clock and by processor time. `benchmarks/bench_views.py` says what",
        "each does. *load*: of the machine before this began.",
        "",
        "| pipeline | cores | images/s | images/s of CPU | gigatome × | gigatome × (CPU) |",
        f"|{'---|' * 6}",
    ]
    for rate in rates:
        lines.append(
            f"| {rate.pipeline} | {rate.cores} | {rate.images:.0f} | {rate.images_of_cpu:.0f} "
            f"| {rate.times:.2f} | {rate.times_of_cpu:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each pipeline in a round")
    add_write(parser)
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "gigatome's extension": NATIVE is not None}
    conditions, pixels = machine() | versions, tiles()
    rates = [rate for cores in sorted({1, os.cpu_count() or 1}) for rate in compare(pixels, cores, options)]
    print(json.dumps({"conditions": conditions, "rates": [asdict(rate) for rate in rates]}, indent=2))
    if options.write:
        command = f"python -m benchmarks.bench_views --rounds {options.rounds} --seconds {options.seconds:g}"
        command += f" --batch-size {options.batch_size}"
        write_result(options.write, "views", markdown(rates, command, conditions), conditions)


if __name__ == "__main__":
    main()

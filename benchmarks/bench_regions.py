"""Regions of slides embedded, gigatome's and HIPT's way: ``python -m benchmarks.bench_regions [--write]``; prints JSON.

HIPT's way is written here in ordinary PyTorch as its authors order it: one region after the other, read with OpenSlide
at level 0, shrunk with PIL to the regions' mpp, normalised, cut into tiles of 256 px, which ViT256 sees 256 at once in
float32, attention as a product, softmax and product; ViT4096 on the grid. gigatome's is ``embed_regions`` on the same
slides, regions and random weights: all tiles in float32 as the authors have it, in bfloat16, and without background.
Interleaved rounds, medians. Slides are synthetic, JPEG, 40×; tissue and tiles are found beforehand for all.
"""

import argparse
import copy
import datetime
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_step import PlainAttention
from benchmarks.output import add_write, listed, row, write_result
from gigatome.core.job import Job
from gigatome.embeddings.extract_regions import RegionEmbeddings, embed_regions
from gigatome.encoders.device import usable_device
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.synthetic import SyntheticOptions, make_cohort
from gigatome.tiles.bench_result import machine
from gigatome.tiles.grid import tile_cohort
from gigatome.tiles.regions import RegionGrid, RegionOptions, make_regions

MPP, SLIDE_MPP, TILE = 0.5, 0.25, 256
AUTHORS = "HIPT's way"
ARMS: dict[str, dict[str, Any]] = {
    "gigatome, fp32, all tiles": {"precision": "fp32", "background": "encode"},
    "gigatome, bf16, all tiles": {"precision": "bf16", "background": "encode"},
    "gigatome, fp32, tissue": {"precision": "fp32", "background": "mask"},
    "gigatome, bf16, tissue": {"precision": "bf16", "background": "mask"},
}
PARTS = ("read", "resize", "normalise", "encode")


@dataclass(frozen=True)
class Work:
    """What all embed.

    Attributes:
        cohort: the slides.
        regions: of each slide, by name, each with the tiles that hold tissue.
        encoder: of tiles.
        upper: of regions.
    """

    cohort: Cohort
    regions: dict[str, RegionGrid]
    encoder: TileEncoder
    upper: RegionVit

    @property
    def count(self) -> int:
        """Regions of all slides."""
        return sum(map(len, self.regions.values()))

    @property
    def tissue(self) -> float:
        """Share of the regions' tiles that hold tissue."""
        return float(np.mean(np.concatenate([regions.mask for regions in self.regions.values()])))


def prepare(options: argparse.Namespace) -> Work:
    """Makes the slides, finds their tissue, and takes as many of them as the regions asked for need."""
    side = options.slide_regions * options.tiles * TILE * round(MPP / SLIDE_MPP)
    size = SyntheticOptions(side, side, mpp=SLIDE_MPP, pen=0, bubbles=0, chunk=256, quality=80)
    least = RegionOptions(options.tiles, min(16, options.tiles**2))
    slides: list[CohortSlide] = []
    regions: dict[str, RegionGrid] = {}
    number = 0
    while sum(map(len, regions.values())) < options.regions:  # a slide may have fewer regions than it has room for
        number += max(1, -(-options.regions // options.slide_regions**2))
        cohort = make_cohort(
            options.folder / f"slides_{side}", patients=number, slides_per_patient=1, options=size,
            threads=options.threads,
        )  # fmt: skip
        grids, _ = tile_cohort(cohort, Job(options.folder / f"job_{side}"), threads=options.threads)
        slides, regions = [], {}
        for slide in cohort:
            if slide.name in grids and sum(map(len, regions.values())) < options.regions:
                slides.append(slide)
                regions[slide.name] = make_regions(grids[slide.name], least)
    torch.manual_seed(0)
    config = EncoderConfig(dim=48, depth=1, heads=2) if options.tiny else EncoderConfig()
    encoder = build_encoder(EncoderConfig(**{**vars(config), "pos_embed": "dino"}), seed=0).eval()
    upper = RegionVit(RegionVitConfig(input_dim=encoder.dim)).eval()
    return Work(Cohort(tuple(slides)), regions, encoder, upper)


class AuthorsWay:
    """One region after the other, from level 0."""

    def __init__(self, work: Work, options: argparse.Namespace):
        self.work, self.device = work, usable_device(options.device)
        self.encoder = copy.deepcopy(work.encoder).to(self.device)
        for block in self.encoder.vit.blocks:
            block.attn = PlainAttention(block.attn)
        self.upper = copy.deepcopy(work.upper).to(self.device)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.vectors: list[np.ndarray] = []

    def run(self) -> None:
        """All regions; what they became is in ``vectors``, and what took how long in ``seconds``."""
        import openslide

        self.vectors, self.seconds = [], dict.fromkeys(PARTS, 0.0)
        for slide in self.work.cohort:
            regions = self.work.regions[slide.name]
            with openslide.OpenSlide(slide.uri) as opened:
                for x, y in regions.coords.tolist():
                    self.vectors.append(self._region(opened, x, y, regions).cpu().numpy()[0])

    @torch.no_grad()
    def _region(self, slide: Any, x: int, y: int, regions: RegionGrid) -> Tensor:
        side = round(regions.as_tiles().side)
        clock = [time.perf_counter()]
        image = slide.read_region((x, y), 0, (side, side)).convert("RGB")
        clock.append(time.perf_counter())
        image = image.resize((regions.tile_size, regions.tile_size))
        clock.append(time.perf_counter())
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        pixels = ((pixels - 0.5) / 0.5)[None]
        clock.append(time.perf_counter())
        tiles = pixels.unfold(2, TILE, TILE).unfold(3, TILE, TILE).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        rows = torch.cat([self.encoder(part.to(self.device)).cpu() for part in tiles.split(256)])
        grid = rows.reshape(1, regions.options.tiles, regions.options.tiles, -1).permute(0, 3, 1, 2)
        vector = self.upper(grid.to(self.device)).cpu()
        clock.append(time.perf_counter())
        for part, start, stop in zip(PARTS, clock, clock[1:], strict=False):
            self.seconds[part] += stop - start
        return vector


def own_way(work: Work, options: argparse.Namespace, *, precision: Any, background: Any) -> np.ndarray:
    """The regions' embeddings by ``embed_regions``, from nothing but tissue and tiles."""
    side = next(iter(work.regions.values())).grid.slide_width
    job = Job(options.folder / f"job_{side}")
    shutil.rmtree(job.tiles(options.tiles * TILE, MPP).path, ignore_errors=True)
    made: RegionEmbeddings = embed_regions(
        work.cohort, encoder=work.encoder, region_encoder=work.upper, out=job.path, device=options.device,
        regions=RegionOptions(options.tiles, min(16, options.tiles**2), background), precision=precision,
        batch_size=options.batch_size, threads=options.threads,
    )  # fmt: skip
    if made.failures or made.vectors is None:
        raise SystemExit(f"slides failed: {made.failures}")
    return np.concatenate([made.vectors.read(slide.name).embeddings for slide in work.cohort])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Regions a second of each arm, and how often they go into HIPT's way's time."""
    work = prepare(options)
    authors = AuthorsWay(work, options)
    arms: dict[str, Callable[[], Any]] = {AUTHORS: authors.run}
    for name in options.arms:
        arms[name] = partial(own_way, work, options, **ARMS[name])
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    likeness: dict[str, float] = {}
    parts: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        for name, job in arms.items():
            start = time.perf_counter()
            made = job()
            if number:  # the first round is to warm up, and brings the files into memory
                seconds[name].append(time.perf_counter() - start)
            elif name != AUTHORS:
                likeness[name] = _likeness(made, np.stack(authors.vectors))
        if number:
            parts.append(authors.seconds)
    base = seconds[AUTHORS]
    return {
        "regions": work.count,
        "tissue_share": round(work.tissue, 3),
        "authors_seconds_a_region": {
            part: round(statistics.median(each[part] for each in parts) / work.count, 3) for part in PARTS
        },
        "arms": {
            name: {
                "regions_per_second": round(work.count / statistics.median(taken), 3),
                "times": round(statistics.median(a / b for a, b in zip(base, taken, strict=True)), 2),
                "cosine": likeness.get(name),
            }
            for name, taken in seconds.items()
        },
    }


def _likeness(made: np.ndarray, expected: np.ndarray) -> float:
    """Median over regions of the cosine between two embeddings."""
    product = (made * expected).sum(1) / np.linalg.norm(made, axis=1) / np.linalg.norm(expected, axis=1)
    return round(float(np.median(product)), 4)


def markdown(results: dict[str, Any], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    parts = ", ".join(f"{part} {seconds:g}" for part, seconds in results["authors_seconds_a_region"].items())
    lines = [
        "# Embedding regions",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        f"{results['regions']} regions of synthetic slides of 40×, {results['tissue_share']:.0%} of their tiles with "
        "tissue. *HIPT's way*: a region at a time from level 0, float32, all tiles, see `benchmarks/bench_regions.py`; "
        f"seconds a region: {parts}. Same random weights; *cosine* to its region embeddings, median; without "
        "background they are others by intention. Medians of interleaved rounds, files in memory.",
        "",
        "| | regions a second | × | cosine |",
        "|---|---|---|---|",
    ]
    for name, item in results["arms"].items():
        cosine = "" if item["cosine"] is None else f"{item['cosine']:.4f}"
        lines.append(row([name, f"{item['regions_per_second']:g}", f"{item['times']:.2f}", cosine]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gigatome-bench-regions")
    made.add_argument("--regions", type=int, default=8, help="at least so many; whole slides are taken")
    made.add_argument("--tiles", type=int, default=16, help="along a region's side")
    made.add_argument("--slide-regions", type=int, default=2, help="regions along a slide's side")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=256, help="of gigatome's tile encoder")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that read tiles, and make the slides")
    made.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    made.add_argument("--tiny", action="store_true", help="a tiny network on tiny regions, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.tiny:
        options.tiles, options.regions, options.rounds, options.batch_size = 2, 2, 1, 8
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": options.threads,
        "tiles": options.tiles,
        "batch": options.batch_size,
    }
    results = measure(options)
    if options.write:
        command = f"python -m benchmarks.bench_regions --regions {options.regions} --rounds {options.rounds}"
        write_result(options.write, "regions", markdown(results, command, conditions), conditions)
    return {"conditions": conditions, **results}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

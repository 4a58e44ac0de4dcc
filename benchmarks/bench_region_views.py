"""Views of regions a second: ``python -m benchmarks.bench_region_views [--write]``; prints JSON.

The same made-up grids of tile embeddings lie in a store, as float16, and in one float32 ``.pt`` a region, as HIPT's
authors keep theirs. Their way is written here in ordinary PyTorch as its authors order it: a Dataset that loads one
file, cuts and flips one view after another, and a DataLoader with workers. gigatome's is ``RegionStream`` and
``grid_crops``. Both make two views of 14 × 14 and eight of 6 × 6 tiles. Arms take turns in each round; medians; files
are in memory after the first round, which is not counted.

On a GPU the views are cut there: what the host must give then is the arm ``regions only``.
"""

import argparse
import datetime
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.output import add_write, listed, row, write_result
from gigatome.embeddings.region_stream import RegionStream, RegionStreamOptions
from gigatome.embeddings.regions import TILES, RegionBag, read_regions, write_regions
from gigatome.embeddings.store import EmbeddingStore
from gigatome.selfsup.grid_views import GridViewOptions, grid_crops
from gigatome.tiles.bench_result import machine

SIDE, OF_SLIDE, GOAL = 16, 40, 20_000
VIEWS, HEAD = 10, 4


class PlainRegions(Dataset):
    """One file a region, and its views one after another."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> list[Tensor]:
        grid = torch.load(self.files[place]).view(SIDE, SIDE, -1).permute(2, 0, 1)
        return [_plain_view(grid, size) for size in (14,) * 2 + (6,) * 8]


def _plain_view(grid: Tensor, size: int) -> Tensor:
    top, left = random.randint(0, SIDE - size), random.randint(0, SIDE - size)
    view = grid[:, top : top + size, left : left + size]
    return view.flip(-1) if random.random() < 0.5 else view


def make_files(folder: Path, regions: int, dim: int) -> tuple[EmbeddingStore, list[Path]]:
    """The store and the ``.pt`` files; those that are there are taken as they are."""
    store = folder / "job" / "20x_4096px_0px_overlap" / f"features_made{dim}"
    plain = folder / f"plain{dim}"
    need, room = 1.05 * regions * SIDE**2 * dim * 6, shutil.disk_usage(folder).free
    if need > room and not store.is_dir():
        raise SystemExit(f"{folder}: {need / 1e9:.1f} GB are needed, {room / 1e9:.1f} GB are free; name a --folder")
    plain.mkdir(parents=True, exist_ok=True)
    attrs = {TILES: SIDE, "patch_size": SIDE * 256, "patch_size_level0": SIDE * 256, "target_mpp": 0.5}
    files = [plain / f"{number:06}.pt" for number in range(regions)]
    for slide, first in enumerate(range(0, regions, OF_SLIDE)):
        part, path = files[first : first + OF_SLIDE], store / f"slide{slide:05}.h5"
        if not path.is_file() or len(read_regions(path)) != len(part):
            made = np.random.default_rng(slide).standard_normal((len(part), SIDE**2, dim), np.float32)
            coords, mask = np.zeros((len(part), 2), np.int64), np.ones((len(part), SIDE**2), bool)
            write_regions(path, RegionBag(path.stem, "made", coords, made, mask, attrs), dtype="float16")
            for file, grid in zip(part, made, strict=True):
                torch.save(torch.from_numpy(grid).clone(), file)
    for path in sorted(store.glob("*.h5"))[-(-regions // OF_SLIDE) :]:
        path.unlink()
    return EmbeddingStore.open(store), files


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Regions and views a second of each arm, and how often those of the authors' way go into its own."""
    store, files = make_files(options.folder, options.regions, options.dim)
    batches = options.regions // options.batch_size
    if batches <= HEAD:
        raise SystemExit(f"{batches} batches are too few; give more --regions, or a smaller --batch-size")
    stream = RegionStream(
        store, RegionStreamOptions(threads=options.threads, prefetch=HEAD), batch_size=options.batch_size
    )
    device, draws = torch.device(options.device), torch.Generator().manual_seed(0)

    def regions() -> Iterator[Tensor]:
        return (torch.from_numpy(batch.images).to(device) for batch in stream.batches())

    def views(how: GridViewOptions) -> Callable[[], Iterator[list[Tensor]]]:
        return lambda: (grid_crops(grids, how, draws) for grids in regions())

    def plain() -> Iterator[list[Tensor]]:
        loader = DataLoader(
            PlainRegions(files), options.batch_size, shuffle=True, drop_last=True, num_workers=options.workers
        )
        return ([view.to(device) for view in found] for found in loader)

    arms: dict[str, Callable[[], Iterator[Any]]] = {
        "the authors' way": plain,
        "gigatome": views(GridViewOptions.code()),
        "gigatome, dropout": views(GridViewOptions.paper()),
        "gigatome, regions only": regions,
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        for name, arm in arms.items():
            rate = _rate(arm(), batches, options.batch_size, device)
            if number:
                rates[name].append(rate)
    base = rates["the authors' way"]
    return {
        name: {
            "regions_per_second": round(statistics.median(found), 1),
            "views_per_second": round(VIEWS * statistics.median(found)),
            "times": round(statistics.median(ours / theirs for ours, theirs in zip(found, base, strict=True)), 2),
        }
        for name, found in rates.items()
    }


def _rate(arm: Iterator[Any], batches: int, batch_size: int, device: torch.device) -> float:
    """Regions a second of some batches, after as many as are read ahead."""
    for _ in range(HEAD):
        next(arm)
    start = time.perf_counter()
    count = sum(1 for _ in islice(arm, batches - HEAD))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count * batch_size / (time.perf_counter() - start)


def markdown(results: dict[str, Any], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Views of regions",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "*The authors' way*: a `.pt` a region, views cut one after another, a DataLoader with workers; see "
        "`benchmarks/bench_region_views.py`. *Regions only*: what a GPU that cuts the views itself needs of the host.",
        "",
        "| | regions/s | views/s | × |",
        "|---|---|---|---|",
    ]
    for name, found in results["arms"].items():
        cells = f"{found['regions_per_second']:,.0f}", f"{found['views_per_second']:,}", f"{found['times']:.2f}"
        lines.append(row([name, *cells]))
    reached = "reached" if results["goal_reached"] else "missed"
    lines += ["", f"The goal of {GOAL:,} views/s is {reached}."]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gigatome-bench-regions")
    made.add_argument("--regions", type=int, default=4000, help="0.6 MB of files each")
    made.add_argument("--dim", type=int, default=384)
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=2, help="of gigatome's stream")
    made.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    made.add_argument("--tiny", action="store_true", help="few and small grids, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.tiny:
        options.regions, options.dim, options.batch_size, options.rounds, options.workers = 96, 16, 16, 1, 0
    options.folder.mkdir(parents=True, exist_ok=True)
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("regions", "dim", "batch_size", "threads", "workers")},
    }
    arms = measure(options)
    results = {"arms": arms, "goal_reached": arms["gigatome"]["views_per_second"] >= GOAL}
    if options.write:
        command = f"python -m benchmarks.bench_region_views --regions {options.regions} --rounds {options.rounds}"
        write_result(options.write, "region-views", markdown(results, command, conditions), conditions)
    return {"conditions": conditions, **results}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

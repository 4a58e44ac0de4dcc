"""Giga-SSL's slide network on sparse maps and on dense ones: ``python -m benchmarks.bench_sparse``; prints JSON.

Maps of several sides, of which a part is active, either in patches as tissue lies on a slide or scattered. Two jobs,
forward and backward, in float32:

- a 3 × 3 submanifold convolution, and its forward alone: gigatome's, PyTorch's on the whole map, and spconv's where it
  is installed, with gradients on a GPU only, as it has none without;
- layer 4 of a ResNet-18 and the mean: gigatome's, and timm's on the whole map.

And a training batch of 512 views of 5 tiles through gigatome's layer 4. ``with joints`` finds out anew what meets what,
as every new map needs it once for all its convolutions. All in turn in each round; medians, and the medians of the
rounds' ratios.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor

from benchmarks.output import add_write, listed, row, write_result
from gigatome.encoders.giga import GigaConfig, from_resnet
from gigatome.encoders.sparse import Cells, convolve, map_cells
from gigatome.tiles.bench_result import machine

CHANNELS = 256
OURS, OURS_WITH_JOINTS, DENSE, SPCONV = "gigatome", "gigatome, with joints", "dense", "spconv"

Job = Callable[[], object]
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Job]


@dataclass(frozen=True)
class Measured:
    """What one arm took.

    Attributes:
        job: what was computed.
        pattern: how the active cells lie.
        side: of the map.
        occupancy: part of the cells that is active.
        arm: who computed it.
        seconds: median over rounds.
        times: median over rounds of this arm's seconds over gigatome's.
    """

    job: str
    pattern: str
    side: int
    occupancy: float
    arm: str
    seconds: float
    times: float


def active_cells(side: int, occupancy: float, pattern: str, seed: int = 0) -> Tensor:
    """Places int64 [N, 2] of the active cells of a map."""
    noise = torch.rand(side, side, generator=torch.Generator().manual_seed(seed))
    if pattern == "patches":
        noise = F.avg_pool2d(F.pad(noise[None, None], (4, 4, 4, 4), mode="circular"), 9, 1)[0, 0]
    count = max(1, round(occupancy * side**2))
    chosen = noise.flatten().topk(count).indices
    return torch.stack([chosen % side, chosen // side], 1)


def trained(job: Callable[[Tensor], Tensor], x: Tensor) -> Job:
    """Forward and backward, to the input and to the weights."""
    x = x.requires_grad_()

    def run() -> None:
        job(x).square().sum().backward()

    return run


def forward_only(job: Callable[[Tensor], Tensor], x: Tensor) -> Job:
    """Forward alone, without gradients."""

    def run() -> None:
        with torch.no_grad():
            job(x)

    return run


def convolution_arms(places: Tensor, side: int, device: str, run: Run = trained) -> dict[str, Job]:
    """The arms of a 3 × 3 submanifold convolution; on a CPU spconv has no gradients."""
    bounds = torch.tensor([0, len(places)], device=device)
    places = places.to(device)
    cells = map_cells(places, bounds, shifted=False)[0]
    values = torch.randn(len(cells), CHANNELS, device=device)
    plain = (torch.randn(CHANNELS, CHANNELS, 3, 3, device=device) * 0.02).requires_grad_()
    weight = plain.detach().clone(memory_format=torch.channels_last).requires_grad_()
    dense = torch.zeros(1, CHANNELS, side, side, device=device)
    dense[0, :, cells.places[:, 1], cells.places[:, 0]] = values.T
    mask = (dense != 0).any(1, keepdim=True)
    pairs = cells.neighbours
    arms = {
        OURS: run(lambda x: convolve(x, weight, pairs), values.clone()),
        OURS_WITH_JOINTS: run(lambda x: convolve(x, weight, Cells(cells.keys, 1).neighbours), values.clone()),
        DENSE: run(lambda x: F.conv2d(x, plain, padding=1) * mask, dense),
    }
    if has_spconv() and (run is forward_only or device.startswith("cuda")):
        arms[SPCONV] = run(spconv_layer(cells, side, device), values.clone())
    return arms


def has_spconv() -> bool:
    return importlib.util.find_spec("spconv") is not None


def spconv_layer(cells: Cells, side: int, device: str) -> Callable[[Tensor], Tensor]:
    """spconv's submanifold convolution; it keeps what meets what under its key."""
    spconv = importlib.import_module("spconv.pytorch")
    layer = spconv.SubMConv2d(CHANNELS, CHANNELS, 3, bias=False, indice_key="map").to(device)
    indices = F.pad(cells.places.flip(1), (1, 0)).int().contiguous()
    known: dict[Any, Any] = {}
    return lambda x: layer(spconv.SparseConvTensor(x, indices, [side, side], 1, indice_dict=known)).features


def layer_arms(places: Tensor, side: int, device: str) -> dict[str, Job]:
    """The arms of layer 4 and the mean."""
    resnet = timm.create_model("resnet18", num_classes=0)
    encoder = from_resnet(resnet.state_dict(), GigaConfig(), source="timm").to(device)
    layer4 = resnet.layer4.to(device)
    places = places.to(device)
    x = torch.randn(len(places), CHANNELS, device=device)
    bounds = torch.tensor([0, len(places)], device=device)
    dense = torch.zeros(1, CHANNELS, side, side, device=device)
    dense[0, :, places[:, 1], places[:, 0]] = x.T
    return {
        OURS: trained(lambda x: encoder(x, places, bounds), x),
        DENSE: trained(lambda x: layer4(x).mean((2, 3)), dense),
    }


def view_arms(views: int, tiles: int, side: int, device: str) -> dict[str, Job]:
    """gigatome on many small slides, as Giga-SSL trains."""
    encoder = from_resnet(timm.create_model("resnet18").state_dict(), source="timm").to(device)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(side, (views * tiles, 2), generator=generator).to(device)
    x = torch.randn(views * tiles, CHANNELS, generator=generator).to(device)
    bounds = torch.arange(views + 1, device=device) * tiles
    return {OURS: trained(lambda x: encoder(x, places, bounds), x)}


def measure(arms: dict[str, Job], rounds: int, device: str, **about: Any) -> list[Measured]:
    """One arm after the other in each round; the first is to warm up."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm, job in arms.items():
            start = _now(device)
            job()
            if number:
                seconds[arm].append(_now(device) - start)
    base = seconds[OURS]
    return [
        Measured(
            **about,
            arm=arm,
            seconds=round(median(taken), 5),
            times=round(median(theirs / ours for theirs, ours in zip(taken, base, strict=True)), 2),
        )
        for arm, taken in seconds.items()
    ]


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_all(options: argparse.Namespace) -> list[Measured]:
    """Every map and job."""
    found: list[Measured] = []
    for pattern in ("patches", "scattered"):
        for side in options.sides:
            for occupancy in options.occupancies:
                places = active_cells(side, occupancy, pattern)
                about = {"pattern": pattern, "side": side, "occupancy": occupancy}
                forward = partial(convolution_arms, run=forward_only)
                jobs = {"convolution": convolution_arms, "convolution, forward": forward, "layer 4": layer_arms}
                for job, make in jobs.items():
                    arms = make(places, side, options.device)
                    found += measure(arms, options.rounds, options.device, job=job, **about)
    arms = view_arms(options.views, 5, max(options.sides), options.device)
    name, part = f"layer 4, {options.views} views", 5 / max(options.sides) ** 2
    about = {"job": name, "pattern": "scattered", "side": max(options.sides), "occupancy": round(part, 5)}
    return found + measure(arms, options.rounds, options.device, **about)


def markdown(found: list[Measured], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Convolutions on sparse maps",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        f"Forward and backward, or forward alone, {CHANNELS} channels, one map, see `benchmarks/bench_sparse.py`.",
        "Ratios: seconds over gigatome's, medians of interleaved rounds.",
        "",
        "| | cells | side | active | arm | seconds | × |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        row(
            [
                item.job,
                item.pattern,
                str(item.side),
                f"{item.occupancy:.0%}",
                item.arm,
                f"{item.seconds:g}",
                f"{item.times:.2f}",
            ]
        )
        for item in found
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128])
    made.add_argument("--occupancies", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3])
    made.add_argument("--views", type=int, default=512, help="of 5 tiles each, in the training batch")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--tiny", action="store_true", help="tiny maps, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.tiny:
        options.sides, options.occupancies, options.views, options.rounds = [8], [0.2], 4, 1
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "spconv": "installed" if has_spconv() else "not installed, left out",
        "rounds": options.rounds,
    }
    found = measure_all(options)
    if options.write:
        command = f"python -m benchmarks.bench_sparse --rounds {options.rounds}"
        write_result(options.write, "sparse", markdown(found, command, conditions), conditions)
    return {"conditions": conditions, "measured": [asdict(item) for item in found]}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

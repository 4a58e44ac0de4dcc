"""Dilated attention of up to a million tokens: ``python -m benchmarks.bench_longnet [--write]``; prints JSON.

Attention of LongViT-S, 16 heads of 24, with the authors' segments for an image of so many patches, in the precision of
the device's fast kernels. Memory is what is added at the peak to the inputs, a cotangent among them.

*torchscale's way* is its algorithm written here in ordinary PyTorch, on PyTorch's kernels: the sequence padded and
folded, each branch's outputs scattered into a dense tensor, all branches stacked and merged. *compat* has its gradient,
which holds the branches' weights for constants. All in turn in each round, medians.

On a CUDA device also heads of 24 padded to 32, and training steps of LongViT-S on 32,768 × 32,768 px, 1,048,576 tokens,
in bfloat16: with its 16 heads and with 6 of 64, keeping of each block its input alone or its attention too.
"""

import argparse
import ctypes
import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor

from benchmarks.output import add_write, listed, row, write_result
from gigatome.encoders.dilated import DilatedOptions, dilated_attention
from gigatome.encoders.dilated_kernels import pytorch_kernel_for
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longvit import LongVit, LongVitConfig, segments_for
from gigatome.tiles.bench_result import machine

RATIOS = (1, 2, 4, 8, 16)
HEADS, DIM, PATCH = 16, 24, 32
_PADDED = 32
PLAIN = "torchscale's way"
MIB = 2**20

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(tokens: int, compare: int, *, cuda: bool = False) -> dict[str, Attend]:
    """Attention over a square image of so many patches; torchscale's too at the length to compare at."""
    branches = segments_for(PATCH * isqrt(tokens)), RATIOS, HEADS
    made: dict[str, Attend] = {"gigatome": lambda q, k, v: dilated_attention(q, k, v, DilatedOptions(*branches))}
    if cuda:
        made["gigatome, padded to 32"] = lambda q, k, v: padded_attention(q, k, v, DilatedOptions(*branches))
    if tokens == compare:
        compat = DilatedOptions.compat(*branches)
        made["gigatome, compat"] = lambda q, k, v: dilated_attention(q, k, v, compat)
        made[PLAIN] = lambda q, k, v: torchscale_attention(q, k, v, compat)
    return made


def padded_attention(q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions) -> Tensor:
    """The same as ``dilated_attention``, of heads that are padded to 32 for kernels that have no 24."""
    q, k, v = (F.pad(x, (0, _PADDED - DIM)) for x in (q * (_PADDED / DIM) ** 0.5, k, v))
    return dilated_attention(q, k, v, options)[..., :DIM]


def torchscale_attention(q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions) -> Tensor:
    """The same as ``dilated_attention`` of heads and segments that are multiples of each ratio."""
    outs, lses = [], []
    for segment, ratio in zip(options.segments, options.ratios, strict=True):
        folded = [_fold(x, segment, ratio) for x in (q, k, v)]
        out, lse = pytorch_kernel_for(q).forward(*folded)
        outs.append(_scatter(out, q, segment, ratio, 0.0))
        lses.append(_scatter(lse.detach()[..., None], q, segment, ratio, -1e8))
    with torch.no_grad():
        shares = torch.stack(lses).softmax(0)
    return sum((out * share).to(q.dtype) for out, share in zip(outs, shares, strict=True))


def _fold(x: Tensor, segment: int, ratio: int) -> Tensor:
    """[B × segments, heads, tokens / ratio, d] of [B, N, heads, d]."""
    segment = min(segment, x.shape[1])
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % segment))
    x = x.unflatten(1, (-1, segment)).flatten(0, 1)
    x = x.unflatten(2, (ratio, -1)).unflatten(1, (-1, ratio)).diagonal(dim1=2, dim2=3)  # [., tokens, heads, d, ratio]
    return x.permute(0, 4, 2, 1, 3).flatten(1, 2)


def _scatter(x: Tensor, like: Tensor, segment: int, ratio: int, empty: float) -> Tensor:
    """[B, N, heads, d] of what ``_fold`` made of ``like``; ``empty`` where it took nothing."""
    batch, tokens, heads, _ = like.shape
    segment = min(segment, tokens)
    dense = x.new_full((len(x), segment // ratio, ratio, ratio, heads // ratio, x.shape[3]), empty)
    dense.diagonal(dim1=2, dim2=3).copy_(x.unflatten(1, (ratio, -1)).permute(0, 3, 2, 4, 1))
    return dense.flatten(3, 4).flatten(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]


def inputs(tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a cotangent."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(1, tokens, HEADS, DIM, generator=random).to(device, dtype) for _ in range(4)]
    return [x.requires_grad_(number < 3) for number, x in enumerate(made)]


def forward(attend: Attend, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """Without a gradient."""
    with torch.no_grad():
        return attend(q, k, v)


def training(attend: Attend, q: Tensor, k: Tensor, v: Tensor, cotangent: Tensor) -> None:
    """With a gradient."""
    torch.autograd.grad(attend(q, k, v), (q, k, v), cotangent)


def timed(job: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Seconds, and MiB that are added at the peak; None where the system does not say."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS", reset=True)
    start = time.perf_counter()
    job()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return seconds, None if before is None or after is None else max(0, after - before) / MIB


def _resident(field: str, *, reset: bool = False) -> int | None:
    """Bytes that Linux counts for this process; ``reset`` has it take back what was freed, and forget the peak."""
    try:
        if reset:
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(tokens: int, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """All ways at one length."""
    tensors = inputs(tokens, options.device, dtype)
    arms = ways(tokens, options.compare, cuda=options.device.startswith("cuda") or options.tiny)
    passes = {"forward": forward, **({"forward and backward": training} if tokens <= options.backward else {})}
    jobs = {(name, arm): partial(passes[name], arms[arm], *tensors) for name in passes for arm in arms}
    taken: dict[tuple[str, str], list[tuple[float, float | None]]] = {key: [] for key in jobs}
    for number in range(options.rounds + 1):
        for key, job in jobs.items():
            reading = timed(job, options.device)
            if number:  # the first round is to warm up
                taken[key].append(reading)
    rows = []
    for (name, arm), readings in taken.items():
        seconds, added = zip(*readings, strict=True)
        cells: dict[str, Any] = {"pass": name, "way": arm, "seconds": round(statistics.median(seconds), 4)}
        cells["mib"] = None if None in added else round(max(added), 1)
        if PLAIN in arms and arm != PLAIN:
            ratios = [plain / own for (plain, _), own in zip(taken[name, PLAIN], seconds, strict=True)]
            cells["times"] = round(statistics.median(ratios), 2)
        rows.append(cells)
    if PLAIN not in arms:
        return {"tokens": tokens, "rows": rows}
    reference = forward(arms[PLAIN], *tensors)
    gaps = {arm: (forward(arms[arm], *tensors) - reference).abs().max().item() for arm in arms if arm != PLAIN}
    return {"tokens": tokens, "rows": rows, "largest_differences": gaps}


def training_step(side: int, heads: int, checkpointing: Checkpointing, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and GiB at the peak, of a step of LongViT-S on one image; None where memory does not suffice."""
    device = options.device
    torch.manual_seed(0)
    depth = 1 if options.tiny else 12
    config = LongVitConfig(image_size=side, heads=heads, depth=depth, norm="finetune")
    model = LongVit(config, drop_path=0.0, checkpointing=checkpointing).to(device).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(image.to(device, non_blocking=True)).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    made: dict[str, Any] = {"tokens": (side // PATCH) ** 2, "heads": heads, "checkpointing": checkpointing}
    try:
        found = [timed(step, device) for _ in range(options.rounds + 1)][1:]
    except torch.OutOfMemoryError:
        return made | {"seconds": None, "gib": None}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None
    seconds = round(statistics.median(seconds for seconds, _ in found), 3)
    return made | {"seconds": seconds, "gib": peak and round(peak, 2)}


def markdown(results: dict[str, Any], command: str, conditions: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Dilated attention",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        f"{HEADS} heads of {DIM}, one sequence. Medians of interleaved rounds; memory added at the peak. ×: how many "
        f"times as long *{PLAIN}* takes, its algorithm on PyTorch's kernels, see `benchmarks/bench_longnet.py`.",
        "",
        "| tokens | | seconds | MiB | × |",
        "|---|---|---|---|---|",
    ]
    for item in results["attention"]:
        for cells in item["rows"]:
            memory = "" if cells["mib"] is None else f"{cells['mib']:,.0f}"
            shown = f"{item['tokens']:,}", f"{cells['pass']}, {cells['way']}", f"{cells['seconds']:g}", memory
            lines.append(row([*shown, f"{cells['times']:.2f}" if "times" in cells else ""]))
    if steps := results["steps"]:
        lines += [
            "",
            "A training step of LongViT-S on one image, bfloat16; without figures, memory did not suffice.",
            "",
        ]
        lines += [row(steps[0]), "|---" * len(steps[0]) + "|"]
        lines += [row(["" if value is None else str(value) for value in step.values()]) for step in steps]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--tokens", type=int, nargs="+", help="lengths; on a CUDA device up to 1,048,576 by default")
    made.add_argument("--backward", type=int, help="longest with a gradient; 65,536 by default, on CUDA all")
    made.add_argument("--compare", type=int, default=65536, help="length at which it is torchscale's way too")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--side", type=int, default=32768, help="of the training step's image in pixels; CUDA only")
    made.add_argument("--heads", type=int, nargs="+", default=[HEADS, 6], help="of the training steps' models")
    made.add_argument(
        "--checkpointing", choices=("none", "selective", "block"), nargs="+", default=["selective", "block"]
    )
    made.add_argument("--tiny", action="store_true", help="tiny sequences, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    cuda = options.device.startswith("cuda")
    if options.tiny:
        options.tokens, options.compare, options.rounds, options.side = [256, 1024], 1024, 1, 128
    options.tokens = options.tokens or [4**power for power in range(5, 11 if cuda else 10)]
    options.backward = options.backward or (max(options.tokens) if cuda else 65536)
    dtype = torch.bfloat16 if cuda else torch.float32
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }
    attention = [measure(tokens, options, dtype) for tokens in options.tokens]
    steps = [
        training_step(options.side, heads, checkpointing, options)
        for heads, checkpointing in product(options.heads, options.checkpointing)
        if cuda or options.tiny
    ]
    results = {"attention": attention, "steps": steps}
    if options.write:
        command = f"python -m benchmarks.bench_longnet --device {options.device} --rounds {options.rounds}"
        write_result(options.write, "longnet", markdown(results, command, conditions), conditions)
    return {"conditions": conditions, **results}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

"""One step of DINO, gigatome's and a plain one: ``python -m benchmarks.bench_step [--write]``; prints JSON.

The plain step is DINO as its paper and its authors' program order it, written here in ordinary PyTorch: the same ViT,
crops, batch, head and number of prototypes, attention as a product, softmax and product, one loss term for each pair
of views, gradients clipped and the teacher moved parameter by parameter, AdamW as PyTorch makes it by default. Both in
turn in each round, medians, at the same precision; then gigatome's in bfloat16 too. *with views*: each makes its views
of uint8 tiles too, the plain one image by image with torchvision, as the authors do, on as many threads.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.output import add_write, listed, write_result
from gigatome.encoders.device import usable_device
from gigatome.encoders.vit import EncoderConfig, unfuse_attention
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.tiles.bench_result import machine
from gigatome.training.optim import clip_gradients, make_optimizer, set_rates, step_if
from gigatome.training.schedules import Clock

LR, WEIGHT_DECAY, MOMENTUM, CLIP = 5e-4, 0.04, 0.996, 3.0
CLOCK = Clock(step=500, steps=1000, epoch_steps=100)
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """Images a second, medians, and their ratios, medians of the rounds.

    Attributes:
        precision: of both.
        plain: the plain step, its views at hand.
        gigatome: gigatome's, its views at hand.
        times: gigatome over plain.
        plain_with_views: the plain step and its views, image by image.
        gigatome_with_views: gigatome's step and its views.
        times_with_views: gigatome over plain.
        views_share: of gigatome's step with views, the part that the views take.
    """

    precision: str
    plain: float
    gigatome: float
    times: float
    plain_with_views: float
    gigatome_with_views: float
    times_with_views: float
    views_share: float


class PlainAttention(nn.Module):
    """Softmax attention, one operation after another, over timm's attention weights."""

    def __init__(self, attention: Any):
        super().__init__()
        self.heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, **_: object) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class PlainPrototypes(nn.Module):
    """The last layer, its weights normalised before they are used."""

    def __init__(self, layer: Any):
        super().__init__()
        self.weight_g, self.weight_v = layer.weight_g, layer.weight_v

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class PlainDino:
    """DINO's training step in ordinary PyTorch, with the networks that a :class:`Dino` was made with."""

    def __init__(self, method: Dino, device: torch.device, precision: str):
        self.device, self.dtype = device, _PRECISIONS[precision]
        self.student, self.teacher = method.student, method.teacher
        for branch in (self.student, self.teacher):
            for block in branch.encoder.vit.blocks:
                block.attn = PlainAttention(block.attn)
            branch.head.last_layer = PlainPrototypes(branch.head.last_layer)
        self.center = torch.zeros(1, method.options.out_dim, device=device)
        decays = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.student.parameters() if p.requires_grad and p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=LR
        )

    def _logits(self, branch: Any, views: Sequence[Tensor]) -> Tensor:
        sizes = sorted({view.shape[-1] for view in views}, reverse=True)
        groups = [torch.cat([view for view in views if view.shape[-1] == size]) for size in sizes]
        return branch.head(torch.cat([branch.encoder(group) for group in groups]))

    def _loss(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        students = (student / 0.1).chunk(views)
        teachers = F.softmax((teacher - self.center) / 0.04, dim=-1).detach().chunk(2)
        terms = []
        for g, target in enumerate(teachers):
            for v, prediction in enumerate(students):
                if v != g:
                    terms.append(torch.sum(-target * F.log_softmax(prediction, dim=-1), dim=-1).mean())
        return sum(terms[1:], terms[0]) / len(terms)

    def step(self, views: Sequence[Tensor]) -> None:
        """One step on normalised views, the two global ones first."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            with torch.no_grad():
                teacher = self._logits(self.teacher, views[:2])
            student = self._logits(self.student, views)
        loss = self._loss(student.float(), teacher.float(), len(views))
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                if (factor := CLIP / (norm.item() + 1e-6)) < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.float().mean(0, keepdim=True) * 0.1
            for mine, theirs in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                theirs.mul_(MOMENTUM).add_((1 - MOMENTUM) * mine.detach())


class OwnDino:
    """gigatome's step, as ``fit`` makes it."""

    def __init__(self, method: Dino, device: torch.device, precision: str):
        self.method, self.device, self.dtype = method, device, _PRECISIONS[precision]
        self.parameters = dict(method.named_parameters())
        if device.type == "cpu" and precision == "bf16":
            unfuse_attention(method)
        self.optimizer = make_optimizer("adamw", self.parameters.items(), method.lr_scales())

    def step(self, views: Sequence[Tensor]) -> None:
        """One step on normalised views, the two global ones first."""
        method = self.method
        set_rates(self.optimizer, LR, WEIGHT_DECAY)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss, _ = method.loss(views, CLOCK)
        loss.backward()
        method.after_backward(CLOCK)
        norm = clip_gradients(self.parameters.values(), CLIP, "per_parameter")
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        step_if(self.optimizer, finite)
        method.after_step(CLOCK, finite)


class PlainViews(Dataset):
    """DINO's views of each image, with torchvision."""

    def __init__(self, images: np.ndarray, options: ViewOptions):
        self.images = images
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]
        bicubic = v2.InterpolationMode.BICUBIC

        def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[[Any], Any]:
            crop = v2.RandomResizedCrop(size, scale, interpolation=bicubic)
            blurring = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur)
            colours = [v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blurring]
            return v2.Compose([v2.ToPILImage(), crop, *colours, v2.RandomSolarize(128, solarize), v2.ToImage(), *end])

        self.views = [
            view(options.global_size, options.global_scale, 1.0, 0.0),
            view(options.global_size, options.global_scale, 0.1, 0.2),
            *[view(options.local_size, options.local_scale, 0.5, 0.0)] * options.local_views,
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> list[Tensor]:
        return [view(self.images[place]) for view in self.views]


def measure(options: argparse.Namespace, precision: str) -> Rates:
    """Interleaved rounds of both, with and without the making of views."""
    device = usable_device(options.device)
    encoder = EncoderConfig(model=options.model, image_size=options.views.global_size)
    dino = DinoOptions(views=options.views, out_dim=options.prototypes)
    plain = PlainDino(Dino(encoder, dino).to(device).train(), device, precision)
    own = OwnDino(Dino(encoder, dino).to(device).train(), device, precision)
    tiles = (
        np.random.default_rng(0).integers(0, 256, (options.batch_size, 32, 32, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    )
    loader = DataLoader(PlainViews(tiles, options.views), options.batch_size, num_workers=options.workers)

    def own_views() -> list[Tensor]:
        return own.method.views(torch.from_numpy(tiles).to(device), torch.Generator().manual_seed(0), CLOCK)

    ready = own_views()
    jobs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.step(ready),
        "gigatome": lambda: own.step(ready),
        "plain_with_views": lambda: plain.step([view.to(device) for view in next(iter(loader))]),
        "gigatome_with_views": lambda: own.step(own_views()),
        "views": own_views,
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(options.rounds + 1):
        for name, job in jobs.items():
            start = _now(device)
            for _ in range(options.repeats):
                job()
            if number:  # the first round is to warm up
                seconds[name].append((_now(device) - start) / options.repeats)

    def rate(name: str) -> float:
        return round(options.batch_size / statistics.median(seconds[name]), 2)

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 3)

    return Rates(
        precision,
        rate("plain"),
        rate("gigatome"),
        ratio("plain", "gigatome"),
        rate("plain_with_views"),
        rate("gigatome_with_views"),
        ratio("plain_with_views", "gigatome_with_views"),
        ratio("views", "gigatome_with_views"),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown(results: Sequence[Rates], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# One step of DINO",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Images a second. *plain*: the same step in ordinary PyTorch, see `benchmarks/bench_step.py`. *with views*:",
        "both make their views of uint8 tiles, the plain one image by image with torchvision. Medians of interleaved",
        "rounds.",
        "",
        "| precision | plain | gigatome | × | plain, with views | gigatome, with views | × | views, of gigatome's |",
        f"|{'---|' * 8}",
    ]
    for item in results:
        lines.append(
            f"| {item.precision} | {item.plain:g} | {item.gigatome:g} | {item.times:.2f} | {item.plain_with_views:g} "
            f"| {item.gigatome_with_views:g} | {item.times_with_views:.2f} | {item.views_share:.1%} |"
        )
    by_precision = {item.precision: item for item in results}
    if len(by_precision) == 2:
        own, plain = by_precision["bf16"], by_precision["fp32"]
        lines += [
            "",
            "gigatome in bfloat16 against the plain step in float32, which is what the authors' program does without a "
            f"GPU: {own.gigatome / plain.plain:.2f} ×, with views "
            f"{own.gigatome_with_views / plain.plain_with_views:.2f} ×.",
        ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--model", default="vit_small_patch16_224")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--prototypes", type=int, default=65536)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--repeats", type=int, default=1, help="steps of each in a round")
    made.add_argument("--workers", type=int, default=0, help="that make the plain step's views")
    made.add_argument("--precisions", nargs="+", choices=list(_PRECISIONS), default=list(_PRECISIONS))
    made.add_argument("--tiny", action="store_true", help="tiny views and few prototypes, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    tiny = ViewOptions(global_size=32, local_size=16, local_views=2)
    options.views = tiny if options.tiny else ViewOptions()
    options.prototypes = 64 if options.tiny else options.prototypes
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": options.model,
        "batch": options.batch_size,
        "prototypes": options.prototypes,
    }
    results = [measure(options, precision) for precision in options.precisions]
    if options.write:
        command = f"python -m benchmarks.bench_step --batch-size {options.batch_size} --rounds {options.rounds}"
        write_result(options.write, "step", markdown(results, command, conditions), conditions)
    return {"conditions": conditions, "results": [asdict(item) for item in results]}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

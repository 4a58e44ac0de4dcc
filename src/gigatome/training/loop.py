"""The one training loop.

A run is a pure function of its options, its method and its stream: every random draw of step k comes from the seed and
k. So a run that is killed and resumed ends with the weights of one that was not, bit for bit, on the same machine,
PyTorch and number of threads (a GPU's own nondeterminism aside).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gigatome.core.errors import RunError
from gigatome.core.logs import Progress, log, silent
from gigatome.core.seeding import torch_seed
from gigatome.training import checkpoint as checkpoints
from gigatome.training.interrupts import Interrupts
from gigatome.training.optim import (
    Clipping,
    LrScaling,
    adamw,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    scaled_lr,
    set_rates,
    step_if,
)
from gigatome.training.record import Meter, MetricsFile
from gigatome.training.schedules import Clock, cosine

_PATIENCE = 3  # steps in a row that may be without a finite loss and gradient


@dataclass(frozen=True)
class FitOptions:
    """How a run is optimised, saved and logged; the defaults are DINO's.

    Attributes:
        steps: length of the run; give this or ``epochs``.
        epochs: length of the run in epochs of ``epoch_images``.
        epoch_images: tiles that count as an epoch, as an online stream has no natural one (kaiko, section IV-C).
        batch_size: tiles of a step.
        grad_accumulation: parts that a batch is cut into; the gradient is that of the whole.
        lr: base learning rate, before ``lr_scaling``.
        lr_scaling: ``"linear"`` lr × batch / 256, ``"sqrt"`` lr × √(batch / 1024), or ``"none"``.
        min_lr: at the end of the cosine; not scaled.
        warmup_steps: in which the learning rate rises from 0.
        weight_decay: at the start.
        weight_decay_end: at the end of its cosine.
        clip: greatest norm of the gradient; None for no clipping.
        clipping: ``"per_parameter"``, as DINO's code does, or ``"global"``.
        precision: of the forward pass; weights are float32 always.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …
        seed: of everything.
        save_every: steps from one checkpoint to the next; the end of the run is always saved.
        keep: checkpoints to keep.
        log_every: steps from one line of ``metrics.jsonl`` to the next; a checkpoint writes one too.
        evaluate_every: steps from one call of the evaluation hook to the next; 0 for at the end only.
    """

    steps: int | None = None
    epochs: float | None = None
    epoch_images: int = 1_280_000
    batch_size: int = 256
    grad_accumulation: int = 1
    lr: float = 5e-4
    lr_scaling: LrScaling = "linear"
    min_lr: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float | None = 3.0
    clipping: Clipping = "per_parameter"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        positive = ("epoch_images", "batch_size", "grad_accumulation", "save_every", "keep", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.total_steps < 1:
            raise ValueError("the run must have at least one step")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"warmup_steps must be less than the run's {self.total_steps} steps")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of grad_accumulation")

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return max(1, self.epoch_images // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.steps if self.steps is not None else round((self.epochs or 0) * self.epoch_steps)


class Batch(Protocol):
    """What a stream gives for one step."""

    @property
    def images(self) -> np.ndarray:
        """Tiles, uint8 [B, H, W, 3]."""
        ...


class Stream(Protocol):
    """Endless batches; batch k is the same however the stream came to it."""

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches of the steps from ``start_step`` on."""
        ...

    def state(self) -> Mapping[str, list[int]]:
        """What the batches depend on beside their number, as JSON holds it; kept in checkpoints."""
        ...

    def restore(self, state: Mapping[str, list[int]]) -> None:
        """Takes up the state of the run before."""
        ...


class Method(Protocol):
    """What is learnt: an ``nn.Module`` that turns tiles into views and views into a loss."""

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Views [B, …] of tiles uint8 [B, H, W, 3]; all randomness from ``generator``, which is on the CPU."""
        ...

    def lr_scales(self) -> Mapping[str, float]:
        """Factors of the learning rate by name of parameter; 1 for those that are not named."""
        ...

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and scalars for the log."""
        ...

    def after_backward(self, clock: Clock) -> None:
        """May change gradients, before they are clipped."""
        ...

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Moves what follows the weights; must change nothing if ``finite`` (bool scalar) is false."""
        ...

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Values that change with the step, for the log."""
        ...

    def export(self, folder: Path) -> None:
        """Writes what the run was for."""
        ...

    def to(self, device: Any, /) -> Any:
        """As ``nn.Module``; so are the others."""
        ...

    def train(self, mode: bool = True) -> Any:  # noqa: D102
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:  # noqa: D102
        ...

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:  # noqa: D102
        ...


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        out: the run's folder.
        step: steps finished.
        steps: steps of the whole run.
        preempted: a signal stopped it; resuming goes on.
        encoder: folder of what was exported; None if the run is not complete.
        metrics: last line of ``metrics.jsonl``.
    """

    out: Path
    step: int
    steps: int
    preempted: bool
    encoder: Path | None
    metrics: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """All steps are done, and ``encoder`` is there."""
        return self.encoder is not None


def fit(
    method: Method,
    stream: Stream,
    options: FitOptions,
    out: str | Path,
    *,
    resume: bool = False,
    identity: str = "",
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Trains ``method`` on ``stream``; writes ``metrics.jsonl``, ``checkpoints/`` and, at the end, ``encoder/``.

    A step whose loss or gradient is not finite is left out: weights, optimiser, teacher and centre stay as they are,
    and the third in a row ends the run. On SIGTERM, SIGINT or SIGUSR2 the run finishes its step, saves and returns.

    Args:
        method: what to learn; trained in place.
        stream: of tiles, in batches of ``options.batch_size``.
        options: of the run.
        out: folder of the run.
        resume: go on from the last checkpoint in ``out``; a run that is complete returns at once.
        identity: of the run, such as the recipe's name and hash; a checkpoint with another one is refused.
        evaluate: called with the steps finished; what it returns joins ``metrics.jsonl``. It must leave the weights.
        progress: told of every step.

    Raises:
        RunError: ``out`` holds a run and ``resume`` is false, or the run of another ``identity``; a checkpoint cannot
            be written or read; the stream ends or gives other batches; three steps in a row were not finite.
    """
    out, device, steps = Path(out), torch.device(options.device), options.total_steps
    last = _find_run(out, resume, identity)
    metrics = MetricsFile(out / "metrics.jsonl", last.step if last else 0)
    encoder = out / "encoder"
    if last and last.step >= steps and encoder.is_dir():
        return FitResult(out, last.step, steps, False, encoder, metrics.last)

    with checkpoints.own_random_state(options.seed, device), Interrupts() as interrupts:
        # model and optimiser
        method.to(device)
        method.train()
        parameters = dict(method.named_parameters())
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        optimizer = adamw(parameters.items(), method.lr_scales())
        lr_peak = scaled_lr(options.lr, options.batch_size, options.lr_scaling)

        # resume
        first = 0
        if last:
            _load(last, method, optimizer, names)
            first = last.step
            stream.restore(last.stream)
            log.info("resuming %s at step %d of %d", out, first, steps)

        meter = Meter(device)
        batches = stream.batches(first)
        for step in range(first, steps):
            clock = Clock(step, steps, options.epoch_steps)
            torch.manual_seed(torch_seed(options.seed, "model", step))
            lr = cosine(clock, lr_peak, options.min_lr, warmup_steps=options.warmup_steps)
            weight_decay = cosine(clock, options.weight_decay, options.weight_decay_end)
            set_rates(optimizer, lr, weight_decay)

            # views
            with meter.waiting():
                images = _next_images(batches, options.batch_size, step).to(device, non_blocking=True)
            views = method.views(images, torch.Generator().manual_seed(torch_seed(options.seed, "views", step)), clock)

            # loss and backward
            optimizer.zero_grad(set_to_none=True)
            parts = []
            for micro in zip(*(view.chunk(options.grad_accumulation) for view in views), strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                    loss, facts = method.loss(micro, clock)
                (loss / options.grad_accumulation).backward()
                parts.append({"loss": loss.detach(), **facts})
            values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

            # clip, step, moving averages
            method.after_backward(clock)
            values["grad_norm"] = clip_gradients(parameters.values(), options.clip, options.clipping)
            finite = torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"])
            step_if(optimizer, finite)
            method.after_step(clock, finite)
            meter.add(values, finite, len(images))

            # log, evaluate, save
            done = step + 1
            stopping = interrupts.seen is not None and done < steps
            saving = stopping or _due(done, steps, options.save_every)
            evaluating = evaluate is not None and _due(done, steps, options.evaluate_every)
            logging = saving or evaluating or _due(done, steps, options.log_every)
            if logging or device.type == "cpu":  # a GPU need not wait for the host in between
                _check_finite(meter, out, step, lr, parameters)
            if logging:
                line = {"step": done, "lr": lr, "wd": weight_decay, **method.schedule(clock), **meter.read()}
                if evaluate and evaluating:
                    line |= evaluate(done)
                    method.train()
                metrics.write(line)
            if saving:
                groups = {"model": method.state_dict(), "optimizer": optimizer_tensors(optimizer, names)}
                checkpoints.save_checkpoint(
                    out / "checkpoints", done, groups, identity=identity, stream=stream.state(), keep=options.keep
                )
            progress("train", done, steps)
            if stopping:
                log.warning("%s: stopped by %s at step %d of %d", out, interrupts.seen, done, steps)
                return FitResult(out, done, steps, True, None, metrics.last)

        _export(method, encoder)
    return FitResult(out, steps, steps, False, encoder, metrics.last)


def _find_run(out: Path, resume: bool, identity: str) -> checkpoints.Checkpoint | None:
    """Last checkpoint of the run in ``out``, checked; None for a new run. Clears what a killed run left."""
    folder = out / "checkpoints"
    if not resume and (folder.exists() or (out / "metrics.jsonl").exists()):
        raise RunError(f"{out}: holds a run already; go on with it by --resume, or give another folder")
    last = checkpoints.latest_checkpoint(folder)
    if last:
        checkpoints.check_fits(last, identity)
    checkpoints.sweep(folder)
    return last


def _load(
    last: checkpoints.Checkpoint, method: Method, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> None:
    try:
        method.load_state_dict(last.tensors("model"))
        load_optimizer_tensors(optimizer, names, last.tensors("optimizer"))
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{last.path}: does not fit the model that the recipe describes: {error}") from error
    checkpoints.set_random_state(last.random)


def _next_images(batches: Iterator[Batch], batch_size: int, step: int) -> Tensor:
    batch = next(batches, None)
    if batch is None:
        raise RunError(f"the stream of tiles has ended at step {step}; it must be endless")
    images = batch.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != batch_size or images.shape[3] != 3:
        raise RunError(
            f"step {step}: the stream gives {images.dtype} {list(images.shape)}, "
            f"the run needs uint8 [{batch_size}, H, W, 3]; make both with one batch size"
        )
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _export(method: Method, folder: Path) -> None:
    """Writes the export whole or not at all, as its presence tells that the run is complete."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    method.export(temporary)
    temporary.rename(folder)


def _due(done: int, steps: int, every: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _check_finite(meter: Meter, out: Path, step: int, lr: float, parameters: Mapping[str, nn.Parameter]) -> None:
    if int(meter.bad_in_a_row) < _PATIENCE:
        return
    bad = [name for name, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    last = checkpoints.latest_checkpoint(out / "checkpoints")
    values = ", ".join(f"{name} {value:g}" for name, value in meter.latest().items())
    raise RunError(
        f"{out}: loss or gradient was not finite in {_PATIENCE} steps in a row up to step {step} ({values}, lr {lr:g}, "
        f"gradients of {len(bad)} parameters{', such as ' + bad[0] if bad else ''}). None of them changed a weight. "
        f"{'The last checkpoint is ' + last.path.name if last else 'There is no checkpoint yet'}; "
        "try a lower fit.lr or fit.clip, or precision fp32"
    )

"""The one training loop.

A run is a pure function of its options, its method and its stream: every random draw of step k comes from the seed and
k. So a run that is killed and resumed ends with the weights and evaluations of one that was not, bit for bit, on the
same machine, PyTorch and number of threads (a GPU's own nondeterminism aside).
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigatome.core.errors import ConfigError, RunError
from gigatome.core.logs import Progress, log, silent
from gigatome.core.seeding import torch_seed
from gigatome.distributed import SequenceGroup, mean_over_ranks, rank, sequence_group, world_size
from gigatome.encoders.vit import unfuse_attention
from gigatome.training import checkpoint as checkpoints
from gigatome.training.bookkeeping import Books, is_due
from gigatome.training.flops import FlopCounter, speed
from gigatome.training.interrupts import Interrupts
from gigatome.training.launch import PATIENT, Control, own_device
from gigatome.training.method import Batch, HostImages, Method, Stream, Undecayed
from gigatome.training.optim import clip_gradients, make_optimizer, scaled_lr, set_rates, step_if
from gigatome.training.options import FitOptions
from gigatome.training.parallel import Parallel
from gigatome.training.random_state import own_random_state, seed_all
from gigatome.training.record import Meter, MetricsFile, Sink
from gigatome.training.running_statistics import RunningStatistics
from gigatome.training.schedules import Clock, cosine

__all__ = ["Batch", "FitOptions", "FitResult", "Method", "Stream", "fit"]


_PATIENCE = 3  # steps in a row that may be without a finite loss and gradient


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        out: the run's folder.
        step: steps finished.
        steps: steps of the whole run.
        preempted: a signal stopped it; resuming goes on.
        encoder: folder of what was exported; None if the run is not complete.
        metrics: last line of ``metrics.jsonl``; empty in all processes but the first.
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
    group: SequenceGroup | None = None,
    evaluate: Callable[[int], Mapping[str, Any]] | None = None,
    sinks: Sequence[Sink] = (),
    progress: Progress = silent,
) -> FitResult:
    """Trains ``method`` on ``stream``; writes ``metrics.jsonl``, ``checkpoints/`` and, at the end, ``encoder/``.

    A step whose loss or gradient is not finite, in any process, is left out in all: weights, optimiser, teacher and
    centre stay as they are, and the third in a row ends the run. On SIGTERM, SIGINT or SIGUSR2, to any process, all
    finish the step, or its evaluation, save and return. A step is saved before it is evaluated; an evaluation that was
    cut short, or put off as the run was stopping, is made up when it goes on.

    Where torchrun has started several processes, call it in all of them, within
    :func:`gigatome.training.launch.launched`; ``out`` must be one folder for all. Those of a ``group`` work on the same
    batch, of whose images each may hold a part, and draw the same random numbers; the method has them tell each other
    what they need. If a process is gone, the others end with its number.

    Args:
        method: what to learn; trained in place.
        stream: of what this process learns from, in batches of ``options.batch_size`` / processes, or / groups.
        options: of the run.
        out: folder of the run.
        resume: go on from the last checkpoint in ``out``; a run that is complete returns at once.
        identity: of the run, such as the recipe's name and hash; a checkpoint with another one is refused.
        group: processes that share what each of them learns from, of :func:`gigatome.distributed.sequence_group`;
            None if each learns from its own.
        evaluate: called with the steps finished, in every process; what it returns in the first joins
            ``metrics.jsonl``. It must leave the weights, and draw from the global random generators only. It may take
            one process hours longer than another: ``fit`` waits. Where they meet within it after uneven work, that must
            be by a ``Control(PATIENT)`` of the caller's, as other groups of processes give up after ten minutes.
        sinks: other places for the lines of ``metrics.jsonl``, in the first process.
        progress: told of every step.

    Raises:
        ConfigError: the batch cannot be cut so, or weights are sharded over processes that share sequences.
        RunError: ``out`` holds a run and ``resume`` is false, or the run of another ``identity`` or number of
            processes; a checkpoint cannot be written or read; the stream ends or gives other batches; three steps in
            a row were not finite; another process does not answer.
    """
    out, device, steps = Path(out), own_device(options.device), options.total_steps
    group = group or sequence_group(1)
    if group.size > 1 and options.parallel == "fsdp":
        raise ConfigError("fit.parallel fsdp is not for processes that share sequences; use ddp")
    share = options.share(group.sequences)
    patient, control = Control(PATIENT), Control()  # between steps, whose work may be uneven, and within one
    last = patient.together(partial(_find_run, out, resume, identity))
    if len(set(control.gather(last.step if last else 0))) > 1:
        raise RunError(f"{out}: the processes do not see the same checkpoints there; give a folder that all share")
    patient.on_first(partial(checkpoints.sweep, out / "checkpoints"))
    record = out / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
    metrics = MetricsFile(record, last.step if last else 0, sinks)
    encoder = out / "encoder"
    if last and last.step >= steps and encoder.is_dir():
        return FitResult(out, last.step, steps, False, encoder, metrics.last)

    with own_random_state(options.seed, device), Interrupts() as interrupts:
        # model, resume, optimiser
        first = last.step if last else 0
        if last:
            log.info("resuming %s at step %d of %d", out, first, steps)
            _restore(last, method, stream)
        method.train()
        if device.type == "cpu" and options.precision == "bf16":
            unfuse_attention(method)  # pyright: ignore[reportArgumentType]
        parallel = Parallel(method, device, options.parallel, compiled=options.compile)
        optimizer = make_optimizer(
            options.optimizer, parallel.parameters.items(), method.lr_scales(), options.momentum,
            undecayed=method.undecayed() if isinstance(method, Undecayed) else (), sharded=parallel.sharded,
        )  # fmt: skip
        if last:
            parallel.load_optimizer(optimizer, last)
        statistics = RunningStatistics(method)
        lr_peak = scaled_lr(options.lr, options.batch_size, options.lr_scaling)
        meter, flops = Meter(device), FlopCounter(last.flops if last else {})
        books = Books(
            out, options, identity, group, method, parallel, optimizer, stream, flops, metrics, evaluate, patient,
            interrupts,
        )  # fmt: skip
        if last and not books.make_up(last):
            return FitResult(out, first, steps, True, None, metrics.last)

        batches = stream.batches(first)
        for step in range(first, steps):
            clock = Clock(step, steps, options.epoch_steps)
            seed_all(torch_seed(options.seed, "model", step, group.sequence))
            lr = cosine(clock, lr_peak, options.min_lr, warmup_steps=options.warmup)
            weight_decay = cosine(clock, options.weight_decay, options.weight_decay_end)
            set_rates(optimizer, lr, weight_decay)

            # views
            with meter.waiting():
                images = _next_images(batches, share, step)
            if not isinstance(method, HostImages):
                images = images.to(device, non_blocking=True)
            random = torch.Generator().manual_seed(torch_seed(options.seed, "views", step, group.sequence))
            views = method.views(images, random, clock)

            # loss and backward
            parallel.clear()
            statistics.remember()
            parts = []
            micros = list(zip(*(view.chunk(options.grad_accumulation) for view in views), strict=True))
            with flops.counting(views):
                for micro in micros:
                    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                        loss, facts = method.loss(micro, clock)
                    with parallel.backward(last=micro is micros[-1]):
                        (loss / len(micros)).backward()
                    parts.append({"loss": loss.detach(), **facts})
            own = torch.stack([torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]])
            values = dict(zip(parts[0], mean_over_ranks(own).unbind(), strict=True))

            # clip, step, moving averages
            method.after_backward(clock)
            gradients = parallel.gradients()
            values["grad_norm"] = clip_gradients(gradients, options.clip, options.clipping, sharded=parallel.sharded)
            finite = torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"])
            step_if(optimizer, finite)
            statistics.settle(finite)
            method.after_step(clock, finite)
            meter.add(values, finite, options.batch_size)

            # log, save, evaluate
            done = step + 1
            stopping = control.any(interrupts.seen is not None) and (done < steps or books.evaluates(done))
            saving = stopping or is_due(done, steps, options.save_every)
            logging = saving or books.evaluates(done) or is_due(done, steps, options.log_every)
            if logging or device.type == "cpu":  # a GPU need not wait for the host in between
                _check_finite(meter, out, step, lr, parallel, own, control)
            if logging:
                line = {"step": done, "lr": lr, "wd": weight_decay, **method.schedule(clock), **meter.read()}
                line |= speed(line, flops.of(views), options.batch_size, device, options.precision)
                stopping = books.close(done, line, saving=saving, stopping=stopping)
            progress("train", done, steps)
            if stopping:
                seen = interrupts.seen or "a signal to another process"
                log.warning("%s: stopped by %s at step %d of %d", out, seen, done, steps)
                return FitResult(out, done, steps, True, None, metrics.last)

        plain = parallel.plain()
        patient.on_first(partial(_export, plain, encoder))
    return FitResult(out, steps, steps, False, encoder, metrics.last)


def _find_run(out: Path, resume: bool, identity: str) -> checkpoints.Checkpoint | None:
    """Last checkpoint of the run in ``out``, checked; None for a new run."""
    folder = out / "checkpoints"
    if not resume and (folder.exists() or (out / "metrics.jsonl").exists()):
        raise RunError(f"{out}: holds a run already; go on with it by --resume, or give another folder")
    last = checkpoints.latest_checkpoint(folder)
    if last:
        checkpoints.check_fits(last, identity, world_size())
    return last


def _restore(last: checkpoints.Checkpoint, method: Method, stream: Stream) -> None:
    try:
        method.load_state_dict(last.tensors("model"))
    except (RuntimeError, KeyError) as error:
        raise last.misfit(error) from error
    stream.restore(last.streams[rank()])


def _next_images(batches: Iterator[Batch], share: int, step: int) -> Tensor:
    batch = next(batches, None)
    if batch is None:
        raise RunError(f"the stream has ended at step {step}; it must be endless")
    images = batch.images
    if len(images) != share:
        raise RunError(
            f"step {step}: the stream gives {images.dtype} {list(images.shape)}, the run needs [{share}, …]; "
            "make both with one batch size"
        )
    return images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _export(method: Method, folder: Path) -> None:
    """Writes the export whole or not at all, as its presence tells that the run is complete."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    method.export(temporary)
    temporary.rename(folder)


def _check_finite(
    meter: Meter, out: Path, step: int, lr: float, parallel: Parallel, own: Tensor, control: Control
) -> None:
    if int(meter.bad_in_a_row) < _PATIENCE:
        return
    gradients = {name: p.grad for name, p in parallel.parameters.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    ranks = [str(number) for number, fine in enumerate(control.gather(bool(torch.isfinite(own).all()))) if not fine]
    last = checkpoints.latest_checkpoint(out / "checkpoints")
    values = ", ".join(f"{name} {value:g}" for name, value in meter.latest().items())
    raise RunError(
        f"{out}: loss or gradient was not finite in {_PATIENCE} steps in a row up to step {step} ({values}, lr {lr:g}, "
        f"gradients of {len(bad)} parameters{', such as ' + bad[0] if bad else ''}"
        f"{', loss of process ' + ' and '.join(ranks) if ranks and world_size() > 1 else ''}). None of them changed a "
        f"weight. {'The last checkpoint is ' + last.path.name if last else 'There is no checkpoint yet'}; "
        "try a lower fit.lr or fit.clip, or precision fp32"
    )

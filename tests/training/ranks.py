"""Runs of several processes over gloo: each scenario forks them, and prints as JSON what they have to say.

Run as a script in a process of its own, in which nothing but imports has happened before anything is forked.
"""

import ctypes
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_run import ENCODER, FIT, VIEWS, TinyStream, digest, make_dino, saving, slow_disk, wait_for_moment
from torch import nn

from gigatome.core.errors import GigatomeError, RunError
from gigatome.distributed import gather, gather_with_gradient, mean_over_ranks, rank, sum_over_ranks, world_size
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.dinov2 import Dinov2, Dinov2Options
from gigatome.selfsup.moco import Moco, MocoOptions
from gigatome.training import launch, parallel
from gigatome.training.checkpoint import latest_checkpoint, read_checkpoint
from gigatome.training.launch import _die_with_parent as die_with_parent
from gigatome.training.launch import first_process_first, launched
from gigatome.training.loop import fit
from gigatome.training.optim import update_average


def together(action: Callable[[], Any], processes: int = 2) -> list[Any]:
    """What ``action`` returns in each of so many processes, or the message of the error it raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children, parent = [os.pipe() for _ in range(processes)], [], os.getpid()
    for number in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            die_with_parent()
            _answer(action if os.getppid() == parent else os.abort, pipes[number][1])
        children.append(child)
    answers = []
    for child, (read, write) in zip(children, pipes, strict=True):
        os.close(write)
        with os.fdopen(read) as handle:
            answers.append(json.loads(handle.read() or '"killed"'))
        os.waitpid(child, 0)
    return answers


def _answer(action: Callable[[], Any], pipe: int) -> None:
    try:
        with launched("cpu"):
            answer = action()
    except GigatomeError as error:
        answer = str(error)
    except BaseException:
        traceback.print_exc()
        answer = "crashed"
    os.write(pipe, json.dumps(answer).encode())
    os._exit(0)


class StopError(GigatomeError):
    """Ends a run from within."""


def stop_after(step: int):
    def progress(stage, done, total):
        if done == step:
            raise StopError("stopped")

    return progress


def run(out: Path, options=FIT, method=None, **arguments) -> Callable[[], Any]:
    """A run, which answers how it ended."""

    def action():
        result = fit(method() if method else make_dino(), TinyStream(), options, out, identity="tiny", **arguments)
        return {"step": result.step, "finished": result.finished, "metrics": dict(result.metrics)}

    return action


def weights(out: Path, step: int = FIT.total_steps) -> str:
    last = read_checkpoint(out / "checkpoints" / f"step-{step:06d}")
    return digest({**last.tensors("model"), **last.tensors("optimizer")})


# Scenarios


def resume(out: Path, mode: str) -> Any:
    """Runs that are stopped and go on, with a hook that calls a part of a network."""
    precision = "bf16" if mode == "fsdp" else "fp32"
    options = replace(FIT, parallel=mode, grad_accumulation=2, precision=precision)

    def start(folder, **arguments):
        def action():
            dino = make_dino()

            def evaluate(step):
                with torch.no_grad():
                    return {"embedding": float(dino.teacher.encoder(torch.ones(1, 3, 32, 32)).norm())}

            return run(folder, options, lambda: dino, evaluate=evaluate, **arguments)()

        return together(action)

    whole, resumed = start(out / "whole"), []
    for step in (2, 5) if mode == "ddp" else (5,):
        stopped = start(out / str(step), progress=stop_after(step))
        resumed.append((stopped, start(out / str(step), resume=True), weights(out / str(step))))
    return whole, weights(out / "whole"), resumed


def stop_by_signal(out: Path, mode: str) -> Any:
    """A signal to the second process only."""
    options = replace(FIT, parallel=mode)

    def kill(stage, done, total):
        if done == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    stopped = together(run(out / "stopped", options, progress=kill))
    ended = together(run(out / "stopped", options, resume=True))
    together(run(out / "whole", options))
    return stopped, ended, weights(out / "stopped") == weights(out / "whole")


def poisoned(steps: set[int]):
    """A method whose loss is not a number in the second process in some steps."""
    dino = make_dino()
    honest = dino.loss

    def loss(views, clock):
        value, facts = honest(views, clock)
        return value * float("nan") if clock.step in steps and rank() == 1 else value, facts

    dino.loss = loss
    return dino


def not_finite(out: Path, mode: str) -> Any:
    options = replace(FIT, parallel=mode, save_every=1, keep=99, log_every=1)
    together(run(out / "left out", options, lambda: poisoned({4, 6, 7})))
    hashes = [weights(out / "left out", step) for step in range(1, 9)]
    return hashes, together(run(out / "ended", options, lambda: poisoned({2, 3, 4})))


def killed(out: Path, kills: int, steps: int) -> Any:
    """Two processes whose launcher is killed at random moments, half of them inside a save, until they finish.

    Returns:
        Kills, kills that left an unfinished checkpoint, and whether the weights are those of a run that was let be.
    """
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process, to be waited for
    random.seed(0)
    options = replace(FIT, steps=steps, save_every=2)
    count = inside = 0
    while count < kills:
        launcher = os.fork()
        if launcher == 0:
            slow_disk()
            answers = together(run(out / "killed", options, resume=True))
            os._exit(0 if all(isinstance(answer, dict) for answer in answers) else 1)
        wait_for_moment(launcher, out / "killed" / "checkpoints", inside_save=2 * inside < count + 3, longest=0.6)
        os.kill(launcher, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(launcher, 0)[1]):
            break  # finished, and with fewer kills than wanted
        while True:  # the launcher's processes
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        count += 1
        inside += saving(out / "killed" / "checkpoints")
    ended = together(run(out / "killed", options, resume=True))
    together(run(out / "whole", options))
    return count, inside, ended, weights(out / "killed", steps) == weights(out / "whole", steps)


class Regression(nn.Module):
    """Learns a sum of pixels, with batch norm, a parameter of no use and a moving average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = (
            nn.Sequential(nn.Linear(48, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)))
            for _ in range(2)
        )
        self.student.register_parameter("idle", nn.Parameter(torch.ones(3)))
        self.teacher.register_parameter("idle", nn.Parameter(torch.ones(3)))
        self.teacher.requires_grad_(False)

    def trained(self):
        return self.student

    def lr_scales(self):
        return {"student.0.bias": 0.5}

    def views(self, images, generator, clock):
        return [images[:, ::10, ::10].flatten(1).float() / 255]

    def loss(self, views, clock):
        (pixels,) = views
        return (self.student(pixels) - pixels.sum(1, keepdim=True)).square().mean(), {}

    def after_backward(self, clock): ...

    def after_step(self, clock, finite):
        update_average(list(self.teacher.parameters()), list(self.student.parameters()), 0.9, finite)

    def schedule(self, clock):
        return {}

    def export(self, folder):
        folder.mkdir()


def other_methods(out: Path) -> Any:
    """Whether a run of each other method, in two processes, resumes to the same weights."""
    two = replace(VIEWS, local_views=0)
    resnet = EncoderConfig(model="resnet18", image_size=32)
    small = {"out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
    methods = {
        "dinov2": lambda: Dinov2(ENCODER, Dinov2Options(views=VIEWS, **small)),
        "moco_v2": lambda: Moco(resnet, MocoOptions(version="v2", queue=8, views=two)),
        "moco_v3": lambda: Moco(ENCODER, MocoOptions(version="v3", views=two)),
    }
    same = {}
    for (name, method), mode in itertools.product(methods.items(), ("ddp", "fsdp")):
        options, folder = replace(FIT, parallel=mode, steps=4, lr=0.001), out / name / mode
        together(run(folder / "whole", options, method))
        together(run(folder / "stopped", options, method, progress=stop_after(3)))
        together(run(folder / "stopped", options, method, resume=True))
        same[f"{name} {mode}"] = weights(folder / "whole", 4) == weights(folder / "stopped", 4)
    return same


def same_as_one(out: Path) -> Any:
    """Largest differences of weights between one process and two, for each optimiser."""
    parallel._BUCKET = 100  # bytes: several buckets
    for optimizer in ("adamw", "lars"):
        options = replace(FIT, optimizer=optimizer, lr=0.5, weight_decay=0.1, clip=0.5, clipping="global")
        runs = {
            "one": (1, options),
            "ddp": (2, replace(options, grad_accumulation=2)),
            "fsdp": (2, replace(options, parallel="fsdp", grad_accumulation=2)),
        }
        for name, (processes, chosen) in runs.items():
            together(run(out / optimizer / name, chosen, Regression), processes)
    return together(partial(differences, out), 1)[0]  # in a child: what is forked after tensors were used may abort


def differences(out: Path) -> Any:
    """Between the runs of each optimiser."""
    told = {}
    for optimizer in ("adamw", "lars"):
        last = {name: latest_checkpoint(out / optimizer / name / "checkpoints") for name in ("one", "ddp", "fsdp")}
        found = {name: (it.tensors("model"), it.tensors("optimizer")) for name, it in last.items()}
        begin = Regression().state_dict()
        told[optimizer] = {
            "moved": min(
                float((begin[name] - found["one"][0][name]).abs().max()) for name in begin if "idle" not in name
            ),
            **{
                mode: max(
                    float((found[mode][group][name] - value).abs().max())
                    for group in (0, 1)
                    for name, value in found["one"][group].items()
                    if "idle" not in name
                )
                for mode in ("ddp", "fsdp")
            },
        }
    return told


class Normed(Regression):
    """With batch norm, which remembers."""

    def __init__(self):
        super().__init__()
        self.student.append(nn.BatchNorm1d(1))
        self.poison: set[int] = set()

    def loss(self, views, clock):
        value, facts = super().loss(
            [view * float("nan") for view in views] if clock.step in self.poison else views, clock
        )
        return value, facts

    def after_step(self, clock, finite): ...


def batch_norm(out: Path) -> Any:
    def action():
        method = Normed()
        method.poison = {2} if rank() == 1 else set()
        fit(method, TinyStream(), replace(FIT, steps=4), out)
        return [float(buffer) for buffer in method.student[3].buffers()]

    return together(action)


def refusals(out: Path) -> Any:
    """What a run of several processes refuses, in each of them."""

    class Forgetful(Regression):
        def after_step(self, clock, finite):
            self.teacher[0].bias += rank()

    def fail_first():
        with first_process_first():
            if rank() == 0:
                raise RunError("no tissue")

    together(run(out / "two"))
    (out / "file").write_text("a file where the folder should be")
    return {
        "world": together(run(out / "two", replace(FIT, steps=9), resume=True), 1),
        "again": together(run(out / "two")),
        "file": together(run(out / "file")),
        "forgetful": together(run(out / "forgetful", method=Forgetful)),
        "indivisible": together(run(out / "indivisible", replace(FIT, grad_accumulation=4))),
        "first": together(fail_first),
    }


def primitives(out: Path) -> Any:
    """What processes tell each other."""

    def action():
        mine = torch.arange(4.0).view(2, 2) + 10 * rank()
        learnt = mine.clone().requires_grad_()
        weights = torch.arange(8.0).view(4, 2) * (1 + rank())
        (gather_with_gradient(learnt) * weights).sum().backward()
        return [
            world_size(), mean_over_ranks(mine).tolist(), sum_over_ranks(mine).tolist(), gather(mine).tolist(),
            learnt.grad.tolist(),
        ]  # fmt: skip

    return together(action)


def stalled(out: Path) -> Any:
    """The second process stops answering: what the first one does, and how the run goes on."""
    launch._TIMEOUT = timedelta(seconds=2)

    def hang(stage, done, total):
        if done == 5 and rank() == 1:
            time.sleep(20)

    stopped = together(run(out, progress=hang))
    launch._TIMEOUT = timedelta(minutes=1)
    ended = together(run(out, resume=True))
    together(run(out / "whole"))
    return stopped, ended, weights(out) == weights(out / "whole")


SCENARIOS = {
    **{f"{mode}_resume": partial(resume, mode=mode) for mode in ("ddp", "fsdp")},
    **{f"{mode}_signal": partial(stop_by_signal, mode=mode) for mode in ("ddp", "fsdp")},
    **{f"{mode}_not_finite": partial(not_finite, mode=mode) for mode in ("ddp", "fsdp")},
    "killed": partial(killed, kills=2, steps=30),
    "killed_often": partial(killed, kills=20, steps=200),
    **{
        function.__name__: function
        for function in (same_as_one, batch_norm, refusals, primitives, other_methods, stalled)
    },
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    told = {}
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        told[name] = SCENARIOS[name](folder)
    print(json.dumps(told))

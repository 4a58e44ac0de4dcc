"""A run small enough for tests, in this process or killed over and over in children of its own."""

import argparse
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gigatome.core.seeding import generator
from gigatome.distributed import rank, world_size
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training import checkpoint
from gigatome.training.loop import FitOptions, fit

ENCODER = EncoderConfig(image_size=32, patch_size=8, dim=32, depth=2, heads=2)
VIEWS = ViewOptions(global_size=32, local_size=16, local_views=2)
DINO = DinoOptions(views=VIEWS, out_dim=48, head_hidden_dim=32, head_bottleneck_dim=16, drop_path=0.2)
FIT = FitOptions(steps=8, epoch_images=12, batch_size=4, lr=0.05, warmup_steps=2, save_every=3, log_every=2, keep=2)


@dataclass(frozen=True)
class TinyBatch:
    images: np.ndarray


@dataclass(frozen=True)
class TinyStream:
    """Coloured waves; batch k is a pure function of k, of which each process gets its part."""

    batch_size: int = 4
    size: int = 40
    end: int | None = None

    def state(self):
        return {"of process": [rank()]}

    def restore(self, state):
        assert state == self.state()

    def batches(self, start_step: int = 0) -> Iterator[TinyBatch]:
        y, x = np.mgrid[: self.size, : self.size] / self.size
        share, step = self.batch_size // world_size(), start_step
        mine = slice(rank() * share, (rank() + 1) * share)
        while self.end is None or step < self.end:
            random = generator(7, "tiny", step)
            frequency, phase = random.uniform(2, 30, (2, self.batch_size, 1, 1, 3))
            waves = np.sin(frequency * x[..., None] + frequency[..., ::-1] * y[..., None] + phase)
            yield TinyBatch((waves[mine] * 127 + 128).astype(np.uint8))
            step += 1


def make_dino(options: DinoOptions = DINO, seed: int = 3) -> Dino:
    return Dino(ENCODER, options, seed=seed, name="tiny")


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(out: Path, options: FitOptions = FIT, **arguments) -> str:
    """Runs or resumes, and returns the weights' digest."""
    method = make_dino()
    fit(method, TinyStream(), options, out, identity="tiny", **arguments)
    return digest(method.state_dict())


def killed_often(out: Path, options: FitOptions, kills: int, seed: int) -> int:
    """Runs in children that are killed at random moments, at least half of them inside a save, until one finishes.

    Returns:
        How many kills left an unfinished checkpoint behind. Nothing but imports has run here before a child is forked.
    """
    random.seed(seed)
    inside = 0
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            slow_disk()
            run(out, options, resume=True)
            os._exit(0)
        if kill < kills:
            wait_for_moment(child, out / "checkpoints", inside_save=kill % 2 == 0, longest=0.5)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                sys.exit("a child has failed")
            break
        inside += saving(out / "checkpoints")
    return inside


def slow_disk() -> None:
    """Makes saves slow enough to be killed in the middle of one."""
    sync = checkpoint._sync

    def slowly(path: Path) -> None:
        time.sleep(0.02)
        sync(path)

    checkpoint._sync = slowly


def saving(folder: Path) -> bool:
    """Whether a checkpoint later than all whole ones is unfinished; an old one that is being removed does not count."""
    newest = max((path.name for path in folder.glob("step-*")), default="")
    return any(path.name.removeprefix(".tmp-") > newest for path in folder.glob(".tmp-*"))


def wait_for_moment(child: int, folder: Path, *, inside_save: bool, longest: float) -> None:
    """Waits for a random moment: of the second save from now, or of any step."""
    if not inside_save:
        time.sleep(random.uniform(0.02, longest))
        return
    before, deadline = set(folder.glob("step-*")), time.monotonic() + 30
    while time.monotonic() < deadline and not (set(folder.glob("step-*")) - before and saving(folder)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.04))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = FitOptions(
        steps=arguments.steps, epoch_images=12, batch_size=4, lr=0.05, warmup_steps=2, save_every=2, log_every=2, keep=2
    )
    inside = killed_often(arguments.out / "killed", options, arguments.kills, arguments.seed)
    last = checkpoint.latest_checkpoint(arguments.out / "killed" / "checkpoints")
    killed = digest(last.tensors("model"))
    whole = run(arguments.out / "whole", options)
    print(inside, last.step, killed == whole, len(list((arguments.out / "killed" / "checkpoints").iterdir())))

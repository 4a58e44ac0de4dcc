"""Runs over gloo in which processes share sequences: forks them, and prints as JSON what they say.

Run as a script in a process of its own, in which nothing but imports has happened before anything is forked.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import stop_after, together, weights
from torch import Tensor, nn

from gigatome import distributed
from gigatome.core.seeding import generator
from gigatome.distributed import SequenceGroup, rank, sequence_group
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.longvit import LongVit, LongVitConfig
from gigatome.training.checkpoint import latest_checkpoint
from gigatome.training.loop import fit
from gigatome.training.options import FitOptions

SIDE, PATCH = 36, 4
CONFIG = LongVitConfig(
    patch_size=PATCH, dim=12, depth=2, heads=3, ffn_dim=20, grid=4, segments=(4, 20, 63), ratios=(1, 2, 3),
    norm="finetune",
)  # fmt: skip
FIT = FitOptions(
    steps=4, epoch_images=16, batch_size=8, grad_accumulation=2, lr=0.02, lr_scaling="none", warmup_steps=1,
    save_every=2, log_every=1,
)  # fmt: skip


class Slides(nn.Module):
    """Learns how bright an image's halves are, from this process's rows of it; in double precision."""

    def __init__(self, share: Share | None, drop_path: float):
        super().__init__()
        torch.manual_seed(0)
        made = LongVit(CONFIG, drop_path=drop_path, checkpointing="selective")
        self.model = nn.ModuleDict({"vit": made, "head": nn.Linear(CONFIG.dim, 2)}).double()
        self.share, self.drawn = share, []

    def trained(self):
        return self.model

    def lr_scales(self):
        return {}

    def undecayed(self):
        return ["model.vit.pos_embed"]

    def views(self, images, generator, clock):
        """The last row of pixels holds what is to be learnt, so that each process has it."""
        self.drawn.append(float(torch.rand(1, generator=generator)))
        pixels, target = images.split([images.shape[1] - 1, 1], 1)
        return [pixels, target[:, 0, :2, 0].double() / 255]

    def loss(self, views, clock):
        pixels, target = views
        found = self.model["head"](self.model["vit"](pixels, self.share))
        error = (found - target).square().mean()
        return error, {"error": error.detach()}

    def after_backward(self, clock): ...

    def after_step(self, clock, finite): ...

    def schedule(self, clock):
        return {}

    def export(self, folder):
        folder.mkdir()


@dataclass(frozen=True)
class Batch:
    images: np.ndarray | Tensor


@dataclass(frozen=True)
class Pictures:
    """Noise on halves of different brightness; batch k is a pure function of k, of which a process gets its rows."""

    group: SequenceGroup
    rows: range

    def state(self):
        return {}

    def restore(self, state): ...

    def batches(self, start_step: int = 0):
        step, share = start_step, FIT.batch_size // self.group.sequences
        mine = slice(self.group.sequence * share, (self.group.sequence + 1) * share)
        while True:
            random = generator(5, "pictures", step)
            bright = random.integers(0, 128, (FIT.batch_size, 1, 2, 1))
            noise = random.integers(0, 128, (FIT.batch_size, SIDE, SIDE, 3))
            images = (noise + bright.repeat(SIDE // 2, 2)).astype(np.uint8)
            target = np.zeros((FIT.batch_size, 1, SIDE, 3), np.uint8)
            target[:, 0, :2, 0] = bright[:, 0, :, 0]
            yield Batch(np.concatenate([images[:, self.rows], target], 1)[mine])
            step += 1


def run(out: Path, processes: int, sharing: int, options=FIT, drop_path=0.5, **arguments) -> list[Any]:
    """What the processes of a run, of which so many share each image, say at its end."""

    def action():
        group = sequence_group(sharing) if processes > 1 else None
        share = Share(group, SIDE // PATCH) if group is not None and group.size > 1 else None
        method = Slides(share, drop_path)
        own = range(SIDE // PATCH) if share is None else share.own
        stream = Pictures(group or SequenceGroup(), range(own.start * PATCH, own.stop * PATCH))
        result = fit(method, stream, options, out, identity="tiny", group=group, **arguments)
        return {"step": result.step, "metrics": dict(result.metrics), "drawn": method.drawn}

    return together(action, processes)


def difference(out: Path, other: Path) -> float:
    """The largest of weights and moments."""
    last = [latest_checkpoint(folder / "checkpoints") for folder in (out, other)]
    groups = [{**it.tensors("model"), **it.tensors("optimizer")} for it in last]
    assert groups[0].keys() == groups[1].keys()
    return max(float((value - groups[1][name]).abs().max()) for name, value in groups[0].items())


def same_as_one(out: Path) -> Any:
    """Differences of weights between runs, losses at their ends, and how far the weights have moved."""
    runs = {"one": (1, 1), "two share": (2, 2), "two": (2, 1), "two by two": (4, 2)}
    told = {name: run(out / name, *counts) for name, counts in runs.items()}
    told |= {f"still {name}": run(out / f"still {name}", *runs[name], drop_path=0.0) for name in ("one", "two by two")}
    flops = [sum(latest_checkpoint(out / name / "checkpoints").flops.values()) for name in ("one", "two share")]
    begin, end = Slides(None, 0.5).state_dict(), latest_checkpoint(out / "one" / "checkpoints").tensors("model")
    return {
        "two share": difference(out / "one", out / "two share"),
        "two by two": difference(out / "two", out / "two by two"),
        "still two by two": difference(out / "still one", out / "still two by two"),
        "dropped": difference(out / "one", out / "still one"),
        "moved": max(float((end[name] - value).abs().max()) for name, value in begin.items()),
        "losses": {name: answers[0]["metrics"]["loss"] for name, answers in told.items()},
        "drawn": {name: [answer["drawn"] for answer in answers] for name, answers in told.items()},
        "flops": flops[1] / flops[0],
    }


def resume(out: Path) -> Any:
    """Whether runs that were stopped, or of which a process has died, end as the one of two by two did."""
    stopped = run(out / "stopped", 4, 2, progress=stop_after(3))
    ended = run(out / "stopped", 4, 2, resume=True)
    distributed._LOOK, distributed._ROLL_CALL = timedelta(seconds=0.2), timedelta(seconds=1.5)

    def die(stage, done, total):
        if done == 3 and rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = run(out / "killed", 4, 2, progress=die)
    left = latest_checkpoint(out / "killed" / "checkpoints")
    names = sorted(path.name for path in (out / "killed" / "checkpoints").iterdir())
    again = run(out / "killed", 4, 2, resume=True)
    return {
        "steps": [[answer["step"] for answer in answers] for answers in (ended, again)],
        "stopped": stopped,
        "killed": killed,
        "left": [names, left.step],
        "same": [weights(out / name, FIT.total_steps) == weights(out / "two by two", FIT.total_steps)
                 for name in ("stopped", "killed")],
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({function.__name__: function(Path(sys.argv[1])) for function in (same_as_one, resume)}))

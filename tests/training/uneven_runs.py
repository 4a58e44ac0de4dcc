"""Runs over gloo whose processes do uneven work: forks them, and prints as JSON what they say.

Run as a script in a process of its own, in which nothing but imports has happened before anything is forked.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import together, weights
from tiny_run import FIT, TinyStream, make_dino

from gigatome import distributed
from gigatome.core.errors import GigatomeError
from gigatome.distributed import finish, rank
from gigatome.training import launch, loop
from gigatome.training.launch import PATIENT, Control
from gigatome.training.loop import fit

STEP = timedelta(seconds=4)  # in place of ten minutes
OPTIONS = replace(FIT, batch_size=6, steps=4, save_every=2, evaluate_every=2)


@contextlib.contextmanager
def leaving_last(out: Path, last: int) -> Iterator[None]:
    """Process 0, by which the others hear of each other, stays after a failure until process ``last`` has failed."""
    try:
        yield
    except GigatomeError:
        (out / f"failed {rank()}").touch()
        if rank() == 0:
            wait_for(out / f"failed {last}")
        raise


def run(out: Path, uneven: Callable[[], Any], **arguments) -> list[Any]:
    """What three processes say, which do something uneven at the end of their evaluation of step 2."""

    def action():
        dino, control = make_dino(), Control(PATIENT)

        def evaluate(step):
            drawn = control.gather(float(torch.rand(1)))
            if step == 2:
                uneven()
            return {"drawn": drawn}

        with leaving_last(out, 2):
            stream = TinyStream(batch_size=6)
            result = fit(dino, stream, OPTIONS, out, identity="tiny", evaluate=evaluate, **arguments)
        return {"step": result.step, "finished": result.finished}

    return together(action, 3)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def figures(out: Path) -> Any:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["drawn"]) for line in lines if "drawn" in line], weights(out, 4)


def patient(out: Path) -> Any:
    """One process works for longer than another is waited for in a step."""
    return run(out, lambda: time.sleep(1.5 * STEP.total_seconds() * (rank() == 1))), figures(out)


def killed(out: Path) -> Any:
    """One process dies while another is at work, and stays so until the third has noticed; then the run goes on."""

    def uneven():
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank() == 2:
            wait_for(out / "failed 0")
            (out / "was at work").touch()

    said, at_work = run(out, uneven), (out / "was at work").exists()
    return said, at_work, run(out, lambda: None, resume=True), figures(out)


def waited(out: Path, late: Callable[[], Any]) -> list[Any]:
    """What two processes say when the second does something before it comes."""

    def action():
        control = Control(timedelta(seconds=2))
        if rank() == 1:
            late()
        with leaving_last(out, 1):
            return control.gather(rank())

    return together(action)


def late(out: Path) -> Any:
    """It comes after the other has given up, and hears of that."""

    def come():
        deadline = time.monotonic() + 60
        while not distributed._store().check([distributed._FAILED]) and time.monotonic() < deadline:
            time.sleep(0.05)

    distributed._ROLL_CALL, usual = timedelta(seconds=30), distributed._ROLL_CALL
    answers = waited(out, come)
    distributed._ROLL_CALL = usual
    return answers


def stuck(out: Path) -> Any:
    """It does not come before the other has named it."""
    return waited(out, lambda: wait_for(out / "failed 0"))


class Broken:
    """What a lost connection does to a collective."""

    def wait(self, timeout):
        raise RuntimeError("Connection reset by peer")

    def is_completed(self):
        return True


def disconnected(out: Path) -> Any:
    def action():
        with leaving_last(out, 1):
            finish(Broken(), torch.zeros(1))

    distributed._ROLL_CALL, usual = timedelta(seconds=30), distributed._ROLL_CALL
    answers = together(action)
    distributed._ROLL_CALL = usual
    return answers


def broken_gather(out: Path) -> Any:
    """A process dies between the two parts of a gather."""

    def action():
        control = Control()
        if rank() == 1:
            dist.all_gather_object = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return control.gather(rank())

    return together(action)


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch._TIMEOUT = STEP
    distributed._LOOK, distributed._ROLL_CALL = timedelta(seconds=0.2), timedelta(seconds=1.5)
    loop.Control = lambda timeout=STEP: Control(timeout)
    told = {}
    for scenario in (patient, killed, late, stuck, disconnected, broken_gather):
        folder = Path(sys.argv[1]) / scenario.__name__
        folder.mkdir()
        told[scenario.__name__] = scenario(folder)
    print(json.dumps(told))

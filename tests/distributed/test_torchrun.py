"""``gigatome train`` in two processes, as torchrun or a scheduler starts it, on slides."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gigatome.slides.synthetic import SyntheticOptions, make_cohort
from gigatome.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

STEPS = 40
SMALL = [
    f"fit.steps={STEPS}", "fit.epochs=null", "fit.warmup_steps=2", "fit.batch_size=4", "fit.save_every=20",
    "fit.log_every=1", "tiles.threads=1", "tiles.tile_size=64", "encoder.dim=24", "encoder.depth=2",
    "encoder.heads=2", "dino.out_dim=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Starts a run of the cohort in a folder."""
    folder = tmp_path_factory.mktemp("cohort")
    options = SyntheticOptions(width=2048, height=2048, mpp=0.5, pen=0, bubbles=0, fat=0, pale=0)
    make_cohort(folder, patients=2, slides_per_patient=1, options=options)

    def start(out: Path, *flags: str, launcher=TORCHRUN, **environment: str) -> subprocess.Popen:
        changes = [argument for change in SMALL for argument in ("--set", change)]
        command = [*launcher, "-m", "gigatome", "train", "demo/dino_vit_mini", "--data", str(folder), "-o", str(out)]
        return subprocess.Popen(
            [*command, *changes, "--job", str(folder / "job"), *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> bytes:
    """Weights of a run that is let be."""
    out = tmp_path_factory.mktemp("whole")
    finish(train(out))
    return weights(out)


def weights(out: Path) -> bytes:
    last = latest_checkpoint(out / "checkpoints")
    assert last.step == STEPS
    assert (out / "encoder" / "encoder.safetensors").is_file()
    return (last.path / "model.safetensors").read_bytes()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said
    return said


def wait_for_step(out: Path, step: int) -> None:
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_saves_and_the_run_goes_on(train, whole, tmp_path, name):
    """SIGTERM to torchrun, which hands it on; SIGUSR2 to one process."""
    process = train(tmp_path)
    wait_for_step(tmp_path, 3)
    os.kill(process.pid if name == "SIGTERM" else children(process)[1], getattr(signal, name))
    said = finish(process, 1)  # torchrun's own status
    assert "Stopped by a signal after saving" in said
    last = latest_checkpoint(tmp_path / "checkpoints")
    assert 3 <= last.step < STEPS
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == last.step  # none went on
    finish(train(tmp_path, "--resume"))
    assert weights(tmp_path) == whole


def test_no_process_outlives_torchrun(train, whole, tmp_path):
    process = train(tmp_path)
    wait_for_step(tmp_path, 3)
    workers = children(process)
    assert len(workers) == 2
    assert all(map(is_alive, workers))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
    process.stdout.close()
    finish(train(tmp_path, "--resume"))
    assert weights(tmp_path) == whole


def test_a_scheduler_may_start_the_processes_and_sees_that_a_signal_stopped_them(train, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        train(
            tmp_path, launcher=[sys.executable], RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in "01"
    ]  # fmt: skip
    wait_for_step(tmp_path, 3)
    both[1].send_signal(signal.SIGUSR2)
    for process in both:
        finish(process, 75)
    alone = train(tmp_path, "--resume", launcher=[sys.executable])
    assert "was written by 2 processes, this run has 1" in " ".join(finish(alone, 1).split())

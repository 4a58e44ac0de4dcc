import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import DINO, FIT, TinyStream, digest, make_dino, run

from gigatome.core.errors import RunError
from gigatome.encoders.zoo import load_encoder
from gigatome.training.checkpoint import latest_checkpoint
from gigatome.training.loop import FitOptions, fit
from gigatome.training.random_state import random_state

TIMES = ("time", "images_per_s", "data_wait_s", "data_wait", "tflops")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """Folder and digest of an uninterrupted run of eight steps."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


class StopError(Exception):
    """Ends a run from within, as a crash would."""


def stop_after(step: int, action=None):
    def progress(stage, done, total):
        if done == step:
            if action is None:
                raise StopError
            action()

    return progress


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


class Untouched:
    """A stream, or a method, that must not be used."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was used")


# A run


def test_a_run_leaves_metrics_checkpoints_and_an_encoder(whole):
    out, _ = whole
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "encoder", "metrics.jsonl"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    records = lines(out)
    assert [record["step"] for record in records] == [2, 3, 4, 6, 8]
    wanted = {"step", "loss", "lr", "wd", "momentum", "teacher_temp", "grad_norm", "teacher_entropy", "kl", "skipped"}
    assert all(set(record) == {*wanted, *TIMES} for record in records)
    assert records[0]["lr"] == pytest.approx(0.05 * 4 / 256)  # the last step of the warm-up, scaled
    assert records[-1]["wd"] > records[0]["wd"] > 0.04
    assert 0.996 < records[0]["momentum"] < records[-1]["momentum"] < 1
    assert all(
        record["loss"] == pytest.approx(record["teacher_entropy"] + record["kl"], rel=1e-5) for record in records
    )
    teacher = {
        name.removeprefix("teacher.encoder.vit."): value
        for name, value in latest_checkpoint(out / "checkpoints").tensors("model").items()
        if name.startswith("teacher.encoder.")
    }
    assert digest(load_encoder(out).vit.state_dict()) == digest(teacher)


def test_a_run_is_repeatable_and_depends_on_the_seed(whole, tmp_path):
    _, expected = whole
    torch.manual_seed(1234)  # what the caller has drawn is of no account
    assert run(tmp_path / "again") == expected
    assert run(tmp_path / "other", replace(FIT, seed=1)) != expected


def test_a_run_leaves_the_callers_generators_alone(tmp_path):
    before = random_state()
    run(tmp_path, replace(FIT, steps=1, warmup_steps=0))
    assert random_state() == before


def test_weights_move_teacher_follows_and_prototypes_wait_an_epoch(tmp_path):
    dino = make_dino()
    begin = {name: value.clone() for name, value in dino.state_dict().items()}
    options = replace(FIT, steps=3, save_every=1, keep=9)  # an epoch has three steps
    fit(dino, TinyStream(), options, tmp_path)
    end = dino.state_dict()
    moved = {name for name in end if not torch.equal(begin[name], end[name])}
    assert {"center", "student.head.mlp.0.weight", "teacher.head.mlp.0.weight"} <= moved
    assert {"student.encoder.vit.patch_embed.proj.weight", "teacher.encoder.vit.norm.weight"} <= moved
    assert "student.head.last_layer.weight_v" not in moved
    longer = make_dino()
    fit(longer, TinyStream(), replace(options, steps=4), tmp_path / "longer")
    name = "student.head.last_layer.weight_v"
    assert not torch.equal(longer.state_dict()[name], begin[name])


def test_parts_of_a_batch_are_the_whole(tmp_path):
    records = []
    for parts in (1, 2, 4):
        dino = make_dino(replace(DINO, drop_path=0.0))
        options = replace(FIT, steps=1, warmup_steps=0, grad_accumulation=parts)
        fit(dino, TinyStream(), options, tmp_path / str(parts))
        (record,) = lines(tmp_path / str(parts))
        records.append([record[key] for key in ("loss", "grad_norm", "kl", "teacher_entropy")])
    assert records[1] == pytest.approx(records[0], rel=1e-3)
    assert records[2] == pytest.approx(records[0], rel=1e-3)


def test_bfloat16_runs_and_keeps_float32_weights(tmp_path):
    dino = make_dino()
    result = fit(dino, TinyStream(), replace(FIT, steps=2, warmup_steps=0, precision="bf16"), tmp_path)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in dino.state_dict().values())
    assert result.metrics["skipped"] == 0


@pytest.mark.slow
def test_compiled_networks_learn_the_same(tmp_path):
    """With SGD: Adam would make whole steps of the rounding of gradients that are zero, such as those of key biases."""
    results = []
    for compiled in (False, True):
        dino = make_dino()
        fit(dino, TinyStream(), replace(FIT, steps=3, compile=compiled, optimizer="sgd"), tmp_path / str(compiled))
        results.append(dino.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # student and teacher, whole
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_other_sinks_get_every_line(tmp_path):
    class Sink:
        def begin(self, step):
            self.lines = [step]

        def write(self, line):
            self.lines.append(line["step"])

    sink = Sink()
    run(tmp_path, replace(FIT, steps=3), sinks=[sink])
    assert sink.lines == [0, 2, 3]


def test_the_evaluation_hook_joins_the_metrics(tmp_path, whole):
    called = []

    def evaluate(step):
        called.append(step)
        torch.rand(100)  # its own draws are of no account
        return {"auroc": step / 10}

    assert run(tmp_path, replace(FIT, evaluate_every=5), evaluate=evaluate) == whole[1]
    assert called == [5, 8]
    assert {record["step"]: record["auroc"] for record in lines(tmp_path) if "auroc" in record} == {5: 0.5, 8: 0.8}


def test_progress_is_told_of_every_step(tmp_path):
    seen = []
    run(tmp_path, replace(FIT, steps=3), progress=lambda *values: seen.append(values))
    assert seen == [("train", 1, 3), ("train", 2, 3), ("train", 3, 3)]


# Resuming


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_run_that_crashed_resumes_to_the_same_weights_and_metrics(whole, tmp_path, step):
    out, expected = whole
    with pytest.raises(StopError):
        run(tmp_path, progress=stop_after(step))
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 99, "lo')  # a line cut short
    assert run(tmp_path, resume=True) == expected
    assert without_times(lines(tmp_path)) == without_times(lines(out))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_signal_saves_and_stops_and_the_run_resumes(whole, tmp_path, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    dino = make_dino()
    kill = stop_after(4, lambda: os.kill(os.getpid(), number))
    result = fit(dino, TinyStream(), FIT, tmp_path, identity="tiny", progress=kill)
    assert (result.preempted, result.finished, result.encoder) == (True, False, None)
    assert result.step == latest_checkpoint(tmp_path / "checkpoints").step == 5  # the step it came in is finished
    assert signal.getsignal(number) is handler
    assert run(tmp_path, resume=True) == whole[1]


def test_a_second_interrupt_interrupts(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)  # handled before it returns: two signals on their way could become one
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, progress=stop_after(2, twice))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_the_last_step_does_not_preempt(tmp_path):
    class Late(TinyStream):
        def batches(self, start_step=0):
            *first, last = itertools.islice(super().batches(start_step), 3)
            yield from first
            os.kill(os.getpid(), signal.SIGTERM)
            yield last

    result = fit(make_dino(), Late(), replace(FIT, steps=3), tmp_path)
    assert result.finished
    assert not result.preempted


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path, whole):
    digests = []
    thread = threading.Thread(target=lambda: digests.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert digests == [whole[1]]


def test_a_complete_run_returns_at_once(whole):
    out, _ = whole
    before = (out / "metrics.jsonl").read_text()
    result = fit(Untouched(), Untouched(), FIT, out, resume=True, identity="tiny")
    assert result.finished
    assert (result.step, result.encoder, result.metrics["step"]) == (8, out / "encoder", 8)
    assert (out / "metrics.jsonl").read_text() == before


def test_a_run_killed_before_its_export_only_exports(tmp_path, whole):
    with pytest.raises(StopError):
        run(tmp_path, progress=stop_after(8))
    assert not (tmp_path / "encoder").exists()
    dino = make_dino()
    assert fit(dino, TinyStream(end=0), FIT, tmp_path, resume=True, identity="tiny").finished
    assert digest(dino.state_dict()) == whole[1]
    load_encoder(tmp_path)


def test_an_export_cut_short_is_made_again(tmp_path):
    dino = make_dino()

    def broken(folder):
        folder.mkdir()
        raise StopError

    dino.export = broken
    with pytest.raises(StopError):
        fit(dino, TinyStream(), FIT, tmp_path, identity="tiny")
    assert not (tmp_path / "encoder").exists()
    run(tmp_path, resume=True)
    load_encoder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "encoder", "metrics.jsonl"]


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
        run(tmp_path / "out")


@pytest.mark.parametrize(("kills", "steps"), [(6, 24), pytest.param(24, 90, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(tmp_path, kills, steps):
    """SIGKILL, half of them inside a save; then the same weights as without."""
    script = Path(__file__).with_name("tiny_run.py")
    command = [sys.executable, str(script), str(tmp_path), "--kills", str(kills), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    inside, last, same, left = done.stdout.split()
    assert int(inside) >= kills // 4
    assert (last, same, left) == (str(steps), "True", "2")


# What is refused


@pytest.mark.parametrize("what", ["checkpoints", "metrics.jsonl"])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path, what):
    (tmp_path / what).mkdir() if what == "checkpoints" else (tmp_path / what).write_text("")
    with pytest.raises(RunError, match=r"holds a run already.*--resume"):
        fit(Untouched(), Untouched(), FIT, tmp_path)


def test_the_run_of_another_recipe_is_refused_and_not_touched(whole):
    out, _ = whole
    with pytest.raises(RunError, match=r"another recipe.*\(tiny, not other\)"):
        fit(Untouched(), Untouched(), replace(FIT, steps=9), out, resume=True, identity="other")


def test_a_checkpoint_of_another_model_is_refused(whole, tmp_path):
    out, _ = whole
    other = make_dino(replace(DINO, out_dim=50))
    with pytest.raises(RunError, match=r"does not fit the model"):
        fit(other, TinyStream(), replace(FIT, steps=9), out, resume=True, identity="tiny")


def test_a_stream_that_ends_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"ended at step 2"):
        fit(make_dino(), TinyStream(end=2), FIT, tmp_path)


def test_batches_of_another_size_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"uint8 \[3, 40, 40, 3\], the run needs \[4,"):
        fit(make_dino(), TinyStream(batch_size=3), FIT, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 5, "epochs": 1.0},
        {"steps": 0},
        {"steps": 5, "warmup_steps": 5},
        {"steps": 5, "batch_size": 6, "grad_accumulation": 4},
        {"steps": 5, "keep": 0},
        {"steps": 5, "momentum": 1.0},
    ],
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(ValueError, match=r"must|either"):
        FitOptions(**options)


def test_epochs_are_counted_in_images():
    options = FitOptions(epochs=100, batch_size=1024)
    assert (options.epoch_steps, options.total_steps) == (1250, 125_000)


# Steps that are not finite


def poisoned(steps: set[int], kind: str):
    """A method whose loss, or whose gradient alone, is not a number in some steps."""
    dino = make_dino()
    honest = dino.loss

    def loss(views, clock):
        value, facts = honest(views, clock)
        if clock.step in steps:
            weight = dino.student.encoder.vit.norm.weight
            # the root's slope at 0 is infinite, its value is not
            value = value * float("nan") if kind == "loss" else value + (weight * 0).sqrt().sum()
        return value, facts

    dino.loss = loss
    return dino


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, kind):
    options = replace(FIT, save_every=1, keep=99, log_every=1)
    result = fit(poisoned({4, 6, 7}, kind), TinyStream(), options, tmp_path)
    assert result.finished
    assert result.metrics["skipped"] == 3
    files = [
        tuple((tmp_path / "checkpoints" / f"step-{step:06d}" / f"{group}.safetensors").read_bytes() for group in groups)
        for groups in [("model", "optimizer")]
        for step in range(1, 9)
    ]
    same = [before == after for before, after in itertools.pairwise(files)]
    assert same == [False, False, False, True, False, True, True]  # steps 4, 6 and 7, counted from 0
    records = {record["step"]: record for record in lines(tmp_path)}
    assert records[5]["loss"] is None
    assert records[6]["loss"] > 0


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_three_in_a_row_end_the_run_and_the_checkpoint_stands(tmp_path, kind):
    dino = poisoned({4, 5, 6}, kind)
    with pytest.raises(RunError) as caught:
        fit(dino, TinyStream(), FIT, tmp_path)
    message = str(caught.value)
    assert "3 steps in a row up to step 6" in message
    assert "student.encoder" in message
    assert "step-000006" in message  # saved after the second, which had changed nothing
    assert "lower fit.lr" in message
    assert all(value.isfinite().all() for value in dino.state_dict().values())
    last = latest_checkpoint(tmp_path / "checkpoints")
    assert all(value.isfinite().all() for value in last.tensors("model").values())

"""Evaluations of a run that is killed, stopped and resumed: the record ends as that of a run that was let be."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny_run import FIT, TinyStream, digest, make_dino

from gigatome.training.checkpoint import latest_checkpoint
from gigatome.training.interrupts import Interrupts
from gigatome.training.loop import fit

OPTIONS = replace(FIT, save_every=2, evaluate_every=4)  # 8 steps, logged every 2
APART = replace(FIT, save_every=3, evaluate_every=2)
TIMES = ("time", "images_per_s", "data_wait_s", "data_wait", "tflops")


class KilledError(Exception):
    """Ends a run from within, as a kill would."""


class Hook:
    """Evaluates by the weights, the step and random numbers; at one step it does something first."""

    def __init__(self, at: int | None = None, action=None):
        self.dino, self.at, self.action, self.called, self.saved = make_dino(), at, action, [], []

    def __call__(self, step):
        self.called.append(step)
        if step == self.at:
            self.action()
        weight = self.dino.teacher.encoder.vit.norm.bias
        return {"figure": float(weight.detach().sum()), "drawn": float(torch.rand(1))}


def kill():
    raise KilledError


def send(name="SIGTERM"):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def run(out, hook, options=OPTIONS, resume=True, **arguments):
    return fit(hook.dino, TinyStream(), options, out, identity="tiny", resume=resume, evaluate=hook, **arguments)


def at_step(step, action):
    return lambda stage, done, total: action() if done == step else None


def record(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def saved(out):
    return latest_checkpoint(out / "checkpoints").step


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Records and weights of runs that were let be, by options."""
    torch.set_num_threads(1)
    found = {}
    for options in (OPTIONS, APART):
        out, hook = tmp_path_factory.mktemp("whole"), Hook()
        run(out, hook, options)
        found[options] = record(out), digest(hook.dino.state_dict())
    return found


def assert_as_whole(whole, out, hook, options=OPTIONS):
    assert (record(out), digest(hook.dino.state_dict())) == whole[options]
    assert (out / "encoder").is_dir()


def test_a_run_is_evaluated_when_it_is_due(whole):
    lines, _ = whole[OPTIONS]
    assert [line["step"] for line in lines if "figure" in line] == [4, 8]
    assert len({line["drawn"] for line in lines if "drawn" in line}) == 2


def test_a_step_is_saved_before_it_is_evaluated(tmp_path):
    hook, seen = Hook(), []

    def evaluate(step):
        seen.append((step, saved(tmp_path)))
        return {}

    fit(hook.dino, TinyStream(), OPTIONS, tmp_path, evaluate=evaluate)
    assert seen == [(4, 4), (8, 8)]


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_is_killed_is_made_up(whole, tmp_path, step):
    with pytest.raises(KilledError):
        run(tmp_path, Hook(step, kill))
    assert saved(tmp_path) == step  # no step is lost
    again = Hook()
    assert run(tmp_path, again).finished
    assert again.called == list(range(step, 9, 4))
    assert_as_whole(whole, tmp_path, again)


def test_an_evaluation_that_is_killed_twice_is_made_up(whole, tmp_path):
    for _ in range(2):
        with pytest.raises(KilledError):
            run(tmp_path, Hook(4, kill))
    again = Hook()
    run(tmp_path, again)
    assert_as_whole(whole, tmp_path, again)


@pytest.mark.parametrize("step", [4, 5])
def test_an_evaluation_that_is_done_is_not_made_up(whole, tmp_path, step):
    with pytest.raises(KilledError):
        run(tmp_path, Hook(), progress=at_step(step, kill))
    again = Hook()
    run(tmp_path, again)
    assert again.called == [8]
    assert_as_whole(whole, tmp_path, again)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_is_stopped_where_an_evaluation_is_due_returns_without_it(whole, tmp_path, step):
    hook = Hook()
    result = run(tmp_path, hook, progress=at_step(step - 1, send()))
    assert (result.step, result.preempted, result.encoder) == (step, True, None)
    assert hook.called == list(range(4, step, 4))
    assert saved(tmp_path) == step
    assert record(tmp_path)[-1]["step"] == result.metrics["step"] == step - 2  # its own line is put off
    again = Hook()
    assert run(tmp_path, again).finished
    assert again.called == list(range(step, 9, 4))
    assert_as_whole(whole, tmp_path, again)


@pytest.mark.parametrize(("options", "step"), [(OPTIONS, 4), (APART, 2), (APART, 4)])
def test_a_signal_while_a_run_is_evaluated_stops_it_there(whole, tmp_path, options, step):
    """Also where no checkpoint was due."""
    result = run(tmp_path, Hook(step, send("SIGUSR2")), options)
    assert (result.step, result.preempted) == (step, True)
    assert "figure" in result.metrics
    assert saved(tmp_path) == step
    again = Hook()
    run(tmp_path, again, options)
    assert step not in again.called
    if options is OPTIONS:
        assert_as_whole(whole, tmp_path, again)
    else:  # lines are means since the line before, or since the run went on
        assert digest(again.dino.state_dict()) == whole[options][1]
        assert evaluations(record(tmp_path)) == evaluations(whole[options][0])


def evaluations(lines):
    return [(line["step"], line["figure"], line["drawn"]) for line in lines if "figure" in line]


def test_a_signal_while_the_end_is_evaluated_lets_it_finish_and_the_caller_knows(tmp_path):
    with Interrupts() as interrupts:
        result = run(tmp_path, Hook(8, send()))
    assert (result.finished, result.preempted) == (True, False)
    assert interrupts.seen == "SIGTERM"


def test_a_signal_that_came_before_is_not_followed_by_an_evaluation(whole, tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, Hook(4, kill))
    hook = Hook()
    with Interrupts():
        signal.raise_signal(signal.SIGTERM)
        result = run(tmp_path, hook)
    assert (result.step, result.preempted, hook.called) == (4, True, [])
    again = Hook()
    run(tmp_path, again)
    assert_as_whole(whole, tmp_path, again)


def test_a_line_that_was_cut_short_after_the_save_is_completed(whole, tmp_path):
    """Of a step that is not evaluated; other sinks get it too."""

    class Sink:
        def begin(self, step):
            self.steps = [step]

        def write(self, line):
            self.steps.append(line["step"])

    with pytest.raises(KilledError):
        run(tmp_path, Hook(), progress=at_step(6, kill))
    metrics = tmp_path / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[:-20])
    again, sink = Hook(), Sink()
    run(tmp_path, again, sinks=[sink])
    assert sink.steps == [6, 6, 8]
    assert_as_whole(whole, tmp_path, again)


def test_a_checkpoint_without_a_line_is_gone_on_from(whole, tmp_path):
    """As it was written before lines were kept there."""
    with pytest.raises(KilledError):
        run(tmp_path, Hook(), progress=at_step(4, kill))
    state = tmp_path / "checkpoints" / "step-000004" / "state.json"
    told = json.loads(state.read_text())
    assert told.pop("line")["step"] == 4
    state.write_text(json.dumps(told))
    again = Hook()
    run(tmp_path, again)
    assert_as_whole(whole, tmp_path, again)

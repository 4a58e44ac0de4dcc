"""Runs of two processes over gloo; what they do is in ``ranks.py``."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def scenarios(out: Path, *names: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("ranks.py")), str(out), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    names = ("primitives", "ddp_resume", "ddp_signal", "ddp_not_finite", "same_as_one", "batch_norm", "refusals")
    return scenarios(tmp_path_factory.mktemp("ranks"), *names)


@pytest.fixture(scope="module")
def told_fsdp(tmp_path_factory) -> dict:
    return scenarios(tmp_path_factory.mktemp("fsdp"), "fsdp_resume", "fsdp_signal", "fsdp_not_finite")


MODES = [
    pytest.param("ddp", "told"),
    pytest.param("fsdp", "told_fsdp", marks=pytest.mark.slow),
]


def test_what_processes_tell_each_other(told):
    for number, (size, mean, total, rows, gradient) in enumerate(told["primitives"]):
        assert size == 2
        assert mean == [[5, 6], [7, 8]]
        assert total == [[10, 12], [14, 16]]
        assert rows == [[0, 1], [2, 3], [10, 11], [12, 13]]
        # of both losses, whose weights are 1 and 2 times 0 to 7
        assert gradient == [[[0, 3], [6, 9]], [[12, 15], [18, 21]]][number]


@pytest.mark.parametrize(("mode", "fixture"), MODES)
def test_two_processes_resume_to_the_same_weights(mode, fixture, request):
    whole, expected, resumed = request.getfixturevalue(fixture)[f"{mode}_resume"]
    assert [answer["step"] for answer in whole] == [8, 8]
    for stopped, ended, weights in resumed:
        assert stopped == ["stopped", "stopped"]
        assert [answer["finished"] for answer in ended] == [True, True]
        assert weights == expected
    # the hook has seen the teacher whole, in both processes
    assert whole[0]["metrics"]["embedding"] == pytest.approx(resumed[0][1][0]["metrics"]["embedding"], rel=1e-6)


@pytest.mark.slow
def test_the_other_methods_resume_to_the_same_weights_too(tmp_path):
    same = scenarios(tmp_path, "other_methods")["other_methods"]
    assert len(same) == 6
    assert all(same.values())


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_run_and_its_checkpoint_stands(tmp_path):
    stopped, ended, same = scenarios(tmp_path, "stalled")["stalled"]
    assert re.match(r"process 1 of 2 did not answer for \d+ seconds; the run stops", stopped[0])
    assert stopped[1].startswith("process 0 or the launcher, through which")  # which is gone when it comes back
    assert [answer["finished"] for answer in ended] == [True, True]
    assert same


@pytest.mark.parametrize(("mode", "fixture"), MODES)
def test_a_signal_to_one_process_stops_both_at_one_step(mode, fixture, request):
    stopped, ended, same = request.getfixturevalue(fixture)[f"{mode}_signal"]
    assert [(answer["step"], answer["finished"]) for answer in stopped] == [(4, False), (4, False)]
    assert [answer["finished"] for answer in ended] == [True, True]
    assert same


@pytest.mark.parametrize(("mode", "fixture"), MODES)
def test_what_is_not_finite_in_one_process_reaches_no_weight(mode, fixture, request):
    hashes, stopped = request.getfixturevalue(fixture)[f"{mode}_not_finite"]
    same = [before == after for before, after in itertools.pairwise(hashes)]
    assert same == [False, False, False, True, False, True, True]  # steps 4, 6 and 7, counted from 0
    for message in stopped:
        assert "3 steps in a row up to step 4" in message
        assert "loss of process 1)" in message
        assert "The last checkpoint is step-000004" in message


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_two_processes_learn_what_one_does(told, optimizer):
    differences = told["same_as_one"][optimizer]
    assert differences["moved"] > 1e-5
    assert differences["ddp"] < 1e-7
    assert differences["fsdp"] < 1e-7


def test_batch_norms_remember_the_same_and_nothing_that_is_not_finite(told):
    first, second = told["batch_norm"]
    assert first == second
    mean, variance, steps = first
    assert steps == 3  # of 4, one of which was left out
    assert mean == mean
    assert variance > 0


def test_what_a_run_of_several_processes_refuses(told):
    refused = told["refusals"]
    (world,) = refused["world"]
    assert "was written by 2 processes, this run has 1" in world
    assert all("holds a run already" in message for message in refused["again"])
    assert "metrics.jsonl: cannot be written" in refused["file"][0]
    assert refused["file"][1] == f"process 0: {refused['file'][0]}"
    assert all("do not agree on teacher.0.bias" in message for message in refused["forgetful"])
    assert all("batch_size 4 must be a multiple of 2 processes (those" in message for message in refused["indivisible"])
    assert refused["first"] == ["no tissue", "process 0 could not begin the run; its message says why"]


@pytest.mark.parametrize(
    ("scenario", "kills"), [("killed", 2), pytest.param("killed_often", 20, marks=pytest.mark.slow)]
)
def test_two_processes_whose_launcher_is_killed_end_as_if_it_was_not(tmp_path, scenario, kills):
    """SIGKILL to the launcher only: its processes die with it; half of the kills are inside a save."""
    count, inside, ended, same = scenarios(tmp_path, scenario)[scenario]
    assert count == kills
    assert inside >= kills // 2
    assert [answer["finished"] for answer in ended] == [True, True]
    assert same

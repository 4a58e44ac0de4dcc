"""Processes whose work is uneven wait for each other, and name one that dies; what they do is in ``uneven_runs.py``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("uneven")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("uneven_runs.py")), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_process_that_evaluates_for_long_is_waited_for(told):
    """For longer than within a step."""
    answers, (figures, _) = told["patient"]
    assert answers == [{"step": 4, "finished": True}] * 3
    assert [step for step, _ in figures] == [2, 4]
    assert all(len(set(drawn)) == 3 for _, drawn in figures)


def test_a_process_that_dies_is_named_while_another_is_at_work(told):
    answers, at_work, _, _ = told["killed"]
    assert answers[0].startswith("process 1 of 3 does not answer any more; the run stops")
    assert at_work
    assert answers[1] == "killed"
    assert answers[2] == answers[0]  # when it comes back


def test_a_run_whose_evaluation_was_killed_ends_as_one_that_was_let_be(told):
    _, _, answers, found = told["killed"]
    assert answers == [{"step": 4, "finished": True}] * 3
    assert found == told["patient"][1]


def test_a_process_that_is_late_is_named_by_both(told):
    first, second = told["late"]
    assert re.match(r"process 1 of 2 did not answer for [23] seconds; the run stops", first)
    assert first == second


def test_a_process_that_does_not_come_is_named(told):
    first, second = told["stuck"]
    assert re.match(r"process 1 of 2 did not answer for [23] seconds; the run stops", first)
    assert second == first


def test_a_connection_that_breaks_is_told(told):
    assert [said.partition(";")[0] for said in told["disconnected"]] == [
        "processes 0, 1 lost their connection, though all are there"
    ] * 2


def test_a_process_that_dies_in_a_gather_is_named(told):
    first, second = told["broken_gather"]
    assert first.startswith("process 1 of 2 does not answer any more; the run stops")
    assert second == "killed"

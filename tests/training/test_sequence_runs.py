"""Runs over gloo whose processes share sequences; what they do is in ``sequence_runs.py``."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import FIT, TinyStream, make_dino

from gigatome.core.errors import ConfigError
from gigatome.distributed import SequenceGroup
from gigatome.training.loop import fit


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("sequences")
    script = Path(__file__).with_name("sequence_runs.py")
    command = [sys.executable, "-W", "ignore", str(script), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_processes_that_share_images_learn_what_one_does(told):
    """Weights and AdamW's moments after four steps of eight images in two parts, with stochastic depth."""
    found = told["same_as_one"]
    assert found["moved"] > 0.01
    assert found["dropped"] > 0.01  # so much does stochastic depth change
    assert found["two share"] < 1e-9
    assert found["losses"]["two share"] == pytest.approx(found["losses"]["one"], rel=1e-5)


def test_two_groups_of_two_learn_what_two_processes_do_and_one(told):
    """Against one process without stochastic depth, as two draw other numbers than one."""
    found = told["same_as_one"]
    assert found["two by two"] < 1e-9
    assert found["still two by two"] < 1e-9


def test_processes_of_a_group_draw_alike_and_groups_do_not(told):
    drawn = told["same_as_one"]["drawn"]
    first, second, third, fourth = drawn["two by two"]
    assert first == second == drawn["two"][0]
    assert third == fourth == drawn["two"][1]
    assert not set(first) & set(third)


def test_a_process_counts_its_own_operations(told):
    """The first one has 4 of 9 rows of patches, and what does not depend on the rows."""
    assert 4 / 9 < told["same_as_one"]["flops"] < 0.46


def test_a_stopped_run_resumes_to_the_same_weights(told):
    found = told["resume"]
    assert found["steps"] == [[4] * 4] * 2
    assert found["stopped"] == ["stopped"] * 4
    assert found["same"][0]


def test_a_process_that_is_killed_is_named_by_all_and_the_checkpoint_stands(told):
    """Also by those of the other group."""
    found = told["resume"]
    assert found["killed"][2] == "killed"
    for number in (0, 1, 3):
        assert found["killed"][number].startswith("process 2 of 4 does not answer any more; the run stops")
    assert found["left"] == [["step-000002"], 2]
    assert found["same"][1]  # it resumes to the weights of a run that nothing happened to


def test_weights_are_not_sharded_over_processes_that_share_sequences(tmp_path):
    with pytest.raises(ConfigError, match=r"fit\.parallel fsdp is not for processes that share sequences"):
        fit(make_dino(), TinyStream(), replace(FIT, parallel="fsdp"), tmp_path, group=SequenceGroup(2))


def test_batches_are_cut_by_sequences():
    assert replace(FIT, batch_size=8, grad_accumulation=2).share(2) == 4
    with pytest.raises(ConfigError, match=r"batch_size 8 must be a multiple of 3 processes \(those that share"):
        replace(FIT, batch_size=8).share(3)

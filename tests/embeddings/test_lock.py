"""Locks: who may take one, and when one counts as dead."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from gigatome.embeddings.lock import Lock


def write_lock(path, **owner):
    content = {"pid": os.getpid(), "hostname": socket.gethostname(), "created_at": time.time(), **owner}
    path.write_text(json.dumps(content))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "a.h5"


@pytest.fixture
def held(tmp_path):
    return tmp_path / "a.h5.lock"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_says_who_holds_it_and_goes_away(output, held):
    lock = Lock(output)
    assert lock.acquire()
    owner = json.loads(held.read_text())
    assert set(owner) == {"pid", "hostname", "created_at"}
    assert owner["pid"] == os.getpid()
    assert abs(owner["created_at"] - time.time()) < 60
    assert not Lock(output).acquire()
    lock.release()
    assert list(held.parent.iterdir()) == []
    assert Lock(output).acquire()


def test_a_living_process_keeps_its_lock_however_old(output, held):
    parent = os.getppid()  # runs, and has since before the lock
    write_lock(held, pid=parent)
    os.utime(held, (0, 0))
    assert not Lock(output, stale_hours=0).acquire()
    assert f"process {parent} on {socket.gethostname()}" in Lock(output).owner()


def test_a_dead_process_loses_its_lock(output, held):
    write_lock(held, pid=dead_pid())
    assert Lock(output).acquire()
    assert json.loads(held.read_text())["pid"] == os.getpid()
    assert len(list(held.parent.iterdir())) == 1


def test_a_dead_process_loses_its_lock_though_another_has_its_number(output, held):
    """As after the restart of a container, whose process has the same id again."""
    write_lock(held, created_at=time.time() - 7 * 86400)
    assert Lock(output).acquire()


@pytest.mark.parametrize(("hours", "taken"), [(23, False), (25, True)])
def test_a_lock_of_another_machine_dies_of_age(output, held, hours, taken):
    write_lock(held, hostname="elsewhere", pid=1, created_at=time.time() - hours * 3600)
    assert Lock(output).acquire() is taken


def test_an_existing_output_does_not_free_the_lock(output, held):
    output.write_text("half written")
    write_lock(held, hostname="elsewhere")
    assert not Lock(output).acquire()


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_goes_by_the_age_of_its_file(output, held, content):
    held.write_text(content)
    assert not Lock(output).acquire()
    long_ago = time.time() - 25 * 3600
    os.utime(held, (long_ago, long_ago))
    assert Lock(output).acquire()


def test_release_leaves_a_lock_that_was_taken_over(output, held):
    lock = Lock(output)
    assert lock.acquire()
    write_lock(held, hostname="elsewhere")
    lock.release()
    assert held.exists()


def test_a_lock_that_changed_hands_meanwhile_is_left_alone(output, held):
    stale = json.dumps({"pid": 1, "hostname": "elsewhere", "created_at": 0}).encode()
    write_lock(held, hostname="elsewhere")
    assert not Lock(output)._remove(stale)
    assert json.loads(held.read_text())["hostname"] == "elsewhere"


def test_only_one_of_many_gets_it(output):
    program = (
        "import sys, time; from pathlib import Path; from gigatome.embeddings.lock import Lock; "
        "time.sleep(max(0, float(sys.argv[2]) - time.time())); "
        "print(int(Lock(Path(sys.argv[1])).acquire())); sys.stdout.flush(); time.sleep(1)"
    )
    start = time.time() + 1.5
    command = [sys.executable, "-c", program, str(output), str(start)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sum(int(racer.communicate()[0]) for racer in racers) == 1


def test_a_sweep_takes_dead_locks_away_and_no_others(output, held):
    Lock(output).sweep()  # there is none
    write_lock(held, pid=os.getppid())
    Lock(output).sweep()
    assert held.exists()
    write_lock(held, pid=dead_pid())
    Lock(output).sweep()
    assert list(held.parent.iterdir()) == []

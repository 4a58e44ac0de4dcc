import gc
import re
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from gigatome.blob.fetch import Fetcher
from gigatome.blob.remote import HEAD_BYTES, RemoteOptions
from gigatome.blob.store import open_blob
from gigatome.blob.wire import Wire
from gigatome.core.errors import StoreError
from range_server import serve

DATA = bytes(range(256)) * 2000
QUICK = RemoteOptions(connect_seconds=2, stall_seconds=0.2, retries=1)


@pytest.fixture
def server():
    with serve({f"{name}.bin": DATA for name in "abcdef"}) as running:
        yield running


def places(seed, count):
    """Four ranges a tile, two rows of two neighbours."""
    found = []
    for k in range(count):
        first = 70_000 + (seed * 7919 + k * 104_729) % 300_000
        found.append([(first, 500), (first + 500, 700), (first + 100_000, 300), (first + 100_300, 10)])
    return found


def expected(ranges):
    return [DATA[offset : offset + length] for offset, length in ranges]


def fetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_many_objects_come_back_in_order(server):
    blobs = [open_blob(f"{server.url}/{name}.bin") for name in "abcdef"]
    wanted = [(blobs[k % 6], ranges) for k, ranges in enumerate(places(1, 200))] + [(blobs[0], [])]
    with Fetcher(in_flight=32) as fetcher:
        futures = [fetcher.fetch(wanted[start : start + 40]) for start in range(0, 201, 40)]
        results = [result for future in futures for result in future.result(30)]
        assert results == [expected(ranges) for _, ranges in wanted]
        traffic = fetcher.traffic
    assert traffic.needed == 200 * 1510 == traffic.fetched == server.sent - 6 * min(len(DATA), HEAD_BYTES)
    assert traffic.requests == 400 == len(server.requests) - 6
    assert sum(blob.traffic.requests for blob in blobs) == 400
    assert not fetch_threads()


def test_requests_in_flight_are_bounded_in_number_and_bytes(server, monkeypatch):
    blob = open_blob(f"{server.url}/a.bin")
    most, now = [0, 0], [0, 0]
    read = Wire.read

    async def watched(wire, wanted):
        lengths = [length for _, _, lengths in wanted for length in lengths]
        now[:] = now[0] + len(lengths), now[1] + sum(lengths)
        most[:] = map(max, most, now)
        try:
            return await read(wire, wanted)
        finally:
            now[:] = now[0] - len(lengths), now[1] - sum(lengths)

    monkeypatch.setattr(Wire, "read", watched)
    tiles = places(3, 60)
    for limits in ((20, 1 << 20), (200, 20_000)):
        most[:] = [0, 0]
        with Fetcher(*limits) as fetcher:
            results = fetcher.fetch([(blob, ranges) for ranges in tiles]).result(30)
            assert results == [expected(ranges) for ranges in tiles]
        assert 0 < most[0] <= limits[0]
        assert 0 < most[1] <= limits[1]
    with Fetcher(1, 1) as fetcher:
        assert fetcher.fetch([(blob, tiles[0])]).result(30) == [expected(tiles[0])]


def test_each_entry_fails_for_itself(server, tmp_path):
    good, gone, slow = (open_blob(f"{server.url}/{name}.bin", QUICK) for name in "abc")
    server.faults |= {"b.bin": 404, "c.bin": "hang"}
    tiles = places(5, 4)
    outside = [(70_000, 10), (len(DATA), 1)]
    with Fetcher() as fetcher:
        results = fetcher.fetch(
            [(good, tiles[0]), (gone, tiles[1]), (good, outside), (slow, tiles[2]), (good, tiles[3])]
        ).result(30)
        assert [results[k] for k in (0, 4)] == [expected(tiles[0]), expected(tiles[3])]
        for k, message in ((1, r"b\.bin: not found"), (2, r"a\.bin: .* outside"), (3, r"c\.bin: .* in time")):
            assert isinstance(results[k], StoreError)
            assert re.search(message, str(results[k]))
        (failed,) = fetcher.fetch([(good, outside)]).result(30)
        assert isinstance(failed, StoreError)
        assert fetcher.fetch([]).result(30) == []
        (tmp_path / "a").write_bytes(DATA)
        with pytest.raises(ValueError, match="local file"):
            fetcher.fetch([(good, tiles[0]), (open_blob(tmp_path / "a"), tiles[1])])


def test_a_bad_range_does_not_fail_its_neighbours(server):
    """Both tiles go into one call; the bytes of the first arrive different each time."""
    blob = open_blob(f"{server.url}/d.bin", QUICK)
    wanted = [(blob, [(100_000, 500)]), (blob, [(300_000, 500)])]
    with Fetcher() as fetcher:
        assert fetcher.fetch(wanted).result(30) == [expected(ranges) for _, ranges in wanted]
        server.faults["d.bin"] = lambda header: "flip" if header.startswith("bytes=100000-") else None
        first, second = fetcher.fetch(wanted).result(30)
        assert second == expected(wanted[1][1])
        assert isinstance(first, StoreError)
        assert "different each time" in str(first)


def test_cancelled_futures_are_not_fetched(server):
    blob = open_blob(f"{server.url}/a.bin", QUICK)
    server.faults["a.bin"] = ["hang"]
    with Fetcher(in_flight=1) as fetcher:
        first, second, third = (fetcher.fetch([(blob, [(start, 10)])]) for start in (70_000, 80_000, 90_000))
        assert second.cancel()
        assert third.result(30) == [[DATA[90_000:90_010]]]
        assert first.result(30) == [[DATA[70_000:70_010]]]
    assert not any("80000" in header for _, header in server.requests)


def test_closing_with_requests_under_way(server):
    blob = open_blob(f"{server.url}/a.bin")
    server.faults["a.bin"] = "hang"
    fetcher = Fetcher(in_flight=4)
    futures = [fetcher.fetch([(blob, ranges)]) for ranges in places(7, 50)]
    futures.append(fetcher.fetch([(blob, ranges) for ranges in places(8, 50)]))
    assert server.busy.wait(10)
    began = time.monotonic()
    fetcher.close()
    fetcher.close()
    assert time.monotonic() - began < 5
    assert not fetch_threads()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(ValueError, match="closed"):
        fetcher.fetch([(blob, [(70_000, 10)])])


def test_a_fetcher_that_is_dropped_ends_its_thread(server):
    fetcher = Fetcher()
    assert fetcher.fetch([(open_blob(f"{server.url}/a.bin"), [(70_000, 10)])]).result(30) == [[DATA[70_000:70_010]]]
    (thread,) = fetch_threads()
    dropped = weakref.ref(fetcher)
    del fetcher
    gc.collect()
    assert dropped() is None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "fetcher.close()"])
@pytest.mark.parametrize("fault", [None, "hang"])
def test_the_interpreter_ends_with_requests_under_way(server, ending, fault):
    program = f"""
        from gigatome.blob.fetch import Fetcher
        from gigatome.blob.store import open_blob

        blob = open_blob("{server.url}/e.bin")
        fetcher = Fetcher()
        future = fetcher.fetch([(blob, [(70_000 + 900 * k, 800)]) for k in range(100)])
        if {fault is None}:
            future.result()
        {ending}
    """
    server.faults["e.bin"] = [None, *([fault] * 200)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        timeout=30,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, done.stderr) == (3 if "Exit" in ending else 0, "")


def test_in_flight_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        Fetcher(0)

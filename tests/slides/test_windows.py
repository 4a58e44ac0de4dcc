"""Windows on a header: what is read together, what is held, and how much of it."""

import numpy as np
import pytest

from gigatome.blob.remote import HEAD_BYTES
from gigatome.slides.windows import Windows

DATA = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8).tobytes()


class Recorder:
    """A blob that writes down each call."""

    def __init__(self, uri, data=DATA):
        self.uri, self.data, self.size, self.calls = uri, data, len(data), []

    def read(self, offset, length):
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges):
        self.calls.append(list(ranges))
        return [self.data[offset : offset + length] for offset, length in ranges]


@pytest.fixture
def remote():
    return Recorder("s3://bucket/a")


def test_a_window_serves_what_stands_around_it(remote):
    windows = Windows(remote)
    for offset in (100, 3 << 20, (3 << 20) - 60_000, (3 << 20) + 900_000):
        assert windows.read(offset, 500) == DATA[offset : offset + 500]
    assert remote.calls == [[(0, HEAD_BYTES)], [((3 << 20) - (1 << 16), 1 << 20)]]


def test_the_rest_of_a_file_comes_as_one(remote):
    windows = Windows(remote)
    offset = len(DATA) - (1 << 20)
    windows.read(offset, 10)
    assert windows.read(len(DATA) - 4, 4) == DATA[-4:]
    assert sum(remote.calls[-1][0]) == len(DATA)
    assert len(remote.calls) == 2


def test_a_local_window_is_small():
    local = Recorder("/a")
    windows = Windows(local)
    windows.expect([(1 << 20, 100)])
    assert windows.read(3 << 20, 10) == DATA[3 << 20 : (3 << 20) + 10]
    assert max(length for call in local.calls for _, length in call) <= 1 << 14
    assert len(local.calls) == 2


def test_what_is_expected_comes_with_the_next_window(remote):
    windows = Windows(remote)
    places = [(1 << 20, 1000), ((1 << 20) + 5000, 1000), (5 << 20, 10), (9 << 20, 10), (1 << 21, 3 << 20)]
    windows.expect(places)
    windows.read(3 << 20, 10)
    assert remote.calls[1:] == [[(1 << 20, 6000), ((3 << 20) - (1 << 16), 1 << 20), (5 << 20, 10)]]
    assert windows.read_ranges(places[:3]) == [DATA[offset : offset + length] for offset, length in places[:3]]
    assert len(remote.calls) == 2


def test_ranges_that_are_not_held_are_read_as_they_are(remote):
    windows = Windows(remote)
    wanted = [(1 << 20, 30), (10, 20), (2 << 20, 40)]
    assert windows.read_ranges(wanted) == [DATA[offset : offset + length] for offset, length in wanted]
    assert remote.calls[1:] == [[wanted[0], wanted[2]]]


def test_windows_fetched_together(remote):
    windows = Windows(remote)
    windows.fetch([5 << 20, 2 << 20, 30, (5 << 20) + 100])
    assert len(remote.calls) == 2
    assert len(remote.calls[1]) == 2
    windows.fetch([2 << 20])
    assert len(remote.calls) == 2


def test_memory_is_bounded():
    """Long values are not held, and of many windows the last ones."""
    blob = Recorder("https://host/a", bytes(200 << 20))
    windows = Windows(blob)
    windows.read(0, 16 << 20)
    for step in range(100):
        windows.read(step * (2 << 20) + 70_000, 10)
    assert sum(len(data) for _, data in windows._held) <= 33 << 20
    windows.fetch([step * (2 << 20) for step in range(100)])
    assert sum(len(data) for _, data in windows._held) <= 33 << 20

"""The C extension on damaged chunks and on arguments that contradict each other; fuzz/ looks for more of them."""

import os
import random

import numpy as np
import pytest
from test_native import NO_TABLES, NOISE, PICTURE, encode, expected, read

from gigatome.core.native import NATIVE
from tiff_files import split_tables

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C extension is not built")

SMALL = np.ascontiguousarray(PICTURE[:32, :48])
EOI = b"\xff\xd9"


def data_start(chunk):
    """Where the entropy-coded data begin."""
    scan = chunk.index(b"\xff\xda") + 2
    return scan + int.from_bytes(chunk[scan : scan + 2], "big")


def changed(chunk, marker, place, value):
    """``value`` in the segment of ``marker``, ``place`` bytes behind the marker."""
    at = chunk.index(marker) + 2 + place
    return chunk[:at] + value + chunk[at + len(value) :]


@pytest.mark.parametrize("sampling", ["444", "422", "420", "grey"])
def test_a_chunk_that_ends_early_is_declined_wherever_it_ends(sampling):
    chunk = encode(SMALL, sampling, 75)
    shape = (*SMALL.shape[:2], 1 if sampling == "grey" else 3)
    for end in range(len(chunk) - 2):
        for cut in (chunk[:end], chunk[:end] + EOI):
            if cut:
                assert read([[cut]], shape, (0, 0), (48, 32))[0] == b"\2"
    assert read([[chunk]], shape, (0, 0), (48, 32))[0] == b"\0"


def test_rows_above_an_early_end_are_decoded_and_those_below_declined():
    chunk = encode(NOISE, "444", 90)
    middle = (data_start(chunk) + len(chunk)) // 2
    cut = chunk[:middle] + EOI + chunk[middle:]
    status, pixels = read([[cut]], NOISE.shape, (5, 0), (70, 40))
    assert status == b"\0"
    assert np.array_equal(pixels, expected(chunk, 1, NOISE.shape)[:40, 5:75])
    assert read([[cut]], NOISE.shape, (5, 40), (70, 40))[0] == b"\2"


@pytest.mark.parametrize("sampling", ["444", "422", "420", "grey"])
def test_damaged_data_give_the_same_pixels_in_every_rectangle(sampling):
    rng = random.Random(3)
    image = np.ascontiguousarray(PICTURE[:64, :64])
    chunk, shape = encode(image, sampling, 60), (64, 64, 1 if sampling == "grey" else 3)
    accepted = 0
    for _ in range(150):
        broken = bytearray(chunk)
        for _ in range(rng.randint(1, 2)):
            broken[rng.randrange(data_start(chunk), len(chunk) - 2)] ^= 1 << rng.randrange(8)
        shrink = rng.choice((1, 2, 4, 8))
        side = 64 // shrink
        status, whole = read([[bytes(broken)]], shape, (0, 0), (side, side), shrink=shrink)
        if status != b"\0":
            continue
        accepted += 1
        for _ in range(3):
            width, height = rng.randint(1, side), rng.randint(1, side)
            x, y = rng.randint(0, side - width), rng.randint(0, side - height)
            status, part = read([[bytes(broken)]], shape, (x, y), (width, height), shrink=shrink)
            assert status == b"\0"
            assert np.array_equal(part, whole[y : y + height, x : x + width])
    assert accepted > 10


@pytest.mark.parametrize(
    ("marker", "place", "value"),
    [
        (b"\xff\xc0", 9, b"\x00"),  # a component sampled 0 × 0
        (b"\xff\xc0", 9, b"\xff"),
        (b"\xff\xc0", 9, b"\x12"),
        (b"\xff\xc0", 10, b"\x04"),  # a fifth table
        (b"\xff\xc0", 10, b"\x03"),  # one that is not there
        (b"\xff\xc0", 0, b"\x00\x08"),  # a segment that is too short, or too long
        (b"\xff\xc0", 0, b"\xff\xff"),
        (b"\xff\xc0", 3, b"\x00\x00\x00\x00"),  # no pixels
        (b"\xff\xc0", 2, b"\x0c"),  # twelve bits
        (b"\xff\xda", 4, b"\xff"),
        (b"\xff\xda", 4, b"\x33"),
        (b"\xff\xda", 2, b"\x01"),
        (b"\xff\xda", 9, b"\x01"),
        (b"\xff\xc4", 3, b"\xff" * 16),  # more codes than there are
        (b"\xff\xc4", 3, b"\x03"),
        (b"\xff\xc4", 2, b"\x04"),
        (b"\xff\xdb", 2, b"\x10"),  # wide entries, of which half are missing
        (b"\xff\xdb", 2, b"\x0f"),
    ],
)
def test_headers_that_contradict_themselves_are_declined(marker, place, value):
    chunk = encode(SMALL, "422", 75)
    assert read([[changed(chunk, marker, place, value)]], SMALL.shape, (0, 0), (48, 32))[0] == b"\2"


def test_broken_tables_of_one_chunk_do_not_touch_the_next():
    good = encode(SMALL, "422", 75, optimize=True)
    other = encode(SMALL, "422", 30, optimize=True)
    broken = changed(good, b"\xff\xc4", 3, b"\xff" * 16)
    tables, rest = split_tables(encode(SMALL, "422", 50))
    chunks = [good, broken, good, other, rest, good]
    status, pixels = read([chunks], SMALL.shape, (0, 0), (48 * 6, 32), tables=tables)
    assert status == bytes([0, 2, 0, 0, 0, 0])
    for place, chunk in enumerate(chunks):
        if place != 1:
            whole = tables[:-2] + rest[2:] if chunk is rest else chunk
            assert np.array_equal(pixels[:, 48 * place :][:, :48], expected(whole, 1, SMALL.shape))


@pytest.mark.parametrize("markers", [b"\xff\xd0", b"\xff\xd7" * 70000])
def test_restart_markers_that_nothing_announces_are_declined(markers):
    chunk = encode(SMALL, "422", 75)
    start = data_start(chunk)
    for announced in (b"", b"\xff\xdd\x00\x04\x00\x01"):
        frame = chunk.index(b"\xff\xc0")
        whole = chunk[:frame] + announced + chunk[frame:start] + markers + chunk[start:]
        assert read([[whole]], SMALL.shape, (0, 0), (48, 32))[0] == b"\2"


class Changing:
    """Chunks that change the other arguments when they are counted, or taken."""

    def __init__(self, chunks, array, value, when):
        self._chunks, self._array, self._value, self._when = chunks, array, value, when

    def __len__(self):
        if self._when == "counted":
            self._array[...] = self._value
        return len(self._chunks)

    def __getitem__(self, place):
        if self._when == "taken":
            self._array[...] = self._value
        return self._chunks[place]


def arguments(count=1):
    """Of read_tiles(), of ``count`` chunks side by side, all of them read."""
    chunk = encode(SMALL, "422", 75)
    counts = np.full((1, count), len(chunk), np.uint32)
    return {
        "tables": NATIVE.Tables(NO_TABLES),
        "source": [chunk] * count,
        "offsets": np.zeros_like(counts),
        "counts": counts,
        "chunk": (48, 32, 3, False),
        "corners": np.zeros((1, 2), np.int64),
        "out": np.zeros((1, 32, 48 * count, 3), np.uint8),
        "shrink": 0,
    }


@pytest.mark.parametrize("when", ["counted", "taken"])
@pytest.mark.parametrize(("name", "value"), [("counts", 0), ("corners", 1 << 40), ("corners", -(1 << 40))])
def test_chunks_that_change_the_arrays_are_refused(name, value, when):
    given = arguments(3)
    given["source"] = Changing(given["source"], given[name], value, when)
    with pytest.raises(ValueError, match="not as many chunks"):
        NATIVE.read_tiles(*given.values())


@pytest.mark.parametrize("name", ["offsets", "counts", "corners"])
def test_arrays_that_are_not_aligned_are_refused(name):
    given = arguments()
    array = given[name]
    moved = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    given[name] = moved
    with pytest.raises(ValueError, match="do not fit"):
        NATIVE.read_tiles(*given.values())


def test_a_chunk_is_given_back_after_an_error():
    given = arguments(2)
    held = bytearray(given["source"][0])
    given["source"] = [held, None]
    with pytest.raises(TypeError):
        NATIVE.read_tiles(*given.values())
    held.append(0)  # a buffer that is held would refuse
    assert held[-1] == 0


def test_files_that_are_closed_or_too_short(tmp_path):
    path = tmp_path / "chunks"
    path.write_bytes(b"".join(arguments()["source"]))
    file = os.open(path, os.O_RDONLY)
    given = {**arguments(), "source": file}
    assert NATIVE.read_tiles(*given.values())[0] == b"\0"
    with pytest.raises(EOFError):
        NATIVE.read_tiles(*{**given, "counts": given["counts"] + 1}.values())
    with pytest.raises(OSError, match="argument"):
        NATIVE.read_tiles(*{**given, "offsets": np.full((1, 1), 1 << 63, np.uint64)}.values())
    os.close(file)
    with pytest.raises(OSError, match="descriptor"):
        NATIVE.read_tiles(*given.values())
    with pytest.raises(ValueError, match="closed"):
        NATIVE.read_tiles(*{**given, "source": -1}.values())


def test_many_calls_at_once_give_what_each_gives(tmp_path):
    calls = [arguments(count) for count in (1, 3, 2)]
    alone = [(NATIVE.read_tiles(*given.values())[0], given["out"].copy()) for given in calls]
    for given in calls:
        given["out"][:] = 0
    calls[1]["source"] = 99_999_999  # no such file
    short = tmp_path / "short"
    short.write_bytes(b"\xff\xd8")
    with short.open("rb") as file:
        calls[2]["source"] = file.fileno()
        results = NATIVE.read_many([tuple(given.values()) for given in calls])
    assert results[0][0] == alone[0][0]
    assert np.array_equal(calls[0]["out"], alone[0][1])
    assert isinstance(results[1], OSError)
    assert isinstance(results[2], EOFError)
    assert NATIVE.read_many([]) == []


def test_one_call_that_makes_no_sense_stops_all():
    good, bad = arguments(), arguments()
    good["out"][:] = 0
    bad["shrink"] = 9
    with pytest.raises(ValueError, match="do not fit"):
        NATIVE.read_many([tuple(good.values()), tuple(bad.values())])
    assert not good["out"].any()
    for calls, message in (([list(good.values())], "tuple"), ([()], "argument"), (3, "iterable")):
        with pytest.raises(TypeError, match=message):
            NATIVE.read_many(calls)


@pytest.mark.parametrize("name", ["counts", "corners"])
def test_a_later_call_that_changes_the_arrays_of_an_earlier_one_is_refused(name):
    first, second = arguments(), arguments()
    second["source"] = Changing(second["source"], first[name], 0 if name == "counts" else 1 << 40, "taken")
    with pytest.raises(ValueError, match="not as many chunks"):
        NATIVE.read_many([tuple(first.values()), tuple(second.values())])


def test_digests_take_bytes_only():
    assert NATIVE.digests([]) == []
    one, other, same = NATIVE.digests([b"a" * 100, bytearray(b"a" * 99 + b"b"), memoryview(b"a" * 100)])
    assert one == same != other
    with pytest.raises(TypeError):
        NATIVE.digests([b"a", 3])
    with pytest.raises(TypeError):
        NATIVE.digests(3)


@pytest.mark.parametrize("index", [-1, 4, -(1 << 31), (1 << 31) - 1])
@pytest.mark.parametrize("axis", [1, 4])
def test_resampling_refuses_pixels_that_are_not_there(axis, index):
    ones = [np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32), np.ones(2, np.float32)]
    given = [np.zeros((4, 4, 3), np.uint8), *ones, *ones, np.zeros((2, 2, 3), np.uint8)]
    NATIVE.resample(*given)
    given[axis] = np.array([[0], [index]], np.int32)
    with pytest.raises(ValueError, match="do not fit"):
        NATIVE.resample(*given)

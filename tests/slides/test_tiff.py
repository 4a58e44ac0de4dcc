"""The TIFF index: both byte orders, classic and big, and nothing a malformed file can do."""

import gc
import struct
import tracemalloc
import weakref

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gigatome.blob.remote import HEAD_BYTES
from gigatome.blob.store import open_blob
from gigatome.core.errors import DamagedSlideError, NotASlideError, SlideError
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import MAX_PAGES, TiffFile
from gigatome.slides.vendors import recognise
from tiff_files import (
    ASCII,
    LONG,
    LONG8,
    SHORT,
    Page,
    aperio_pages,
    halved,
    jpeg_page,
    picture,
    raw_page,
    strip_page,
    tiff_bytes,
    tiled_page,
    write_tiff,
)

IMAGE = picture(150, 100)


class CountingBlob:
    """Bytes in memory that count the requests, as a bucket would bill them."""

    def __init__(self, data):
        self.uri, self.data, self.size, self.requests, self.asked = "memory", data, len(data), 0, 0

    def read(self, offset, length):
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges):
        assert all(min(offset, length) >= 0 and offset + length <= self.size for offset, length in ranges)
        self.requests += len(ranges)
        self.asked += sum(length for _, length in ranges)
        return [self.data[offset : offset + length] for offset, length in ranges]

    def close(self):
        pass


class RemoteBlob(CountingBlob):
    """As a bucket's: opening it was one request, which brought the first 64 KiB."""

    def __init__(self, data):
        super().__init__(data)
        self.uri, self.requests = "https://host/a.svs", 1

    def read_ranges(self, ranges):
        known = [offset + length <= HEAD_BYTES for offset, length in ranges]
        found = super().read_ranges(ranges)
        self.requests -= sum(known)
        return found


def parse(data):
    return TiffFile(CountingBlob(data), "x.tif")


def index_all(data):
    """Everything that is read of a page, and where its chunks lie."""
    tiff = parse(data)
    recognise(tiff)
    return [page.coding for page in tiff.pages], tiff.chunks(tiff.pages)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_index_equals_tifffile(tmp_path, order, big):
    path = write_tiff(tmp_path / "a.svs", aperio_pages(picture(900, 700)), order=order, big=big)
    ours = TiffFile(open_blob(path), "a.svs")
    with tifffile.TiffFile(path) as theirs:
        assert ours.source.big == theirs.is_bigtiff == big
        assert len(ours.pages) == len(theirs.pages)
        for page, other in zip(ours.pages, theirs.pages, strict=True):
            assert (page.width, page.height) == (other.imagewidth, other.imagelength)
            assert page.tiled == other.is_tiled
            assert page.compression == other.compression
            assert page.photometric == other.photometric
            assert page.description == other.description
            assert page.coding.tables == (other.jpegtables or b"")
            if page.tiled:
                (index,) = ours.chunks([page])
                assert index.offsets.dtype == index.counts.dtype == np.uint32
                assert index.offsets.shape == (page.rows, page.columns)
                assert tuple(index.offsets.ravel()) == other.dataoffsets
                assert tuple(index.counts.ravel()) == other.databytecounts


def test_few_requests():
    data = tiff_bytes(aperio_pages(picture(900, 700)))
    blob = CountingBlob(data)
    tiff = TiffFile(blob, "x")
    tiff.chunks(tiff.pages[:1])
    assert blob.requests <= len(data) // (1 << 15) + 1 + 2


def scanned(sizes):
    """A slide whose levels hold so many bytes, in an Aperio's order: thumbnail behind level 0, label at the end."""
    pages = []
    for number, size in enumerate(sizes):
        level = np.zeros((4096 >> number, 4096 >> number, 3), np.uint8)
        chunks = (level.shape[0] // 64) ** 2
        pages.append(tiled_page(level, 64, 7, [b"\1" * (size // chunks)] * chunks, photometric=6))
    small = strip_page(IMAGE)
    return [pages[0], Page(small.tags, [bytes(300_000)]), *pages[1:], *[Page(small.tags, [bytes(100_000)])] * 2]


@pytest.mark.parametrize(("sizes", "requests"), [((6 << 20, 3 << 20, 1 << 20), 3), ((6 << 20,), 2)])
def test_few_requests_to_a_bucket(sizes, requests):
    """One for the head, one for each page beyond reach of the last, none for thumbnail, label and macro."""
    blob = RemoteBlob(tiff_bytes(scanned(sizes)))
    index = recognise(TiffFile(blob, "x"))
    assert len(index.levels) == len(sizes)
    assert blob.requests <= requests


def test_a_file_that_came_with_the_first_request():
    blob = RemoteBlob(tiff_bytes(aperio_pages(picture(300, 200))))
    assert len(recognise(TiffFile(blob, "x")).levels) == 2
    assert blob.requests == 1


def test_remote_and_local_give_the_same():
    data = tiff_bytes(scanned((6 << 20, 3 << 20, 1 << 20)))
    local = CountingBlob(data)
    one, other = (recognise(TiffFile(blob, "x")) for blob in (local, RemoteBlob(data)))
    for level, twin in zip(one.levels, other.levels, strict=True):
        assert np.array_equal(level.offsets, twin.offsets)
        assert np.array_equal(level.counts, twin.counts)
    assert local.asked < 1 << 18


def test_values_of_pages_that_are_no_levels_are_not_read():
    """A label may hold what it likes as long as its sizes can be read."""
    label = strip_page(IMAGE, t270=(ASCII, "label" * 10), t258=(SHORT, []), t259=(SHORT, []))
    data = tiff_bytes([*aperio_pages(picture(300, 200)), label])
    assert len(recognise(parse(data)).levels) == 2


def test_what_was_read_is_given_back_with_the_file():
    """At once, not when the garbage collector comes by: thousands of slides are opened one after another."""
    tiff = parse(tiff_bytes(aperio_pages(picture(300, 200))))
    source = weakref.ref(tiff.source)
    gc.disable()
    try:
        index = recognise(tiff)
        del tiff
        assert source() is None
    finally:
        gc.enable()
    assert index.levels


def test_sub_pages():
    children = [(LONG, [8, 8]), (LONG, [1 << 31]), (LONG, [8] * (MAX_PAGES + 1))]
    for tag, message in zip(children, (None, "behind its end", "sub-pages"), strict=True):
        data = bytearray(tiff_bytes([raw_page(IMAGE, 64, t330=tag), raw_page(halved(IMAGE, 2), 64)]))
        first = struct.unpack_from("<I", data, 4)[0]
        if message is None:
            # Twice the page itself.
            at = data.index(struct.pack("<HHI", 330, LONG, 2), first)
            place = struct.unpack_from("<I", data, at + 8)[0]
            struct.pack_into("<II", data, place, first, first)
            tiff = parse(bytes(data))
            assert [page.width for page in tiff.sub_pages(tiff.pages[0])] == [150, 150]
            assert tiff.sub_pages(tiff.pages[1]) == ()
            continue
        tiff = parse(bytes(data))
        with pytest.raises(DamagedSlideError, match=message):
            tiff.sub_pages(tiff.pages[0])


def test_what_is_no_tiff():
    for data in (b"", b"II", b"hello, this is text", b"II\x2b", b"II\x2c\0" + bytes(20), b"MZ" + bytes(100)):
        with pytest.raises(NotASlideError, match=r"x\.tif: is not a TIFF"):
            parse(data)


def test_every_truncation_is_refused():
    data = tiff_bytes([jpeg_page(IMAGE, 64)])
    for length in range(8, len(data), 7):
        with pytest.raises(DamagedSlideError, match=r"truncated|behind"):
            index_all(data[:length])


def test_a_chain_of_pages_that_is_a_circle_or_endless():
    data = bytearray(tiff_bytes([raw_page(IMAGE, 64)]))
    first = struct.unpack_from("<I", data, 4)[0]
    end = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, end, first)
    with pytest.raises(DamagedSlideError, match="circle"):
        parse(bytes(data))
    with pytest.raises(DamagedSlideError, match=f"more than {MAX_PAGES} pages"):
        parse(tiff_bytes([raw_page(IMAGE[:20, :20], 32)] * (MAX_PAGES + 1)))
    parse(tiff_bytes([raw_page(IMAGE[:20, :20], 32)] * MAX_PAGES))
    with pytest.raises(DamagedSlideError, match="no page"):
        parse(b"II\x2a\0" + bytes(4))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"t256": (LONG, [0])}, "0 × 100"),
        ({"t257": (LONG, [(1 << 20) + 1])}, "× 1048577"),
        ({"t256": None}, "no tag 256"),
        ({"t322": (SHORT, [0])}, "chunks of 0"),
        ({"t322": (SHORT, [8])}, "chunks of 8"),
        ({"t323": (LONG, [5000])}, "chunks of 64 × 5000"),
        ({"t324": (LONG, [8] * 7)}, "lists 7 chunks where its size implies 6"),
        ({"t325": (LONG, [8] * 5)}, "lists 5 chunks"),
        ({"t325": (LONG, [8] * 5 + [1 << 30])}, "chunk of 1073741824 bytes"),
        ({"t324": (LONG, [8] * 5 + [(1 << 32) - 4])}, "1 chunks of page 0 lie behind"),
        ({"t324": (LONG8, [8] * 5 + [(1 << 64) - 4])}, "1 chunks of page 0 lie behind"),
        ({"t256": (LONG, [1 << 20]), "t257": (LONG, [1 << 20])}, "more than 16777216"),
        ({"t32997": (LONG, [4])}, "volume"),
        ({"t259": (SHORT, [])}, "tag 259"),
    ],
)  # fmt: skip
def test_contradictions(tags, message):
    data = tiff_bytes([raw_page(IMAGE, 64, **tags)])
    with pytest.raises(DamagedSlideError, match=message):
        index_all(data)


def test_too_many_tags():
    data = bytearray(tiff_bytes([raw_page(IMAGE, 64)])) + bytes(60_000)
    struct.pack_into("<H", data, struct.unpack_from("<I", data, 4)[0], 4097)
    with pytest.raises(DamagedSlideError, match="4097 tags"):
        parse(bytes(data))


def test_a_count_of_two_to_the_thirty_costs_nothing():
    data = bytearray(tiff_bytes([raw_page(IMAGE, 64)]))
    at = struct.unpack_from("<I", data, 4)[0] + 2
    while struct.unpack_from("<H", data, at)[0] != 324:
        at += 12
    struct.pack_into("<I", data, at + 4, 1 << 30)
    tracemalloc.start()
    with pytest.raises(DamagedSlideError, match="1073741824"):
        index_all(bytes(data))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


SMALL = {
    "jpeg": tiff_bytes([jpeg_page(IMAGE, 64), jpeg_page(IMAGE[:50, :75], 64)]),
    "big": tiff_bytes([jpeg_page(IMAGE, 64, "rgb")], order=">", big=True),
    "lzw": tiff_bytes([raw_page(IMAGE, 64, 5, 2), raw_page(IMAGE[:50, :75], 64, 8)]),
}


@pytest.mark.parametrize("kind", SMALL)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
@example([(5, 255)], False)
def test_mutated_files_raise_slide_errors_only(tmp_path, monkeypatch, kind, changes, in_the_header):
    """Bytes are changed anywhere, or in the directories, which lie in the second half of these files."""
    data = bytearray(SMALL[kind])
    for position, value in changes:
        data[-1 - position % 600 if in_the_header else position % len(data)] = value
    (tmp_path / "a.tif").write_bytes(data)
    try:
        with open_slide(tmp_path / "a.tif") as slide:
            for level, item in enumerate(slide.levels):
                side_x, side_y = min(item.width, 300), min(item.height, 300)
                pixels = slide.read_level(level, 0, 0, side_x, side_y)
                assert pixels.shape == (side_y, side_x, 3)
    except SlideError:
        pass


def test_unchanged_files_of_the_fuzzer_open(tmp_path):
    for data in SMALL.values():
        (tmp_path / "a.tif").write_bytes(data)
        assert open_slide(tmp_path / "a.tif").width == 150

"""NDPI read directly: OpenSlide's pixels from single restart intervals, and offsets beyond 4 GB."""

import struct

import numpy as np
import pytest

from gigatome.blob.store import open_blob
from gigatome.core.errors import DamagedSlideError
from gigatome.core.geometry import Box
from gigatome.slides.hamamatsu import recognise
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import TiffFile
from range_server import serve
from tiff_files import FLOAT, LONG, SHORT, SLONG, halved, ndpi_page, ndpi_pages, picture, write_ndpi

openslide = pytest.importorskip("openslide")
IMAGE = picture(512, 384)
# Restart intervals of level 0 are 64 × 8 pixels.
TILES = [(0, 0, 512, 384), (60, 6, 70, 40), (448, 376, 64, 8), (1, 1, 1, 1)]


def index_of(path):
    return recognise(TiffFile(open_blob(path), "a.ndpi"))


def recognised(tmp_path, pages):
    return index_of(write_ndpi(tmp_path / "a.ndpi", pages))


def stored_level(oracle, width):
    """OpenSlide offers levels shrunk while decoding too; the one that is stored."""
    return [size[0] for size in oracle.level_dimensions].index(width)


def assert_equals_openslide(path):
    with open_slide(path) as slide, openslide.OpenSlide(path) as oracle:
        assert (slide.reader, slide.vendor) == ("tiff", oracle.properties["openslide.vendor"]) == ("tiff", "hamamatsu")
        assert [(level.width, level.height, level.downsample) for level in slide.levels] == [
            (512, 384, 1), (256, 192, 2), (64, 48, 8)
        ]  # fmt: skip
        assert [(level.chunk_width, level.chunk_height) for level in slide.levels] == [(64, 8), (64, 8), (64, 48)]
        for number, level in enumerate(slide.levels):
            size = (level.width, level.height)
            whole = np.asarray(oracle.read_region((0, 0), stored_level(oracle, level.width), size))[..., :3]
            assert np.array_equal(slide.read_level(number, 0, 0, *size), whole)
            if number == 0:
                for x, y, width, height in TILES:
                    assert np.array_equal(slide.read(Box(x, y, width, height)), whole[y : y + height, x : x + width])
        for axis in "xy":
            assert float(slide.properties[f"mpp-{axis}"]) == float(oracle.properties[f"openslide.mpp-{axis}"])
        assert slide.properties["hamamatsu.Product"] == oracle.properties["hamamatsu.Product"] == "C13210"
        assert slide.properties["hamamatsu.SourceLens"] == "20"


def test_equals_openslide(tmp_path):
    assert_equals_openslide(write_ndpi(tmp_path / "a.ndpi", ndpi_pages(IMAGE)))


@pytest.mark.parametrize("start", [(1 << 32) - 20_000, 5 << 30])
def test_offsets_beyond_4_gb(tmp_path, start):
    """Sparse files: the levels lie across the 4 GB line, or all of them behind it."""
    path = write_ndpi(tmp_path / "a.ndpi", ndpi_pages(IMAGE), start=start)
    assert index_of(path).levels[0].offsets.dtype == np.uint64
    assert_equals_openslide(path)


def test_frames_that_state_no_size(tmp_path):
    """A JPEG cannot state more than 65500 pixels; then the page's size holds."""
    image = picture(66_048, 16)
    path = write_ndpi(tmp_path / "a.ndpi", [ndpi_page(image[:, :65_024], 127, stated=(0, 0))])
    assert index_of(path) is None
    page = ndpi_page(image[:, :65_024], 127)
    page.tags[256] = (LONG, [66_048])
    assert recognised(tmp_path, [page]) is None


def test_few_requests(tmp_path):
    data = write_ndpi(tmp_path / "a.ndpi", ndpi_pages(picture(2048, 1536))).read_bytes()
    with serve({"a.ndpi": data}) as server, open_slide(f"{server.url}/a.ndpi") as slide:
        assert len(slide.levels) == 3
        assert len(server.requests) <= 3


def test_other_focal_planes_and_macro_are_no_levels(tmp_path):
    pages = ndpi_pages(IMAGE)
    other = ndpi_page(IMAGE)
    other.tags[65424] = (SLONG, [-400])
    assert len(recognised(tmp_path, [*pages[:1], other, *pages[1:]]).levels) == 3


def changed(position, **tags):
    pages = ndpi_pages(IMAGE)
    for key, value in tags.items():
        pages[position].tags[int(key[1:])] = value
    return pages


@pytest.mark.parametrize(
    "pages",
    [
        ndpi_pages(IMAGE)[::-1],
        ndpi_pages(IMAGE)[3:],
        [ndpi_page(picture(500, 384), 4)],
        [ndpi_page(picture(512, 380), 4)],
        [ndpi_page(IMAGE, 4, "4:2:0")],
        [ndpi_page(IMAGE, 5)],
        [ndpi_page(IMAGE, 4, t65426=(LONG, [600, 700]))],
        [ndpi_page(IMAGE, 4, stated=(512, 368))],
        [ndpi_page(picture(4112, 64), 0)],
        changed(0, t65421=(LONG, [20])),
        changed(0, t65424=(FLOAT, [0.0])),
        changed(0, t65426=(SHORT, [600] * 384)),
        changed(0, t278=(LONG, [100])),
        changed(0, t259=(SHORT, [8])),
        changed(2, t65426=(LONG, [600])),
    ],
)
def test_what_is_left_to_openslide(tmp_path, pages):
    assert recognised(tmp_path, pages) is None


def test_starts_that_are_not_in_order_or_not_behind_the_header(tmp_path):
    page = ndpi_page(IMAGE)
    kind, starts = page.tags[65426]
    for wrong in ([starts[1], starts[0], *starts[2:]], [starts[0] - 1, *starts[1:]], [*starts[:-1], 1 << 30]):
        page.tags[65426] = (kind, wrong)
        assert recognised(tmp_path, [page]) is None


def test_a_restart_interval_that_does_not_end_where_the_list_says(tmp_path):
    page = ndpi_page(IMAGE)
    kind, starts = page.tags[65426]
    page.tags[65426] = (kind, [*starts[:5], starts[5] - 9, *starts[6:]])
    path = write_ndpi(tmp_path / "a.ndpi", [page])
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 256, 8))
        with pytest.raises(DamagedSlideError, match="chunk"):
            slide.read(Box(256, 0, 64, 8))


def test_headers_that_end_early(tmp_path):
    """Each place where the list of restart intervals may claim that the header ends, and segments cut short."""
    page = ndpi_page(picture(128, 64))
    kind, starts = page.tags[65426]
    for length in range(1, starts[0]):
        page.tags[65426] = (kind, [length, *starts[1:]])
        assert recognised(tmp_path, [page]) is None
    page.tags[65426] = (kind, starts)
    (data,) = page.chunks
    for marker in (b"\xff\xe0", b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xdd", b"\xff\xda"):
        for length in range(12):
            at = data.index(marker) + 2
            page.chunks = [data[:at] + bytes([0, length]) + data[at + 2 :]]
            recognised(tmp_path, [page])


def test_every_truncation_is_refused(tmp_path):
    data = write_ndpi(tmp_path / "a.ndpi", [ndpi_page(halved(IMAGE, 4))]).read_bytes()
    place = struct.unpack_from("<Q", data, 4)[0]
    # The upper half of the last offset is zero: without it nothing is lost.
    end = place + 2 + 12 * struct.unpack_from("<H", data, place)[0] + 4
    for length in (*range(20, place, 997), *range(place, end, 13)):
        (tmp_path / "cut.ndpi").write_bytes(data[:length])
        with pytest.raises(DamagedSlideError):
            open_slide(tmp_path / "cut.ndpi")

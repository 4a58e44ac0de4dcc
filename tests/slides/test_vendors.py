"""Which dialect a TIFF is of, and what its scanner wrote."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatome.blob.store import open_blob
from gigatome.core.errors import DamagedSlideError, SlideError
from gigatome.slides.tiff import TiffFile
from gigatome.slides.vendors import aperio_properties, is_foreign, recognise
from tiff_files import (
    APERIO,
    ASCII,
    BYTE,
    LONG,
    RATIONAL,
    SHORT,
    aperio_pages,
    encode_info,
    halved,
    jpeg_page,
    ndpi_pages,
    philips_pages,
    picture,
    raw_page,
    strip_page,
    tiff_bytes,
    ventana_pages,
    write_ndpi,
    write_tiff,
)

IMAGE = picture(448, 320)
SMALL = halved(IMAGE, 2)


def parsed(path):
    return TiffFile(open_blob(path), "a.tif")


@pytest.fixture
def tiff(tmp_path):
    return lambda pages: parsed(write_tiff(tmp_path / "a.tif", pages))


@pytest.mark.parametrize(
    ("vendor", "foreign", "pages"),
    [
        ("aperio", False, aperio_pages(IMAGE)),
        ("generic-tiff", False, [jpeg_page(IMAGE, 64)]),
        ("philips", True, philips_pages(IMAGE)),
        ("ventana", True, ventana_pages(IMAGE)),
        ("ventana", True, ventana_pages(IMAGE, info=encode_info(7, 5))),
    ],
)
def test_dialects(tiff, vendor, foreign, pages):
    assert recognise(tiff(pages)).vendor == vendor
    assert is_foreign(tiff(pages)) == foreign


def test_ndpi(tmp_path):
    file = parsed(write_ndpi(tmp_path / "a.ndpi", ndpi_pages(picture(512, 384))))
    assert file.source.ndpi
    assert is_foreign(file)
    assert recognise(file).vendor == "hamamatsu"


@pytest.mark.parametrize(
    "tags",
    [
        {"t65420": (LONG, [1])},
        {"t305": (ASCII, "MedScan 1.0")},
        {"t305": (ASCII, "Philips DP v1.0")},
        {"t271": (ASCII, "Huron TissueScope")},
        {"t270": (ASCII, '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">')},
        {"t65000": (ASCII, "<Argos.Scan.Metadata>")},
        {"t700": (BYTE, b"<iScan/>")},
    ],
)
def test_what_is_left_to_openslide(tiff, tags):
    file = tiff([raw_page(IMAGE, 64, **tags)])
    assert is_foreign(file)
    assert recognise(file) is None


@pytest.mark.parametrize(
    "page",
    [
        raw_page(IMAGE, 64, t259=(SHORT, [50_000])),
        raw_page(IMAGE, 64, t258=(SHORT, [16, 16, 16])),
        raw_page(IMAGE, 64, t262=(SHORT, [5])),
        raw_page(IMAGE, 64, t317=(SHORT, [3])),
        strip_page(IMAGE),
    ],
)
def test_what_is_left_to_tifffile(tiff, page):
    file = tiff([page])
    assert recognise(file) is None
    assert not is_foreign(file)


def test_levels_are_smaller_copies_of_the_largest_page(tiff):
    pages = [
        raw_page(SMALL, 64),
        raw_page(IMAGE, 64),
        raw_page(halved(IMAGE, 4)[:60], 64),
        raw_page(SMALL, 64),
        raw_page(halved(IMAGE, 3), 64, t254=(LONG, [4])),
        raw_page(halved(IMAGE, 4), 64),
    ]
    index = recognise(tiff(pages))
    assert [(level.width, level.height, level.scale_x) for level in index.levels] == [
        (448, 320, 1),
        (224, 160, 2),
        (112, 80, 4),
    ]


def test_aperio_properties(tiff):
    index = recognise(tiff(aperio_pages(IMAGE, description=APERIO.replace("0.2500", "0,4990") + "|MPP = x=y|a")))
    assert index.properties["aperio.MPP"] == "x=y"
    assert index.mpp is None
    assert aperio_properties("Aperio|MPP = 0.2|MPP=0.3 |a") == {"MPP": "0.3"}
    for text, mpp in (("0,4990", 0.499), ("0", None), ("-1", None), ("inf", None), ("nan", None), ("", None)):
        index = recognise(tiff(aperio_pages(IMAGE, description=APERIO.replace("0.2500", text))))
        assert index.mpp == (mpp and (mpp, mpp))


@pytest.mark.parametrize(
    ("x", "y", "unit", "mpp"),
    [
        ([40_000, 1], [20_000, 1], 3, (0.25, 0.5)),
        ([101_600, 1], [101_600, 1], 2, (0.25, 0.25)),
        ([40_000, 1], [40_000, 1], 1, None),
        ([72, 1], [72, 1], 2, None),
        ([1, 1], [1, 1], 3, None),
        ([40_000, 0], [40_000, 1], 3, None),
        ([4_000_000, 1], [4_000_000, 1], 3, None),
    ],
)
def test_resolution_tags(tiff, x, y, unit, mpp):
    tags = {"t282": (RATIONAL, x), "t283": (RATIONAL, y), "t296": (SHORT, [unit])}
    assert recognise(tiff([raw_page(IMAGE, 64, **tags)])).mpp == mpp


SEEDS = {
    "aperio": tiff_bytes(aperio_pages(IMAGE)),
    "philips": tiff_bytes(philips_pages(IMAGE)),
    "ventana": tiff_bytes(ventana_pages(IMAGE)),
    "bif": tiff_bytes(ventana_pages(IMAGE, info=encode_info(7, 5)), order=">", big=True),
}


@pytest.mark.parametrize("dialect", [*SEEDS, "ndpi"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 3000))
def test_damaged_files(tmp_path, dialect, changes, cut):
    """Bytes are changed in the last directory, its values and the XML, or the file is cut there."""
    path = tmp_path / dialect
    if dialect == "ndpi":
        write_ndpi(path, ndpi_pages(picture(128, 64)))
    data = bytearray(SEEDS.get(dialect) or path.read_bytes())
    for position, value in changes:
        data[-1 - position % min(len(data), 6000)] = value
    path.write_bytes(data[: len(data) - cut] if cut % 2 else data)
    try:
        index = recognise(parsed(path))
    except SlideError:
        return
    for level in index.levels if index else ():
        assert (level.offsets.astype(np.int64) + level.counts)[level.counts > 0].max(initial=0) <= path.stat().st_size
        assert level.offsets.shape == (-(-level.height // level.chunk_height), -(-level.width // level.chunk_width))


@pytest.mark.parametrize("pages", [philips_pages(IMAGE), ventana_pages(IMAGE), aperio_pages(IMAGE)])
def test_chunks_behind_the_end(tiff, pages):
    level = next(page for page in pages if 322 in page.tags)
    level.tags[325] = (LONG, [1 << 25] * len(level.chunks))
    with pytest.raises(DamagedSlideError, match="behind the end"):
        recognise(tiff(pages))

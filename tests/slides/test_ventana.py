"""Ventana TIFF and plain BIF read directly: OpenSlide's pixels; what must be stitched is left to it."""

import numpy as np
import pytest

from gigatome.blob.store import open_blob
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import TiffFile
from gigatome.slides.ventana import recognise
from tiff_files import ASCII, encode_info, jpeg_page, picture, ventana_pages, write_tiff

pytest.importorskip("openslide")
IMAGE = picture(448, 320)
PLAIN = encode_info(7, 5)


def recognised(tmp_path, pages):
    return recognise(TiffFile(open_blob(write_tiff(tmp_path / "a.bif", pages)), "a"))


@pytest.mark.parametrize(
    "pages",
    [
        ventana_pages(picture(450, 333)),
        ventana_pages(IMAGE, info=PLAIN, scales=(1, 2, 4, 8)),
        ventana_pages(IMAGE, info=PLAIN, iscan='<Metadata><iScan ScanRes="0.5" Z-layers="1"/></Metadata>'),
    ],
    ids=["tiff", "bif", "metadata"],
)
def test_equals_openslide(tmp_path, pages):
    path = write_tiff(tmp_path / "a.bif", pages)
    with open_slide(path) as slide, open_slide(path, reader="openslide") as oracle:
        assert (slide.reader, slide.vendor, slide.mpp) == ("tiff", oracle.vendor, oracle.mpp)
        for level, other in zip(slide.levels, oracle.levels, strict=True):
            assert (level.width, level.height, level.downsample) == (other.width, other.height, other.downsample)
        for number, level in enumerate(slide.levels):
            whole = (number, 0, 0, level.width, level.height)
            assert np.array_equal(slide.read_level(*whole), oracle.read_level(*whole))
        assert {k: v for k, v in slide.properties.items() if "ventana" in k}.items() <= oracle.properties.items()


@pytest.mark.parametrize(
    "info",
    [
        encode_info(7, 5, overlap=3),
        encode_info(7, 5, position="12"),
        encode_info(7, 5, position="x"),
        encode_info(7, 4),
        encode_info(7, 5, side=32),
        encode_info(7, 5, scanned=0),
        PLAIN.replace('OriginX="0"', 'OriginX="64"'),
        PLAIN.replace("</AoiOrigin>", '<AOI1 OriginX="0" OriginY="0"/></AoiOrigin>'),
        PLAIN.replace('Confidence="98"', 'Confidence="0"'),
        PLAIN.replace("RIGHT", "LEFT"),
        PLAIN[:-4],
    ],
)
def test_what_is_left_to_openslide(tmp_path, info):
    assert recognised(tmp_path, ventana_pages(IMAGE, info=PLAIN)) is not None
    assert recognised(tmp_path, ventana_pages(IMAGE, info=info)) is None


@pytest.mark.parametrize(
    "text", ["level=2 mag=20", "level=1 mag=40", "level=1 mag=0", "level=1 mag=1e-9", "level=1", "level=x mag=20"]
)
def test_levels_that_are_not_in_order(tmp_path, text):
    pages = ventana_pages(picture(450, 333), scales=(1, 2))
    pages[2].tags[270] = (ASCII, text)
    assert recognised(tmp_path, pages) is None


def test_pages_that_do_not_fit_their_magnification(tmp_path):
    pages = ventana_pages(picture(450, 333), scales=(1, 2))
    for image, side in ((picture(60, 40), 64), (picture(225, 166), 80)):
        pages[2] = jpeg_page(image, side, t270=(ASCII, "level=1 mag=20"))
        assert recognised(tmp_path, pages) is None
    pages[2] = jpeg_page(picture(225, 166), 64, t270=(ASCII, "level=1 mag=20"))
    assert recognised(tmp_path, pages) is not None
    pages[2].chunks[3] = b""
    assert recognised(tmp_path, pages) is None


def test_an_xml_that_is_broken(tmp_path):
    assert recognised(tmp_path, ventana_pages(IMAGE, iscan="<iScan>")) is None
    assert recognised(tmp_path, ventana_pages(IMAGE, iscan="<a><b>iScan</b></a>")) is None

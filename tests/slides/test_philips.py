"""Philips TIFF read directly: OpenSlide's pixels, sizes and scale."""

import numpy as np
import pytest

from gigatome.blob.store import open_blob
from gigatome.slides.philips import recognise
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import TiffFile
from tiff_files import ASCII, LONG, philips_pages, philips_xml, picture, write_tiff

pytest.importorskip("openslide")
# Two chunks short of a whole number at scale 4, so that pages are padded.
IMAGE = picture(448, 320)
SPACINGS = [(0.00025 * scale, 0.00025 * scale) for scale in (1, 2, 4)]


def recognised(tmp_path, pages):
    return recognise(TiffFile(open_blob(write_tiff(tmp_path / "a.tiff", pages)), "a"))


@pytest.mark.parametrize("missing", [(), (0, 8, 9, 20, 34)])
@pytest.mark.parametrize("big", [False, True])
def test_equals_openslide(tmp_path, missing, big):
    path = write_tiff(tmp_path / "a.tiff", philips_pages(IMAGE, missing=missing), big=big)
    with open_slide(path) as slide, open_slide(path, reader="openslide") as oracle:
        assert (slide.reader, slide.vendor) == ("tiff", oracle.vendor) == ("tiff", "philips")
        assert [(level.width, level.height) for level in slide.levels] == [(448, 320), (224, 160), (112, 80)]
        for level, other in zip(slide.levels, oracle.levels, strict=True):
            assert (level.width, level.height, level.downsample) == (other.width, other.height, other.downsample)
        for number, level in enumerate(slide.levels):
            whole = (number, 0, 0, level.width, level.height)
            read = slide.read_level(*whole)
            assert np.array_equal(read, oracle.read_level(*whole))
            assert (read[:64, :64] == 255).all() == (0 in missing)
        assert slide.mpp == oracle.mpp
        assert (slide.properties["mpp-x"], slide.properties["mpp-y"]) == ("0.25999999999999995", "0.25")
        found = {key: value for key, value in slide.properties.items() if key.startswith("philips.")}
        assert found.items() <= oracle.properties.items()
        assert "philips.DICOM_MANUFACTURER" in found


@pytest.mark.parametrize(
    "xml",
    [
        philips_xml(SPACINGS[:2]),
        philips_xml([*SPACINGS, (0.002, 0.002)]),
        philips_xml([SPACINGS[0], (0.00055, 0.00055), SPACINGS[2]]),
        philips_xml([SPACINGS[0], SPACINGS[2], SPACINGS[2]]),
        philips_xml([SPACINGS[0], SPACINGS[0], SPACINGS[2]]),
        philips_xml([SPACINGS[0], (0.0, 0.0005), SPACINGS[2]]),
        philips_xml([SPACINGS[0], (float("inf"), 0.0005), SPACINGS[2]]),
        philips_xml(SPACINGS, kinds=("WSI", "WSI")),
        philips_xml(SPACINGS, kinds=("MACROIMAGE",)),
        philips_xml(SPACINGS).replace("DPUfsImport", "DPImport"),
        philips_xml(SPACINGS)[:-5],
        "",
    ],
)
def test_what_is_left_to_openslide(tmp_path, xml):
    pages = philips_pages(IMAGE, xml=xml or " ")
    assert recognised(tmp_path, pages) is None


def test_pages_that_do_not_fit_their_scales(tmp_path):
    pages = philips_pages(IMAGE)
    assert recognised(tmp_path, pages) is not None
    pages[2].tags[254] = (LONG, [0])
    assert recognised(tmp_path, pages) is None
    pages = philips_pages(IMAGE)
    assert recognised(tmp_path, [pages[0], pages[2], pages[1]]) is None
    pages[0].tags[305] = (ASCII, "Philips")
    pages[1].tags[259] = (LONG, [50000])
    assert recognised(tmp_path, pages) is None


def test_without_a_spacing_of_the_slide_there_is_no_mpp(tmp_path):
    xml = philips_xml(SPACINGS)
    stated = xml.index('<Attribute Name="DICOM_PIXEL_SPACING"')
    end = xml.index("</Attribute>", stated) + len("</Attribute>")
    index = recognised(tmp_path, philips_pages(IMAGE, xml=xml[:stated] + xml[end:]))
    assert index.mpp is None
    assert [level.scale_x for level in index.levels] == [1, 2, 4]

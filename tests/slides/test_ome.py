"""OME-TIFF read directly: what tifffile gives, and nothing that is not plainly a slide."""

import numpy as np
import pytest
import tifffile

from gigatome.blob.store import open_blob
from gigatome.core.geometry import Box
from gigatome.slides.ome import recognise
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import TiffFile
from range_server import serve
from tiff_files import ASCII, LONG, SHORT, halved, jpeg_page, picture, write_tiff

IMAGE = picture(500, 380)
PHYSICAL = {"PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
TILED = {"tile": (64, 64), "photometric": "rgb"}


def write_ome(path, image=IMAGE, levels=(2, 4), metadata=PHYSICAL, **options):
    options = TILED | options
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(image, subifds=len(levels), metadata=metadata, **options)
        for factor in levels:
            writer.write(halved(image, factor), subfiletype=1, **options)
    return path


def index_of(path):
    return recognise(TiffFile(open_blob(path), "a"))


def xml(*pixels, uuid="urn:uuid:1"):
    images = "".join(f'<Image ID="Image:{k}">{item}</Image>' for k, item in enumerate(pixels))
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return f'<?xml version="1.0"?><OME xmlns="{schema}" UUID="{uuid}">{images}</OME>'


def pixels(width, height, *, data='<TiffData IFD="0" PlaneCount="1"/>', channels="3", c=3, z=1, kind="uint8"):
    return (
        f'<Pixels DimensionOrder="XYCZT" Type="{kind}" SizeX="{width}" SizeY="{height}" SizeC="{c}" SizeZ="{z}" '
        f'SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel SamplesPerPixel="{channels}"/>{data}</Pixels>'
    )


def separate(path, description, factors=(2, 4), flag=1):
    """A pyramid whose levels stand in the chain of pages."""
    levels = [jpeg_page(halved(IMAGE, factor), 64, "rgb", t254=(LONG, [flag])) for factor in factors]
    return write_tiff(path, [jpeg_page(IMAGE, 64, "rgb", t270=(ASCII, description)), *levels])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw", "predictor": True},
        {"compression": "jpeg", "compressionargs": {"level": 80}},
        {"compression": "jpeg", "compressionargs": {"level": 80, "outcolorspace": "rgb"}},
        {"compression": "jpeg2000"},
    ],
)
def test_equals_tifffile(tmp_path, options):
    path = write_ome(tmp_path / "case.ome.tif", **options)
    with open_slide(path) as slide, open_slide(path, reader="tifffile") as oracle:
        assert (slide.reader, slide.vendor, slide.name, slide.mpp) == ("tiff", "ome-tiff", "case", 0.5)
        assert slide.bounds == Box(0, 0, 500, 380)
        assert [(level.width, level.downsample) for level in slide.levels] == [(500, 1), (250, 2), (125, 4)]
        for number, (level, other) in enumerate(zip(slide.levels, oracle.levels, strict=True)):
            assert (level.width, level.height, level.downsample) == (other.width, other.height, other.downsample)
            whole = (number, 0, 0, level.width, level.height)
            assert np.array_equal(slide.read_level(*whole), oracle.read_level(*whole))


def test_real(shared_data):
    path = shared_data / "formats" / "OS-1-detail.ome.tif"
    with open_slide(path) as slide, open_slide(path, reader="tifffile") as oracle:
        assert (slide.reader, slide.width, slide.height) == ("tiff", 1101, 1101)
        assert slide.mpp == pytest.approx(oracle.mpp)
        assert np.array_equal(slide.read(Box(0, 0, 1101, 1101)), oracle.read(Box(0, 0, 1101, 1101)))


def test_jfif_chunks_on_a_page_marked_as_rgb(tmp_path):
    """What Bio-Formats writes: whole JFIF files, which are YCbCr whatever the page says."""
    page = jpeg_page(IMAGE, 64, "420", tables=False, t270=(ASCII, xml(pixels(500, 380))), t262=(SHORT, [2]))
    assert page.chunks[0][6:10] == b"JFIF"
    path = write_tiff(tmp_path / "a.ome.tif", [page])
    with open_slide(path) as slide, open_slide(path, reader="tifffile") as oracle:
        assert slide.reader == "tiff"
        assert np.array_equal(slide.read(Box(0, 0, 500, 380)), oracle.read(Box(0, 0, 500, 380)))


def test_chunks_left_out_are_white(tmp_path):
    page = jpeg_page(IMAGE, 64, "rgb", t270=(ASCII, xml(pixels(500, 380))))
    page.chunks[9] = b""
    path = write_tiff(tmp_path / "a.ome.tif", [page])
    with open_slide(path) as slide, open_slide(path, reader="tifffile") as oracle:
        read = slide.read(Box(0, 0, 500, 380))
        assert slide.reader == "tiff"
        assert (read[64:128, 64:128] == 255).all()
        assert np.array_equal(read, oracle.read(Box(0, 0, 500, 380)))


def test_levels_in_the_chain_of_pages(tmp_path):
    path = separate(tmp_path / "a.ome.tif", xml(pixels(500, 380)))
    index = index_of(path)
    assert [(level.width, level.scale_x) for level in index.levels] == [(500, 1), (250, 2), (125, 4)]
    with open_slide(path) as slide, tifffile.TiffFile(path) as oracle:
        for number, level in enumerate(slide.levels):
            read = slide.read_level(number, 0, 0, level.width, level.height)
            assert np.array_equal(read, oracle.pages[number].asarray())


def test_pages_that_are_no_levels(tmp_path):
    """Pages not marked as smaller copies, of another aspect, or claimed by the XML."""
    other = pixels(250, 190, data='<TiffData IFD="1"/>')
    for description, flag, levels in (
        (xml(pixels(500, 380)), 0, 1),
        (xml(pixels(500, 380), other), 1, 2),
        (xml(pixels(500, 380), other, pixels(125, 95, data='<TiffData IFD="2"/>')), 1, 1),
    ):
        index = index_of(separate(tmp_path / "a.ome.tif", description, flag=flag))
        assert len(index.levels) == levels


def test_the_largest_picture_and_its_own_mpp(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(IMAGE[:100, :90], metadata={"PhysicalSizeX": 9.0, "PhysicalSizeY": 9.0}, **TILED)
        writer.write(IMAGE, metadata=PHYSICAL, **TILED)
    index = index_of(path)
    assert (index.levels[0].width, index.mpp) == (500, (0.5, 0.5))


@pytest.mark.parametrize(
    "description",
    [
        xml(pixels(500, 381)),
        xml(pixels(500, 380, z=2)),
        xml(pixels(500, 380, c=4)),
        xml(pixels(500, 380, channels="1")),
        xml(pixels(500, 380, kind="uint16")),
        xml(pixels(500, 380, data="")),
        xml(pixels(500, 380, data='<TiffData IFD="7" PlaneCount="1"/>')),
        xml(pixels(500, 380, data='<TiffData IFD="-1"/>')),
        xml(pixels(500, 380, data='<TiffData IFD="0" PlaneCount="2"/>')),
        xml(pixels(500, 380, data='<TiffData IFD="0"><UUID FileName="b">urn:uuid:2</UUID></TiffData>')),
        xml(pixels(500, 380), pixels(900, 900, z=5)),
        xml(pixels(500, 380))[:-3],
        "<OME/>",
        '<!DOCTYPE OME [<!ENTITY a "b">]>' + xml(pixels(500, 380)).partition("?>")[2],
        xml(pixels(500, 380)) + "<a/>" * 200_001,
    ],
)
def test_what_is_left_to_tifffile(tmp_path, description):
    assert index_of(write_tiff(tmp_path / "a.ome.tif", [jpeg_page(IMAGE, 64, t270=(ASCII, description))])) is None


def test_its_own_uuid_names_this_file(tmp_path):
    data = '<TiffData IFD="0" PlaneCount="1"><UUID FileName="a">urn:uuid:1</UUID></TiffData>'
    page = jpeg_page(IMAGE, 64, t270=(ASCII, xml(pixels(500, 380, data=data))))
    assert index_of(write_tiff(tmp_path / "a.ome.tif", [page])) is not None


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ({"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 2.5e-4, "PhysicalSizeYUnit": "mm"}, 0.25),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}, 0.25),
        ({"PhysicalSizeX": 1, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 1, "PhysicalSizeYUnit": "pixel"}, None),
        ({"PhysicalSizeX": 0.25}, None),
        ({}, None),
    ],
)
def test_mpp(tmp_path, attributes, mpp):
    index = index_of(write_ome(tmp_path / "a.ome.tif", levels=(), metadata=attributes))
    assert index.mpp == (mpp if mpp is None else (mpp, mpp))


def test_sub_pages_that_are_no_pyramid(tmp_path):
    for levels in ((4, 2), (2, 2)):
        assert index_of(write_ome(tmp_path / "a.ome.tif", levels=levels)) is None


def test_few_requests(tmp_path):
    """Sub-pages are read together: one request for the head, one for each of the levels."""
    image = picture(1500, 1100)
    path = write_ome(tmp_path / "a.ome.tif", image)
    with serve({"a.ome.tif": path.read_bytes()}) as server, open_slide(f"{server.url}/a.ome.tif") as slide:
        assert slide.reader == "tiff"
        assert len(slide.levels) == 3
        assert len(server.requests) <= 4

"""OpenSlide and tifffile as readers of what is not decoded directly."""

import numpy as np
import pytest
import tifffile

from gigatome.core import extras
from gigatome.core.errors import DamagedSlideError, MissingExtraError, NotASlideError, SlideError
from gigatome.core.geometry import Box
from gigatome.slides.fallback import ome_mpp, over
from gigatome.slides.slide import open_slide
from range_server import serve
from tiff_files import ASCII, LONG, SHORT, UNDEFINED, halved, jpeg_page, picture, raw_page, strip_page, write_tiff

IMAGE = picture(500, 380)
PHYSICAL = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}


def write_ome(path, image, levels=(2, 4), metadata=PHYSICAL, **options):
    options = {"tile": (64, 64), "photometric": "rgb", **options}
    planar = options.get("planarconfig") == "separate"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(image.transpose(2, 0, 1) if planar else image, subifds=len(levels), metadata=metadata, **options)
        for factor in levels:
            level = np.dstack([halved(image[..., :3], factor), halved(image[..., 1:], factor)])[..., : image.shape[2]]
            writer.write(level.transpose(2, 0, 1) if planar else level, subfiletype=1, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw", "bigtiff": True},
        {"compression": "zstd"},
        {"planarconfig": "separate", "compression": "zlib"},
        {"tile": None, "rowsperstrip": 37},
    ],
)
def test_ome_tiff_with_subifds(tmp_path, options):
    big = options.pop("bigtiff", False)
    path = tmp_path / "case.ome.tif"
    if big:
        with tifffile.TiffWriter(path, ome=True, bigtiff=True, byteorder=">") as writer:
            writer.write(IMAGE, tile=(64, 64), photometric="rgb", metadata=PHYSICAL, **options)
    else:
        write_ome(path, IMAGE, **options)
    with open_slide(path, reader="tifffile") as slide:
        assert (slide.reader, slide.vendor, slide.name) == ("tifffile", "ome-tiff", "case")
        assert slide.mpp == 0.5
        assert [level.downsample for level in slide.levels] == ([1] if big else [1, 2, 4])
        assert np.array_equal(slide.read(Box(0, 0, 500, 380)), IMAGE)
        assert np.array_equal(slide.read(Box(61, 130, 70, 200)), IMAGE[130:330, 61:131])
        if not big:
            assert np.array_equal(slide.read_level(1, 100, 60, 150, 130), halved(IMAGE, 2)[60:190, 100:250])
            assert np.array_equal(slide.read_tile(4, 8, 64, 1.0, exact=False), halved(IMAGE, 2)[4:68, 2:66])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgba_is_laid_on_white(tmp_path, planar):
    alpha = np.full((*IMAGE.shape[:2], 1), 255, np.uint8)
    alpha[:100], alpha[100:200] = 0, 128
    rgba = np.dstack([IMAGE, alpha])
    path = write_ome(tmp_path / "a.ome.tif", rgba, (), planarconfig=planar, extrasamples=["unassalpha"])
    with open_slide(path) as slide:
        read = slide.read(Box(0, 0, 500, 380))
    assert (read[:100] == 255).all()
    assert np.array_equal(read[200:], IMAGE[200:])
    half = IMAGE[100:200] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read[100:200] - half).max() <= 0.51


def test_what_the_fourth_sample_is(tmp_path):
    """Premultiplied colours are not multiplied again, and a sample that is no alpha does not count; CMYK is refused."""
    rgba = np.dstack([IMAGE // 2, np.full(IMAGE.shape[:2], 128, np.uint8)])
    for kind, expected in (("assocalpha", IMAGE // 2 + 127.0), ("unspecified", IMAGE // 2)):
        with open_slide(write_ome(tmp_path / "a.ome.tif", rgba, (), extrasamples=[kind])) as slide:
            assert np.abs(slide.read(Box(0, 0, 500, 380)) - expected).max() <= 0.51
    tifffile.imwrite(tmp_path / "b.tif", rgba, photometric="separated", metadata=None)
    with pytest.raises(NotASlideError, match="RGB"):
        open_slide(tmp_path / "b.tif")


def test_over():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [100, 100, 100, 51]]], np.uint8)
    assert over(rgba, np.array([200, 255, 0], np.float32)).tolist() == [[[10, 20, 30], [200, 255, 0], [180, 224, 20]]]


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (IMAGE.astype(np.uint16), {}),
        (IMAGE[..., 0], {"photometric": "minisblack"}),
        (IMAGE.transpose(2, 0, 1), {"photometric": "minisblack"}),
        (np.stack([IMAGE, IMAGE]), {}),
    ],
)
def test_what_is_no_brightfield_image(tmp_path, image, options):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, image, ome=True, tile=(64, 64), **{"photometric": "rgb", **options})
    with pytest.raises(NotASlideError, match="only 8-bit RGB"):
        open_slide(path)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.26"', (0.25, 0.26)),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="2.5E-4" PhysicalSizeYUnit="mm"', (0.25, 0.25)),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="&#181;m" PhysicalSizeY="0.25" PhysicalSizeYUnit="µm"', (0.25, 0.25)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1" PhysicalSizeYUnit="pixel"', None),
        ('PhysicalSizeX="0.25"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="0"', None),
        ('PhysicalSizeX="inf" PhysicalSizeY="inf"', None),
        ('PhysicalSizeX="x" PhysicalSizeY="y"', None),
        ("", None),
    ],
)
def test_ome_mpp(attributes, expected):
    xml = f'<OME><Image><Pixels ID="0" {attributes} SizeX="9"><Channel/></Pixels></Image></OME>'
    found = ome_mpp(xml, 0)
    assert found == (pytest.approx(expected) if expected else None)
    assert ome_mpp(xml, 1) is None


def test_the_largest_image_of_an_ome_tiff_and_its_own_mpp(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(picture(90, 70), photometric="rgb", metadata={**PHYSICAL, "PhysicalSizeX": 9, "PhysicalSizeY": 9})
        writer.write(IMAGE, photometric="rgb", tile=(64, 64), metadata=PHYSICAL)
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp) == (500, 380, 0.5)


def test_a_truncated_ome_tiff(tmp_path):
    data = write_ome(tmp_path / "a.ome.tif", IMAGE, compression="zlib").read_bytes()
    for share in (0.05, 0.5, 0.95):
        (tmp_path / "cut.ome.tif").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DamagedSlideError, match=r"cut\.ome\.tif"):
            open_slide(tmp_path / "cut.ome.tif")


def test_a_damaged_chunk_of_an_ome_tiff(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", IMAGE, (), compression="jpeg")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[3], file.pages[0].databytecounts[3]
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert slide.read(Box(0, 0, 64, 64)).shape == (64, 64, 3)
        with pytest.raises(DamagedSlideError, match="chunk 3, 0 of level 0: JPEG data that end early"):
            slide.read(Box(0, 0, 500, 64))


def test_an_ome_tiff_on_a_web_server(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", IMAGE, compression="zlib")
    with (
        serve({"a.ome.tif": path.read_bytes()}) as server,
        open_slide(f"{server.url}/a.ome.tif", reader="tifffile") as slide,
    ):
        assert slide.reader == "tifffile"
        assert np.array_equal(slide.read(Box(30, 40, 200, 100)), IMAGE[40:140, 30:230])


def test_tiff_files_that_are_stripped_or_of_another_compression(tmp_path):
    write_tiff(tmp_path / "strips.tif", [strip_page(IMAGE)])
    tifffile.imwrite(tmp_path / "zstd.tif", IMAGE, tile=(64, 64), compression="zstd", photometric="rgb", metadata=None,
                     resolution=(20000, 20000), resolutionunit="CENTIMETER")  # fmt: skip
    for name, has_mpp in (("strips.tif", False), ("zstd.tif", True)):
        with open_slide(tmp_path / name) as slide:
            assert (slide.reader, slide.vendor, slide.has_mpp) == ("tifffile", "generic-tiff", has_mpp)
            assert np.array_equal(slide.read(Box(0, 0, 500, 380)), IMAGE)
            assert np.array_equal(slide.read(Box(7, 200, 90, 150)), IMAGE[200:350, 7:97])


def test_forced_tifffile_equals_direct(tmp_path):
    path = write_tiff(tmp_path / "a.tif", [jpeg_page(IMAGE, 64), jpeg_page(halved(IMAGE, 2), 64, t254=(LONG, [1]))])
    with open_slide(path) as direct, open_slide(path, reader="tifffile") as other:
        assert (direct.reader, other.reader) == ("tiff", "tifffile")
        assert np.array_equal(direct.read(Box(33, 44, 300, 200)), other.read(Box(33, 44, 300, 200)))
        assert np.array_equal(direct.read_level(1, 3, 4, 100, 90), other.read_level(1, 3, 4, 100, 90))


FOREIGN = {
    "ndpi": {"t65420": (LONG, [1])},
    "philips": {"t305": (ASCII, "Philips DP v1.0")},
    "trestle": {"t305": (ASCII, "MedScan 1")},
    "huron": {"t271": (ASCII, "Huron Digital Pathology")},
    "leica": {"t270": (ASCII, '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">')},
    "ventana": {"t700": (UNDEFINED, b'<?xml version="1.0"?><iScan Magnification="40"/>')},
    "argos": {"t65000": (UNDEFINED, b"<Argos.Scan.Metadata></Argos.Scan.Metadata>")},
}


@pytest.mark.parametrize("vendor", FOREIGN)
def test_other_vendors_tiff_dialects_are_left_to_openslide(tmp_path, monkeypatch, vendor):
    path = write_tiff(tmp_path / "a.tif", [raw_page(IMAGE, 64, **FOREIGN[vendor])])
    with pytest.raises(NotASlideError, match="reader='auto'"):
        open_slide(path, reader="tiff")
    with serve({"a.tif": path.read_bytes()}) as server, pytest.raises(SlideError, match="copy it to a disk first"):
        open_slide(f"{server.url}/a.tif")
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'gigatome\[openslide\]'"):
        open_slide(path)


def missing(name):
    raise ImportError(name)


def test_without_openslide(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    (tmp_path / "a.mrxs").write_bytes(bytes(range(256)))
    (tmp_path / "a.txt").write_text("no slide at all")
    with pytest.raises(MissingExtraError):
        open_slide(tmp_path / "a.mrxs")
    with pytest.raises(NotASlideError):
        open_slide(tmp_path / "a.txt")
    with open_slide(write_tiff(tmp_path / "a.tif", [jpeg_page(IMAGE, 64)])) as slide:
        assert slide.read(Box(0, 0, 9, 9)).shape == (9, 9, 3)


def test_openslide_needs_a_local_file_it_knows(tmp_path):
    pytest.importorskip("openslide")
    with serve({"a.dcm": bytes(1000)}) as server, pytest.raises(SlideError, match="copy it to a disk first"):
        open_slide(f"{server.url}/a.dcm")
    (tmp_path / "a.svs").write_text("no slide at all")
    with pytest.raises(NotASlideError, match="OpenSlide can read"):
        open_slide(tmp_path / "a.svs", reader="openslide")


def test_implausible_resolution_tags_are_not_believed_through_openslide(tmp_path):
    pytest.importorskip("openslide")
    tags = {"t282": (5, [72, 1]), "t283": (5, [72, 1]), "t296": (SHORT, [2])}
    path = write_tiff(tmp_path / "a.tif", [raw_page(IMAGE, 64, **tags)])
    with open_slide(path, reader="openslide") as slide:
        assert "openslide.mpp-x" in slide.properties
        assert not slide.has_mpp


@pytest.mark.parametrize("name", ["camelyon_jpeg.dcm", "camelyon_jpeg2000.dcm"])
def test_dicom(shared_data, name):
    openslide = pytest.importorskip("openslide")
    path = shared_data / "formats" / name
    with open_slide(path) as slide, openslide.OpenSlide(path) as oracle:
        assert (slide.reader, slide.vendor) == ("openslide", "dicom")
        assert slide.mpp == pytest.approx((28.969 + 28.968) / 2)
        expected = np.asarray(oracle.read_region((100, 50), 0, (700, 400)))[..., :3]
        assert np.array_equal(slide.read(Box(100, 50, 700, 400)), expected)


def test_real_ome_tiff(shared_data):
    path = shared_data / "formats" / "OS-1-detail.ome.tif"
    with open_slide(path, reader="tifffile") as slide:
        assert (slide.reader, slide.width, slide.height) == ("tifffile", 1101, 1101)
        assert slide.mpp == pytest.approx(0.2271, abs=1e-4)
        assert np.array_equal(slide.read(Box(0, 0, 1101, 1101)), tifffile.imread(path))

"""Reading slides: the same pixels as OpenSlide, the right scale, and errors that say what to do."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile

from gigatome.core.errors import (
    DamagedSlideError,
    GigatomeError,
    MissingMppError,
    NotASlideError,
    SlideError,
    StoreError,
)
from gigatome.core.geometry import Box
from gigatome.slides import index_cache
from gigatome.slides import slide as slide_module
from gigatome.slides.slide import SLIDE_SUFFIXES, open_slide
from gigatome.slides.tiff import TiffFile
from range_server import serve
from tiff_files import (
    APERIO,
    ASCII,
    LONG,
    RATIONAL,
    SHORT,
    aperio_pages,
    chunks_of,
    halved,
    jpeg_page,
    picture,
    raw_page,
    strip_page,
    tiff_bytes,
    tiled_page,
    write_tiff,
)

openslide = pytest.importorskip("openslide")
IMAGE = picture(900, 700)
REDUCED = {"t254": (LONG, [1])}
BOXES = [(0, 0, 900, 700), (63, 64, 66, 1), (1, 127, 200, 130), (640, 500, 260, 200), (511, 3, 2, 690)]


def jpeg2000_page(image, side, compression, **more):
    chunks = [
        imagecodecs.jpeg2k_encode(chunk, codecformat="j2k", reversible=True, mct=compression != 33003)
        for chunk in chunks_of(image, side)
    ]
    return tiled_page(image, side, compression, chunks, **more)


def generic_pages(page, side, *args, **more):
    return [page(IMAGE, side, *args, **more), page(halved(IMAGE, 2), side, *args, **REDUCED, **more),
            page(halved(IMAGE, 4), side, *args, **REDUCED, **more)]  # fmt: skip


# Each kind of file: pages, byte order, BigTIFF.
KINDS = {
    "aperio-420": (aperio_pages(IMAGE), "<", False),
    "aperio-422": (aperio_pages(IMAGE, 240, "422"), "<", False),
    "aperio-rgb": (aperio_pages(IMAGE, 80, "rgb"), "<", False),
    "aperio-j2k-rgb": ([jpeg2000_page(IMAGE, 256, 33005, t270=(ASCII, APERIO))], "<", False),
    "aperio-j2k-ycbcr": ([jpeg2000_page(IMAGE, 256, 33003, t270=(ASCII, APERIO))], "<", False),
    "generic-big": (generic_pages(jpeg_page, 128, "444", tables=False), "<", True),
    "generic-big-big-endian": (generic_pages(jpeg_page, 128, "422"), ">", True),
    "lzw": (generic_pages(raw_page, 64, 5, 2), "<", False),
    "deflate": (generic_pages(raw_page, 64, 8, 2), "<", False),
    "uncompressed": (generic_pages(raw_page, 64), "<", False),
}


@pytest.fixture(scope="module", params=KINDS)
def kind_file(request, tmp_path_factory):
    pages, order, big = KINDS[request.param]
    return write_tiff(tmp_path_factory.mktemp("kinds") / f"{request.param}.tif", pages, order=order, big=big)


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    return write_tiff(tmp_path_factory.mktemp("svs") / "case-1.2.svs", aperio_pages(IMAGE))


def flat(tmp_path, image=IMAGE, levels=(), **more):
    """A lossless slide, so that what is read can be computed."""
    pages = [raw_page(image, 64, **more)] + [raw_page(level, 64, **REDUCED) for level in levels]
    return write_tiff(tmp_path / "flat.tif", pages)


def area_average(image, x, y, step_x, step_y, width, height):
    """Mean under each output pixel with fractional edges, float64, white outside; on its own, as an oracle."""

    def along(values, start, step, count, axis):
        values = np.moveaxis(values, axis, 0)
        sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
        edges = start + step * np.arange(count + 1)
        inside = edges.clip(0, len(values))
        low = np.minimum(inside.astype(int), len(values) - 1)
        part = (inside - low).reshape(-1, *[1] * (values.ndim - 1))
        total = np.diff(sums[low] + part * values[low], axis=0)
        missing = (step - np.diff(inside)).reshape(-1, *[1] * (values.ndim - 1))
        return np.moveaxis((total + 255 * missing) / step, 0, axis)

    return along(along(image.astype(float), y, step_y, height, 0), x, step_x, width, 1)


def pixels_of(slide, level, x, y, width, height):
    scale = slide.level_downsamples[level]
    return np.asarray(slide.read_region((round(x * scale), round(y * scale)), level, (width, height)))[..., :3]


def test_every_kind_equals_openslide(kind_file):
    with open_slide(kind_file) as slide, openslide.OpenSlide(kind_file) as oracle:
        assert slide.reader == "tiff"
        assert slide.vendor == oracle.properties["openslide.vendor"]
        assert [(level.width, level.height) for level in slide.levels] == list(oracle.level_dimensions)
        for x, y, width, height in BOXES:
            expected = pixels_of(oracle, 0, x, y, width, height)
            assert np.array_equal(slide.read(Box(x, y, width, height)), expected), (x, y)
        for level, item in enumerate(slide.levels):
            assert np.array_equal(slide.read_level(level, 0, 0, item.width, item.height),
                                  pixels_of(oracle, level, 0, 0, item.width, item.height))  # fmt: skip


@pytest.mark.parametrize("page", [jpeg_page, raw_page])
def test_classic_big_endian_which_openslide_cannot_open(tmp_path, page):
    path = write_tiff(tmp_path / "a.tif", generic_pages(page, 128), order=">")
    with open_slide(path) as slide, tifffile.TiffFile(path) as oracle:
        assert slide.reader == "tiff"
        for level, item in enumerate(slide.levels):
            pixels = slide.read_level(level, 0, 0, item.width, item.height)
            assert np.array_equal(pixels, oracle.pages[level].asarray())


def test_forced_openslide_gives_the_same(kind_file):
    with open_slide(kind_file) as direct, open_slide(kind_file, reader="openslide") as other:
        assert other.reader == "openslide"
        assert np.array_equal(direct.read(Box(10, 20, 300, 200)), other.read(Box(10, 20, 300, 200)))
        assert [level.downsample for level in direct.levels] == [level.downsample for level in other.levels]
        assert direct.has_mpp == other.has_mpp


def test_what_a_slide_says_of_itself(svs):
    with open_slide(str(svs)) as slide:
        assert (slide.name, slide.uri, slide.vendor, slide.reader) == ("case-1.2", str(svs), "aperio", "tiff")
        assert (slide.width, slide.height, slide.mpp, slide.has_mpp) == (900, 700, 0.25, True)
        assert slide.bounds == Box(0, 0, 900, 700)
        assert [(level.width, level.height, level.downsample) for level in slide.levels] == [
            (900, 700, 1),
            (225, 175, 4),
        ]
        assert {level.compression for level in slide.levels} == {"jpeg"}
        assert slide.levels[0].chunk_width == 64
        assert slide.properties["aperio.AppMag"] == "40"
        assert slide.properties["mpp-x"] == "0.25"
        assert "900 × 700, 0.25 mpp" in repr(slide)


def test_outside_is_white(svs):
    with open_slide(svs) as slide:
        read = slide.read(Box(-50, -30, 1000, 800))
        inside = slide.read(Box(0, 0, 900, 700))
        assert np.array_equal(read[30:730, 50:950], inside)
        read[30:730, 50:950] = 255
        assert (read == 255).all()
        assert (slide.read(Box(5000, 0, 10, 20)) == 255).all()
        assert (slide.read(Box(-20, -20, 20, 20), mpp=0.7) == 255).all()
        assert (slide.read_level(1, 220, 170, 20, 20)[5:] == 255).all()
        assert (slide.read_tile(900, 0, 64, 1.0) == 255).all()


@pytest.mark.parametrize(
    ("box", "mpp", "shape"),
    [
        (Box(0, 0, 640, 512), 0.5, (256, 320)),
        (Box(3, 5, 600, 400), 0.75, (133, 200)),
        (Box(100, 50, 333, 211), 0.5044, (105, 165)),
        (Box(-7, 650, 300, 100), 0.9, (28, 83)),
        (Box(0, 0, 900, 700), 10.0, (18, 22)),
        (Box(17, 19, 1, 1), 4.0, (1, 1)),
    ],
)
def test_scaled_reads_are_area_averages_of_level_0(tmp_path, box, mpp, shape):
    with open_slide(flat(tmp_path), mpp=0.25) as slide:
        read = slide.read(box, mpp=mpp)
    assert read.shape == (*shape, 3)
    height, width = shape
    expected = area_average(IMAGE, box.x, box.y, box.width / width, box.height / height, width, height)
    assert np.abs(read - expected).max() <= 0.51


@pytest.mark.parametrize(("x", "y", "mpp"), [(0, 0, 0.5), (33, 70, 0.5044), (100, 1, 0.251), (700, 500, 0.6)])
def test_tiles_have_exactly_the_size_and_the_scale(tmp_path, x, y, mpp):
    with open_slide(flat(tmp_path), mpp=0.25) as slide:
        tile = slide.read_tile(x, y, 128, mpp)
    assert tile.shape == (128, 128, 3)
    assert np.abs(tile - area_average(IMAGE, x, y, mpp / 0.25, mpp / 0.25, 128, 128)).max() <= 0.51


def test_finer_than_level_0_is_bilinear(tmp_path):
    with open_slide(flat(tmp_path), mpp=0.5) as slide:
        read = slide.read(Box(100, 200, 60, 40), mpp=0.25)
    around = IMAGE[199:241, 99:161]
    expected = cv2.resize(around.astype(np.float32), None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)[2:-2, 2:-2]
    assert read.shape == (80, 120, 3)
    assert np.abs(read - expected).max() <= 0.51


def test_exact_reads_do_not_trust_a_level_that_deviates(tmp_path):
    noise = np.random.default_rng(0).integers(-40, 41, (175, 225, 3))
    poor = (halved(IMAGE, 4) + noise).clip(0, 255).astype(np.uint8)
    with open_slide(flat(tmp_path, levels=[poor]), mpp=0.25) as slide:
        good = slide.read(Box(0, 0, 896, 700), mpp=1.0)
        stored = slide.read(Box(0, 0, 896, 700), mpp=1.0, exact=False)
        assert np.abs(good - area_average(IMAGE, 0, 0, 4, 4, 224, 175)).max() <= 0.51
        assert np.array_equal(stored, poor[:, :224])
        assert np.array_equal(slide.read_tile(0, 0, 100, 1.0, exact=False), poor[:100, :100])
        # Five of its pixels to one make the level good enough: 20 level-0 pixels.
        averaged = slide.read(Box(0, 0, 900, 700), mpp=5.0)
        assert np.array_equal(averaged, slide.read(Box(0, 0, 900, 700), mpp=5.0, exact=False))


def test_levels_that_were_cut_or_resized_line_up(tmp_path):
    """903 × 707 by 4 and cut is 225 × 176: factor 4. Resized to 226 × 177 the factor is the ratio of the sizes."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (903, 707), interpolation=cv2.INTER_CUBIC)
    resized = cv2.resize(image, (226, 177), interpolation=cv2.INTER_AREA)
    for level, scale in ((halved(image, 4), (4.0, 4.0)), (resized, (903 / 226, 707 / 177))):
        with open_slide(flat(tmp_path, image, [level]), mpp=1.0) as slide:
            assert (slide.levels[1].scale_x, slide.levels[1].scale_y) == scale
            assert slide.levels[1].downsample == pytest.approx(sum(scale) / 2)
            box = Box(600, 400, 303, 307)
            read = slide.read(box, mpp=4.2, exact=False)
            height, width = read.shape[:2]
            expected, beside = (
                area_average(image, x, y, 303 / width, 307 / height, width, height) for x, y in ((600, 400), (602, 401))
            )
            assert np.abs(read - expected)[:-1, :-1].mean() < 1 < 3 < np.abs(beside - expected)[:-1, :-1].mean()


def test_thumbnail_needs_no_mpp(tmp_path):
    with open_slide(flat(tmp_path)) as slide:
        assert slide.thumbnail(300).shape == (233, 300, 3)
        assert np.abs(slide.thumbnail(300) - area_average(IMAGE, 0, 0, 3, 700 / 233, 300, 233)).max() <= 0.51
        assert np.array_equal(slide.thumbnail(2000), IMAGE)


def test_mpp_missing_given_and_wrong(tmp_path):
    path = flat(tmp_path)
    with open_slide(path) as slide:
        assert not slide.has_mpp
        assert slide.read(Box(0, 0, 10, 10)).shape == (10, 10, 3)
        for ask in (
            lambda: slide.mpp,
            lambda: slide.read(Box(0, 0, 9, 9), mpp=1.0),
            lambda: slide.read_tile(0, 0, 9, 1),
        ):
            with pytest.raises(MissingMppError, match=r"flat\.tif: states no resolution.*--slide-mpp.*table.*open_"):
                ask()
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(GigatomeError, match="must be positive"):
            open_slide(path, mpp=wrong)
        with open_slide(path, mpp=1) as slide, pytest.raises(GigatomeError, match="must be positive"):
            slide.read(Box(0, 0, 10, 10), mpp=wrong)


def test_a_given_mpp_wins(svs):
    with open_slide(svs, mpp=0.3) as slide:
        assert slide.mpp == 0.3
        assert slide.properties["mpp-x"] == "0.25"


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        (APERIO, 0.25),
        (APERIO.replace("0.2500", "0,2520"), 0.252),
        (APERIO.replace("|MPP = 0.2500", ""), None),
        (APERIO.replace("0.2500", "0"), None),
        (APERIO.replace("0.2500", "nan"), None),
        (APERIO.replace("0.2500", "unknown"), None),
    ],
)
def test_aperio_mpp_is_never_made_of_magnification(tmp_path, description, mpp):
    path = write_tiff(tmp_path / "a.svs", [jpeg_page(IMAGE, 240, t270=(ASCII, description), t282=(RATIONAL, [40000, 1]),
                                                     t283=(RATIONAL, [40000, 1]), t296=(SHORT, [3]))])  # fmt: skip
    with open_slide(path) as slide:
        assert slide.vendor == "aperio"
        assert slide.mpp == mpp if mpp else not slide.has_mpp


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((20000, 20000), 3, 0.5),
        ((50800, 50800), 2, 0.5),
        ((20000, 20000), 1, None),
        ((72, 72), 2, None),
        ((1, 1), 3, None),
        ((0, 0), 3, None),
        ((300_000, 300_000), 3, None),
        ((20000, 10000), 3, 0.75),
    ],
)
def test_resolution_tags(tmp_path, caplog, resolution, unit, mpp):
    tags = {"t282": (RATIONAL, [resolution[0], 1]), "t283": (RATIONAL, [resolution[1], 1]), "t296": (SHORT, [unit])}
    with caplog.at_level(logging.WARNING, "gigatome"), open_slide(flat(tmp_path, **tags)) as slide:
        assert slide.mpp == pytest.approx(mpp) if mpp else not slide.has_mpp
    assert ("mean is used" in caplog.text) == (mpp == 0.75)
    if mpp == 0.75:
        assert (slide.properties["mpp-x"], slide.properties["mpp-y"]) == ("0.5", "1.0")


def test_thumbnail_label_macro_and_odd_pages_are_no_levels(tmp_path):
    pages = [
        raw_page(IMAGE, 64),
        raw_page(picture(450, 200), 64),
        raw_page(halved(IMAGE, 2), 64),
        raw_page(halved(IMAGE, 2), 64),
        raw_page(halved(IMAGE, 4), 64, t254=(LONG, [4])),
        strip_page(halved(IMAGE, 8)),
        raw_page(halved(IMAGE, 4), 64),
    ]
    with open_slide(write_tiff(tmp_path / "a.tif", pages)) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4]


def test_chunks_left_out(tmp_path):
    """White at level 0; elsewhere made from the finer level, as OpenSlide does for the Aperio files that have them."""
    full, half = raw_page(IMAGE, 64, t270=(ASCII, APERIO)), raw_page(halved(IMAGE, 2), 64, **REDUCED)
    full.chunks[0], half.chunks[9] = b"", b""
    with open_slide(write_tiff(tmp_path / "a.svs", [full, half])) as slide:
        read = slide.read(Box(0, 0, 200, 200))
        assert (read[:64, :64] == 255).all()
        assert np.array_equal(read[64:], IMAGE[64:200, :200])
        level = slide.read_level(1, 0, 0, 450, 350)
        assert np.array_equal(level[:, :64], halved(IMAGE, 2)[:, :64])
        assert np.abs(level.astype(int) - halved(IMAGE, 2)).max() <= 1


def test_threads_read_the_same_as_one(svs):
    places = [(17 * k % 600, 31 * k % 400) for k in range(60)]
    with open_slide(svs) as slide, ThreadPoolExecutor(6) as pool:
        alone = [slide.read_tile(x, y, 100, 0.5) for x, y in places]
        together = list(pool.map(lambda place: slide.read_tile(*place, 100, 0.5), places))
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_remote_slide_equals_the_local_one_and_asks_little(svs, monkeypatch):
    monkeypatch.setattr("gigatome.blob.remote.HEAD_BYTES", 1 << 16)  # not the whole of this small file
    monkeypatch.setattr("gigatome.slides.windows.HEAD_BYTES", 1 << 16)
    with serve({"bucket/case.svs": svs.read_bytes()}) as server, open_slide(svs) as local:
        with open_slide(f"{server.url}/bucket/case.svs?token=SECRET") as remote:
            assert remote.name == "case"
            assert len(server.requests) <= len(svs.read_bytes()) // (1 << 15) + 4
            del server.requests[:]
            assert np.array_equal(remote.read_tile(200, 300, 128, 0.4), local.read_tile(200, 300, 128, 0.4))
            assert len(server.requests) <= 6
            server.faults["bucket/case.svs"] = 403
            with pytest.raises(StoreError, match="credentials") as caught:
                remote.read(Box(600, 400, 300, 300))
            assert "SECRET" not in str(caught.value)
        server.faults.clear()
        server.files["notes.txt"] = b"no slide, but long enough to be looked at"
        with pytest.raises(NotASlideError, match="TIFF") as refused:
            open_slide(f"{server.url}/notes.txt?token=SECRET")
        assert "SECRET" not in str(refused.value)


def test_what_is_no_slide(tmp_path):
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("This is a text file that somebody named .svs" * 10)
    (tmp_path / "text.dat").write_text("This is a text file" * 10)
    (tmp_path / "image.tif").write_bytes(tiff_bytes([raw_page(picture(100, 80), 64, t258=(SHORT, [16] * 3))]))
    cv2.imwrite(str(tmp_path / "photo.jpg"), IMAGE)
    for name, message in [("empty.svs", "0 bytes"), ("text.svs", "not a slide"), ("text.dat", "not a slide"),
                          ("photo.jpg", "not a slide"), (".", "folder")]:  # fmt: skip
        with pytest.raises(NotASlideError, match=message) as caught:
            open_slide(tmp_path / name)
        assert caught.value.slide == str(tmp_path / name)
    with pytest.raises(StoreError, match="no such file"):
        open_slide(tmp_path / "missing.svs")
    with pytest.raises(SlideError, match="no reader 'magic'"):
        open_slide(tmp_path / "text.svs", reader="magic")
    with pytest.raises(NotASlideError, match="reader='auto'"):
        open_slide(tmp_path / "image.tif", reader="tiff")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_slide_is_damaged(svs, tmp_path, share):
    data = svs.read_bytes()
    (tmp_path / "cut.svs").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DamagedSlideError, match=r"cut\.svs"):
        open_slide(tmp_path / "cut.svs")


def test_a_damaged_chunk_names_its_place(tmp_path):
    page = jpeg_page(IMAGE, 64)
    page.chunks[20] = page.chunks[20][: len(page.chunks[20]) // 2]
    with open_slide(write_tiff(tmp_path / "a.tif", [page])) as slide:
        assert slide.read(Box(0, 0, 300, 60)).shape == (60, 300, 3)
        with pytest.raises(DamagedSlideError, match="chunk 5, 1 of level 0: JPEG data that end early"):
            slide.read(Box(0, 0, 900, 700))


def test_a_level_that_does_not_exist(svs):
    with open_slide(svs) as slide, pytest.raises(SlideError, match="levels 0 to 1, not 2"):
        slide.read_level(2, 0, 0, 10, 10)


def test_suffixes():
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in SLIDE_SUFFIXES)
    assert {".svs", ".tif", ".ndpi", ".mrxs", ".dcm"} <= set(SLIDE_SUFFIXES)


REAL = ["formats/CMU-1-Small-Region.svs", "formats/TCGA-CR-7395-01A-01-TS1.svs", "formats/camelyon_jpeg.dcm",
        "formats/camelyon_jpeg2000.dcm", "regions/skin_keloid-scar.tif", "regions/liver_glycogenstorage.tif",
        "whole/lung-SCC-HE3.tif"]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_slides_equal_openslide(shared_data, name):
    rng = np.random.default_rng(7)
    with open_slide(shared_data / name) as slide, openslide.OpenSlide(shared_data / name) as oracle:
        side = 600
        for _ in range(6):
            x, y = int(rng.integers(-100, slide.width - 300)), int(rng.integers(-100, slide.height - 300))
            region = np.asarray(oracle.read_region((x, y), 0, (side, side)))
            expected = np.where(region[..., 3:] == 0, 255, region[..., :3])
            assert np.array_equal(slide.read(Box(x, y, side, side)), expected), (x, y)
        for level in range(1, len(slide.levels)):
            size = (min(slide.levels[level].width, 1000), min(slide.levels[level].height, 1000))
            expected = np.asarray(oracle.read_region((0, 0), level, size))[..., :3]
            assert np.array_equal(slide.read_level(level, 0, 0, *size), expected), level


@pytest.mark.slow
def test_all_real_slides_equal_openslide_whole(shared_data):
    compared = 0
    for path in sorted([*shared_data.glob("*/*.tif"), *shared_data.glob("formats/*")]):
        if not openslide.OpenSlide.detect_format(path):
            continue
        with open_slide(path) as slide, openslide.OpenSlide(path) as oracle:
            for level, item in enumerate(slide.levels):
                for y in range(0, item.height, 2048):
                    height = min(2048, item.height - y)
                    if level and y:
                        break  # OpenSlide interpolates where y is not a whole pixel of the level
                    expected = np.asarray(oracle.read_region((0, y), level, (item.width, height)))[..., :3]
                    assert np.array_equal(slide.read_level(level, 0, y, item.width, height), expected), (path, level, y)
        compared += 1
    assert compared >= 20


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4, 7.3])
@pytest.mark.parametrize("name", ["formats/TCGA-CR-7395-01A-01-TS1.svs", "regions/skin_keloid-scar.tif"])
def test_scaled_reads_of_real_tissue_within_two_grey_levels(shared_data, name, factor):
    with open_slide(shared_data / name, mpp=0.25) as slide:
        box = Box(slide.width // 2 - 501, slide.height // 2 - 403, 1400, 1100)
        read, level0 = slide.read(box, mpp=0.25 * factor), slide.read(box)
    height, width = read.shape[:2]
    if factor < 1:
        expected = cv2.resize(level0, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        expected = area_average(level0, 0, 0, 1400 / width, 1100 / height, width, height)
    assert level0.mean() < 235
    assert np.abs(read.astype(float) - expected).mean() <= (2 if factor > 5 else 0.3)


@pytest.mark.parametrize("suffix", [".svs", ".tif"])
def test_a_name_with_spaces_and_a_path_object(svs, tmp_path, suffix):
    path = tmp_path / f"a slide (copy){suffix}"
    shutil.copy(svs, path)
    with open_slide(path) as one, open_slide(f"file://{path}") as two, open_slide(os.fspath(path)) as three:
        assert one.name == two.name == three.name == "a slide (copy)"
        assert Path(one.uri) == path


def test_the_index_of_a_slide_is_kept_and_used_until_the_slide_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATOME_INDEX_CACHE", str(tmp_path / "cache"))
    index_cache.user_cache.cache_clear()
    path = tmp_path / "a.tif"
    try:
        path.write_bytes(tiff_bytes([jpeg_page(picture(200, 150), 64)]))
        parsed = []
        monkeypatch.setattr(slide_module, "TiffFile", lambda *a: parsed.append(a) or TiffFile(*a))
        opened = [open_slide(path, mpp=0.5, keep_index=keep) for keep in (True, True, False)]
        assert len(parsed) == 2
        tiles = [slide.read_tile(10, 20, 96, 0.5) for slide in opened]
        assert all(np.array_equal(tile, tiles[0]) for tile in tiles)
        path.write_bytes(tiff_bytes([jpeg_page(picture(200, 150, seed=1), 64)]))
        with open_slide(path, mpp=0.5) as changed:
            assert len(parsed) == 3
            assert not np.array_equal(changed.read_tile(10, 20, 96, 0.5), tiles[0])
    finally:
        index_cache.user_cache.cache_clear()

"""What reading does to pixels: nothing at a level's own resolution, and elsewhere no more than is stated.

Bounds are set beside what a reader that does it wrong would give: each test also shows that this falls outside them.
"""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from gigatome.core.native import NATIVE
from gigatome.slides.reader import TiffReader
from gigatome.slides.slide import Slide, open_slide
from tiff_files import APERIO, ASCII, LONG, chunks_of, halved, jpeg, jpeg_page, raw_page, tiled_page, write_tiff

openslide = pytest.importorskip("openslide")

MPP, SIDE, CHUNK = 0.25, 960, 80
KINDS = ["rgb", "444", "422", "420"]
SHRINKS = [2, 4, 8]
# PSNR in dB of shrunk reads against averages, on a picture of sharp saturated edges. Subsampled colours cost most:
# those of 4:2:2 are half as wide as high, and libjpeg's smaller transforms, which are square, keep that.
LEAST = {"rgb": (50, 50, 50), "444": (48, 48, 48), "420": (38, 41, 45), "422": (35, 30, 27)}
TISSUE_LEAST = 44.0
MOST_SHIFT = 0.5  # grey levels, of each colour; one step of Cr makes 1.4
MOST_SEAM = 1.3  # times the mean error inside


@pytest.fixture(params=[True, False], ids=["extension", "libraries"])
def native(request):
    if request.param and NATIVE is None:
        pytest.skip("the C extension is not built")
    return request.param


def sharp(seed=0):
    """Discs and boxes with hard edges at any place, uint8 [SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    image = np.full((SIDE, SIDE, 3), 235, np.uint8)
    for _ in range(SIDE * SIDE // 900):
        x, y, width, height = (int(value) for value in rng.integers((0, 0, 4, 4), (SIDE, SIDE, 20, 20)))
        colour = rng.integers(20, 230, 3).tolist()
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), width, colour, -1)
        else:
            cv2.rectangle(image, (x, y), (x + width, y + height), colour, -1)
    return image


SHARP = sharp()
GREY = np.repeat(SHARP[..., :1], 3, axis=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One slide of a single level for each kind of JPEG, in colours and in grey."""
    folder = tmp_path_factory.mktemp("exactness")
    return {
        (kind, grey): write_tiff(folder / f"{kind}-{grey}.tif", [jpeg_page(GREY if grey else SHARP, CHUNK, kind)])
        for kind in KINDS
        for grey in (False, True)
    }


def psnr(one, other):
    return 10 * math.log10(255**2 / np.square(one.astype(float) - other).mean())


def average(level, x, y, side, shrink):
    """Mean of each ``shrink`` squared pixels of a level, from (x, y) in its pixels."""
    part = level[y : y + side * shrink, x : x + side * shrink]
    return cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA)


def shrunk_pair(slide, x, y, side, shrink):
    """A tile scaled while it is decoded, and the same averaged; (x, y) in pixels of the result."""
    where = (x * shrink, y * shrink, side, MPP * shrink)
    return (slide.read_tile(*where, exact=False, dct_scaling=scaled).astype(int) for scaled in (True, False))


def beside_borders(x, y, side, chunk):
    """Which pixels of a tile touch the border of a chunk."""
    across, down = (np.isin((start + np.arange(side)) % chunk, (0, chunk - 1)) for start in (x, y))
    return across | down[:, None]


def seam(difference, beside):
    """Mean error beside borders of chunks, in units of that elsewhere."""
    return np.abs(difference[beside]).mean() / np.abs(difference[~beside]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_levels_equal_openslide(tmp_path, kind, native):
    pages = [
        jpeg_page(SHARP, CHUNK, kind, t270=(ASCII, APERIO)),
        jpeg_page(halved(SHARP, 4), CHUNK, kind, t270=(ASCII, APERIO), t254=(LONG, [1])),
    ]
    path = write_tiff(tmp_path / "a.svs", pages)
    rng = np.random.default_rng(0)
    with open_slide(path, native=native) as slide, openslide.OpenSlide(path) as oracle:
        assert slide.reader == "tiff"
        for level, scale in ((0, 1), (1, 4)):
            for _ in range(8):
                x, y = (int(value) for value in rng.integers(SIDE // scale - 130, size=2))
                expected = np.asarray(oracle.read_region((x * scale, y * scale), level, (130, 111)))[..., :3]
                assert np.array_equal(slide.read_level(level, x, y, 130, 111), expected)
                tile = slide.read_tile(x * scale, y * scale, 96, MPP * scale, exact=False)
                assert np.array_equal(tile, expected[:96, :96])


REAL = ["formats/CMU-1-Small-Region.svs", "regions/colon_melanosiscoli.tif", "regions/liver_glycogenstorage.tif"]


@pytest.mark.parametrize("name", REAL)
def test_real_levels_equal_openslide(shared_data, name, native):
    rng = np.random.default_rng(1)
    with open_slide(shared_data / name, native=native) as slide, openslide.OpenSlide(shared_data / name) as oracle:
        for number, level in enumerate(slide.levels):
            for _ in range(4):
                x, y = (int(rng.integers(length - 256)) for length in (level.width, level.height))
                corner = round(x * level.scale_x), round(y * level.scale_y)
                expected = np.asarray(oracle.read_region(corner, number, (256, 256)))[..., :3]
                assert np.array_equal(slide.read_level(number, x, y, 256, 256), expected)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_reads_are_averages(files, kind, shrink, native):
    least = LEAST[kind][SHRINKS.index(shrink)]
    x, y, side = 7, 3, (SIDE - 64) // shrink
    with open_slide(files[kind, False], mpp=MPP, native=native) as slide:
        scaled, averaged = shrunk_pair(slide, x, y, side, shrink)
        level = slide.read_level(0, 0, 0, SIDE, SIDE)
    assert np.array_equal(averaged, average(level, x * shrink, y * shrink, side, shrink))
    assert psnr(scaled, averaged) > least
    assert np.abs((scaled - averaged).mean(axis=(0, 1))).max() < MOST_SHIFT
    # One pixel of each square instead of their mean; and a step of one of the colours that JPEG stores.
    middle = shrink // 2
    picked = level[y * shrink + middle :: shrink, x * shrink + middle :: shrink][:side, :side]
    assert psnr(picked, averaged) < least
    stored = cv2.cvtColor(averaged.astype(np.uint8), cv2.COLOR_RGB2YCrCb)
    stored[..., 1] += 1
    tinted = cv2.cvtColor(stored, cv2.COLOR_YCrCb2RGB)
    assert np.abs((tinted - averaged).mean(axis=(0, 1))).max() > MOST_SHIFT


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_reads_are_in_their_place(files, kind, shrink, native):
    x, y, side = 9, 5, (SIDE - 128) // shrink
    with open_slide(files[kind, True], mpp=MPP, native=native) as slide:
        scaled, averaged = shrunk_pair(slide, x, y, side, shrink)
        level = slide.read_level(0, 0, 0, SIDE, SIDE)
    assert psnr(scaled, averaged) > 50
    half = shrink // 2
    for right, down in ((half, 0), (-half, 0), (0, half), (0, -half), (1, 0), (0, 1)):
        moved = average(level, x * shrink + right, y * shrink + down, side, shrink)
        assert psnr(scaled, moved) < 35, (right, down)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_seams(files, kind, shrink, native):
    x, y, side, chunk = 2, 6, (SIDE - 64) // shrink, CHUNK // shrink
    with open_slide(files[kind, False], mpp=MPP, native=native) as slide:
        scaled, averaged = shrunk_pair(slide, x, y, side, shrink)
    beside = beside_borders(x, y, side, chunk)
    assert seam(scaled - averaged, beside) < MOST_SEAM
    # Chunks whose last column and row repeat the ones before.
    last = [np.flatnonzero((start + np.arange(side)) % chunk == chunk - 1) for start in (x, y)]
    repeated = scaled.copy()
    repeated[:, last[0]] = repeated[:, last[0] - 1]
    repeated[last[1]] = repeated[last[1] - 1]
    assert seam(repeated - averaged, beside) > MOST_SEAM


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("name", REAL)
def test_shrunk_reads_of_tissue(shared_data, name, shrink):
    rng, side, errors, beside, moved = np.random.default_rng(2), 256, [], [], []
    with open_slide(shared_data / name, mpp=MPP) as slide:
        blob, index = slide.source
        # Without the coarser levels, which would serve tiles that are shrunk by more than 2.
        finest = Slide(slide.uri, TiffReader(blob, slide.name, replace(index, levels=index.levels[:1])), MPP)
        for _ in range(3):
            x, y = (int(rng.integers(1, length // shrink - side)) for length in (slide.width, slide.height))
            scaled, averaged = shrunk_pair(finest, x, y, side, shrink)
            left = slide.read_level(0, x * shrink - shrink // 2, y * shrink, side * shrink, side * shrink)
            errors.append(scaled - averaged)
            moved.append(scaled - average(left, 0, 0, side, shrink))
            beside.append(beside_borders(x, y, side, slide.levels[0].chunk_width // shrink))
    error = np.concatenate(errors)
    assert psnr(error, 0) > TISSUE_LEAST
    assert np.abs(error.mean(axis=(0, 1))).max() < MOST_SHIFT
    assert seam(error, np.concatenate(beside)) < MOST_SEAM
    assert psnr(np.concatenate(moved), 0) < TISSUE_LEAST - 3


@pytest.mark.skipif(NATIVE is None, reason="the C extension is not built")
@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_reads_are_the_same_without_the_extension(files, kind):
    with open_slide(files[kind, False], mpp=MPP) as fast, open_slide(files[kind, False], mpp=MPP, native=False) as slow:
        for mpp in (0.5, 0.55, 1.0, 2.0, 2.3):
            pixels = [slide.read_tile(33, 17, 90, mpp, exact=False) for slide in (fast, slow)]
            assert np.array_equal(*pixels), mpp


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """Levels 1, 2 and 4 whose sides are no whole number of chunks, nor of coarse pixels."""
    image = SHARP[:701, :901]
    pages = [
        jpeg_page(image, CHUNK, "420"),
        *(jpeg_page(halved(image, k), CHUNK, "420", t254=(LONG, [1])) for k in (2, 4)),
    ]
    return write_tiff(tmp_path_factory.mktemp("edges") / "a.tif", pages)


MOVE = 20  # output pixels, which at each of the mpps are whole pixels of level 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.3, 0.5, 0.7, 1.0, 2.0, 2.1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("far", [False, True])
def test_across_the_edge(pyramid, exact, mpp, axis, far, native):
    step, tile = mpp / MPP, 48
    with open_slide(pyramid, mpp=MPP, native=native) as slide:
        length = (slide.width, slide.height)[axis]
        # On the grid of the coarsest pixels, so that snapping moves neither.
        near = int(length - tile * step) // 8 * 8 if far else 8
        shift = round(MOVE * step) * (1 if far else -1)
        corners = [[200, 200], [200, 200]]
        corners[0][axis], corners[1][axis] = near, near + shift
        inner, outer = (slide.plan_tile(*corner, tile, mpp, exact=exact) for corner in corners)
        assert inner.inside
        assert not outer.inside
        inner, outer = (plan.read().swapaxes(0, 1) if axis == 0 else plan.read() for plan in (inner, outer))
    common = (outer[:-MOVE], inner[MOVE:]) if far else (outer[MOVE:], inner[:-MOVE])
    edges = near + shift + step * np.arange(tile + 1)
    start, stop = edges[:-1], edges[1:]
    white = (stop <= 0) | (start >= length)
    assert white.any()
    assert (outer[white] == 255).all()
    # At the edge itself a pixel is white in part.
    whole = (stop <= length) if far else (start >= 0)
    rows = whole[:-MOVE] if far else whole[MOVE:]
    difference = np.abs(common[0].astype(int) - common[1])[rows]
    # A tile inside is averaged by OpenCV, which rounds halves to even where four or more pixels make one along an axis.
    assert difference.max() <= (0 if step in (1, 2) else 1)
    assert rows.sum() >= tile - MOVE - 1


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_wholly_outside_is_white(pyramid, mpp, native):
    with open_slide(pyramid, mpp=MPP, native=native) as slide:
        for corner in ((-4000, 8), (8, 4000), (4000, -4000)):
            plan = slide.plan_tile(*corner, 48, mpp, exact=False)
            assert not plan.inside
            assert (plan.read() == 255).all()
        assert slide.plan_tile(0, 0, 48, mpp).inside


RAMP = 128


@pytest.fixture(scope="module", params=["jpeg", "levels"])
def ramp(request, tmp_path_factory):
    """A slide whose red tells x and whose green tells y: each is twice the number of the pixel."""
    values = 2 * np.arange(RAMP, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(values[None], values[:, None], np.uint8(128)), axis=2)
    if request.param == "jpeg":
        pages = [tiled_page(image, 64, 7, [jpeg(chunk, "rgb", 100) for chunk in chunks_of(image, 64)])]
    else:
        pages = [raw_page(image, 64), *(raw_page(halved(image, k), 64, t254=(LONG, [1])) for k in (2, 4, 8))]
    return write_tiff(tmp_path_factory.mktemp("ramp") / "ramp.tif", pages)


# In level-0 pixels: half an output pixel where whole pixels of a level make one, else nothing.
@pytest.mark.parametrize(("mpp", "moves"), [(0.25, 0), (0.3, 0), (0.5, 1), (0.75, 0), (1.0, 2), (2.0, 4)])
def test_snapping_moves_by_half_a_pixel_at_most(ramp, mpp, moves):
    rng, tile, step = np.random.default_rng(3), 6, mpp / MPP
    with open_slide(ramp, mpp=MPP) as slide:
        for exact in (True, False):
            moved = []
            for _ in range(40):
                corner = rng.integers(4, RAMP - 4 - math.ceil(tile * step), size=2)
                pixels = slide.read_tile(int(corner[0]), int(corner[1]), tile, mpp, exact=exact)
                middle = pixels[..., :2].mean(axis=(0, 1)) / 2 + 0.5
                moved.append(middle - tile * step / 2 - corner)
            assert np.abs(moved).max() == pytest.approx(0 if exact else moves, abs=0.2)

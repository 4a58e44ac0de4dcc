"""The C extension against libjpeg-turbo and against the readers without it: the same pixels, and the same errors."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg

from gigatome.core.errors import DamagedSlideError
from gigatome.core.native import NATIVE
from gigatome.slides import resample
from gigatome.slides.resample import Axis, window
from gigatome.slides.slide import open_slide
from tiff_files import jpeg_page, picture, split_tables, tiff_bytes

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C extension is not built")

NO_TABLES = b"\xff\xd8\xff\xd9"
NOISE = np.random.default_rng(5).integers(0, 256, (96, 80, 3), dtype=np.uint8)
PICTURE = picture(80, 96)


def encode(image, sampling, quality, *, rgb=False, optimize=False):
    if sampling == "grey":
        return simplejpeg.encode_jpeg(image[..., :1].copy(), quality, colorspace="GRAY", colorsubsampling="Gray")
    return bytes(
        imagecodecs.jpeg8_encode(
            image,
            level=quality,
            colorspace="rgb",
            outcolorspace="rgb" if rgb else "ycbcr",
            subsampling=sampling,
            optimize=optimize,
        )
    )


def read(chunks, shape, corner, size, *, rgb=False, shrink=1, tables=NO_TABLES):
    """One window of a level of [rows][columns] chunks of ``shape``; what became of each chunk, and the pixels."""
    counts = np.array([[len(chunk) for chunk in row] for row in chunks], np.uint32)
    out = np.full((1, size[1], size[0], 3), 77, np.uint8)
    side_x, side_y = shape[1] // shrink, shape[0] // shrink
    rows = range(corner[1] // side_y, (corner[1] + size[1] - 1) // side_y + 1)
    columns = range(corner[0] // side_x, (corner[0] + size[0] - 1) // side_x + 1)
    data = [chunks[row][column] for row in rows for column in columns if chunks[row][column]]
    status, _ = NATIVE.read_tiles(
        NATIVE.Tables(tables),
        data,
        np.zeros_like(counts),
        counts,
        (shape[1], shape[0], shape[2], rgb),
        np.array([corner], np.int64),
        out,
        shrink.bit_length() - 1,
    )
    return status, out[0]


def expected(data, shrink, shape):
    return simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_height=shape[0] // shrink, min_width=shape[1] // shrink, min_factor=1
    )


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("image", [PICTURE, NOISE, PICTURE[:48, :64], NOISE[:16, :16]], ids=["p", "n", "p48", "n16"])
@pytest.mark.parametrize(
    ("sampling", "rgb"), [("444", False), ("422", False), ("420", False), ("444", True), ("420", True), ("grey", False)]
)
def test_every_crop_is_what_libjpeg_gives(image, sampling, rgb, shrink):
    rng = np.random.default_rng(shrink)
    image = np.ascontiguousarray(image)
    for quality, optimize in ((20, True), (75, False), (97, True)):
        data = encode(image, sampling, quality, rgb=rgb, optimize=optimize)
        shape = (*image.shape[:2], 1 if sampling == "grey" else 3)
        whole = expected(data, shrink, shape)
        height, width = whole.shape[:2]
        for _ in range(12):
            size = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
            x, y = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
            status, pixels = read([[data]], shape, (x, y), size, rgb=rgb, shrink=shrink)
            assert status == b"\0"
            assert np.array_equal(pixels, whole[y : y + size[1], x : x + size[0]])


def test_sides_that_are_no_whole_number_of_blocks():
    image = np.ascontiguousarray(PICTURE[:50, :70])
    for sampling in ("444", "422", "420"):
        data = encode(image, sampling, 80)
        status, pixels = read([[data]], (50, 70, 3), (3, 5), (67, 45))
        assert status == b"\0"
        assert np.array_equal(pixels, expected(data, 1, (50, 70))[5:, 3:])


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_restart_markers(interval):
    data = cv2.imencode(".jpg", PICTURE[..., ::-1], [cv2.IMWRITE_JPEG_RST_INTERVAL, interval])[1].tobytes()
    assert b"\xff\xd0" in data
    status, pixels = read([[data]], (*PICTURE.shape,), (10, 20), (60, 70))
    assert status == b"\0"
    assert np.array_equal(pixels, expected(data, 1, PICTURE.shape)[20:90, 10:70])


def test_tables_common_to_all_chunks_and_tables_of_their_own():
    chunks = [[encode(np.roll(PICTURE, 8 * k, axis=1), "422", 50 + 10 * k, optimize=k % 2 == 1) for k in range(4)]]
    for shared in (NO_TABLES, split_tables(chunks[0][0])[0]):
        status, pixels = read(chunks, PICTURE.shape, (30, 10), (4 * 80 - 50, 60), tables=shared)
        assert status == bytes(4)
        whole = np.concatenate([expected(chunk, 1, PICTURE.shape) for chunk in chunks[0]], axis=1)
        assert np.array_equal(pixels, whole[10:70, 30 : 30 + 270])
    tables, rest = split_tables(chunks[0][0])
    assert read([[rest]], PICTURE.shape, (0, 0), (80, 96), tables=tables)[0] == b"\0"
    assert read([[rest]], PICTURE.shape, (0, 0), (80, 96))[0] == b"\2"  # there are none


def test_what_is_left_out_and_what_is_declined():
    good = encode(PICTURE, "422", 75)
    progressive = cv2.imencode(".jpg", PICTURE, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    frame = good.find(b"\xff\xc0")
    bombs = good[: frame + 5] + b"\xff\xff\xff\xff" + good[frame + 9 :]
    chunks = [[good, b"", progressive, good[: len(good) // 2], bombs, b"x" * 100, good[:-2]]]
    status, pixels = read(chunks, PICTURE.shape, (0, 0), (80 * 7, 96))
    assert status == bytes([0, 1, 2, 2, 2, 2, 2])
    assert np.array_equal(pixels[:, :80], expected(good, 1, PICTURE.shape))
    assert (pixels[:, 80:160] == 77).all()


def test_damage_above_the_lower_edge_is_noticed():
    data = encode(NOISE, "444", 90)
    scan = data.find(b"\xff\xda") + 14
    broken = data[: scan + 900] + b"\xff\xd9" + data[scan + 902 :]
    assert read([[broken]], NOISE.shape, (0, 0), (80, 96))[0] == b"\2"


def test_arguments_that_do_not_fit():
    good = encode(PICTURE, "422", 75)
    for corner, size in (((1, 0), (80, 96)), ((-1, 0), (8, 8)), ((0, 0), (81, 8)), ((1 << 62, 0), (8, 8))):
        counts = np.array([[len(good)]], np.uint32)
        with pytest.raises(ValueError, match="outside the level"):
            NATIVE.read_tiles(
                NATIVE.Tables(NO_TABLES), [good], counts, counts, (80, 96, 3, False), np.array([corner], np.int64),
                np.empty((1, size[1], size[0], 3), np.uint8), 0,
            )  # fmt: skip
    with pytest.raises(ValueError, match="tables"):
        NATIVE.Tables(b"\xff\xd8\xff\xc4\x00\x08\x00\xff\xff\xff")


def slide_file(tmp_path, **options):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_bytes([jpeg_page(picture(420, 300), 64, **options)]))
    return path


def test_a_slide_reads_the_same_without_the_extension(tmp_path):
    rng = np.random.default_rng(0)
    path = slide_file(tmp_path)
    with open_slide(path, mpp=0.25) as fast, open_slide(path, mpp=0.25, native=False) as slow:
        for _ in range(60):
            x, y = int(rng.integers(-60, 420)), int(rng.integers(-60, 300))
            mpp, exact = float(rng.choice([0.25, 0.26, 0.5, 0.73, 1.0, 2.0])), bool(rng.integers(2))
            tiles = [slide.read_tile(x, y, 48, mpp, exact=exact) for slide in (fast, slow)]
            assert np.array_equal(*tiles)
        with ThreadPoolExecutor(4) as pool:
            same = list(pool.map(lambda _: fast.read_tile(37, 41, 128, 0.25), range(40)))
        assert all(np.array_equal(tile, same[0]) for tile in same)


def test_a_damaged_chunk_is_the_same_error_either_way(tmp_path):
    path = slide_file(tmp_path)
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\xda") + 12
    data[start : start + 40] = b"\xff\xd9" * 20
    path.write_bytes(data)
    for native in (True, False):
        with open_slide(path, mpp=0.25, native=native) as slide, pytest.raises(DamagedSlideError, match="chunk 0, 0"):
            slide.read_tile(0, 0, 256, 0.25)


def test_resampling_is_the_same_to_the_last_bit():
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, (300, 320, 3), dtype=np.uint8)
    for _ in range(80):
        step, count = float(rng.choice([0.7, 0.99, 1.01, 1.5, 2.37, 5.1])), int(rng.integers(1, 90))
        axes = [Axis(float(rng.uniform(-60, 300)), step, count) for _ in range(2)]
        part = window((320, 300), (319.5, 300.0), *axes)
        if part is None or part.taps is None:
            continue
        pixels = source[part.y : part.y + part.height, part.x : part.x + part.width]
        outputs = np.empty((2, count, count, 3), np.uint8)
        resample._apply(pixels, *part.taps, outputs[0])
        resample._apply_native(pixels, *part.taps, outputs[1])
        assert np.array_equal(*outputs)


def test_it_can_be_switched_off():
    command = "from gigatome.core.native import NATIVE; print(NATIVE)"
    environment = {**os.environ, "GIGATOME_NATIVE": "0"}
    result = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "None"


@pytest.mark.parametrize("native", [True, False])
def test_a_chunk_that_ends_early_is_an_error_where_its_upper_rows_are_enough(tmp_path, native):
    data = bytearray(tiff_bytes([jpeg_page(picture(256, 256), 256)]))
    start = data.find(b"\xff\xda") + 14
    middle = start + (data.find(b"\xff\xd9", start) - start) // 3
    data[middle : middle + 2] = b"\xff\xd9"
    (tmp_path / "a.tif").write_bytes(data)
    with open_slide(tmp_path / "a.tif", mpp=0.25, native=native) as slide:
        assert slide.read_tile(0, 0, 8, 0.25).std() > 0  # lies before
        with pytest.raises(DamagedSlideError, match="premature end"):
            slide.read_tile(0, 0, 200, 0.25)

"""Chunks against the decoders of the libraries that encoded them, and what a damaged chunk does."""

import contextlib

import cv2
import imagecodecs
import numpy as np
import pytest

from gigatome.blob.store import open_blob
from gigatome.core.errors import DamagedSlideError
from gigatome.slides.decode import (
    ChunkError,
    can_decode,
    chunk_format,
    decode_jpeg,
    decode_jpeg2000,
    jpeg_prefix,
    ycbcr_to_rgb,
)
from gigatome.slides.slide import open_slide
from gigatome.slides.tiff import TiffFile
from tiff_files import LONG, SHORT, chunks_of, jpeg, jpeg_page, picture, raw_page, split_tables, tiff_bytes, tiled_page

CHUNK = picture(64, 64)
SHAPE = (64, 64, 3)


def format_of(tmp_path, page):
    (tmp_path / "a.tif").write_bytes(tiff_bytes([page]))
    page = TiffFile(open_blob(tmp_path / "a.tif"), "a").pages[0]
    return chunk_format(page.coding, page.chunk_width, page.chunk_height) if can_decode(page) else None


def frame_at(data):
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))


@pytest.mark.parametrize("kind", ["420", "422", "444"])
def test_ycbcr_jpeg_with_and_without_tables(kind):
    whole = jpeg(CHUNK, kind)
    expected = imagecodecs.jpeg8_decode(whole)
    tables, rest = split_tables(whole)
    assert np.array_equal(decode_jpeg(rest, jpeg_prefix(tables, rgb=False), SHAPE), expected)
    assert np.array_equal(decode_jpeg(whole, jpeg_prefix(b"", rgb=False), SHAPE), expected)


def test_rgb_jpeg_with_component_ids_0_1_2_keeps_its_colours():
    tables, rest = split_tables(jpeg(CHUNK, "rgb", 95))
    expected = imagecodecs.jpeg8_decode(rest, tables=tables, colorspace="rgb", outcolorspace="rgb")
    decoded = decode_jpeg(rest, jpeg_prefix(tables, rgb=True), SHAPE)
    assert np.array_equal(decoded, expected)
    assert np.abs(decoded.astype(int) - CHUNK).mean() < 2
    wrong = decode_jpeg(rest, jpeg_prefix(tables, rgb=False), SHAPE)
    assert np.abs(wrong.astype(int) - CHUNK).mean() > 20


def test_markers_inside_a_chunk_do_not_change_its_colours():
    tables, rest = split_tables(jpeg(CHUNK, "rgb"))
    jfif = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    adobe = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\1"
    prefix = jpeg_prefix(tables, rgb=True)
    assert np.array_equal(
        decode_jpeg(rest[:2] + jfif + adobe + rest[2:], prefix, SHAPE), decode_jpeg(rest, prefix, SHAPE)
    )


def test_progressive_and_grey_jpeg():
    progressive = cv2.imencode(".jpg", CHUNK, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert b"\xff\xc2" in progressive
    assert np.array_equal(
        decode_jpeg(progressive, jpeg_prefix(b"", rgb=False), SHAPE), imagecodecs.jpeg8_decode(progressive)
    )
    grey = imagecodecs.jpeg8_encode(np.ascontiguousarray(CHUNK[..., 0]), level=80)
    decoded = decode_jpeg(grey, jpeg_prefix(b"", rgb=False), (64, 64, 1))
    assert np.array_equal(decoded, np.repeat(imagecodecs.jpeg8_decode(grey)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["420", "rgb"])
def test_every_truncation_of_a_jpeg_is_an_error(kind):
    tables, rest = split_tables(jpeg(CHUNK, kind))
    prefix = jpeg_prefix(tables, rgb=kind == "rgb")
    for length in range(len(rest)):
        with pytest.raises(ChunkError):
            decode_jpeg(rest[:length], prefix, SHAPE)
    # Half the scan with an end marker put on: decoders fill the rest with grey and call it well.
    with pytest.raises(ChunkError, match="damaged"):
        decode_jpeg(rest[: len(rest) // 2] + b"\xff\xd9", prefix, SHAPE)


def test_a_frame_of_another_size_is_refused_before_it_is_decoded():
    whole = bytearray(jpeg(CHUNK, "420"))
    at = frame_at(whole)
    prefix = jpeg_prefix(b"", rgb=False)
    whole[at + 5 : at + 9] = (65500).to_bytes(2, "big") * 2
    with pytest.raises(ChunkError, match="65500 × 65500 × 3 where 64 × 64 × 3"):
        decode_jpeg(bytes(whole), prefix, SHAPE)
    with pytest.raises(ChunkError, match="× 1 where"):
        decode_jpeg(imagecodecs.jpeg8_encode(np.ascontiguousarray(CHUNK[..., 0])), prefix, SHAPE)
    twelve_bit = bytearray(jpeg(CHUNK, "420"))
    twelve_bit[at + 4] = 12
    with pytest.raises(ChunkError, match="not supported"):
        decode_jpeg(bytes(twelve_bit), prefix, SHAPE)


def test_a_frame_hidden_in_the_tables_is_dropped():
    tables, rest = split_tables(jpeg(CHUNK, "420"))
    bomb = b"\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    prefix = jpeg_prefix(tables[:-2] + bomb + tables[-2:], rgb=False)
    assert bomb not in prefix
    assert np.array_equal(decode_jpeg(rest, prefix, SHAPE), imagecodecs.jpeg8_decode(rest, tables=tables))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"not a jpeg\xff\xd9", bytes(100)])
def test_what_is_no_jpeg(data):
    with pytest.raises(ChunkError):
        decode_jpeg(data, jpeg_prefix(b"", rgb=False), SHAPE)


def test_broken_tables_are_a_damaged_slide(tmp_path):
    page = jpeg_page(CHUNK, 64)
    page.tags[347] = (7, page.tags[347][1][:-30])
    (tmp_path / "a.tif").write_bytes(tiff_bytes([page]))
    with pytest.raises(DamagedSlideError, match="tables"):
        open_slide(tmp_path / "a.tif")


def test_jpeg2000_in_rgb_and_ycbcr():
    rgb = imagecodecs.jpeg2k_encode(CHUNK, codecformat="j2k", reversible=True)
    assert np.array_equal(decode_jpeg2000(rgb, SHAPE, ycbcr=False), CHUNK)
    planes = imagecodecs.jpeg2k_encode(CHUNK, codecformat="j2k", reversible=True, mct=False)
    assert np.array_equal(decode_jpeg2000(planes, SHAPE, ycbcr=True), ycbcr_to_rgb(CHUNK))


def test_damaged_jpeg2000():
    data = imagecodecs.jpeg2k_encode(CHUNK, codecformat="j2k", reversible=True)
    for length in (0, 10, 41, 60, len(data) // 2, len(data) - 2):
        with pytest.raises(ChunkError):
            decode_jpeg2000(data[:length], SHAPE, ycbcr=False)
    huge = bytearray(data)
    huge[8:16] = (1 << 30).to_bytes(4, "big") * 2
    with pytest.raises(ChunkError, match="1073741824 × 1073741824"):
        decode_jpeg2000(bytes(huge), SHAPE, ycbcr=False)
    with pytest.raises(ChunkError, match="× 1 where"):
        decode_jpeg2000(imagecodecs.jpeg2k_encode(CHUNK[..., 0].copy(), codecformat="j2k"), SHAPE, ycbcr=False)
    with pytest.raises(ChunkError, match="8 bits"):
        decode_jpeg2000(imagecodecs.jpeg2k_encode(CHUNK.astype("u2"), codecformat="j2k"), SHAPE, ycbcr=False)
    subsampled = bytearray(data)
    subsampled[46] = 2
    with pytest.raises(ChunkError, match="subsampled RGB"):
        decode_jpeg2000(bytes(subsampled), SHAPE, ycbcr=False)


def test_ycbcr_to_rgb_is_the_jfif_formula():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 50, 3), dtype=np.uint8)
    luma, cb, cr = (pixels[..., k].astype(float) for k in range(3))
    cb, cr = cb - 128, cr - 128
    exact = np.stack([luma + 1.402 * cr, luma - 0.34414 * cb - 0.71414 * cr, luma + 1.772 * cb], -1).clip(0, 255)
    assert np.abs(ycbcr_to_rgb(pixels) - exact).max() <= 0.51


@pytest.mark.parametrize("compression", [1, 5, 8, 32946])
@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize("samples", [1, 3])
def test_lossless_chunks(tmp_path, compression, predictor, samples):
    image = np.ascontiguousarray(picture(100, 80)[..., :samples])
    page = raw_page(image, 64, compression, predictor)
    decode = format_of(tmp_path, page).decode
    for data, expected in zip(page.chunks, chunks_of(image, 64), strict=True):
        assert np.array_equal(decode(data), np.broadcast_to(expected, SHAPE))


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_damaged_lossless_chunks(tmp_path, compression):
    page = raw_page(CHUNK, 64, compression)
    decode, data = format_of(tmp_path, page).decode, page.chunks[0]
    for cut in (data[: len(data) // 2], data[:-20], b"\0", b"\xff" * 50):
        with pytest.raises(ChunkError):
            decode(cut)


def test_a_deflate_bomb_is_cut_at_the_size_of_a_chunk(tmp_path):
    decode = format_of(tmp_path, raw_page(CHUNK, 64, 8)).decode
    bomb = imagecodecs.zlib_encode(bytes(1 << 26))
    with contextlib.suppress(ChunkError):
        assert decode(bomb).shape == SHAPE


@pytest.mark.parametrize(
    "tags",
    [
        {"t258": (SHORT, [16, 16, 16])},
        {"t259": (SHORT, [50000])},
        {"t262": (SHORT, [3])},
        {"t284": (SHORT, [2])},
        {"t317": (SHORT, [3])},
        {"t339": (SHORT, [2, 2, 2])},
        {"t262": (SHORT, [6])},
        {"t322": None, "t323": None, "t278": (LONG, [64])},
    ],
)
def test_what_is_left_to_other_readers(tmp_path, tags):
    assert format_of(tmp_path, raw_page(CHUNK, 64, **tags)) is None
    assert format_of(tmp_path, raw_page(CHUNK, 64)) is not None
    alpha = np.dstack([CHUNK, CHUNK[..., :1]])
    assert format_of(tmp_path, tiled_page(alpha, 64, 1, [alpha.tobytes()])) is None

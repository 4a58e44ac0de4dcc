"""One compressed chunk of a TIFF page to pixels.

Before a decoder sees a chunk its header must state the size and the components that the page states, because decoders
believe the header: a JPEG patched to 65500 × 65500 took imagecodecs 12 GB and 40 s. Data that end early are an error,
never grey pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
import simplejpeg

from gigatome.slides.index import Coding
from gigatome.slides.tiff import TiffPage

NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE, APERIO_J2K_YCBCR, APERIO_J2K_RGB, J2K = 1, 5, 7, 8, 32946, 33003, 33005, 34712
_NAMES = {
    NONE: "none",
    LZW: "lzw",
    JPEG: "jpeg",
    DEFLATE: "deflate",
    OLD_DEFLATE: "deflate",
    APERIO_J2K_YCBCR: "jpeg2000",
    APERIO_J2K_RGB: "jpeg2000",
    J2K: "jpeg2000",
}
_GREY, _RGB, _YCBCR = 1, 2, 6
_EIGHT_BITS = 7  # JPEG 2000 writes the number of bits less one
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantisation, restart interval
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
# libjpeg-turbo's own fuzzers stop at this many scans: each pass over a chunk costs the same whatever it holds.
_MAX_SCANS = 500


class ChunkError(ValueError):
    """A chunk is truncated or is not what its page says; the reader turns it into a DamagedSlideError."""


@dataclass(frozen=True)
class ChunkFormat:
    """How the chunks of one page are compressed; made once a page by :func:`chunk_format`.

    Attributes:
        width, height: of every chunk, in pixels.
        components: 3, or 1 for grey.
        compression: name for display.
        decode: bytes of a chunk → uint8 [height, width, 3].
    """

    width: int
    height: int
    components: int
    compression: str
    decode: Callable[[bytes], np.ndarray]


def can_decode(page: TiffPage) -> bool:
    """Whether :func:`chunk_format` knows how the chunks of ``page`` are compressed; else another reader must do it."""
    grey = page.samples == 1 and page.photometric == _GREY
    if not (
        page.tiled
        and page.compression in _NAMES
        and set(page.bits) == {8}
        and set(page.sample_format) == {1}
        and (grey or (page.samples == 3 and page.planar == 1 and page.photometric in (_RGB, _YCBCR)))
    ):
        return False
    transformed = page.compression in (JPEG, APERIO_J2K_YCBCR, APERIO_J2K_RGB, J2K)
    return transformed or (page.photometric != _YCBCR and page.predictor in (1, 2))


def chunk_format(coding: Coding, width: int, height: int) -> ChunkFormat:
    """How to decode chunks of ``width`` × ``height`` pixels, of a page that :func:`can_decode`.

    Raises:
        ChunkError: the JPEG tables common to all chunks are broken.
    """
    decode = _decoder(coding, (height, width, coding.samples))
    return ChunkFormat(width, height, coding.samples, _NAMES[coding.compression], decode)


def _decoder(coding: Coding, shape: tuple[int, int, int]) -> Callable[[bytes], np.ndarray]:
    if coding.compression == JPEG:
        prefix = jpeg_prefix(coding.tables, rgb=coding.photometric == _RGB)
        return lambda data: decode_jpeg(data, prefix, shape)
    if coding.compression in (APERIO_J2K_YCBCR, APERIO_J2K_RGB, J2K):
        ycbcr = coding.compression == APERIO_J2K_YCBCR or (coding.compression == J2K and coding.photometric == _YCBCR)
        return lambda data: decode_jpeg2000(data, shape, ycbcr=ycbcr)
    inflate = {NONE: _stored, LZW: _lzw, DEFLATE: _deflate, OLD_DEFLATE: _deflate}[coding.compression]
    return lambda data: _raw(inflate, data, shape, coding.predictor == 2)


def jpeg_prefix(tables: bytes, *, rgb: bool) -> bytes:
    """What is put before a chunk, less its first two bytes, to make it a whole JPEG.

    The Adobe marker tells the decoder the colours of the components, which Photometric states and the chunk does not:
    Aperio's RGB chunks carry component ids 0, 1, 2, which libjpeg takes for YCbCr.

    Args:
        tables: value of the JPEGTables tag, b"" if the chunks carry their own; only its tables are kept.
        rgb: whether Photometric is RGB rather than YCbCr.

    Raises:
        ChunkError: ``tables`` is not a JPEG stream.
    """
    kept, position = [b"\xff\xd8"], 2
    while tables and tables[position : position + 2] != b"\xff\xd9":
        marker, length = _segment(tables, position)
        if marker in _TABLES:
            kept.append(tables[position : position + 2 + length])
        position += 2 + length
    kept.append(b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if rgb else b"\x01"))
    return b"".join(kept)


def decode_jpeg(data: bytes, prefix: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """JPEG chunk, with the tables in ``prefix``, to uint8 [height, width, 3].

    Raises:
        ChunkError: the data end early or are damaged, or the frame is not of ``shape`` (height, width, components).
    """
    head, body = _jpeg_header(data, shape)
    try:
        return simplejpeg.decode_jpeg(prefix + head + body, colorspace="RGB")
    except ValueError as error:
        raise ChunkError(f"damaged JPEG data ({error})") from error


def _jpeg_header(data: bytes, shape: tuple[int, int, int]) -> tuple[bytes, bytes]:
    """Checks the frame header; returns the chunk without SOI and without markers that restate its colours."""
    if data[:2] != b"\xff\xd8":
        raise ChunkError("JPEG data without a start")
    end = data.rfind(b"\xff\xd9")
    if end < 0:
        raise ChunkError("JPEG data that end early")
    kept, position, frame = [], 2, 0
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        marker, length = _segment(data, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _check_frame(data[position + 4 : position + 2 + length], marker, shape)
            frame = marker
        if marker == 0xDA:
            break
        if marker not in (0xE0, 0xEE):
            kept.append(data[position : position + 2 + length])
        position += 2 + length
    if not frame:
        raise ChunkError("JPEG data without a frame")
    if frame == _PROGRESSIVE and data.count(b"\xff\xda", position) > _MAX_SCANS:
        raise ChunkError(f"JPEG data of more than {_MAX_SCANS} scans")
    return b"".join(kept), data[position : end + 2]


def _segment(data: bytes, position: int) -> tuple[int, int]:
    if position + 4 > len(data) or data[position] != 0xFF:
        raise ChunkError("a broken JPEG header")
    length = int.from_bytes(data[position + 2 : position + 4], "big")
    if length < 2 or position + 2 + length > len(data):
        raise ChunkError("a broken JPEG header")
    return data[position + 1], length


def _check_frame(frame: bytes, marker: int, shape: tuple[int, int, int]) -> None:
    if len(frame) < 6 or marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or frame[0] != 8:
        raise ChunkError("JPEG data of a kind that is not supported")
    found = (int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5])
    if found != shape:
        raise ChunkError(f"JPEG data of {_size(found)} where {_size(shape)} is stated")


def check_jpeg(data: bytes, width: int, height: int, components: int) -> None:
    """Raises :class:`ChunkError` if a JPEG ends early or its frame is not of the size and components stated."""
    _jpeg_header(data, (height, width, components))


def decode_jpeg2000(data: bytes, shape: tuple[int, int, int], *, ycbcr: bool) -> np.ndarray:
    """JPEG 2000 codestream to uint8 [height, width, 3]; raises :class:`ChunkError` as :func:`decode_jpeg` does."""
    subsampled = _check_siz(data, shape)
    if subsampled and not ycbcr:
        raise ChunkError("JPEG 2000 data of subsampled RGB")
    try:
        pixels = imagecodecs.jpeg2k_decode(data)
    except (imagecodecs.Jpeg2kError, ValueError, RuntimeError) as error:
        raise ChunkError(f"damaged JPEG 2000 data ({error})") from error
    pixels = pixels.reshape(pixels.shape[0], pixels.shape[1], -1)
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ChunkError("JPEG 2000 data of another size than stated")
    # The decoder itself turns subsampled YCbCr into RGB, and rounds down: up to one grey level below OpenSlide.
    return ycbcr_to_rgb(pixels) if ycbcr and not subsampled else as_rgb(pixels)


def _check_siz(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Checks the size marker of a codestream; whether its colour components are subsampled."""
    start = data.find(b"\xff\x4f\xff\x51")
    components = int.from_bytes(data[start + 40 : start + 42], "big")
    if start < 0 or components > 4 or len(data) < start + 42 + 3 * components:
        raise ChunkError("JPEG 2000 data without a header")
    right, bottom, left, top = (int.from_bytes(data[start + 8 + 4 * k : start + 12 + 4 * k], "big") for k in range(4))
    found = (bottom - top, right - left, components)
    if found != shape:
        raise ChunkError(f"JPEG 2000 data of {_size(found)} where {_size(shape)} is stated")
    fields = data[start + 42 : start + 42 + 3 * components]
    if any(bits != _EIGHT_BITS for bits in fields[::3]):
        raise ChunkError("JPEG 2000 data that are not of 8 bits")
    return any(step != 1 for step in fields[1::3] + fields[2::3])


def ycbcr_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Full-range YCbCr (ITU-R BT.601, as in JFIF) to RGB, uint8 [H, W, 3], rounded as OpenSlide rounds."""
    luma, cb, cr = (pixels[..., k].astype(np.int32) for k in range(3))
    steps = np.arange(256) - 128
    red = np.floor(1.402 * steps + 0.5).astype(np.int32)
    blue = np.floor(1.772 * steps + 0.5).astype(np.int32)
    green_cb = np.floor((1 << 16) * (0.5 - 0.34414 * steps) + 0.5).astype(np.int32)
    green_cr = np.floor((1 << 16) * -0.71414 * steps + 0.5).astype(np.int32)
    rgb = np.stack([luma + red[cr], luma + ((green_cb[cb] + green_cr[cr]) >> 16), luma + blue[cb]], axis=-1)
    return rgb.clip(0, 255).astype(np.uint8)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey [H, W, 1] or RGB [H, W, 3] to RGB."""
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _raw(
    inflate: Callable[[bytes, int], bytes], data: bytes, shape: tuple[int, int, int], predicted: bool
) -> np.ndarray:
    size = shape[0] * shape[1] * shape[2]
    pixels = inflate(data, size)
    if len(pixels) < size:
        raise ChunkError(f"{len(pixels)} of {size} bytes of pixels")
    array = np.frombuffer(pixels, np.uint8, size).reshape(shape)
    if predicted:
        # Horizontal differencing modulo 256.
        array = np.cumsum(array, axis=1, dtype=np.uint8)
    return as_rgb(array)


def _stored(data: bytes, size: int) -> bytes:
    return data


def _lzw(data: bytes, size: int) -> bytes:
    try:
        return bytes(imagecodecs.lzw_decode(data, out=size))
    except (imagecodecs.LzwError, ValueError, RuntimeError) as error:
        raise ChunkError(f"damaged LZW data ({error})") from error


def _deflate(data: bytes, size: int) -> bytes:
    try:
        return bytes(imagecodecs.zlib_decode(data, out=size))
    except (imagecodecs.ZlibError, ValueError, RuntimeError) as error:
        raise ChunkError(f"damaged deflate data ({error})") from error


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} × {shape[0]} × {shape[2]}"

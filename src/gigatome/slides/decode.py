"""One compressed chunk of a TIFF page to pixels.

Before a decoder sees a chunk its header must state the size and the components that the page states, because decoders
believe the header: a JPEG patched to 65500 × 65500 took imagecodecs 12 GB and 40 s. Data that end early are an error,
never grey pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import imagecodecs
import numpy as np
import simplejpeg

from gigatome.core.native import NATIVE
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
_GREY, RGB, _YCBCR = 1, 2, 6
_EIGHT_BITS = 7  # JPEG 2000 writes the number of bits less one
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantisation, restart interval
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
# libjpeg-turbo's own fuzzers stop at this many scans: each pass over a chunk costs the same whatever it holds.
_MAX_SCANS = 500
_SHRINKS = (1, 2, 4, 8)
_UNIT = 16


class ChunkError(ValueError):
    """A chunk is truncated or is not what its page says; the reader turns it into a DamagedSlideError."""


@final
@dataclass(frozen=True)
class ChunkFormat:
    """How the chunks of one level are compressed; made once a level by :func:`chunk_format`.

    Attributes:
        width, height: of every chunk, in pixels.
        components: 3, or 1 for grey.
        compression: name for display.
        shrinks: by which the sides of a chunk can be divided while it is decoded: 1, and 2, 4, 8 where JPEG allows it.
        native: tables of the C extension, if it is there and decodes this format.
    """

    width: int
    height: int
    components: int
    compression: str
    shrinks: tuple[int, ...]
    native: Any
    _decode: Callable[[bytes, int, int], np.ndarray]

    def decode(self, data: bytes, shrink: int = 1, rows: int | None = None) -> np.ndarray:
        """Bytes of a chunk → uint8 [height / shrink, width / shrink, 3].

        Args:
            data: the chunk.
            shrink: one of ``shrinks``.
            rows: how many are needed from the top; None for all. Those below may be missing from the result, and damage
                in them goes unnoticed.

        Raises:
            ChunkError: the data end early or are damaged, or are not what the page says.
        """
        return self._decode(data, shrink, self.height if rows is None else rows * shrink)


def can_decode(page: TiffPage) -> bool:
    """Whether :func:`chunk_format` knows how the chunks of ``page`` are compressed; else another reader must do it."""
    grey = page.samples == 1 and page.photometric == _GREY
    if not (
        page.tiled
        and page.compression in _NAMES
        and set(page.bits) == {8}
        and set(page.sample_format) == {1}
        and (grey or (page.samples == 3 and page.planar == 1 and page.photometric in (RGB, _YCBCR)))
    ):
        return False
    transformed = page.compression in (JPEG, APERIO_J2K_YCBCR, APERIO_J2K_RGB, J2K)
    return transformed or (page.photometric != _YCBCR and page.predictor in (1, 2))


def chunk_format(coding: Coding, width: int, height: int, *, native: bool = True) -> ChunkFormat:
    """How to decode chunks of ``width`` × ``height`` pixels, of a page that :func:`can_decode`.

    Args:
        coding: how they are compressed.
        width: of a chunk.
        height: of a chunk.
        native: whether the C extension is used where it is there; the pixels are the same.

    Raises:
        ChunkError: the JPEG tables common to all chunks are broken.
    """
    shape, name = (height, width, coding.samples), _NAMES[coding.compression]
    if coding.compression != JPEG:
        return ChunkFormat(width, height, coding.samples, name, (1,), None, _other_decoder(coding, shape))
    prefix = jpeg_prefix(coding.tables, rgb=coding.photometric == RGB)
    shrinks = tuple(shrink for shrink in _SHRINKS if width % shrink == height % shrink == 0)
    tables = native_tables(prefix) if native else None

    def decode(data: bytes, shrink: int, rows: int) -> np.ndarray:
        return decode_jpeg(_whole(coding, data), prefix, shape, shrink, rows)

    return ChunkFormat(width, height, coding.samples, name, shrinks, tables, decode)


@lru_cache(maxsize=256)
def native_tables(prefix: bytes) -> Any:
    """The C extension's tables, shared by all slides that have the same; None without the extension."""
    try:
        return None if NATIVE is None else NATIVE.Tables(prefix)
    except ValueError:
        return None  # the other decoder will say what is wrong with them


def _whole(coding: Coding, data: bytes) -> bytes:
    """A chunk with its header, where it has none of its own."""
    return coding.header + data[:-2] + b"\xff\xd9" if coding.header else data


def _other_decoder(coding: Coding, shape: tuple[int, int, int]) -> Callable[[bytes, int, int], np.ndarray]:
    if coding.compression in (APERIO_J2K_YCBCR, APERIO_J2K_RGB, J2K):
        ycbcr = coding.compression == APERIO_J2K_YCBCR or (coding.compression == J2K and coding.photometric == _YCBCR)
        return lambda data, *_: decode_jpeg2000(data, shape, ycbcr=ycbcr)
    inflate = {NONE: _stored, LZW: _lzw, DEFLATE: _deflate, OLD_DEFLATE: _deflate}[coding.compression]
    return lambda data, *_: _raw(inflate, data, shape, coding.predictor == 2)


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


def decode_jpeg(
    data: bytes, prefix: bytes, shape: tuple[int, int, int], shrink: int = 1, rows: int | None = None
) -> np.ndarray:
    """JPEG chunk, with the tables in ``prefix``, to uint8 [height / shrink, width / shrink, 3].

    Shrunk, each pixel is about the mean of ``shrink`` squared: libjpeg takes a smaller inverse transform. If only the
    upper rows are needed the frame is said to be less high, and the decoder stops there.

    Args:
        data: the chunk.
        prefix: of :func:`jpeg_prefix`.
        shape: height, width and components that the page states.
        shrink: 1, 2, 4 or 8.
        rows: how many are needed from the top, before shrinking; None for all. The result may have fewer then.

    Raises:
        ChunkError: the data end early or are damaged, or the frame is not of ``shape``.
    """
    height, width, _ = shape
    if rows is not None:
        # Interpolated colours look at the next unit of up to 16 rows.
        height = min(height, -(-rows // _UNIT) * _UNIT + _UNIT)
    head, body = _jpeg_header(data, shape, height)
    pixels = np.empty((height // shrink, width // shrink, 3), np.uint8)
    least = pixels.shape[:2] if shrink > 1 else (0, 0)
    try:
        simplejpeg.decode_jpeg(
            prefix + head + body,
            colorspace="RGB",
            min_height=least[0],
            min_width=least[1],
            min_factor=1,
            buffer=pixels.reshape(-1),
        )
    except ValueError as error:
        # The first fault is the one that is told: rows that were left over are none.
        if height == shape[0] or "extraneous bytes" not in str(error):
            raise ChunkError(f"damaged JPEG data ({error})") from error
    return pixels


def _jpeg_header(data: bytes, shape: tuple[int, int, int], height: int) -> tuple[bytes, bytes]:
    """Checks the frame header and states ``height`` in it; returns the chunk in two parts.

    SOI and markers that restate its colours are left out.
    """
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
        segment = data[position : position + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _check_frame(segment[4:], marker, shape)
            segment = segment[:5] + height.to_bytes(2, "big") + segment[7:]
            frame = marker
        if marker == 0xDA:
            break
        if marker not in (0xE0, 0xEE):
            kept.append(segment)
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
    _jpeg_header(data, (height, width, components), height)


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

"""Small TIFF files for tests, each byte under control: any tag, both byte orders, chunks as an encoder made them."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import imagecodecs
import numpy as np

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16
_LAYOUT = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}
APERIO = "Aperio Image Library v12.0.15 \r\n900x700 (64x64) JPEG/YCC Q=70|AppMag = 40|MPP = 0.2500|Left = 1"


def picture(width, height, seed=0):
    """Smooth coloured structure with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


def halved(image, factor):
    """Area average by a whole factor; what is left over is dropped."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return cv2.resize(image[: height * factor, : width * factor], (width, height), interpolation=cv2.INTER_AREA)


def chunks_of(image, side):
    """Square chunks in row order, those at the edge padded by repetition."""
    height, width = image.shape[:2]
    for y in range(0, height, side):
        for x in range(0, width, side):
            chunk = image[y : y + side, x : x + side]
            pad = ((0, side - chunk.shape[0]), (0, side - chunk.shape[1]), (0, 0))
            yield np.ascontiguousarray(np.pad(chunk, pad, mode="edge"))


def jpeg(chunk, kind, quality=70):
    """A whole JPEG; kind is "420", "422", "444" (YCbCr) or "rgb" with Aperio's component ids 0, 1, 2."""
    if kind != "rgb":
        return imagecodecs.jpeg8_encode(
            chunk, level=quality, colorspace="rgb", outcolorspace="ycbcr", subsampling=kind, optimize=False
        )
    data = bytearray(
        imagecodecs.jpeg8_encode(
            chunk, level=quality, colorspace="rgb", outcolorspace="rgb", subsampling="444", optimize=False
        )
    )
    frame, scan = data.find(b"\xff\xc0"), data.find(b"\xff\xda")
    data[frame + 10], data[frame + 13], data[frame + 16] = 0, 1, 2
    data[scan + 5], data[scan + 7], data[scan + 9] = 0, 1, 2
    return bytes(data)


def split_tables(data):
    """A whole JPEG as (tables, abbreviated stream without application markers)."""
    tables, rest, position = b"\xff\xd8", b"\xff\xd8", 2
    while data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] in (0xDB, 0xC4):
            tables += data[position:end]
        elif data[position + 1] not in (0xE0, 0xEE):
            rest += data[position:end]
        position = end
    return tables + b"\xff\xd9", rest + data[position:]


@dataclass
class Page:
    """Tags {code: (type, values or bytes)} and compressed chunks; b"" is a chunk left out."""

    tags: dict
    chunks: list = field(default_factory=list)


def tiled_page(image, side, compression, chunks, *, photometric=2, **more):
    """A page with the usual tags; ``more`` overrides, as ``t270=(ASCII, "text")`` or ``t270=None`` to leave out."""
    height, width, samples = image.shape
    tags = {
        254: (LONG, [0]),
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [8] * samples),
        259: (SHORT, [compression]),
        262: (SHORT, [photometric]),
        277: (SHORT, [samples]),
        284: (SHORT, [1]),
        322: (SHORT, [side]),
        323: (SHORT, [side]),
    }
    tags.update({int(key[1:]): value for key, value in more.items()})
    return Page({code: value for code, value in tags.items() if value is not None}, list(chunks))


def jpeg_page(image, side, kind="420", *, tables=True, **more):
    parts = [split_tables(jpeg(chunk, kind)) for chunk in chunks_of(image, side)]
    if tables:
        more.setdefault("t347", (UNDEFINED, parts[0][0]))
        chunks = [rest for _, rest in parts]
    else:
        chunks = [jpeg(chunk, kind) for chunk in chunks_of(image, side)]
    return tiled_page(image, side, 7, chunks, photometric=2 if kind == "rgb" else 6, **more)


def raw_page(image, side, compression=1, predictor=1, **more):
    """Uncompressed, LZW (5) or deflate (8)."""
    chunks = []
    for chunk in chunks_of(image, side):
        if predictor == 2:
            chunk = np.diff(chunk, axis=1, prepend=np.zeros_like(chunk[:, :1]))
        encode = {1: bytes, 5: imagecodecs.lzw_encode, 8: imagecodecs.zlib_encode, 32946: imagecodecs.zlib_encode}
        chunks.append(encode[compression](chunk.tobytes()))
    more.setdefault("t317", (SHORT, [predictor]))
    return tiled_page(image, side, compression, chunks, photometric=2 if image.shape[2] == 3 else 1, **more)


def write_tiff(path, pages, *, order="<", big=False):
    """Writes the file and returns its path."""
    Path(path).write_bytes(tiff_bytes(pages, order=order, big=big))
    return path


def tiff_bytes(pages, *, order="<", big=False):
    word, size = ("Q", 8) if big else ("I", 4)
    data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42))
    if big:
        data += struct.pack(order + "HH", 8, 0)
    link = len(data)
    data += bytes(size)
    for page in pages:
        offsets = []
        for chunk in page.chunks:
            offsets.append(len(data) if chunk else 0)
            data += chunk
        tags = dict(page.tags)
        kind = LONG8 if big else LONG
        where, lengths = (324, 325) if 322 in tags else (273, 279)
        tags.setdefault(where, (kind, offsets))
        tags.setdefault(lengths, (LONG, [len(chunk) for chunk in page.chunks]))
        entries = b""
        for code, (kind, values) in sorted(tags.items()):
            payload, count = _payload(order, kind, values)
            if len(payload) > size:
                data += bytes(len(data) % 2)
                data, payload = data + payload, struct.pack(order + word, len(data))
            entries += struct.pack(order + "HH" + word, code, kind, count) + payload.ljust(size, b"\0")
        data += bytes(len(data) % 2)
        data[link : link + size] = struct.pack(order + word, len(data))
        data += struct.pack(order + ("Q" if big else "H"), len(tags)) + entries
        link = len(data)
        data += bytes(size)
    return bytes(data)


def _payload(order, kind, values):
    if kind in (BYTE, UNDEFINED):
        return bytes(values), len(values)
    if kind == ASCII:
        text = values.encode() + b"\0"
        return text, len(text)
    count = len(values) // 2 if kind == RATIONAL else len(values)
    return struct.pack(f"{order}{len(values)}{_LAYOUT[kind]}", *values), count


def aperio_pages(image, side=64, kind="420", description=APERIO):
    """Levels 1 and 4 as an SVS lays them out, with thumbnail, label and macro in strips."""
    text = {"t270": (ASCII, description)}
    level1 = jpeg_page(
        halved(image, 4), side, kind, t270=(ASCII, "Aperio Image Library v12.0.15 \r\n900x700 -> 225x175")
    )
    return [jpeg_page(image, side, kind, **text), strip_page(halved(image, 7)), level1,
            strip_page(picture(90, 80)), strip_page(picture(120, 40))]  # fmt: skip


def strip_page(image, **more):
    """A page of one uncompressed strip."""
    return tiled_page(image, 0, 1, [image.tobytes()], t322=None, t323=None, t278=(LONG, [image.shape[0]]), **more)

"""Small TIFF files for tests, each byte under control: any tag, both byte orders, chunks as an encoder made them."""

import io
import struct
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from PIL import Image

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16
SLONG, FLOAT = 9, 11
_LAYOUT = {SLONG: "i", FLOAT: "f", SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}
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


def padded(image, side):
    """The image grown to whole chunks by repetition, as Philips and Ventana state the sizes of their pages."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")


def philips_xml(spacings, *, kinds=("MACROIMAGE", "WSI")):
    """A Philips description; ``spacings`` in mm, (row, column), the first also that of the slide."""

    def attribute(name, value):
        return f'<Attribute Name="{name}" Group="0x0028">{value}</Attribute>'

    def spacing(pair):
        return attribute("DICOM_PIXEL_SPACING", " ".join(f'"{value:.9f}"' for value in pair))

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(pair)}</DataObject>' for pair in spacings
    )
    images = "".join(
        f'<DataObject ObjectType="DPScannedImage">{attribute("PIM_DP_IMAGE_TYPE", kind)}'
        + (
            spacing(spacings[0])
            + attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{levels}</Array>")
            + attribute("DICOM_MANUFACTURER", "PHILIPS")
            if kind == "WSI"
            else attribute("PIM_DP_IMAGE_DATA", "/9j/" * 500)
        )
        + "</DataObject>"
        for kind in kinds
    )
    body = attribute("PIM_DP_SCANNED_IMAGES", f"<Array>{images}</Array>") + attribute("DICOM_DEVICE_SERIAL_NUMBER", 7)
    return f'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">{body}</DataObject>'


def philips_pages(image, side=64, scales=(1, 2, 4), *, missing=(), xml=None, **more):
    """Levels padded to whole chunks, the chunks numbered ``missing`` left out of each, and a macro in strips."""
    xml = xml or philips_xml([(0.00025 * scale, 0.00026 * scale) for scale in scales])
    pages = []
    for scale in scales:
        level = jpeg_page(padded(halved(image, scale) if scale > 1 else image, side), side, **more)
        level.chunks = [b"" if number in missing else chunk for number, chunk in enumerate(level.chunks)]
        level.tags |= {305: (ASCII, "Philips DP v1.0"), 254: (LONG, [0 if scale == 1 else 1])}
        pages.append(level)
    pages[0].tags[270] = (ASCII, xml)
    return [*pages, strip_page(picture(90, 80), t270=(ASCII, "Macro"))]


ISCAN = '<iScan Magnification="40" ScanRes="0.2325" UnitNumber="2000515" Z-layers="1"/>'


def encode_info(columns, rows, side=64, *, overlap=0, position="0", scanned=1):
    """How the chunks of a Ventana BIF lie: one area, numbered in a serpentine from the lower left."""

    def number(column, row):
        up = rows - 1 - row
        return 1 + up * columns + (columns - 1 - column if up % 2 else column)

    def joint(direction, first, second):
        return (
            f'<TileJointInfo Direction="{direction}" Tile1="{number(*first)}" Tile2="{number(*second)}" '
            f'OverlapX="{overlap}" OverlapY="{overlap}" Confidence="98" FlagJoined="1"/>'
        )

    joints = [joint("RIGHT", (x, y), (x + 1, y)) for y in range(rows) for x in range(columns - 1)]
    joints += [joint("UP", (x, y), (x, y - 1)) for y in range(1, rows) for x in range(columns)]
    return (
        f'<EncodeInfo><SlideStitchInfo><ImageInfo AOIScanned="{scanned}" Width="{side}" Height="{side}" '
        f'NumCols="{columns}" NumRows="{rows}" Pos-X="{position}" Pos-Y="0">{"".join(joints)}</ImageInfo>'
        f'</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )


def ventana_pages(image, side=64, scales=(1, 2, 4), *, info=None, iscan=ISCAN, **more):
    """A label with the scanner's XML, and levels; ``info`` is the XML of a BIF, None for a Ventana TIFF."""
    pages = [strip_page(picture(90, 80), t270=(ASCII, "Label Image"), t700=(BYTE, iscan.encode()))]
    for number, scale in enumerate(scales):
        text = f"level={number} mag={40 / scale:g} quality=90"
        shrunk = halved(image, scale) if scale > 1 else image
        pages.append(jpeg_page(padded(shrunk, side) if info else shrunk, side, t270=(ASCII, text), **more))
    if info:
        pages[1].tags[700] = (BYTE, info.encode())
    return pages


def restart_jpeg(image, interval, subsampling="4:2:2"):
    """A whole JPEG with a restart marker each ``interval`` coded units (0 for none), and where its intervals start."""
    output = io.BytesIO()
    Image.fromarray(image).save(output, "jpeg", quality=80, subsampling=subsampling, restart_marker_blocks=interval)
    data = output.getvalue()
    scan = data.index(b"\xff\xda")
    starts = [scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]
    starts += [at + 2 for at in range(starts[0], len(data)) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    return data, starts


def ndpi_page(image, interval=4, subsampling="4:2:2", *, lens=20.0, stated=None, **more):
    """One level of an NDPI file; ``stated`` replaces the size in the frame of the JPEG."""
    data, starts = restart_jpeg(image, interval, subsampling)
    if stated is not None:
        at = data.index(b"\xff\xc0") + 5
        data = data[:at] + struct.pack(">HH", *stated[::-1]) + data[at + 4 :]
    if interval:
        more.setdefault("t65426", (LONG, starts))
    height = image.shape[0]
    page = tiled_page(image, 0, 7, [data], photometric=6, t322=None, t323=None, t278=(LONG, [height]), **more)
    page.tags |= {
        282: (RATIONAL, [43_478, 1]), 283: (RATIONAL, [43_956, 1]), 296: (SHORT, [3]), 65420: (LONG, [1]),
        65421: (FLOAT, [lens]), 65424: (SLONG, [0]), 65449: (ASCII, "Product=C13210\r\nVersion=1\r\n"),
    }  # fmt: skip
    return page


def ndpi_pages(image):
    """Three levels, the smallest without restart markers, and a macro."""
    levels = [ndpi_page(image), ndpi_page(halved(image, 2), 8, "4:4:4"), ndpi_page(halved(image, 8), 0)]
    return [*levels, ndpi_page(picture(96, 64), 0, lens=-1.0)]


def write_ndpi(path, pages, *, start=16):
    """Hamamatsu's TIFF: 64-bit offsets, their upper halves behind each directory; the first strip lies at ``start``."""
    with Path(path).open("wb") as file:
        file.write(b"II" + struct.pack("<HQ", 42, 0))
        link = 4
        file.seek(start)
        for page in pages:
            place = file.tell()
            file.write(page.chunks[0])
            tags = page.tags | {273: (LONG, [place & 0xFFFFFFFF]), 279: (LONG, [len(page.chunks[0])])}
            entries, high = b"", b""
            for code, (kind, values) in sorted(tags.items()):
                payload, count = _payload("<", kind, values)
                word, upper = payload.ljust(4, b"\0"), place >> 32 if code == 273 else 0
                if len(payload) > 4:
                    word, upper = struct.pack("<I", file.tell() & 0xFFFFFFFF), file.tell() >> 32
                    file.write(payload)
                entries += struct.pack("<HHI", code, kind, count) + word
                high += struct.pack("<I", upper)
            place = file.tell()
            file.write(struct.pack("<H", len(tags)) + entries + bytes(8) + high)
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<Q", place))
            file.seek(end)
            link = place + 2 + len(entries)
    return path

"""Hamamatsu NDPI: each level is one JPEG, cut at its restart markers into chunks a few pixels high.

The file lists where each restart interval starts; an interval behind the header of its JPEG, with the size of the
interval patched in, is a JPEG of its own (:attr:`gigatome.slides.index.Coding.header`). Levels without restart markers
are one chunk. What does not fit exactly is left to OpenSlide, whose reading of the format is followed here. Colour that
is subsampled along y is left to it too: it cannot be decoded without the intervals above and below.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np

from gigatome.core.geometry import Box
from gigatome.slides.decode import JPEG, RGB
from gigatome.slides.index import Coding, LevelIndex, SlideIndex, level_scale
from gigatome.slides.pyramid import tag_mpp, tiff_properties
from gigatome.slides.tiff import (
    MAX_CHUNK_SIDE,
    MAX_CHUNKS,
    ROWS_PER_STRIP,
    STRIP_COUNTS,
    STRIP_OFFSETS,
    TiffFile,
    TiffPage,
)

_SOURCE_LENS, _FOCAL_PLANE, _STARTS, _STARTS_HIGH, _PROPERTIES = 65421, 65424, 65426, 65432, 65449
_FLOAT, _LONG, _SLONG = 11, 4, 9
_YCBCR = 6
_MAX_HEADER = 1 << 16
_MAX_JPEG_SIDE, _DCT_SIDE = 65500, 8
_SOF, _DHT, _SOS, _DQT, _DRI, _JFIF, _ADOBE = (0xC0, 0xC1), 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE


@final
@dataclass(frozen=True)
class _Strip:
    """The JPEG of one level: where it lies, and where its restart intervals start within it, if it has any."""

    page: TiffPage
    offset: int
    length: int
    starts: np.ndarray | None


@final
@dataclass(frozen=True)
class _Header:
    """What precedes the scan of a JPEG.

    Attributes:
        length: in bytes.
        width, height: as the frame states them.
        mcu_width, mcu_height: of its smallest coded unit, in pixels.
        interval: coded units between restart markers; 0 without markers.
        photometric: TIFF's code of its colour space, as libjpeg would take it.
        tables: all of it but what restates size or colours.
        size_at: where height and width stand in ``tables``.
    """

    length: int
    width: int
    height: int
    mcu_width: int
    mcu_height: int
    interval: int
    photometric: int
    tables: bytes
    size_at: int

    def of_size(self, width: int, height: int) -> bytes:
        """The header of a JPEG of another size, without restart markers."""
        at = self.size_at
        return self.tables[:at] + struct.pack(">HH", height, width) + self.tables[at + 4 :]


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in an NDPI file; None if a level is not built as described above."""
    if not tiff.source.ndpi or not all(_lens(page) for page in tiff.pages):
        return None
    planes = [(page, _focal_plane(page)) for page in tiff.pages if _lens(page) > 0]
    pages = [page for page, plane in planes if plane == 0]
    shrinking = all(after.width < before.width for before, after in pairwise(pages))
    strips = _strips(tiff, pages)
    if not pages or not shrinking or strips is None or any(plane is None for _, plane in planes):
        return None
    longest = [min(strip.length, _MAX_HEADER if strip.starts is None else int(strip.starts[0])) for strip in strips]
    heads = tiff.source.read_all([(strip.offset, length) for strip, length in zip(strips, longest, strict=True)])
    levels = []
    for strip, head in zip(strips, heads, strict=True):
        header = _parse(head)
        level = _level(tiff, pages[0], strip, header) if header else None
        if level is None:
            return None
        levels.append(level)
    properties = tiff_properties(pages[0]) | {f"hamamatsu.{key}": value for key, value in _properties(pages[0]).items()}
    mpp = tag_mpp(pages[0].resolution, pages[0].resolution_unit)
    return SlideIndex("hamamatsu", tuple(levels), mpp, properties, Box(0, 0, pages[0].width, pages[0].height))


def _strips(tiff: TiffFile, pages: list[TiffPage]) -> list[_Strip] | None:
    """The JPEG of each page; None if one is not a single strip or lists its restart intervals in a way not known."""
    for page in pages:
        single = all(len(page.numbers(tag)) == 1 for tag in (STRIP_OFFSETS, STRIP_COUNTS, ROWS_PER_STRIP))
        if not single or page.tiled or page.number(ROWS_PER_STRIP) != page.height or page.compression != JPEG:
            return None
        for tag in (_STARTS, _STARTS_HIGH):
            if tag in page.tags and (page.tags[tag][1] != _LONG or not 0 < page.tags[tag][2] <= MAX_CHUNKS):
                return None
    tags = [(page, tag) for page in pages for tag in (_STARTS, _STARTS_HIGH) if tag in page.tags]
    values = tiff.source.values([page.tags[tag] for page, tag in tags])
    found = {(page.index, tag): value for (page, tag), value in zip(tags, values, strict=True)}
    strips = []
    for page in pages:
        offset, length = page.number(STRIP_OFFSETS), page.number(STRIP_COUNTS)
        tiff.source.check_inside(offset, length)
        low, high = found.get((page.index, _STARTS)), found.get((page.index, _STARTS_HIGH))
        starts = None
        if low is not None:
            starts = low.astype(np.int64)
            if high is not None:
                if len(high) != len(low):
                    return None
                starts += (high.astype(np.int64) & 0x7FFF) << 32
            if not 0 < starts[0] <= _MAX_HEADER or starts[-1] >= length or (np.diff(starts) <= 0).any():
                return None
        strips.append(_Strip(page, offset, length, starts))
    return strips


def _level(tiff: TiffFile, base: TiffPage, strip: _Strip, header: _Header) -> LevelIndex | None:
    page = strip.page
    small = max(page.width, page.height) <= _MAX_JPEG_SIDE
    if small and (header.width, header.height) != (page.width, page.height):
        return None
    if strip.starts is None:
        if header.interval or max(page.width, page.height) > MAX_CHUNK_SIDE:
            return None
        width, height, stream = page.width, page.height, b""
        starts = np.zeros(1, np.int64)
    else:
        width, height, starts = header.mcu_width * header.interval, header.mcu_height, strip.starts
        if not 0 < width <= _MAX_JPEG_SIDE or height != _DCT_SIDE or starts[0] != header.length:
            return None
        if page.width % width or page.height % height or len(starts) != page.width // width * (page.height // height):
            return None
        stream = header.of_size(width, height)
    shape = (page.height // height, page.width // width)
    counts = np.diff(starts, append=strip.length).astype(np.uint64).reshape(shape)
    offsets = (starts + strip.offset).astype(np.uint64).reshape(shape)
    tiff.check_chunks(page, offsets, counts)
    return LevelIndex(
        page.width,
        page.height,
        *level_scale(base.width, base.height, page.width, page.height),
        width,
        height,
        Coding(JPEG, header.photometric, 3, 1, b"", stream),
        offsets.astype(tiff.offset_type),
        counts.astype(np.uint32),
    )


def _parse(data: bytes) -> _Header | None:
    """The header of a three-component JPEG of eight bits; None if ``data`` do not start with one."""
    kept, position, interval, size_at = b"\xff\xd8", 2, 0, 0
    frame, transform = b"", None
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position : position + 2 + length]
        if length < 2 or len(segment) < 2 + length:
            return None
        position += len(segment)
        if marker == _DRI and length == 4:
            interval = int.from_bytes(segment[4:], "big")
        elif marker == _JFIF and segment[4:9] == b"JFIF\0":
            transform = 1
        elif marker == _ADOBE and segment[4:9] == b"Adobe" and length >= 14 and transform is None:
            transform = segment[15]
        elif marker in _SOF and length == 17 and segment[4] == 8 and segment[9] == 3 and not frame:
            frame, size_at, kept = segment, len(kept) + 5, kept + segment
        elif marker in (_DHT, _DQT):
            kept += segment
        elif marker == _SOS and frame and length == 12 and segment[4] == 3:
            height, width = struct.unpack(">HH", frame[5:9])
            across, down = ([factor >> shift & 15 for factor in frame[11::3]] for shift in (4, 0))
            if not 1 <= min(across + down) <= max(across + down) <= 4:
                return None
            rgb = transform == 0 or (transform is None and frame[10::3] == b"RGB")
            return _Header(
                length=position,
                width=width,
                height=height,
                mcu_width=_DCT_SIDE * max(across),
                mcu_height=_DCT_SIDE * max(down),
                interval=interval,
                photometric=RGB if rgb else _YCBCR,
                tables=kept + segment,
                size_at=size_at,
            )
        elif 0xC0 <= marker <= 0xCF or marker == _SOS:
            return None
    return None


def _lens(page: TiffPage) -> float:
    """Magnification of the lens, negative for pictures of the whole glass; 0 if it is not stated."""
    if _SOURCE_LENS not in page.tags or page.tags[_SOURCE_LENS][1:3] != (_FLOAT, 1):
        return 0.0
    return struct.unpack("<f", page.bytes(_SOURCE_LENS))[0]


def _focal_plane(page: TiffPage) -> int | None:
    """Distance from the plane in focus; None if it is not stated."""
    if _FOCAL_PLANE not in page.tags or page.tags[_FOCAL_PLANE][1:3] not in ((_LONG, 1), (_SLONG, 1)):
        return None
    return struct.unpack("<i", page.bytes(_FOCAL_PLANE))[0]


def _properties(page: TiffPage) -> dict[str, str]:
    pairs = (line.partition("=") for line in page.text(_PROPERTIES).split("\r\n"))
    return {"SourceLens": f"{_lens(page):g}"} | {key: value for key, _, value in pairs if key and value}

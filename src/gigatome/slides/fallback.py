"""Readers for what gigatome does not decode itself: OpenSlide for other vendors and DICOM, tifffile for OME-TIFF."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from gigatome.blob.store import Blob, is_remote, local_path
from gigatome.core.errors import DamagedSlideError, GigatomeError, NotASlideError, SlideError
from gigatome.core.extras import require
from gigatome.core.geometry import Box
from gigatome.slides.decode import JPEG, ChunkError, check_jpeg
from gigatome.slides.index import level_scale
from gigatome.slides.reader import Level, place
from gigatome.slides.resample import WHITE
from gigatome.slides.tiff import MAX_CHUNK_BYTES, MAX_SIDE
from gigatome.slides.vendors import tag_mpp

_COLOUR = (2, 6)  # TIFF's codes for RGB and YCbCr
_PREMULTIPLIED = 1
_ALPHA = (_PREMULTIPLIED, 2)  # TIFF's codes for an extra sample that is alpha; others are no part of the picture
_AHEAD = 1 << 16
_SIDES = ("x", "y", "width", "height")


@final
class OpenSlideReader:
    """Any format that OpenSlide reads; a local file only.

    Where the file holds no pixels OpenSlide is transparent; that becomes the slide's background colour.

    Raises:
        MissingExtraError: openslide-python is not installed.
        NotASlideError: OpenSlide does not know the format.
        DamagedSlideError: it does, and cannot open the file.
        SlideError: the slide is remote.
    """

    reader = "openslide"

    def __init__(self, uri: str, name: str):
        if is_remote(uri):
            raise SlideError(
                name, "this format is read by OpenSlide, which needs a local file: copy it to a disk first"
            )
        self._name = name
        self._library = require("openslide", "openslide", "read this slide format")
        try:
            self._slide = self._library.OpenSlide(str(local_path(uri)))
        except self._library.OpenSlideUnsupportedFormatError:
            raise NotASlideError(name, "is not a slide that OpenSlide can read") from None
        except self._library.OpenSlideError as error:
            raise DamagedSlideError(name, f"OpenSlide cannot open it ({error})") from error
        self.properties: Mapping[str, str] = _readable(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.levels = tuple(self._level(index) for index in range(self._slide.level_count))
        self.mpp = self._mpp()
        self.bounds = self._bounds()
        colour = self.properties.get("openslide.background-color", "FFFFFF")
        self._background = np.array([int(colour[k : k + 2], 16) for k in (0, 2, 4)], np.float32)

    def read_level(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> np.ndarray:
        """See :meth:`gigatome.slides.reader.LevelReader.read_level`."""
        scale = self._slide.level_downsamples[level]
        try:
            image = self._slide.read_region((round(x * scale), round(y * scale)), level, (width, height))
        except self._library.OpenSlideError as error:
            raise DamagedSlideError(self._name, f"OpenSlide cannot read it ({error})") from error
        return over(np.asarray(image), self._background)

    def close(self) -> None:
        """Closes the slide."""
        self._slide.close()

    def _level(self, index: int) -> Level:
        (width, height), base = self._slide.level_dimensions[index], self._slide.dimensions
        stated = float(self._slide.level_downsamples[index])
        ratio = (base[0] / width + base[1] / height) / 2
        # OpenSlide's own estimate is the mean ratio, which is improved on; a scale that the vendor states is kept.
        estimated = abs(stated - ratio) < 1e-6 * ratio
        scale_x, scale_y = level_scale(base[0], base[1], width, height) if estimated else (stated, stated)
        chunk_width = int(self.properties.get(f"openslide.level[{index}].tile-width", "0"))
        chunk_height = int(self.properties.get(f"openslide.level[{index}].tile-height", "0"))
        return Level(width, height, scale_x, scale_y, chunk_width, chunk_height, "")

    def _mpp(self) -> tuple[float, float] | None:
        try:
            x, y = (float(self.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        except (KeyError, ValueError):
            return None
        if self.vendor == "generic-tiff":
            # These come from the resolution tags, which are believed only where they are plausible.
            return tag_mpp((10_000 / x, 10_000 / y), 3) if x > 0 and y > 0 else None
        return (x, y) if 0 < x < float("inf") and 0 < y < float("inf") else None

    def _bounds(self) -> Box:
        try:
            x, y, width, height = (int(self.properties[f"openslide.bounds-{side}"]) for side in _SIDES)
            return Box(x, y, width, height)
        except (KeyError, ValueError):
            return Box(0, 0, *self._slide.dimensions)


def _readable(properties: Mapping[str, str]) -> dict[str, str]:
    """The properties whose text OpenSlide can give; those of a damaged file may be no text."""
    found = {}
    for key in properties:
        with contextlib.suppress(KeyError, UnicodeDecodeError):
            found[key] = properties[key]
    return found


def over(rgba: np.ndarray, background: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """Composites uint8 [H, W, 4] onto a colour float32 [3]; uint8 [H, W, 3].

    Args:
        rgba: colours and alpha.
        background: the colour, 0 to 255.
        premultiplied: whether the colours are multiplied by alpha already.
    """
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    share = alpha.astype(np.float32) / 255
    colour = rgba[..., :3] if premultiplied else rgba[..., :3] * share
    return (colour + background * (1 - share) + np.float32(0.5)).clip(0, 255).astype(np.uint8)


@final
class TifffileReader:
    """OME-TIFF and TIFF files that are not tiled, or compressed as the direct reader does not know.

    tifffile finds the levels; the chunks are read through ``blob``, so that remote files work and threads do not wait
    for each other. 8-bit RGB or RGBA, interleaved or planar.

    Raises:
        NotASlideError: not a TIFF, or not of 8-bit RGB.
        DamagedSlideError: truncated or contradictory.
    """

    reader = "tifffile"

    def __init__(self, blob: Blob, name: str):
        import tifffile

        self._blob, self._name = blob, name
        try:
            self._file: Any = tifffile.TiffFile(_File(blob), name=name)  # pyright: ignore[reportArgumentType]
            series = max(self._file.series, key=lambda item: item.size)
            self._pages = [self._checked(level) for level in series.levels]
            self.vendor = "ome-tiff" if self._file.is_ome else "generic-tiff"
            self.mpp = self._mpp(self._file.series.index(series))
        except GigatomeError:
            raise
        except tifffile.TiffFileError as error:
            raise NotASlideError(name, f"tifffile cannot read it ({error})") from error
        except Exception as error:  # a malformed file raises almost anything out of tifffile
            raise DamagedSlideError(name, f"tifffile cannot read it ({type(error).__name__}: {error})") from error
        base = self._pages[0]
        self.levels = tuple(self._level(page) for page in self._pages)
        self.properties: Mapping[str, str] = {"tiff.ImageDescription": base.description or ""}
        self.bounds = Box(0, 0, base.imagewidth, base.imagelength)

    def read_level(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> np.ndarray:
        """See :meth:`gigatome.slides.reader.LevelReader.read_level`."""
        page, (side_x, side_y) = self._pages[level], _chunk_size(self._pages[level])
        columns, rows = -(-page.imagewidth // side_x), -(-page.imagelength // side_y)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        output = np.full((height, width, page.samplesperpixel), WHITE, np.uint8)
        wanted = [
            (plane, row, column)
            for plane in range(planes)
            for row in range(y // side_y, (y + height - 1) // side_y + 1)
            for column in range(x // side_x, (x + width - 1) // side_x + 1)
        ]
        chunks = [(plane * rows + row) * columns + column for plane, row, column in wanted]
        ranges = [(page.dataoffsets[chunk], page.databytecounts[chunk]) for chunk in chunks]
        for (plane, row, column), chunk, data in zip(wanted, chunks, self._blob.read_ranges(ranges), strict=True):
            if not data:
                continue  # left out of the file: white
            pixels = self._decode(page, chunk, data, f"chunk {column}, {row} of level {level}")
            target = output if planes == 1 else output[..., plane : plane + 1]
            place(target, pixels, column * side_x - x, row * side_y - y)
        if page.samplesperpixel == 3 or page.extrasamples[0] not in _ALPHA:
            return np.ascontiguousarray(output[..., :3])
        return over(output, np.full(3, WHITE, np.float32), premultiplied=page.extrasamples[0] == _PREMULTIPLIED)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._blob.close()

    def _decode(self, page: Any, index: int, data: bytes, where: str) -> np.ndarray:
        try:
            if page.compression == JPEG:
                side_x, side_y = _chunk_size(page)
                check_jpeg(data, side_x, side_y, 1 if page.planarconfig == 2 else page.samplesperpixel)
            pixels, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
            return pixels[0]
        except ChunkError as error:
            raise DamagedSlideError(self._name, f"{where}: {error}; copy the file again or leave it out") from error
        except Exception as error:  # the decoders raise errors of many kinds
            raise DamagedSlideError(self._name, f"{where}: cannot be decoded ({error})") from error

    def _checked(self, level: Any) -> Any:
        page = level.keyframe
        colour = page.photometric in _COLOUR and page.samplesperpixel in (3, 4)
        if page.dtype != np.uint8 or not colour or set(level.axes) != {"Y", "X", "S"}:
            what = f"{level.axes} {level.dtype} with {page.samplesperpixel} samples a pixel"
            raise NotASlideError(self._name, f"holds {what}; only 8-bit RGB is a brightfield slide")
        width, height = _chunk_size(page)
        sides_right = 0 < page.imagewidth <= MAX_SIDE and 0 < page.imagelength <= MAX_SIDE
        if not sides_right or not 0 < width * height * page.samplesperpixel <= MAX_CHUNK_BYTES:
            raise DamagedSlideError(self._name, f"a level is {page.imagewidth} × {page.imagelength} pixels")
        chunks = -(-page.imagewidth // width) * -(-page.imagelength // height)
        chunks *= page.samplesperpixel if page.planarconfig == 2 else 1
        if min(len(page.dataoffsets), len(page.databytecounts)) < chunks:
            raise DamagedSlideError(self._name, f"a level lists fewer chunks than the {chunks} that its size implies")
        ends = (offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False))
        if max(ends) > self._blob.size or max(page.databytecounts) > MAX_CHUNK_BYTES:
            raise DamagedSlideError(self._name, "it is truncated: chunks lie behind the end of the file")
        _ = page.decode  # made once, before threads share the page
        return page

    def _level(self, page: Any) -> Level:
        base, (chunk_width, chunk_height) = self._pages[0], _chunk_size(page)
        scale_x, scale_y = level_scale(base.imagewidth, base.imagelength, page.imagewidth, page.imagelength)
        name = getattr(page.compression, "name", str(page.compression)).lower()
        return Level(page.imagewidth, page.imagelength, scale_x, scale_y, chunk_width, chunk_height, name)

    def _mpp(self, series: int) -> tuple[float, float] | None:
        if self._file.is_ome:
            return ome_mpp(self._file.ome_metadata or "", series)
        page = self._pages[0]
        return tag_mpp(page.resolution, int(page.resolutionunit))


_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_UM_OF_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


def ome_mpp(xml: str, image: int) -> tuple[float, float] | None:
    """µm per pixel of one image of an OME-XML; None unless both sides are stated in a unit of length."""
    elements = _PIXELS.findall(xml)
    if image >= len(elements):
        return None
    attributes = dict(re.findall(r'([\w:]+)\s*=\s*"([^"]*)"', elements[image]))
    mpp = []
    for axis in "XY":
        unit = attributes.get(f"PhysicalSize{axis}Unit", "µm").replace("&#181;", "µ").replace("&#xB5;", "µ")
        try:
            mpp.append(float(attributes[f"PhysicalSize{axis}"]) * _UM_OF_UNIT[unit])
        except (KeyError, ValueError):
            return None
    return (mpp[0], mpp[1]) if all(0 < value < float("inf") for value in mpp) else None


def _chunk_size(page: Any) -> tuple[int, int]:
    """Width and height of the chunks of a page; a strip is a chunk as wide as the page."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


@final
class _File:
    """A blob as the file object that tifffile reads its headers from; reads ahead, as each read may be a request."""

    def __init__(self, blob: Blob):
        self._blob, self._position = blob, 0
        self._ahead, self._start = b"", 0
        self.name, self.mode = "", "rb"

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._blob.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._blob.size - self._position)
        size = left if size < 0 else min(size, left)
        if not size:
            return b""
        first = self._position - self._start
        if not 0 <= first <= len(self._ahead) - size:
            self._ahead, self._start, first = (
                self._blob.read(self._position, max(size, min(left, _AHEAD))),
                self._position,
                0,
            )
        self._position += size
        return self._ahead[first : first + size]

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """The blob belongs to the reader."""

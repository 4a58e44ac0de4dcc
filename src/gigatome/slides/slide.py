"""Whole-slide images: opening one, and reading it at any physical resolution.

slide = open_slide("s3://bucket/case.svs")
rgb = slide.read(Box(x=40_000, y=32_000, width=8192, height=8192), mpp=0.5)   # [H, W, 3] uint8
"""

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import final

import numpy as np

from gigatome.blob.store import Blob, is_remote, local_path, open_blob, redact
from gigatome.core.errors import (
    DamagedSlideError,
    MissingExtraError,
    MissingMppError,
    NotASlideError,
    SlideError,
)
from gigatome.core.geometry import Box, level0_length
from gigatome.core.job import slide_id
from gigatome.core.logs import log
from gigatome.slides.fallback import OpenSlideReader, TifffileReader
from gigatome.slides.index import SlideIndex
from gigatome.slides.index_cache import IndexCache, user_cache
from gigatome.slides.pieces import read_pieces
from gigatome.slides.reader import Level, LevelReader, TiffReader
from gigatome.slides.resample import Axis, resample
from gigatome.slides.tiff import TiffFile
from gigatome.slides.tile_plan import Source, TilePlan, View, read_view
from gigatome.slides.vendors import is_foreign, recognise

__all__ = ["SLIDE_SUFFIXES", "Level", "Slide", "open_slide"]

SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".mrxs", ".svslide", ".vms", ".vmu", ".czi", ".dcm",
)  # fmt: skip
"""Endings by which a folder is searched for slides; lower case."""

_READERS = ("auto", "tiff", "openslide", "tifffile")
_OPENSLIDE_SUFFIXES = SLIDE_SUFFIXES[3:]
# A level, or one shrunk, is fine enough if it is coarser than wanted by no more than this: 40x is 0.246 to 0.253 mpp.
_LEVEL_TOLERANCE = 1.02
OVERSAMPLE = 5
"""An exact read takes a stored level only if this many of its pixels, along each axis, make one output pixel.

Stored levels are compressed anew: on 20 real slides they differ from the mean of level 0 by 4 to 7 grey levels in
tissue. Averaged 5 × 5 that falls below 2.
"""


@final
class Slide:
    """One open slide; made by :func:`open_slide`. Many threads may read it at once.

    Attributes:
        uri: where it was opened.
        name: its name without folder and extension.
        vendor: "aperio", "generic-tiff", "ome-tiff" or OpenSlide's name of the format.
        reader: "tiff" (direct), "openslide" or "tifffile".
        width, height: of level 0, in pixels.
        levels: the pyramid, largest first.
        properties: what the file says of itself; with "mpp-x" and "mpp-y" where it states them.
        bounds: the scanned part of level 0; the whole of it for most formats.
        has_mpp: whether :attr:`mpp` is known.
    """

    def __init__(self, uri: str, reader: LevelReader, mpp: float | None):
        self.uri, self.name = uri, slide_id(uri)
        self._reader, self._label = reader, redact(uri)
        self.vendor, self.reader, self.levels, self.bounds = reader.vendor, reader.reader, reader.levels, reader.bounds
        self.width, self.height = self.levels[0].width, self.levels[0].height
        properties = dict(reader.properties)
        if reader.mpp is not None:
            properties |= {"mpp-x": repr(reader.mpp[0]), "mpp-y": repr(reader.mpp[1])}
            if mpp is None:
                mpp = self._mean(*reader.mpp)
        self.properties: Mapping[str, str] = properties
        self._mpp = mpp
        self._sources: dict[tuple[float, bool, bool], Source] = {}

    @property
    def has_mpp(self) -> bool:
        """Whether the resolution is known, from the file or as given."""
        return self._mpp is not None

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel; the mean of x and y where they differ.

        Raises:
            MissingMppError: the file does not state it and none was given.
        """
        if self._mpp is None:
            raise MissingMppError(
                self._label,
                "states no resolution; give its µm per level-0 pixel with --slide-mpp, in a column mpp of the cohort's "
                "table, or with open_slide(…, mpp=0.5)",
            )
        return self._mpp

    @property
    def source(self) -> tuple[Blob, SlideIndex] | None:
        """The file and where its chunks lie, if they are decoded here; None where another library reads the slide."""
        return (self._reader.blob, self._reader.index) if isinstance(self._reader, TiffReader) else None

    def read(self, box: Box, *, mpp: float | None = None, exact: bool = True, dct_scaling: bool = True) -> np.ndarray:
        """Pixels of a box at a resolution.

        Each pixel is the mean of the slide under it, bilinear where finer than level 0, and white outside the slide.

        Args:
            box: level-0 pixels; may reach outside the slide.
            mpp: µm per pixel wanted; None for level 0 as it is, for which the slide needs no mpp.
            exact: True for the mean of level 0, to about 2 grey levels; False to take the stored level nearest to
                ``mpp`` with the losses of its own compression (4 to 7 grey levels on real tissue), which is what
                OpenSlide gives, and decodes up to :data:`OVERSAMPLE` squared times fewer pixels. The corner then moves
                to the nearest whole pixel of that level where whole pixels make up the output, so that nothing is
                blurred.
            dct_scaling: with ``exact=False``, whether JPEG chunks of a level that is finer than wanted are shrunk by 2,
                4 or 8 while they are decoded, which is faster, rather than averaged after (about 43 dB apart).

        Returns:
            uint8 [H, W, 3] with H = round(box.height · slide.mpp / mpp), at least 1, and W likewise.

        Raises:
            MissingMppError: ``mpp`` is given and the slide's is not known.
            DamagedSlideError: a chunk is truncated or damaged.
            StoreError: the bytes cannot be had.
        """
        if mpp is None:
            return self._resample(Axis(box.x, 1.0, box.width), Axis(box.y, 1.0, box.height), exact, dct_scaling)
        step = level0_length(1, checked_mpp(self._label, mpp), self.mpp)
        return self._resample(_fitted(box.x, box.width, step), _fitted(box.y, box.height, step), exact, dct_scaling)

    def read_tile(
        self, x: int, y: int, tile_size: int, mpp: float, *, exact: bool = True, dct_scaling: bool = True
    ) -> np.ndarray:
        """A square tile of exactly ``tile_size`` pixels at exactly ``mpp``, its corner at level-0 (x, y).

        Its side is ``tile_size · mpp / slide.mpp`` level-0 pixels, not rounded. Resampled, and raises, as :meth:`read`.

        Returns:
            uint8 [tile_size, tile_size, 3].
        """
        return self.plan_tile(x, y, tile_size, mpp, exact=exact, dct_scaling=dct_scaling).read()

    def plan_tile(
        self, x: int, y: int, tile_size: int, mpp: float, *, exact: bool = True, dct_scaling: bool = True
    ) -> "TilePlan":
        """What reading a tile takes, so that its bytes can be fetched before they are decoded.

        Arguments and errors are those of :meth:`read_tile`; nothing is read yet.
        """
        step = level0_length(1, checked_mpp(self._label, mpp), self.mpp)
        axes = Axis(x, step, tile_size), Axis(y, step, tile_size)
        return TilePlan(self._reader, self._view(*axes, exact, dct_scaling))

    def read_axes(self, x: Axis, y: Axis, *, exact: bool = False) -> np.ndarray:
        """Pixels at places of one's own, whose steps may differ in x and y; white outside the slide.

        A part of an axis (:meth:`~gigatome.slides.resample.Axis.part`) gives exactly the pixels of the whole, so that
        an image can be read in pieces. Resampled as by :meth:`read`, but for the corner, which stays where it is.

        Args:
            x: the columns, in level-0 pixels.
            y: the rows, likewise.
            exact: as in :meth:`read`.

        Returns:
            uint8 [y.count, x.count, 3].

        Raises:
            DamagedSlideError: a chunk is truncated or damaged.
            StoreError: the bytes cannot be had.
        """
        view = self._view(x, y, exact, True)
        return read_pieces(partial(read_view, self._reader, view), view.source, x, y)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Stored pixels of one level: uint8 [height, width, 3]; ``x``, ``y`` in pixels of that level, white outside."""
        if not 0 <= level < len(self.levels):
            raise SlideError(self._label, f"has levels 0 to {len(self.levels) - 1}, not {level}")
        size = (self.levels[level].width, self.levels[level].height)
        read = partial(self._reader.read_level, level)
        return resample(read, size, size, Axis(x, 1.0, width), Axis(y, 1.0, height))

    def thumbnail(self, max_side: int = 1024) -> np.ndarray:
        """The whole slide, uint8 [H, W, 3], its longer side ``max_side`` pixels or the slide's own if that is less.

        Made from the nearest stored level, as ``read(…, exact=False)``; needs no mpp.
        """
        step = max(1.0, max(self.width, self.height) / max_side)
        return self._resample(_fitted(0, self.width, step), _fitted(0, self.height, step), False)

    def close(self) -> None:
        """Gives the file back; nothing can be read after."""
        self._reader.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mpp = f"{self._mpp:g} mpp" if self._mpp else "no mpp"
        return f"<Slide {self.name}: {self.width} × {self.height}, {mpp}, {self.vendor}>"

    def _resample(self, x: Axis, y: Axis, exact: bool, dct_scaling: bool = True) -> np.ndarray:
        """Output pixels on axes of level-0 pixels, from the level that suits them."""
        view = self._view(x, y, exact, dct_scaling)
        return resample(partial(read_view, self._reader, view), view.source.size, view.source.extent, view.x, view.y)

    def _view(self, x: Axis, y: Axis, exact: bool, dct_scaling: bool) -> View:
        """The level to take, how far its chunks are shrunk, and the axes on it."""
        step, scaled = min(x.step, y.step), dct_scaling and not exact
        source = self._sources.get((step, exact, scaled))
        if source is None:
            if len(self._sources) == _SOURCES:
                self._sources.clear()
            source = self._sources[step, exact, scaled] = self._source_for(step, exact, scaled)
        across = Axis(x.start / source.scale_x, x.step / source.scale_x, x.count)
        down = Axis(y.start / source.scale_y, y.step / source.scale_y, y.count)
        if not exact:
            across, down = across.snapped(source.extent[0]), down.snapped(source.extent[1])
        return View(source, across, down)

    def _source_for(self, step: float, exact: bool, scaled: bool) -> Source:
        """Where to read output pixels that are ``step`` level-0 pixels apart."""
        step *= _LEVEL_TOLERANCE
        limit = max(1.0, step / OVERSAMPLE) if exact else step
        index = max((k for k, item in enumerate(self.levels) if item.downsample <= limit), default=0)
        level = self.levels[index]
        shrink = max((k for k in level.shrinks if level.downsample * k <= step), default=1) if scaled else 1
        scale_x, scale_y = level.scale_x * shrink, level.scale_y * shrink
        size = -(-level.width // shrink), -(-level.height // shrink)
        return Source(index, shrink, size, (self.width / scale_x, self.height / scale_y), scale_x, scale_y)

    def _mean(self, x: float, y: float) -> float:
        if abs(x - y) > 0.01 * max(x, y):
            log.warning("%s: %g µm per pixel in x and %g in y; their mean is used", self._label, x, y)
        return x if x == y else (x + y) / 2


# Resolutions for which a slide remembers where to read.
_SOURCES = 64


def open_slide(
    uri: str | os.PathLike[str],
    *,
    mpp: float | None = None,
    reader: str = "auto",
    native: bool = True,
    keep_index: bool = True,
) -> Slide:
    """Opens a slide from a local path or ``s3://``, ``gs://``, ``az://``, ``http://``, ``https://``.

    Args:
        uri: where it is.
        mpp: µm per level-0 pixel; wins over what the file states.
        reader: "auto"; or "tiff" (Aperio and tiled TIFF, decoded directly), "openslide" or "tifffile" to force one.
        native: whether the C extension is used where it is there; without it the same pixels come more slowly.
        keep_index: whether the places of the chunks are taken from, and kept in, the user's cache folder
            (:func:`~gigatome.slides.index_cache.default_cache_folder`), so that the slide opens faster the next time.

    Raises:
        NotASlideError: no reader knows the file.
        DamagedSlideError: it is truncated or its contents contradict each other.
        StoreError: it does not exist or may not be read.
        MissingExtraError: its format needs OpenSlide, which is not installed.
        SlideError: ``mpp`` or ``reader`` is wrong, or the format needs a local file.
    """
    uri = os.fspath(uri)
    name = redact(uri)
    if reader not in _READERS:
        raise SlideError(name, f"there is no reader {reader!r}; take one of {', '.join(_READERS)}")
    if mpp is not None:
        checked_mpp(name, mpp)
    if not is_remote(uri) and local_path(uri).is_dir():
        raise NotASlideError(name, "is a folder; open the slides in it one by one, or give it as a cohort")
    blob = open_blob(uri)
    try:
        if blob.size == 0:
            raise NotASlideError(name, "is empty (0 bytes)")
        levels = _reader(blob, uri, name, reader, native, user_cache() if keep_index else None)
    except BaseException:
        blob.close()
        raise
    return Slide(uri, levels, mpp)


def _fitted(start: int, length: int, step: float) -> Axis:
    """Axis of the whole number of pixels of about ``step`` that fill ``length`` exactly."""
    count = max(1, round(length / step))
    return Axis(start, length / count, count)


def checked_mpp(name: str, mpp: float) -> float:
    """``mpp`` if it is a resolution; raises :class:`SlideError` if it is zero, negative or not finite."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise SlideError(name, f"mpp is µm per pixel and must be positive, not {mpp}")
    return mpp


def _reader(blob: Blob, uri: str, name: str, reader: str, native: bool, cache: IndexCache | None) -> LevelReader:
    if reader == "openslide":
        blob.close()
        return OpenSlideReader(uri, name)
    if reader == "tifffile":
        return TifffileReader(blob, name)
    known = cache.load(uri, blob.size, blob.stamp) if cache else None
    if known is not None:
        return TiffReader(blob, name, known, native=native)
    try:
        tiff = TiffFile(blob, name)
    except (NotASlideError, DamagedSlideError) as error:
        if reader == "tiff":
            raise
        return _other_vendor(blob, uri, name, error)
    index = recognise(tiff)
    if index is not None:
        opened = TiffReader(blob, name, index, native=native)
        if cache:
            cache.store(uri, blob.size, blob.stamp, index)
        return opened
    if reader == "tiff":
        raise NotASlideError(name, "is not an Aperio or tiled TIFF that reader='tiff' decodes; use reader='auto'")
    return _other_vendor(blob, uri, name, None) if is_foreign(tiff) else TifffileReader(blob, name)


def _other_vendor(blob: Blob, uri: str, name: str, error: SlideError | None) -> LevelReader:
    """OpenSlide's reader; ``error`` says what is wrong with the file as a TIFF, None for a vendor's own dialect."""
    try:
        opened = OpenSlideReader(uri, name)
    except NotASlideError:
        if isinstance(error, DamagedSlideError):
            raise error from None
        raise NotASlideError(name, "is not a slide: neither a TIFF nor a format that OpenSlide knows") from None
    except DamagedSlideError as other:
        raise (error if isinstance(error, DamagedSlideError) else other) from None
    except (MissingExtraError, SlideError) as other:
        # Neither OpenSlide nor a local file: say so only if that would help.
        helps = PurePosixPath(name).suffix.lower() in _OPENSLIDE_SUFFIXES
        raise (error if error is not None and not helps else other) from None
    # OpenSlide is laxer with truncated files of the dialects that are read here; the checks are not to be got around.
    if isinstance(error, DamagedSlideError) and opened.vendor in ("aperio", "generic-tiff"):
        opened.close()
        raise error
    blob.close()
    return opened

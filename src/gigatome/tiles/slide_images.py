"""Whole slides as square images, read in pieces: for networks that take a slide's pixels.

The slide is read once, at the size that is wanted: a crop is cut before it is read, and no picture is resized.

Source: arXiv:2312.03558; differs: LongViT's code reads a whole level, squeezes it to a square by PIL's bicubic filter,
keeps that as JPEG and crops it then.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import DamagedSlideError
from gigatome.slides.resample import WHITE, Axis
from gigatome.slides.slide import Slide

_PIECE = 1024  # side of what is read at a time, in pixels of the image
_DAMAGE = 64  # a piece that cannot be read is halved down to this side; what still cannot be read is white
_FINE = 1 << 16  # edges are whole multiples of this part of a level-0 pixel, so that sums of them are exact
_RATIO = (3 / 4, 4 / 3)  # of the width of a crop to its height
_ATTEMPTS = 10  # crops drawn before all is shown


@final
@dataclass(frozen=True)
class SlideImageOptions:
    """How a slide becomes a square image.

    Attributes:
        image_size: side of the image in pixels.
        aspect: ``"keep"``, the scanned part is centred in a square and padded with white; or ``"stretch"``, it is
            squeezed to a square, as LongViT's authors do.
        crop: least and greatest share of the square's area that a training image shows, drawn anew each time; LongViT's
            authors take (0.5, 1). A crop's width is 3/4 to 4/3 of its height with ``"stretch"``, and equal to it with
            ``"keep"``. None for all of it.
        flip: whether every second training image, at random, is mirrored.
    """

    image_size: int = 1024
    aspect: Literal["keep", "stretch"] = "keep"
    crop: tuple[float, float] | None = None
    flip: bool = False

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, not {self.image_size}")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop must be two shares of the area, 0 < least ≤ greatest ≤ 1, not {self.crop}")


@final
@dataclass(frozen=True)
class Frame:
    """What an image shows: its columns and rows in level-0 pixels, and whether it is mirrored left to right."""

    x: Axis
    y: Axis
    mirrored: bool = False


@final
@dataclass(frozen=True, eq=False)
class SlideImage:
    """An image of a slide, or some rows of it.

    Attributes:
        pixels: uint8 [rows, image_size, 3].
        damaged: why parts of it, which are white, could not be read; "" if all could.
    """

    pixels: NDArray[np.uint8]
    damaged: str = ""


def slide_frame(slide: Slide, options: SlideImageOptions, rng: np.random.Generator | None = None) -> Frame:
    """What an image of a slide shows.

    Args:
        slide: an open slide; it need not state its resolution.
        options: how it becomes a square.
        rng: draws crop and flip; None for the whole slide as it is.
    """
    size, part = options.image_size, slide.bounds
    keep = options.aspect == "keep"
    longer = max(part.width, part.height)
    x = _axis(part.x, part.width, longer if keep else part.width, size)
    y = _axis(part.y, part.height, longer if keep else part.height, size)
    if rng is None:
        return Frame(x, y)
    if options.crop is not None:
        left, top, width, height = _crop(rng, size, options.crop, (1.0, 1.0) if keep else _RATIO)
        x, y = _zoomed(x, left, width), _zoomed(y, top, height)
    return Frame(x, y, options.flip and bool(rng.random() < 0.5))


def read_slide_image(
    slide: Slide, frame: Frame, *, rows: range | None = None, pool: Executor | None = None
) -> SlideImage:
    """Reads an image, or some rows of it, which are exactly those of the whole.

    Beside the image itself, each thread holds a piece of 1024² pixels of it and what that is made of.

    Args:
        slide: an open slide.
        frame: what the image shows.
        rows: which rows, consecutive; None for all.
        pool: threads that read; none of them may wait for this call. None to read in the caller's.

    Returns:
        The image; parts that are damaged are white.

    Raises:
        StoreError: the bytes cannot be had.
    """
    rows = range(frame.y.count) if rows is None else rows
    pixels = np.empty((len(rows), frame.x.count, 3), np.uint8)
    return SlideImage(pixels, fill_slide_image(slide, frame, pixels, rows, pool))


def fill_slide_image(
    slide: Slide, frame: Frame, pixels: NDArray[np.uint8], rows: range, pool: Executor | None = None
) -> str:
    """As :func:`read_slide_image`, into uint8 [rows, image_size, 3]; returns what :attr:`SlideImage.damaged` says."""
    if rows and not (rows.step == 1 and rows.start >= 0 and rows.stop <= frame.y.count):
        raise ValueError(f"rows must be consecutive and lie in the image's {frame.y.count} rows, not {rows}")
    frame = Frame(frame.x, frame.y.part(rows.start, len(rows)), frame.mirrored)
    places = [(top, left) for top in range(0, len(rows), _PIECE) for left in range(0, frame.x.count, _PIECE)]
    if pool is None:
        damages = [_fill(slide, frame, pixels, top, left, _PIECE) for top, left in places]
    else:
        tasks = [pool.submit(_fill, slide, frame, pixels, top, left, _PIECE) for top, left in places]
        try:
            damages = [task.result() for task in tasks]
        finally:  # nobody may read the slide any more when it is given back
            for task in tasks:
                if not task.cancel():
                    task.exception()
    return next(filter(None, damages), "")


def _fill(slide: Slide, frame: Frame, pixels: NDArray[np.uint8], top: int, left: int, side: int) -> str:
    """Reads a piece to its place; smaller ones where it is damaged. Returns what is wrong with it."""
    height, width = min(side, frame.y.count - top), min(side, frame.x.count - left)
    first = frame.x.count - left - width if frame.mirrored else left
    target = pixels[top : top + height, first : first + width]
    try:
        piece = slide.read_axes(frame.x.part(left, width), frame.y.part(top, height))
    except DamagedSlideError as error:
        if side <= _DAMAGE:
            target[:] = WHITE
        else:
            for row, column in _quarters(top, left, height, width, side // 2):
                _fill(slide, frame, pixels, row, column, side // 2)
        return error.message
    target[:] = piece[:, ::-1] if frame.mirrored else piece
    return ""


def _quarters(top: int, left: int, height: int, width: int, side: int) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(top, top + height, side) for column in range(left, left + width, side))


def _axis(start: int, length: int, side: int, count: int) -> Axis:
    """Axis of ``count`` pixels over ``side`` level-0 pixels with a length in the middle, whole pixels to its left."""
    step = math.ceil(side / count * _FINE) / _FINE
    before = (count - math.ceil(length / step)) // 2
    return Axis(start - before * step, step, count)


def _crop(
    rng: np.random.Generator, size: int, share: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop of a square, whole pixels of it; drawn as torchvision does."""
    for _ in range(_ATTEMPTS):
        area = size * size * rng.uniform(*share)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= size and 0 < height <= size:
            return int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1)), width, height
    return 0, 0, size, size


def _zoomed(axis: Axis, first: int, count: int) -> Axis:
    """As many pixels as ``axis`` has, over ``count`` of them from ``first`` on."""
    step = math.ceil(axis.step * count / axis.count * _FINE) / _FINE
    return Axis(axis.start + first * axis.step, step, axis.count)

"""OME-TIFF: the largest picture that its XML describes, if it is one plane of 8-bit RGB.

Its smaller copies hang on its page (OME-TIFF 6.0) or, in files without those, stand in the chain of pages, marked as
smaller copies and not claimed by the XML. Anything else is left to tifffile. Source: OME-TIFF specification.
"""

from dataclasses import replace
from itertools import pairwise
from xml.etree.ElementTree import Element

from gigatome.core.geometry import Box
from gigatome.slides.decode import JPEG, RGB, can_decode
from gigatome.slides.index import LevelIndex, SlideIndex
from gigatome.slides.pyramid import (
    REDUCED,
    local_name,
    page_levels,
    parse_xml,
    positive,
    same_aspect,
    tiff_properties,
    whole,
)
from gigatome.slides.tiff import TiffFile, TiffPage

_UM_OF_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_YCBCR = 6
# A JPEG states within so many bytes whether it is a JFIF file.
_JFIF_BYTES = 12


def is_ome(tiff: TiffFile) -> bool:
    """Whether the file is an OME-TIFF."""
    head = tiff.pages[0].description.lstrip()
    return head.startswith("<") and "<OME" in head[:4096]


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in an OME-TIFF; None if it is not of the kind read here."""
    root = parse_xml(tiff.pages[0].description)
    images = [] if root is None else [pixels for image in _named(root, "Image") for pixels in _named(image, "Pixels")]
    if root is None or not images:
        return None
    pixels = max(images, key=_values)
    claimed = [_claimed(item, root.get("UUID")) for item in images]
    own = claimed[images.index(pixels)]
    if not _is_rgb(pixels) or own is None or len(own) != 1 or own[0] >= len(tiff.pages):
        return None
    base = tiff.pages[own[0]]
    if (base.width, base.height) != (whole(pixels.get("SizeX")), whole(pixels.get("SizeY"))):
        return None
    pages = [base, *tiff.sub_pages(base)]
    if len(pages) == 1 and None not in claimed:
        taken = {page for item in claimed for page in item or ()}
        pages += _smaller_copies(tiff, base, taken)
    shrinking = all(page.width < before.width for before, page in pairwise(pages))
    if not shrinking or not all(can_decode(page) and page.samples == 3 and same_aspect(base, page) for page in pages):
        return None
    levels = _as_jfif(tiff, page_levels(tiff, pages))
    bounds = Box(0, 0, base.width, base.height)
    return SlideIndex("ome-tiff", levels, _mpp(pixels), tiff_properties(base), bounds, "white")


def _named(parent: Element, name: str) -> list[Element]:
    return [child for child in parent if local_name(child) == name]


def _values(pixels: Element) -> int:
    """Values in a picture, over all its planes."""
    product = 1
    for axis in "XYZCT":
        product *= whole(pixels.get(f"Size{axis}"), 0)
    return product


def _is_rgb(pixels: Element) -> bool:
    channels = _named(pixels, "Channel")
    return (
        pixels.get("Type") == "uint8"
        and [whole(pixels.get(f"Size{axis}")) for axis in "CZT"] == [3, 1, 1]
        and [channel.get("SamplesPerPixel") for channel in channels] == ["3"]
    )


def _claimed(pixels: Element, uuid: str | None) -> list[int] | None:
    """Pages that hold the planes of a picture; None if the XML does not say so plainly or they are in another file."""
    pages: list[int] = []
    for data in _named(pixels, "TiffData"):
        first, count = whole(data.get("IFD", "0")), whole(data.get("PlaneCount", data.get("NumPlanes", "1")))
        elsewhere = any(item.text != uuid for item in _named(data, "UUID"))
        if first < 0 or not 0 < count <= 1000 or elsewhere or len(pages) > 1000:
            return None
        pages += range(first, first + count)
    return pages or None


def _smaller_copies(tiff: TiffFile, base: TiffPage, taken: set[int]) -> list[TiffPage]:
    copies = [
        page
        for page in tiff.pages
        if page.index not in taken and page.subfile & REDUCED and page.tiled and same_aspect(base, page)
    ]
    return sorted(copies, key=lambda page: -page.width)


def _as_jfif(tiff: TiffFile, levels: tuple[LevelIndex, ...]) -> tuple[LevelIndex, ...]:
    """Levels whose chunks are JFIF files are YCbCr, although some writers mark their pages as RGB."""
    firsts = [int((level.counts > _JFIF_BYTES).argmax()) for level in levels]
    places = [(int(level.offsets.flat[first]), _JFIF_BYTES) for level, first in zip(levels, firsts, strict=True)]
    marked = [
        level.coding.compression == JPEG and level.coding.photometric == RGB and level.counts.flat[first] > _JFIF_BYTES
        for level, first in zip(levels, firsts, strict=True)
    ]
    heads = iter(tiff.source.read_all([place for place, wanted in zip(places, marked, strict=True) if wanted]))
    return tuple(
        replace(level, coding=replace(level.coding, photometric=_YCBCR))
        if wanted and next(heads)[6:10] == b"JFIF"
        else level
        for level, wanted in zip(levels, marked, strict=True)
    )


def _mpp(pixels: Element) -> tuple[float, float] | None:
    """µm per pixel; None unless both sides are stated in a unit of length."""
    sizes = [
        (positive(pixels.get(f"PhysicalSize{axis}")), _UM_OF_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
        for axis in "XY"
    ]
    x, y = (size * unit if size and unit else None for size, unit in sizes)
    return (x, y) if x and y else None

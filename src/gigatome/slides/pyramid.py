"""What the TIFF dialects share: levels made of pages, resolution tags, and XML that is not trusted."""

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from gigatome.slides.index import LevelIndex, level_scale
from gigatome.slides.tiff import TiffFile, TiffPage

# Resolution tags are often nonsense (72 dpi, 1 px per cm): outside this range of mpp they are not believed.
MIN_TAG_MPP, MAX_TAG_MPP = 0.05, 20.0
REDUCED, MASK = 1, 4
_INCH, _CENTIMETRE = 2, 3
_UNIT_UM = {_INCH: 25_400.0, _CENTIMETRE: 10_000.0}
# Elements cost a hundred times their text; a Ventana file has two for each chunk, of five attributes or more.
_MAX_ELEMENTS, _MAX_ATTRIBUTES = 100_000, 500_000


def page_levels(
    tiff: TiffFile,
    pages: Sequence[TiffPage],
    sizes: Sequence[tuple[int, int]] | None = None,
    scales: Sequence[float] | None = None,
) -> tuple[LevelIndex, ...]:
    """Levels made of tiled pages.

    Args:
        tiff: the file.
        pages: largest first.
        sizes: width and height of each level where the pages are padded; None for those of the pages.
        scales: level-0 pixels in a pixel of each level where the file states them; None to take it from the sizes.

    Raises:
        DamagedSlideError: the chunks lie outside the file, or are not as many as the size of the page implies.
    """
    sizes = sizes or [(page.width, page.height) for page in pages]
    levels = []
    for k, (page, (width, height), chunks) in enumerate(zip(pages, sizes, tiff.chunks(pages), strict=True)):
        scale = (scales[k], scales[k]) if scales else level_scale(*sizes[0], width, height)
        rows, columns = -(-height // page.chunk_height), -(-width // page.chunk_width)
        offsets, counts = (np.ascontiguousarray(array[:rows, :columns]) for array in (chunks.offsets, chunks.counts))
        size = (page.chunk_width, page.chunk_height)
        levels.append(LevelIndex(width, height, *scale, *size, page.coding, offsets, counts))
    return tuple(levels)


def same_aspect(base: TiffPage, page: TiffPage) -> bool:
    """Whether a page may be a smaller copy of ``base``: its sides are in the same ratio, to 1 % or two pixels."""
    expected = base.height * page.width / base.width
    return abs(page.height - expected) <= max(2.0, 0.01 * expected)


def tag_mpp(resolution: tuple[float, float] | None, unit: int) -> tuple[float, float] | None:
    """µm per pixel in x and y from the resolution tags; None if the unit is none or the value is implausible."""
    if resolution is None or unit not in _UNIT_UM or min(resolution) <= 0:
        return None
    mpp = (_UNIT_UM[unit] / resolution[0], _UNIT_UM[unit] / resolution[1])
    return mpp if all(MIN_TAG_MPP <= value <= MAX_TAG_MPP for value in mpp) else None


def tiff_properties(page: TiffPage) -> dict[str, str]:
    """Description, software and resolution of a page, under OpenSlide's names."""
    properties = {"tiff.ImageDescription": page.description, "tiff.Software": page.software}
    if page.resolution is not None:
        properties["tiff.XResolution"], properties["tiff.YResolution"] = (f"{value:.10g}" for value in page.resolution)
        units = {_INCH: "inch", _CENTIMETRE: "centimeter"}
        properties["tiff.ResolutionUnit"] = units.get(page.resolution_unit, "none")
    return {key: value for key, value in properties.items() if value}


def positive(text: str | None) -> float | None:
    """A finite number above zero, None if ``text`` is no such thing."""
    try:
        value = float((text or "").replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def whole(text: str | None, default: int = -1) -> int:
    """A whole number not below zero; ``default`` if ``text`` is no such thing."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) <= 12 else default


def parse_xml(text: str) -> ElementTree.Element | None:
    """The root of an XML text; None if it is not well formed, defines entities, or holds too much."""
    many = text.count("<") > 2 * _MAX_ELEMENTS or text.count("=") > _MAX_ATTRIBUTES
    if many or "<!DOCTYPE" in text or "<!ENTITY" in text:
        return None
    try:
        # Without a document type there are no entities to expand.
        return ElementTree.fromstring(text.lstrip("\ufeff \r\n\t"))  # noqa: S314
    except (ElementTree.ParseError, ValueError):
        return None


def local_name(element: ElementTree.Element) -> str:
    """Name of an element without its namespace."""
    return element.tag.rpartition("}")[2]

"""Philips TIFF: level sizes and scales from its XML, because its pages are padded to whole chunks.

Chunks without tissue are left out of the file and are white. Read as OpenSlide reads it; a file that OpenSlide would
refuse, or whose scales are not whole, is left to it.
"""

import math
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from gigatome.core.geometry import Box
from gigatome.slides.decode import can_decode
from gigatome.slides.index import SlideIndex
from gigatome.slides.pyramid import REDUCED, page_levels, parse_xml, positive
from gigatome.slides.tiff import TiffFile

_SPACING = "DICOM_PIXEL_SPACING"
# Embedded pictures of label and macro are properties too; they are not kept.
_MAX_PROPERTY = 1000


def is_philips(tiff: TiffFile) -> bool:
    """Whether a Philips scanner wrote the file."""
    return tiff.pages[0].software.startswith("Philips")


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in a Philips TIFF; None if it does not fit what is known of the format."""
    root = parse_xml(tiff.pages[0].description)
    if root is None or (root.tag, root.get("ObjectType")) != ("DataObject", "DPUfsImport"):
        return None
    slides = [item for item in _objects(root, "PIM_DP_SCANNED_IMAGES") if "WSI" in _texts(item, "PIM_DP_IMAGE_TYPE")]
    pages = [page for page in tiff.pages if page.tiled]
    if len(slides) != 1 or not pages or not all(can_decode(page) for page in pages):
        return None
    if any(not page.subfile & REDUCED for page in pages[1:]):
        return None
    scales = _scales(slides[0])
    if len(scales) != len(pages) or any(not scale for scale in scales):
        return None
    base = pages[0]
    sizes = [(base.width // scale, base.height // scale) for scale in scales]
    for (width, height), page in zip(sizes, pages, strict=True):
        if not (0 < width <= page.width and 0 < height <= page.height):
            return None
    levels = page_levels(tiff, pages, sizes, scales)
    properties = {f"philips.{key}": value for item in (root, slides[0]) for key, value in _properties(item)}
    mpp = _spacing(properties.get(f"philips.{_SPACING}", ""))
    return SlideIndex("philips", levels, mpp, properties, Box(0, 0, base.width, base.height), "white")


def _scales(slide: Element) -> list[int]:
    """Level-0 pixels in a pixel of each level; 0 where that is not a whole number above that of the level before."""
    spacings = [
        _spacing(text)
        for item in _objects(slide, "PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE")
        if item.get("ObjectType") == "PixelDataRepresentation"
        for text in _texts(item, _SPACING)
    ]
    scales: list[int] = []
    for spacing in spacings:
        if spacing is None or spacings[0] is None:
            return []
        ratio = (spacing[0] / spacings[0][0] + spacing[1] / spacings[0][1]) / 2
        scale = round(ratio) if math.isfinite(ratio) else 0
        fits = abs(ratio - scale) <= 0.01 * ratio and scale > (scales[-1] if scales else 0)
        scales.append(scale if fits else 0)
    return scales if scales[:1] == [1] else []


def _attributes(item: Element, name: str) -> Iterator[Element]:
    return (child for child in item if child.tag == "Attribute" and child.get("Name") == name)


def _objects(item: Element, name: str) -> list[Element]:
    """The objects in the array that is an attribute of ``item``."""
    return [
        entry
        for attribute in _attributes(item, name)
        for array in attribute.findall("Array")
        for entry in array.findall("DataObject")
    ]


def _texts(item: Element, name: str) -> list[str]:
    return [attribute.text or "" for attribute in _attributes(item, name)]


def _properties(item: Element) -> Iterator[tuple[str, str]]:
    for child in item:
        name, text = child.get("Name"), child.text or ""
        if child.tag == "Attribute" and name and not len(child) and 0 < len(text) <= _MAX_PROPERTY:
            yield name, text


def _spacing(text: str) -> tuple[float, float] | None:
    """µm per pixel in x and y from millimetres a row and a column, each in quotes."""
    parts = [positive(part.strip('" ')) for part in text.split(" ")]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    return 1e3 * parts[1], 1e3 * parts[0]

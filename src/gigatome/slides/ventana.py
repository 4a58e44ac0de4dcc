"""Ventana's TIFF and those of its BIF files that need no stitching.

A BIF file states how its chunks overlap. Where they do not, in one area that fills the page, its levels are plain
pyramids; all others are left to OpenSlide, whose reading of the format is followed here.
"""

import math
from itertools import pairwise
from xml.etree.ElementTree import Element

from gigatome.core.geometry import Box
from gigatome.slides.decode import can_decode
from gigatome.slides.index import SlideIndex
from gigatome.slides.pyramid import page_levels, parse_xml, positive, tiff_properties, whole
from gigatome.slides.tiff import XMP, TiffFile, TiffPage

_MAX_SCALE = 1024


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in a Ventana file; None if it must be stitched or does not fit what is known of the format."""
    root = parse_xml(tiff.pages[0].text(XMP))
    scan = root if root is None or root.tag == "iScan" else root.find("iScan")
    found = [(page, _level(page.description)) for page in tiff.pages if "level=" in page.description]
    pages = [page for page, _ in found]
    if scan is None or not pages or not all(can_decode(page) for page in pages):
        return None
    magnifications = [magnification for _, (_, magnification) in found]
    ordered = all(after < before for before, after in pairwise(magnifications))
    if [number for _, (number, _) in found] != list(range(len(pages))) or not ordered:
        return None
    base = pages[0]
    if not 0 < magnifications[0] <= _MAX_SCALE * magnifications[-1]:
        return None
    scales = [magnifications[0] / magnification for magnification in magnifications]
    sizes = [(page.width, page.height) for page in pages]
    if XMP in base.tags:
        if not _is_plain(base):
            return None
        sizes = [(math.ceil(base.width / scale), math.ceil(base.height / scale)) for scale in scales]
    if not all(_fits(base, page, size, scale) for page, size, scale in zip(pages, sizes, scales, strict=True)):
        return None
    levels = page_levels(tiff, pages, sizes, scales)
    if any(not level.counts.all() for level in levels):
        return None
    properties = tiff_properties(base) | {f"ventana.{key}": value for key, value in scan.attrib.items() if value}
    mpp = positive(scan.get("ScanRes"))
    return SlideIndex("ventana", levels, (mpp, mpp) if mpp else None, properties, Box(0, 0, *sizes[0]))


def _level(description: str) -> tuple[int, float]:
    """Number and magnification of a level; -1 and 0 where they are not stated."""
    fields = dict(item.split("=", 1) for item in description.split(" ") if "=" in item)
    return whole(fields.get("level")), positive(fields.get("mag")) or 0.0


def _fits(base: TiffPage, page: TiffPage, size: tuple[int, int], scale: float) -> bool:
    """Whether a page has the chunks of level 0, holds its level, and is as large as its scale lets expect."""
    chunk = (base.chunk_width, base.chunk_height)
    return (
        (page.chunk_width, page.chunk_height) == chunk
        and all(0 < side <= held for side, held in zip(size, (page.width, page.height), strict=True))
        and all(
            abs(held * scale - side) <= step * scale
            for held, side, step in zip((page.width, page.height), (base.width, base.height), chunk, strict=True)
        )
    )


def _is_plain(base: TiffPage) -> bool:
    """Whether one area fills the page from its corner and none of its chunks overlap."""
    root = parse_xml(base.text(XMP))
    if root is None or root.tag != "EncodeInfo":
        return False
    areas = [area for info in root.findall("SlideStitchInfo") for area in info.findall("ImageInfo")]
    origins = [origin for group in root.findall("AoiOrigin") for origin in group]
    if len(areas) != 1 or len(origins) != 1:
        return False
    area, origin = areas[0], origins[0]
    stated = {key: whole(area.get(key)) for key in ("Width", "Height", "NumCols", "NumRows")}
    size = (stated["Width"], stated["Height"])
    joints = area.findall("TileJointInfo")
    return (
        size == (base.chunk_width, base.chunk_height)
        and (stated["NumCols"] * size[0], stated["NumRows"] * size[1]) == (base.width, base.height)
        and whole(area.get("AOIScanned")) == 1
        and _number(area, "Pos-X") == 0
        and (whole(origin.get("OriginX")), whole(origin.get("OriginY"))) == (0, 0)
        and {joint.get("Direction") for joint in joints} == {"RIGHT", "UP"}
        and all(_number(joint, key) == 0 for joint in joints for key in ("OverlapX", "OverlapY"))
        and all(whole(joint.get("Confidence")) > 0 for joint in joints)
    )


def _number(element: Element, key: str) -> float:
    try:
        return float(element.get(key, "nan"))
    except ValueError:
        return math.nan

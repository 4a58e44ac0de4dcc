"""Which pages of a TIFF are the levels of a slide, and what the scanner wrote about it.

Aperio SVS and generic tiled pyramids are recognised here; other vendors' TIFF dialects and OME-TIFF are left to the
fallback readers. A resolution is taken only where the file states it; magnification is never turned into one.
"""

import math

from gigatome.core.geometry import Box
from gigatome.slides.decode import can_decode
from gigatome.slides.index import LevelIndex, SlideIndex, level_scale
from gigatome.slides.tiff import ARGOS_METADATA, MAKE, NDPI_FORMAT, XMP, TiffFile, TiffPage

# Resolution tags are often nonsense (72 dpi, 1 px per cm): outside this range of mpp they are not believed.
MIN_TAG_MPP, MAX_TAG_MPP = 0.05, 20.0
_INCH, _CENTIMETRE = 2, 3
_UNIT_UM = {_INCH: 25_400.0, _CENTIMETRE: 10_000.0}
_MASK = 4


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in a TIFF file; None if its dialect or its compression is one for the fallback readers.

    Raises:
        DamagedSlideError: its chunks lie outside the file, or are not as many as its size implies.
    """
    if is_foreign(tiff) or is_ome(tiff):
        return None
    pages = _levels(tiff.pages)
    if not pages or not all(can_decode(page) for page in pages):
        return None
    levels = tuple(_level(tiff, page, pages[0]) for page in pages)
    bounds = Box(0, 0, pages[0].width, pages[0].height)
    first = tiff.pages[0]
    properties = _tiff_properties(pages[0])
    if first.description.startswith("Aperio"):
        aperio = aperio_properties(first.description)
        properties |= {f"aperio.{key}": value for key, value in aperio.items()}
        mpp = _positive(aperio.get("MPP", ""))
        return SlideIndex("aperio", levels, (mpp, mpp) if mpp else None, properties, bounds)
    mpp = tag_mpp(pages[0].resolution, pages[0].resolution_unit)
    return SlideIndex("generic-tiff", levels, mpp, properties, bounds)


def _level(tiff: TiffFile, page: TiffPage, base: TiffPage) -> LevelIndex:
    chunks = tiff.chunks(page)
    return LevelIndex(
        page.width,
        page.height,
        *level_scale(base.width, base.height, page.width, page.height),
        page.chunk_width,
        page.chunk_height,
        page.coding,
        chunks.offsets,
        chunks.counts,
    )


def is_ome(tiff: TiffFile) -> bool:
    """Whether the file is an OME-TIFF."""
    head = tiff.pages[0].description.lstrip()
    return head.startswith("<") and "<OME" in head[:4096]


def aperio_properties(description: str) -> dict[str, str]:
    """The ``|key = value`` pairs of an Aperio description; of a repeated key the last counts, as in OpenSlide."""
    pairs = (item.partition("=") for item in description.split("|")[1:])
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def tag_mpp(resolution: tuple[float, float] | None, unit: int) -> tuple[float, float] | None:
    """µm per pixel in x and y from the resolution tags; None if the unit is none or the value is implausible."""
    if resolution is None or unit not in _UNIT_UM or min(resolution) <= 0:
        return None
    mpp = (_UNIT_UM[unit] / resolution[0], _UNIT_UM[unit] / resolution[1])
    return mpp if all(MIN_TAG_MPP <= value <= MAX_TAG_MPP for value in mpp) else None


def _levels(pages: tuple[TiffPage, ...]) -> tuple[TiffPage, ...]:
    """Tiled pages of the largest one's aspect, each smaller than the one before.

    Thumbnail, label and macro are stripped in Aperio files, and elsewhere differ in aspect.
    """
    tiled = sorted((page for page in pages if page.tiled and not page.subfile & _MASK), key=lambda page: -page.width)
    levels: list[TiffPage] = []
    for page in tiled:
        if not levels:
            levels.append(page)
            continue
        expected = tiled[0].height * page.width / tiled[0].width
        if page.width < levels[-1].width and abs(page.height - expected) <= max(2.0, 0.01 * expected):
            levels.append(page)
    return tuple(levels)


def is_foreign(tiff: TiffFile) -> bool:
    """Whether a vendor's dialect needs more than the pages: stitching, offsets between levels, empty borders."""
    first = tiff.pages[0]
    return (
        NDPI_FORMAT in first.tags
        or first.software.startswith(("Philips", "MedScan"))
        or tiff.text(first.tags, MAKE).startswith("Huron")
        or "www.leica-microsystems.com/scn" in first.description
        or "Argos.Scan.Metadata" in tiff.text(first.tags, ARGOS_METADATA)
        or any("iScan" in tiff.text(page.tags, XMP) for page in tiff.pages)
    )


def _tiff_properties(page: TiffPage) -> dict[str, str]:
    properties = {"tiff.ImageDescription": page.description, "tiff.Software": page.software}
    if page.resolution is not None:
        properties["tiff.XResolution"], properties["tiff.YResolution"] = (f"{value:.10g}" for value in page.resolution)
        units = {_INCH: "inch", _CENTIMETRE: "centimeter"}
        properties["tiff.ResolutionUnit"] = units.get(page.resolution_unit, "none")
    return {key: value for key, value in properties.items() if value}


def _positive(text: str) -> float | None:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None

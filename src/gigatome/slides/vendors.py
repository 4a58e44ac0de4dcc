"""Which pages of a TIFF are the levels of a slide, and what the scanner wrote about it.

Each dialect that is read directly has its function here or in a module of its own; what does not fit one exactly is
left to the fallback readers. A resolution is taken only where the file states it; magnification is never turned into
one.
"""

from gigatome.core.geometry import Box
from gigatome.slides import hamamatsu, ome, philips, ventana
from gigatome.slides.decode import can_decode
from gigatome.slides.directories import NDPI_FORMAT
from gigatome.slides.index import SlideIndex
from gigatome.slides.pyramid import MASK, page_levels, positive, same_aspect, tag_mpp, tiff_properties
from gigatome.slides.tiff import ARGOS_METADATA, MAKE, XMP, TiffFile, TiffPage


def recognise(tiff: TiffFile) -> SlideIndex | None:
    """The slide in a TIFF file; None if its dialect or its compression is one for the fallback readers.

    Raises:
        DamagedSlideError: its chunks lie outside the file, or are not as many as its size implies.
    """
    if NDPI_FORMAT in tiff.pages[0].tags:
        return hamamatsu.recognise(tiff)
    if philips.is_philips(tiff):
        return philips.recognise(tiff)
    if _is_ventana(tiff):
        return ventana.recognise(tiff)
    if is_foreign(tiff):
        return None
    if ome.is_ome(tiff):
        return ome.recognise(tiff)
    pages = _levels(tiff.pages)
    if not pages or not all(can_decode(page) for page in pages):
        return None
    return _generic(tiff, pages)


def is_foreign(tiff: TiffFile) -> bool:
    """Whether a vendor's dialect needs more than the pages: stitching, offsets between levels, empty borders."""
    first = tiff.pages[0]
    return (
        NDPI_FORMAT in first.tags
        or first.software.startswith(("Philips", "MedScan"))
        or first.text(MAKE).startswith("Huron")
        or "www.leica-microsystems.com/scn" in first.description
        or "Argos.Scan.Metadata" in first.text(ARGOS_METADATA)
        or _is_ventana(tiff)
    )


def _is_ventana(tiff: TiffFile) -> bool:
    return b"iScan" in tiff.pages[0].bytes(XMP)


def _generic(tiff: TiffFile, pages: tuple[TiffPage, ...]) -> SlideIndex:
    """Aperio's slides, and pyramids of nobody's dialect."""
    levels = page_levels(tiff, pages)
    bounds = Box(0, 0, pages[0].width, pages[0].height)
    properties = tiff_properties(pages[0])
    description = tiff.pages[0].description
    if description.startswith("Aperio"):
        aperio = aperio_properties(description)
        properties |= {f"aperio.{key}": value for key, value in aperio.items()}
        mpp = positive(aperio.get("MPP"))
        return SlideIndex("aperio", levels, (mpp, mpp) if mpp else None, properties, bounds)
    mpp = tag_mpp(pages[0].resolution, pages[0].resolution_unit)
    return SlideIndex("generic-tiff", levels, mpp, properties, bounds)


def aperio_properties(description: str) -> dict[str, str]:
    """The ``|key = value`` pairs of an Aperio description; of a repeated key the last counts, as in OpenSlide."""
    pairs = (item.partition("=") for item in description.split("|")[1:])
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def _levels(pages: tuple[TiffPage, ...]) -> tuple[TiffPage, ...]:
    """Tiled pages of the largest one's aspect, each smaller than the one before.

    Thumbnail, label and macro are stripped in Aperio files, and elsewhere differ in aspect.
    """
    tiled = sorted((page for page in pages if page.tiled and not page.subfile & MASK), key=lambda page: -page.width)
    levels = tiled[:1]
    for page in tiled[1:]:
        if page.width < levels[-1].width and same_aspect(tiled[0], page):
            levels.append(page)
    return tuple(levels)

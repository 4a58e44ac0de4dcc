"""Reports: one HTML page that holds everything it shows.

A report is a title, a strip of key numbers and sections of pictures, charts, tables and text. The page asks the network
for nothing, opens from a disk, prints, follows the reader's light or dark scheme and can be used by keyboard. Names of
slides come from outside: everything is escaped, and a content security policy lets only the page's own script run.
"""

import base64
import hashlib
import importlib.resources
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, assert_never

import numpy as np
from PIL import Image

from gigatome.blob.store import atomic_path, redact
from gigatome.core.errors import StoreError
from gigatome.core.extras import require
from gigatome.evaluation.canvas import safe_svg
from gigatome.slides.check import SlideReport

Cell: TypeAlias = str | int | float | None
"""What stands in a table: text, a number, or None or NaN for "not known"."""

_JPEG_QUALITY = 75  # eight maps of 1200 px full of tissue: 4.2 MB in the page; at 85 it would be 5.6
_THUMBNAIL_SIDE = 480  # twice the width at which a page shows one, for dense screens


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a :class:`Gallery`.

    Attributes:
        image: uint8 [H, W, 3] or [H, W], or a JPEG or PNG file, or its bytes. Metadata are not carried over.
        caption: what it is, in a few words.
        alt: what it shows, for those who cannot see it; the caption if empty.
        detail: a second, quieter line.
        warning: what is wrong with what it shows; marked.
    """

    image: np.ndarray | Path | bytes
    caption: str
    alt: str = ""
    detail: str = ""
    warning: str = ""

    def __post_init__(self):
        if isinstance(self.image, np.ndarray):
            grey_or_rgb = self.image.ndim == 2 or self.image.shape[2:] == (3,)
            if self.image.dtype != np.uint8 or not grey_or_rgb or not self.image.size:
                raise ValueError(f"a picture is uint8 [H, W, 3] or [H, W], not {self.image.dtype} {self.image.shape}")


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, each to be enlarged by a click or the enter key.

    Attributes:
        pictures: in reading order; enlarged, one steps through them in place, so put what is to be compared together.
        columns: at most so many side by side; fewer on a narrow screen.
        max_side: larger pictures are scaled down to this many pixels.
    """

    pictures: tuple[Picture, ...]
    columns: int = 4
    max_side: int = 1200

    def __post_init__(self):
        if self.columns < 1 or self.max_side < 1:
            raise ValueError(f"columns and max_side must be positive, not {self.columns}, {self.max_side}")


@dataclass(frozen=True)
class Chart:
    """A chart from :mod:`gigatome.evaluation.charts`.

    Attributes:
        svg: one SVG element that only draws: a script, a link or anything fetched from elsewhere is refused.
        caption: how to read it.
        alt: what it shows, for those who cannot see it.
    """

    svg: str
    caption: str
    alt: str

    def __post_init__(self):
        safe_svg(self.svg)


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. Columns that hold only numbers are aligned by their decimals.

    Attributes:
        columns: headings.
        rows: one cell for each column.
        caption: what it lists.
        highlight: indices of the rows that matter most.
        problems: indices of the rows to mark as wrong.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    highlight: tuple[int, ...] = ()
    problems: tuple[int, ...] = ()

    def __post_init__(self):
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {index} has {len(row)} cells, the table {len(self.columns)} columns")
        for index in (*self.highlight, *self.problems):
            if not 0 <= index < len(self.rows):
                raise ValueError(f"there is no row {index} to mark in a table of {len(self.rows)} rows")


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text."""

    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text whose lines and spaces matter: a command, a recipe."""

    text: str


Block: TypeAlias = Text | Code | Gallery | Chart | Table


@dataclass(frozen=True)
class Section:
    """A titled part of a report; ``intro`` is its first, quieter paragraph."""

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""


@dataclass(frozen=True)
class KeyNumber:
    """A number of the strip below the title; ``note`` says what qualifies it, such as its interval."""

    label: str
    value: Cell
    note: str = ""


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    key_numbers: Sequence[KeyNumber] = (),
    sections: Sequence[Section] = (),
    footer: str = "",
) -> Path:
    """Writes a report as one HTML file.

    Args:
        path: the file; appears whole or not at all.
        title: what the report is about.
        subtitle: one line below it.
        key_numbers: the few numbers that matter.
        sections: the report, in reading order.
        footer: last line, such as version, command and seed.

    Returns:
        The path.

    Raises:
        StoreError: the file cannot be written, or a picture cannot be read.
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "learn", "write reports")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    template = environment.from_string(
        importlib.resources.files("gigatome.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        subtitle=subtitle,
        numbers=[{"label": n.label, "value": _cell(n.value), "note": n.note} for n in key_numbers],
        sections=[
            {"title": section.title, "intro": section.intro, "blocks": [_block(block) for block in section.blocks]}
            for section in sections
        ],
        footer=footer,
    )
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file name need not be valid UTF-8
    return path


def cohort_page(
    path: str | Path,
    cohort_name: str,
    reports: Sequence[SlideReport],
    pictures: Mapping[str, np.ndarray | Path | bytes] | None = None,
    *,
    footer: str = "",
) -> Path:
    """Writes the page of ``gigatome check``: problems first, then the slides as pictures and as a table.

    Args:
        path: the HTML file.
        cohort_name: title of the page.
        reports: one for each slide, from :func:`gigatome.slides.check.check_cohort`.
        pictures: thumbnail of each slide that has one, by slide name.
        footer: last line of the page.

    Returns:
        The path.

    Raises:
        StoreError: the file cannot be written, or a thumbnail cannot be read.
    """
    pictures = pictures or {}
    wrong = [report for report in reports if report.problems]
    ordered = [*wrong, *(report for report in reports if not report.problems)]
    sections = []
    if wrong:
        rows = tuple((report.name, problem, redact(report.uri)) for report in wrong for problem in report.problems)
        table = Table(("Slide", "Problem", "File"), rows)
        sections.append(Section("Problems", (table,), "What to mend before these slides can be used as they are."))
    shown = tuple(
        Picture(pictures[report.name], report.name, f"Slide {report.name}", _size(report), "; ".join(report.problems))
        for report in ordered
        if report.name in pictures
    )
    if shown:
        sections.append(Section("Pictures", (Gallery(shown, max_side=_THUMBNAIL_SIDE),)))
    sections.append(Section("All slides", (_slide_table(ordered, len(wrong)),)))
    return write_report(
        path,
        title=cohort_name,
        subtitle="Cohort check",
        key_numbers=_cohort_numbers(reports),
        sections=sections,
        footer=footer,
    )


def _cohort_numbers(reports: Sequence[SlideReport]) -> list[KeyNumber]:
    wrong = sum(bool(report.problems) for report in reports)
    unusable = sum(not report.usable for report in reports)
    mpps = sorted(report.mpp for report in reports if report.mpp)
    pixels = sum((report.width or 0) * (report.height or 0) for report in reports)
    span = "" if not mpps or mpps[0] == mpps[-1] else f"{mpps[0]:.4g} to {mpps[-1]:.4g}"
    return [
        KeyNumber("Slides", len(reports)),
        KeyNumber("Patients", len({report.patient for report in reports})),
        KeyNumber("With problems", wrong, f"{unusable or 'none'} cannot be used" if wrong else ""),
        KeyNumber("Gigapixels", f"{pixels / 1e9:.3g}", "at level 0"),
        KeyNumber("µm per pixel", float(np.median(mpps)) if mpps else None, span and f"median; {span}"),
    ]


def _slide_table(reports: Sequence[SlideReport], wrong: int) -> Table:
    rows = tuple(
        (
            report.name,
            report.patient,
            report.vendor,
            report.width or None,
            report.height or None,
            report.mpp,
            report.levels or None,
        )
        for report in reports
    )
    columns = ("Slide", "Patient", "Vendor", "Width, px", "Height, px", "µm per px", "Levels")
    return Table(columns, rows, problems=tuple(range(wrong)))


def _size(report: SlideReport) -> str:
    parts = [f"{report.width:,} × {report.height:,} px"] if report.width and report.height else []
    return " · ".join([*parts, *([f"{report.mpp:.4g} µm/px"] if report.mpp else [])])


def _block(block: Block) -> dict[str, Any]:
    """What the template shows of one block."""
    match block:
        case Text():
            return {"kind": "text", "paragraphs": block.paragraphs}
        case Code():
            return {"kind": "code", "text": block.text}
        case Gallery():
            pictures = [_picture(picture, block.max_side) for picture in block.pictures]
            aspects = sorted(picture["width"] / picture["height"] for picture in pictures)
            aspect = aspects[len(aspects) // 2] if aspects else 1.0
            if len(pictures) > 1:
                aspect = min(max(aspect, 0.7), 2.0)
            columns = min(block.columns, max(len(pictures), 1))
            return {"kind": "gallery", "pictures": pictures, "columns": columns, "aspect": f"{aspect:.4f}"}
        case Chart():
            markup = require("markupsafe", "learn", "write reports").Markup
            return {"kind": "chart", "svg": markup(safe_svg(block.svg)), "caption": block.caption, "alt": block.alt}
        case Table():
            return _table(block)
        case _:
            assert_never(block)


def _picture(picture: Picture, max_side: int) -> dict[str, Any]:
    image = _open(picture.image)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    image.info.clear()  # comments and profiles may name a patient, and Pillow would write them again
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True, progressive=True)
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(edge, axis=0).astype(int)
    return {
        "source": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "background": f"rgb({red} {green} {blue})",  # so that a picture of another shape than its frame fills it
        "caption": picture.caption,
        "alt": picture.alt or picture.caption,
        "detail": picture.detail,
        "warning": picture.warning,
    }


def _open(source: np.ndarray | Path | bytes) -> Image.Image:
    """RGB image; what is transparent becomes white."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    name = str(source) if isinstance(source, Path) else "a picture given as bytes"
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=("JPEG", "PNG")) as image:
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise StoreError(f"{name}: cannot be shown in a report; it must be a whole JPEG or PNG ({error})") from error


def _table(table: Table) -> dict[str, Any]:
    numeric = [_is_numeric([row[index] for row in table.rows]) for index in range(len(table.columns))]
    decimals = [_decimals([row[index] for row in table.rows]) for index in range(len(table.columns))]
    rows = []
    for index, row in enumerate(table.rows):
        marks = {"highlight": index in table.highlight, "problem": index in table.problems}
        rows.append(
            {
                "classes": " ".join(name for name, on in marks.items() if on),
                "problem": marks["problem"],
                "cells": [_cell(cell, places) for cell, places in zip(row, decimals, strict=True)],
            }
        )
    return {"kind": "table", "columns": table.columns, "numeric": numeric, "rows": rows, "caption": table.caption}


def _is_number(cell: Cell) -> TypeGuard[int | float]:
    return isinstance(cell, int | float | np.number) and not isinstance(cell, bool)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(_is_number(cell) for cell in known)


def _decimals(cells: Sequence[Cell]) -> int:
    """Decimals that show each number of a column to four significant digits, at most four."""
    numbers = [f"{cell:.4g}" for cell in cells if isinstance(cell, float | np.floating) and math.isfinite(cell)]
    return min(4, max((len(text.partition(".")[2]) for text in numbers if "e" not in text), default=0))


def _cell(cell: Cell, decimals: int | None = None) -> str:
    if cell is None or (_is_number(cell) and math.isnan(cell)):
        return "–"
    if not _is_number(cell) or math.isinf(cell):
        return str(cell)
    if isinstance(cell, int | np.integer):
        return f"{cell:,}"
    places = _decimals([cell]) if decimals is None else decimals
    tiny = cell != 0 and abs(cell) < 10.0**-places / 2
    return f"{cell:.2g}" if tiny else f"{cell:,.{places}f}"

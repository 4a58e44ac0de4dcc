"""The cohort: which slides there are, whose they are, and what is known about them.

A cohort is read from a table, a folder, a glob pattern, a bucket prefix or a single slide. Labels may stand in the same
table or in another one that is joined by slide or by patient::

    Cohort.read("cohort.csv")                          # a table that says where the slides lie
    Cohort.read("s3://bucket/brca/")                   # every slide under a prefix
    Cohort.read("/data/slides", labels="labels.csv")   # a folder, and a table of names and labels

Each file is one slide; several DICOM files of one series are not yet put together.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import final

from gigatome.blob.store import is_remote, list_uris, local_path, open_blob, redact
from gigatome.core.errors import CohortError, StoreError
from gigatome.core.job import slide_id
from gigatome.core.logs import log
from gigatome.slides.slide import SLIDE_SUFFIXES, Slide, open_slide

SLIDE_COLUMNS = ("slide", "wsi", "image_path", "slide_id", "sample_id", "filename", "id")
"""Names of the column that gives the slide, compared without case; the first one that holds paths is taken."""

PATIENT_COLUMNS = ("patient", "patient_id", "case_id")
"""Names of the column that gives the patient."""

MPP_COLUMNS = ("mpp", "spacing_at_level_0")
"""Names of the column that gives the resolution, in µm per pixel of level 0."""

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
_TCGA = re.compile(r"TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}(?![0-9A-Z])")


@final
@dataclass(frozen=True)
class CohortSlide:
    """One slide of a cohort.

    Attributes:
        uri: path or URI.
        name: its name within the cohort, :func:`~gigatome.core.job.slide_id` of the URI.
        patient: whose it is; its own name if nobody said.
        mpp: resolution that the table states, in µm per pixel; None means that the file says it.
        labels: the other columns of its row, as text.
    """

    uri: str
    name: str
    patient: str
    mpp: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> Slide:
        """The slide, open for reading, with the resolution of the table if it states one."""
        return open_slide(self.uri, mpp=self.mpp)


@final
@dataclass(frozen=True)
class Cohort:
    """Slides with their patients and labels, in the order of their source.

    Attributes:
        slides: the slides; their names differ.
        source: where they were read from, for messages.
    """

    slides: tuple[CohortSlide, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.slides)

    def __iter__(self) -> Iterator[CohortSlide]:
        return iter(self.slides)

    @classmethod
    def read(
        cls, source: "str | Path | Cohort", *, labels: str | Path | None = None, allow_duplicates: bool = False
    ) -> "Cohort":
        """Reads a cohort.

        Args:
            source: a CSV or TSV table with a column of paths (relative to the table) or URIs; a folder; a glob pattern;
                a bucket prefix; or one slide. A cohort is taken as it is.
            labels: a table to join by slide name, or by patient if it has no column of slides. It may also state the
                patient and the mpp.
            allow_duplicates: keep two slides of one name, so that :func:`~gigatome.slides.check.check_cohort` can
                report them; everything else needs names that differ.

        Returns:
            The cohort. Where no column names the patient, a TCGA barcode does (``TCGA-XX-YYYY``); otherwise each slide
            counts as a patient of its own.

        Raises:
            CohortError: there is no slide, no such file or no fitting column; a name, a patient or a label is given
                twice and differently; an mpp is no positive number; or no row of ``labels`` fits any slide.
        """
        if isinstance(source, Cohort):
            cohort = source
        else:
            text = str(source)
            found = _slides_of_table(text) if _is_table(text) else _slides_listed(text)
            cohort = cls(tuple(found if allow_duplicates else _unique(found, redact(text))), redact(text))
        if not cohort.slides:
            raise CohortError(f"{cohort.source}: the cohort is empty")
        return _join(cohort, str(labels)) if labels is not None else cohort

    def column(self, name: str) -> dict[str, str]:
        """Values of one label column by slide name; slides with an empty cell are left out.

        Raises:
            CohortError: no slide has such a column; the message names those that exist.
        """
        columns = list(dict.fromkeys(key for slide in self.slides for key in slide.labels))
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            there = f"label columns: {', '.join(columns)}" if columns else "it has no label column at all"
            raise CohortError(f"{self.source}: there is no label column {name!r}{hint} ({there})")
        return {slide.name: slide.labels[name] for slide in self.slides if slide.labels.get(name)}

    def select(self, names: Iterable[str]) -> "Cohort":
        """The slides with these names, in the cohort's order; raises :class:`CohortError` for a name it has not."""
        wanted = set(names)
        unknown = wanted - {slide.name for slide in self.slides}
        if unknown:
            raise CohortError(f"{self.source}: there is no slide {', '.join(sorted(unknown))} in the cohort")
        return replace(self, slides=tuple(slide for slide in self.slides if slide.name in wanted))


@dataclass(frozen=True)
class _Table:
    """A table of text cells: its header and its rows, each with its line number."""

    source: str
    header: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]

    def find(self, names: Sequence[str]) -> list[str]:
        """Columns with one of these names, an exact match before one without case, in the order of ``names``."""
        found = [name for name in names if name in self.header]
        for name in names:
            found += [column for column in self.header if column.lower() == name and column not in found]
        return sorted(found, key=lambda column: names.index(column.lower()))

    @cached_property
    def slide_column(self) -> str | None:
        """The column of the slides: the first that holds paths, else the first there is."""
        found = self.find(SLIDE_COLUMNS)
        for column in found:
            cells = [cells[column] for _, cells in self.rows if cells[column]]
            if any(_is_slide_path(cell) or "/" in cell for cell in cells):
                return column
        return found[0] if found else None

    @cached_property
    def patient_column(self) -> str | None:
        return next(iter(self.find(PATIENT_COLUMNS)), None)

    @cached_property
    def mpp_column(self) -> str | None:
        return next(iter(self.find(MPP_COLUMNS)), None)

    def mpp(self, line: int, cells: Mapping[str, str]) -> float | None:
        """The row's mpp, None if it states none."""
        column = self.mpp_column
        if column is None or not cells[column]:
            return None
        try:
            value = float(cells[column])
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf"):
            raise CohortError(f"{self.source}, line {line}: {column} must be a positive number, not {cells[column]!r}")
        return value

    def labels(self, cells: Mapping[str, str]) -> dict[str, str]:
        """The row's cells that are neither slide, patient nor mpp."""
        known = (self.slide_column, self.patient_column, self.mpp_column)
        return {column: value for column, value in cells.items() if column not in known}


def _read_table(source: str) -> _Table:
    try:
        blob = open_blob(source)
        try:
            text = blob.read(0, blob.size).decode("utf-8-sig")
        finally:
            blob.close()
    except StoreError as error:
        raise CohortError(f"cannot read the table of slides: {error}") from error
    except UnicodeDecodeError as error:
        raise CohortError(f"{redact(source)}: is no UTF-8 text; save the table as CSV in UTF-8") from error
    first = text.split("\n", 1)[0]
    delimiter = max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise CohortError(f"{redact(source)}, line {reader.line_num}: is no valid CSV ({error})") from error
    if not lines:
        raise CohortError(f"{redact(source)}: the table is empty")
    (_, header), *rows = lines
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise CohortError(f"{redact(source)}: the column {twice[0]!r} stands there twice")
    for line, row in rows:
        if len(row) > len(header):
            raise CohortError(f"{redact(source)}, line {line}: has {len(row)} cells, the header {len(header)}")
    filled = tuple((line, dict(zip(header, row + [""] * (len(header) - len(row)), strict=True))) for line, row in rows)
    return _Table(redact(source), tuple(header), filled)


def _slides_of_table(source: str) -> list[CohortSlide]:
    table = _read_table(source)
    column, patients = table.slide_column, table.patient_column
    if column is None:
        raise CohortError(
            f"{table.source}: no column names the slides; it has {', '.join(table.header)}, "
            f"and one of {', '.join(SLIDE_COLUMNS)} is needed"
        )
    slides = []
    for line, cells in table.rows:
        if not cells[column]:
            raise CohortError(f"{table.source}, line {line}: the column {column} is empty")
        uri = _resolve(cells[column], source)
        if not _is_slide_path(uri) and not is_remote(uri) and not local_path(uri).exists():
            raise CohortError(
                f"{table.source}, line {line}: {cells[column]} is not the path of a slide; where the table holds names "
                "only, give the folder as the cohort and the table as its labels"
            )
        name = slide_id(uri)
        patient = cells[patients] if patients else ""
        slides.append(CohortSlide(uri, name, patient or patient_of(name), table.mpp(line, cells), table.labels(cells)))
    if not patients:
        _say_patients(slides, table.source)
    return slides


def _slides_listed(source: str) -> list[CohortSlide]:
    try:
        alone = _is_slide_path(source) if is_remote(source) else local_path(source).is_file()
        uris = [source] if alone else list_uris(source, SLIDE_SUFFIXES)
    except StoreError as error:
        what = str(error) if is_remote(source) else f"{source}: there is no such slide, table or folder"
        raise CohortError(what) from error
    if not uris:
        raise CohortError(f"{redact(source)}: the cohort is empty; no slide there ({', '.join(SLIDE_SUFFIXES)})")
    slides = [CohortSlide(uri, slide_id(uri), patient_of(slide_id(uri))) for uri in uris]
    _say_patients(slides, redact(source))
    return slides


def _unique(slides: Sequence[CohortSlide], source: str) -> list[CohortSlide]:
    """The slides without rows that repeat another one; raises where two contradict each other."""
    seen: dict[str, CohortSlide] = {}
    for slide in slides:
        first = seen.setdefault(slide.name, slide)
        if first.uri != slide.uri:
            raise CohortError(
                f"{source}: two slides are named {slide.name}: {redact(first.uri)} and {redact(slide.uri)}; rename "
                "one, or list the ones to use in a table"
            )
        if first.patient != slide.patient:
            raise CohortError(f"{source}: slide {slide.name} has two patients, {first.patient} and {slide.patient}")
        if first != slide:
            raise CohortError(f"{source}: slide {slide.name} has two rows that differ in their labels or mpp")
    if len(seen) < len(slides):
        log.warning("%s: %d rows repeat another one and are left out", source, len(slides) - len(seen))
    return list(seen.values())


def _join(cohort: Cohort, source: str) -> Cohort:
    """The cohort with the labels of another table, matched by slide name or else by patient."""
    table = _read_table(source)
    by_slide, patients = table.slide_column, table.patient_column
    key = by_slide or patients
    if key is None:
        raise CohortError(
            f"{table.source}: no column names slides or patients; it has {', '.join(table.header)}, "
            f"and one of {', '.join(SLIDE_COLUMNS + PATIENT_COLUMNS)} is needed"
        )
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for line, cells in table.rows:
        name = _name_of(cells[key]) if by_slide else cells[key]
        if rows.setdefault(name, (line, cells))[1] != cells:
            raise CohortError(
                f"{table.source}, line {line}: {name} stands there twice and differs (line {rows[name][0]})"
            )
    joined, used = [], set()
    for slide in cohort:
        name = slide.name if by_slide else slide.patient
        if name not in rows:
            joined.append(slide)
            continue
        used.add(name)
        line, cells = rows[name]
        joined.append(
            replace(
                slide,
                patient=_joined_patient(slide, cells[patients] if patients else "", table.source),
                mpp=table.mpp(line, cells) or slide.mpp,
                labels={**slide.labels, **table.labels(cells)},
            )
        )
    what = "slide" if by_slide else "patient"
    if not used:
        raise CohortError(
            f"{table.source}: no row fits a slide of {cohort.source}; the column {key} holds {next(iter(rows), '')!r} "
            f"and the like, the cohort has {what} {(cohort.slides[0].name if by_slide else cohort.slides[0].patient)!r}"
        )
    if len(used) < len(rows):
        log.warning("%s: %d of %d rows fit no %s of the cohort", table.source, len(rows) - len(used), len(rows), what)
    return Cohort(tuple(joined), cohort.source)


def _joined_patient(slide: CohortSlide, patient: str, source: str) -> str:
    """The patient that the labels state; it may replace one that was only derived from the slide's name."""
    if not patient or patient == slide.patient:
        return slide.patient
    if slide.patient != patient_of(slide.name):
        raise CohortError(f"{source}: slide {slide.name} has two patients, {slide.patient} and {patient}")
    return patient


def _is_table(source: str) -> bool:
    return source.split("?", 1)[0].lower().endswith(_TABLE_SUFFIXES)


def _is_slide_path(text: str) -> bool:
    return text.split("?", 1)[0].lower().endswith(SLIDE_SUFFIXES)


def _resolve(cell: str, table: str) -> str:
    """URI of a slide that a table names: relative paths start at the table's folder."""
    if "://" in cell or PurePosixPath(cell).is_absolute():
        return cell
    if is_remote(table):
        return f"{table.split('?', 1)[0].rpartition('/')[0]}/{cell}"
    return str(local_path(table).parent / cell)


def _name_of(cell: str) -> str:
    """Name of a slide that a table of labels mentions: with or without path and ending; other dots are kept."""
    if _is_slide_path(cell) or cell.lower().endswith((".h5", ".pt")):
        return slide_id(cell)
    return PurePosixPath(cell).name


def patient_of(name: str) -> str:
    """Patient of a slide that nobody named one for: its TCGA barcode, else its own name."""
    barcode = _TCGA.match(name)
    return barcode.group() if barcode else name


def _say_patients(slides: Sequence[CohortSlide], source: str) -> None:
    barcodes = sum(_TCGA.match(slide.name) is not None for slide in slides)
    log.info(
        "%s: no column names the patient (%s); %d slides get theirs from the TCGA barcode, %d count as one each",
        source, ", ".join(PATIENT_COLUMNS), barcodes, len(slides) - barcodes,
    )  # fmt: skip

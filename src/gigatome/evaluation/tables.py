"""Tables of labels as the field's tools have them: HIPT, CLAM, MCAT and LongViT, Giga-SSL, Patho-Bench, STAMP.

They load as they are, zipped or not::

    cohort = read_labels("tcga_brca_all_clean.csv.zip")          # MCAT: case_id, slide_id, survival_months, censorship
    cohort = read_labels("clini.xlsx", slides="slide.csv")       # STAMP: PATIENT …, PATIENT, FILENAME
    task = read_task("tcga_brca/subtype")                        # Patho-Bench: k=all.tsv and config.yaml
    units = make_units(cohort, task.target, level=task.level, label_map=task.label_map)

An archive is read in memory and never extracted: members of MCAT's have paths that lead out of the folder.
"""

import csv
import io
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from gigatome.blob.store import is_remote, open_blob, redact
from gigatome.core.errors import CohortError, StoreError
from gigatome.core.extras import require
from gigatome.core.logs import log
from gigatome.evaluation.cells import is_missing, name_of
from gigatome.evaluation.units import ClassTarget, SurvivalTarget
from gigatome.slides.cohort import Cohort, CohortSlide, patient_of

Format = Literal["clam", "hipt", "mcat", "giga-ssl", "patho-bench", "stamp", "table"]

SLIDE_NAMES = ("slide_id", "slide", "filename", "wsi", "image_path", "sample_id", "id")
"""Names of the column of slides, compared without case, the first one first."""

PATIENT_NAMES = ("case_id", "patient_id", "patient", "case")
"""Names of the column of patients, likewise."""

OMIC_SUFFIXES = ("_mut", "_cnv", "_rnaseq")
"""Ends of the names of MCAT's columns of mutations, copy numbers and expression, which are no labels."""

PATHO_BENCH = "k=all.tsv"
"""Name of Patho-Bench's table of labels and folds."""

_MOST = 2 << 30


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        source: where it was read from, for messages.
        header: names of the columns; pandas' index has the name ``""``.
        rows: cells by column, without white space at their ends.
    """

    source: str
    header: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]

    def find(self, names: Iterable[str]) -> str | None:
        """The column with the first of these names that is there, compared without case."""
        lower = {column.lower(): column for column in reversed(self.header)}
        return next((lower[name.lower()] for name in names if name.lower() in lower), None)


@dataclass(frozen=True)
class Task:
    """What a published table is meant to predict.

    Attributes:
        format: of the table.
        target: None where the table does not say it.
        level: what is predicted.
        label_map: names of the labels, if it has them.
    """

    format: Format
    target: ClassTarget | SurvivalTarget | None
    level: Literal["slide", "patient"] = "slide"
    label_map: Mapping[str, str] | None = None


def read_table(source: str | Path, *, skip: tuple[str, ...] = ()) -> Table:
    """Reads CSV, TSV, a zip of one of them, or the first sheet of an XLSX.

    Args:
        source: path or URI; the separator is the one of comma, tab and semicolon that the header has most of.
        skip: ends of the names of columns to leave out.

    Raises:
        CohortError: it cannot be read, is no such table, is empty, or has a column twice.
        MissingExtraError: an XLSX needs openpyxl.
    """
    name, lines = redact(str(source)), read_lines(source)
    header = next(lines, [])
    while len(header) > 1 and not header[-1]:
        header.pop()
    twice = sorted({column for column in header if header.count(column) > 1}) if len(set(header)) < len(header) else []
    if twice:
        raise CohortError(f"{name}: the column {twice[0]!r} stands there twice")
    kept = [i for i, column in enumerate(header) if not (skip and column.endswith(skip))]
    rows = []
    for line, row in enumerate(lines, 2):
        if any(row[len(header) :]):
            raise CohortError(f"{name}, row {line}: has {len(row)} cells, the header {len(header)}")
        row += [""] * (len(header) - len(row))
        rows.append({header[i]: row[i] for i in kept})
    if not rows:
        raise CohortError(f"{name}: the table is empty")
    return Table(name, tuple(header[i] for i in kept), tuple(rows))


def read_lines(source: str | Path) -> Iterator[list[str]]:
    """Rows of a table one by one, the header first, without empty rows; raises as :func:`read_table` does."""
    name, data = redact(str(source)), _read(source)
    kind = str(source).split("?", 1)[0].lower()
    if kind.endswith(".zip"):
        kind, data = _member(data, name)
    lines = _sheet(data, name) if kind.endswith((".xlsx", ".xlsm")) else _lines(data, name)
    return (line for line in lines if any(line))


def detect_format(source: str | Path) -> Format:
    """Whose table it is, by its name and the names of its columns; ``"table"`` if nobody's.

    Args:
        source: a table, or Patho-Bench's folder of a task.
    """
    path = _table_of(source)
    return (
        "patho-bench" if PurePosixPath(str(path)).name == PATHO_BENCH else _format(read_table(path, skip=OMIC_SUFFIXES))
    )


def read_task(source: str | Path) -> Task:
    """What a table is meant to predict, by the conventions of its format.

    Args:
        source: as for :func:`detect_format`. ``config.yaml`` is read beside Patho-Bench's table.

    Raises:
        CohortError: Patho-Bench's ``config.yaml`` cannot be read or names a column that is not there.
    """
    path = _table_of(source)
    table = read_table(path, skip=OMIC_SUFFIXES)
    if PurePosixPath(str(path)).name == PATHO_BENCH:
        return _patho_bench(table, str(path))
    kind = _format(table)
    if kind == "mcat":
        return Task(kind, SurvivalTarget("survival_months", censorship="censorship"), "patient")
    column = table.find(("label", "oncotree_code"))
    return Task(kind, ClassTarget(column) if column and kind in ("clam", "hipt", "giga-ssl") else None)


def read_labels(source: str | Path, cohort: Cohort | None = None, *, slides: str | Path | None = None) -> Cohort:
    """Reads a published table of labels as a cohort.

    Args:
        source: the table, or Patho-Bench's folder of a task; STAMP's table of patients.
        cohort: slides to give the labels to, by their names or else by their patients; those that the table does not
            have keep what they have. Without it the slides are those of the table, with names for paths.
        slides: STAMP's table of slides, ``PATIENT`` and ``FILENAME``.

    Returns:
        The cohort. A slide with two rows that differ is in it twice, for the reader of a target to judge. Omic columns
        are left out: see :func:`~gigatome.evaluation.omics.read_omics`.

    Raises:
        CohortError: the table cannot be read, names neither slides nor patients, or fits no slide.
    """
    table = read_table(_table_of(source), skip=OMIC_SUFFIXES)
    if slides is not None:
        table = _merge(table, read_table(slides))
    slide, patient = table.find(SLIDE_NAMES), table.find(PATIENT_NAMES)
    if slide is None and (patient is None or cohort is None):
        raise CohortError(
            f"{table.source}: no column names the slides; it has {', '.join(table.header[:20])}. A table of patients "
            "needs the cohort's slides, or STAMP's table of slides beside it"
        )
    found = list(_rows(table, slide, patient))
    if cohort is not None:
        return _given(cohort, found, table.source, by_patient=slide is None)
    unique = {(row.name, row.patient, tuple(row.labels.items())): row for row in found}
    return Cohort(tuple(unique.values()), table.source)


def _table_of(source: str | Path) -> str | Path:
    """The table itself, where a folder of Patho-Bench is named."""
    if not is_remote(str(source)) and Path(source).is_dir():
        if not (Path(source) / PATHO_BENCH).is_file():
            raise CohortError(f"{source}: is a folder without Patho-Bench's {PATHO_BENCH}; name the table in it")
        return Path(source) / PATHO_BENCH
    return source


def _format(table: Table) -> Format:
    columns = {column.lower() for column in table.header}
    if "PATIENT" in table.header:
        return "stamp"
    if {"slide_id", "fold_0"} <= columns:
        return "patho-bench"
    if {"case_id", "slide_id", "survival_months", "censorship"} <= columns:
        return "mcat"
    if {"case_id", "slide_id", "oncotree_code"} <= columns:
        return "hipt"
    if {"case_id", "slide_id", "label"} <= columns:
        return "clam"
    return "giga-ssl" if {"id", "label"} <= columns else "table"


def _patho_bench(table: Table, path: str) -> Task:
    beside = f"{path[: -len(PATHO_BENCH)]}config.yaml"
    try:
        config: Any = yaml.safe_load(_read(beside))
    except yaml.YAMLError as error:
        raise CohortError(f"{beside}: is no YAML ({error})") from error
    column = str(config.get("task_col", "")) if isinstance(config, dict) else ""
    if column not in table.header:
        raise CohortError(f"{beside}: task_col is {column!r}, which is no column of {PATHO_BENCH}")
    level = "patient" if config.get("sample_col", "case_id") == "case_id" else "slide"
    time, event = f"{column}_days", f"{column}_event"
    if time in table.header and event in table.header:
        return Task("patho-bench", SurvivalTarget(time, event=event, unit="days"), level)
    names = config.get("label_dict") or {}
    cells = {row[column] for row in table.rows}
    named = {str(key): str(value) for key, value in names.items() if str(key) in cells}
    return Task("patho-bench", ClassTarget(column), level, named if len(set(named.values())) > 1 else None)


def _rows(table: Table, slide: str | None, patient: str | None) -> Iterable[CohortSlide]:
    known = {slide, patient, ""}
    labels = [column for column in table.header if column not in known and not column.startswith("fold_")]
    for line, row in enumerate(table.rows, 2):
        cell, whose = row[slide] if slide else "", row[patient] if patient else ""
        if is_missing(cell) and (slide or is_missing(whose)):
            raise CohortError(f"{table.source}, row {line}: the column {slide or patient} is empty")
        name = name_of(cell) if slide else whose
        owner = patient_of(name) if is_missing(whose) else whose
        yield CohortSlide(cell or name, name, owner, None, {column: row[column] for column in labels})


def _given(cohort: Cohort, rows: Sequence[CohortSlide], source: str, *, by_patient: bool) -> Cohort:
    """The cohort with the labels of a table, by slide, or else by patient."""
    by: dict[str, list[CohortSlide]] = defaultdict(list)
    for row in rows:
        by[row.name].append(row)
    if by_patient or not any(slide.name in by for slide in cohort):
        by_patient = True
        by.clear()
        for row in rows:
            by[row.patient].append(row)
    joined: list[CohortSlide] = []
    used: set[str] = set()
    other: list[str] = []
    for slide in cohort:
        key = slide.patient if by_patient else slide.name
        used |= {key} & by.keys()
        distinct = {("" if by_patient else row.patient, *row.labels.items()): row for row in by.get(key, [])}
        for row in distinct.values():
            known = by_patient or _states_patient(slide)
            if known and not by_patient and _states_patient(row) and row.patient != slide.patient:
                other.append(f"{slide.name} ({row.patient}, and {slide.patient} in the cohort)")
            labels = {**slide.labels, **row.labels}
            joined.append(replace(slide, patient=slide.patient if known else row.patient, labels=labels))
        if not distinct:
            joined.append(slide)
    if not used:
        raise CohortError(
            f"{source}: no row fits a slide of {cohort.source}; the table holds {rows[0].name} of {rows[0].patient}, "
            f"the cohort {cohort.slides[0].name} of {cohort.slides[0].patient}"
        )
    if other:
        log.warning("%s: the patients of %d slides are the cohort's, such as of %s", source, len(other), other[0])
    if len(used) < len(by):
        what = "patient" if by_patient else "slide"
        log.warning("%s: %d of its %d %ss are not in the cohort", source, len(by) - len(used), len(by), what)
    return Cohort(tuple(joined), cohort.source)


def _states_patient(slide: CohortSlide) -> bool:
    """Whether its patient is more than what its name says."""
    return slide.patient not in (slide.name, patient_of(slide.name))


def _merge(patients: Table, slides: Table) -> Table:
    """STAMP's two tables as one row a slide."""
    key, of, name = patients.find(PATIENT_NAMES), slides.find(PATIENT_NAMES), slides.find(SLIDE_NAMES)
    if key is None or of is None or name is None:
        lacking = patients.source if key is None else slides.source
        raise CohortError(f"{lacking}: needs the column PATIENT, and the table of slides FILENAME too")
    by: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in patients.rows:
        by[row[key]].append(row)
    merged = [{**row, "case_id": line[of], "slide_id": line[name]} for line in slides.rows for row in by[line[of]]]
    if not merged:
        raise CohortError(f"{slides.source}: none of its patients is in {patients.source}")
    lost = sorted({line[of] for line in slides.rows} - {row[key] for row in patients.rows})
    if lost:
        log.warning("%s: %d without a row in %s, such as %s", slides.source, len(lost), patients.source, lost[0])
    header = [column for column in patients.header if column != key]
    return Table(patients.source, (*header, "case_id", "slide_id"), tuple(merged))


def _read(source: str | Path) -> bytes:
    try:
        blob = open_blob(str(source))
        try:
            return blob.read(0, blob.size)
        finally:
            blob.close()
    except StoreError as error:
        raise CohortError(f"cannot read the table: {error}") from error


def _member(data: bytes, name: str) -> tuple[str, bytes]:
    """Name and bytes of the one table in an archive, read in memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            tables = [
                member
                for member in archive.infolist()
                if member.filename.lower().endswith((".csv", ".tsv", ".txt", ".xlsx"))
                and "__MACOSX" not in member.filename
                and not PurePosixPath(member.filename).name.startswith(".")
            ]
            if len(tables) != 1:
                held = ", ".join(member.filename for member in tables[:5]) or "none"
                raise CohortError(f"{name}: the archive must hold one table, and holds {held}")
            if tables[0].file_size > _MOST:
                raise CohortError(f"{name}: {tables[0].filename} has {tables[0].file_size} bytes, too many for a table")
            with archive.open(tables[0]) as handle:
                return tables[0].filename.lower(), handle.read(_MOST)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise CohortError(f"{name}: the archive cannot be read ({error})") from error


def _lines(data: bytes, name: str) -> Iterator[list[str]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(f"{name}: is no UTF-8 text; save the table as CSV in UTF-8") from error
    first = text[: text.find("\n") + 1 or None]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=first.count), strict=True)
    try:
        for row in reader:
            yield [cell.strip() for cell in row]
    except csv.Error as error:
        raise CohortError(f"{name}, line {reader.line_num}: is no valid CSV ({error})") from error


def _sheet(data: bytes, name: str) -> Iterator[list[str]]:
    openpyxl = require("openpyxl", "tables", f"read {name}; or save it as CSV")
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        for row in book.worksheets[0].values:
            yield ["" if cell is None else str(cell).strip() for cell in row]
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise CohortError(f"{name}: is no XLSX table ({error})") from error

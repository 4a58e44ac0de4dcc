"""Omics of patients in six groups of genes, as MCAT reads them beside a slide.

Source: mahmoodlab/MCAT; its six groups, in its order, by a table with a column of genes a group. Differs: rows of one
patient that disagree, and cells that are no number, are errors.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError
from gigatome.evaluation.tables import OMIC_SUFFIXES, PATIENT_NAMES, read_lines, read_table

GROUPS = (
    "tumour suppressor genes",
    "oncogenes",
    "protein kinases",
    "cell differentiation markers",
    "transcription factors",
    "cytokines and growth factors",
)
"""The six groups, in the order of the columns of MCAT's ``signatures.csv``."""


def read_omics(
    source: str | Path, signatures: str | Path, *, suffixes: Sequence[str] = OMIC_SUFFIXES
) -> dict[str, tuple[NDArray[np.float32], ...]]:
    """Reads the omics of every patient of a table such as ``tcga_luad_all_clean.csv.zip``.

    Args:
        source: table with a column ``case_id`` and columns named by a gene and one of ``suffixes``.
        signatures: table with a column of genes for each group, in the order of :data:`GROUPS`.
        suffixes: of the columns to read.

    Returns:
        For each patient a float32 vector a group: the columns of the group's genes, sorted by name, as they stand there
        (a head scales them by its training part). A gene may be in several groups.

    Raises:
        CohortError: a table cannot be read, has no column of patients, or fits no gene of a group; a cell is no finite
            number; or two rows of a patient differ.
    """
    table = read_table(signatures)
    lines = read_lines(source)
    header = next(lines, [])
    patient = next((header.index(c) for c in header if c.lower() in PATIENT_NAMES), None)
    if patient is None:
        raise CohortError(f"{source}: no column names the patients; one of {', '.join(PATIENT_NAMES)} is needed")
    place = {column: i for i, column in enumerate(header)}
    columns: list[list[int]] = []
    for group in [column for column in table.header if column]:
        genes = {row[group] for row in table.rows if row[group]}
        columns.append([place[name] for name in sorted(g + s for g in genes for s in suffixes) if name in place])
        if not columns[-1]:
            raise CohortError(
                f"{source}: has no column of a gene of {group}, such as {min(genes, default='')}{suffixes[0]}"
            )
    found: dict[str, tuple[NDArray[np.float32], ...]] = {}
    for row in lines:
        row += [""] * (len(header) - len(row))
        values = tuple(_numbers(row, group, header, patient, str(source)) for group in columns)
        first = found.setdefault(row[patient], values)
        if first is not values and not all(np.array_equal(a, b) for a, b in zip(first, values, strict=True)):
            raise CohortError(f"{source}: two rows of patient {row[patient]} differ in their omics")
    return found


def _numbers(
    row: Sequence[str], group: Sequence[int], header: Sequence[str], patient: int, source: str
) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            values = np.array([row[i] for i in group]).astype(np.float32)
        if np.isfinite(values).all():
            return values
    except ValueError:
        pass
    for i in group:
        try:
            fine = bool(np.isfinite(float(row[i])))
        except ValueError:
            fine = False
        if not fine:
            raise CohortError(f"{source}: {header[i]} of patient {row[patient]} is {row[i]!r}, no finite number")
    raise CohortError(f"{source}: patient {row[patient]} has an omic value beyond float32")

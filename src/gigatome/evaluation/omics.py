"""Omics of patients in six groups of genes, as MCAT reads them beside a slide.

Source: mahmoodlab/MCAT; its six groups, in its order, by a table with a column of genes a group. Differs: rows of one
patient that disagree, and cells that are no number, are errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError, EvaluationError
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
        (see :class:`OmicScaler`). A gene may be in several groups.

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


@dataclass(frozen=True, eq=False)
class OmicScaler:
    """Mean 0 and variance 1 for each omic column, over the training part only.

    Attributes:
        mean: float32 vector a group.
        scale: standard deviation (n) likewise, 1 where a column does not vary.
    """

    mean: tuple[NDArray[np.float32], ...]
    scale: tuple[NDArray[np.float32], ...]

    @classmethod
    def fit(cls, omics: Mapping[str, tuple[NDArray[np.float32], ...]], patients: Sequence[str]) -> "OmicScaler":
        """The scaler of these patients, each of whom counts once.

        Raises:
            EvaluationError: there is nobody, or one has no omics.
        """
        rows = [_of(omics, patient) for patient in sorted(set(patients))]
        if not rows:
            raise EvaluationError("omics cannot be scaled without a training patient")
        groups = [np.stack(group).astype(np.float64) for group in zip(*rows, strict=True)]
        scale = (group.std(0) for group in groups)
        return cls(
            tuple(group.mean(0).astype(np.float32) for group in groups),
            tuple(np.where(s > 1e-12, s, 1).astype(np.float32) for s in scale),
        )

    def __call__(
        self, omics: Mapping[str, tuple[NDArray[np.float32], ...]], patients: Sequence[str]
    ) -> tuple[NDArray[np.float32], ...]:
        """The scaled omics of some patients, a float32 matrix [patients, columns] a group.

        Raises:
            EvaluationError: one has no omics, or they are of other sizes than those that were fitted.
        """
        rows = [_of(omics, patient) for patient in patients]
        wrong = [p for p, row in zip(patients, rows, strict=True) if [*map(len, row)] != [*map(len, self.mean)]]
        if wrong:
            raise EvaluationError(f"the omics of {wrong[0]} have other columns than those that were learnt from")
        groups = zip(*rows, strict=True)
        return tuple((np.stack(g) - m) / s for g, m, s in zip(groups, self.mean, self.scale, strict=True))


def _of(omics: Mapping[str, tuple[NDArray[np.float32], ...]], patient: str) -> tuple[NDArray[np.float32], ...]:
    if patient not in omics:
        raise EvaluationError(f"patient {patient} has no omics; leave the patient out of the units")
    return omics[patient]

"""What a survival evaluation found: concordance with intervals, folds, and the risk of every patient."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gigatome.evaluation.result import over_folds, plain, write_result


@dataclass(frozen=True)
class SurvivalScores:
    """Scores of out-of-fold risks, with 95 % intervals; see :func:`~gigatome.evaluation.survival.score_survival`.

    Pairs of patients are compared only within a fold, because risks of different folds' models have different scales.

    Attributes:
        n: patients, or slides.
        events: how many had the event.
        c_index: Harrell's.
        c_index_ci: its interval; NaN with too few patients for one.
        uno: Uno's, with censoring estimated on the training part of each fold.
        uno_ci: its interval.
        times: at which ``auroc_at`` holds, in the target's unit.
        auroc_at: cumulative/dynamic AUROC at ``times``.
        logrank_p: of those above against those below the median risk of their fold's training part.
        hazard_ratio: of the same two groups, stratified by fold; NaN where no fold has both, infinite or 0 where those
            of one group alone died.
        hazard_ratio_ci: its interval, by Wald; NaN where the ratio is not finite and above 0.
    """

    n: int
    events: int
    c_index: float
    c_index_ci: tuple[float, float]
    uno: float
    uno_ci: tuple[float, float]
    times: tuple[float, ...]
    auroc_at: tuple[float, ...]
    logrank_p: float
    hazard_ratio: float = float("nan")
    hazard_ratio_ci: tuple[float, float] = (float("nan"), float("nan"))


@dataclass(frozen=True)
class SurvivalFold:
    """Scores on the test part of one fold.

    Attributes:
        fold: its number, from 0.
        n_train: training units.
        n_test: test units.
        events: of the test part.
        c_index: Harrell's; NaN if no pair can be compared.
    """

    fold: int
    n_train: int
    n_test: int
    events: int
    c_index: float


@dataclass(frozen=True)
class SurvivalPredictions:
    """Test predictions, one row for each patient, or slide, that a fold tested.

    Attributes:
        names: name of the patient or slide, [N].
        patients: its patient, [N].
        folds: int64 [N], the fold that tested it, without having learnt from its patient.
        time: float64 [N], to event or censoring.
        event: bool [N].
        risk: float64 [N], higher for a shorter life; comparable within a fold.
        high: bool [N], above the median risk of the fold's training part.
        survival: float64 [N, bins], probability of surviving each time bin; [N, 0] where a head gives none.
        edges: float64 [N, bins], end of each bin; folds have bins of their own.
    """

    names: tuple[str, ...]
    patients: tuple[str, ...]
    folds: NDArray[np.int64]
    time: NDArray[np.float64]
    event: NDArray[np.bool_]
    risk: NDArray[np.float64]
    high: NDArray[np.bool_]
    survival: NDArray[np.float64]
    edges: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class SurvivalResult:
    """How well a head on frozen embeddings predicts the survival of the cohort.

    Attributes:
        target: columns and sign of the outcome, spelt out, such as "survival_months, event if censorship = 0".
        unit: of time, such as "months".
        head: name of the head.
        options: options of the head and its training.
        encoder: name of the encoder.
        level: whether patients or slides were predicted.
        n_slides: slides that were tested.
        n_patients: their patients.
        scores: of all out-of-fold risks.
        folds: of each fold.
        predictions: every test prediction.
        seed: of splits, training and resampling.
        split: how the splits were made.
        split_hash: hash of the splits.
        excluded: why how many slides or patients were left out.
    """

    target: str
    unit: str
    head: str
    options: Mapping[str, Any]
    encoder: str
    level: Literal["patient", "slide"]
    n_slides: int
    n_patients: int
    scores: SurvivalScores
    folds: tuple[SurvivalFold, ...]
    predictions: SurvivalPredictions = field(repr=False)
    seed: int
    split: str
    split_hash: str
    excluded: Mapping[str, int]

    @property
    def fold_c_index(self) -> tuple[float, float]:
        """Mean and standard deviation (n − 1) over the folds that have one, as the papers print it."""
        return over_folds([fold.c_index for fold in self.folds])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON can hold it; a score that is not defined is None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "predictions"}
        values["scores"] = asdict(self.scores)
        values["folds"] = [asdict(fold) for fold in self.folds]
        values["fold_c_index"] = dict(zip(("mean", "sd"), self.fold_c_index, strict=True))
        return plain(values)

    def save(self, path: str | Path) -> None:
        """Writes ``path``, with the ending ``.json``, and beside it the predictions, with ``.csv``.

        Raises:
            StoreError: a file cannot be written.
        """
        write_result(path, self.to_dict(), self.predictions_csv())

    def predictions_csv(self) -> str:
        """A row for each prediction."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        bins = [f"{what}_{k}" for k in range(self.predictions.survival.shape[1]) for what in ("end", "survival")]
        writer.writerow([self.level, "patient", "fold", "time", "event", "risk", "group", *bins])
        rows = self.predictions
        for i, name in enumerate(rows.names):
            pairs = np.stack([rows.edges[i], rows.survival[i]], 1).ravel() if bins else ()
            numbers = [f"{value:.6g}" for value in (rows.time[i], int(rows.event[i]), rows.risk[i])]
            group = "high" if rows.high[i] else "low"
            known = [name, rows.patients[i], int(rows.folds[i]), *numbers, group]
            writer.writerow([*known, *(f"{value:.6g}" for value in pairs)])
        return text.getvalue()

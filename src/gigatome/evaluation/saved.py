"""Heads kept for new slides: the heads of all folds, what they were trained on, and what they must be given.

A folder holds ``model.json`` and a ``fold_<k>.safetensors`` for each fold. Together the folds' heads predict a new
slide as an ensemble: nothing has to be trained again, and the scores of the card are those of its members on patients
that each of them had not seen.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gigatome.blob.store import write_atomic
from gigatome.core.errors import StoreError
from gigatome.core.extras import require
from gigatome.core.version import __version__
from gigatome.evaluation.crossval import FoldRun
from gigatome.evaluation.heads import FittedHead, Prediction, restore_head
from gigatome.evaluation.result import EvaluationResult, plain
from gigatome.evaluation.survival_result import SurvivalResult
from gigatome.evaluation.unit_data import Origin, UnitData
from gigatome.evaluation.units import ClassOutcome, Units

CARD = "model.json"
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what a card that is none makes
_PERCENTILES = np.arange(101)


@dataclass(frozen=True)
class NewPrediction:
    """What the ensemble says of one slide, or patient.

    Attributes:
        name: of the slide or patient.
        label: the class; ``"high risk"`` or ``"low risk"`` of a survival.
        probabilities: of each class, the mean over the heads; empty for survival.
        risk: mean over the heads of the share of their training patients with a lower risk, 0 to 1; NaN for classes.
        spread: standard deviation over the heads of the label's probability, or of ``risk``.
        distance: of the mean embedding from those of training, root mean square over standardised dimensions.
        unusual: whether it is further away than any training unit was.
    """

    name: str
    label: str
    probabilities: tuple[float, ...]
    risk: float
    spread: float
    distance: float
    unusual: bool


@final
@dataclass(frozen=True, eq=False)
class SavedModel:
    """The heads of all folds.

    Attributes:
        card: what they are and were trained on: origin of the embeddings, target, scores, thresholds, cohort.
        heads: one a fold.
        mean: float32 [D], of the training units' mean embeddings.
        deviation: float32 [D], their standard deviation.
        level: of what it predicts, that of training unless told otherwise.
    """

    card: Mapping[str, Any]
    heads: tuple[FittedHead, ...]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    level: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels; empty for survival."""
        return tuple(self.card["classes"])

    @property
    def origin(self) -> Origin:
        """What made the embeddings that the heads learnt from."""
        return Origin(**self.card["origin"])

    def predict(self, data: UnitData) -> list[NewPrediction]:
        """What the heads together say of each unit, whose embeddings must be of the same :attr:`origin`.

        Raises:
            StoreError: a file cannot be read.
            EvaluationError: embeddings are not finite.
        """
        found = [head.predict(data) for head in self.heads]
        scaled = (data.vectors - self.mean) / self.deviation
        distance = np.sqrt(np.square(scaled, dtype=np.float64).mean(1))
        unusual = distance > self.card["cohort"]["greatest_distance"]
        rows = ensemble_rows(self.card, found)
        return [
            NewPrediction(name, *row, distance=float(far), unusual=bool(odd))
            for name, row, far, odd in zip(data.names, rows, distance, unusual, strict=True)
        ]


def save_model(
    folder: str | Path,
    units: Units,
    data: UnitData,
    runs: Sequence[FoldRun],
    result: EvaluationResult | SurvivalResult,
) -> None:
    """Writes the heads of all folds and their card.

    Args:
        folder: where to; what was there of an earlier one is replaced.
        units: that were learnt from.
        data: their embeddings.
        runs: of each fold.
        result: what they scored.

    Raises:
        StoreError: a file cannot be written.
    """
    safetensors = require("safetensors.numpy", "learn", "save heads")
    folder = Path(folder)
    (folder / CARD).unlink(missing_ok=True)  # comes last again, so that no card stands beside heads of another
    members = []
    for k, run in enumerate(runs):
        values, arrays = run.fitted.saved()
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        write_atomic(folder / f"fold_{k}.safetensors", safetensors.save(arrays))
        members.append(values | {"training_risk": percentiles(run.training_risk)})
    mean, deviation = data.vectors.mean(0), data.vectors.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0).astype(np.float32)
    write_atomic(folder / "cohort.safetensors", safetensors.save({"mean": mean, "deviation": deviation}))
    distance = np.sqrt(np.square((data.vectors - mean) / deviation, dtype=np.float64).mean(1))
    card = outcome_card(units, result) | {
        "head": result.head,
        "options": dict(result.options),
        "origin": asdict(data.origin),
        "members": members,
    }
    card["cohort"]["greatest_distance"] = float(distance.max())
    write_atomic(folder / CARD, json.dumps(plain(card), indent=2, ensure_ascii=False) + "\n")


def outcome_card(units: Units, result: EvaluationResult | SurvivalResult) -> dict[str, Any]:
    """What a card says of the outcome, of who was learnt from, and of the scores."""
    outcome = units.outcome
    if isinstance(outcome, ClassOutcome):
        classes = outcome.classes
        counts = dict(zip(classes, np.bincount(outcome.y, minlength=len(classes)).tolist(), strict=True))
    else:
        classes, counts = (), {"events": int(outcome.event.sum()), "censored": int((~outcome.event).sum())}
    return {
        "gigatome": __version__,
        "target": result.target,
        "level": result.level,
        "classes": list(classes),
        "threshold": _threshold(result) if isinstance(result, EvaluationResult) and len(classes) == 2 else None,
        "scores": asdict(result.scores),
        "split": result.split,
        "split_hash": result.split_hash,
        "seed": result.seed,
        "cohort": {"units": len(units), "patients": len(set(units.patients)), "counts": counts},
    }


def ensemble_rows(
    card: Mapping[str, Any], found: Sequence[Prediction]
) -> list[tuple[str, tuple[float, ...], float, float]]:
    """Label, probabilities, risk and spread, as of :class:`NewPrediction`, of what the members of a card say."""
    return _class_rows(card, found) if card["classes"] else _risk_rows(card, found)


def _class_rows(
    card: Mapping[str, Any], found: Sequence[Prediction]
) -> list[tuple[str, tuple[float, ...], float, float]]:
    every = np.stack([prediction.probabilities for prediction in found])  # [folds, N, classes]
    mean, threshold = every.mean(0), card["threshold"]
    chosen = mean.argmax(1) if threshold is None else (mean[:, 1] >= threshold).astype(np.int64)
    spread = every.std(0)[np.arange(len(mean)), chosen]
    return [
        (card["classes"][k], tuple(p.tolist()), float("nan"), float(s))
        for k, p, s in zip(chosen, mean, spread, strict=True)
    ]


def _risk_rows(
    card: Mapping[str, Any], found: Sequence[Prediction]
) -> list[tuple[str, tuple[float, ...], float, float]]:
    scales = [np.array(member["training_risk"]) for member in card["members"]]
    every = np.stack(
        [
            np.interp(prediction.risk, *_rising(scale), left=0.0, right=1.0)
            for prediction, scale in zip(found, scales, strict=True)
        ]
    )
    risk = every.mean(0)
    return [
        ("high risk" if r > 0.5 else "low risk", (), float(r), float(s))
        for r, s in zip(risk, every.std(0), strict=True)
    ]


def load_model(folder: str | Path) -> SavedModel:
    """Reads what :func:`save_model` wrote; raises :class:`StoreError` if it is missing or damaged."""
    safetensors = require("safetensors.numpy", "learn", "load heads")
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        parts = [safetensors.load_file(folder / f"fold_{k}.safetensors") for k in range(len(card["members"]))]
        cohort = safetensors.load_file(folder / "cohort.safetensors")
        heads = tuple(restore_head(values, arrays) for values, arrays in zip(card["members"], parts, strict=True))
        _check_card(card)
        return SavedModel(card, heads, cohort["mean"], cohort["deviation"], card["level"])
    except (OSError, *_DAMAGED, require("safetensors", "learn", "load heads").SafetensorError) as error:
        raise StoreError(
            f"{folder}: holds no saved heads ({error}); gigatome evaluate … -o FOLDER writes them"
        ) from error


def _check_card(card: Mapping[str, Any]) -> None:
    """Raises one of the errors of what is no card."""
    Origin(**card["origin"])
    if lost := {"target", "classes", "head", "threshold", "members"} - set(card):
        raise KeyError(min(lost))
    float(card["cohort"]["greatest_distance"])


def predictions_csv(level: str, classes: Sequence[str], rows: Sequence[NewPrediction]) -> str:
    """The predictions as a table: of slides or patients, of these classes or, without any, of a survival."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = [f"p_{label}" for label in classes] or ["risk"]
    writer.writerow([level, "predicted", *scores, "spread", "distance", "unusual"])
    for row in rows:
        values = row.probabilities or (row.risk,)
        numbers = [f"{value:.6g}" for value in (*values, row.spread, row.distance)]
        writer.writerow([row.name, row.label, *numbers, int(row.unusual)])
    return text.getvalue()


def _threshold(result: EvaluationResult) -> float:
    """Probability of the second class from which on it is predicted: greatest sum of both recalls, out of fold."""
    rows = result.predictions
    p, positive = rows.probabilities[:, 1], rows.y == 1
    values = np.unique(p)
    above = np.searchsorted(np.sort(p[positive]), values), np.searchsorted(np.sort(p[~positive]), values)
    balance = (positive.sum() - above[0]) / positive.sum() + above[1] / (~positive).sum()
    best = np.flatnonzero(balance == balance.max())
    place = best[len(best) // 2]
    return float((values[place] + values[place - 1]) / 2) if place else float(values[0])


def percentiles(risk: NDArray[np.float64]) -> list[float]:
    """Percentiles 0 to 100 of training risks; none of none."""
    return np.percentile(risk, _PERCENTILES).tolist() if len(risk) else []


def _rising(scale: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Risks, each once, and the middle share of the training units with a lower one."""
    values, place = np.unique(scale, return_inverse=True)
    share = np.bincount(place, _PERCENTILES / 100) / np.bincount(place)
    return values, share

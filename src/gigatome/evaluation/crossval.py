"""Learning on one part of each split, predicting the other, and scoring what was predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.logs import Progress, silent
from gigatome.core.seeding import generator
from gigatome.evaluation import metrics
from gigatome.evaluation.heads import FittedHead, Head, Outcome, Prediction, fit_head
from gigatome.evaluation.result import EvaluationResult, FoldScore, Predictions, score
from gigatome.evaluation.splits import Split, Splits
from gigatome.evaluation.survival import score_folds, score_survival
from gigatome.evaluation.survival_result import SurvivalPredictions, SurvivalResult
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome, Units


@dataclass(frozen=True, eq=False)
class FoldResult:
    """What was predicted in one fold.

    Attributes:
        split: who trained and who was tested.
        predicted: the test units, in the order of ``split.test``.
        training_risk: float64, of the training units; empty for classes.
    """

    split: Split
    predicted: Prediction
    training_risk: NDArray[np.float64]


@final
@dataclass(frozen=True, eq=False)
class FoldRun(FoldResult):
    """What happened in one fold.

    Attributes:
        fitted: the head.
    """

    fitted: FittedHead


@dataclass(frozen=True)
class Setting:
    """What a result says about how it was made.

    Attributes:
        target: the outcome, in words.
        head: name of the head.
        options: of the head, as JSON holds them.
        encoder: name of the encoder.
        seed: of splits, training and resampling.
        resamples: of the bootstrap.
    """

    target: str
    head: str
    options: Mapping[str, Any]
    encoder: str
    seed: int
    resamples: int


def cross_validate(
    data: UnitData,
    units: Units,
    splits: Splits,
    head: Head,
    *,
    seed: int,
    permute: bool = False,
    progress: Progress = silent,
) -> list[FoldRun]:
    """Fits and predicts each split.

    Args:
        data: embeddings of ``units``, in their order.
        units: what is predicted.
        splits: who trains and who is tested.
        head: what learns.
        seed: of its training.
        permute: shuffle the outcomes of the training parts, so that nothing can be learnt: a null row.
        progress: called after each fold.

    Raises:
        EvaluationError: the head cannot learn from the units; the message says why.
        ConfigError: the head's options do not fit.
        RunError: a training fails.
    """
    runs = []
    for k, split in enumerate(splits.parts):
        outcome = _permuted(units.outcome, split, seed, k) if permute else units.outcome
        fitted = fit_head(head, data, outcome, split, seed=seed)
        survives = isinstance(units.outcome, SurvivalOutcome)
        training = fitted.predict(data.select(split.train)).risk if survives else np.zeros(0)
        runs.append(FoldRun(split, fitted.predict(data.select(split.test)), training, fitted))
        progress("evaluate", k + 1, len(splits))
    return runs


def class_result(
    units: Units, splits: Splits, runs: Sequence[FoldResult], setting: Setting, *, unlabelled: int = 0
) -> EvaluationResult:
    """Scores of predicted classes."""
    outcome = units.outcome
    assert isinstance(outcome, ClassOutcome)  # noqa: S101 - for the type checker
    tested = np.concatenate([run.split.test for run in runs])
    predictions = Predictions(
        slides=tuple(units.names[i] for i in tested),
        patients=tuple(units.patients[i] for i in tested),
        tiles=np.full(len(tested), -1),
        folds=np.repeat(np.arange(len(runs)), [len(run.split.test) for run in runs]),
        y=outcome.y[tested],
        probabilities=np.concatenate([run.predicted.probabilities for run in runs]),
    )
    folds = tuple(fold_score(k, run.split, outcome.y[run.split.test], run.predicted) for k, run in enumerate(runs))
    return score_classes(units, splits, predictions, folds, setting, unlabelled=unlabelled)


def score_classes(
    units: Units,
    splits: Splits,
    predictions: Predictions,
    folds: tuple[FoldScore, ...],
    setting: Setting,
    *,
    unlabelled: int = 0,
) -> EvaluationResult:
    """The result of predictions of classes."""
    outcome = units.outcome
    assert isinstance(outcome, ClassOutcome)  # noqa: S101 - for the type checker
    tested = set(predictions.slides)
    return EvaluationResult(
        target=setting.target,
        head=setting.head,
        options=setting.options,
        encoder=setting.encoder,
        level=units.level,
        classes=outcome.classes,
        n_slides=sum(len(slides) for name, slides in zip(units.names, units.slides, strict=True) if name in tested),
        n_patients=len(set(predictions.patients)),
        scores=score(
            predictions.y,
            predictions.probabilities,
            predictions.patients,
            seed=setting.seed,
            resamples=setting.resamples,
            inflation=inflation_of(splits.parts),
        ),
        by_slide={},
        folds=folds,
        predictions=predictions,
        seed=setting.seed,
        split=splits.name,
        split_hash=splits.digest,
        unlabelled=unlabelled,
        without_embeddings=left_out(units),
    )


def inflation_of(parts: Sequence[Split]) -> float:
    """Factor on the variance of the pooled scores of these splits, :func:`metrics.fold_inflation`."""
    distinct = len(set(np.concatenate([part.test for part in parts]).tolist()))
    return metrics.fold_inflation([len(part.train) for part in parts], [len(part.test) for part in parts], distinct)


def left_out(units: Units) -> tuple[str, ...]:
    """Names, sorted, of the labelled units without usable embeddings."""
    reasons = ("no embeddings", "no tiles", "embeddings that are not finite")
    return tuple(sorted(name for reason in reasons for name in units.excluded.get(reason, ())))


def fold_score(k: int, split: Split, y: NDArray[np.int64], predicted: Prediction) -> FoldScore:
    """Scores of one fold; NaN where it lacks a class."""
    complete = len(np.unique(y)) == predicted.probabilities.shape[1]
    return FoldScore(
        fold=k,
        n_train=len(split.train),
        n_test=len(split.test),
        auroc=metrics.auroc(y, predicted.probabilities) if complete else float("nan"),
        balanced_accuracy=metrics.balanced_accuracy(y, predicted.probabilities) if complete else float("nan"),
    )


def survival_result(units: Units, splits: Splits, runs: Sequence[FoldResult], setting: Setting) -> SurvivalResult:
    """Scores of predicted risks."""
    outcome = units.outcome
    assert isinstance(outcome, SurvivalOutcome)  # noqa: S101 - for the type checker
    tested = np.concatenate([run.split.test for run in runs])
    predictions = SurvivalPredictions(
        names=tuple(units.names[i] for i in tested),
        patients=tuple(units.patients[i] for i in tested),
        folds=np.repeat(np.arange(len(runs)), [len(run.split.test) for run in runs]),
        time=outcome.time[tested],
        event=outcome.event[tested],
        risk=np.concatenate([run.predicted.risk for run in runs]),
        high=np.concatenate([run.predicted.risk > np.median(run.training_risk) for run in runs]),
        survival=np.concatenate([run.predicted.survival for run in runs]),
        edges=np.concatenate([np.tile(run.predicted.edges, (len(run.split.test), 1)) for run in runs]),
    )
    follow = [(outcome.time[run.split.train], outcome.event[run.split.train]) for run in runs]
    return SurvivalResult(
        target=setting.target,
        unit=outcome.unit,
        head=setting.head,
        options=setting.options,
        encoder=setting.encoder,
        level=units.level,
        n_slides=sum(len(units.slides[i]) for i in set(tested.tolist())),
        n_patients=len(set(predictions.patients)),
        scores=score_survival(
            predictions,
            follow,
            seed=setting.seed,
            resamples=setting.resamples,
            inflation=inflation_of([run.split for run in runs]),
        ),
        folds=score_folds(predictions, [len(run.split.train) for run in runs]),
        predictions=predictions,
        seed=setting.seed,
        split=splits.name,
        split_hash=splits.digest,
        excluded={reason: len(names) for reason, names in units.excluded.items()},
    )


def result_of(
    units: Units, splits: Splits, runs: Sequence[FoldResult], setting: Setting, *, unlabelled: int = 0
) -> EvaluationResult | SurvivalResult:
    """Scores of whatever was predicted."""
    if isinstance(units.outcome, SurvivalOutcome):
        return survival_result(units, splits, runs, setting)
    return class_result(units, splits, runs, setting, unlabelled=unlabelled)


def _permuted(outcome: Outcome, split: Split, seed: int, fold: int) -> Outcome:
    """The outcome with those of the training, and of the validation part, dealt out anew within it."""
    order = np.arange(len(outcome.y if isinstance(outcome, ClassOutcome) else outcome.time))
    for name, part in (("train", split.train), ("val", split.val)):
        order[part] = generator(seed, "permuted", fold, name).permutation(part)
    if isinstance(outcome, ClassOutcome):
        return ClassOutcome(outcome.classes, outcome.y[order])
    return SurvivalOutcome(outcome.time[order], outcome.event[order], outcome.unit, outcome.spelt)

"""Outcomes as networks learn and say them: targets and loss on the one side, logits as predictions on the other."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.heads import Outcome, Prediction
from gigatome.evaluation.units import ClassOutcome
from gigatome.mil import losses
from gigatome.mil.model import Criterion, Targets


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What a network's loss is.

    Attributes:
        smoothing: of the labels, share of each that is spread over all classes.
        balanced: weigh classes so that each counts alike.
        survival_loss: ``"nll"`` of time bins, ``"cox"`` or ``"ranking"``; the last two compare the units of a batch.
        alpha: of ``"nll"``, weight taken from those who are censored.
        bins: of ``"nll"``, time bins with equally many events.
        bins_from: of whose times: of the ``"train"`` part, or of the whole ``"cohort"`` as MCAT and HIPT do, which
            tells the model a little of the test part.
    """

    smoothing: float = 0.0
    balanced: bool = False
    survival_loss: Literal["nll", "cox", "ranking"] = "nll"
    alpha: float = 0.0
    bins: int = 4
    bins_from: Literal["train", "cohort"] = "train"


@dataclass(frozen=True, eq=False)
class Task:
    """What a network learns.

    Attributes:
        targets: of all units.
        criterion: the loss.
        outputs: logits of a unit.
        classes: how many classes; 0 for survival.
        edges: float64 [bins + 1] of the time bins; empty without any.
    """

    targets: Targets
    criterion: Criterion
    outputs: int
    classes: int
    edges: NDArray[np.float64]


def task_of(outcome: Outcome, train: NDArray[np.int64], options: LossOptions) -> Task:
    """The task of an outcome.

    Args:
        outcome: of all units.
        train: int64, those that are learnt from.
        options: of the loss.

    Raises:
        EvaluationError: there are no time bins, as too few training units have an event.
    """
    if isinstance(outcome, ClassOutcome):
        count = len(outcome.classes)
        weights = losses.class_weights(outcome.y[train], count) if options.balanced else None
        criterion = losses.cross_entropy(smoothing=options.smoothing, weights=weights)
        return Task(Targets(torch.from_numpy(outcome.y)), criterion, count, count, np.zeros(0))
    time, event = outcome.time, outcome.event
    known = torch.from_numpy(time.astype(np.float32)), torch.from_numpy(event)
    if options.survival_loss != "nll":
        criterion = losses.cox() if options.survival_loss == "cox" else losses.ranking()
        return Task(Targets(torch.zeros(len(time), dtype=torch.int64), *known), criterion, 1, 0, np.zeros(0))
    if not event[train].any():
        raise EvaluationError("no training unit has an event, so there are no time bins; use other splits")
    whose = train if options.bins_from == "train" else np.arange(len(time))
    bins = losses.time_bins(time[whose], event[whose], options.bins)
    targets = Targets(torch.from_numpy(bins.of(time)), *known)
    return Task(targets, losses.survival_nll(options.alpha), options.bins, 0, bins.edges)


def prediction_of(
    logits: NDArray[np.float64],
    classes: int,
    edges: NDArray[np.float64],
    attention: tuple[NDArray[np.float32], ...] | None = None,
) -> Prediction:
    """What logits float64 [M, outputs] say.

    Args:
        logits: of M units.
        classes: how many classes; 0 for survival.
        edges: float64 [bins + 1] of the time bins; empty without any.
        attention: to go with it.
    """
    values, none = torch.from_numpy(logits), np.zeros((len(logits), 0))
    if classes:
        return Prediction(values.softmax(1).numpy(), attention=attention)
    curve = losses.survival_curve(values).numpy() if len(edges) else none
    return Prediction(none, losses.risk(values).numpy(), curve, edges[1:], attention)

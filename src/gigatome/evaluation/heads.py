"""Heads of both kinds behind one seam: probes of a unit's mean embedding, and models of its whole bag."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gigatome import config
from gigatome.core.errors import EvaluationError
from gigatome.evaluation.cox import Cox
from gigatome.evaluation.probes import PROBES, Probe, find_probe
from gigatome.evaluation.splits import Split
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome

if TYPE_CHECKING:
    from gigatome.evaluation.bag_head import BagHead

Head: TypeAlias = "Probe | Cox | BagHead"
Outcome: TypeAlias = ClassOutcome | SurvivalOutcome


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a head says of M units.

    Attributes:
        probabilities: float64 [M, classes]; [M, 0] of a survival.
        risk: float64 [M], higher for a shorter life; empty for classes.
        survival: float64 [M, bins], probability of surviving each time bin; [M, 0] where the head gives none.
        edges: float64 [bins], end of each bin.
        attention: float32 [tiles, K] of each unit, in the order of its slides' tiles, or regions, whichever the head
            takes; None where the head has none, or nobody asked.
    """

    probabilities: NDArray[np.float64]
    risk: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    survival: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    edges: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    attention: tuple[NDArray[np.float32], ...] | None = None


class FittedHead(Protocol):
    """A head that has learnt."""

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of :meth:`UnitData.bags`; nothing, if it sees means alone."""
        ...

    def predict(self, data: UnitData, *, attention: bool = False) -> Prediction:
        """What it says of all units of ``data``."""
        ...

    def saved(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What :func:`restore_head` needs: values as JSON holds them, and arrays by name."""
        ...


def find_head(head: "str | Head", options: Mapping[str, Any] | None = None) -> tuple[str, Head]:
    """Name and options of a head.

    Args:
        head: its name, or itself.
        options: of a probe, or of a bag model and its training, by name, in place of the defaults; see
            :func:`bag_head`. With ``model``, the name of a probe or bag model, ``head`` may be any name.

    Raises:
        EvaluationError: there is no such head.
        ConfigError: there is no such option.
    """
    if not isinstance(head, str):
        from gigatome.evaluation.bag_head import BagHead

        if isinstance(head, BagHead):
            return head.model, head
        return ("cox", head) if isinstance(head, Cox) else find_probe(head)
    given = dict(options or {})
    model = str(given.pop("model", head))
    if is_probe(model):
        probe = Cox() if model == "cox" else find_probe(model)[1]
        return head, config.parse(type(probe), {**config.to_dict(probe), **given}, source=head) if given else probe
    from gigatome.evaluation.bag_head import bag_head
    from gigatome.mil.zoo import MODELS

    if model not in MODELS:
        raise EvaluationError(f"there is no head {model}; there are {', '.join([*PROBES, 'cox', *MODELS])}")
    return head, bag_head(model, given)


def is_probe(head: str) -> bool:
    """Whether a head of this name sees mean embeddings, not bags."""
    return head in PROBES or head == "cox"


def fit_head(head: Head, data: UnitData, outcome: Outcome, split: Split, *, seed: int) -> FittedHead:
    """Fits a head to the training part of a split; a bag model may look at the validation part too.

    Raises:
        EvaluationError: the head cannot learn from these units.
        ConfigError: the head's options do not fit the outcome.
        RunError: its training fails.
    """
    from gigatome.evaluation.probe_head import fit_probe_head

    if isinstance(head, Probe | Cox):
        return fit_probe_head(head, data, outcome, split.train)
    from gigatome.evaluation.bag_head import fit_bag_head

    return fit_bag_head(head, data, outcome, split, seed=seed)


def restore_head(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> FittedHead:
    """The head that :meth:`FittedHead.saved` describes; raises :class:`StoreError` for what is none."""
    if values.get("kind") == "probe":
        from gigatome.evaluation.probe_head import restore_probe_head

        return restore_probe_head(values, arrays)
    from gigatome.evaluation.bag_head import restore_bag_head

    return restore_bag_head(values, arrays)

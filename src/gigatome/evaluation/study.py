"""A study: heads and encoders compared on one target and one set of splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gigatome.evaluation.comparison import Comparison
from gigatome.evaluation.result import EvaluationResult
from gigatome.evaluation.survival_result import SurvivalResult

Result: TypeAlias = EvaluationResult | SurvivalResult


@dataclass(frozen=True)
class Arm:
    """One line of a study's tables.

    Attributes:
        label: what is compared, such as "ABMIL on vits16".
        result: what was found.
        null: a row that knows nothing, such as permuted labels or random weights.
        reported: the paper's value of the main score, if it reproduces one, and its source.
        reported_sd: the paper's standard deviation over folds; None if it prints none.
        source: paper, table and row.
    """

    label: str
    result: Result
    null: bool = False
    reported: float | None = None
    reported_sd: float | None = None
    source: str = ""


@dataclass(frozen=True)
class FewShot:
    """A point of a learning curve.

    Attributes:
        label: the arm.
        n_train: training slides, or slides of each class where ``per_class``.
        scores: main score of each repetition.
        per_class: what ``n_train`` counts.
    """

    label: str
    n_train: int
    scores: tuple[float, ...]
    per_class: bool = False


@dataclass(frozen=True, eq=False)
class AttendedTile:
    """A tile that a head looked at most, or least.

    Attributes:
        slide: its slide.
        x: left edge in level-0 pixels.
        y: top edge.
        attention: its share of the slide's attention.
        top: whether it is among the most, not the least, attended.
        image: uint8 [S, S, 3].
        label: what the slide is, and what was predicted.
    """

    slide: str
    x: int
    y: int
    attention: float
    top: bool
    image: np.ndarray
    label: str


@dataclass(frozen=True)
class Study:
    """Everything that a report shows.

    Attributes:
        title: what was asked, such as "subtype on brca.csv".
        arms: in the order of the tables; all on the same splits.
        comparisons: paired tests between arms.
        few_shot: learning curves; may be empty.
        tiles: of the first arm with attention; may be empty.
        settings: everything that decides the result, nested, as JSON holds it.
        excluded: names that were left out, by reason.
        command: that makes it again.
    """

    title: str
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...] = ()
    few_shot: tuple[FewShot, ...] = ()
    tiles: tuple[AttendedTile, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    command: str = ""

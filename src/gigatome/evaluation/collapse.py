"""Says in plain words that a self-supervised run has collapsed, and what to try."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CollapseLimits:
    """When :func:`find_collapse` raises the alarm.

    A sound run of DINO, too, starts with embeddings that are nearly alike, few directions and, with many prototypes, a
    teacher that knows none of them: hence ``grace`` and the low limits.

    Attributes:
        unit_std: all embeddings are alike below this ``unit_std``; 0.02 is a mean cosine of 0.9996.
        rankme: they lie in one direction below this.
        fall: they have lost directions below this share of the run's highest ``rankme``.
        uniform: the teacher says nothing above this share of ln K, the greatest ``teacher_entropy``.
        single: it knows one prototype below this share.
        spread: all of MoCo's keys are alike below this.
        repeats: lines in a row that must show it.
        grace: share of the run in which nothing is said.
    """

    unit_std: float = 0.02
    rankme: float = 1.1
    fall: float = 0.25
    uniform: float = 0.998
    single: float = 0.02
    spread: float = 0.02
    repeats: int = 3
    grace: float = 0.1

    def __post_init__(self):
        if self.repeats < 1 or not 0 <= self.grace < 1:
            raise ValueError(f"repeats must be at least 1 and grace within 0 to 1, not {self.repeats}, {self.grace}")


def find_collapse(
    lines: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    prototypes: int | None = None,
    limits: CollapseLimits = CollapseLimits(),
) -> str | None:
    """The alarm for a run, or None.

    Args:
        lines: of ``metrics.jsonl``; looked at are ``rankme``, ``unit_std``, ``teacher_entropy``, ``spread``, where
            present.
        steps: length of the run.
        prototypes: K, outputs of the teacher's softmax; its entropy is not judged without.
        limits: when to raise the alarm.

    Returns:
        What has collapsed, by which figure, and what to try; one sentence or two for each sign.
    """
    if not lines or lines[-1]["step"] < limits.grace * steps:
        return None
    signs = [*_of_the_teacher(lines, prototypes, limits), *_of_the_embeddings(lines, limits)]
    return " ".join(signs) or None


def _of_the_teacher(lines: Sequence[Mapping[str, Any]], prototypes: int | None, limits: CollapseLimits) -> list[str]:
    most = math.log(prototypes) if prototypes else 0.0
    entropies = _last(lines, "teacher_entropy", limits.repeats) if most else []
    if entropies and min(entropies) > limits.uniform * most:
        return [
            f"The teacher says the same of every tile, that all prototypes are equally likely (teacher_entropy "
            f"{entropies[-1]:.3g} of {most:.3g}): sharpen it by a lower teacher_temperature, or centre it less."
        ]
    if entropies and max(entropies) < limits.single * most:
        return [
            f"The teacher knows one prototype only (teacher_entropy {entropies[-1]:.2g} of {most:.3g}): centre it "
            "faster by a lower center_momentum, raise teacher_temperature, or, with small batches, set head_batch_norm."
        ]
    spreads = _last(lines, "spread", limits.repeats)
    if spreads and max(spreads) < limits.spread:
        return [
            f"All keys are alike (spread {spreads[-1]:.2g}, 1 at best): lower the learning rate, or raise the batch "
            "size, the queue or the temperature."
        ]
    return []


def _of_the_embeddings(lines: Sequence[Mapping[str, Any]], limits: CollapseLimits) -> list[str]:
    if "rankme" in lines[-1] and lines[-1]["rankme"] is None:
        return [
            "The embeddings are all zero or not finite: go back to an earlier checkpoint with a lower learning rate "
            "or precision fp32."
        ]
    stds = _last(lines, "unit_std", limits.repeats)
    ranks = _last(lines, "rankme", limits.repeats)
    if (stds and max(stds) < limits.unit_std) or (ranks and max(ranks) < limits.rankme):
        figures = ", ".join(
            f"{name} {values[-1]:.3g}" for name, values in (("unit_std", stds), ("rankme", ranks)) if values
        )
        return [
            f"All tiles get nearly the same embedding ({figures}): lower the learning rate or lengthen its warm-up, "
            "and use larger batches or milder views; if the teacher is named above, that comes first."
        ]
    highest = max(_last(lines, "rankme"), default=0.0)
    if ranks and max(ranks) < limits.fall * highest:
        return [
            f"The embeddings use ever fewer directions (rankme {ranks[-1]:.3g}, and {highest:.3g} before): lower the "
            "learning rate or the final weight decay, or keep embeddings apart by the KoLeo term of DINOv2."
        ]
    return []


def _last(lines: Sequence[Mapping[str, Any]], key: str, count: int = 0) -> list[float]:
    """The last ``count`` values (0: all) of the lines that have one; none if there are fewer."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return values[-count:] if len(values) >= count else []

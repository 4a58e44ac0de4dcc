"""Values that change during a run, as pure functions of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where a run stands.

    Attributes:
        step: steps finished before this one.
        steps: steps of the whole run.
        epoch_steps: steps of one epoch.
    """

    step: int
    steps: int
    epoch_steps: int

    @property
    def epoch(self) -> int:
        """Epochs finished before this step."""
        return self.step // self.epoch_steps


def cosine(clock: Clock, start: float, end: float, *, warmup_steps: int = 0) -> float:
    """Half a cosine from ``start`` to ``end``, after a linear warm-up from 0 to ``start``.

    The warm-up is 0 at its first step and ``start`` at its last; the cosine is ``start`` at its first step and would
    be ``end`` one step after the run's last.

    Source: ``cosine_scheduler`` of facebookresearch/dino, whose values these are.
    """
    if clock.step < warmup_steps:
        return start * clock.step / max(1, warmup_steps - 1)
    part = (clock.step - warmup_steps) / (clock.steps - warmup_steps)
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def stairs(clock: Clock, start: float, end: float, *, epochs: int) -> float:
    """From ``start`` in the first epoch to ``end`` in epoch number ``epochs``, then ``end``; constant in an epoch.

    Source: the teacher's temperature in facebookresearch/dino, whose values these are.
    """
    if clock.epoch >= epochs:
        return end
    return start + (end - start) * clock.epoch / max(1, epochs - 1)

"""The end of a step: it is saved, evaluated and written down, in this order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from gigatome.core.seeding import torch_seed
from gigatome.distributed import SequenceGroup
from gigatome.training.checkpoint import Checkpoint, save_checkpoint
from gigatome.training.flops import FlopCounter
from gigatome.training.interrupts import Interrupts
from gigatome.training.launch import Control
from gigatome.training.method import Method, Stream
from gigatome.training.options import FitOptions
from gigatome.training.parallel import Parallel
from gigatome.training.random_state import seed_all
from gigatome.training.record import MetricsFile


@final
@dataclass(frozen=True)
class Books:
    """Keeps a run's checkpoints and ``metrics.jsonl`` so that no kill costs a step that was saved, or an evaluation.

    An evaluation may take hours, so it comes after the save. The checkpoint holds the line of its step; if the file
    lacks it when the run goes on, the line is made up there. All processes of a run call each method together.

    Attributes:
        out: folder of the run.
        options: of the run.
        identity: of the run.
        group: this process's place among those that share sequences.
        method: that learns.
        parallel: its networks.
        optimizer: of them.
        stream: that it learns from.
        flops: operations that were counted.
        metrics: the file, and other sinks.
        evaluate: the evaluation hook.
        control: by which the processes wait for each other, however long.
        interrupts: signals to this process.
    """

    out: Path
    options: FitOptions
    identity: str
    group: SequenceGroup
    method: Method
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    stream: Stream
    flops: FlopCounter
    metrics: MetricsFile
    evaluate: Callable[[int], Mapping[str, Any]] | None
    control: Control
    interrupts: Interrupts

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        return self.evaluate is not None and is_due(step, self.options.total_steps, self.options.evaluate_every)

    def make_up(self, last: Checkpoint) -> bool:
        """Writes the line of a checkpoint that the run has just been restored from, if the file lacks it.

        Returns:
            False if a signal has come before an evaluation that is due: the run is to stop here.
        """
        if not last.line or self.control.gather(self.metrics.last.get("step"))[0] == last.step:
            return True
        found: Mapping[str, Any] = {}
        if self.evaluates(last.step):
            if self._asked_to_stop():
                return False
            found = self._evaluated(last.step)
        self.control.on_first(partial(self.metrics.write, {**last.line, **found}))
        return True

    def close(self, step: int, line: Mapping[str, Any], *, saving: bool, stopping: bool) -> bool:
        """Saves, evaluates and writes down what is due after so many steps.

        Args:
            step: steps finished.
            line: for ``metrics.jsonl``.
            saving: whether a checkpoint is due.
            stopping: the run stops here: it is not evaluated, and its line is made up if it should have been.

        Returns:
            Whether the run stops here, as it was to before or as a signal has come while it was evaluated.
        """
        if saving:
            self._save(step, line)
        if self.evaluates(step):
            if stopping:
                return True
            line = {**line, **self._evaluated(step)}
            stopping = step < self.options.total_steps and self._asked_to_stop()
            if stopping and not saving:
                self._save(step, line)
        self.control.on_first(partial(self.metrics.write, line))
        return stopping

    def _asked_to_stop(self) -> bool:
        return self.control.any(self.interrupts.seen is not None)

    def _evaluated(self, step: int) -> Mapping[str, Any]:
        """What the hook finds: the same whether the run has just done the step or goes on from it."""
        assert self.evaluate is not None  # noqa: S101 - as it is due
        seed_all(torch_seed(self.options.seed, "evaluation", step, self.group.sequence))
        with self.parallel.whole():
            found = self.evaluate(step)
        self.method.train()
        return found

    def _save(self, step: int, line: Mapping[str, Any]) -> None:
        self.parallel.check_replicas()
        groups = {"model": self.parallel.state(), "optimizer": self.parallel.optimizer_state(self.optimizer)}
        save = partial(save_checkpoint, self.out / "checkpoints", step, groups, identity=self.identity, line=line)
        streams = self.control.gather(self.stream.state())
        self.control.on_first(partial(save, keep=self.options.keep, streams=streams, flops=self.flops.counts))


def is_due(done: int, steps: int, every: int) -> bool:
    """Whether what comes every so many steps, and at the end, comes after ``done`` of ``steps``."""
    return done == steps or (every > 0 and done % every == 0)

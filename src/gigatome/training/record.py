"""What a run writes about itself: means over steps, kept on the device, and the file and other places they go to."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gigatome.blob.store import write_atomic
from gigatome.core.errors import RunError
from gigatome.core.logs import log


class Meter:
    """Means of the steps since they were last read; adding to it does not make the host wait for the device.

    Attributes:
        bad_in_a_row: int scalar on the device: greatest number so far of neighbouring steps that were not finite.
    """

    def __init__(self, device: torch.device):
        self.bad_in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self._bad_now = torch.zeros((), dtype=torch.long, device=device)
        self._skipped = torch.zeros((), dtype=torch.long, device=device)
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._good = torch.zeros((), dtype=torch.long, device=device)
        self._latest: Tensor | None = None
        self._steps, self._images, self._waited = 0, 0, 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, values: Mapping[str, Tensor], finite: Tensor, images: int) -> None:
        """Adds a step: float scalars by name, of no account if ``finite`` (bool scalar) is false."""
        self._names = list(values)
        self._latest = torch.stack([value.detach().float() for value in values.values()])
        counted = torch.where(finite, self._latest, 0.0)
        self._sums = counted if self._sums is None else self._sums + counted
        self._good += finite
        self._skipped += ~finite
        self._bad_now = torch.where(finite, 0, self._bad_now + 1)
        self.bad_in_a_row = torch.maximum(self.bad_in_a_row, self._bad_now)
        self._steps += 1
        self._images += images

    def latest(self) -> dict[str, float]:
        """Values of the last step, finite or not."""
        return {} if self._latest is None else dict(zip(self._names, self._latest.tolist(), strict=True))

    def read(self) -> dict[str, float | int | None]:
        """Means of the finite steps since the last call (None without any), rates and times, and steps left out."""
        good = int(self._good)
        sums = [] if self._sums is None else self._sums.tolist()
        now = time.perf_counter()
        line: dict[str, float | int | None] = {
            name: total / good if good else None for name, total in zip(self._names, sums, strict=True)
        }
        line["skipped"] = int(self._skipped)
        line["images_per_s"] = round(self._images / (now - self._since), 2)
        line["data_wait_s"] = round(self._waited / max(1, self._steps), 5)
        line["time"] = round(time.time(), 3)
        self._sums, self._steps, self._images, self._waited, self._since = None, 0, 0, 0.0, now
        self._good.zero_()
        return line


class Sink(Protocol):
    """Another place for the lines of ``metrics.jsonl``, such as those of :mod:`gigatome.training.sinks`."""

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after ``step``."""
        ...

    def write(self, line: Mapping[str, Any]) -> None:
        """Takes a line: numbers, None and text by name, and the ``step``."""
        ...

    def close(self) -> None:
        """The run ends here; for whoever made the sink to call."""
        ...


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, only ever added to within a run.

    Args:
        path: of the file.
        step: the run goes on from here; lines of later steps, and a line cut short, are removed.
        sinks: get every line too. One that fails is left out from then on, with a warning: the run goes on.
    """

    def __init__(self, path: Path, step: int, sinks: Sequence[Sink] = ()):
        self.path, self._sinks = path, list(sinks)
        self.last: Mapping[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        kept = [line for line in text.splitlines() if _step_of(line) <= step]
        if kept:
            self.last = json.loads(kept[-1])
        whole = "".join(f"{line}\n" for line in kept)
        if whole != text:
            write_atomic(path, whole)
        for sink in sinks:
            self._tell(sink, sink.begin, step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; raises :class:`RunError` if it cannot be written."""
        self.last = dict(line)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(self.last) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error}); the checkpoints stand") from error
        for sink in list(self._sinks):
            self._tell(sink, sink.write, self.last)

    def _tell(self, sink: Sink, call: Callable[[Any], None], what: Any) -> None:
        try:
            call(what)
        except Exception as error:  # a server that cannot be reached must not end a week's training
            log.warning("%s gets no more metrics: %s; metrics.jsonl has them all", type(sink).__name__, error)
            self._sinks.remove(sink)


def _step_of(line: str) -> float:
    """Step of a line; infinity for one that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

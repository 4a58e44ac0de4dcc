"""How long work reports on itself: a progress callback, the log, and the list of slides that failed."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Protocol

log = logging.getLogger("gigatome")
"""The library's only logger; it prints nothing unless the application configures it."""


class Progress(Protocol):
    """Called by long work after each unit; the command line draws a bar from it."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """The default :class:`Progress`: says nothing."""


@dataclass(frozen=True)
class Failure:
    """One slide that a batch could not process, and why."""

    slide: str
    stage: str
    error: str
    message: str

    @classmethod
    def of(cls, slide: str, stage: str, error: Exception) -> "Failure":
        """Failure of ``slide`` at ``stage`` (``"tissue"``, ``"embed"`` …) from the exception it raised."""
        return cls(slide, stage, type(error).__name__, getattr(error, "message", str(error)))


def write_failures(path: str | Path, failures: Sequence[Failure]) -> None:
    """Writes ``failures.csv`` with columns slide, stage, error, message; removes an old one when all went well."""
    path = Path(path)
    if not failures:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([field.name for field in fields(Failure)])
        writer.writerows(astuple(failure) for failure in failures)
    temporary.replace(path)

"""Published splits, read as they are, and splits of ours, written as Patho-Bench's table.

| whose | what |
|---|---|
| CLAM, HIPT | ``splits_{k}.csv``: index, ``train``, ``val``, ``test`` with names of slides |
| CLAM | ``splits_{k}_bool.csv``: name, and true in one of ``train``, ``val``, ``test`` |
| MCAT, HIPT's survival | ``splits_{k}.csv``: index, ``train``, ``val`` with names of patients; ``val`` tests |
| Giga-SSL | ``split_{k}.csv``: ``train``, ``test`` with names of slides |
| Patho-Bench, ours | ``k=all.tsv``: ``case_id``, ``slide_id``, and ``fold_{k}`` with ``train``, ``val``, ``test`` |
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gigatome.blob.store import write_atomic
from gigatome.core.errors import CohortError, EvaluationError
from gigatome.core.logs import log
from gigatome.evaluation.cells import name_of
from gigatome.evaluation.splits import Group, Split, Splits, finish, groups_of
from gigatome.evaluation.tables import PATHO_BENCH, Table, read_table
from gigatome.evaluation.units import ClassOutcome, Units

_SIDES = ("train", "val", "test")
_FILE = re.compile(r"splits?_(\d+)(_bool)?\.csv")
_TRUE, _FALSE = frozenset(("true", "1", "1.0")), frozenset(("false", "0", "0.0", ""))


@dataclass(frozen=True)
class _Published:
    """A fold as a table has it: the side of each slide or patient it names, ``(slide or "", patient or "")``."""

    where: str
    sides: Mapping[tuple[str, str], str]


def read_splits(
    path: str | Path, units: Units, *, leaks: Literal["error", "warn"] = "error", group: Group = "patient"
) -> Splits:
    """Reads published splits, for the units that are at hand.

    Args:
        path: a table of one split or of all, or a folder of them.
        units: what is predicted. A table of slides may split patients: a patient's side is then that of its slides.
        leaks: what to do about a patient (or site) in both the test part and another: refuse the splits, or keep them
            as published and list who it is in their warnings. A unit that is itself on two sides, a patient whose
            slides are split, then only tests.
        group: what should be on one side only.

    Returns:
        The splits, in the order of their numbers. What the table names and is not at hand, or the reverse, is counted
        in their warnings.

    Raises:
        EvaluationError: there is no such table; one slide is on two sides; nothing of it is at hand; a part is empty,
            cannot test or learn a class; patients leak, unless ``leaks="warn"``; or a table that gigatome wrote was
            changed since.
    """
    if leaks not in ("error", "warn"):
        raise EvaluationError(f"leaks is error or warn, not {leaks!r}")
    published, note = _read_all(Path(path))
    index, absent = _index(published, units, str(path))
    parts: list[Split] = []
    warnings: list[str] = []
    for fold in published:
        part, torn = _part(fold, index, len(units))
        warnings += _torn(fold.where, [units.names[i] for i in torn], leaks)
        warnings += _leaks(part, fold.where, units, group, leaks)
        parts.append(part)
    if absent:
        warnings.append(f"{absent} of the names in {Path(path).name} are not at hand")
    used = np.unique(np.concatenate([np.concatenate([p.train, p.val, p.test]) for p in parts]))
    if len(used) < len(units):
        warnings.append(
            f"{len(units) - len(used)} of {len(units)} units are not in {Path(path).name}, and are left out"
        )
    for warning in warnings:
        log.warning("%s", warning)
    title = f"{len(parts)} split{'s'[: len(parts) != 1]} of {Path(path).name}{note}"
    alone = all(len({units.patients[i] for i in part.test.tolist()}) == 1 for part in parts)
    splits = finish(units, parts, title, alone=alone, warnings=warnings)
    if not absent:
        _check_hash(Path(path) / PATHO_BENCH if Path(path).is_dir() else Path(path), units, splits)
    return splits


def write_splits(path: str | Path, units: Units, splits: Splits) -> None:
    """Writes splits as Patho-Bench's table, a row a slide, and what they are beside it.

    ``case_id``, ``slide_id``, the outcome (``label``, or ``time`` and ``event``), and ``fold_0``, ``fold_1`` … with
    ``train``, ``val``, ``test`` or nothing. ``<path>.json`` holds their name, hash and warnings; :func:`read_splits`
    checks the hash.

    Args:
        path: the ``.tsv``.
        units: what was split.
        splits: of them.
    """
    outcome = units.outcome
    if isinstance(outcome, ClassOutcome):
        columns, told = ["label"], [[outcome.classes[y]] for y in outcome.y.tolist()]
    else:
        pairs = zip(outcome.time.tolist(), outcome.event.tolist(), strict=True)
        columns, told = ["time", "event"], [[repr(time), str(int(event))] for time, event in pairs]
    sides = [{i: side for side in _SIDES for i in getattr(part, side).tolist()} for part in splits.parts]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["case_id", "slide_id", *columns, *(f"fold_{k}" for k in range(len(sides)))])
    for i, patient in enumerate(units.patients):
        for slide in units.slides[i]:
            writer.writerow([patient, slide, *told[i], *(side.get(i, "") for side in sides)])
    write_atomic(path, text.getvalue())
    about = {
        "name": splits.name, "digest": splits.digest, "level": units.level, "units": len(units),
        "overlapping": splits.overlapping, "warnings": splits.warnings,
    }  # fmt: skip
    write_atomic(f"{path}.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _read_all(path: Path) -> tuple[list[_Published], str]:
    """Every fold of a table or folder, and a word on how it was read."""
    if not path.is_dir():
        return _read_file(path)
    if (path / PATHO_BENCH).is_file():
        return _read_file(path / PATHO_BENCH)
    found = sorted((int(m[1]), bool(m[2]), file) for file in path.iterdir() if (m := _FILE.fullmatch(file.name)))
    by_number: dict[int, Path] = {}
    for number, _, file in found:
        by_number.setdefault(number, file)  # the list of names before the table of true and false
    if not by_number:
        raise EvaluationError(
            f"{path}: holds no splits; splits_0.csv, splits_0_bool.csv, split_0.csv or {PATHO_BENCH} is needed"
        )
    gaps = sorted(set(range(max(by_number) + 1)) - set(by_number))
    if gaps:
        log.warning("%s: has no split %s", path, ", ".join(map(str, gaps)))
    folds, notes = [], set()
    for file in by_number.values():
        more, note = _read_file(file)
        folds += more
        notes.add(note)
    if len(notes) > 1:
        raise EvaluationError(f"{path}: some of its splits have a test part and some have not")
    return folds, notes.pop()


def _read_file(path: Path) -> tuple[list[_Published], str]:
    try:
        table = read_table(path)
    except CohortError as error:
        raise EvaluationError(f"the splits cannot be read: {error}") from error
    folds = sorted((c for c in table.header if re.fullmatch(r"fold_\d+", c)), key=lambda c: int(c[5:]))
    if folds:
        return [_read_column(table, column) for column in folds], ""
    lower = {column.lower(): column for column in table.header}
    here = {side: lower[side] for side in _SIDES if side in lower}
    if "train" not in here or len(here) < 2:
        raise EvaluationError(
            f"{path}: is no table of splits; it has {', '.join(table.header[:10])}, and columns train, val and test, "
            "or fold_0, fold_1 …, are needed"
        )
    sides: dict[tuple[str, str], str] = {}
    if all(row[here["train"]].lower() in _TRUE | _FALSE for row in table.rows):
        entries = _of_flags(table, here, path.name)
    else:
        entries = ((row[column], side) for side, column in here.items() for row in table.rows if row[column])
    for cell, side in entries:
        _put(sides, (name_of(cell), name_of(cell)), side, path.name)
    note = ""
    if "test" not in sides.values():
        sides = {name: "test" if side == "val" else side for name, side in sides.items()}
        note = ", whose val part tests"
    return [_Published(path.name, sides)], note


def _of_flags(table: Table, here: Mapping[str, str], where: str) -> Iterable[tuple[str, str]]:
    """Name and side of each row of a table of true and false."""
    name = table.header[0]
    for line, row in enumerate(table.rows, 2):
        on = [side for side, column in here.items() if row[column].lower() in _TRUE]
        off = [column for column in here.values() if row[column].lower() not in _TRUE | _FALSE]
        if off or len(on) > 1:
            raise EvaluationError(f"{where}, row {line}: {row[name]} is on two sides, or a cell is not true or false")
        if on:
            yield row[name], on[0]


def _read_column(table: Table, column: str) -> _Published:
    """A fold of Patho-Bench's table."""
    slide, patient = table.find(("slide_id",)), table.find(("case_id",))
    if slide is None and patient is None:
        raise EvaluationError(f"{table.source}: is no table of splits; it needs the column slide_id or case_id")
    where = f"{column} of {Path(table.source).name}"
    sides: dict[tuple[str, str], str] = {}
    for row in table.rows:
        key = (name_of(row[slide]) if slide else "", row[patient] if patient else "")
        side = row[column].lower()
        if side in _SIDES:
            _put(sides, key, side, where)
        elif side:
            raise EvaluationError(f"{where}: {key[0] or key[1]} is {side!r}, not train, val or test")
    return _Published(where, sides)


def _put(sides: dict[tuple[str, str], str], key: tuple[str, str], side: str, where: str) -> None:
    if sides.setdefault(key, side) != side:
        raise EvaluationError(f"{where}: {key[0] or key[1]} is in both {sides[key]} and {side}")


def _index(published: Sequence[_Published], units: Units, source: str) -> tuple[dict[tuple[str, str], list[int]], int]:
    """Units that each name of the tables stands for, and how many names stand for none.

    Names are those of slides where any is; otherwise those of patients.
    """
    of_slide: dict[str, list[int]] = defaultdict(list)
    of_patient: dict[str, list[int]] = defaultdict(list)
    for i, (slides, patient) in enumerate(zip(units.slides, units.patients, strict=True)):
        of_patient[patient].append(i)
        for slide in slides:
            of_slide[slide].append(i)
    keys = list(dict.fromkeys(key for fold in published for key in fold.sides))
    by_slide = any(slide in of_slide for slide, _ in keys)
    found = {key: (of_slide.get(key[0], []) if by_slide else of_patient.get(key[1], [])) for key in keys}
    absent = sum(not members for members in found.values())
    if absent == len(keys):
        raise EvaluationError(
            f"{source}: names nothing that is at hand; it has {' of '.join(dict.fromkeys(filter(None, keys[0])))}, the "
            f"cohort has {units.slides[0][0]} of {units.patients[0]}"
            if keys
            else f"{source}: names nothing"
        )
    return found, absent


def _part(fold: _Published, index: Mapping[tuple[str, str], Sequence[int]], count: int) -> tuple[Split, list[int]]:
    """A fold's units, and those that have slides on two sides, which are given to one: test, else val."""
    sides: dict[int, set[str]] = defaultdict(set)
    for key, side in fold.sides.items():
        for i in index[key]:
            sides[i].add(side)
    of = {i: next(side for side in ("test", "val", "train") if side in on) for i, on in sides.items()}
    members = {side: np.array([i for i in range(count) if of.get(i) == side], np.int64) for side in _SIDES}
    for side in ("train", "test"):
        if not len(members[side]):
            raise EvaluationError(f"{fold.where}: has no {side} unit among those with embeddings and labels")
    torn = sorted(i for i, on in sides.items() if len(on) > 1)
    return Split(members["train"], members["test"], members["val"]), torn


def _torn(where: str, names: Sequence[str], leaks: str) -> list[str]:
    """A warning about patients whose slides are on two sides, or an error."""
    if names and leaks == "error":
        raise EvaluationError(
            f"{where}: patients with slides on two sides: {len(names)}, such as {', '.join(names[:5])}; predict "
            'slides, or pass leaks="warn" to test them only'
        )
    listed = ", ".join(names)
    return [f"{where}: patients with slides on two sides, who only test: {listed} ({len(names)})"] if names else []


def _leaks(part: Split, where: str, units: Units, group: Group, leaks: str) -> list[str]:
    """Warnings about patients or sites on two sides; an error if those of the test part are not allowed for."""
    groups = groups_of(units, group)
    train, test, val = ({groups[i] for i in side.tolist()} for side in (part.train, part.test, part.val))
    told = []
    for first, second, shared in (
        ("train", "test", train & test),
        ("val", "test", val & test),
        ("train", "val", train & val),
    ):
        if not shared:
            continue
        what = f"{where}: {len(shared)} {group}{'s'[: len(shared) != 1]} in both {first} and {second}"
        if second == "test" and leaks == "error":
            raise EvaluationError(
                f"{what}, such as {', '.join(sorted(shared)[:5])}, so the score would be too good; make splits by "
                f'{group}, or pass leaks="warn" to reproduce published ones'
            )
        told.append(f"{what}: {', '.join(sorted(shared))}")
    return told


def _check_hash(path: Path, units: Units, splits: Splits) -> None:
    """Refuses a table that was changed since gigatome wrote it."""
    beside = Path(f"{path}.json")
    if not beside.is_file():
        return
    try:
        about: Any = json.loads(beside.read_text(encoding="utf-8"))
        same = about["level"] == units.level and about["units"] == len(units)
        wrong = same and about["digest"] != splits.digest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{beside}: does not say what the splits are ({error}); remove it") from error
    if wrong:
        raise EvaluationError(
            f"{path}: was changed since it was written: its hash is {splits.digest}, and {beside.name} says "
            f"{about['digest']}"
        )

"""What the cells of a table of labels state: nothing, a label, a time, an event; and whether names tell the outcome."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from gigatome.core.errors import EvaluationError
from gigatome.core.job import slide_id
from gigatome.slides.slide import SLIDE_SUFFIXES

MISSING = frozenset((
    "", "na", "n/a", "nan", "-nan", "none", "null", "<na>", "nat", "#n/a", "#na", "-", "--", "'--", "?", "missing",
    "not available", "[not available]", "not reported", "[not evaluated]", "[not applicable]", "[unknown]",
))  # fmt: skip
"""Cells that state nothing, compared without case: pandas' words for a missing value, and those of GDC's tables."""

_YES = frozenset(("1", "true", "yes", "y", "t"))
_NO = frozenset(("0", "false", "no", "n", "f"))
_EVENT = frozenset(("event", "uncensored", "progression", "progressed", "recurred", "recurred/progressed"))
_CENSORED = frozenset(("censored", "no event", "diseasefree", "disease free"))
_DEAD = frozenset(("dead", "deceased", "died", "death"))
_ALIVE = frozenset(("alive", "living"))
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def is_missing(cell: str | None) -> bool:
    """Whether a cell of a table states nothing."""
    return cell is None or cell.strip().lower() in MISSING


def plain_number(text: str) -> str:
    """A label as it is compared: a whole number without its decimals, ``"1.0"`` as ``"1"``; other text stripped."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return text
    value = float(text)
    return str(int(value)) if value.is_integer() else repr(value)


def name_of(cell: str) -> str:
    """Name of a slide that a table mentions, with or without path and ending; other dots are kept, as in TCGA."""
    if cell.lower().endswith((*SLIDE_SUFFIXES, ".h5", ".pt")):
        return slide_id(cell)
    return PurePosixPath(cell).name


def in_order(labels: Collection[str]) -> tuple[str, ...]:
    """Labels sorted, as numbers if all are, so that "10" follows "2"."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(set(labels), key=lambda label: (float(label), label)))
    return tuple(sorted(set(labels)))


def read_time(cell: str, name: str, column: str) -> float:
    """A survival time; raises :class:`EvaluationError`, which names whose it is, if it is no number above 0."""
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise EvaluationError(
            f"{column} of {name} is {cell!r}; a survival time is a number above 0: correct it, or empty the cell to "
            "leave this one out"
        )
    return value


def read_event(cell: str, name: str, column: str, *, censorship: bool) -> bool:
    """Whether the event was seen.

    Args:
        cell: 0 or 1, true or false, yes or no; or dead or alive, event or censored; or cBioPortal's ``1:DECEASED``.
        name: whose it is, for the message.
        column: its column, likewise.
        censorship: whether 1, true and yes mean that the event was not seen.

    Raises:
        EvaluationError: it is none of these, or says dead or alive in a column of censorship.
    """
    text = cell.lower()
    if re.match(r"[01]:", text):
        text = text[0]
    if text in _EVENT | _CENSORED:
        return text in _EVENT
    if text in _DEAD | _ALIVE and not censorship:
        return text in _DEAD
    if text in _DEAD | _ALIVE:
        raise EvaluationError(
            f"{column} of {name} is {cell!r}, so the column says who died and not who is censored: name it as the "
            "column of events"
        )
    if text not in _YES | _NO:
        raise EvaluationError(
            f"{column} of {name} is {cell!r}; whether the event was seen is 0 or 1, true or false, yes or no, dead or "
            "alive"
        )
    return (text in _YES) != censorship


def name_leak(slides: Mapping[str, tuple[str, ...]], patients: Sequence[str], labels: Sequence[str]) -> str:
    """A warning where a word of the slides' names tells the outcome; barcodes hold no words.

    A word counts if at least 95 of 100 patients with it, and at least half of those of the class, have that class, and
    it is of the class's name, or so many would have any such word by chance in fewer than 1 of 1000 cohorts.
    """
    of: dict[str, set[str]] = defaultdict(set)  # class → patients
    having: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # word → class → patients
    example: dict[tuple[str, str], str] = {}
    for names, patient, label in zip(slides.values(), patients, labels, strict=True):
        of[label].add(patient)
        for name in names:
            for word in set(re.findall(r"[a-z]{3,}", re.sub(r"TCGA-\S*", "", name).lower())):
                having[word][label].add(patient)
                example.setdefault((word, label), name)
    everyone = len(set(patients))
    for word, by_class in sorted(having.items()):
        label, inside = max(by_class.items(), key=lambda item: len(item[1]))
        total, share = len(set().union(*by_class.values())), len(of[label]) / everyone
        rare = word in label.lower() or len(having) * share ** len(inside) < 1e-3
        if rare and total < everyone and len(inside) >= max(3, 0.95 * total, 0.5 * len(of[label])):
            return (
                f"the name of the slide tells the outcome: {len(inside)} of {total} patients with {word!r} in it, such "
                f"as {example[word, label]}, have {label}; make sure that no scanner or hospital goes with the name"
            )
    return ""

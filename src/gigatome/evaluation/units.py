"""What is predicted: slides or patients, each with a class or a survival time, and who was left out and why.

A cohort's labels are text. Here they become an outcome::

    make_units(cohort, ClassTarget("subtype"), available=store.names())
    make_units(cohort, SurvivalTarget("survival_months", censorship="censorship"), level="patient")
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.logs import log
from gigatome.evaluation.cells import in_order, is_missing, name_leak, plain_number, read_event, read_time
from gigatome.slides.cohort import Cohort, CohortSlide

_BARCODE = re.compile(r"TCGA-([0-9A-Z]{2})-[0-9A-Z]{4}(?![0-9A-Z])")


@dataclass(frozen=True)
class ClassTarget:
    """The outcome is a class.

    Attributes:
        column: the label column.
    """

    column: str

    @property
    def spelt(self) -> str:
        """The target in words."""
        return self.column


@dataclass(frozen=True)
class SurvivalTarget:
    """The outcome is a time to an event that may not have been seen.

    Attributes:
        time: column of the times, from the same origin for everyone.
        event: column that says whether the event was seen: 1, true, yes, dead; or
        censorship: column with the other sign, 1 where the event was not seen. Exactly one of both.
        unit: of the times, for axes and text.

    Raises:
        EvaluationError: both signs or none are named.
    """

    time: str
    event: str | None = None
    censorship: str | None = None
    unit: str = "months"

    def __post_init__(self):
        if (self.event is None) == (self.censorship is None):
            raise EvaluationError(
                f"a survival target needs {self.time} and either the column of events (1 = event seen) or that of "
                f"censorship (1 = not seen); got event={self.event!r} and censorship={self.censorship!r}"
            )

    @property
    def status(self) -> str:
        """The column that says whether the event was seen, of either sign."""
        return self.event or self.censorship or ""

    @property
    def spelt(self) -> str:
        """The target in words, such as ``survival_months, event if censorship = 0``."""
        return f"{self.time}, event if {self.status} = {1 if self.event else 0}"


@dataclass(frozen=True, eq=False)
class ClassOutcome:
    """A class for each unit.

    Attributes:
        classes: their names; of two, the last is the positive one.
        y: int64 [N], index of each unit's class.
    """

    classes: tuple[str, ...]
    y: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SurvivalOutcome:
    """A time for each unit.

    Attributes:
        time: float64 [N], > 0.
        event: bool [N], whether the event was seen at that time, or the unit left sight then.
        unit: of the times.
        spelt: where both came from, in words.
    """

    time: NDArray[np.float64]
    event: NDArray[np.bool_]
    unit: str
    spelt: str


@dataclass(frozen=True, eq=False)
class Units:
    """What is predicted, sorted by name, so that no result depends on the order of a table.

    Attributes:
        level: whether a unit is a slide or a patient.
        names: of the units, N.
        patients: patient of each.
        slides: the slides of each that are at hand; one at level ``"slide"``.
        outcome: what is predicted of each.
        excluded: what was left out, by reason: ``"no label"``, ``"no embeddings"``, ``"label not in the map"`` name
            units, ``"slides without embeddings"`` names slides of patients that have others.
        sites: where each was made: TCGA's tissue source site of the barcode, or the column that was named; ``""`` where
            nothing says it. One hospital can have several codes in TCGA.
        warnings: what to tell the reader of the result.
        order: place of each in the cohort's table; that of its name by default.
    """

    level: Literal["slide", "patient"]
    names: tuple[str, ...]
    patients: tuple[str, ...]
    slides: tuple[tuple[str, ...], ...]
    outcome: ClassOutcome | SurvivalOutcome
    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.order:
            object.__setattr__(self, "order", tuple(range(len(self.names))))
        if not self.sites:
            object.__setattr__(self, "sites", tuple(map(site_of, self.patients, self.names)))
        size = len(self.outcome.y if isinstance(self.outcome, ClassOutcome) else self.outcome.time)
        if {len(self.names), len(self.patients), len(self.slides), len(self.sites)} != {size}:
            raise ValueError(f"{len(self.names)} names, {len(self.patients)} patients, {len(self.slides)} slides …")

    def __len__(self) -> int:
        return len(self.names)

    def site(self, i: int) -> str:
        """Site of unit ``i``."""
        return self.sites[i]

    def without(self, names: Collection[str], reason: str) -> "Units":
        """The units but some, which are excluded for a reason; raises :class:`EvaluationError` if nobody is left."""
        kept = np.flatnonzero([name not in names for name in self.names])
        if not len(kept):
            raise EvaluationError(f"nobody is left to predict: all {len(self)} {self.level}s have {reason}")
        outcome = self.outcome
        if isinstance(outcome, ClassOutcome):
            outcome = replace(outcome, y=outcome.y[kept])
        else:
            outcome = replace(outcome, time=outcome.time[kept], event=outcome.event[kept])
        lost = tuple(name for name in self.names if name in names)
        columns = (self.names, self.patients, self.slides, self.sites, self.order)
        names_, patients, slides, sites, order = (tuple(values[i] for i in kept) for values in columns)
        return replace(
            self, names=names_, patients=patients, slides=slides, sites=sites, order=order, outcome=outcome,
            excluded={**self.excluded, reason: (*self.excluded.get(reason, ()), *lost)},
        )  # fmt: skip


def make_units(
    cohort: Cohort,
    target: ClassTarget | SurvivalTarget,
    *,
    available: Collection[str] | None = None,
    level: Literal["slide", "patient"] = "slide",
    label_map: Mapping[str, str] | None = None,
    site: str | None = None,
    classes: Sequence[str] | None = None,
) -> Units:
    """Reads the outcome of a cohort's slides or patients, and counts those it must leave out.

    Args:
        cohort: slides, patients and labels; a slide may have several rows that agree.
        target: what is predicted. Classes are text; if all are numbers they are sorted as numbers, and 1.0 is 1.
        available: names of the slides that have embeddings; None means all of them.
        level: what a unit is. A patient's slides are one bag, and must agree on the outcome.
        label_map: another name for labels, many to one; units with other labels are left out.
        site: column of the site; by default it is read off TCGA barcodes.
        classes: names and order of the classes, where another cohort fixes them.

    Raises:
        CohortError: there is no such column.
        EvaluationError: two rows of a slide, or two slides of a patient at level ``"patient"``, disagree; a time is no
            number above 0; an event is no yes or no; everyone is censored; or nobody is left.
    """
    columns = [target.column] if isinstance(target, ClassTarget) else [target.time, target.status]
    for column in columns + ([site] if site else []):
        cohort.column(column)  # refuses a column that is not there, with the nearest name
    owners: dict[str, str] = {}
    for slide in cohort:
        if owners.setdefault(slide.name, slide.patient) != slide.patient:
            both = sorted({owners[slide.name], slide.patient})
            raise EvaluationError(f"{cohort.source}: slide {slide.name} has two patients, {both[0]} and {both[1]}")
    members: dict[str, list[CohortSlide]] = defaultdict(list)
    for slide in cohort:
        members[slide.name if level == "slide" else slide.patient].append(slide)
    cells = {name: _agreed(name, members[name], columns, cohort.source, level) for name in sorted(members)}
    slides, excluded = _at_hand(members, cells, available, label_map if isinstance(target, ClassTarget) else None)
    _refuse_nobody(slides, excluded, cohort, target, available)
    names, found = tuple(slides), [cell for name in slides if (cell := cells[name])]
    if isinstance(target, ClassTarget):
        outcome, told = _classes([cell[0] for cell in found], names, target, label_map, classes)
    else:
        outcome = _survival(found, names, target)
        told = ["event" if seen else "censored" for seen in outcome.event]
    patients = tuple(members[name][0].patient for name in names)
    warnings = [w for w in (name_leak(slides, patients, told), _differ(target, level, patients, outcome)) if w]
    for warning in warnings:
        log.warning("%s: %s", cohort.source, warning)
    places = {name: place for place, name in enumerate(members)}
    return Units(
        level, names, patients, tuple(slides.values()), outcome, excluded,
        tuple(_site(name, members[name], site, cohort.source) for name in names), tuple(warnings),
        tuple(places[name] for name in names),
    )  # fmt: skip


def both_cohorts(first: Units, second: Units) -> Units:
    """The units of two cohorts; raises :class:`EvaluationError` if they overlap, or do not hold one outcome."""
    shared = sorted(set(first.patients) & set(second.patients))
    if not shared:
        shared = sorted({s for of in first.slides for s in of} & {s for of in second.slides for s in of})
    if shared:
        raise EvaluationError(
            f"{len(shared)} patients or slides are in both cohorts, such as {', '.join(shared[:5])}; leave them out of "
            "one"
        )
    a, b = first.outcome, second.outcome
    if first.level != second.level or type(a) is not type(b):
        raise EvaluationError("the cohorts differ in what is predicted: a class or survival, of slides or patients")
    if isinstance(a, ClassOutcome) and isinstance(b, ClassOutcome):
        if a.classes != b.classes:
            raise EvaluationError(
                f"the classes differ: {', '.join(a.classes)} and {', '.join(b.classes)}; map the labels, or make the "
                "units of the second cohort with the classes of the first"
            )
        outcome = ClassOutcome(a.classes, np.concatenate([a.y, b.y]))
    elif isinstance(a, SurvivalOutcome) and isinstance(b, SurvivalOutcome):
        if a.unit != b.unit:
            raise EvaluationError(f"the survival times differ in their unit, {a.unit} and {b.unit}")
        time, event = np.concatenate([a.time, b.time]), np.concatenate([a.event, b.event])
        outcome = SurvivalOutcome(time, event, a.unit, a.spelt if a.spelt == b.spelt else f"{a.spelt}; {b.spelt}")
    else:  # of one kind, as was checked
        raise TypeError(type(a).__name__)
    reasons = dict.fromkeys([*first.excluded, *second.excluded])
    return replace(
        first,
        names=first.names + second.names,
        patients=first.patients + second.patients,
        slides=first.slides + second.slides,
        outcome=outcome,
        excluded={reason: first.excluded.get(reason, ()) + second.excluded.get(reason, ()) for reason in reasons},
        sites=first.sites + second.sites,
        order=first.order + tuple(place + max(first.order) + 1 for place in second.order),
        warnings=first.warnings + second.warnings,
    )


def site_of(*names: str) -> str:
    """TCGA's tissue source site, from the first of these names that starts with a barcode; ``""`` without one."""
    found = (_BARCODE.match(name) for name in names)
    return next((match[1] for match in found if match), "")


def _agreed(
    name: str, rows: Sequence[CohortSlide], columns: Sequence[str], source: str, level: str
) -> tuple[str, ...] | None:
    """The cells that all rows of a unit state; None if a cell is missing in all."""
    found = []
    for column in columns:
        values: dict[str, str] = {}
        for row in rows:
            value = row.labels.get(column, "").strip()
            if not is_missing(value):
                values.setdefault(plain_number(value), row.name)
        if len(values) > 1:
            (a, first), (b, second) = list(values.items())[:2]
            where = "in two rows" if first == second else f"on slide {first} and slide {second}"
            fix = "keep one row" if first == second else "correct the table, or predict slides (level slide)"
            raise EvaluationError(f"{source}: {level} {name} has {column} {a!r} and {b!r} {where}; {fix}")
        if not values:
            return None
        found.append(next(iter(values)))
    return tuple(found)


def _at_hand(
    members: Mapping[str, Sequence[CohortSlide]],
    cells: Mapping[str, tuple[str, ...] | None],
    available: Collection[str] | None,
    label_map: Mapping[str, str] | None,
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The slides at hand of each unit that can be used, and the others by reason."""
    slides: dict[str, tuple[str, ...]] = {}
    excluded: dict[str, list[str]] = defaultdict(list)
    at_hand = None if available is None else frozenset(available)
    for name, cell in cells.items():
        every = {slide.name for slide in members[name]}
        there = every if at_hand is None else every & at_hand
        if cell is None:
            excluded["no label"].append(name)
        elif label_map is not None and _mapped(cell[0], label_map) is None:
            excluded["label not in the map"].append(name)
        elif not there:
            excluded["no embeddings"].append(name)
        else:
            slides[name] = tuple(sorted(there))
            excluded["slides without embeddings"] += sorted(every - there)
    return slides, {reason: tuple(names) for reason, names in excluded.items() if names}


def _mapped(label: str, label_map: Mapping[str, str]) -> str | None:
    plain = {plain_number(key): value for key, value in label_map.items()}
    return label_map.get(label, plain.get(plain_number(label)))


def _refuse_nobody(
    slides: Mapping[str, object],
    excluded: Mapping[str, Sequence[str]],
    cohort: Cohort,
    target: ClassTarget | SurvivalTarget,
    available: Collection[str] | None,
) -> None:
    if slides:
        return
    reasons = ", ".join(f"{len(names)}: {reason}" for reason, names in excluded.items() if names)
    hint = ""
    if available:
        hint = f"; the cohort has {cohort.slides[0].name}, the embeddings {min(available)}: are the names the same?"
    raise EvaluationError(f"{cohort.source}: nothing is left to predict {target.spelt} of ({reasons}){hint}")


def _classes(
    cells: Sequence[str],
    names: Sequence[str],
    target: ClassTarget,
    label_map: Mapping[str, str] | None,
    classes: Sequence[str] | None,
) -> tuple[ClassOutcome, list[str]]:
    labels = [(_mapped(cell, label_map) if label_map is not None else cell) or "" for cell in cells]
    order = tuple(classes) if classes is not None else in_order(labels)
    place = {label: k for k, label in enumerate(order)}
    other = next((i for i, label in enumerate(labels) if label not in place), None)
    if other is not None:
        raise EvaluationError(
            f"{target.column} of {names[other]} is {labels[other]!r}, which is none of the classes {', '.join(order)}"
        )
    return ClassOutcome(order, np.array([place[label] for label in labels], np.int64)), labels


def _survival(cells: Sequence[tuple[str, ...]], names: Sequence[str], target: SurvivalTarget) -> SurvivalOutcome:
    pairs = list(zip(cells, names, strict=True))
    time = np.array([read_time(cell[0], name, target.time) for cell, name in pairs], np.float64)
    sign = target.event is None
    event = np.array([read_event(cell[1], name, target.status, censorship=sign) for cell, name in pairs], np.bool_)
    if not event.any():
        raise EvaluationError(
            f"{target.spelt}: all {len(event)} are censored, so nothing can be learnt; is the sign of {target.status} "
            f"right? It was taken as {'events' if target.event else 'censorship'}"
        )
    return SurvivalOutcome(time, event, target.unit, target.spelt)


def _site(name: str, rows: Sequence[CohortSlide], column: str | None, source: str) -> str:
    if column is None:
        return site_of(rows[0].patient, rows[0].name)
    found = sorted({row.labels[column].strip() for row in rows if not is_missing(row.labels.get(column))})
    if len(found) > 1:
        raise EvaluationError(f"{source}: {name} has two sites, {found[0]} and {found[1]}")
    return found[0] if found else ""


def _differ(
    target: ClassTarget | SurvivalTarget, level: str, patients: Sequence[str], outcome: ClassOutcome | SurvivalOutcome
) -> str:
    """A warning where slides of one patient have different survival."""
    if level == "patient" or not isinstance(outcome, SurvivalOutcome):
        return ""
    first: dict[str, tuple[float, bool]] = {}
    pairs = zip(patients, outcome.time.tolist(), outcome.event.tolist(), strict=True)
    several = sorted({p for p, time, event in pairs if first.setdefault(p, (time, event)) != (time, event)})
    if not several:
        return ""
    return f"slides of one patient differ in {target.spelt}; {len(several)} in all: {', '.join(several[:5])}"

"""Which units train and which test: patients, or sites, are never on both sides.

Published splits are read, and any splits written, by :mod:`~gigatome.evaluation.split_tables`.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.logs import log
from gigatome.core.seeding import generator
from gigatome.evaluation.folds import Fold as Fold
from gigatome.evaluation.folds import (
    deal_sites,
    digest_of,
    draw_groups,
    draw_sites,
    draw_stratified,
    fold_of_patients,
    leave_one_out,
    patient_folds,
)
from gigatome.evaluation.folds import folds_digest as folds_digest
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome, Units, both_cohorts

Group = Literal["patient", "site"]

_TIME_BINS = 4


@dataclass(frozen=True, eq=False)
class Split:
    """Sorted indices of the units that train, those that test, and those that a head may be tuned on.

    Attributes:
        train: int64, at least one.
        test: int64, at least one.
        val: int64; may be empty.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    val: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class Splits:
    """One or more splits of the same units.

    Attributes:
        parts: the splits.
        name: how they were made, in words.
        digest: 16 hexadecimal digits, equal for the same units on the same sides, in whatever order.
        overlapping: whether any unit is tested by more than one of them, as in Monte-Carlo splits.
        warnings: what to tell the reader of the result, such as patients on both sides of a published split.
    """

    parts: tuple[Split, ...]
    name: str
    digest: str
    overlapping: bool = False
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class SplitOptions:
    """How to split.

    Attributes:
        kind: ``"kfold"``: every unit is tested once; ``"monte_carlo"``: ``folds`` random splits, whose test parts
            overlap; ``"leave_one_out"``: one group is tested at a time.
        folds: how many.
        val_fraction: share of the groups that do not test, set aside to tune on.
        test_fraction: for ``"monte_carlo"``, share of the groups that test.
        train_fraction: share of the training units to keep, such as HIPT's 0.25.
        train_units: how many training units to keep, of each class its share, at least one; None keeps all.
        train_draw: which: ``"stratified"``, of each class its share; or ``"hipt"``, whatever pandas' ``sample`` with
            ``random_state=1`` draws of the table's training rows in their order, in every split, as HIPT's code does.
        group: what is never on two sides. A site is a TCGA tissue source site or the column that the units were made
            with; splits that keep sites whole say how well a head does in a hospital it has not seen (Howard et al.,
            Nat. Commun. 2021; differs: sites are dealt greedily, the best of 64 random orders, not by an optimiser).
        seed: of all draws.
    """

    kind: Literal["kfold", "monte_carlo", "leave_one_out"] = "kfold"
    folds: int = 10
    val_fraction: float = 0.0
    test_fraction: float = 0.1
    train_fraction: float = 1.0
    train_units: int | None = None
    train_draw: Literal["stratified", "hipt"] = "stratified"
    group: Group = "patient"
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("kfold", "monte_carlo", "leave_one_out") or self.group not in ("patient", "site"):
            raise EvaluationError(
                f"there is no split {self.kind!r} by {self.group!r}; there are kfold, monte_carlo and leave_one_out, "
                "by patient or site"
            )
        if self.folds < (2 if self.kind == "kfold" else 1):
            raise EvaluationError(
                f"{self.kind} needs at least {2 if self.kind == 'kfold' else 1} folds, not {self.folds}"
            )
        if not (0 <= self.val_fraction < 1 and 0 < self.test_fraction < 1 and 0 < self.train_fraction <= 1):
            raise EvaluationError(
                f"val_fraction {self.val_fraction}, test_fraction {self.test_fraction} and train_fraction "
                f"{self.train_fraction} are shares between 0 and 1"
            )
        if self.train_units is not None and (self.train_units < 1 or self.train_fraction < 1):
            raise EvaluationError("train_units is at least 1, and goes without train_fraction")


def make_splits(units: Units, options: SplitOptions) -> Splits:
    """Splits units by patient or site, with each class, or event and time, in its share on each side.

    Args:
        units: what is split.
        options: how.

    Returns:
        The splits. They depend on the units and the seed, not on the units' order.

    Raises:
        EvaluationError: the classes, events, patients or sites are too few for it, or sites are unknown.
    """
    strata, groups = stratum_of(units.outcome), groups_of(units, options.group)
    held_out = _test_parts(units, strata, groups, options)
    parts = []
    for k, test in enumerate(held_out):
        train, val = _set_aside(np.setdiff1d(np.arange(len(units)), test), strata, groups, options, k)
        parts.append(Split(_keep(train, strata, units, options, k), test, val))
    return finish(units, parts, describe(options), alone=options.kind == "leave_one_out")


def with_fewer(units: Units, splits: Splits, options: SplitOptions) -> Splits:
    """Other splits, such as published ones, with the training units that some options leave of each.

    Args:
        units: what is split.
        splits: of them.
        options: of which ``train_fraction``, ``train_units``, ``train_draw`` and ``seed`` count.

    Raises:
        EvaluationError: fewer units are there than are asked for, or a class is not among them.
    """
    if options.train_fraction == 1 and options.train_units is None:
        return splits
    strata = stratum_of(units.outcome)
    parts = [replace(part, train=_keep(part.train, strata, units, options, k)) for k, part in enumerate(splits.parts)]
    name = splits.name + _extras(replace(options, val_fraction=0.0))
    return finish(units, parts, name, alone=True, warnings=splits.warnings)  # what lacks a class is told already


def external_split(train_units: Units, test_units: Units, options: SplitOptions | None = None) -> tuple[Units, Splits]:
    """One split: one cohort trains, another tests.

    Args:
        train_units: of the first cohort.
        test_units: of the second. Make them with ``classes=`` of the first cohort's outcome.
        options: for ``val_fraction``, ``train_fraction``, ``train_units``, ``train_draw``, ``group`` and ``seed``.

    Returns:
        Units of both, those that train first, and the split.

    Raises:
        EvaluationError: a patient or a slide is in both cohorts, or the outcomes differ in kind, classes or unit.
    """
    options = options or SplitOptions()
    units = both_cohorts(train_units, test_units)
    count = len(train_units)
    strata, groups = stratum_of(units.outcome), groups_of(units, options.group)
    train, val = _set_aside(np.arange(count), strata, groups, options, 0)
    split = Split(_keep(train, strata, units, options, 0), np.arange(count, len(units)), val)
    name = f"{count} {train_units.level}s train, {len(test_units)} of another cohort test{_extras(options)}"
    return units, finish(units, [split], name)


def finish(
    units: Units,
    parts: Sequence[Split],
    name: str,
    *,
    alone: bool = False,
    warnings: Sequence[str] = (),
) -> Splits:
    """The splits with their hash, after a check that each can learn and test what it must.

    Args:
        units: what is split.
        parts: the splits.
        name: how they were made.
        alone: whether a test part is one group, so that it need not hold every class.
        warnings: to be kept.

    Raises:
        EvaluationError: a part is empty, a training part lacks a class or has no event, or a class is never tested.
    """
    told = list(warnings)
    outcome = units.outcome
    if isinstance(outcome, ClassOutcome) and len(outcome.classes) < 2:
        raise EvaluationError(f"all units are {', '.join(outcome.classes)}; need at least two classes to tell apart")
    for k, part in enumerate(parts):
        if not len(part.train) or not len(part.test):
            raise EvaluationError(f"fold {k} has no {'test' if len(part.train) else 'training'} unit")
        lost, untested = _lacks(outcome, part.train), _lacks(outcome, part.test)
        if lost:
            raise EvaluationError(f"fold {k} leaves {lost[0]} to learn from; use other folds, or merge the class")
        if untested and not alone:
            told.append(f"fold {k} has {', '.join(untested)} to test")
    never = _lacks(outcome, np.concatenate([part.test for part in parts]))
    if never:
        raise EvaluationError(f"all folds together have {', '.join(never)} to test; use other folds")
    for warning in told[len(warnings) :]:
        log.warning("%s: %s", name, warning)
    digest = digest_of(units.names, [(part.train, part.test, part.val) for part in parts])
    tested = np.concatenate([part.test for part in parts])
    return Splits(tuple(parts), name, digest, len(np.unique(tested)) < len(tested), tuple(told))


def _lacks(outcome: ClassOutcome | SurvivalOutcome, part: NDArray[np.int64]) -> list[str]:
    """What a part has none of: a class, or events."""
    if isinstance(outcome, SurvivalOutcome):
        return [] if outcome.event[part].any() else ["no event"]
    held = set(outcome.y[part].tolist())
    return [f"no {label}" for k, label in enumerate(outcome.classes) if k not in held]


def describe(options: SplitOptions) -> str:
    """The options in words, for a report."""
    of, share = f"{options.group}s", f"{100 * options.test_fraction:g} %"
    name = {
        "kfold": f"{options.folds} stratified folds of {of}, seed {options.seed}",
        "monte_carlo": f"{options.folds} random splits with {share} of the {of} to test, seed {options.seed}",
        "leave_one_out": f"leave one {options.group} out",
    }[options.kind]
    return name + _extras(options)


def _extras(options: SplitOptions) -> str:
    extras = f", {100 * options.val_fraction:g} % of the others to tune on" if options.val_fraction else ""
    extras += f", {100 * options.train_fraction:g} % of the training part" if options.train_fraction < 1 else ""
    return extras + (f", {options.train_units} to train on" if options.train_units else "")


def groups_of(units: Units, group: Group) -> tuple[str, ...]:
    """What must stay on one side: the patient of each unit, or its site.

    Raises:
        EvaluationError: a unit has no site, or a patient has two.
    """
    if group == "patient":
        return units.patients
    lost = [name for name, site in zip(units.names, units.sites, strict=True) if not site]
    if lost:
        raise EvaluationError(
            f"{len(lost)} of {len(units)} units have no site, such as {lost[0]}; name the column that holds it (their "
            "names are no TCGA barcodes)"
        )
    of: dict[str, str] = {}
    for patient, site in zip(units.patients, units.sites, strict=True):
        if of.setdefault(patient, site) != site:
            raise EvaluationError(f"patient {patient} has slides of two sites, {of[patient]} and {site}")
    return units.sites


def stratum_of(outcome: ClassOutcome | SurvivalOutcome) -> list[Hashable]:
    """What is spread evenly: the class; or whether the event was seen, and the quartile of the time among those."""
    if isinstance(outcome, ClassOutcome):
        return [outcome.classes[y] for y in outcome.y]
    strata: list[Hashable] = [""] * len(outcome.time)
    for seen in (False, True):
        index = np.flatnonzero(outcome.event == seen)
        if len(index):
            edges = np.quantile(outcome.time[index], np.arange(1, _TIME_BINS) / _TIME_BINS)
            for i, quarter in zip(index.tolist(), np.searchsorted(edges, outcome.time[index]).tolist(), strict=True):
                strata[i] = f"{'event' if seen else 'censored'} {quarter}"
    return strata


def _test_parts(
    units: Units, strata: Sequence[Hashable], groups: Sequence[str], options: SplitOptions
) -> list[NDArray[np.int64]]:
    """Indices of the test part of each split."""
    survival = isinstance(units.outcome, SurvivalOutcome)
    _enough(units, strata, groups, options)
    if options.kind == "monte_carlo":
        draws, share = [generator(options.seed, "test", k) for k in range(options.folds)], options.test_fraction
        if options.group == "site":
            return [np.flatnonzero(draw_sites(groups, strata, share, rng)) for rng in draws]
        least = 2 if survival else len(set(strata))
        return [np.flatnonzero(draw_groups(groups, strata, share, rng, least=least)) for rng in draws]
    if options.kind == "leave_one_out":
        if not survival and options.group == "patient":
            return [test for _, test in leave_one_out(groups, strata)]
        return [np.flatnonzero(np.asarray(groups) == group) for group in sorted(set(groups))]
    if options.group == "site":
        fold = deal_sites(groups, strata, np.full(options.folds, 1 / options.folds), generator(options.seed, "sites"))
        return [np.flatnonzero(fold == k) for k in range(options.folds)]
    if survival:
        fold = fold_of_patients(groups, strata, options.folds, options.seed)
        return [np.flatnonzero(fold == k) for k in range(options.folds)]
    return [test for _, test in patient_folds(groups, strata, options.folds, options.seed)]


def _enough(units: Units, strata: Sequence[Hashable], groups: Sequence[str], options: SplitOptions) -> None:
    """Refuses what cannot be split so; class counts of patients are left to :func:`patient_folds`."""
    count = len(set(groups))
    if options.kind == "leave_one_out" and isinstance(units.outcome, SurvivalOutcome) and options.group == "patient":
        raise EvaluationError("one patient alone has nobody to be ranked against: use folds, not leave-one-out")
    if count < (options.folds if options.kind == "kfold" else 2):
        raise EvaluationError(f"there are {count} {options.group}s for {options.folds} folds")
    members: dict[str, set[str]] = defaultdict(set)
    for stratum, group in zip(strata, groups, strict=True):
        members[str(stratum)].add(group)
    if isinstance(units.outcome, SurvivalOutcome):
        events = set().union(*(of for name, of in members.items() if name.startswith("event")))
        if options.kind == "kfold" and len(events) < options.folds:
            raise EvaluationError(
                f"{len(events)} {options.group}s have an event, fewer than {options.folds} folds; use fewer folds"
            )
        return
    if len(members) < 2:
        raise EvaluationError(f"the labels hold one class ({min(members)}); need at least two to tell apart")
    few = [name for name, of in sorted(members.items()) if len(of) < 2]
    if few:
        raise EvaluationError(
            f"class {few[0]} is in one {options.group} only, and cannot be both learnt and tested: drop or merge it"
            + ("" if options.group == "patient" else ", or split by patient")
            + ("" if len(few) <= 5 else f" (and {len(few) - 1} more; is the target a class at all?)")
        )


def _set_aside(
    rest: NDArray[np.int64], strata: Sequence[Hashable], groups: Sequence[str], options: SplitOptions, fold: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The training and the tuning units among those that do not test."""
    if not options.val_fraction:
        return rest, np.zeros(0, np.int64)
    rng = generator(options.seed, "val", fold)
    draw = draw_sites if options.group == "site" else draw_groups
    of, told = [groups[int(i)] for i in rest], [strata[int(i)] for i in rest]
    chosen = draw(of, told, options.val_fraction, rng)
    return rest[~chosen], rest[chosen]


def _keep(
    train: NDArray[np.int64], strata: Sequence[Hashable], units: Units, options: SplitOptions, fold: int
) -> NDArray[np.int64]:
    """The training units that ``train_fraction`` or ``train_units`` leaves."""
    count = round(options.train_fraction * len(train)) if options.train_units is None else options.train_units
    if count == len(train):
        return train
    if count > len(train):
        raise EvaluationError(f"fold {fold} has {len(train)} training units, fewer than the {count} asked for")
    if options.train_draw == "hipt":
        rows = train[np.argsort([units.order[i] for i in train.tolist()])]
        return np.sort(rows[np.random.RandomState(1).permutation(len(rows))[:count]])
    order = train[np.argsort([units.names[i] for i in train.tolist()], kind="stable")]
    told = [strata[i] for i in order.tolist()]
    if isinstance(units.outcome, ClassOutcome) and count < len(set(told)):
        raise EvaluationError(f"{count} training units cannot hold the {len(set(told))} classes")
    rng = generator(options.seed, "train", fold)
    return np.sort(order[draw_stratified(told, max(1, count), rng)])

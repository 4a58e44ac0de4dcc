"""Stratified folds of whole patients, and draws and deals of whole groups."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.seeding import generator

_SITE_TRIES = 64

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices of the training and of the test samples."""


def patient_folds(patients: Sequence[str], labels: Sequence[Hashable], folds: int, seed: int) -> list[Fold]:
    """Stratified k folds of whole patients.

    Patients are dealt one by one, those with the rarest class first, each to the fold that holds the fewest patients
    of its classes; so with one label a patient every fold gets its share of each class to within one patient.
    Slides of one patient may have different labels, such as tumour and normal: the patient then counts for each.

    Args:
        patients: patient of each sample.
        labels: label of each sample.
        folds: how many, at least 2.
        seed: of the shuffling; the result depends on nothing else, not on the order of the samples.

    Returns:
        For each fold the sorted indices of its training and test samples; each sample is tested once.

    Raises:
        EvaluationError: there is one class only, or a class has fewer than two patients, or fewer than folds.
    """
    if folds < 2:
        raise EvaluationError(f"cross-validation needs at least 2 folds, not {folds}")
    classes = _classes_of_patients(patients, labels)
    count = _count_patients(classes)
    _check_classes(count)
    rarest = min(count, key=lambda label: (count[label], str(label)))
    if count[rarest] < folds:
        raise EvaluationError(
            f"class {rarest} has {count[rarest]} patients, fewer than {folds} folds; use {count[rarest]} folds, "
            "or leave one patient out"
        )
    return _to_indices(fold_of_patients(patients, labels, folds, seed), folds, labels)


def leave_one_out(patients: Sequence[str], labels: Sequence[Hashable]) -> list[Fold]:
    """One fold a patient: each tests one patient's samples and trains on all others'; sorted by patient.

    Raises:
        EvaluationError: there is one class only, or a class has fewer than two patients.
    """
    _check_classes(_count_patients(_classes_of_patients(patients, labels)))
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    return _to_indices(index, len(names), labels)


def fold_of_patients(patients: Sequence[str], labels: Sequence[Hashable], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each sample, dealt as :func:`patient_folds` does, without a check of how many a class has."""
    classes = _classes_of_patients(patients, labels)
    fold_of = _deal(classes, _count_patients(classes), folds, seed)
    return np.array([fold_of[patient] for patient in patients], np.int64)


def folds_digest(names: Sequence[str], folds: Sequence[Fold]) -> str:
    """Hash of folds, 16 hexadecimal digits: equal for the same slides on the same sides, in whatever order."""
    return digest_of(names, folds)


def digest_of(names: Sequence[str], splits: Sequence[Sequence[NDArray[np.int64]]]) -> str:
    """Hash of splits, each the indices of its training, its test and perhaps further parts, in that order."""
    rows = sorted(
        f"{k}\t{side}\t{names[i]}" for k, parts in enumerate(splits) for side, part in enumerate(parts) for i in part
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _classes_of_patients(patients: Sequence[str], labels: Sequence[Hashable]) -> dict[str, set[Hashable]]:
    classes: dict[str, set[Hashable]] = defaultdict(set)
    for patient, label in zip(patients, labels, strict=True):
        classes[patient].add(label)
    return classes


def _count_patients(classes: Mapping[str, set[Hashable]]) -> dict[Hashable, int]:
    count: dict[Hashable, int] = defaultdict(int)
    for patient in sorted(classes):
        for label in classes[patient]:
            count[label] += 1
    return count


def _check_classes(count: Mapping[Hashable, int]) -> None:
    if len(count) < 2:
        only = "".join(f" ({label})" for label in count)
        raise EvaluationError(f"the labels hold {len(count)} class{only}; need at least two to tell apart")
    few = {label: patients for label, patients in count.items() if patients < 2}
    if few:
        listed = ", ".join(f"{label} has {few[label]}" for label in sorted(few, key=str)[:5])
        raise EvaluationError(
            f"every class needs at least 2 patients, one to learn from and one to test; class {listed}: "
            "drop or merge it" + ("" if len(few) <= 5 else f" (and {len(few) - 5} more; is the target a class at all?)")
        )


def _deal(classes: Mapping[str, set[Hashable]], count: Mapping[Hashable, int], folds: int, seed: int) -> dict[str, int]:
    """Fold of each patient."""
    rng = generator(seed, "folds")
    by_rarity = {label: rank for rank, label in enumerate(sorted(count, key=lambda c: (count[c], str(c))))}
    ranks = {patient: sorted(by_rarity[label] for label in classes[patient]) for patient in sorted(classes)}
    luck = dict(zip(ranks, rng.permutation(len(ranks)), strict=True))
    order = sorted(ranks, key=lambda patient: (ranks[patient][0], -len(ranks[patient]), luck[patient]))
    held = np.zeros((folds, len(count)), np.int64)
    patients = np.zeros(folds, np.int64)
    fold_of: dict[str, int] = {}
    for patient in order:
        among = rng.permutation(folds)
        best = min(among, key=lambda k: (*(held[k, rank] for rank in ranks[patient]), patients[k]))
        fold_of[patient] = int(best)
        held[best, ranks[patient]] += 1
        patients[best] += 1
    return fold_of


def _to_indices(fold: NDArray[np.int64], folds: int, labels: Sequence[Hashable]) -> list[Fold]:
    result = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]
    for k, (train, _) in enumerate(result):
        missing = set(labels) - {labels[i] for i in train.tolist()}
        if missing:
            raise EvaluationError(f"fold {k} leaves class {min(map(str, missing))} without a patient to learn from")
    return result


def draw_groups(
    groups: Sequence[str], strata: Sequence[Hashable], share: float, rng: np.random.Generator, *, least: int = 1
) -> NDArray[np.bool_]:
    """Which samples belong to a share of the groups, of each stratum its share; no stratum loses its last group.

    Args:
        groups: of each sample.
        strata: of each sample.
        share: of the groups.
        rng: says which.
        least: how many groups at least.
    """
    size = {s: len({g for g, t in zip(groups, strata, strict=True) if t == s}) for s in set(strata)}
    of: dict[str, Hashable] = {}
    for group, stratum in zip(groups, strata, strict=True):  # a group counts for the rarest of its strata
        of[group] = min(of.get(group, stratum), stratum, key=lambda s: (size[s], str(s)))
    names = sorted(of)
    chosen = draw_stratified([of[name] for name in names], max(least, round(share * len(names))), rng, spare=True)
    taken = {names[i] for i in chosen.tolist()}
    return np.array([group in taken for group in groups], np.bool_)


def draw_sites(
    sites: Sequence[str], strata: Sequence[Hashable], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which samples belong to sites that together hold about a share of each stratum."""
    return deal_sites(sites, strata, np.array([1 - share, share]), rng, tries=8) == 1


def draw_stratified(
    strata: Sequence[Hashable], count: int, rng: np.random.Generator, *, spare: bool = False
) -> NDArray[np.int64]:
    """Draws items, of each stratum its share to within one, and at least one of each where the count allows.

    Args:
        strata: of the items.
        count: how many.
        rng: says which.
        spare: leave at least one of every stratum, if need be by drawing fewer.

    Returns:
        Their indices, sorted.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(strata):
        members[stratum].append(i)
    names = sorted(members, key=str)
    sizes = np.array([len(members[name]) for name in names])
    most = sizes - 1 if spare else sizes
    ideal = count * sizes / sizes.sum()
    quota = np.minimum(np.maximum(np.floor(ideal).astype(np.int64), int(count >= len(names))), most)
    luck = rng.random(len(names))
    while quota.sum() > count:
        spent = np.where(quota > 1, quota - ideal, -np.inf)
        quota[np.lexsort((luck, -spent))[0]] -= 1
    while quota.sum() < min(count, most.sum()):
        owed = np.where(quota < most, ideal - quota, -np.inf)
        quota[np.lexsort((luck, -owed))[0]] += 1
    drawn = [rng.permutation(members[name])[:many] for name, many in zip(names, quota.tolist(), strict=True)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def deal_sites(
    sites: Sequence[str],
    strata: Sequence[Hashable],
    shares: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    tries: int = _SITE_TRIES,
) -> NDArray[np.int64]:
    """Deals whole sites to parts so that each part gets close to its share of each stratum.

    Sites are dealt one by one, large ones first, each to where it lowers the squared distance from the shares most; of
    several random orders the one that ends closest is taken.

    Source: Howard et al., Nat. Commun. 2021; differs: greedy, where they solve a quadratic programme.

    Args:
        sites: of each sample.
        strata: of each sample.
        shares: float64 [P], of the parts; they sum to 1.
        rng: for the orders.
        tries: how many orders.

    Returns:
        int64 [N], part of each sample.
    """
    names, site = np.unique(np.asarray(sites), return_inverse=True)
    kinds = sorted(set(strata), key=str)
    table = np.zeros((len(names), len(kinds)))
    np.add.at(table, (site, np.array([kinds.index(stratum) for stratum in strata])), 1)
    weight = table / table.sum(0)
    best, least = np.zeros(len(names), np.int64), np.inf
    for _ in range(tries):
        order = np.argsort(-weight.sum(1) * rng.uniform(0.5, 1.5, len(names)), kind="stable")
        held, part = np.zeros((len(shares), len(kinds))), np.zeros(len(names), np.int64)
        for done, i in enumerate(order.tolist()):
            gap = held - shares[:, None]
            cost = ((gap + weight[i]) ** 2 - gap**2).sum(1)
            empty = ~held.any(1)
            if len(names) - done <= empty.sum():  # each of the last sites to a part that has none
                cost[~empty] = np.inf
            part[i] = int(np.argmin(cost))
            held[part[i]] += weight[i]
        whole = int((held > 1 - 1e-9).sum())  # strata that one part has all of
        total = float(((held - shares[:, None]) ** 2).sum()) + whole
        if total < least:
            best, least = part, total
    return best[site]

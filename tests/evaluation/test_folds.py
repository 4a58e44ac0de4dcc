"""Folds: no patient on both sides, classes evenly spread, and clear words where that cannot be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.folds import (
    deal_sites,
    draw_groups,
    draw_stratified,
    folds_digest,
    leave_one_out,
    patient_folds,
)


def check_folds(folds, patients, labels):
    """What must always hold."""
    tested = np.concatenate([test for _, test in folds])
    assert sorted(tested) == list(range(len(patients)))
    for train, test in folds:
        assert not {patients[i] for i in train} & {patients[i] for i in test}
        assert sorted([*train, *test]) == list(range(len(patients)))
        assert {labels[i] for i in train} == set(labels)


@st.composite
def cohorts(draw):
    """Patients of one class each, at least as many of each class as folds, with 1 to 4 slides."""
    folds = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(folds, 15), min_size=2, max_size=4))
    slides = [
        (f"{label}-{patient}", label)
        for label, size in enumerate(sizes)
        for patient in range(size)
        for _ in range(draw(st.integers(1, 4)))
    ]
    return [p for p, _ in slides], [label for _, label in slides], folds


@given(cohorts(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_folds_are_stratified_to_within_a_patient(cohort, seed):
    patients, labels, folds = cohort
    found = patient_folds(patients, labels, folds, seed)
    assert len(found) == folds
    check_folds(found, patients, labels)
    of = dict(zip(patients, labels, strict=True))
    for label in set(labels):
        counts = [sum(of[p] == label for p in {patients[i] for i in test}) for _, test in found]
        assert max(counts) - min(counts) <= 1
    sizes = [len({patients[i] for i in test}) for _, test in found]
    assert max(sizes) - min(sizes) <= 1


@given(st.data(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_patients_with_slides_of_several_classes(data, seed):
    """Tumour and normal slides of one patient stay together, and every class can be learnt in every fold."""
    count = data.draw(st.integers(8, 20))
    patients = [f"p{i}" for i in range(count) for _ in range(2)]
    labels = [data.draw(st.sampled_from("ab")) for _ in patients[4:]]
    labels = ["a", "b", "b", "a", *labels]
    folds = patient_folds(patients, labels, 2, seed)
    check_folds(folds, patients, labels)
    for label in "ab":
        held = [len({patients[i] for i in test if labels[i] == label}) for _, test in folds]
        assert max(held) - min(held) <= 1 or min(held) >= 2


def test_folds_depend_on_the_seed_and_not_on_the_order():
    patients = [f"p{i // 2:02}" for i in range(60)]
    labels = ["ab"[(i // 2) % 2] for i in range(60)]
    names = [f"s{i}" for i in range(60)]
    first = patient_folds(patients, labels, 5, 3)
    order = np.random.default_rng(0).permutation(60)
    again = patient_folds([patients[i] for i in order], [labels[i] for i in order], 5, 3)
    assert folds_digest([names[i] for i in order], again) == folds_digest(names, first)
    assert folds_digest(names, patient_folds(patients, labels, 5, 4)) != folds_digest(names, first)


def test_folds_are_shuffled():
    patients, labels = [f"p{i:02}" for i in range(40)], list("ab" * 20)
    together = Counter()
    for seed in range(200):
        for _, test in patient_folds(patients, labels, 4, seed):
            together[0 in test and 2 in test] += 1
    assert 20 <= together[True] <= 75  # two patients of a class share a fold in 9 of 39 · 200 … a quarter of the seeds


def test_a_class_with_one_patient_is_named_and_counted():
    with pytest.raises(EvaluationError, match=r"at least 2 patients.*class rare has 1") as error:
        patient_folds(["a", "b", "c", "c"], ["x", "x", "rare", "rare"], 2, 0)
    assert "drop or merge it" in str(error.value)
    with pytest.raises(EvaluationError, match="class rare has 1"):
        leave_one_out(["a", "b", "c", "c"], ["x", "x", "rare", "rare"])


def test_a_column_of_numbers_is_no_class():
    with pytest.raises(EvaluationError, match=r"and 15 more; is the target a class at all\?"):
        patient_folds([str(i) for i in range(20)], [str(i / 7) for i in range(20)], 2, 0)


def test_fewer_patients_than_folds_suggests_how_many():
    with pytest.raises(EvaluationError, match="class b has 3 patients, fewer than 5 folds; use 3 folds"):
        patient_folds([str(i) for i in range(13)], ["a"] * 10 + ["b"] * 3, 5, 0)


@pytest.mark.parametrize("labels", [["a", "a", "a"], []])
def test_one_class_cannot_be_told_apart(labels):
    patients = [str(i) for i in range(len(labels))]
    with pytest.raises(EvaluationError, match="need at least two"):
        patient_folds(patients, labels, 2, 0)
    with pytest.raises(EvaluationError, match="need at least two"):
        leave_one_out(patients, labels)


def test_one_fold_is_none():
    with pytest.raises(EvaluationError, match="at least 2 folds, not 1"):
        patient_folds(["a", "b"], ["x", "y"], 1, 0)


def test_leave_one_patient_out():
    patients, labels = ["b", "a", "b", "c", "d"], ["x", "x", "x", "y", "y"]
    folds = leave_one_out(patients, labels)
    check_folds(folds, patients, labels)
    assert [test.tolist() for _, test in folds] == [[1], [0, 2], [3], [4]]


@given(st.lists(st.sampled_from("aaabbc"), min_size=1, max_size=60), st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_stratified_draw_holds_every_stratum_in_its_share(strata, data, spare):
    count = data.draw(st.integers(1, len(strata)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    drawn = draw_stratified(strata, count, rng, spare=spare)
    size = Counter(strata)
    held = Counter(strata[i] for i in drawn.tolist())
    most = {label: many - spare for label, many in size.items()}
    assert len(drawn) == len(set(drawn.tolist())) == min(count, sum(most.values()))
    assert all(held[label] <= most[label] for label in size)
    if count >= len(size):
        assert all(held[label] >= 1 for label in size if most[label])
    if not spare:
        assert all(abs(held[label] - count * size[label] / len(strata)) < len(size) for label in size)


@given(st.integers(2, 5), st.integers(0, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sites_are_dealt_whole_and_no_part_is_empty(parts, more, seed):
    rng = np.random.default_rng(seed)
    sites = [f"h{i}" for i in range(parts + more) for _ in range(int(rng.integers(1, 9)))]
    strata = rng.choice(["a", "b"], len(sites)).tolist()
    fold = deal_sites(sites, strata, np.full(parts, 1 / parts), np.random.default_rng(seed))
    assert set(fold.tolist()) == set(range(parts))
    assert len({*zip(sites, fold.tolist(), strict=True)}) == len(set(sites))


def test_a_patient_of_two_classes_counts_for_the_rarer():
    """Eight patients with a normal slide, two of whom have a tumour too: half of them hold one tumour."""
    groups = [f"p{i}" for i in range(8)] + ["p0", "p1"]
    strata = ["normal"] * 8 + ["tumour"] * 2
    for seed in range(20):
        chosen = draw_groups(groups, strata, 0.5, np.random.default_rng(seed))
        assert len({g for g, c in zip(groups, chosen, strict=True) if c}) == 4
        assert chosen[8:].sum() == 1
        assert (chosen[:2] == chosen[8:]).all()

"""Splits: no patient or site on two sides, and no dependence on the order of a table."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.splits import (
    SplitOptions,
    external_split,
    folds_digest,
    make_splits,
    patient_folds,
    with_fewer,
)
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome, Units


def class_units(labels, *, slides=1, sites=None, level="slide", start=0):
    """``slides`` slides of each patient, a label and perhaps a site each."""
    patients = [f"p{start + i:03}" for i in range(len(labels)) for _ in range(slides)]
    names = tuple(f"{patient}-{k % slides}" for k, patient in enumerate(patients))
    classes = tuple(sorted(set(labels)))
    y = np.array([classes.index(label) for label in labels for _ in range(slides)])
    where = tuple(site for site in sites for _ in range(slides)) if sites is not None else ()
    return Units(level, names, tuple(patients), tuple((n,) for n in names), ClassOutcome(classes, y), {}, where)


def survival_units(count, events, seed=0):
    rng = np.random.default_rng(seed)
    names = tuple(f"p{i:03}" for i in range(count))
    outcome = SurvivalOutcome(rng.exponential(20, count) + 0.1, rng.permutation(count) < events, "months", "t")
    return Units("patient", names, names, tuple((n,) for n in names), outcome)


def reordered(units, order):
    def pick(values):
        return tuple(values[i] for i in order)

    outcome = units.outcome
    if isinstance(outcome, ClassOutcome):
        outcome = ClassOutcome(outcome.classes, outcome.y[order])
    else:
        outcome = SurvivalOutcome(outcome.time[order], outcome.event[order], outcome.unit, outcome.spelt)
    return Units(
        units.level, pick(units.names), pick(units.patients), pick(units.slides), outcome, {}, pick(units.sites)
    )


def check_splits(splits, units, group="patient"):
    """No group on two sides, sides are disjoint and sorted, and every class can be learnt."""
    groups = units.patients if group == "patient" else units.sites
    assert splits.parts
    for part in splits.parts:
        sides = [part.train, part.val, part.test]
        held = [{groups[i] for i in side} for side in sides]
        assert not held[0] & held[2]
        assert not held[1] & held[2]
        assert not held[0] & held[1]
        assert all((np.diff(side) > 0).all() and side.dtype == np.int64 for side in sides)
        if isinstance(units.outcome, ClassOutcome):
            assert set(units.outcome.y[part.train].tolist()) == set(range(len(units.outcome.classes)))


OPTIONS = [
    SplitOptions(folds=5),
    SplitOptions(folds=5, val_fraction=0.2),
    SplitOptions("monte_carlo", folds=4, val_fraction=0.1),
    SplitOptions(folds=4, train_fraction=0.25),
    SplitOptions(folds=4, train_units=12),
    SplitOptions("leave_one_out"),
    SplitOptions(folds=3, group="site", val_fraction=0.3),
    SplitOptions("monte_carlo", folds=4, group="site", test_fraction=0.3),
    SplitOptions("leave_one_out", group="site"),
]


def mixed(slides=2):
    return class_units(
        ["abbc"[i % 4] for i in range(60)], slides=slides, sites=[f"h{i * 7 % 60 // 6}" for i in range(60)]
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_splits_keep_groups_together_and_do_not_depend_on_the_order(options):
    units = mixed()
    splits = make_splits(units, options)
    check_splits(splits, units, options.group)
    order = np.random.default_rng(1).permutation(len(units))
    again = make_splits(reordered(units, order), options)
    assert again.digest == splits.digest
    assert (again.name, again.warnings, again.overlapping) == (splits.name, splits.warnings, splits.overlapping)
    if options.kind != "leave_one_out":
        assert make_splits(units, replace(options, seed=1)).digest != splits.digest


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.kind != "monte_carlo"], ids=str)
def test_every_unit_is_tested_once(options):
    units = mixed()
    splits = make_splits(units, options)
    assert sorted(np.concatenate([part.test for part in splits.parts])) == list(range(len(units)))
    assert not splits.overlapping


def test_folds_of_patients_are_those_of_patient_folds():
    units = mixed()
    splits = make_splits(units, SplitOptions(folds=5, seed=3))
    labels = [units.outcome.classes[y] for y in units.outcome.y]
    expected = patient_folds(units.patients, labels, 5, 3)
    assert splits.digest == folds_digest(units.names, expected)
    assert splits.name == "5 stratified folds of patients, seed 3"


@given(
    st.lists(st.sampled_from("abc"), min_size=30, max_size=90), st.integers(0, 99), st.sampled_from([0.1, 0.25, 0.5])
)
@settings(max_examples=60, deadline=None)
def test_monte_carlo_tests_each_class_in_its_share(labels, seed, fraction):
    labels = [*labels, *"aabbcc"]
    units = class_units(labels)
    splits = make_splits(units, SplitOptions("monte_carlo", folds=3, test_fraction=fraction, seed=seed))
    check_splits(splits, units)
    assert splits.overlapping or fraction < 0.5
    for part in splits.parts:
        assert len(part.test) == max(3, round(fraction * len(labels)))
        for k, label in enumerate("abc"):
            tested = int((units.outcome.y[part.test] == k).sum())
            assert tested >= 1
            assert abs(tested - fraction * labels.count(label)) < 2


def test_monte_carlo_draws_evenly():
    """Over many splits each patient is tested as often as any other of the class."""
    units = class_units("ab" * 10)
    splits = make_splits(units, SplitOptions("monte_carlo", folds=400, test_fraction=0.2))
    times = np.bincount(np.concatenate([part.test for part in splits.parts]), minlength=20)
    assert times.sum() == 1600
    assert (np.abs(times - 80) < 5 * np.sqrt(400 * 0.2 * 0.8)).all()
    assert len({part.test.tobytes() for part in splits.parts}) > 300


def test_a_share_of_the_training_part_keeps_the_classes_shares():
    units = class_units(["a"] * 80 + ["b"] * 20)
    for part in make_splits(units, SplitOptions(folds=5, train_fraction=0.25)).parts:
        assert np.bincount(units.outcome.y[part.train]).tolist() == [16, 4]
        assert len(part.test) == 20


def test_hipts_draw_of_a_quarter_is_pandas_sample_of_the_tables_rows():
    pandas = pytest.importorskip("pandas")
    units = class_units("aab" * 14)
    order = np.random.default_rng(0).permutation(len(units))
    units = replace(units, order=tuple(order.tolist()))
    table = pandas.DataFrame({"unit": np.argsort(order)})  # row by row, the unit that stands there
    options = SplitOptions(folds=3, train_fraction=0.25, train_draw="hipt")
    whole = make_splits(units, replace(options, train_fraction=1.0))
    for splits in (make_splits(units, options), with_fewer(units, whole, options)):
        for part, every in zip(splits.parts, whole.parts, strict=True):
            rows = table[table.unit.isin(every.train)].reset_index(drop=True)
            drawn = rows.sample(frac=0.25, random_state=1).unit.to_numpy()
            np.testing.assert_array_equal(part.train, np.sort(drawn))
            np.testing.assert_array_equal(part.test, every.test)


def test_published_splits_may_train_on_fewer():
    units = class_units("aab" * 12)
    whole = replace(make_splits(units, SplitOptions(folds=3)), warnings=("a patient leaks",))
    assert with_fewer(units, whole, SplitOptions()) is whole
    fewer = with_fewer(units, whole, SplitOptions(train_fraction=0.25, val_fraction=0.1))
    assert fewer.warnings == whole.warnings
    assert fewer.name == whole.name + ", 25 % of the training part"
    for part, every in zip(fewer.parts, whole.parts, strict=True):
        assert len(part.train) == 6
        assert set(part.train) <= set(every.train)
        assert np.bincount(units.outcome.y[part.train]).tolist() == [4, 2]
    assert len({fewer.digest, whole.digest}) == 2


@pytest.mark.parametrize(("count", "expected"), [(50, [40, 10]), (5, [4, 1]), (2, [1, 1])])
def test_so_many_training_slides_hold_every_class(count, expected):
    units = class_units(["a"] * 80 + ["b"] * 20, slides=2)
    for part in make_splits(units, SplitOptions(folds=5, train_units=count)).parts:
        assert np.bincount(units.outcome.y[part.train]).tolist() == expected


def test_training_subsets_differ_between_folds_and_seeds():
    units = class_units("ab" * 30)
    first = make_splits(units, SplitOptions("monte_carlo", folds=2, train_units=10))
    assert first.parts[0].train.tolist() != first.parts[1].train.tolist()
    assert first.name == "2 random splits with 10 % of the patients to test, seed 0, 10 to train on"


def test_tuning_parts_come_from_the_rest_and_leave_every_class():
    units = class_units(["a"] * 40 + ["b"] * 10, slides=3)
    splits = make_splits(units, SplitOptions(folds=5, val_fraction=0.25))
    check_splits(splits, units)
    for part in splits.parts:
        assert len(part.val) == 30
        assert np.bincount(units.outcome.y[part.val]).tolist() == [24, 6]
        assert sorted([*part.train, *part.val, *part.test]) == list(range(len(units)))
    assert splits.name.endswith("25 % of the others to tune on")


def test_survival_folds_hold_equal_shares_of_events_and_of_times():
    units = survival_units(200, 60)
    splits = make_splits(units, SplitOptions(folds=5))
    check_splits(splits, units)
    assert [int(units.outcome.event[part.test].sum()) for part in splits.parts] == [12] * 5
    early = units.outcome.time < np.median(units.outcome.time)
    assert all(15 <= early[part.test].sum() <= 25 for part in splits.parts)


def test_survival_also_by_chance_and_in_part():
    units = survival_units(100, 20)
    for options in (SplitOptions("monte_carlo", folds=5), SplitOptions(folds=5, train_fraction=0.25, val_fraction=0.1)):
        splits = make_splits(units, options)
        check_splits(splits, units)
        assert all(
            units.outcome.event[part.train].any() and units.outcome.event[part.test].any() for part in splits.parts
        )


def test_survival_needs_events_for_its_folds_and_more_than_one_patient_to_test():
    with pytest.raises(EvaluationError, match="4 patients have an event, fewer than 5 folds"):
        make_splits(survival_units(50, 4), SplitOptions(folds=5))
    with pytest.raises(EvaluationError, match="nobody to be ranked against"):
        make_splits(survival_units(50, 20), SplitOptions("leave_one_out"))


def test_sites_are_kept_whole_and_their_classes_balanced():
    """40 sites of unequal size and mixture: each of 4 folds tests 15 to 35 % of each class."""
    rng = np.random.default_rng(0)
    labels, sites = [], []
    for site in range(40):
        for _ in range(int(rng.integers(1, 20))):
            labels.append("a" if rng.random() < (0.8 if site % 2 else 0.3) else "b")
            sites.append(f"h{site}")
    units = class_units(labels, sites=sites)
    splits = make_splits(units, SplitOptions(folds=4, group="site"))
    check_splits(splits, units, "site")
    totals = np.bincount(units.outcome.y)
    for part in splits.parts:
        share = np.bincount(units.outcome.y[part.test], minlength=2) / totals
        assert (share > 0.2).all()
        assert (share < 0.3).all()


def test_sites_that_do_not_do():
    with pytest.raises(EvaluationError, match="4 of 4 units have no site, such as p000-0; name the column"):
        make_splits(class_units("abab"), SplitOptions(folds=2, group="site"))
    with pytest.raises(EvaluationError, match="there are 2 sites for 3 folds"):
        make_splits(class_units("abab", sites="xxyy"), SplitOptions(folds=3, group="site"))
    with pytest.raises(EvaluationError, match=r"class b is in one site only.*or split by patient"):
        make_splits(class_units("aabaab", sites="xyzxyz"), SplitOptions(folds=2, group="site"))
    units = class_units("abab", sites="xyxy")
    units = Units(units.level, units.names, ("p", "p", "q", "r"), units.slides, units.outcome, {}, units.sites)
    with pytest.raises(EvaluationError, match="patient p has slides of two sites, x and y"):
        make_splits(units, SplitOptions(folds=2, group="site"))


def test_a_fold_that_lacks_a_class_to_test_is_said(caplog):
    units = class_units("aaaabbbbab", sites="uuvvwwxxyz")
    with caplog.at_level(logging.WARNING, "gigatome"):
        splits = make_splits(units, SplitOptions(folds=5, group="site"))
    lacking = [k for k, part in enumerate(splits.parts) if len(set(units.outcome.y[part.test].tolist())) == 1]
    assert lacking
    assert [int(warning.split()[1]) for warning in splits.warnings] == lacking
    assert splits.warnings[0] in caplog.text
    assert make_splits(units, SplitOptions("leave_one_out")).warnings == ()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("aaaa", SplitOptions(folds=2), "need at least two"),
        ("aaaab", SplitOptions(folds=2), "class b is in one patient only"),
        (
            "abcdefg",
            SplitOptions(folds=2),
            r"class a is in one patient only.*and 6 more; is the target a class at all\?",
        ),
        ("aaaabb", SplitOptions(folds=3), "class b has 2 patients, fewer than 3 folds"),
        ("abab", SplitOptions(folds=5), "there are 4 patients for 5 folds"),
        ("abab" * 5, SplitOptions(folds=2, train_units=11), "fold 0 has 10 training units, fewer than the 11"),
        ("abcabc", SplitOptions(folds=2, train_units=2), "2 training units cannot hold the 3 classes"),
    ],
)
def test_classes_that_do_not_do(labels, options, message):
    with pytest.raises(EvaluationError, match=message):
        make_splits(class_units(labels), options)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "bootstrap"}, {"group": "scanner"}, {"folds": 1}, {"val_fraction": 1.0}, {"test_fraction": 0.0},
        {"train_fraction": 0.0}, {"train_fraction": 1.5}, {"train_units": 0}, {"train_units": 5, "train_fraction": 0.5},
    ],
)  # fmt: skip
def test_options_that_do_not_do(options):
    with pytest.raises(EvaluationError):
        SplitOptions(**options)


def test_one_cohort_trains_and_another_tests():
    first, second = class_units("abab" * 5), class_units("aab", start=50)
    units, splits = external_split(first, second, SplitOptions(val_fraction=0.2))
    assert units.names == first.names + second.names
    assert units.outcome.y.tolist() == [*first.outcome.y, *second.outcome.y]
    (part,) = splits.parts
    assert part.test.tolist() == [20, 21, 22]
    assert len(part.val) == 4
    assert sorted([*part.train, *part.val]) == list(range(20))
    assert splits.name == "20 slides train, 3 of another cohort test, 20 % of the others to tune on"
    assert splits.digest != external_split(first, second)[1].digest


def test_cohorts_that_share_patients_or_differ_are_refused():
    first = class_units("abab")
    with pytest.raises(EvaluationError, match="2 patients or slides are in both cohorts, such as p002, p003"):
        external_split(first, class_units("abab", start=2))
    with pytest.raises(EvaluationError, match="the classes differ: a, b and a, c"):
        external_split(first, class_units("acac", start=50))
    with pytest.raises(EvaluationError, match="differ in what is predicted"):
        external_split(class_units("abab", level="patient"), class_units("abab", start=50))
    with pytest.raises(EvaluationError, match="differ in what is predicted"):
        external_split(class_units("abab", level="patient", start=50), survival_units(10, 5))


def test_survival_of_two_cohorts_is_in_one_unit():
    first, second = survival_units(20, 10), survival_units(10, 5, seed=1)
    names = tuple(f"q{i}" for i in range(10))
    second = replace(second, names=names, patients=names, slides=tuple((n,) for n in names))
    units, splits = external_split(first, second)
    assert units.outcome.time.tolist() == [*first.outcome.time, *second.outcome.time]
    assert splits.parts[0].test.tolist() == list(range(20, 30))
    with pytest.raises(EvaluationError, match="in their unit, months and days"):
        external_split(first, replace(second, outcome=replace(second.outcome, unit="days")))

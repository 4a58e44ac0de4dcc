"""Published splits load as they are; patients on two sides are refused, or listed."""

import csv
import json
import logging

import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.folds import folds_digest
from gigatome.evaluation.split_tables import read_splits, write_splits
from gigatome.evaluation.splits import SplitOptions, make_splits
from gigatome.evaluation.units import ClassOutcome, SurvivalOutcome, Units


def units_of(names, labels, *, patients=None, slides=None, sites=()):
    """Units with the classes of ``labels``, one letter each; patients are the names up to the dash."""
    names = tuple(names)
    patients = tuple(patients) if patients else tuple(name.partition("-")[0] for name in names)
    classes = tuple(sorted(set(labels)))
    outcome = ClassOutcome(classes, np.array([classes.index(label) for label in labels]))
    level = "patient" if slides else "slide"
    return Units(level, names, patients, tuple(slides or ((n,) for n in names)), outcome, {}, tuple(sites))


def survival_of(names):
    count = len(names)
    outcome = SurvivalOutcome(np.arange(1.0, count + 1), np.arange(count) % 2 == 0, "months", "t")
    return Units("patient", tuple(names), tuple(names), tuple((f"{n}-1", f"{n}-2") for n in names), outcome)


SLIDES = units_of(["p0-1", "p0-2", "p1-1", "p2-1", "p3-1", "p4-1"], "aaabbb")


def lists(**sides):
    """A table of names, as pandas writes it: an index and columns that are filled up with nothing."""
    length = max(map(len, sides.values()))
    rows = [",".join([str(i), *(side[i] if i < len(side) else "" for side in sides.values())]) for i in range(length)]
    return "\n".join([",".join(["", *sides]), *rows]) + "\n"


def names(splits, units, k=0):
    part = splits.parts[k]
    return tuple(tuple(units.names[i] for i in side) for side in (part.train, part.val, part.test))


def file(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


FIRST = {"train": ["p0-1", "p0-2", "p2-1"], "val": ["p3-1"], "test": ["p1-1", "p4-1"]}
SECOND = {"train": ["p1-1", "p4-1"], "val": [], "test": ["p0-1", "p0-2", "p2-1", "p3-1"]}


def test_clam_and_hipt_lists_of_slides_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "tcga_brca"
    for k in range(11):
        file(folder, f"splits_{k}.csv", lists(**(SECOND if k in (2, 10) else FIRST)))
    file(folder, "splits_0_descriptor.csv", ",train,val,test\na,1,1,1\n")
    splits = read_splits(folder, SLIDES)
    assert len(splits) == 11
    expected = [tuple(map(tuple, fold.values())) for fold in (FIRST, SECOND)]
    assert [names(splits, SLIDES, k) for k in range(11)] == [expected[k in (2, 10)] for k in range(11)]
    assert (splits.name, splits.overlapping, splits.warnings) == ("11 splits of tcga_brca", True, ())


def test_one_file_is_one_split(tmp_path):
    path = file(tmp_path, "splits_3.csv", lists(**FIRST))
    splits = read_splits(path, SLIDES)
    assert (len(splits), splits.name, splits.overlapping) == (1, "1 split of splits_3.csv", False)
    assert names(splits, SLIDES) == (("p0-1", "p0-2", "p2-1"), ("p3-1",), ("p1-1", "p4-1"))


def test_clam_table_of_true_and_false(tmp_path):
    rows = {name: [str(side == s) for s in FIRST] for side, members in FIRST.items() for name in members}
    text = ",train,val,test\n" + "".join(f"{name},{','.join(cells)}\n" for name, cells in rows.items())
    by_flags = read_splits(file(tmp_path / "a", "splits_0_bool.csv", text), SLIDES)
    by_names = read_splits(file(tmp_path / "b", "splits_0.csv", lists(**FIRST)), SLIDES)
    assert by_flags.digest == by_names.digest
    assert read_splits(tmp_path / "a", SLIDES).digest == by_names.digest
    with pytest.raises(EvaluationError, match="row 2: p0-1 is on two sides"):
        read_splits(file(tmp_path, "splits_0_bool.csv", ",train,val,test\np0-1,True,False,True\n"), SLIDES)


def test_giga_ssl_has_no_index_and_no_val(tmp_path):
    text = "train,test\np0-1,p1-1\np0-2,p4-1\np2-1,\np3-1,\n"
    splits = read_splits(file(tmp_path / "full", "split_0.csv", text).parent, SLIDES)
    assert names(splits, SLIDES) == (("p0-1", "p0-2", "p2-1", "p3-1"), (), ("p1-1", "p4-1"))


@pytest.mark.parametrize("sides", [("train", "val"), ("train", "val", "test")])
def test_mcat_tests_patients_on_the_val_part(tmp_path, sides):
    units = survival_of(["p0", "p1", "p2", "p3", "p4", "p5"])
    columns = dict(zip(sides, (["p0", "p1", "p2", "p3", "gone"], ["p4", "p5"], []), strict=False))
    file(tmp_path / "tcga_luad", "splits_0.csv", lists(**columns))
    splits = read_splits(tmp_path / "tcga_luad", units)
    assert names(splits, units) == (("p0", "p1", "p2", "p3"), (), ("p4", "p5"))
    assert splits.name == "1 split of tcga_luad, whose val part tests"
    assert splits.warnings == ("1 of the names in tcga_luad are not at hand",)


def test_patients_names_split_their_slides(tmp_path):
    splits = read_splits(file(tmp_path, "splits_0.csv", lists(train=["p0", "p2"], val=["p1", "p3", "p4"])), SLIDES)
    assert names(splits, SLIDES) == (("p0-1", "p0-2", "p2-1"), (), ("p1-1", "p3-1", "p4-1"))


def test_names_with_endings_fit(tmp_path):
    uuid = "0BAAEF41-DCA4-4677-9A27-09E990033FA6"
    full = [f"TCGA-A2-A{i:03}-01Z-00-DX1.{uuid}" for i in range(4)]
    units = units_of(full, "abab", patients=[name[:12] for name in full])
    splits = read_splits(file(tmp_path, "s.csv", lists(train=[f"{n}.svs" for n in full[:2]], test=full[2:])), units)
    assert names(splits, units) == (tuple(full[:2]), (), tuple(full[2:]))


PATHO = "case_id\tslide_id\ttask\tfold_1\tfold_0\tfold_10\n" + "".join(
    f"{patient}\t{patient}-{k}\t0\t{one}\t{zero}\t{one}\n"
    for patient, zero, one in (
        ("p0", "train", "test"),
        ("p1", "test", "train"),
        ("p2", "train", "val"),
        ("p3", "test", "train"),
    )
    for k in (1, 2)
)


def test_patho_bench_at_both_levels(tmp_path):
    path = file(tmp_path / "task", "k=all.tsv", PATHO)
    whole = units_of(["p0", "p1", "p2", "p3"], "aabb", slides=[(f"p{i}-1", f"p{i}-2") for i in range(4)])
    splits = read_splits(path.parent, whole)
    assert [names(splits, whole, k) for k in range(3)] == [
        (("p0", "p2"), (), ("p1", "p3")),
        (("p1", "p3"), ("p2",), ("p0",)),
        (("p1", "p3"), ("p2",), ("p0",)),
    ]
    assert splits.overlapping
    slides = units_of([f"p{i}-{k}" for i in range(4) for k in (1, 2)], "aaaabbbb")
    assert names(read_splits(path, slides), slides)[2] == ("p1-1", "p1-2", "p3-1", "p3-2")


LEAKY = {"train": ["p0-1", "p1-1", "p2-1"], "val": ["p3-1"], "test": ["p0-2", "p4-1"]}


def test_a_patient_on_two_sides_is_an_error_unless_listed(tmp_path, caplog):
    path = file(tmp_path, "splits_0.csv", lists(**LEAKY))
    with pytest.raises(
        EvaluationError, match=r'splits_0.csv: 1 patient in both train and test, such as p0, .*leaks="warn"'
    ):
        read_splits(path, SLIDES)
    with caplog.at_level(logging.WARNING, "gigatome"):
        splits = read_splits(path, SLIDES, leaks="warn")
    assert splits.warnings == ("splits_0.csv: 1 patient in both train and test: p0",)
    assert splits.warnings[0] in caplog.text
    assert names(splits, SLIDES) == (("p0-1", "p1-1", "p2-1"), ("p3-1",), ("p0-2", "p4-1"))  # as published
    with pytest.raises(EvaluationError, match="error or warn"):
        read_splits(path, SLIDES, leaks="ignore")


def test_val_and_test_share_a_patient_is_an_error_and_train_and_val_a_warning(tmp_path):
    path = file(tmp_path, "splits_0.csv", lists(train=["p1-1", "p2-1"], val=["p0-1"], test=["p0-2", "p4-1"]))
    with pytest.raises(EvaluationError, match="1 patient in both val and test, such as p0"):
        read_splits(path, SLIDES)
    path = file(tmp_path, "splits_0.csv", lists(train=["p0-1", "p2-1"], val=["p0-2"], test=["p1-1", "p4-1"]))
    splits = read_splits(path, SLIDES)
    assert splits.warnings[0] == "splits_0.csv: 1 patient in both train and val: p0"


def test_all_patients_who_leak_are_listed(tmp_path):
    """As in HIPT's splits: many of them."""
    slides = [f"q{i:02}-{k}" for i in range(30) for k in (1, 2)]
    units = units_of(slides, "aabb" * 15)
    path = file(tmp_path, "splits_0.csv", lists(train=slides[::2][:20] + slides[40:], test=slides[1::2][:20]))
    (warning,) = read_splits(path, units, leaks="warn").warnings
    listed = warning.partition("test: ")[2].split(", ")
    assert listed == [f"q{i:02}" for i in range(20)]


def test_a_patient_whose_slides_are_split_only_tests(tmp_path):
    units = units_of(["p0", "p1", "p2", "p4"], "aabb", slides=[("p0-1", "p0-2"), ("p1-1",), ("p2-1",), ("p4-1",)])
    path = file(tmp_path, "splits_0.csv", lists(**LEAKY))
    with pytest.raises(EvaluationError, match="patients with slides on two sides: 1, such as p0; predict slides"):
        read_splits(path, units)
    splits = read_splits(path, units, leaks="warn")
    assert names(splits, units) == (("p1", "p2"), (), ("p0", "p4"))
    assert splits.warnings[0] == "splits_0.csv: patients with slides on two sides, who only test: p0 (1)"


def test_sites_may_be_checked_too(tmp_path):
    units = units_of(SLIDES.names, "aaabbb", sites=["x", "x", "y", "z", "w", "z"])
    path = file(tmp_path, "splits_0.csv", lists(**FIRST))
    assert read_splits(path, units).warnings == ()
    with pytest.raises(EvaluationError, match=r"1 site in both train and test, such as z, .*make splits by site"):
        read_splits(path, units, group="site")
    assert read_splits(path, units, group="site", leaks="warn").warnings == (
        "splits_0.csv: 1 site in both train and test: z",
    )


def test_what_is_not_at_hand_or_not_named_is_counted(tmp_path):
    path = file(tmp_path, "splits_0.csv", lists(train=["p0-1", "p2-1", "gone", "lost"], test=["p1-1", "p4-1"]))
    assert read_splits(path, SLIDES).warnings == (
        "2 of the names in splits_0.csv are not at hand",
        "2 of 6 units are not in splits_0.csv, and are left out",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lists(train=["p0-1"], test=["p0-1", "p4-1"]), "p0-1 is in both train and test"),
        (lists(train=["x"], test=["y"]), r"names nothing that is at hand; it has x, the cohort has p0-1 of p0"),
        (lists(train=["p0-1", "p2-1"], test=["y"]), "has no test unit among those"),
        (lists(train=["p0-1"], test=["p4-1"]), "leaves no b to learn from"),
        (lists(train=["p0-1", "p2-1"], test=["p4-1", "p3-1"]), "all folds together have no a to test"),
        (lists(train=["p0-1"]), "is no table of splits; it has , train"),
        ("slide,label\na,b\n", "is no table of splits; it has slide, label"),
        ("slide_id\tfold_0\np0-1\tTraining\n", "fold_0 of .*: p0-1 is 'training', not train, val or test"),
        ("name\tfold_0\np0-1\ttrain\n", "needs the column slide_id or case_id"),
        ("", "the splits cannot be read"),
    ],
)
def test_splits_that_do_not_do(tmp_path, text, message):
    with pytest.raises(EvaluationError, match=message):
        read_splits(file(tmp_path, "splits_0.csv", text), SLIDES)


def test_folders_that_do_not_do(tmp_path, caplog):
    with pytest.raises(EvaluationError, match="holds no splits"):
        read_splits(tmp_path, SLIDES)
    with pytest.raises(EvaluationError, match="the splits cannot be read"):
        read_splits(tmp_path / "none.csv", SLIDES)
    file(tmp_path, "splits_2.csv", lists(**FIRST))
    with caplog.at_level(logging.WARNING, "gigatome"):
        assert len(read_splits(tmp_path, SLIDES)) == 1
    assert "has no split 0, 1" in caplog.text
    file(tmp_path, "splits_0.csv", lists(train=["p0-1", "p2-1"], val=["p1-1", "p4-1"]))
    with pytest.raises(EvaluationError, match="some of its splits have a test part"):
        read_splits(tmp_path, SLIDES)


@pytest.mark.parametrize(
    "options",
    [
        SplitOptions(folds=3),
        SplitOptions(folds=3, val_fraction=0.3),
        SplitOptions("monte_carlo", folds=2, test_fraction=0.3),
        SplitOptions("monte_carlo", folds=2, train_units=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_was_written_is_read_again(tmp_path, options, whole):
    if whole:
        units = survival_of([f"p{i}" for i in range(12)])
    else:
        units = units_of([f"p{i:02}-{k}" for i in range(12) for k in range(2)], "aabb" * 6)
    splits = make_splits(units, options)
    write_splits(tmp_path / "k=all.tsv", units, splits)
    again = read_splits(tmp_path / "k=all.tsv", units)
    assert (again.digest, again.overlapping) == (splits.digest, splits.overlapping)
    about = json.loads((tmp_path / "k=all.tsv.json").read_text())
    assert (about["digest"], about["name"], about["units"]) == (splits.digest, splits.name, len(units))
    rows = list(csv.DictReader((tmp_path / "k=all.tsv").open(), delimiter="\t"))
    outcome = ["time", "event"] if whole else ["label"]
    assert list(rows[0]) == ["case_id", "slide_id", *outcome, *(f"fold_{k}" for k in range(options.folds))]
    assert len(rows) == sum(map(len, units.slides))


def test_a_table_that_was_changed_since_is_refused(tmp_path):
    units = units_of([f"p{i:02}" for i in range(12)], "ab" * 6)
    path = tmp_path / "k=all.tsv"
    splits = make_splits(units, SplitOptions(folds=3))
    write_splits(path, units, splits)
    assert splits.digest == folds_digest(units.names, [(part.train, part.test) for part in splits.parts])
    head, first, *rest = path.read_text().splitlines(keepends=True)
    swap = {"train": "test", "test": "train"}
    cells = first.rstrip("\n").split("\t")
    changed = "\t".join([*cells[:3], *(swap[cell] for cell in cells[3:])]) + "\n"
    path.write_text("".join([head, changed, *rest]))
    for source in (path, tmp_path):
        with pytest.raises(EvaluationError, match=f"was changed since it was written.*says {splits.digest}"):
            read_splits(source, units)
    some = units_of(units.names[1:], "ba" * 5 + "b")
    assert len(read_splits(path, some)) == 3  # of other units, the hash says nothing
    (tmp_path / "k=all.tsv.json").write_text("{")
    with pytest.raises(EvaluationError, match="does not say what the splits are"):
        read_splits(path, units)


def test_the_same_splits_in_another_order_of_rows(tmp_path):
    units = units_of([f"p{i:02}" for i in range(12)], "ab" * 6)
    path = tmp_path / "splits.tsv"
    splits = make_splits(units, SplitOptions(folds=3, val_fraction=0.25))
    write_splits(path, units, splits)
    head, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *reversed(rows)]))
    assert read_splits(path, units).digest == splits.digest

"""Units: what is predicted, what was left out, and clear words where a table contradicts itself."""

import logging

import numpy as np
import pytest

from gigatome.core.errors import CohortError, EvaluationError
from gigatome.evaluation.cells import in_order, is_missing, name_of, plain_number
from gigatome.evaluation.units import (
    ClassOutcome,
    ClassTarget,
    SurvivalOutcome,
    SurvivalTarget,
    Units,
    make_units,
    site_of,
)
from gigatome.slides.cohort import Cohort, CohortSlide


def cohort(*rows, columns=("label",)):
    """Rows of (slide, patient, cells …)."""
    slides = (
        CohortSlide(name, name, patient, None, dict(zip(columns, cells, strict=True))) for name, patient, *cells in rows
    )
    return Cohort(tuple(slides), "labels.csv")


TWO = (("s1", "p1", "a"), ("s2", "p1", "a"), ("s3", "p2", "b"))


def survival(*rows, sign="event", level="slide"):
    table = cohort(*((f"s{i}", f"p{i}", *row) for i, row in enumerate(rows)), columns=("months", "status"))
    return make_units(table, SurvivalTarget("months", **{sign: "status"}), level=level)


def test_slides_with_classes_in_order_of_their_names():
    units = make_units(cohort(*TWO[::-1]), ClassTarget("label"))
    assert (units.level, units.names, units.patients) == ("slide", ("s1", "s2", "s3"), ("p1", "p1", "p2"))
    assert units.slides == (("s1",), ("s2",), ("s3",))
    assert isinstance(units.outcome, ClassOutcome)
    assert units.outcome.classes == ("a", "b")
    assert units.outcome.y.tolist() == [0, 0, 1]
    assert units.outcome.y.dtype == np.int64
    assert (len(units), units.excluded, units.warnings) == (3, {}, ())


def test_a_patient_s_bag_is_its_slides_together():
    units = make_units(cohort(*TWO), ClassTarget("label"), level="patient")
    assert (units.names, units.slides) == (("p1", "p2"), (("s1", "s2"), ("s3",)))
    assert units.outcome.y.tolist() == [0, 1]


def test_a_patient_s_label_may_stand_on_one_of_its_slides():
    table = cohort(("s1", "p1", ""), ("s2", "p1", "a"), ("s3", "p2", "b"))
    units = make_units(table, ClassTarget("label"), level="patient")
    assert units.slides == (("s1", "s2"), ("s3",))
    assert units.excluded == {}
    assert make_units(table, ClassTarget("label")).excluded == {"no label": ("s1",)}


@pytest.mark.parametrize(
    "cell", ["", "  ", "NA", "nan", "NaN", "N/A", "null", "None", "<NA>", "[Not Available]", "'--"]
)
def test_words_for_nothing_are_missing_labels(cell):
    assert is_missing(cell)
    units = make_units(cohort(*TWO, ("s4", "p4", cell), ("s0", "p0", cell)), ClassTarget("label"))
    assert units.excluded == {"no label": ("s0", "s4")}
    assert units.names == ("s1", "s2", "s3")


def test_labels_are_stripped_and_zero_is_a_label():
    units = make_units(cohort(("s1", "p1", " a "), ("s2", "p2", "a"), ("s3", "p3", "0")), ClassTarget("label"))
    assert units.outcome.classes == ("0", "a")
    assert units.outcome.y.tolist() == [1, 1, 0]


def test_numbers_sort_as_numbers_and_whole_ones_lose_their_decimals():
    rows = [(f"s{i}", f"p{i}", value) for i, value in enumerate(("10", "2.0", "2", "1.5"))]
    units = make_units(cohort(*rows), ClassTarget("label"))
    assert units.outcome.classes == ("1.5", "2", "10")
    assert units.outcome.y.tolist() == [2, 1, 1, 0]
    assert [plain_number(t) for t in ("1.0", "-0.5", "1e3", "01", "a ", "1.2.3")] == [
        "1",
        "-0.5",
        "1e3",
        "1",
        "a",
        "1.2.3",
    ]
    assert in_order(["b", "10", "2"]) == ("10", "2", "b")


def test_slides_without_embeddings_are_left_out_and_named():
    units = make_units(cohort(*TWO), ClassTarget("label"), available=["s1", "s3", "other"])
    assert units.names == ("s1", "s3")
    assert units.excluded == {"no embeddings": ("s2",)}
    units = make_units(cohort(*TWO, ("s4", "p4", "a")), ClassTarget("label"), available={"s1", "s3"}, level="patient")
    assert units.slides == (("s1",), ("s3",))
    assert units.excluded == {"no embeddings": ("p4",), "slides without embeddings": ("s2",)}


def test_nothing_left_says_why():
    with pytest.raises(
        EvaluationError, match=r"predict label of \(3: no embeddings\); the cohort has s1, the embeddings x\.svs"
    ):
        make_units(cohort(*TWO), ClassTarget("label"), available=["x.svs"])
    with pytest.raises(EvaluationError, match=r"\(1: no label\)$"):
        make_units(cohort(("s1", "p1", "")), ClassTarget("label"), available=[])
    with pytest.raises(CohortError, match="did you mean label"):
        make_units(cohort(*TWO), ClassTarget("labels"))


def test_two_rows_of_a_slide_that_disagree_are_refused_and_named():
    rows = (*TWO, ("s1", "p1", "b"))
    with pytest.raises(EvaluationError, match=r"slide s1 has label 'a' and 'b' in two rows; keep one row"):
        make_units(cohort(*rows), ClassTarget("label"))
    with pytest.raises(EvaluationError, match=r"patient p1 has label 'a' and 'b' in two rows"):
        make_units(cohort(*rows), ClassTarget("label"), level="patient")


def test_two_rows_that_agree_on_the_target_are_one():
    rows = (("s1", "p1", "1.0", "x"), ("s1", "p1", "1", "y"), ("s2", "p2", "0", "z"))
    units = make_units(cohort(*rows, columns=("label", "other")), ClassTarget("label"))
    assert units.names == ("s1", "s2")
    assert units.outcome.y.tolist() == [1, 0]
    for level in ("slide", "patient"):
        with pytest.raises(EvaluationError, match="slide s1 has two patients, p1 and p9"):
            make_units(cohort(("s1", "p1", "a"), ("s1", "p9", "a")), ClassTarget("label"), level=level)


def test_slides_of_one_patient_may_differ_unless_patients_are_predicted():
    rows = (("s1", "p1", "tumour"), ("s2", "p1", "normal"), ("s3", "p2", "normal"))
    assert make_units(cohort(*rows), ClassTarget("label")).outcome.y.tolist() == [1, 0, 0]
    with pytest.raises(
        EvaluationError, match=r"p1 has label 'tumour' and 'normal' on slide s1 and slide s2; .* predict slides"
    ):
        make_units(cohort(*rows), ClassTarget("label"), level="patient")


def test_labels_can_be_renamed_and_merged():
    rows = [(f"s{i}", f"p{i}", label) for i, label in enumerate(("1.0", "2", "3", ""))]
    units = make_units(cohort(*rows), ClassTarget("label"), label_map={"1": "low", "2": "low"})
    assert units.outcome.classes == ("low",)
    assert units.excluded == {"label not in the map": ("s2",), "no label": ("s3",)}


def test_another_cohort_may_fix_the_classes():
    units = make_units(cohort(*TWO[:2]), ClassTarget("label"), classes=("b", "a"))
    assert units.outcome.classes == ("b", "a")
    assert units.outcome.y.tolist() == [1, 1]
    with pytest.raises(EvaluationError, match="label of s3 is 'b', which is none of the classes a, c"):
        make_units(cohort(*TWO), ClassTarget("label"), classes=("a", "c"))


@pytest.mark.parametrize(
    ("sign", "spelt"), [("event", "months, event if status = 1"), ("censorship", "months, event if status = 0")]
)
def test_survival_with_either_sign(sign, spelt):
    units = survival(("12.5", "1"), ("3", "0.0"), ("4", "TRUE"), ("5", "no"), sign=sign)
    outcome = units.outcome
    assert isinstance(outcome, SurvivalOutcome)
    assert outcome.time.tolist() == [12.5, 3, 4, 5]
    seen = np.array([True, False, True, False])
    assert outcome.event.tolist() == (seen if sign == "event" else ~seen).tolist()
    assert (outcome.unit, outcome.spelt) == ("months", spelt)


def test_words_that_state_the_event_do_so_in_either_column():
    cells = (("1", "event"), ("2", "Censored"))
    for sign in ("event", "censorship"):
        assert survival(*cells, sign=sign).outcome.event.tolist() == [True, False]
    assert survival(("1", "Dead"), ("2", "alive"), ("3", "1:DECEASED"), ("4", "0:LIVING")).outcome.event.tolist() == [
        True, False, True, False,
    ]  # fmt: skip
    with pytest.raises(
        EvaluationError, match=r"status of s0 is 'Dead', so the column says who died.* column of events"
    ):
        survival(("1", "Dead"), ("2", "Alive"), sign="censorship")


@pytest.mark.parametrize("cell", ["0", "-3", "soon", "inf", "1,5"])
def test_a_time_that_is_none_is_refused_and_named(cell):
    with pytest.raises(EvaluationError, match=r"months of s1 is '.*'; a survival time is a number above 0"):
        survival(("3", "1"), (cell, "1"))


@pytest.mark.parametrize("cell", ["2", "maybe", "0.5"])
def test_an_event_that_is_none_is_refused_and_named(cell):
    with pytest.raises(EvaluationError, match=rf"status of s1 is '{cell}'; whether the event was seen is 0 or 1"):
        survival(("3", "1"), ("4", cell))


def test_missing_times_and_events_are_counted():
    units = survival(("3", "1"), ("nan", "1"), ("4", ""), ("5", "0"))
    assert units.names == ("s0", "s3")
    assert units.excluded == {"no label": ("s1", "s2")}


@pytest.mark.parametrize("sign", ["event", "censorship"])
def test_all_censored_is_refused_and_asks_for_the_sign(sign):
    cell = "0" if sign == "event" else "1"
    with pytest.raises(EvaluationError, match=r"all 2 are censored.*is the sign of status right"):
        survival(("3", cell), ("4", cell), sign=sign)


def test_a_survival_target_has_one_sign():
    for signs in ({}, {"event": "a", "censorship": "b"}):
        with pytest.raises(EvaluationError, match="either the column of events"):
            SurvivalTarget("months", **signs)


def test_survival_that_differs_within_a_patient_is_said(caplog):
    rows = (("s1", "p1", "3", "1"), ("s2", "p1", "4", "1"), ("s3", "p2", "5", "0"))
    table = cohort(*rows, columns=("months", "status"))
    target = SurvivalTarget("months", event="status")
    with caplog.at_level(logging.WARNING, "gigatome"):
        units = make_units(table, target)
    assert units.warnings == ("slides of one patient differ in months, event if status = 1; 1 in all: p1",)
    assert units.warnings[0] in caplog.text
    with pytest.raises(EvaluationError, match="patient p1 has months '3' and '4' on slide s1 and slide s2"):
        make_units(table, target, level="patient")


def barcodes(count, rng):
    """TCGA names whose site goes with the class, as in LUAD and LUSC."""
    for i in range(count):
        site = ("05", "44", "49")[i % 3] if i % 2 else ("18", "21", "33")[i % 3]
        uuid = "".join(rng.choice(list("0123456789ABCDEF"), 12))
        yield f"TCGA-{site}-{i:04}-01Z-00-DX1.{uuid}", f"TCGA-{site}-{i:04}", "LUAD" if i % 2 else "LUSC"


def test_barcodes_do_not_tell_the_outcome():
    assert make_units(cohort(*barcodes(200, np.random.default_rng(0))), ClassTarget("label")).warnings == ()


def test_sites_come_from_the_barcode_or_a_column():
    units = make_units(cohort(*barcodes(4, np.random.default_rng(0))), ClassTarget("label"), level="patient")
    assert units.sites == tuple(name[5:7] for name in units.names)
    assert units.site(1) == units.sites[1]
    assert site_of("x", "TCGA-A2-A0T2-01") == "A2"
    assert make_units(cohort(*TWO), ClassTarget("label")).sites == ("", "", "")
    rows = (("s1", "p1", "a", "north"), ("s2", "p1", "a", "NA"), ("s3", "p2", "b", "south"))
    by_column = make_units(
        cohort(*rows, columns=("label", "hospital")), ClassTarget("label"), level="patient", site="hospital"
    )
    assert by_column.sites == ("north", "south")
    rows = (rows[0], ("s2", "p1", "a", "west"), rows[2])
    with pytest.raises(EvaluationError, match="p1 has two sites, north and west"):
        make_units(cohort(*rows, columns=("label", "hospital")), ClassTarget("label"), level="patient", site="hospital")
    with pytest.raises(CohortError, match="no label column 'town'"):
        make_units(cohort(*TWO), ClassTarget("label"), site="town")


@pytest.mark.parametrize("labels", [("tumor", "normal"), ("1", "0")])
def test_names_that_tell_the_outcome_are_said(labels, caplog):
    """CAMELYON's names; with labels in words, or not."""
    rows = [(f"{'tumor' if i % 2 else 'normal'}_{i:03}", f"p{i}", labels[1 - i % 2]) for i in range(40)]
    rows += [(f"test_{i:03}", f"q{i}", labels[i % 2]) for i in range(20)]
    with caplog.at_level(logging.WARNING, "gigatome"):
        (warning,) = make_units(cohort(*rows), ClassTarget("label")).warnings
    assert warning.startswith(
        "the name of the slide tells the outcome: 20 of 20 patients with 'normal' in it, such as normal_000"
    )
    assert warning in caplog.text


def test_the_event_may_be_told_by_the_name_too():
    rows = [(f"{'dead' if i % 2 else 'x'}{i}", f"p{i}", str(i + 1), str(i % 2)) for i in range(40)]
    units = make_units(cohort(*rows, columns=("t", "e")), SurvivalTarget("t", event="e"))
    assert "'dead' in it, such as dead1, have event" in units.warnings[0]


def test_names_by_chance_are_not_said():
    """Random words, and a word that all share, over many cohorts: fewer than 1 in 100 are warned about."""
    said = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(8)]
        rows = [
            (f"scan_{rng.choice(words)}_{i}", f"p{i}", str(rng.choice(["yes", "no"], p=[0.2, 0.8]))) for i in range(60)
        ]
        said += bool(make_units(cohort(*rows), ClassTarget("label")).warnings)
    assert said <= 1


def test_units_made_by_hand_find_their_sites_and_are_checked():
    outcome = ClassOutcome(("a", "b"), np.array([0, 1]))
    units = Units("slide", ("TCGA-A2-0001-01", "s"), ("TCGA-A2-0001", "p"), (("TCGA-A2-0001-01",), ("s",)), outcome, {})
    assert units.sites == ("A2", "")
    with pytest.raises(ValueError, match="1 names"):
        Units("slide", ("s",), ("p",), (("s",),), outcome)


def test_names_in_tables_may_have_paths_and_endings():
    assert name_of("a/TCGA-3C-AALI-01Z-00-DX1.F6E9.svs") == "TCGA-3C-AALI-01Z-00-DX1.F6E9"
    assert name_of("TCGA-3C-AALI-01Z-00-DX1.F6E9") == "TCGA-3C-AALI-01Z-00-DX1.F6E9"
    assert name_of("x.h5") == name_of("x.pt") == "x"

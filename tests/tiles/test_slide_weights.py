import numpy as np
import pytest
import shapely

from gigatome.core.errors import CohortError
from gigatome.tiles.position_store import SlideTissue
from gigatome.tiles.slide_weights import slide_weights
from gigatome.tissue.mask import TissueMask

LABELS = [{"subtype": value, "site": "x"} for value in ("A", "A", "A", "B", "", "C")]
SLIDES = [
    SlideTissue.of(f"s{index}", mpp, TissueMask.of([shapely.box(0, 0, 10, 10 * (index + 1))], 100, 100))
    for index, mpp in enumerate([0.25, 0.25, 0.5, 0.5, 0.5, 1.0])
]


def weights(rule, **options):
    return slide_weights(rule, SLIDES, LABELS, **options)


def test_uniform_and_by_tissue():
    assert weights("uniform").tolist() == [1] * 6
    assert weights("tissue") == pytest.approx([6.25, 12.5, 75, 100, 125, 600])  # µm²
    usable = np.array([1, 0, 1, 1, 1, 1], bool)
    assert weights("uniform", usable=usable).tolist() == [1, 0, 1, 1, 1, 1]
    assert weights("tissue", usable=usable)[1] == 0


def test_each_value_of_a_column_is_as_likely_and_no_value_is_not_drawn(caplog):
    third = 1 / 3
    assert weights("column:subtype") == pytest.approx([third, third, third, 1, 0, 1])
    assert "1 of 6 slides have no weight: their subtype is empty or has no prior" in caplog.text


def test_priors_hold_for_the_values_over_the_slides_that_can_be_used():
    usable = np.array([1, 0, 1, 1, 1, 1], bool)
    found = weights("column:subtype", priors={"A": 3, "B": 1, "": 2}, usable=usable)
    assert found.tolist() == [1.5, 0, 1.5, 1, 2, 0]


@pytest.mark.parametrize(
    ("rule", "priors", "error", "message"),
    [
        ("area", None, ValueError, "must be"),
        ("column:grade", None, CohortError, "no column 'grade' to weigh slides by; its columns are: site, subtype"),
        ("column:subtype", {"A": 1, "D": 1}, CohortError, "no slide that can be used has subtype = D"),
        ("column:subtype", {"A": -1}, ValueError, "not negative"),
    ],
)
def test_what_cannot_be_is_refused(rule, priors, error, message):
    with pytest.raises(error, match=message):
        weights(rule, priors=priors)

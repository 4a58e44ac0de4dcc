"""What the dialects share: numbers and XML that are not trusted."""

import pytest

from gigatome.slides.pyramid import parse_xml, positive, whole


def test_xml():
    root = parse_xml('\ufeff\n<?xml version="1.0" encoding="UTF-8"?><a b="µ &#181;">é<c/></a>')
    assert (root.tag, root.get("b"), root.text, len(root)) == ("a", "µ µ", "é", 1)
    # The text is decoded already, whatever it says.
    assert parse_xml('<?xml version="1.0" encoding="latin-1"?><a>é</a>').text == "é"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no xml",
        "<a>",
        "<a></b>",
        '<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>',
        '<!DOCTYPE a SYSTEM "http://host/a.dtd"><a/>',
        "<a>" + "<b/>" * 300_000 + "</a>",
        "<a" + ' b="1"' * 2 + "/>",
        "<a " + " ".join(f'b{number}="1"' for number in range(500_001)) + "/>",
        "<a>\0</a>",
    ],
)
def test_xml_that_is_refused(text):
    assert parse_xml(text) is None


def test_deeply_nested_elements():
    assert parse_xml("<a>" * 90_000 + "</a>" * 90_000) is not None


def test_whole():
    assert [whole(text) for text in ("0", "17", "-1", "1.0", "", None, "²", "٣", "1" * 13, "1" * 12)] == [
        0, 17, -1, -1, -1, -1, -1, -1, -1, 111_111_111_111
    ]  # fmt: skip
    assert whole(None, 5) == 5


def test_positive():
    assert [positive(text) for text in ("0.25", "0,25", "1e-3", "0", "-1", "nan", "inf", "x", "", None)] == [
        0.25, 0.25, 0.001, None, None, None, None, None, None, None
    ]  # fmt: skip

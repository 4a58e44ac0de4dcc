import base64
import hashlib
import html.parser
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from gigatome.core.errors import MissingExtraError, StoreError
from gigatome.evaluation.charts import ScoreRow, score_intervals, training_curves
from gigatome.evaluation.report import (
    Chart,
    Code,
    Gallery,
    KeyNumber,
    Picture,
    Section,
    Table,
    Text,
    cohort_page,
    write_report,
)
from gigatome.slides.check import SlideReport

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></figcaption><svg onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp; \u202egnp.exe",
    "--><!--]]>",
)


class Page(html.parser.HTMLParser):
    """Elements of a page in order, with the text of each table cell, script and style."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.cells, self._open = [], {"script": "", "style": ""}, [], set()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.add(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        for tag in self._open & self.texts.keys():
            self.texts[tag] += data
        if self._open & {"th", "td"}:
            self.cells[-1] += data.strip()

    def handle_endtag(self, tag):
        self._open.discard(tag)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def structure(self):
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]


def picture(seed=0, height=90, width=120):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def image_of(attributes):
    head, _, data = attributes["src"].partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def full_page(path, word):
    rows = [ScoreRow(word, 0.8, 0.7, 0.9, word), ScoreRow("b", 0.6, 0.5, 0.7, "other")]
    blocks = (
        Text((word, "second")),
        Gallery((Picture(picture(), word, word, word, word), Picture(picture(1), "b"))),
        Chart(score_intervals(rows, measure=word), word, word),
        Table((word, "n"), ((word, 1), ("b", 2)), word, highlight=(0,), problems=(1,)),
    )
    sections = [
        Section(word, blocks, word),
        Section("2", (Chart(training_curves([{"step": 1, "loss": 2.0}]), "", "x"),)),
    ]
    numbers = [KeyNumber(word, word, word)]
    title = f"title {word}"
    write_report(path, title=title, subtitle=word, key_numbers=numbers, sections=[*sections, sections[1]], footer=word)
    return Page(path)


def test_the_page_asks_the_network_for_nothing(tmp_path):
    page = full_page(tmp_path / "r.html", "plain")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "xlink:href", "poster", "data"):
            target = attributes.get(name) or ""
            assert target.startswith(("data:", "#")) or not target, f"<{tag}> fetches {target[:60]}"
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", page.source)
    assert re.findall(r"https?://[^\s\"'<]+", page.source) == ["http://www.w3.org/2000/svg"] * 3  # a name, not a place
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    digest = base64.b64encode(hashlib.sha256(page.texts["script"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_names_stay_words(tmp_path, word):
    plain, hostile = full_page(tmp_path / "plain.html", "plain"), full_page(tmp_path / "hostile.html", word)
    assert hostile.structure == plain.structure
    assert hostile.texts["script"] == plain.texts["script"]
    assert word in hostile.cells  # and still reads as it was written


def test_names_that_are_no_unicode_are_written_all_the_same(tmp_path):
    page = full_page(tmp_path / "r.html", "caf\udce9 \x07\n\0 end")
    assert "caf?" in page.source


def test_the_page_can_be_used_without_eyes_and_mouse(tmp_path):
    page = full_page(tmp_path / "r.html", "plain")
    assert page.all("html")[0]["lang"] == "en"
    assert all("alt" in image for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img")[:-1])  # the last is filled when the dialog opens
    assert [tag for tag, _ in page.elements if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h2", "h2"]
    assert all(heading["scope"] in ("row", "col") for heading in page.all("th"))
    assert all(button["type"] == "button" for button in page.all("button"))
    assert page.all("dialog")[0]["aria-label"]
    assert all(
        attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") in ("img", "region")
    )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    own = [name for name in ids if not name.startswith("gt")]  # one chart stands on this page twice
    assert len(set(own)) == len(own)
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in ids


def contrast(one, other):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_curves_read_well_in_light_and_dark(tmp_path):
    page = full_page(tmp_path / "r.html", "plain")
    schemes = [dict(re.findall(r"--([\w-]+): ?(#[0-9a-f]{6})", part)) for part in page.source.split("@media", 2)[:2]]
    charts = [
        dict(re.findall(r"--gt-(\w+):(#[0-9a-f]{6})", part))
        for part in score_intervals([ScoreRow("a", 1.0)]).split("@media")
    ]
    assert schemes[0]["paper"] != schemes[1]["paper"]
    for scheme, chart in zip(schemes, charts, strict=True):
        for name in ("ink", "muted", "accent", "warn"):
            assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
        assert contrast(scheme["ink"], scheme["tint"]) >= 4.5
        assert contrast(chart["ink"], scheme["paper"]) >= 4.5
        assert contrast(chart["muted"], scheme["paper"]) >= 4.5
        for index in range(4):
            assert contrast(chart[f"series{index}"], scheme["paper"]) >= 3.0


def test_pictures_of_every_kind_are_embedded_small_and_clean(tmp_path):
    clear = np.zeros((40, 60, 4), np.uint8)
    clear[:, :30] = (200, 30, 60, 255)
    png, jpeg = tmp_path / "clear.png", io.BytesIO()
    Image.fromarray(clear).save(png)
    exif = Image.Exif()
    exif[0x010E] = "PATIENT NAME"
    Image.fromarray(picture()).save(jpeg, "JPEG", exif=exif, comment=b"PATIENT NAME")
    sources = (picture(height=300, width=100), picture()[..., 0], png, jpeg.getvalue(), picture(height=1, width=1))
    gallery = Gallery(tuple(Picture(source, str(i)) for i, source in enumerate(sources)), max_side=100)
    page = Page(write_report(tmp_path / "r.html", title="t", sections=[Section("s", (gallery,))]))
    images = [image_of(attributes) for attributes in page.all("img")[:-1]]
    assert [image.size for image in images] == [(33, 100), (100, 75), (60, 40), (100, 75), (1, 1)]
    sizes = [(int(attributes["width"]), int(attributes["height"])) for attributes in page.all("img")[:-1]]
    assert sizes == [image.size for image in images]
    assert np.asarray(images[2])[:, 35:].min() > 245  # what was transparent is white
    assert np.abs(np.asarray(images[2])[:, :25].astype(int) - (200, 30, 60)).mean() < 4
    for image in images:
        assert "exif" not in image.info
        assert "comment" not in image.info


def test_a_frame_takes_the_colour_of_the_picture_edge(tmp_path):
    slide = np.full((50, 200, 3), (240, 236, 238), np.uint8)
    slide[20:30, 80:120] = (120, 40, 130)
    gallery = Gallery((Picture(slide, "long core"), Picture(picture(), "square"), Picture(picture(), "square")))
    page = Page(write_report(tmp_path / "r.html", title="t", sections=[Section("s", (gallery,))]))
    style = page.all("button")[0]["style"]
    red, green, blue = map(int, re.search(r"background: rgb\((\d+) (\d+) (\d+)\)", style).groups())
    assert max(abs(red - 240), abs(green - 236), abs(blue - 238)) <= 3
    assert "aspect-ratio: 1.3333" in style


@pytest.mark.parametrize("make", ["missing", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named_and_the_old_report_stays(tmp_path, make):
    path, report = tmp_path / "thumb.jpg", tmp_path / "r.html"
    if make == "text":
        path.write_text("<svg onload='alert(1)'/>")
    if make == "truncated":
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue()[:600])
    report.write_text("old")
    with pytest.raises(StoreError, match=r"thumb\.jpg: cannot be shown"):
        write_report(report, title="t", sections=[Section("s", (Gallery((Picture(path, "a"),)),))])
    assert report.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} <= {"thumb.jpg", "r.html"}


def test_bad_blocks_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        Picture(np.zeros((4, 4, 3)), "float")
    with pytest.raises(ValueError, match="uint8"):
        Picture(np.zeros((4, 4, 4), np.uint8), "four channels")
    with pytest.raises(ValueError, match="row 1 has 1 cells"):
        Table(("a", "b"), ((1, 2), (3,)))
    with pytest.raises(ValueError, match="no row 2"):
        Table(("a",), ((1,), (2,)), problems=(2,))
    with pytest.raises(ValueError, match="positive"):
        Gallery((), columns=0)


@pytest.mark.parametrize(
    "inner",
    [
        "<script>alert(1)</script>",
        "<g onclick='alert(1)'/>",
        "<a href='https://example.org'><path d='M 0 0'/></a>",
        "<use href='https://example.org/x.svg#a'/>",
        "<image href='data:image/png;base64,'/>",
        "<foreignObject><p>hello</p></foreignObject>",
        "<path style='fill: url(https://example.org/x)'/>",
        "<style>@import 'https://example.org/x.css';</style>",
        "<style>* { background: u\\72l(https://example.org) }</style>",
        "<!--><script>alert(1)</script>-->",
        "<style><![CDATA[</style><script>alert(1)</script>]]></style>",
        "<svg/>",
        "<path>",
    ],
)
def test_a_chart_may_only_draw(inner):
    with pytest.raises(ValueError, match="chart must"):
        Chart(f"<svg xmlns='http://www.w3.org/2000/svg'>{inner}</svg>", "", "")


def test_numbers_in_a_column_line_up(tmp_path):
    rows = (("a", 11396, 0.5, 1e-6, "x"), ("b", 512, 0.2527, 0.25, 3), ("c", None, float("nan"), float("inf"), None))
    table = Table(("slide", "width", "mpp", "p", "mixed"), rows)
    page = Page(write_report(tmp_path / "r.html", title="t", sections=[Section("s", (table,))]))
    assert page.cells[5:] == [
        *("a", "11,396", "0.5000", "1e-06", "x"),
        *("b", "512", "0.2527", "0.25", "3"),
        *("c", "–", "–", "inf", "–"),
    ]
    heads = [heading.get("class") for heading in page.all("th") if heading["scope"] == "col"]
    assert heads == [None, "number", "number", "number", None]


def test_code_keeps_its_lines(tmp_path):
    path = write_report(tmp_path / "r.html", title="t", sections=[Section("s", (Code("a: 1\n  b: <2>"),))])
    assert '<pre class="block">a: 1\n  b: &lt;2&gt;</pre>' in path.read_text(encoding="utf-8")


def test_marked_rows_and_key_numbers(tmp_path):
    table = Table(("slide",), (("a",), ("b",), ("c",)), highlight=(0, 2), problems=(2,))
    numbers = [KeyNumber("n", 25600), KeyNumber("AUROC", 0.8712, "0.8 to 0.9"), KeyNumber("none", None)]
    page = Page(write_report(tmp_path / "r.html", title="t", key_numbers=numbers, sections=[Section("s", (table,))]))
    assert [row.get("class") for row in page.all("tr")] == [None, "highlight", None, "highlight problem"]
    assert page.source.count('aria-label="problem"') == 1
    assert re.findall(r'class="value">([^<]*)<', page.source) == ["25,600", "0.8712", "–"]


def test_an_empty_report_is_a_page(tmp_path):
    page = Page(write_report(tmp_path / "new" / "folder" / "r.html", title="Nothing"))
    assert "<h1>Nothing</h1>" in page.source
    write_report(tmp_path / "r.html", title="t", sections=[Section("s", (Gallery(()), Table(("a",), ()), Text(())))])


def test_the_same_report_is_the_same_file(tmp_path):
    assert full_page(tmp_path / "a.html", "x").source == full_page(tmp_path / "b.html", "x").source


def test_jinja2_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"gigatome\[learn\]"):
        write_report(tmp_path / "r.html", title="t")


def test_importing_reports_loads_nothing_heavy():
    code = "import sys, gigatome.evaluation.report, gigatome.evaluation.charts; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "jinja2", "sklearn"} & set(loaded)


def test_a_report_of_forty_slides_and_eight_maps_stays_under_six_megabytes(tmp_path, shared_data):
    files = sorted((shared_data / "regions").glob("*.tif"))
    levels = [tifffile.imread(file, key=1) for file in files]  # 1024 px; real tissue compresses worse than anything
    thumbnails = tuple(Picture(levels[i % len(levels)], str(i)) for i in range(40))
    maps = tuple(
        Picture(np.asarray(Image.fromarray(level).resize((1200, 1200), Image.Resampling.BICUBIC)), "map")
        for level in levels[:8]
    )
    sections = [Section("Slides", (Gallery(thumbnails, max_side=300),)), Section("Maps", (Gallery(maps, columns=2),))]
    path = write_report(tmp_path / "r.html", title="t", sections=sections)
    assert 1e6 < path.stat().st_size < 6e6


def test_the_cohort_page_puts_problems_first(tmp_path):
    reports = [
        SlideReport("good", "good.svs", "p1", 4000, 3000, 0.25, "aperio", 3, (), True),
        SlideReport("other", "other.svs", "p1", 8000, 3000, 0.5, "aperio", 3, (), True),
        SlideReport(
            "<b>bad</b>", "s3://key:secret@bucket/bad.svs?X-Signature=1", "p2", problems=("is empty", "is a copy")
        ),
    ]
    pictures = {"good": picture(), "<b>bad</b>": picture(1)}
    page = Page(cohort_page(tmp_path / "c.html", "cohort.csv", reports, pictures))
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", page.source)
    assert titles == ["Problems", "Pictures", "All slides"]
    assert page.cells[3:9] == [
        "<b>bad</b>",
        "is empty",
        "s3://bucket/bad.svs",
        "<b>bad</b>",
        "is a copy",
        "s3://bucket/bad.svs",
    ]
    assert page.cells[16:23] == ["<b>bad</b>", "p2", "", "–", "–", "–", "–"]
    assert page.cells[23:30] == ["good", "p1", "aperio", "4,000", "3,000", "0.25", "3"]
    assert re.findall(r'class="caption">([^<]*)<', page.source)[:2] == ["&lt;b&gt;bad&lt;/b&gt;", "good"]
    assert re.findall(r'class="value">([^<]*)<', page.source) == ["3", "2", "1", "0.036", "0.375"]
    assert "secret" not in page.source
    assert "Signature" not in page.source


def test_a_cohort_without_problems_or_pictures(tmp_path):
    reports = [SlideReport("good", "good.svs", "p1", 4000, 3000, None, "aperio", 3, (), False)]
    page = Page(cohort_page(tmp_path / "c.html", "cohort.csv", reports))
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page.source) == ["All slides"]

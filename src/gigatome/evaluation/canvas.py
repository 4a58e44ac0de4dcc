"""The canvas that charts are drawn on, and how it becomes SVG that fits a page.

matplotlib draws with stand-ins for colours; :func:`draw` turns them into custom properties that follow the reader's
light or dark scheme, so that a chart reads well inside a page and alone as a file in a browser.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from typing import Any, final

from gigatome.core.extras import require

PALETTE = {  # name: (light, dark); the series keep apart in any of the three colour-vision deficiencies
    "ink": ("#1d1c1a", "#e9e7e3"),
    "muted": ("#66635e", "#a19e98"),
    "hairline": ("#d8d5cf", "#3b3a38"),
    "series0": ("#3f51b5", "#8f9df5"),
    "series1": ("#c2541b", "#f0935a"),
    "series2": ("#009e77", "#86ead6"),
    "series3": ("#79346c", "#d9408f"),
}
INK, MUTED, HAIRLINE, *SERIES = (f"#0000{number:02x}" for number in range(1, len(PALETTE) + 1))
_NAMES = dict(zip((INK, MUTED, HAIRLINE, *SERIES), PALETTE, strict=True))

_FONT = "'Segoe UI','Helvetica Neue','Noto Sans','Liberation Sans','DejaVu Sans Condensed',system-ui,sans-serif"
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gigatome",
    "text.parse_math": False,  # a slide may be called $\alpha$
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": HAIRLINE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": HAIRLINE,
    "ytick.color": HAIRLINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
_SHAPES = {"path", "use", "line", "rect", "circle", "ellipse", "polyline", "polygon", "text", "tspan"}
_DRAWING = {"svg", "g", "defs", "clipPath", "style", "title", "desc"} | _SHAPES
_FETCHES = re.compile(r"url\(\s*(?!#)|@import|javascript:|expression\(|\\", re.IGNORECASE)
_OF_THE_READER = re.compile(r"(axes|font|text|lines|patch|[xy]tick|grid|svg|path|figure|savefig|hatch|markers)\.")


@final
class Canvas:
    """A matplotlib figure addressed in pixels from its top-left corner.

    Args:
        figure: the figure.
        width: in px.
        height: in px.
    """

    def __init__(self, figure: Any, width: int, height: int):
        self.figure, self.width, self.height = figure, width, height

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes in the given rectangle."""
        bottom = self.height - y - height
        rectangle = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(rectangle)

    def text(self, x: float, y: float, text: str, *, limit: int = 42, color: str = INK, size: int = 12, **style: Any):
        """One line of text, vertically centred at ``y``, cut after ``limit`` characters."""
        style = {"va": "center", **style}
        self.figure.text(x / self.width, 1 - y / self.height, clean(text, limit), color=color, fontsize=size, **style)

    def line(self, start: float, end: float, y: float, **style: Any):
        """A horizontal line, as in a legend."""
        from matplotlib.lines import Line2D

        self.figure.add_artist(Line2D((start / self.width, end / self.width), (1 - y / self.height,) * 2, **style))


def draw(width: int, height: int, paint: Callable[[Canvas], None]) -> str:
    """Runs ``paint`` on a canvas of ``width`` × ``height`` px and returns one SVG element.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "learn", "draw charts")
    from matplotlib.figure import Figure

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if _OF_THE_READER.match(key)}
    buffer = io.StringIO()
    with matplotlib.rc_context({**defaults, **_SETTINGS}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that matplotlib's font lacks: the reader's may have it
        figure = Figure(figsize=(width / 72, height / 72))
        paint(Canvas(figure, width, height))
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), width, height)


def clean(text: object, limit: int = 1000) -> str:
    """``text`` on one line, without what XML cannot hold, and with an ellipsis beyond ``limit`` characters."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def safe_svg(svg: str) -> str:
    """``svg`` written anew, for a page that is to hold it.

    Raises:
        ValueError: it is not one SVG element, or does more than draw: runs, links, or fetches from elsewhere.
    """
    if "<!" in svg:
        raise ValueError("a chart must be one plain <svg> element, without comments and declarations")
    try:
        root = _local(ET.fromstring(svg))  # noqa: S314 - there is no declaration in it that could expand
    except ET.ParseError as error:
        raise ValueError(f"a chart must be one well-formed <svg> element: {error}") from error
    for element in root.iter():
        if element.tag not in _DRAWING or (element is root) != (element.tag == "svg"):
            raise ValueError(f"a chart must only draw; <{element.tag}> is not allowed in it")
        for name, value in element.attrib.items():
            if (
                name.lower().startswith("on")
                or (name == "href" and not value.startswith("#"))
                or _FETCHES.search(value)
            ):
                raise ValueError(f"a chart must only draw; {name}={value[:60]!r} is not allowed in it")
        if element.tag == "style" and _FETCHES.search(element.text or ""):
            raise ValueError("a chart must only draw; its style fetches something")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    return ET.tostring(root, encoding="unicode")


def _themed(svg: str, width: int, height: int) -> str:
    """The SVG of matplotlib as one small element whose colours follow the reader's scheme and whose ids are its own."""
    root = _local(ET.fromstring(svg))  # noqa: S314 - written by matplotlib a moment ago
    prefix = f"gt{zlib.crc32(svg.encode()):08x}-"
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip() or None, None
        attributes = dict(element.attrib)
        element.attrib.clear()
        for name, value in attributes.items():
            if not (value.startswith("rotate(-0 ") or (name == "id" and value not in used)):
                element.set(name, _attribute(name, value, prefix))
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    for style in root.iter("style"):
        style.text = _stylesheet()  # in place of a rule for every element of the page
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    root.attrib.clear()
    root.attrib.update({"xmlns": "http://www.w3.org/2000/svg", "class": "gt-chart", **size})
    return ET.tostring(root, encoding="unicode")


def _local(root: ET.Element) -> ET.Element:
    """``root`` with all names of elements and attributes freed of their namespaces, as HTML writes them."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)
    return root


def _attribute(name: str, value: str, prefix: str) -> str:
    """One attribute: ids made unique to the chart, colours made properties, coordinates cut to hundredths of a px."""
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value[1:]}"
    if name == "clip-path":
        return value.replace("(#", f"(#{prefix}")
    if name == "d":
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), _spaced(value))
    if name == "style":
        value = re.sub(r"font-family: [^;]*(; )?", "", value)
        return re.sub(r"#0000[0-9a-f]{2}", lambda color: f"var(--gt-{_NAMES.get(color[0], 'ink')})", value)
    return value


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _stylesheet() -> str:
    light, dark = (";".join(f"--gt-{name}:{pair[scheme]}" for name, pair in PALETTE.items()) for scheme in (0, 1))
    return (
        f".gt-chart{{{light}}}@media screen and (prefers-color-scheme:dark){{.gt-chart{{{dark}}}}}"
        f".gt-chart *{{stroke-linejoin:round;stroke-linecap:butt}}.gt-chart text{{font-family:{_FONT}}}"
    )

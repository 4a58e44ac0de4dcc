"""What the panels of a study share: their size, the styles of arms, axes and legends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gigatome.evaluation.canvas import HAIRLINE, MUTED, SERIES, Canvas, draw

WIDTH = 448  # px; two stand side by side on a page, one fills a phone
SIZE, SMALL = 13, 12
LEFT, TOP, LINE = 50, 38, 25
SIDE = WIDTH - LEFT - 10
_DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)))
CHANCE = MappingProxyType({"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))})  # how a guess is drawn


@dataclass(frozen=True)
class Style:
    """How an arm is drawn.

    Attributes:
        color: stand-in of :mod:`gigatome.evaluation.canvas`.
        dash: of its line, as matplotlib takes it.
    """

    color: str
    dash: Any = "-"


def styles(nulls: Sequence[bool]) -> tuple[Style, ...]:
    """A style for each arm; those that are null are grey."""
    found, known, unknown = [], 0, 0
    for null in nulls:
        if null:
            found.append(Style(MUTED, _DASHES[(unknown + 2) % 3]))
            unknown += 1
        else:
            found.append(Style(SERIES[known % len(SERIES)], _DASHES[known // len(SERIES) % 3]))
            known += 1
    return tuple(found)


def draw_panel(height: int, paint: Callable[[Canvas], None]) -> str:
    """A chart that fills half a page, or a phone, and is never larger than its words need."""
    svg = draw(WIDTH, height, paint)
    return svg.replace('class="gt-chart"', 'class="gt-chart panel" style="min-width:0;max-width:32rem"', 1)


def plain_axes(canvas: Canvas, x: float, y: float, width: float, height: float) -> Any:
    """Axes in the given rectangle, with the panels' labels, behind what is drawn."""
    axes = canvas.axes(x, y, width, height)
    axes.tick_params(labelsize=SMALL)
    axes.set_axisbelow(True)
    return axes


def unit_axes(canvas: Canvas, names: tuple[str, str]) -> Any:
    """Axes from 0 to 1 with their names."""
    axes = plain_axes(canvas, LEFT, TOP, SIDE, SIDE)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(color=HAIRLINE, linewidth=0.6)
    quiet_ticks(axes, "x")
    quiet_ticks(axes, "y")
    canvas.text(LEFT + SIDE, TOP + SIDE + 36, names[0], color=MUTED, ha="right", size=SMALL)
    canvas.text(8, TOP + SIDE / 2, names[1], color=MUTED, ha="center", rotation=90, size=SMALL)
    return axes


def quiet_ticks(axes: Any, which: str) -> None:
    """A few round ticks on the ``"x"`` or ``"y"`` axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", "−")))


def legend(canvas: Canvas, y: float, label: str, note: str, style: Style) -> None:
    """One line of a legend: how it is drawn, its label, and ``note`` at the right end."""
    canvas.line(0, 26, y, color=style.color, linewidth=2.2, linestyle=style.dash)
    canvas.text(36, y, label, size=SIZE, limit=34)
    canvas.text(WIDTH, y, note, size=SIZE, ha="right")


def round_limits(values: Sequence[float]) -> tuple[float, float]:
    """Round limits around all finite values, with a little room; shares stay within 0 and 1."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(high - low, 0.02) * 0.06
    unit = 10 ** math.floor(math.log10(max(high - low, 0.02) * 0.6))
    ends = math.floor((low - room) / unit) * unit, math.ceil((high + room) / unit) * unit
    return (max(ends[0], 0.0), min(ends[1], 1.0)) if low >= 0 and high <= 1 else ends

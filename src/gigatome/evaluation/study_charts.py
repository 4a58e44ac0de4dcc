"""Charts of a study, as SVG text; they look and behave as those of :mod:`gigatome.evaluation.charts`.

Each is a panel as wide as half a page, whose words stay readable when it fills the width of a phone. An arm keeps its
colour and dash over all panels; arms that know nothing are grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigatome.evaluation.calibration import Reliability
from gigatome.evaluation.canvas import HAIRLINE, INK, MUTED, Canvas
from gigatome.evaluation.curves import CurveBand, LearningCurve
from gigatome.evaluation.study_panel import (
    CHANCE,
    LEFT,
    LINE,
    SIDE,
    SIZE,
    SMALL,
    TOP,
    WIDTH,
    Style,
    draw_panel,
    legend,
    plain_axes,
    quiet_ticks,
    round_limits,
    unit_axes,
)
from gigatome.evaluation.survival_curves import SurvivalCurve


@dataclass(frozen=True)
class Dot:
    """One line of :func:`dots_panel`.

    Attributes:
        label: what was scored.
        value: the score; NaN if there is none.
        low: lower end of its interval; NaN if unknown.
        high: upper end of its interval; NaN if unknown.
        folds: scores of the folds, drawn small.
        reported: value to reproduce, drawn hollow; None for none.
        style: how it is drawn.
    """

    label: str
    value: float
    low: float
    high: float
    style: Style
    folds: tuple[float, ...] = ()
    reported: float | None = None


@dataclass(frozen=True, eq=False)
class Line:
    """One curve of :func:`curve_panel`; ``note`` stands beside its label."""

    label: str
    band: CurveBand
    style: Style
    note: str = ""


@dataclass(frozen=True, eq=False)
class Group:
    """One curve of :func:`survival_panel`."""

    label: str
    curve: SurvivalCurve
    style: Style


def dots_panel(
    title: str, dots: Sequence[Dot], *, line: float | None = None, word: str = "chance", signed: bool = False
) -> str:
    """Scores, or differences, as dots with their intervals, each below its name and number.

    Args:
        title: of the panel.
        dots: drawn in this order.
        line: score of a guess, or no difference; None for no line.
        word: what the line is called.
        signed: whether numbers take a sign.
    """
    long = any(len(dot.label) > 29 for dot in dots)  # the numbers then stand below the name
    step, top = (64 if long else 46), 58
    height = top + step * len(dots) + 40
    drawn = [v for d in dots for v in (d.value, d.low, d.high, *d.folds, d.reported, line) if v is not None]
    low, high = round_limits(drawn)
    side = WIDTH - 20

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=60)
        axes = plain_axes(canvas, 10, top, side, step * len(dots))
        axes.set(xlim=(low, high), ylim=(len(dots), 0), yticks=[])
        axes.spines["left"].set_visible(False)
        quiet_ticks(axes, "x")
        rows = np.arange(len(dots))
        foot = rows + 1 - 20 / step
        for tick in axes.get_xticks():
            axes.vlines(np.full(len(dots), tick), foot, rows + 1 - 2 / step, color=HAIRLINE, linewidth=0.6)
        if line is not None and _known(line):
            axes.vlines(np.full(len(dots), line), foot, rows + 1 - 2 / step, **CHANCE)
            at = 10 + side * (line - low) / (high - low)
            near = "left" if at < 40 else "right" if at > WIDTH - 40 else "center"
            canvas.text(at, top - 11, word, color=MUTED, ha=near, size=SMALL)
        for row, dot in enumerate(dots):
            y = top + row * step + 15
            spelt, interval = _spelt(dot, signed)
            canvas.text(4, y, dot.label, size=SIZE, limit=60)
            y += 18 if long else 0
            canvas.text(WIDTH - 6 - len(interval) * 6.4, y, spelt, size=SIZE, ha="right")
            canvas.text(WIDTH, y, interval, color=MUTED, size=SMALL, ha="right")
            _dot(axes, dot, row + 1 - 11 / step)

    return draw_panel(height, paint)


def curve_panel(
    title: str, lines: Sequence[Line], *, axes_names: tuple[str, str], baseline: float | None, heading: str = ""
) -> str:
    """ROC or precision–recall curves with their bands, and a legend below them.

    Args:
        title: of the panel.
        lines: the curves; one that is not defined is named and not drawn.
        axes_names: names of the axes, horizontal first.
        baseline: height of a guess's horizontal line; None for the diagonal of a ROC curve.
        heading: what the lines' notes are.
    """
    below = TOP + SIDE + 50
    height = below + LINE * len(lines) + (22 if heading else 0) + 4

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=60)
        axes = unit_axes(canvas, axes_names)
        axes.plot([0, 1], [0, 1] if baseline is None else [baseline] * 2, **CHANCE)
        if heading:
            canvas.text(WIDTH, below + 10, heading, color=MUTED, size=SMALL, ha="right")
        for row, line in enumerate(lines):
            y = below + LINE * row + (34 if heading else 12)
            band, known = line.band, math.isfinite(line.band.area)
            legend(canvas, y, line.label, line.note if known else "undefined", line.style)
            if known:
                axes.fill_between(band.at, band.low, band.high, color=line.style.color, alpha=0.13, linewidth=0)
                axes.plot(
                    band.x, band.y, color=line.style.color, linestyle=line.style.dash, linewidth=1.9, clip_on=False
                )

    return draw_panel(height, paint)


def calibration_panel(
    title: str,
    found: Reliability,
    style: Style,
    *,
    shares: NDArray[np.float64],
    error: float,
    axes_names: tuple[str, str],
) -> str:
    """What came true against what was predicted, with the predictions' distribution at the foot.

    Args:
        title: of the panel.
        found: the curve and its band.
        style: how it is drawn.
        shares: float64 [K], of all predictions, in K equal parts from 0 to 1.
        error: expected calibration error.
        axes_names: names of the axes, horizontal first.
    """

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=42)
        canvas.text(WIDTH, 12, f"ECE {error:.3f}", color=MUTED, size=SMALL, ha="right")
        axes = unit_axes(canvas, axes_names)
        tallest = max(float(shares.max()), 1e-9)
        edges = np.arange(len(shares)) / len(shares)
        axes.bar(edges, 0.16 * shares / tallest, 1 / len(edges), align="edge", color=HAIRLINE, alpha=0.6, linewidth=0)
        axes.plot([0, 1], [0, 1], **CHANCE)
        color = style.color
        axes.fill_between(found.predicted, found.low, found.high, color=color, alpha=0.13, linewidth=0)
        axes.vlines(found.predicted, found.low, found.high, color=color, linewidth=1.4, alpha=0.7)
        axes.plot(found.predicted, found.observed, color=color, linewidth=1.9, clip_on=False)
        axes.plot(found.predicted, found.observed, "o", color=color, markersize=7, markeredgewidth=0, clip_on=False)

    return draw_panel(TOP + SIDE + 46, paint)


def confusion_panel(title: str, matrix: NDArray[np.int64], classes: Sequence[str], style: Style) -> str:
    """How many of each class (rows) were predicted as which (columns), shaded by the share of the row.

    Args:
        title: of the panel.
        matrix: int64 [C, C].
        classes: names [C].
        style: its colour is the shade.
    """
    from matplotlib.patches import Rectangle

    count = len(classes)
    left = 30 + min(7 * max(map(len, classes)), 98)
    side = WIDTH - left - 4
    cell = side / count
    row = min(cell, 120)
    upright = cell >= 40
    foot = 44 if upright else 26 + min(7 * max(map(len, classes)), 98)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=60)
        axes = canvas.axes(left, TOP, side, row * count)
        axes.set(xlim=(0, count), ylim=(count, 0), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        for i, j in np.ndindex(count, count):
            place = (j + 0.02, i + 0.02)
            axes.add_patch(Rectangle(place, 0.96, 0.96, facecolor=HAIRLINE, alpha=0.3, linewidth=0))
            axes.add_patch(
                Rectangle(place, 0.96, 0.96, facecolor=style.color, alpha=0.5 * float(shares[i, j]), linewidth=0)
            )
            x, y = left + (j + 0.5) * cell, TOP + (i + 0.5) * row
            if cell >= 64:
                canvas.text(x, y - 8, f"{matrix[i, j]:,}", ha="center", size=15, weight="bold" if i == j else "normal")
                canvas.text(x, y + 11, f"{100 * shares[i, j]:.0f} %", ha="center", size=SMALL)
            elif cell >= 26:
                canvas.text(x, y, f"{matrix[i, j]:,}", ha="center", size=11, weight="bold" if i == j else "normal")
        for index, name in enumerate(classes):
            canvas.text(left - 8, TOP + (index + 0.5) * row, name, ha="right", size=SMALL, limit=14)
            x, y = left + (index + 0.5) * cell, TOP + row * count
            if upright:
                canvas.text(x, y + 14, name, ha="center", size=SMALL, limit=max(3, min(14, int(cell / 7))))
            else:
                canvas.text(x, y + 6, name, ha="center", va="top", rotation=90, size=SMALL, limit=14)
        canvas.text(WIDTH - 4, TOP + row * count + foot - 8, "predicted", color=MUTED, ha="right", size=SMALL)
        canvas.text(8, TOP + row * count / 2, "true", color=MUTED, ha="center", rotation=90, size=SMALL)

    return draw_panel(round(TOP + row * count + foot), paint)


def survival_panel(title: str, groups: Sequence[Group], *, unit: str, note: str = "") -> str:
    """Kaplan–Meier curves with their bands, ticks where someone was censored, and the number at risk below.

    Args:
        title: of the panel.
        groups: such as high and low risk.
        unit: of time.
        note: such as the log-rank p-value; stands within the plot.
    """
    from matplotlib.ticker import MaxNLocator

    tall = 300
    below = TOP + tall + 52
    height = below + LINE * (len(groups) + 1)
    end = max((float(group.curve.times[-1]) for group in groups), default=0) or 1.0
    ticks = np.array([t for t in MaxNLocator(5, steps=[1, 2, 2.5, 5, 6, 10]).tick_values(0, end) if 0 <= t <= end])

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=60)
        axes = plain_axes(canvas, LEFT, TOP, SIDE, tall)
        axes.set(xlim=(0, end * 1.01), ylim=(0, 1.02))
        axes.grid(color=HAIRLINE, linewidth=0.6)
        quiet_ticks(axes, "y")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        canvas.text(8, TOP + tall / 2, "survival", color=MUTED, ha="center", rotation=90, size=SMALL)
        canvas.text(LEFT + SIDE, below - 16, unit, color=MUTED, ha="right", size=SMALL)
        if note:
            canvas.text(LEFT + 12, TOP + tall - 18, note, size=SIZE, limit=50)
        canvas.text(0, below + 6, "at risk", color=MUTED, size=SMALL)
        for row, group in enumerate(groups):
            curve, color = group.curve, group.style.color
            times, survival, low, high = (
                np.r_[start, values]
                for start, values in ((0, curve.times), (1, curve.survival), (1, curve.low), (1, curve.high))
            )
            axes.fill_between(times, low, high, step="post", color=color, alpha=0.13, linewidth=0)
            axes.step(times, survival, where="post", color=color, linewidth=1.9, linestyle=group.style.dash)
            marks = curve.times[curve.censored > 0], curve.survival[curve.censored > 0]
            axes.plot(*marks, "|", color=color, markersize=6, markeredgewidth=1)
            y = below + 6 + LINE * (row + 1)
            canvas.line(0, 14, y, color=color, linewidth=2.4, linestyle=group.style.dash)
            canvas.text(19, y, group.label, size=SMALL, limit=8)
            for tick, left in zip(ticks, curve.at_risk_at(ticks), strict=True):
                x = LEFT + SIDE * tick / (end * 1.01)
                canvas.text(max(x, LEFT + 14), y, f"{left:,.0f}", size=SMALL, ha="center")

    return draw_panel(height, paint)


def learning_panel(
    title: str, curves: Sequence[tuple[LearningCurve, Style]], *, axis: str, chance: float | None = None
) -> str:
    """Mean scores against the number of training slides, on a logarithmic axis, with a band of one SD.

    Args:
        title: of the panel.
        curves: each with its style.
        axis: what the horizontal axis counts.
        chance: score of a guess.
    """
    from matplotlib.ticker import NullLocator

    tall = 320
    below = TOP + tall + 52
    height = below + LINE * len(curves) + 6
    counts = sorted({int(n) for curve, _ in curves for n in curve.n_train})

    def paint(canvas: Canvas) -> None:
        canvas.text(0, 12, title, weight="bold", size=SIZE, limit=60)
        axes = plain_axes(canvas, LEFT, TOP, SIDE, tall)
        axes.set_xscale("log")
        axes.grid(color=HAIRLINE, linewidth=0.6)
        drawn = [chance] if chance is not None else []
        for row, (curve, style) in enumerate(curves):
            sd = np.nan_to_num(curve.sd)
            low, high = curve.mean - sd, curve.mean + sd
            drawn += [*low, *high]
            axes.fill_between(curve.n_train, low, high, color=style.color, alpha=0.13, linewidth=0)
            axes.plot(curve.n_train, curve.mean, color=style.color, linestyle=style.dash, linewidth=1.9)
            axes.plot(curve.n_train, curve.mean, "o", color=style.color, markersize=6, markeredgewidth=0)
            legend(canvas, below + 12 + LINE * row, curve.label, f"{curve.mean[-1]:.3f}", style)
        if chance is not None:
            axes.axhline(chance, **CHANCE)
        axes.set_ylim(*round_limits(drawn))
        quiet_ticks(axes, "y")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(counts), [f"{n:,}" for n in _apart(counts)])
        canvas.text(LEFT + SIDE, below - 16, axis, color=MUTED, ha="right", size=SMALL)

    return draw_panel(height, paint)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _spelt(dot: Dot, signed: bool) -> tuple[str, str]:
    if not _known(dot.value):
        return "none", ""
    form = (lambda value: f"{value:+.3f}".replace("-", "−")) if signed else (lambda value: f"{value:.3f}")
    known = _known(dot.low) and _known(dot.high)
    return form(dot.value), f"{form(dot.low)} to {form(dot.high)}" if known else "no interval"


def _dot(axes: Any, dot: Dot, y: float) -> None:
    color = dot.style.color
    folds = [value for value in dot.folds if _known(value)]
    axes.plot(folds, [y] * len(folds), "o", color=color, markersize=4, alpha=0.35, markeredgewidth=0, clip_on=False)
    if _known(dot.low) and _known(dot.high):
        axes.plot([dot.low, dot.high], [y, y], color=color, linewidth=2.2, solid_capstyle="round", clip_on=False)
    if dot.reported is not None and _known(dot.reported):
        axes.plot([dot.reported], [y], "D", color="none", markeredgecolor=INK, markersize=8, markeredgewidth=1.4)
    if _known(dot.value):
        axes.plot([dot.value], [y], "o", color=color, markersize=9, markeredgewidth=0, clip_on=False, zorder=3)


def _apart(counts: Sequence[int]) -> list[int]:
    """Those of the rising counts whose labels do not touch on a logarithmic axis."""
    kept: list[int] = []
    span = math.log(counts[-1] / counts[0]) if len(counts) > 1 else 1.0
    for count in counts:
        if not kept or math.log(count / kept[-1]) > 0.09 * span:
            kept.append(count)
    return kept

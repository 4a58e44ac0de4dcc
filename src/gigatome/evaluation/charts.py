"""Charts of a report, as SVG text.

Each function returns one ``<svg>`` element: transparent, in the reader's light or dark scheme, its words as text, the
same bytes for the same data. matplotlib draws it; it is imported when a chart is drawn, and its settings are swapped
for the time of one drawing, so charts are not to be drawn from several threads at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gigatome.evaluation.canvas import HAIRLINE, MUTED, SERIES, Canvas, draw

_MARKERS = "oDs^"
_DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)))
_MEASURES = (  # key in metrics.jsonl, what the reader sees
    ("loss", "Loss"),
    ("teacher_entropy", "Teacher entropy, nats"),
    ("kl", "KL to the teacher, nats"),
    ("grad_norm", "Gradient norm"),
    ("lr", "Learning rate"),
    ("momentum", "Teacher momentum"),
    ("rankme", "RankMe"),
    ("odcorr", "ODCorr"),
    ("knn", "kNN accuracy"),
    ("linear", "Linear accuracy"),
    ("images_per_s", "Images per second"),
    ("data_wait_s", "Wait for data, s"),
)
_WIDTH, _GAP = 1056, 32  # px; a page shows a chart about as wide
_MAX_POINTS = 150  # a panel is about 200 px wide


@dataclass(frozen=True)
class ScoreRow:
    """One line of :func:`score_intervals`.

    Attributes:
        label: what was scored.
        value: the score; NaN if there is none.
        low: lower end of its interval; NaN if unknown.
        high: upper end of its interval; NaN if unknown.
        group: rows of one group stand together under its name and share a colour.
    """

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    group: str = ""


@dataclass(frozen=True, eq=False)
class RocCurve:
    """One curve of :func:`roc_curves`.

    Attributes:
        label: what is drawn.
        truth: bool [N], True for the positive class.
        score: float [N], higher for the positive class.
    """

    label: str
    truth: np.ndarray
    score: np.ndarray

    def __post_init__(self):
        if np.shape(self.truth) != np.shape(self.score) or np.ndim(self.truth) != 1:
            raise ValueError(
                f"truth and score must be of one length, not {np.shape(self.truth)}, {np.shape(self.score)}"
            )


def training_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Small multiples of what a training run logged.

    Args:
        records: lines of ``metrics.jsonl``. Drawn over ``step``, where present: loss, teacher_entropy, kl, grad_norm,
            lr, momentum, images_per_s, data_wait_s. Of a step that was logged twice, as after a resume, the later line
            counts; values that are no finite numbers are left out. Beyond 150 points the line is the median of
            neighbouring records, and a band shows their minimum and maximum.

    Returns:
        One SVG element; it says so when there is nothing to draw.
    """
    series = [(title, *_column(records, key)) for key, title in _MEASURES]
    series = [(title, steps, values) for title, steps, values in series if len(steps)]
    if not series:
        return _notice("No training records yet")
    columns = 3 if len(series) in (3, 5, 6) else min(4, len(series))
    rows = math.ceil(len(series) / columns)
    panel_height, slot, left, right = (184 if columns > 2 else 240), (_WIDTH + _GAP) / columns, 44, _GAP + 12
    first = min(int(steps[0]) for _, steps, _ in series)
    last = max(int(steps[-1]) for _, steps, _ in series)

    def paint(canvas: Canvas) -> None:
        for index, (title, steps, values) in enumerate(series):
            x, y = index % columns * slot, index // columns * panel_height
            axes = canvas.axes(x + left, y + 28, slot - right - left, panel_height - 64)
            _curve(axes, steps, values)
            _quiet_ticks(axes, steps=True)
            if last > first:
                axes.set_xlim(first, last)
            else:
                axes.set_xticks([first])
            if values.min() == values.max():
                axes.set_yticks(values[:1])
            canvas.text(x, y + 10, title, weight="bold")
            canvas.text(x + slot - right, y + 10, _short(float(values[-1])), color=MUTED, ha="right")
        last_panel = ((len(series) - 1) % columns + 1) * slot - right
        canvas.text(last_panel, rows * panel_height, "step", color=MUTED, ha="right")

    return draw(_WIDTH, rows * panel_height + 10, paint)


def score_intervals(rows: Sequence[ScoreRow], *, chance: float | None = 0.5, measure: str = "AUROC") -> str:
    """Scores as dots with their intervals, one row each, and a line where chance lies.

    Args:
        rows: the scores, drawn in this order; groups in the order in which they first come.
        chance: score of a guess, or None for no line.
        measure: name of the score.

    Returns:
        One SVG element; it says so when there is nothing to draw.
    """
    if not rows:
        return _notice("No scores yet")
    groups = list(dict.fromkeys(row.group for row in rows))
    row_height, top, plot_left, plot_width = 28, 30, 290, 570
    lines: list[tuple[int, ScoreRow | None]] = []  # (group, row or None for its heading)
    for number, group in enumerate(groups):
        if group:
            lines.append((number, None))
        lines += [(number, row) for row in rows if row.group == group]
    height = top + len(lines) * row_height + 48
    low, high = _score_limits(rows, chance)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes(plot_left, top, plot_width, len(lines) * row_height)
        axes.set_xlim(low, high)
        axes.set_ylim(len(lines), 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=HAIRLINE, linewidth=0.6)
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            at = plot_left + plot_width * (chance - low) / (high - low)
            canvas.text(at, top - 12, "chance", color=MUTED, ha="center", size=11)
        for line, (number, row) in enumerate(lines):
            y = top + (line + 0.5) * row_height
            if row is None:
                canvas.text(0, y, groups[number], weight="bold")
                continue
            canvas.text(16 if row.group else 0, y, row.label)
            value, interval = _spelt(row)
            canvas.text(plot_left + plot_width + 76, y, value, ha="right")
            canvas.text(_WIDTH, y, interval, color=MUTED, ha="right")
            _dot(axes, row, line + 0.5, number)
        canvas.text(plot_left + plot_width, height - 10, measure, color=MUTED, ha="right")

    return draw(_WIDTH, height, paint)


def roc_curves(curves: Sequence[RocCurve]) -> str:
    """Receiver operating characteristics with the area under each.

    Args:
        curves: truth and score of out-of-fold predictions. A curve with one class only, or with scores that are not
            finite, is named and not drawn.

    Returns:
        One SVG element; it says so when there is nothing to draw.
    """
    if not curves:
        return _notice("No predictions yet")
    side, left, top = 380, 48, 10
    legend, height = left + side + 56, max(side + 60, 50 + 28 * len(curves))

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes(left, top, side, side)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.grid(color=HAIRLINE, linewidth=0.6)
        _quiet_ticks(axes)
        canvas.text(left + side, height - 10, "false positive rate", color=MUTED, ha="right")
        canvas.text(6, top + side / 2, "true positive rate", color=MUTED, ha="center", rotation=90)
        canvas.text(legend + 84, top + 6, "AUROC", ha="right", color=MUTED, size=11)
        for index, curve in enumerate(curves):
            y = top + 34 + 28 * index
            style = {"color": SERIES[index % len(SERIES)], "linestyle": _DASHES[index // len(SERIES) % len(_DASHES)]}
            rates = _roc(np.asarray(curve.truth, bool), np.asarray(curve.score, float))
            canvas.text(legend + 104, y, curve.label, limit=64)
            if rates is None:
                canvas.text(legend + 84, y, "undefined", ha="right", color=MUTED)
                continue
            axes.plot(*rates, linewidth=1.8, clip_on=False, zorder=3, **style)
            canvas.line(legend, legend + 28, y, linewidth=1.8, **style)
            canvas.text(legend + 84, y, f"{np.trapezoid(rates[1], rates[0]):.3f}", ha="right")

    return draw(_WIDTH, height, paint)


def _notice(text: str) -> str:
    return draw(_WIDTH, 48, lambda canvas: canvas.text(0, 24, text, color=MUTED, size=13))


def _column(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [N], ascending, and finite values float64 [N] of one key."""
    found: dict[int, float] = {}
    for record in records:
        step, value = record.get("step"), record.get(key)
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            found[step] = float(value)
    steps = sorted(found)
    return np.array(steps, np.int64), np.array([found[step] for step in steps])


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    color = SERIES[0]
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=color, markersize=5, markeredgewidth=0)
        return
    size = math.ceil(len(steps) / _MAX_POINTS)
    if size > 1:
        starts = np.arange(0, len(steps), size)
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        middle = np.array([np.median(values[start : start + size]) for start in starts])
        steps, values = steps[starts], middle
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, values, color=color, linewidth=1.6)


def _quiet_ticks(axes: Any, *, steps: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=steps))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        small = max(map(abs, limits)) < 0.01
        axis.set_major_formatter(FuncFormatter(lambda value, _, small=small: _short(value, small)))


def _short(value: float, small: bool | None = None) -> str:
    """A number in about six characters: 0.9961, 5.31, 12,000, 250k and, if ``small``, 4.5e-4; None: if it is small."""
    size = abs(value)
    if small is None:
        small = size < 0.01
    if value == 0:
        return "0"
    if small or size >= 1e9:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 100_000:
        return f"{value / 1e6:.3g}M" if size >= 1e6 else f"{value / 1e3:.0f}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _score_limits(rows: Sequence[ScoreRow], chance: float | None) -> tuple[float, float]:
    """Limits of the axis in tenths (or in rounder units) around all that is drawn."""
    drawn = [value for row in rows for value in (row.value, row.low, row.high) if math.isfinite(value)]
    drawn += [] if chance is None else [chance]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    unit = 10 ** math.floor(math.log10(max(high - low, 1e-6)))
    start = math.floor(low / unit - 0.2) * unit  # room for the word at the line of chance
    return max(start, 0.0) if low >= 0 else start, math.ceil(high / unit - 1e-9) * unit


def _spelt(row: ScoreRow) -> tuple[str, str]:
    if not math.isfinite(row.value):
        return "none", ""
    known = math.isfinite(row.low) and math.isfinite(row.high)
    return f"{row.value:.3f}", f"{row.low:.3f} to {row.high:.3f}" if known else "no interval"


def _dot(axes: Any, row: ScoreRow, y: float, group: int) -> None:
    color = SERIES[group % len(SERIES)]
    if math.isfinite(row.low) and math.isfinite(row.high):
        axes.plot([row.low, row.high], [y, y], color=color, linewidth=2, solid_capstyle="round", clip_on=False)
    if math.isfinite(row.value):
        marker = _MARKERS[group % len(_MARKERS)]
        axes.plot([row.value], [y], marker, color=color, markersize=8, markeredgewidth=0, clip_on=False, zorder=3)


def _roc(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates, float64 [K], equal scores taken as one step; None without two classes."""
    if not len(truth) or truth.all() or not truth.any() or not np.isfinite(score).all():
        return None
    order = np.argsort(-score, kind="stable")
    truth, score = truth[order], score[order]
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.concatenate([[0.0], np.cumsum(truth)[ends] / truth.sum()])
    false = np.concatenate([[0.0], np.cumsum(~truth)[ends] / (~truth).sum()])
    return false, true

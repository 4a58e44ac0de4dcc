"""A study as a folder: one page that holds everything, the same as JSON, predictions as tables, figures as SVG."""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gigatome.blob.store import write_atomic
from gigatome.core.errors import EvaluationError
from gigatome.core.version import __version__
from gigatome.evaluation.report import (
    Block,
    Cell,
    Chart,
    Code,
    Gallery,
    KeyNumber,
    Picture,
    Section,
    Table,
    Text,
    write_report,
)
from gigatome.evaluation.result import EvaluationResult, Scores
from gigatome.evaluation.study import Arm, Study
from gigatome.evaluation.study_figures import Figure, Figures
from gigatome.evaluation.study_files import (
    Headline,
    file_names,
    flat,
    headline,
    interval,
    p_value,
    scored,
    signed,
    spelt,
    spread,
    study_json,
)

_TESTS = {
    "bootstrap": "paired bootstrap over patients",
    "delong": "DeLong",
    "corrected t": "corrected t over folds",
    "permutation": "permutation",
}
_METRICS = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy", "c_index": "c-index"}
_MOST_FOLDS, _MOST_NAMES, _MOST_TILES = 20, 40, 48


@dataclass(frozen=True)
class _Row:
    """An arm with its main score."""

    arm: Arm
    score: Headline
    label: str  # as the tables have it: null rows say that they are


def write_study(study: Study, folder: str | Path) -> Path:
    """Writes a study: ``report.html``, ``study.json``, ``predictions_<arm>.csv`` and ``figures/*.svg``.

    The page needs nothing but itself. The same study gives the same files.

    Args:
        study: the arms and what was found of them.
        folder: made if it is not there; files of those names are replaced, each whole or not at all.

    Returns:
        The page.

    Raises:
        EvaluationError: there is no arm, two arms have one label, or classes and survival are mixed.
        StoreError: a file cannot be written.
        MissingExtraError: jinja2, matplotlib or scipy is not installed.
    """
    rows = _rows(study)
    folder = Path(folder)
    figures = Figures(study.arms)
    sections = [
        _results(study, rows, figures),
        _comparisons(study),
        *(_survival(study, figures) if rows[0].score.metric == "c-index" else _classes(figures)),
        _few_shot(study, figures),
        _tiles(study),
        _folds(rows),
        _excluded(study),
        _settings(study, rows),
    ]
    names = file_names([arm.label for arm in study.arms])
    for arm in study.arms:
        write_atomic(folder / f"predictions_{names[arm.label]}.csv", arm.result.predictions_csv())
    for figure in figures.drawn:
        write_atomic(folder / "figures" / f"{figure.name}.svg", figure.svg + "\n")
    found = study_json(study, [f"figures/{figure.name}.svg" for figure in figures.drawn])
    write_atomic(folder / "study.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return write_report(
        folder / "report.html",
        title=study.title,
        subtitle=_subtitle(study),
        key_numbers=_key_numbers(study, rows),
        sections=[section for section in sections if section is not None],
        footer=f"gigatome {__version__} · Python {platform.python_version()} · for research use only",
    )


def _rows(study: Study) -> list[_Row]:
    if not study.arms:
        raise EvaluationError(f"the study {study.title!r} has no arm to report")
    twice = [label for label, count in Counter(arm.label for arm in study.arms).items() if count > 1]
    if twice:
        raise EvaluationError(f"two arms of the study are called {twice[0]!r}; give each its own label")
    rows = [_Row(arm, headline(arm.result), f"{arm.label} (null)" if arm.null else arm.label) for arm in study.arms]
    if len({row.score.metric for row in rows}) > 1:
        raise EvaluationError("a study has either classes or survival to predict, not both; write two studies")
    return rows


def _subtitle(study: Study) -> str:
    result = study.arms[0].result
    return f"{result.target} of {result.n_patients:,} patients, {result.n_slides:,} slides; {result.split}"


def _key_numbers(study: Study, rows: list[_Row]) -> list[KeyNumber]:
    known = [row for row in rows if not row.arm.null and math.isfinite(row.score.value)]
    first = study.arms[0].result
    count = sum(len(names) for names in study.excluded.values())
    left_out = f"{count:,} left out" if count else ""
    numbers = []
    if known:
        best = max(known, key=lambda row: row.score.value)
        deviation = f"± {best.score.sd:.3f} · " if math.isfinite(best.score.sd) else ""
        word = "Highest " if len(known) > 1 else ""
        numbers.append(KeyNumber(word + best.score.metric, f"{best.score.value:.3f}", deviation + best.arm.label))
    numbers += [KeyNumber("Patients", first.n_patients), KeyNumber("Slides", first.n_slides, left_out)]
    if not isinstance(first, EvaluationResult):
        numbers.append(KeyNumber("Events", first.scores.events, f"of {first.scores.n:,}"))
    else:
        counts = Counter(first.predictions.y.tolist())
        spelt = ", ".join(f"{name} {counts[k]:,}" for k, name in enumerate(first.classes[:6]))
        numbers.append(KeyNumber("Classes", len(first.classes), spelt + (" …" if len(first.classes) > 6 else "")))
    nulls = sum(row.arm.null for row in rows)
    return [*numbers, KeyNumber("Arms", len(rows), f"{nulls} of them null" if nulls else "")]


def _results(study: Study, rows: list[_Row], figures: Figures) -> Section:
    known = [k for k, row in enumerate(rows) if not row.arm.null and math.isfinite(row.score.value)]
    best = max(known, key=lambda k: rows[k].score.value) if len(known) > 1 else None
    survival = rows[0].score.metric == "c-index"
    columns, lines = _score_table(rows, survival)
    intro = "Mean ± standard deviation (n − 1) over folds, and the pooled test predictions with 95 % intervals."
    if best is not None:
        tested = "whether by more than chance is tested below" if study.comparisons else "no difference was tested"
        intro += f" The highest is marked; {tested}."
    blocks: list[Block] = [Table(columns, lines, highlight=() if best is None else (best,))]
    reported = [row for row in rows if row.arm.reported is not None]
    if reported:
        blocks.append(_reported_table(reported))
    by_slide = [line for row in rows for line in _slide_scores(row)]
    if by_slide:
        blocks.append(
            Table(
                ("Arm", "Slides by", "AUROC", "Balanced accuracy"),
                tuple(by_slide),
                "Slides, from their tiles.",
            )
        )
    blocks += [_chart(figure) for figure in figures.scores(study, {row.arm.label: row.score for row in rows})]
    texts = []
    if any(row.arm.null for row in rows):
        texts.append(
            "Rows marked (null) know nothing of the labels, or nothing of tissue: what they reach is what chance and "
            "the splits give."
        )
    if rows[0].arm.result.split.startswith("leave one"):
        texts.append(
            "Whoever is left out is missing from their own class in training, so a head that knows nothing scores "
            "below chance, down to 0 if it only knows how frequent the classes are. Compare with the null rows."
        )
    if len({row.arm.result.split_hash for row in rows if not row.arm.null}) > 1:
        texts.append("The arms were not all tested on the same splits; their scores cannot be compared directly.")
    texts.append(
        "Intervals come from a bootstrap over patients, a patient's slides staying together. Those of several folds "
        "also hold the chance in who was learnt from; that of a single split is about its one head."
    )
    return Section("Results", (*blocks, Text(tuple(texts))), intro)


def _score_table(rows: list[_Row], survival: bool) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    metric = rows[0].score.metric
    columns = ("Arm", f"{metric}, folds", f"{metric}, pooled")
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        scores = row.arm.result.scores
        line = (row.label, spread(row.score.mean, row.score.sd), scored(row.score.pooled, row.score.ci))
        if isinstance(scores, Scores):
            accuracy = scored(scores.balanced_accuracy, scores.balanced_accuracy_ci)
            lines.append((*line, accuracy, scores.auprc, scores.quadratic_kappa, scores.brier))
        else:
            ratio = scored(scores.hazard_ratio, scores.hazard_ratio_ci)
            lines.append((*line, scored(scores.uno, scores.uno_ci), ratio, p_value(scores.logrank_p)))
    extra = (
        ("Uno’s c-index", "Hazard ratio, high to low risk", "Log-rank p")
        if survival
        else ("Balanced accuracy", "AUPRC", "Kappa, quadratic", "Brier")
    )
    return (*columns, *extra), tuple(lines)


def _reported_table(rows: list[_Row]) -> Table:
    lines = []
    for row in rows:
        assert row.arm.reported is not None  # noqa: S101 - they were chosen by it
        said = spread(row.arm.reported, math.nan if row.arm.reported_sd is None else row.arm.reported_sd)
        difference = signed(row.score.value - row.arm.reported)
        lines.append((row.label, spread(row.score.value, row.score.sd), said, difference, row.arm.source))
    metric = rows[0].score.metric
    columns = ("Arm", f"{metric}, here", "Reported", "Difference", "Source")
    return Table(columns, tuple(lines), "Beside the reported values, as the papers print them.")


def _slide_scores(row: _Row) -> list[tuple[Cell, ...]]:
    if not isinstance(row.arm.result, EvaluationResult):
        return []
    names = {"mean": "mean probability", "majority": "majority vote"}
    return [
        (
            row.label,
            names.get(name, name),
            scored(scores.auroc, scores.auroc_ci),
            scored(scores.balanced_accuracy, scores.balanced_accuracy_ci),
        )
        for name, scores in row.arm.result.by_slide.items()
    ]


def _comparisons(study: Study) -> Section | None:
    found = study.comparisons
    if not found:
        return None
    lines = tuple(
        (
            f"{c.first} − {c.second}",
            _METRICS.get(c.metric, c.metric),
            signed(c.value),
            interval(c.ci, plus=True),
            p_value(c.p),
            p_value(c.p_adjusted),
            _TESTS.get(c.test, c.test),
        )
        for c in found
    )
    columns = ("Arms", "Score", "Difference", "95 % interval", "p", "p, Holm", "Test")
    sure = tuple(k for k, c in enumerate(found) if c.p_adjusted < 0.05)
    shown = [f"{found[k].first} and {found[k].second}" for k in sure]
    verdict = (
        f"At that level these differ: {'; '.join(dict.fromkeys(shown))}."
        if shown
        else "At that level no two arms differ by more than chance, which does not say that they are alike."
    )
    count = len(found)
    several = (
        f"{count} tests were made. If all arms were alike, {0.05 * count:g} of {count} such tests would still be "
        f"expected below p = 0.05. Holm’s p keeps the chance of even one false finding below 0.05 over all "
        "that were made with one test. "
        if count > 1
        else "One test was made. "
    )
    return Section(
        "Is the difference real?",
        (Table(columns, lines, highlight=sure), Text((several + verdict,))),
        "Tests on the same patients and splits; marked: Holm’s p below 0.05.",
    )


def _classes(figures: Figures) -> list[Section | None]:
    omitted = f" The first {len(figures.shown)} arms are drawn." if figures.omitted else ""
    return [
        _figure_section(
            "Discrimination",
            figures.curves(),
            f"Pooled test predictions of {figures.level}; bands are pointwise 95 % intervals over patients." + omitted,
        ),
        _figure_section(
            "Calibration",
            figures.calibration(),
            "Of what was predicted with some probability, how much came true. Bars are 95 % intervals; the grey "
            "columns show how often each probability was predicted; ECE is the expected calibration error. Of two "
            "classes, a slope below 1 is too sure of itself, and an intercept above 0 says the class too seldom.",
        ),
        _figure_section(
            "Confusion", figures.confusion(), "Rows are what is true, columns the class of highest probability."
        ),
    ]


def _survival(study: Study, figures: Figures) -> list[Section | None]:
    omitted = f" The first {len(figures.shown)} arms are drawn." if figures.omitted else ""
    times = sorted({t for arm in study.arms for t in getattr(arm.result.scores, "times", ())})
    lines = []
    for arm in study.arms:
        if not isinstance(arm.result.scores, Scores):
            found = dict(zip(arm.result.scores.times, arm.result.scores.auroc_at, strict=True))
            lines.append((arm.label, *(scored(found.get(t, math.nan), (math.nan, math.nan)) for t in times)))
    unit = getattr(study.arms[0].result, "unit", "")
    columns = ("Arm", *(f"{t:g} {unit}" for t in times))
    table = Table(columns, tuple(lines), "Cumulative/dynamic AUROC at some times after the start.")
    section = _figure_section(
        "Survival of high and low risk",
        figures.survival(),
        "Kaplan–Meier curves of those above and below the median risk of their fold’s training part, with 95 % bands; "
        "a tick is a censoring." + omitted,
    )
    if section is None or not times:
        return [section]
    return [section, Section("AUROC over time", (table,))]


def _few_shot(study: Study, figures: Figures) -> Section | None:
    return _figure_section(
        "Few training slides",
        figures.few_shot(study.few_shot),
        "Mean over repetitions, each with other training slides; the band is one standard deviation to either side.",
    )


def _tiles(study: Study) -> Section | None:
    blocks: list[Block] = []
    for top, word in ((True, "most"), (False, "least")):
        tiles = [tile for tile in study.tiles if tile.top == top][:_MOST_TILES]
        pictures = tuple(
            Picture(
                tile.image,
                tile.slide,
                f"tile of {tile.slide} that was looked at {word}",
                f"{tile.label} · {100 * tile.attention:.2g} % of the attention · x {tile.x:,}, y {tile.y:,}",
            )
            for tile in tiles
        )
        if pictures:
            blocks += [Text((f"Looked at {word}",)), Gallery(pictures, columns=5, max_side=320)]
    if not blocks:
        return None
    return Section(
        "Where the model looked",
        tuple(blocks),
        "Tiles with the largest and the smallest share of their slide’s attention. Attention shows what was weighed, "
        "not what caused a prediction.",
    )


def _folds(rows: list[_Row]) -> Section | None:
    first = rows[0].arm.result
    if not 1 < len(first.folds) <= _MOST_FOLDS or any(len(r.score.folds) != len(first.folds) for r in rows):
        return None
    shown = rows[:6]
    lines = tuple(
        (str(fold.fold + 1), fold.n_train, fold.n_test, *(spread(row.score.folds[k], math.nan) for row in shown))
        for k, fold in enumerate(first.folds)
    )
    columns = ("Fold", "Trained on", "Tested on", *(row.label for row in shown))
    return Section("Folds", (Table(columns, lines, f"{rows[0].score.metric} on the test part of each fold."),))


def _excluded(study: Study) -> Section | None:
    lines = []
    for reason, names in study.excluded.items():
        more = f" and {len(names) - _MOST_NAMES:,} more, in study.json" if len(names) > _MOST_NAMES else ""
        lines.append((reason, len(names), ", ".join(names[:_MOST_NAMES]) + more))
    if not any(count for _, count, _ in lines):
        return None
    return Section("Left out", (Table(("Why", "How many", "Which"), tuple(lines)),))


def _settings(study: Study, rows: list[_Row]) -> Section:
    arms = []
    for row in rows:
        result = row.arm.result
        options = ", ".join(f"{key} {spelt(value)}" for key, value in flat(result.options))
        arms.append((row.label, result.encoder, result.head, options, result.seed, result.split_hash))
    blocks: list[Block] = [
        Table(("Arm", "Encoder", "Head", "Options", "Seed", "Hash of splits"), tuple(arms), "The arms.")
    ]
    if settings := tuple((key, spelt(value)) for key, value in flat(study.settings)):
        blocks.append(Table(("Setting", "Value"), settings, "Everything that decides the result."))
    if study.command:
        blocks += [Text(("This makes it again:",)), Code(study.command)]
    return Section("Settings", tuple(blocks))


def _figure_section(title: str, figures: Iterable[Figure], intro: str) -> Section | None:
    charts = tuple(_chart(figure) for figure in figures)
    return Section(title, charts, intro) if charts else None


def _chart(figure: Figure) -> Chart:
    return Chart(figure.svg, figure.caption, figure.alt)

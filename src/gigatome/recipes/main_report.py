"""The report of a main job: cohort, training, scores, heat-maps, on one self-contained page."""

import json
import platform
from pathlib import Path

import numpy as np

from gigatome import config
from gigatome.core.version import __version__
from gigatome.evaluation.charts import RocCurve, ScoreRow, roc_curves, score_intervals, training_curves
from gigatome.evaluation.report import Chart, Code, Gallery, KeyNumber, Picture, Section, Table, write_report
from gigatome.evaluation.result import EvaluationResult
from gigatome.recipes.main_job import HEADS, MainJob
from gigatome.tiles.stream import TileStream

_CONTACT_SHEET = 24
_NAMES = {"trained": "trained", "random": "random initialisation", "linear": "linear probe", "knn": "kNN"}


def write_main_report(result: MainJob, path: str | Path, *, command: str) -> Path:
    """Writes the report of ``result`` as one HTML file and returns its path; ``command`` made it."""
    trained, random = (result.results[name, HEADS[0]] for name in ("trained", "random"))
    gain = result.gain
    numbers = (
        KeyNumber("slides", len(result.cohort), f"{len({s.patient for s in result.cohort})} patients"),
        KeyNumber("AUROC, trained", f"{trained.auroc:.3f}", _interval(trained.auroc_ci)),
        KeyNumber("AUROC, random initialisation", f"{random.auroc:.3f}", _interval(random.auroc_ci)),
        KeyNumber("gain by training", f"{gain.value:+.3f}", f"{_interval(gain.ci)}, p = {gain.p:.3f}"),
    )
    recipe = result.recipe
    return write_report(
        path,
        title=f"{result.target}: what the encoder learnt",
        subtitle=f"{recipe.name}: DINO on {result.run.step * recipe.fit.batch_size:,} tiles, read from "
        f"{len(result.cohort)} slides as they were needed",
        key_numbers=numbers,
        sections=(_cohort(result), _training(result), _scores(result), _looks(result), _making(result, command)),
        footer=f"gigatome {__version__} · Python {platform.python_version()} · for research use only",
    )


def _cohort(result: MainJob) -> Section:
    labels = result.cohort.column(result.target)
    pictures = tuple(
        Picture(
            result.job.contours(slide.name),
            slide.name,
            f"slide {slide.name} with its tissue outlined",
            labels.get(slide.name, "no label"),
        )
        for slide in result.cohort
        if result.job.contours(slide.name).is_file()
    )
    rows = tuple((f.slide, f.stage, f.message) for f in result.failures)
    wrong = [r for r in result.checks if r.problems]
    blocks: list = [Gallery(pictures[:40], columns=6, max_side=300)]
    if rows:
        blocks.append(Table(("slide", "stage", "why"), rows, "Slides left out", problems=tuple(range(len(rows)))))
    elif wrong:
        notes = tuple((r.name, "; ".join(r.problems)) for r in wrong)
        blocks.append(Table(("slide", "note"), notes, "What the check found; the slides were used all the same"))
    more = " The first 40 are shown." if len(pictures) > 40 else ""
    return Section(
        "Cohort and tissue",
        tuple(blocks),
        f"Every slide was opened; {len(result.failures)} could not be used. Tiles are drawn from the tissue "
        f"within the outlines.{more}",
    )


def _training(result: MainJob) -> Section:
    recipe = result.recipe
    lines = (result.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    with TileStream(
        result.cohort, recipe.tiles, batch_size=_CONTACT_SHEET, seed=recipe.fit.seed, job=result.job
    ) as stream:
        batch = next(stream.batches())
    sheet = Picture(
        _contact_sheet(batch.images),
        "Tiles as the student's views were cut from",
        "random tiles of tissue",
        f"{recipe.tiles.tile_size} px at {', '.join(f'{mpp:g}' for mpp in recipe.tiles.mpp)} µm per pixel",
    )
    curves = Chart(
        training_curves(records),
        "The loss is the teacher's entropy plus the divergence from it. Collapse would show as an entropy at 0 or one "
        "that never leaves its start.",
        "training curves",
    )
    return Section(
        "Training",
        (Gallery((sheet,), columns=1, max_side=1600), curves),
        f"{recipe.encoder.model}, {recipe.fit.total_steps} steps of {recipe.fit.batch_size} tiles at random places of "
        "random slides, without labels.",
    )


def _contact_sheet(images: np.ndarray) -> np.ndarray:
    """Tiles [N, H, W, 3] side by side, 12 in a row, with white gaps: uint8 [rows, columns, 3]."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(padded[i : i + 12]), axis=1) for i in range(0, len(padded), 12)]
    return np.concatenate(rows, axis=0)


def _scores(result: MainJob) -> Section:
    rows, table = [], []
    for (name, head), found in result.results.items():
        rows.append(ScoreRow(_NAMES[name], found.auroc, *found.auroc_ci, group=_NAMES[head]))
        mean, deviation = found.fold_auroc
        table.append(
            (
                f"{_NAMES[name]}, {_NAMES[head]}",
                found.auroc,
                _interval(found.auroc_ci),
                found.balanced_accuracy,
                _interval(found.balanced_accuracy_ci),
                "–" if np.isnan(mean) else f"{mean:.3f} ± {deviation:.3f}",
            )
        )
    rows.sort(key=lambda row: row.group, reverse=True)
    best = result.results["trained", HEADS[0]]
    blocks: list = [
        Chart(score_intervals(rows), "AUROC with 95 % bootstrap intervals over patients.", "scores with intervals"),
        Table(
            (
                "encoder, head",
                "AUROC",
                "95 % interval",
                "balanced accuracy",
                "95 % interval",
                "AUROC, mean ± SD of folds",
            ),
            tuple(table),
            f"{best.n_slides} slides of {best.n_patients} patients; classes {', '.join(best.classes)}; {best.split}",
            highlight=(0,),
        ),
    ]
    if len(best.classes) == 2:
        curves = [
            RocCurve(_NAMES[name], found.predictions.y == 1, found.predictions.probabilities[:, 1])
            for (name, head), found in result.results.items()
            if head == HEADS[0]
        ]
        blocks.append(Chart(roc_curves(curves), f"Test predictions of all folds, {_NAMES[HEADS[0]]}.", "ROC curves"))
    if best.by_slide:
        votes = tuple(
            (f"{_NAMES[n]}, {_NAMES[h]}", f.by_slide["mean"].accuracy, f.by_slide["majority"].accuracy)
            for (n, h), f in result.results.items()
        )
        blocks.append(
            Table(("encoder, head", "mean probability", "majority"), votes, "Accuracy of slides by their tiles")
        )
    return Section("Scores", tuple(blocks), _protocol(best, result))


def _protocol(best: EvaluationResult, result: MainJob) -> str:
    unit = "The mean embedding of a slide's tiles is" if best.level == "slide" else "Each tile is"
    text = (
        f"{unit} classified by {result.target}. A patient is never in both the training and the test part of a fold. "
        "The encoder saw the test slides, without labels, in its training; its random initialisation is the baseline."
    )
    if not best.split.startswith("leave one"):
        return text
    return text + (
        " With one patient left out at a time, embeddings that know nothing score below the chance line, because the "
        "patient left out is missing from its own class."
    )


def _looks(result: MainJob) -> Section:
    pictures = []
    for look in result.looks:
        where = f"{look.name} ({look.label})"
        pictures.append(
            Picture(
                look.attention,
                f"{where}: attention",
                f"the encoder's attention over slide {look.name}",
                "mean over heads, percentile ranks within each tile",
            )
        )
        pictures.append(
            Picture(
                look.tiles,
                f"{where}: P({look.shown})",
                f"tile probabilities over slide {look.name}",
                "of each tile, by a probe fitted to other patients' slides",
            )
        )
    folder = result.looks[0].attention.parent.name if result.looks else "heatmaps"
    return Section(
        "Where the model looks",
        (Gallery(tuple(pictures), columns=2, max_side=1200),),
        "For each class the slide that the probe is most sure of. Attention says which parts of a tile the encoder's "
        "class token attends to; it cannot compare tiles. The second picture can: it shows what the probe would say of "
        f"each tile alone. GeoJSON files for QuPath lie in {folder}/.",
    )


def _making(result: MainJob, command: str) -> Section:
    times = tuple((stage, round(seconds, 1)) for stage, seconds in result.seconds.items())
    recipe = Code(config.to_yaml(result.run.recipe))
    return Section(
        "How it was made",
        (Code(command), Table(("stage", "seconds"), times, "Little where the work had been done before"), recipe),
    )


def _interval(bounds: tuple[float, float]) -> str:
    return "no interval" if np.isnan(bounds[0]) else f"{bounds[0]:.3f} to {bounds[1]:.3f}"

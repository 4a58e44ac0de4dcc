"""The main job in one call: slides and labels in, a trained encoder, scores and one report out.

Every stage is the public function that the commands call, and each goes on where it was, so a stopped job is finished
by calling it again. Without slides it makes a synthetic cohort; that is ``gigatome demo``.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gigatome.core.errors import CohortError, ConfigError, EvaluationError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent, write_failures
from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.evaluation.metrics import Difference
from gigatome.evaluation.probes import LinearProbe, fit_predict
from gigatome.evaluation.protocol import evaluate
from gigatome.evaluation.result import EvaluationResult, compare
from gigatome.heatmaps.attention import tile_map
from gigatome.heatmaps.render import OverlayOptions, write_overlay
from gigatome.heatmaps.run import heatmap
from gigatome.recipes.data import TileData
from gigatome.recipes.run import Run, train
from gigatome.recipes.schema import Recipe, TileRecipe
from gigatome.slides.check import SlideReport, check_cohort
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.synthetic import SyntheticOptions, make_cohort
from gigatome.tiles.grid import read_grid
from gigatome.tissue.mask import TissueMask

HEADS = ("linear", "knn")
"""Heads that the job evaluates; the first one decides."""


@dataclass(frozen=True)
class SyntheticCohort:
    """The cohort that the job makes when it is given none.

    Attributes:
        patients: half of them in each class.
        slides_per_patient: the least and the most.
        slide: what the slides are like.
    """

    patients: int = 40
    slides_per_patient: tuple[int, int] = (1, 2)
    slide: SyntheticOptions = field(default_factory=lambda: SyntheticOptions(width=1536, height=1536))


@dataclass(frozen=True)
class Look:
    """Where the encoder looks on one slide, and what the probe makes of its tiles.

    Attributes:
        name: the slide.
        label: its true class.
        attention: picture of the encoder's attention.
        tiles: picture of each tile's probability of ``shown``.
        shown: the class whose probability is drawn.
    """

    name: str
    label: str
    attention: Path
    tiles: Path
    shown: str


@dataclass(frozen=True)
class MainJob:
    """Everything that the main job found.

    Attributes:
        folder: where it all lies.
        cohort: the slides that were used.
        target: label column that was predicted.
        checks: what was found when every slide was opened.
        recipe: what was trained.
        run: the training.
        stores: embeddings by the encoder ``"trained"`` and by ``"random"``, its own random initialisation.
        results: by encoder and head.
        gain: how much better the trained encoder is than the random one with the first head, in AUROC.
        looks: slides looked at more closely.
        seconds: what each stage took; little where it had been done before.
        failures: slides that a stage could not use.
    """

    folder: Path
    cohort: Cohort
    target: str
    checks: tuple[SlideReport, ...]
    recipe: TileRecipe
    run: Run
    stores: Mapping[str, EmbeddingStore]
    results: Mapping[tuple[str, str], EvaluationResult]
    gain: Difference
    looks: tuple[Look, ...]
    seconds: Mapping[str, float]
    failures: tuple[Failure, ...]

    @property
    def job(self) -> Job:
        """Directory of tissue, tiles and embeddings, laid out as TRIDENT's."""
        return Job(self.folder / "job")


def run_main_job(
    recipe: Recipe,
    out: str | Path,
    *,
    cohort: Cohort | str | Path | None = None,
    target: str | None = None,
    folds: int = 5,
    synthetic: SyntheticCohort | None = None,
    progress: Progress = silent,
) -> MainJob:
    """Checks, trains, embeds, evaluates and looks.

    The encoder is trained, without labels, on all slides, those that are tested later too. Its baseline is the very
    random initialisation that training began with.

    Args:
        recipe: what to train; embeddings are made at its tile size and its first resolution.
        out: folder for everything; an unfinished job in it is gone on with.
        cohort: slides with labels, or what :meth:`Cohort.read` takes; None for a synthetic cohort.
        target: label column; may be left out when there is only one.
        folds: patient-grouped folds. Where a class has too few patients for folds of slides, tiles are classified
            instead, leaving out one patient at a time.
        synthetic: the cohort to make.
        progress: called as each stage goes on.

    Raises:
        CohortError: there is no usable slide, or no such column.
        EvaluationError: the labels do not allow an evaluation.
        RunError: ``out`` holds a run of another recipe or of other slides.
        ConfigError: the recipe does not learn from tiles.
    """
    out, clock = Path(out), _Clock()
    if not isinstance(recipe, TileRecipe):
        raise ConfigError(f"the main job trains an encoder of tiles; {recipe.name} is of level {recipe.level}")
    with clock("cohort"):
        if cohort is None:
            cohort = _make_cohort(out / "cohort", synthetic or SyntheticCohort(), progress)
        cohort = Cohort.read(cohort)
        target = target or _only_label(cohort)
        design = _design(cohort, target, folds)
    with clock("check"):
        checks = check_cohort(cohort, progress=progress)
        cohort = _usable(cohort, checks)
    with clock("train"):
        begun = (out / "run" / "run.yaml").exists()
        run = train(recipe, cohort, out / "run", resume=begun, job=out / "job", progress=progress)
        if not run.finished:
            raise KeyboardInterrupt
    trained, random = load_encoder(run.folder), TileData(recipe, cohort).method().teacher.encoder
    stores = {}
    for name, encoder in {"trained": trained, "random": random}.items():
        with clock(f"embed, {name}"):
            stores[name] = _embed(cohort, encoder, name, recipe, out / "job", progress)
    with clock("evaluate"):
        results = _evaluate(cohort, stores, target, design, out / "scores", recipe.fit.seed)
    with clock("look"):
        best = results["trained", HEADS[0]]
        looks = _look(cohort, best, stores["trained"], recipe, trained, out / "heatmaps", progress)
    unusable = [Failure(r.name, "check", "unusable", "; ".join(r.problems)) for r in checks if not r.usable]
    failures = (*unusable, *run.failures, *stores["trained"].failures)
    write_failures(out / "failures.csv", failures)
    return MainJob(
        folder=out,
        cohort=cohort,
        target=target,
        checks=tuple(checks),
        recipe=recipe,
        run=run,
        stores=stores,
        results=results,
        gain=compare(results["trained", HEADS[0]], results["random", HEADS[0]]),
        looks=looks,
        seconds=clock.seconds,
        failures=failures,
    )


@dataclass(frozen=True)
class _Design:
    """How the labels are to be evaluated."""

    level: Literal["slide", "tile"]
    folds: int | str
    tiles_per_slide: int | None = None


class _Clock:
    """Notes what each stage takes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


def _make_cohort(folder: Path, options: SyntheticCohort, progress: Progress) -> Cohort:
    return make_cohort(
        folder,
        patients=options.patients,
        slides_per_patient=options.slides_per_patient,
        options=options.slide,
        progress=progress,
    )


def _only_label(cohort: Cohort) -> str:
    columns = sorted({column for slide in cohort for column in slide.labels})
    if len(columns) != 1:
        named = ", ".join(columns) or "none; give a table with --labels"
        raise CohortError(f"{cohort.source}: say which label to predict with --target; there are: {named}")
    return columns[0]


def _design(cohort: Cohort, target: str, folds: int) -> _Design:
    """Folds of slides where every class has patients for them, tiles of one left-out patient at a time otherwise."""
    labels = cohort.column(target)
    patients = {slide.patient: labels[slide.name] for slide in cohort if slide.name in labels}
    counts = Counter(patients.values())
    if len(counts) < 2:
        raise EvaluationError(f"{target}: needs at least two classes, there is only {', '.join(counts) or 'none'}")
    least = min(counts, key=lambda label: counts[label])
    if counts[least] < 2:
        raise EvaluationError(
            f"{target}: class {least} has one patient, who cannot be both learnt from and tested; add patients, or "
            "leave the class out of the labels"
        )
    if counts[least] >= 4:
        return _Design("slide", min(folds, counts[least]))
    log.info("%s: class %s has %d patients, so tiles are classified", target, least, counts[least])
    return _Design("tile", "patient", tiles_per_slide=100)


def _usable(cohort: Cohort, checks: list[SlideReport]) -> Cohort:
    names = [report.name for report in checks if report.usable]
    if not names:
        raise CohortError(f"{cohort.source}: no slide can be used; {checks[0].name}: {checks[0].problems[0]}")
    return cohort.select(names)


def _embed(
    cohort: Cohort, encoder: TileEncoder, name: str, recipe: TileRecipe, job: Path, progress: Progress
) -> EmbeddingStore:
    return embed(
        cohort,
        encoder=encoder,
        name=name,
        out=job,
        tile_size=recipe.tiles.tile_size,
        mpp=recipe.tiles.mpp[0],
        min_tissue=recipe.tiles.min_tissue,
        device=recipe.fit.device,
        overwrite=True,
        progress=progress,
    )


def _evaluate(
    cohort: Cohort, stores: Mapping[str, EmbeddingStore], target: str, design: _Design, out: Path, seed: int
) -> dict[tuple[str, str], EvaluationResult]:
    results = {}
    for name, store in stores.items():
        for head in HEADS:
            result = evaluate(
                store,
                cohort,
                target=target,
                head=head,
                folds=design.folds,
                level=design.level,
                tiles_per_slide=design.tiles_per_slide,
                seed=seed,
            )
            result.save(out / f"{name}_{head}.json")
            results[name, head] = result
    return results


def _look(
    cohort: Cohort,
    result: EvaluationResult,
    store: EmbeddingStore,
    recipe: TileRecipe,
    encoder: TileEncoder,
    out: Path,
    progress: Progress,
) -> tuple[Look, ...]:
    """Heat-maps of one slide of each class, at most four: the one that the probe is most sure of, and right."""
    looks = []
    job = Job(store.job)
    tiles, two = recipe.tiles, len(result.classes) == 2
    for index, label in enumerate(result.classes[:4]):
        name = _surest(result, index)
        shown = 1 if two else index
        entry = next(slide for slide in cohort if slide.name == name)
        values = _tile_probabilities(result, store, entry)[:, shown]
        picture = out / f"{name}_tiles.png"
        with entry.open() as slide:
            heatmap(
                slide,
                encoder,
                out,
                tile_size=tiles.tile_size,
                mpp=tiles.mpp[0],
                geojson=True,
                mask=TissueMask.read(job.tissue(name)),
                device=recipe.fit.device,
            )
            tile_values = tile_map(read_grid(store.tiles.coords(name)), values, channels=("probability",))
            write_overlay(picture, slide, tile_values, OverlayOptions(limits=(0, 1)))
        looks.append(Look(name, label, out / f"{name}.png", picture, result.classes[shown]))
        progress("look", index + 1, min(4, len(result.classes)))
    return tuple(looks)


def _surest(result: EvaluationResult, label: int) -> str:
    """Slide of a class with the greatest mean probability of it."""
    rows = result.predictions
    sums: dict[str, list[float]] = {}
    for slide, y, p in zip(rows.slides, rows.y, rows.probabilities[:, label], strict=True):
        if y == label:
            sums.setdefault(slide, []).append(float(p))
    return max(sums, key=lambda slide: float(np.mean(sums[slide])))


def _tile_probabilities(result: EvaluationResult, store: EmbeddingStore, slide: CohortSlide) -> np.ndarray:
    """Probability of each class for each tile of a slide, [N, classes], by a probe that never saw the patient.

    The probe is fitted on the mean embeddings of the other patients' slides; a tile counts as a slide of its own.
    """
    rows = result.predictions
    label = dict(zip(rows.slides, rows.y.tolist(), strict=True))
    patient = dict(zip(rows.slides, rows.patients, strict=True))
    names, x = store.slide_vectors(sorted(n for n in label if patient[n] != slide.patient))
    y = np.array([label[name] for name in names])
    return fit_predict(LinearProbe(), x, y, store.read(slide.name).embeddings, len(result.classes))

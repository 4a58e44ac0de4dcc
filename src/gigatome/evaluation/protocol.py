"""The protocol: embeddings and labels in, patient-grouped cross-validation, scores with intervals out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import CohortError, EvaluationError
from gigatome.core.logs import Progress, log, silent
from gigatome.core.seeding import generator
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation import metrics
from gigatome.evaluation.probes import Probe, find_probe, fit_predict
from gigatome.evaluation.result import EvaluationResult, FoldScore, Level, Predictions, Scores, score
from gigatome.evaluation.splits import Fold, folds_digest, leave_one_out, patient_folds, read_folds
from gigatome.slides.cohort import Cohort, CohortSlide, patient_of


@dataclass(frozen=True)
class _Samples:
    """What is classified: slides or tiles, and the table of slides they belong to."""

    x: NDArray[np.float32]  # [N, D]
    slide: NDArray[np.int64]  # [N], row in names
    tile: NDArray[np.int64]  # [N], -1 for a whole slide
    names: tuple[str, ...]
    patients: tuple[str, ...]
    y: NDArray[np.int64]  # of each slide
    classes: tuple[str, ...]


def evaluate(
    store: EmbeddingStore | str | Path,
    cohort: Cohort | str | Path,
    *,
    target: str,
    head: str | Probe = "linear",
    folds: int | str | Path = 5,
    seed: int = 0,
    level: Level = "slide",
    tiles_per_slide: int | None = None,
    resamples: int = 2000,
    progress: Progress = silent,
) -> EvaluationResult:
    """Says how well a simple head on frozen embeddings predicts a label, by cross-validation over patients.

    A patient's slides are never in both the training and the test part of a fold. Every score comes with a 95 %
    bootstrap interval over patients. The interval says how sure the score is on patients like these given the folds'
    classifiers; it does not hold the spread from training on other patients, and so is too narrow for a claim about
    the encoder: in 750 simulated cohorts of 40 and 120 patients it held the expected AUROC in 84 to 87 of 100. For the
    difference between two encoders, :func:`~gigatome.evaluation.result.compare` corrects that.

    Args:
        store: embeddings, or a folder that :meth:`EmbeddingStore.open` takes.
        cohort: slides, patients and labels, or what :meth:`Cohort.read` takes.
        target: the label column. Slides without a label are left out.
        head: ``"linear"``, ``"knn"``, ``"giga"`` (Giga-SSL's logistic regression), ``"hipt"`` (HIPT's kNN), or options.
        folds: how many stratified folds; ``"patient"`` to leave one patient out at a time, for classes of very few
            patients: as the one left out is then missing from its own class, a head that learns nothing scores below
            chance; or a table of folds as Patho-Bench has them.
        seed: of folds, sampling and resampling.
        level: ``"slide"`` classifies the mean embedding of each slide; ``"tile"`` classifies tiles, each with the label
            of its slide, and then slides by their tiles.
        tiles_per_slide: for level ``"tile"``, the most tiles of a slide, drawn at random; all by default.
        resamples: bootstrap resamples of patients.
        progress: called after each fold.

    Raises:
        CohortError: there is no such column, or no such cohort.
        StoreError: the embeddings cannot be found or read.
        EvaluationError: no labelled slide has embeddings, or the labels and patients do not allow these folds.
    """
    store = store if isinstance(store, EmbeddingStore) else EmbeddingStore.open(store)
    cohort = _read_cohort(cohort, store)
    name, probe = find_probe(head)
    if level not in ("slide", "tile"):
        raise EvaluationError(f"there is no level {level}; there are slide and tile")
    labels = cohort.column(target)
    samples, without = _load(store, cohort, labels, target, level, tiles_per_slide, seed)
    split, parts = _split(samples, folds, seed)
    _check_tested(samples, parts, target)
    predictions, fold_scores = _cross_validate(samples, probe, parts, progress)
    return EvaluationResult(
        target=target,
        head=name,
        options=asdict(probe),
        encoder=store.encoder,
        level=level,
        classes=samples.classes,
        n_slides=len(set(predictions.slides)),
        n_patients=len(set(predictions.patients)),
        scores=score(predictions.y, predictions.probabilities, predictions.patients, seed=seed, resamples=resamples),
        by_slide=_by_slide(predictions, seed, resamples) if level == "tile" else {},
        folds=fold_scores,
        predictions=predictions,
        seed=seed,
        split=split,
        split_hash=folds_digest(samples.names, parts),
        unlabelled=sum(slide.name not in labels for slide in cohort),
        without_embeddings=without,
    )


def _read_cohort(source: Cohort | str | Path, store: EmbeddingStore) -> Cohort:
    """The cohort; or, from a table that names slides without saying where they lie, the store's slides."""
    try:
        return Cohort.read(source)
    except CohortError:
        names = store.names()
        if not names or not Path(str(source)).is_file():
            raise
        return Cohort.read(
            Cohort(tuple(CohortSlide(n, n, patient_of(n)) for n in names), str(source)), labels=str(source)
        )


def _load(
    store: EmbeddingStore,
    cohort: Cohort,
    labels: dict[str, str],
    target: str,
    level: Level,
    tiles_per_slide: int | None,
    seed: int,
) -> tuple[_Samples, tuple[str, ...]]:
    """Samples of the labelled slides that have embeddings, and the names of the labelled ones that have none."""
    if tiles_per_slide is not None and tiles_per_slide < 1:
        raise EvaluationError(f"tiles_per_slide must be at least 1, not {tiles_per_slide}")
    there = set(store.names())
    wanted = [name for name in sorted(labels) if name in there]
    if level == "slide":
        names, x = store.slide_vectors(wanted)
        slide, tile = np.arange(len(names)), np.full(len(names), -1)
    else:
        names, x, slide, tile = _load_tiles(store, wanted, tiles_per_slide, seed)
    without = tuple(name for name in sorted(labels) if name not in set(names))
    if not names:
        raise EvaluationError(
            f"none of the {len(labels)} slides with a {target} has embeddings in {store.folder}, "
            f"which has {len(there)} slides; are their names the same?"
        )
    if without:
        shown = ", ".join(without[:5]) + (" …" if len(without) > 5 else "")
        log.warning("%d labelled slides have no usable embeddings and are left out: %s", len(without), shown)
    patient = {member.name: member.patient for member in cohort}
    classes = _in_order({labels[name] for name in names})
    y = np.array([classes.index(labels[name]) for name in names], np.int64)
    return _Samples(x, slide, tile, tuple(names), tuple(patient[name] for name in names), y, classes), without


def _load_tiles(
    store: EmbeddingStore, wanted: Sequence[str], tiles_per_slide: int | None, seed: int
) -> tuple[list[str], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    names: list[str] = []
    parts: list[NDArray[np.float32]] = []
    tiles: list[NDArray[np.int64]] = []
    for name in wanted:
        embeddings = store.read(name).embeddings
        chosen = np.arange(len(embeddings))
        if tiles_per_slide is not None and len(chosen) > tiles_per_slide:
            chosen = np.sort(generator(seed, "tiles", name).choice(len(chosen), tiles_per_slide, replace=False))
        if not len(chosen) or not np.isfinite(embeddings[chosen]).all():
            continue  # counted and reported by the caller
        names.append(name)
        parts.append(embeddings[chosen])
        tiles.append(chosen.astype(np.int64))
    if not names:
        return [], np.zeros((0, 0), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
    slide = np.repeat(np.arange(len(names)), [len(part) for part in parts])
    return names, np.concatenate(parts), slide, np.concatenate(tiles)


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Labels sorted, as numbers if all are, so that "10" follows "2"."""
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _split(samples: _Samples, folds: int | str | Path, seed: int) -> tuple[str, list[Fold]]:
    """What to call the folds, and the folds of slides."""
    labels = [samples.classes[y] for y in samples.y]
    if folds == "patient":
        return "leave one patient out", leave_one_out(samples.patients, labels)
    if isinstance(folds, int):
        return f"{folds} stratified folds of patients, seed {seed}", patient_folds(
            samples.patients, labels, folds, seed
        )
    parts = read_folds(folds, samples.names, samples.patients)
    for k, (train, _) in enumerate(parts):
        absent = sorted(set(labels) - {labels[i] for i in train})
        if absent:
            raise EvaluationError(f"{folds}: fold_{k} has no training slide of class {absent[0]}")
    return f"{len(parts)} folds of {Path(folds).name}", parts


def _check_tested(samples: _Samples, parts: Sequence[Fold], target: str) -> None:
    tested = {y for _, test in parts for y in samples.y[test].tolist()}
    lost = [label for k, label in enumerate(samples.classes) if k not in tested]
    if lost:
        raise EvaluationError(f"{target}: no fold tests class {lost[0]}; use other folds")


def _cross_validate(
    samples: _Samples, probe: Probe, parts: Sequence[Fold], progress: Progress
) -> tuple[Predictions, tuple[FoldScore, ...]]:
    rows: list[NDArray[np.int64]] = []
    found: list[NDArray[np.float64]] = []
    scores: list[FoldScore] = []
    count = len(samples.classes)
    for k, (train, test) in enumerate(parts):
        learn, tested = (np.flatnonzero(np.isin(samples.slide, part)) for part in (train, test))
        y = samples.y[samples.slide]
        p = fit_predict(probe, samples.x[learn], y[learn], samples.x[tested], count)
        complete = len(np.unique(y[tested])) == count
        scores.append(
            FoldScore(
                fold=k,
                n_train=len(train),
                n_test=len(test),
                auroc=metrics.auroc(y[tested], p) if complete else float("nan"),
                balanced_accuracy=metrics.balanced_accuracy(y[tested], p) if complete else float("nan"),
            )
        )
        rows.append(tested)
        found.append(p)
        progress("evaluate", k + 1, len(parts))
    row = np.concatenate(rows)
    slide = samples.slide[row]
    predictions = Predictions(
        slides=tuple(samples.names[i] for i in slide),
        patients=tuple(samples.patients[i] for i in slide),
        tiles=samples.tile[row],
        folds=np.repeat(np.arange(len(rows)), [len(part) for part in rows]),
        y=samples.y[slide],
        probabilities=np.concatenate(found),
    )
    return predictions, tuple(scores)


def _by_slide(tiles: Predictions, seed: int, resamples: int) -> dict[str, Scores]:
    """Scores of slides from their tiles: by the mean probability, and by majority vote."""
    keys = list(zip(tiles.folds.tolist(), tiles.slides, strict=True))
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    place = {key: j for j, key in enumerate(first)}
    member = np.array([place[key] for key in keys])
    size = np.bincount(member)[:, None]
    votes = np.eye(tiles.probabilities.shape[1])[tiles.probabilities.argmax(1)]
    y = tiles.y[list(first.values())]
    patients = [tiles.patients[i] for i in first.values()]
    result: dict[str, Scores] = {}
    for name, values in (("mean", tiles.probabilities), ("majority", votes)):
        total = np.zeros((len(first), values.shape[1]))
        np.add.at(total, member, values)
        result[name] = score(y, total / size, patients, seed=seed, resamples=resamples)
    return result

"""Classifying tiles, each with the label of its slide, and then slides by their tiles."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gigatome.core.logs import Progress, silent
from gigatome.core.seeding import generator
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.crossval import Setting, fold_score, inflation_of, score_classes
from gigatome.evaluation.heads import Prediction
from gigatome.evaluation.probes import Probe, fit_predict
from gigatome.evaluation.result import EvaluationResult, FoldScore, Predictions, Scores, score
from gigatome.evaluation.splits import Splits
from gigatome.evaluation.units import ClassOutcome, Units


def evaluate_tiles(
    store: EmbeddingStore,
    units: Units,
    splits: Splits,
    probe: Probe,
    setting: Setting,
    *,
    tiles_per_slide: int | None = None,
    unlabelled: int = 0,
    progress: Progress = silent,
) -> EvaluationResult:
    """Scores of tiles, and of slides by their tiles.

    Args:
        store: the embeddings.
        units: slides with classes.
        splits: of the slides.
        probe: what classifies tiles.
        setting: what the result says of itself.
        tiles_per_slide: the most tiles of a slide, drawn at random; None for all.
        unlabelled: slides without a label, for the result.
        progress: called after each fold.

    Raises:
        EvaluationError: a probe cannot learn.
        StoreError: a file is damaged.
    """
    outcome = units.outcome
    assert isinstance(outcome, ClassOutcome)  # noqa: S101 - for the type checker
    x, slide, tile = _tiles(store, units.names, tiles_per_slide, setting.seed)
    y = outcome.y[slide]
    rows: list[NDArray[np.int64]] = []
    found: list[NDArray[np.float64]] = []
    folds: list[FoldScore] = []
    for k, split in enumerate(splits.parts):
        learnt, tested = (np.flatnonzero(np.isin(slide, part)) for part in (split.train, split.test))
        p = fit_predict(probe, x[learnt], y[learnt], x[tested], len(outcome.classes))
        folds.append(fold_score(k, split, y[tested], Prediction(p)))
        rows.append(tested)
        found.append(p)
        progress("evaluate", k + 1, len(splits))
    row = np.concatenate(rows)
    predictions = Predictions(
        slides=tuple(units.names[i] for i in slide[row]),
        patients=tuple(units.patients[i] for i in slide[row]),
        tiles=tile[row],
        folds=np.repeat(np.arange(len(rows)), [len(part) for part in rows]),
        y=y[row],
        probabilities=np.concatenate(found),
    )
    result = score_classes(units, splits, predictions, tuple(folds), setting, unlabelled=unlabelled)
    by_slide = _by_slide(predictions, setting.seed, setting.resamples, inflation_of(splits.parts))
    return replace(result, level="tile", by_slide=by_slide)


def _tiles(
    store: EmbeddingStore, names: Sequence[str], tiles_per_slide: int | None, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Embeddings [N, D] of tiles, the slide of each, and its row in the slide's bag."""
    parts: list[NDArray[np.float32]] = []
    tiles: list[NDArray[np.int64]] = []
    for name in names:
        embeddings = store.read(name).embeddings
        chosen = np.arange(len(embeddings))
        if tiles_per_slide is not None and len(chosen) > tiles_per_slide:
            chosen = np.sort(generator(seed, "tiles", name).choice(len(chosen), tiles_per_slide, replace=False))
        parts.append(embeddings[chosen])
        tiles.append(chosen.astype(np.int64))
    slide = np.repeat(np.arange(len(names)), [len(part) for part in parts])
    return np.concatenate(parts), slide, np.concatenate(tiles)


def _by_slide(tiles: Predictions, seed: int, resamples: int, inflation: float) -> dict[str, Scores]:
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
        result[name] = score(y, total / size, patients, seed=seed, resamples=resamples, inflation=inflation)
    return result

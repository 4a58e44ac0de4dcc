"""The tiles, or regions, that a model of bags looked at most, and least."""

from collections.abc import Sequence

import numpy as np

from gigatome.core.errors import EvaluationError
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.region_tiles import RegionTiles
from gigatome.embeddings.store import EmbeddingStore
from gigatome.evaluation.crossval import FoldRun
from gigatome.evaluation.study import AttendedTile
from gigatome.evaluation.unit_data import UnitData
from gigatome.evaluation.units import ClassOutcome, Units
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import read_grid

_SIDE = 192  # px of a picture
_SLIDES = 4


def attended_tiles(
    cohort: Cohort, units: Units, data: UnitData, runs: Sequence[FoldRun], count: int
) -> tuple[AttendedTile, ...]:
    """The most and the least attended tiles of some test units, by heads that had not seen them.

    The units are those of each class that were predicted best; of a survival, those of the highest and the lowest risk.

    Args:
        cohort: says where the slides lie.
        units: that were predicted.
        data: their embeddings.
        runs: of each fold.
        count: how many of the most attended tiles to show, and how many of the least, over all units.

    Raises:
        EvaluationError: no head has attention.
        SlideError: a slide cannot be read.
        StoreError: a slide or its coordinates cannot be found.
    """
    slides = {slide.name: slide for slide in cohort}
    chosen = _chosen(units, runs)
    each = max(1, count // len(chosen))
    found: list[AttendedTile] = []
    for unit, run, told in chosen:
        weights = run.fitted.predict(data.select(np.array([unit])), attention=True).attention
        if weights is None:
            raise EvaluationError("this head has no attention")
        found += _of_unit(data, data.bags(run.fitted.needs), unit, weights[0].mean(1), slides, each, told)
    return tuple(found)


def _chosen(units: Units, runs: Sequence[FoldRun]) -> list[tuple[int, FoldRun, str]]:
    """Units to show, each with its fold and words on what it is."""
    rows = [(int(unit), run, k) for run in runs for k, unit in enumerate(run.split.test)]
    outcome = units.outcome
    if isinstance(outcome, ClassOutcome):
        chosen = []
        for label in range(min(len(outcome.classes), _SLIDES)):
            own = [row for row in rows if outcome.y[row[0]] == label]
            unit, run, k = max(own, key=lambda row: row[1].predicted.probabilities[row[2], label])
            p = run.predicted.probabilities[k, label]
            chosen.append((unit, run, f"{outcome.classes[label]}, predicted with {p:.2f}"))
        return chosen
    ordered = sorted(rows, key=lambda row: float((row[1].training_risk < row[1].predicted.risk[row[2]]).mean()))
    words = {0: "lowest risk", -1: "highest risk"}
    return [(ordered[place][0], ordered[place][1], told) for place, told in words.items()]


def _of_unit(
    data: UnitData,
    reader: BagReader | RegionTiles,
    unit: int,
    weights: np.ndarray,
    slides: dict[str, CohortSlide],
    each: int,
    told: str,
) -> list[AttendedTile]:
    members, store = data.slides[unit], data.store
    if not isinstance(store, EmbeddingStore):
        raise EvaluationError(f"{store.folder}: embeddings of slides have no tiles to show")
    coords = [reader.coords(reader.names.index(name)) for name in members]
    owner = np.repeat(np.arange(len(members)), [len(of) for of in coords])
    first = np.concatenate([np.arange(len(of)) for of in coords])
    side = reader.side if isinstance(reader, RegionTiles) else 1
    order = np.argsort(weights, kind="stable")
    picked = [(int(i), True) for i in order[::-1][:each]] + [(int(i), False) for i in order[:each]]
    found = []
    for tile, top in picked:
        name = members[owner[tile]]
        if name not in slides:
            raise EvaluationError(f"{name}: the cohort does not say where the slide lies")
        grid = read_grid(store.path(name))
        x, y = (int(value) for value in coords[owner[tile]][first[tile]])
        with slides[name].open() as slide:
            image = slide.read_tile(x, y, _SIDE, grid.mpp * grid.tile_size / side / _SIDE)
        found.append(AttendedTile(name, x, y, float(weights[tile]), top, image, told))
    return found

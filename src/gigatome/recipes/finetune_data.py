"""What a fine-tuning learns from: slides that can be opened, their outcomes, and the splits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.core.logs import Failure, Progress
from gigatome.distributed import rank
from gigatome.evaluation.protocol import labelled_slides, splits_of
from gigatome.evaluation.splits import Splits
from gigatome.evaluation.tables import read_labels
from gigatome.evaluation.units import ClassOutcome, Units, make_units
from gigatome.recipes.finetune_schema import FinetuneRecipe, OutcomeOptions
from gigatome.slides.batch import each_slide
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.training.launch import Control

_THREADS = 8  # that open slides


@final
@dataclass(frozen=True, eq=False)
class FinetuneData:
    """What a fine-tuning learns from.

    Attributes:
        source: of slides or labels, in a word.
        units: slides or patients, with their outcomes.
        splits: who trains and who is tested.
        slides: of each unit, those that are used.
        failures: slides that cannot be opened.
    """

    source: str
    units: Units
    splits: Splits
    slides: tuple[tuple[CohortSlide, ...], ...]
    failures: tuple[Failure, ...]

    @property
    def digest(self) -> str:
        """Hash of units, outcomes, slides and splits."""
        outcome = self.units.outcome
        known = [outcome.y] if isinstance(outcome, ClassOutcome) else [outcome.time, outcome.event]
        slides = [[slide.name for slide in members] for members in self.slides]
        return config.digest(
            {
                "units": list(self.units.names),
                "outcome": [values.tolist() for values in known],
                "slides": slides,
                "splits": self.splits.digest,
            }
        )


def read_finetune_data(
    recipe: FinetuneRecipe,
    data: Cohort | str | Path,
    labels: str | Path | None,
    control: Control,
    progress: Progress,
) -> FinetuneData:
    """Reads slides, labels and splits; process 0 opens each labelled slide once.

    Arguments and errors are those of :func:`gigatome.recipes.finetune.finetune`.
    """
    options, cohort = recipe.outcome, Cohort.read(data)
    cohort = cohort if labels is None else read_labels(labels, cohort)
    asked = labelled_slides(cohort, options.wanted, options.of)
    failures = control.gather(_unreadable(cohort, asked, progress) if rank() == 0 else ())[0]
    units = _units(options, cohort, failures)
    known, most = {slide.name: slide for slide in cohort}, 1 if options.slides == "first" else None
    slides = tuple(tuple(known[name] for name in names[:most]) for names in units.slides)
    return FinetuneData(Path(cohort.source).name, units, _splits(recipe, units), slides, failures)


def _unreadable(cohort: Cohort, asked: Collection[str], progress: Progress) -> tuple[Failure, ...]:
    """The slides of these names that cannot be opened."""
    slides = [slide for slide in cohort if slide.name in asked]
    opened = each_slide(slides, lambda slide: slide.open().close(), stage="open", threads=_THREADS, progress=progress)
    return tuple(opened[1])


def _units(options: OutcomeOptions, cohort: Cohort, failures: Sequence[Failure]) -> Units:
    lost = {failure.slide for failure in failures}
    units = make_units(
        cohort, options.wanted, available={slide.name for slide in cohort} - lost, level=options.of,
        label_map=options.label_map, site=options.site,
    )  # fmt: skip
    words = {"no embeddings": "no slide can be opened", "slides without embeddings": "slides that cannot be opened"}
    return replace(units, excluded={words.get(reason, reason): names for reason, names in units.excluded.items()})


def _splits(recipe: FinetuneRecipe, units: Units) -> Splits:
    options, seed = recipe.outcome, recipe.fit.seed
    folds = Path(options.split_file) if options.split_file else replace(options.splits, seed=seed)
    splits = splits_of(units, folds, seed, options.leaks, options.splits.group)
    without = next((k for k, part in enumerate(splits.parts) if not len(part.val)), None)
    if options.select == "best" and without is not None:
        raise ConfigError(
            f"{recipe.name}: select best needs a validation part, and fold {without} of {splits.name} has none; set "
            "outcome.select=last"
        )
    return splits

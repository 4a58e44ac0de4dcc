"""Models that see whole slides: what they say of units, and the folds' models together as an ensemble for new slides.

A folder holds ``model.json``, the card, and each fold's model in ``fold_<k>/``.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome.blob.store import write_atomic
from gigatome.core.errors import GigatomeError, StoreError
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.encoders.device import usable_device
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, open_slide_vit
from gigatome.evaluation.crossval import FoldResult
from gigatome.evaluation.outcome_loss import prediction_of
from gigatome.evaluation.result import EvaluationResult, plain
from gigatome.evaluation.saved import CARD, NewPrediction, ensemble_rows, outcome_card, percentiles
from gigatome.evaluation.survival_result import SurvivalResult
from gigatome.evaluation.units import Units
from gigatome.mil.end_to_end import predict_slides as predict_images
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.slide_image_stream import slide_images
from gigatome.tiles.slide_images import SlideImage, SlideImageOptions

_KIND = "slide images"


def unit_logits(
    model: SlideVit,
    slides: Sequence[Sequence[CohortSlide]],
    options: SlideImageOptions,
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
    share: Share | None = None,
    rows: range | None = None,
    threads: int = 8,
) -> tuple[NDArray[np.float64], list[Failure]]:
    """What a model says of units: the mean logits of their slides.

    Args:
        model: the model.
        slides: of each unit, at least one.
        options: what is read of a slide; its crop and flip are left out.
        device: where the model runs.
        precision: of the forward pass.
        share: how several processes share each slide, and
        rows: which rows of pixels this one then reads.
        threads: that read a slide.

    Returns:
        float64 [units, outputs], and slides of which parts could not be read and were taken for white.
    """
    every, failures = [slide for members in slides for slide in members], []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for slide, image in zip(every, slide_images(every, options, rows=rows, threads=threads), strict=True):
            failures.extend(_damage(slide, image))
            yield image.pixels

    logits = predict_images(model, pixels(), device=device, precision=precision, share=share)
    cuts = np.cumsum([len(members) for members in slides])[:-1]
    means = [part.mean(0) for part in np.split(logits, cuts)] if len(slides) else []
    return np.stack(means) if means else np.zeros((0, model.head.out_features)), failures


@final
@dataclass(frozen=True, eq=False)
class ImageModel:
    """The models of all folds.

    Attributes:
        folder: where they lie.
        card: what they are and were trained on: target, level, classes, scores, threshold, cohort.
        members: each with its own card.
    """

    folder: Path
    card: Mapping[str, Any]
    members: tuple[tuple[SlideVit, SlideVitCard], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels; empty for survival."""
        return tuple(self.card["classes"])

    def predict(
        self,
        cohort: Cohort,
        *,
        by_patient: bool | None = None,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        threads: int = 8,
        progress: Progress = silent,
    ) -> tuple[list[NewPrediction], tuple[Failure, ...]]:
        """What the models together say of new slides, or patients.

        There is no embedding by which a slide could be called unusual: its distance is NaN.

        Args:
            cohort: the slides; each is read once.
            by_patient: predict patients, from the mean logits of their slides; by default as was learnt.
            device: where the models run.
            precision: of the forward pass.
            threads: that read a slide.
            progress: called after each slide.

        Returns:
            The predictions, and the slides that could not be read, or not whole.

        Raises:
            StoreError: no slide could be read.
        """
        usable_device(device)
        together = self.card["level"] == "patient" if by_patient is None else by_patient
        said: dict[str, list[NDArray[np.float64]]] = defaultdict(list)  # of each slide of a unit [members, outputs]
        failures: list[Failure] = []
        for done, slide in enumerate(cohort, start=1):
            try:
                image = next(slide_images([slide], self.members[0][1].images, threads=threads))
            except GigatomeError as error:
                log.warning("%s: %s", slide.name, error)
                failures.append(Failure.of(slide.name, "predict", error))
            else:
                logits = [
                    predict_images(model, [image.pixels], device=torch.device(device), precision=precision)[0]
                    for model, _ in self.members
                ]
                said[slide.patient if together else slide.name].append(np.stack(logits))
                failures += _damage(slide, image)
            progress("predict", done, len(cohort))
        if not said:
            raise StoreError(
                f"{cohort.source}: no slide could be read, such as {failures[0].slide}: {failures[0].message}"
            )
        means = np.stack([np.mean(slides, 0) for slides in said.values()])  # [units, members, outputs]
        every = [
            prediction_of(means[:, k], len(card.classes), np.array(card.edges))
            for k, (_, card) in enumerate(self.members)
        ]
        rows = ensemble_rows(self.card, every)
        predictions = [
            NewPrediction(name, *row, distance=float("nan"), unusual=False)
            for name, row in zip(said, rows, strict=True)
        ]
        return predictions, tuple(failures)


def save_image_model(
    folder: str | Path,
    models: Sequence[str],
    units: Units,
    runs: Sequence[FoldResult],
    result: EvaluationResult | SurvivalResult,
) -> None:
    """Writes the card of the models of all folds, which are in the folder already.

    Args:
        folder: where to.
        models: folder of each fold's model, below ``folder``.
        units: that were learnt from.
        runs: of each fold.
        result: what they scored.

    Raises:
        StoreError: it cannot be written.
    """
    members = [
        {"model": model, "training_risk": percentiles(run.training_risk)}
        for model, run in zip(models, runs, strict=True)
    ]
    card = outcome_card(units, result) | {"kind": _KIND, "head": result.head, "members": members}
    write_atomic(Path(folder) / CARD, json.dumps(plain(card), indent=2, ensure_ascii=False) + "\n")


def is_image_model(folder: str | Path) -> bool:
    """Whether a folder is that of models that see whole slides."""
    try:
        return json.loads((Path(folder) / CARD).read_text(encoding="utf-8")).get("kind") == _KIND
    except (OSError, ValueError, AttributeError):
        return False


def load_image_model(folder: str | Path) -> ImageModel:
    """Reads the models of all folds; raises :class:`StoreError` if they are missing or damaged."""
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        members = [folder / member["model"] for member in card["members"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder}: holds no fine-tuned models ({error}); gigatome train writes them") from error
    return ImageModel(folder, card, tuple(map(open_slide_vit, members)))


def _damage(slide: CohortSlide, image: SlideImage) -> list[Failure]:
    return [Failure(slide.name, "image", "damaged", image.damaged)] if image.damaged else []

"""Models that see whole slides: what they say of units, and the folds' models together as an ensemble for new slides.

A folder holds ``model.json``, the card, and each fold's model in ``fold_<k>/``.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from gigatome.encoders.longvit_zoo import finishing, is_finetuning
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, open_slide_vit
from gigatome.evaluation.crossval import FoldResult
from gigatome.evaluation.outcome_loss import prediction_of
from gigatome.evaluation.result import EvaluationResult, plain
from gigatome.evaluation.saved import CARD, NewPrediction, ensemble_rows, outcome_card, percentiles
from gigatome.evaluation.survival_result import SurvivalResult
from gigatome.evaluation.units import Units
from gigatome.mil.end_to_end import predict_slides as predict_images
from gigatome.slides.batch import each_slide
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.slide_image_stream import damage, images_or_errors, slide_images
from gigatome.tiles.slide_images import SlideImage, SlideImageOptions
from gigatome.training.memory import explained_memory

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
    progress: Progress = silent,
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
        progress: called before each slide, and after the last.

    Returns:
        float64 [units, outputs], and slides of which parts could not be read and were taken for white.
    """
    every, failures = [slide for members in slides for slide in members], []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        images = slide_images(every, options, rows=rows, threads=threads)
        for done, (slide, image) in enumerate(zip(every, images, strict=True)):
            progress("predict", done, len(every))
            if image.damaged:
                failures.append(damage(slide.name, image.damaged))
            yield image.pixels
        progress("predict", len(every), len(every))

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
        card: what they are and were trained on: target, level, classes, scores, threshold, cohort; ``precision`` of the
            scored predictions, and ``slides``, those that are used of a patient, ``"all"`` or ``"first"`` by name.
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
        threads: int = 8,
        progress: Progress = silent,
    ) -> tuple[list[NewPrediction], tuple[Failure, ...]]:
        """What the models together say of new slides, or patients, as they were scored: the card says how.

        There is no embedding by which a slide could be called unusual: its distance is NaN.

        Args:
            cohort: the slides; each is read once, while the one before it is predicted.
            by_patient: predict patients, from the mean logits of their slides, or from the first that can be opened; by
                default as was learnt.
            device: where the models run.
            threads: that read a slide.
            progress: called after each slide.

        Returns:
            The predictions, and the slides that could not be read, or not whole.

        Raises:
            StoreError: no slide could be predicted.
            RunError: memory does not suffice.
        """
        usable_device(device)
        together = self.card["level"] == "patient" if by_patient is None else by_patient
        slides, lost = self._used(cohort, together, threads, progress)
        with explained_memory(partial(self._advice, device)):
            said, failures = self._logits(slides, device, threads, progress)
        failures = [*lost, *failures]
        if not said:
            first = failures[0]
            raise StoreError(f"{cohort.source}: no slide could be predicted, such as {first.slide}: {first.message}")
        units: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        for slide in slides:
            if slide.name in said:
                units[slide.patient if together else slide.name].append(said[slide.name])
        means = np.stack([np.mean(members, 0) for members in units.values()])  # [units, models, outputs]
        every = [
            prediction_of(means[:, k], len(card.classes), np.array(card.edges))
            for k, (_, card) in enumerate(self.members)
        ]
        rows = ensemble_rows(self.card, every)
        predictions = [
            NewPrediction(name, *row, distance=float("nan"), unusual=False)
            for name, row in zip(units, rows, strict=True)
        ]
        return predictions, tuple(failures)

    def _used(
        self, cohort: Cohort, together: bool, threads: int, progress: Progress
    ) -> tuple[list[CohortSlide], list[Failure]]:
        """The slides that are read, each once, and of those that cannot be opened what is known by then."""
        slides = list({slide.name: slide for slide in cohort}.values())
        if not together or self.card["slides"] == "all":
            return slides, []
        opened, failures = each_slide(
            slides, lambda slide: slide.open().close(), stage="open", threads=threads, progress=progress
        )
        first: dict[str, CohortSlide] = {}
        for slide in sorted((slide for slide in slides if slide.name in opened), key=lambda slide: slide.name):
            first.setdefault(slide.patient, slide)
        return [slide for slide in slides if first.get(slide.patient) is slide], failures

    def _logits(
        self, slides: Sequence[CohortSlide], device: str, threads: int, progress: Progress
    ) -> tuple[dict[str, NDArray[np.float64]], list[Failure]]:
        """Logits [models, outputs] of each slide that can be predicted, and the others and damaged ones."""
        said: dict[str, NDArray[np.float64]] = {}
        failures: list[Failure] = []
        with contextlib.closing(images_or_errors(slides, self.members[0][1].images, threads=threads)) as images:
            for done, slide in enumerate(slides, start=1):
                try:
                    said[slide.name], damaged = self._of_image(next(images), device)
                except GigatomeError as error:
                    log.warning("%s: %s", slide.name, error)
                    failures.append(Failure.of(slide.name, "predict", error))
                else:
                    failures += [damage(slide.name, damaged)] if damaged else []
                progress("predict", done, len(slides))
        return said, failures

    def _of_image(self, image: SlideImage | GigatomeError, device: str) -> tuple[NDArray[np.float64], str]:
        """Logits [models, outputs], and what is damaged; no image is held when this returns."""
        if isinstance(image, GigatomeError):
            raise image
        precision = self.card["precision"]
        logits = [predict_images(model, [image], device=device, precision=precision)[0] for model, _ in self.members]
        return np.stack(logits), image.damaged

    def _advice(self, device: str) -> str:
        side = self.members[0][1].images.image_size
        return f"a slide of {side:,} × {side:,} px does not fit on {device}; use a device with more memory"


def save_image_model(
    folder: str | Path,
    models: Sequence[str],
    units: Units,
    runs: Sequence[FoldResult],
    result: EvaluationResult | SurvivalResult,
    *,
    precision: Literal["fp32", "bf16"],
    slides: Literal["all", "first"],
) -> None:
    """Writes the card of the models of all folds, which are in the folder already.

    Args:
        folder: where to.
        models: folder of each fold's model, below ``folder``.
        units: that were learnt from.
        runs: of each fold.
        result: what they scored.
        precision: in which they were scored, and predict.
        slides: of a patient, those that were used.

    Raises:
        StoreError: it cannot be written.
    """
    members = [
        {"model": model, "training_risk": percentiles(run.training_risk)}
        for model, run in zip(models, runs, strict=True)
    ]
    card = outcome_card(units, result) | {
        "kind": _KIND,
        "head": result.head,
        "precision": precision,
        "slides": slides,
        "members": members,
    }
    write_atomic(Path(folder) / CARD, json.dumps(plain(card), indent=2, ensure_ascii=False) + "\n")


def is_image_model(folder: str | Path) -> bool:
    """Whether a folder is that of models that see whole slides, or of a fine-tuning that is to write them."""
    try:
        return json.loads((Path(folder) / CARD).read_text(encoding="utf-8")).get("kind") == _KIND
    except (OSError, ValueError, AttributeError):
        return is_finetuning(Path(folder))


def load_image_model(folder: str | Path) -> ImageModel:
    """Reads the models of all folds; raises :class:`StoreError` if they are missing, unfinished or damaged."""
    folder = Path(folder)
    if not (folder / CARD).is_file() and is_finetuning(folder):
        raise StoreError(
            f"{folder}: this fine-tuning is not finished, and its folds predict together; {finishing(folder)} goes on "
            "with it"
        )
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        members = [folder / member["model"] for member in card["members"]]
        if card["precision"] not in ("fp32", "bf16") or card["slides"] not in ("all", "first"):
            raise ValueError(f"precision {card['precision']} and slides {card['slides']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder}: holds no fine-tuned models ({error}); gigatome train writes them") from error
    return ImageModel(folder, card, tuple(map(open_slide_vit, members)))

"""Fine-tuning as a recipe: a LongViT, end to end on images of whole slides, cross-validated on one outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, final

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longvit import LongVitConfig
from gigatome.evaluation.outcome_loss import LossOptions
from gigatome.evaluation.protocol import FOLDS
from gigatome.evaluation.splits import SplitOptions
from gigatome.evaluation.study_options import Reported
from gigatome.evaluation.units import ClassTarget, SurvivalTarget
from gigatome.recipes.schema import is_finetune, recipe_name, recipe_path
from gigatome.tiles.slide_images import SlideImageOptions
from gigatome.training.options import FitOptions

WEIGHTS = "LONGVIT"
"""Stands in a recipe for the path of a pretrained LongViT, which only its user knows."""


@dataclass(frozen=True)
class OutcomeOptions:
    """What is predicted, and of whom.

    Attributes:
        target: column of classes; or
        survival: columns of a survival. Exactly one of both.
        level: ``"slide"`` or ``"patient"``; patients for survival and slides for classes by default.
        slides: of a patient with several: ``"all"``, one of them drawn at each step and the mean logits of all
            predicted, or ``"first"`` of their names, as the authors do for survival.
        label_map: another name for classes, many to one; slides of other classes are left out.
        splits: how to split.
        split_file: published splits, a table or a folder, in place of ``splits``.
        leaks: ``"error"`` or ``"warn"`` about patients on both sides of published splits.
        site: column of the site, for splits by site; by default it is read off TCGA barcodes.
        loss: what is learnt.
        select: weights of the ``"last"`` epoch, or of the ``"best"``, which has the lowest loss on the validation part.
        resamples: of bootstraps.
    """

    target: str | None = None
    survival: SurvivalTarget | None = None
    level: Literal["slide", "patient"] | None = None
    slides: Literal["all", "first"] = "all"
    label_map: Mapping[str, str] | None = None
    splits: SplitOptions = field(default_factory=lambda: SplitOptions(folds=FOLDS))
    split_file: str | None = None
    leaks: Literal["error", "warn"] = "error"
    site: str | None = None
    loss: LossOptions = field(default_factory=LossOptions)
    select: Literal["last", "best"] = "last"
    resamples: int = 2000

    def __post_init__(self):
        if (self.target is None) == (self.survival is None):
            raise ValueError("give either target, a column of classes, or survival with its columns")
        if self.splits.seed:
            raise ValueError("splits.seed is left out: fit.seed is that of the splits too")
        if self.select == "best" and self.split_file is None and not self.splits.val_fraction:
            raise ValueError("select best needs a validation part: set splits.val_fraction, or give a split_file")

    @property
    def wanted(self) -> ClassTarget | SurvivalTarget:
        """What is predicted."""
        return self.survival or ClassTarget(self.target or "")

    @property
    def of(self) -> Literal["slide", "patient"]:
        """Of whom."""
        return self.level or ("patient" if self.survival else "slide")


@final
@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """A fine-tuning, save its slides and labels.

    Attributes:
        paper: where the recipe comes from.
        table: table and row it reproduces.
        command: the command that runs it.
        hardware: what the paper, or we, ran it on.
        hours: how long that took; None if the source does not say.
        status: "unverified" until somebody has run it on the paper's data.
        reproduces: the values to reach.
        notes: deviations from the paper, one sentence each.
        weights: a pretrained LongViT, as of :func:`~gigatome.encoders.longvit_zoo.open_longvit`, that each fold starts
            from; None for random weights.
        encoder: the network; its ``image_size`` is that of ``images``.
        images: what is read of a slide.
        outcome: what is predicted, and of whom.
        fit: options of the training loop; an epoch is a fold's training part.
        drop_path: rate of stochastic depth.
        checkpointing: what is kept of a block for the gradient; the weights do not depend on it, nor on the following.
        processes: that share each slide.
        at_once: images that a process works on at a time.
        threads: that read a slide.
        name: of a built-in recipe, or of its file.
    """

    paper: str
    table: str
    command: str
    hardware: str
    hours: float | None
    status: Literal["unverified", "verified"]
    reproduces: tuple[Reported, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str | None
    encoder: LongVitConfig
    images: SlideImageOptions
    outcome: OutcomeOptions
    fit: FitOptions
    drop_path: float = 0.1
    checkpointing: Checkpointing = "none"
    processes: int = 1
    at_once: int = 1
    threads: int = 8
    name: str = ""

    def __post_init__(self):
        side, encoder = self.images.image_size, self.encoder
        if encoder.image_size != side:
            raise ValueError(f"encoder.image_size {encoder.image_size} is not images.image_size {side}; leave it out")
        if side % encoder.patch_size:
            raise ValueError(f"images.image_size {side} does not divide into patches of {encoder.patch_size} px")
        if encoder.norm != "finetune":
            raise ValueError("encoder.norm must be finetune, as its norm stands after the mean of the tokens")
        if min(self.processes, self.at_once, self.threads) < 1:
            raise ValueError("processes, at_once and threads must be at least 1")
        if self.fit.parallel != "ddp":
            raise ValueError("fit.parallel must be ddp: processes share slides here, not weights, which are few")
        compared = self.outcome.survival is not None and self.outcome.loss.survival_loss != "nll"
        if compared and self.at_once == 1:
            raise ValueError(
                f"outcome.loss.survival_loss {self.outcome.loss.survival_loss} compares slides, and a process works on "
                "one at a time: set at_once to 2 or more, or survival_loss to nll"
            )
        if self.fit.epoch_images is not None or self.fit.grad_accumulation != 1:
            raise ValueError(
                "fit.epoch_images and fit.grad_accumulation are left out: an epoch is a fold's training part, and "
                "at_once says how many images a process works on at a time"
            )

    def cut_for(self, sequences: int) -> FitOptions:
        """The loop's options when so many slides are worked on side by side.

        Raises:
            ConfigError: the batch cannot be cut so.
        """
        batch, together = self.fit.batch_size, sequences * self.at_once
        if batch % together:
            raise ConfigError(
                f"{self.name}: fit.batch_size {batch} must be a multiple of {sequences} slides side by side × at_once "
                f"{self.at_once}; change the number of processes, how many share a slide (processes), or at_once"
            )
        return replace(self.fit, grad_accumulation=batch // together)

    def identity(self) -> str:
        """Hash of what decides the trained weights; a run folder is resumed only by the recipe that began it."""
        return config.digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """The values that decide the trained weights, but for those to start from, as plain nested mappings."""
        parts = {key: config.to_dict(getattr(self, key)) for key in ("encoder", "images", "outcome", "fit")}
        for key in ("save_every", "log_every", "evaluate_every", "keep", "device"):
            parts["fit"].pop(key)
        parts["outcome"].pop("resamples")
        return {"drop_path": self.drop_path, **parts}


def load_finetune(source: str | Path, assignments: Sequence[str] = ()) -> FinetuneRecipe:
    """Reads the recipe of a fine-tuning.

    Args:
        source: name of a built-in one such as ``"longvit/table1_brca"``, or path of a YAML file.
        assignments: changes such as ``"images.image_size=4096"`` or ``"weights=runs/longvit"``.

    Raises:
        ConfigError: there is no such recipe, it is none of a fine-tuning, a key or value is wrong, or the weights to
            start from are not named.
    """
    path = recipe_path(source)
    if not is_finetune(path):
        raise ConfigError(f"{source} is no fine-tuning; see gigatome recipes show {source}")
    values, stated = config.read_yaml(path), config.read_yaml(path)
    for assignment in assignments:
        config.assign(values, assignment)
    if _question(values) != _question(stated):  # another question than the paper's, whose value says nothing of it
        values["reproduces"] = []
    values.setdefault("name", recipe_name(path))
    if isinstance(images := values.get("images"), dict) and isinstance(encoder := values.get("encoder"), dict):
        encoder.setdefault("image_size", images.get("image_size", _default(SlideImageOptions, "image_size")))
        encoder.setdefault("norm", "finetune")
    if isinstance(fit := values.get("fit"), dict):
        fit.setdefault("epoch_images", None)
    recipe = config.parse(FinetuneRecipe, values, source=str(source))
    if recipe.weights == WEIGHTS:
        raise ConfigError(
            f"{source}: starts from a pretrained LongViT: --set weights=PATH, a run of longvit/pretrain_1024 or the "
            "authors' file; --set weights=null for random weights"
        )
    return recipe


def _question(values: Mapping[str, Any]) -> list[Any]:
    """What is predicted, from images of which size."""
    outcome, images = values.get("outcome") or {}, values.get("images") or {}
    return [*(outcome.get(key) for key in ("target", "survival", "label_map")), images.get("image_size")]


def _default(kind: type[Any], name: str) -> Any:
    return next(key.default for key in fields(kind) if key.name == name)

"""How a run is optimised, saved and logged."""

from dataclasses import dataclass, replace
from typing import Literal

from gigatome.core.errors import ConfigError
from gigatome.training.optim import Clipping, LrScaling, OptimizerName

ParallelMode = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class FitOptions:
    """How a run is optimised, saved and logged; the defaults are DINO's.

    Attributes:
        steps: length of the run; give this or ``epochs``.
        epochs: length of the run in epochs of ``epoch_images``.
        epoch_images: tiles that count as an epoch, as an online stream has no natural one (kaiko, section IV-C); null
            in a recipe of level slide for all slides that there are.
        batch_size: tiles of a step, of all processes together.
        grad_accumulation: parts that a batch is cut into, in each process; the gradient is that of the whole.
        lr: base learning rate, before ``lr_scaling``.
        lr_scaling: ``"linear"`` lr × batch / 256, ``"sqrt"`` lr × √(batch / 1024), or ``"none"``.
        min_lr: at the end of the cosine; not scaled.
        warmup_steps: in which the learning rate rises from 0.
        warmup_epochs: the same in epochs, in place of ``warmup_steps``.
        weight_decay: at the start.
        weight_decay_end: at the end of its cosine.
        optimizer: ``"adamw"``, ``"adam"`` (decay joins the gradient), ``"sgd"`` or ``"lars"``.
        momentum: of sgd and lars.
        clip: greatest norm of the gradient; None for no clipping.
        clipping: ``"per_parameter"``, as DINO's code does, or ``"global"``.
        precision: of the forward pass; weights are float32 always.
        parallel: how several processes share a run: ``"ddp"``, each has all weights, or ``"fsdp"``, each has its part.
        compile: compile the networks by ``torch.compile``; the first steps then take minutes.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …
        seed: of everything.
        save_every: steps from one checkpoint to the next; the end of the run is always saved.
        keep: checkpoints to keep.
        log_every: steps from one line of ``metrics.jsonl`` to the next; a checkpoint writes one too.
        evaluate_every: steps from one call of the evaluation hook to the next; 0 for at the end only.
    """

    steps: int | None = None
    epochs: float | None = None
    epoch_images: int | None = 1_280_000
    batch_size: int = 256
    grad_accumulation: int = 1
    lr: float = 5e-4
    lr_scaling: LrScaling = "linear"
    min_lr: float = 1e-6
    warmup_steps: int = 0
    warmup_epochs: float | None = None
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    clip: float | None = 3.0
    clipping: Clipping = "per_parameter"
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: ParallelMode = "ddp"
    compile: bool = False
    device: str = "cpu"
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        positive = ("epoch_images", "batch_size", "grad_accumulation", "save_every", "keep", "log_every")
        for name in positive:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must be at least 0 and less than 1")
        if self.warmup_steps and self.warmup_epochs is not None:
            raise ValueError("give either warmup_steps or warmup_epochs")
        if self.epoch_images is not None:
            if self.total_steps < 1:
                raise ValueError("the run must have at least one step")
            if not 0 <= self.warmup < self.total_steps:
                name = "warmup_steps" if self.warmup_epochs is None else f"the {self.warmup} steps of warmup_epochs"
                raise ValueError(f"{name} must be less than the run's {self.total_steps} steps")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of grad_accumulation")

    def share(self, sequences: int) -> int:
        """Images of a step in each of several processes, or groups of processes that share their images.

        Raises:
            ConfigError: the batch cannot be cut so.
        """
        if self.batch_size % (sequences * self.grad_accumulation):
            raise ConfigError(
                f"fit.batch_size {self.batch_size} must be a multiple of {sequences} processes (those that share a "
                f"sequence are one) × grad_accumulation {self.grad_accumulation}"
            )
        return self.batch_size // sequences

    def of_epoch(self, images: int) -> "FitOptions":
        """These options with an epoch of so many images, unless they say how many.

        Raises:
            ConfigError: the run is too short for its warm-up then.
        """
        if self.epoch_images is not None:
            return self
        try:
            return replace(self, epoch_images=images)
        except ValueError as error:
            raise ConfigError(f"fit: with epochs of {images} images, {error}") from error

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        if self.epoch_images is None:
            raise ConfigError("fit.epoch_images is null, which only a recipe of level slide fills in; give a number")
        return max(1, self.epoch_images // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.steps if self.steps is not None else round((self.epochs or 0) * self.epoch_steps)

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return self.warmup_steps if self.warmup_epochs is None else round(self.warmup_epochs * self.epoch_steps)

"""DINO: a student learns to predict, from any view of a tile or region, what a teacher says of a larger one.

Source: arXiv 2104.14294 (DINO); the defaults are those of its code, which HIPT and kaiko use for tiles, and HIPT for
regions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import torch_seed
from gigatome.distributed import mean_over_ranks
from gigatome.encoders.heads import DinoHead
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.region_vit import RegionVitConfig
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.grid_views import GridViewOptions
from gigatome.selfsup.levels import Level, level_of
from gigatome.selfsup.losses import dino_loss, entropy, teacher_probabilities, update_center
from gigatome.selfsup.views import ViewOptions
from gigatome.training.optim import update_average
from gigatome.training.schedules import Clock, cosine, stairs


@dataclass(frozen=True)
class DinoOptions:
    """DINO's own options; those of the optimiser are in :class:`gigatome.training.loop.FitOptions`.

    Attributes:
        views: crops and colours of tiles, or crops of regions.
        out_dim: prototypes, K.
        head_layers: linear layers of the head's MLP.
        head_hidden_dim: its width.
        head_bottleneck_dim: its output.
        head_batch_norm: batch norm in the head; keeps short runs of small batches from collapsing to one output.
        norm_last_layer: keep the prototypes at unit length; steadier, and right for small ViTs.
        freeze_last_layer_epochs: the prototypes stay as they are in the first epochs.
        drop_path: stochastic depth of the student.
        student_temperature: of its softmax.
        teacher_temperature_start: in the first epoch.
        teacher_temperature: after the warm-up.
        teacher_temperature_warmup_epochs: 0 for none.
        teacher_momentum: share that the teacher keeps of itself at a step; rises to 1 on a cosine.
        center_momentum: the same for the centre, constant.
    """

    views: ViewOptions | GridViewOptions = field(default_factory=ViewOptions)
    out_dim: int = 65536
    head_layers: int = 3
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    head_batch_norm: bool = False
    norm_last_layer: bool = True
    freeze_last_layer_epochs: int = 1
    drop_path: float = 0.1
    student_temperature: float = 0.1
    teacher_temperature_start: float = 0.04
    teacher_temperature: float = 0.04
    teacher_temperature_warmup_epochs: int = 0
    teacher_momentum: float = 0.996
    center_momentum: float = 0.9

    def __post_init__(self):
        if min(self.student_temperature, self.teacher_temperature_start, self.teacher_temperature) <= 0:
            raise ValueError("temperatures must be positive")
        if not (0 <= self.teacher_momentum <= 1 and 0 <= self.center_momentum <= 1):
            raise ValueError("teacher_momentum and center_momentum must lie within 0 to 1")
        if min(self.out_dim, self.head_layers, self.head_hidden_dim, self.head_bottleneck_dim) < 1:
            raise ValueError("out_dim and the sizes of the head must be positive")


@final
class Dino(nn.Module):
    """Student, teacher and centre; a :class:`gigatome.training.loop.Method`.

    Attributes:
        student: learns; its encoder is in training mode.
        teacher: the moving average of the student, which is what one keeps; without gradient and stochastic depth.
        center: float32 [1, K], moving average of the teacher's logits.

    Args:
        encoder: of the tile encoder, LongViT or region encoder; or a level, which says more of what is learnt from.
        options: of the method.
        seed: of the initial weights.
        name: the encoder's name on its card, unless a level says it; by default its timm name.
        mpp: resolutions that it is trained at, for its card, likewise.

    Raises:
        ConfigError: the views do not fit the encoder, or it cannot be made.
    """

    center: Tensor

    def __init__(
        self,
        encoder: EncoderConfig | LongVitConfig | RegionVitConfig | Level,
        options: DinoOptions = DinoOptions(),
        *,
        seed: int = 0,
        name: str | None = None,
        mpp: tuple[float, ...] = (),
    ):
        super().__init__()
        known = isinstance(encoder, EncoderConfig | LongVitConfig | RegionVitConfig)
        self.options, self.level = options, level_of(encoder, name, mpp) if known else encoder
        self.student = _branch(self.level, options, seed, student=True)
        self.teacher = _branch(self.level, options, seed, student=False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(1, options.out_dim))
        self._teacher_means: list[Tensor] = []  # of the logits, one of each micro-batch of the step
        if any(isinstance(module, nn.BatchNorm2d) for module in self.student.encoder.modules()):
            raise ConfigError("DINO trains vision transformers here, not networks with batch norm; take method moco")
        self.level.check(self.student.encoder, options.views)

    def train(self, mode: bool = True) -> "Dino":
        """Sets the student's mode; the teacher stays in evaluation."""
        self.training = mode
        self.student.train(mode)
        return self

    def trained(self) -> nn.Module:
        """The student; the loop spreads it over processes."""
        return self.student

    def lr_scales(self) -> dict[str, float]:
        """All parameters learn at one rate."""
        return {}

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Views [B, channels, size, size] of tiles uint8 [B, H, W, 3] or regions float [B, rows, columns, D].

        The two global ones come first. Raises :class:`RunError` if the batch is of the other level.
        """
        return self.level.views(self.student.encoder, images, self.options.views, generator)

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch of views, and what shows a collapse.

        Returns:
            The loss, and ``teacher_entropy`` (ln K: the teacher says the same of all prototypes, 0: it knows but one)
            and ``kl``, the rest of the loss, in nats. Both near 0 or both near their start for long is a collapse.
        """
        with torch.no_grad():
            teacher_GBK = self.teacher(views[:2]).float()
            targets_GBK = teacher_probabilities(teacher_GBK, self.center, self._temperature(clock))
            self._teacher_means.append(teacher_GBK.mean((0, 1)))
        loss = dino_loss(self.student(views), targets_GBK, self.options.student_temperature)
        spread = entropy(targets_GBK)
        return loss, {"teacher_entropy": spread, "kl": loss.detach() - spread}

    def after_backward(self, clock: Clock) -> None:
        """Keeps the prototypes as they are in the first epochs, without weight decay too."""
        if clock.epoch < self.options.freeze_last_layer_epochs:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Moves teacher and centre, unless the step was not ``finite`` (bool scalar) and has been left out."""
        means = mean_over_ranks(torch.stack(self._teacher_means))
        center = update_center(self.center, means, self.options.center_momentum)
        self._teacher_means.clear()
        self.center.copy_(torch.where(finite, center, self.center))
        update_average(list(self.teacher.parameters()), list(self.student.parameters()), self._momentum(clock), finite)

    def schedule(self, clock: Clock) -> dict[str, float]:
        """What changes with the step, for the log."""
        return {"momentum": self._momentum(clock), "teacher_temp": self._temperature(clock)}

    def export(self, folder: Path) -> None:
        """Writes the teacher's encoder, with its card."""
        self.level.export(self.teacher.encoder, folder, "DINO")

    def _momentum(self, clock: Clock) -> float:
        return cosine(clock, self.options.teacher_momentum, 1.0)

    def _temperature(self, clock: Clock) -> float:
        options = self.options
        return stairs(
            clock,
            options.teacher_temperature_start,
            options.teacher_temperature,
            epochs=options.teacher_temperature_warmup_epochs,
        )


class _Branch(nn.Module):
    """An encoder with its head."""

    encoder: Any  # of the level's kind

    def __init__(self, level: Level, encoder: Any, head: DinoHead):
        super().__init__()
        self._level, self.encoder, self.head = level, encoder, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Logits [V, B, K] of V views [B, …, size]; neighbours of one size go through the encoder together."""
        groups = itertools.groupby(views, key=lambda view: view.shape[-1])
        embeddings = [self._level.embed(self.encoder, _together(list(group))) for _, group in groups]
        return self.head(torch.cat(embeddings)).unflatten(0, (len(views), -1))


def _together(views: list[Tensor]) -> Tensor:
    """Views of one size in one batch."""
    with torch.autocast(views[0].device.type, enabled=False):  # to bfloat16, it does not join tensors of float16
        return torch.cat(views)


def _branch(level: Level, options: DinoOptions, seed: int, *, student: bool) -> _Branch:
    drop_path = options.drop_path if student else 0.0
    encoder = level.build(drop_path=drop_path, seed=torch_seed(seed, "encoder"), initial=student)
    head = DinoHead(
        encoder.dim,
        options.out_dim,
        torch.Generator().manual_seed(torch_seed(seed, "head")),
        hidden_dim=options.head_hidden_dim,
        bottleneck_dim=options.head_bottleneck_dim,
        layers=options.head_layers,
        batch_norm=options.head_batch_norm,
        norm_last_layer=options.norm_last_layer,
    )
    return _Branch(level, encoder, head)

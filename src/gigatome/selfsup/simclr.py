"""SimCLR: two views of a slide, or a tile, are to lie nearer to each other than to those of all others in the batch.

Source: arXiv 2002.05709 (SimCLR); the defaults are those of Giga-SSL's code, which trains slide encoders so.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import torch_seed
from gigatome.distributed import gather_with_gradient, world_size
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.batch_norm import share_statistics
from gigatome.selfsup.contrastive import ntxent_and_accuracy, spread
from gigatome.selfsup.levels import Level, TileLevel
from gigatome.selfsup.slide_views import SlideViewOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.schedules import Clock


@dataclass(frozen=True)
class SimclrOptions:
    """SimCLR's own options; those of the optimiser are in :class:`gigatome.training.loop.FitOptions`.

    Attributes:
        views: how slides are changed; for tiles :class:`ViewOptions` with no local views.
        temperature: of the softmax.
        projector: widths of the linear layers behind the encoder, ReLU and batch norm following each but the last.
        batch_norm: which views share statistics: ``"synced"``, those of the micro-batch on all processes, so that
            their number does not matter, or ``"local"``, those of each process.
    """

    views: SlideViewOptions | ViewOptions = field(default_factory=SlideViewOptions)
    temperature: float = 0.05
    projector: tuple[int, ...] = (512, 512, 256)
    batch_norm: Literal["synced", "local"] = "synced"

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError("temperature must be positive")
        if not self.projector or min(self.projector) < 1:
            raise ValueError("projector needs at least one width, and all positive")
        if isinstance(self.views, ViewOptions) and self.views.local_views:
            raise ValueError("SimCLR compares two global views; views.local_views must be 0")


@final
class Simclr(nn.Module):
    """Encoder and projector; a :class:`gigatome.training.loop.Method`.

    Both views go through the networks in one batch, and share the statistics of batch norms.

    Attributes:
        student: the encoder, which one keeps, with the projector.

    Args:
        encoder: the level that is learnt from; or the config of a tile encoder.
        options: of the method.
        seed: of the initial weights.
        name: a tile encoder's name on its card, unless a level says it; by default its timm name.
        mpp: resolutions that it is trained at, for its card, likewise.

    Raises:
        ConfigError: the views are not of the level, or the encoder cannot be made.
    """

    def __init__(
        self,
        encoder: EncoderConfig | Level,
        options: SimclrOptions = SimclrOptions(),
        *,
        seed: int = 0,
        name: str | None = None,
        mpp: tuple[float, ...] = (),
    ):
        super().__init__()
        self.options = options
        level = TileLevel(encoder, name, mpp) if isinstance(encoder, EncoderConfig) else encoder
        self.level = cast(Level[Any, Any], level)
        network = self.level.build(drop_path=0.0, seed=torch_seed(seed, "encoder"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed(seed, "projector"))
            projector = _projector([network.dim, *options.projector])
        self.student = _Branch(self.level, network, projector)
        share_statistics(self, "ranks" if options.batch_norm == "synced" else "group", 2**62)
        self.level.check(network, options.views)

    @property
    def teacher(self) -> "_Branch":
        """The student, as there is no other network."""
        return self.student

    def trained(self) -> nn.Module:
        """Encoder and projector; the loop spreads them over processes."""
        return self.student

    def lr_scales(self) -> dict[str, float]:
        """All parameters learn at one rate."""
        return {}

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Two views of a batch; raises :class:`RunError` if it is of another level."""
        return self.level.views(self.student.encoder, images, self.options.views, generator)

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch of two views, on all processes, and what shows a collapse.

        Returns:
            The loss, and ``accuracy``, the share of views whose nearest is their partner, and ``spread`` of the
            projections over the sphere, from 1 to 0 when all are alike. A spread near 0 is a collapse.

        Raises:
            ConfigError: there is nothing to compare a view with.
        """
        if len(views[0]) * world_size() < 2:
            raise ConfigError("SimCLR compares the members of a micro-batch with each other; make it 2 or more")
        first, second = (gather_with_gradient(part.contiguous()) for part in self.student(views).float().chunk(2))
        loss, accuracy = ntxent_and_accuracy(first, second, self.options.temperature)
        return loss, {"accuracy": accuracy, "spread": spread(F.normalize(first.detach(), dim=-1))}

    def after_backward(self, clock: Clock) -> None:
        """Leaves the gradients as they are."""

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Nothing but the rates changes."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes the encoder, without the projector, with its card."""
        self.level.export(self.student.encoder, folder, "SimCLR")


class _Branch(nn.Module):
    """An encoder with its projector."""

    encoder: Any  # of the level's kind

    def __init__(self, level: Level, encoder: Any, projector: nn.Sequential):
        super().__init__()
        self._level, self.encoder, self.projector = level, encoder, projector

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Projections [V · B, D] of V views [B, …], one view after the other."""
        return self.projector(self._level.embed(self.encoder, torch.cat(list(views))))


def _projector(widths: list[int]) -> nn.Sequential:
    """Linear layers; ReLU, then batch norm, between them."""
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after)]
    return nn.Sequential(*modules[:-2])

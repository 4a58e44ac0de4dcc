"""What the training loop asks of a method and of a stream.

The loop hands a stream's batches to the method as they are: whether they are of the level that the method learns from
is for the method to see.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from gigatome.training.schedules import Clock


class Batch(Protocol):
    """What a stream gives for one step."""

    @property
    def images(self) -> np.ndarray | Tensor:
        """What is learnt from: an array, or a tensor that may be on the device already.

        Tiles, uint8 [B, H, W, 3]; regions, float16 or float32 [B, rows, columns, D] of tile embeddings; or slides,
        float32 [B, 2, T, D + 2], two draws of T tiles with their embeddings and places.
        """
        ...


class Stream(Protocol):
    """Endless batches; batch k is the same however the stream came to it."""

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches of the steps from ``start_step`` on."""
        ...

    def state(self) -> Mapping[str, list[int]]:
        """What the batches depend on beside their number, as JSON holds it; kept in checkpoints."""
        ...

    def restore(self, state: Mapping[str, list[int]]) -> None:
        """Takes up the state of the run before."""
        ...


class Method(Protocol):
    """What is learnt: an ``nn.Module`` that turns images into views and views into a loss."""

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Views [B, …] of the :attr:`Batch.images` of a batch.

        Which part of them a view shows is drawn from ``generator``, which is on the CPU; the rest may come from
        PyTorch's global generators, which the loop seeds at each step.

        Raises:
            RunError: the stream gives something else than the method learns from.
        """
        ...

    def trained(self) -> nn.Module:
        """The one submodule that holds all trained parameters; the method uses it only by calling it."""
        ...

    def lr_scales(self) -> Mapping[str, float]:
        """Factors of the learning rate by name of parameter; 1 for those that are not named."""
        ...

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and scalars for the log."""
        ...

    def after_backward(self, clock: Clock) -> None:
        """May change gradients, before they are clipped."""
        ...

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Moves what follows the weights; must change nothing if ``finite`` (bool scalar) is false."""
        ...

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Values that change with the step, for the log."""
        ...

    def export(self, folder: Path) -> None:
        """Writes what the run was for."""
        ...

    def to(self, device: Any, /) -> Any:
        """As ``nn.Module``; so are the others."""
        ...

    def train(self, mode: bool = True) -> Any:  # noqa: D102
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:  # noqa: D102
        ...

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:  # noqa: D102
        ...


@runtime_checkable
class HostImages(Protocol):
    """A method whose images are too large to be on the device all at once: it moves them there itself, in parts."""

    host_images: bool


@runtime_checkable
class Undecayed(Protocol):
    """A method that keeps weight decay from more parameters than biases and those of one dimension."""

    def undecayed(self) -> Collection[str]:
        """Their names, as of ``named_parameters``."""
        ...

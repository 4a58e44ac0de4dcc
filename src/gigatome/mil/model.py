"""What every slide-level model takes and gives: bags of any length side by side, without padding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self, TypeAlias, final

import torch
from torch import Tensor, nn


@final
@dataclass(frozen=True, eq=False)
class BagBatch:
    """Several bags, the instances of one after those of another.

    Attributes:
        x: float [T, D] embeddings; [T, tiles, D] for models of regions, an instance being a grid of tiles.
        bounds: int64 [B + 1]; bag b is rows ``bounds[b]`` to ``bounds[b + 1]`` of ``x``. None is empty.
        coords: int64 [T, 2], (x, y) of each instance's corner in level-0 pixels.
        clusters: int64 [T], cluster of each instance.
        edges: int64 [2, E], from row and to row of ``x``; both of one bag.
        omics: groups of further values, float [B, n_k] each.
    """

    x: Tensor
    bounds: Tensor
    coords: Tensor | None = None
    clusters: Tensor | None = None
    edges: Tensor | None = None
    omics: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """int64 [B], instances of each bag."""
        return self.bounds.diff()

    @cached_property
    def bag(self) -> Tensor:
        """int64 [T], the bag of each instance."""
        bags = torch.arange(len(self), device=self.bounds.device)
        return torch.repeat_interleave(bags, self.sizes, output_size=len(self.x))

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in moved.items()
                if name != "omics"
            },
            omics=tuple(group.to(device, non_blocking=True) for group in self.omics),
        )


@final
@dataclass(frozen=True, eq=False)
class BagOutput:
    """What a model says of B bags of T instances.

    Attributes:
        logits: float [B, outputs]: of classes; of the hazards of time bins; or [B, 1], the log-risk of Cox.
        attention: float [T, K], the K weights of each instance, which sum to 1 over each bag; None if there are none.
        instances: float [T, C] logits of single instances, or whatever else the model's own loss needs.
    """

    logits: Tensor
    attention: Tensor | None = None
    instances: Tensor | None = None


@final
@dataclass(frozen=True, eq=False)
class Targets:
    """What is known of B bags.

    Attributes:
        y: int64 [B], class, or time bin.
        time: float [B], time to event or censoring.
        event: bool [B], whether the event was seen; False if censored.
    """

    y: Tensor
    time: Tensor | None = None
    event: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> "Targets":
        return self._each(lambda value: value[index])

    def to(self, device: torch.device | str) -> "Targets":
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        time, event = (None if value is None else change(value) for value in (self.time, self.event))
        return Targets(change(self.y), time, event)


Criterion: TypeAlias = Callable[[Tensor, Targets], Tensor]
"""Logits [B, outputs] and targets of B bags → the scalar mean loss."""


class BagModel(nn.Module, ABC):
    """A model of bags.

    Attributes:
        needs: what of a :class:`BagBatch` it needs beside ``x``: of "coords", "clusters", "edges", "omics"; and what
            an instance of ``x`` must be, if not an embedding of whatever kind: "regions", grids of tile embeddings,
            or "region embeddings", where those of tiles will not do.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def forward(self, bags: BagBatch) -> BagOutput:
        """Logits and attention of each bag."""

    def loss(self, output: BagOutput, targets: Targets, criterion: Criterion) -> Tensor:
        """Scalar that training makes small; models with a loss of their own add it here."""
        return criterion(output.logits, targets)

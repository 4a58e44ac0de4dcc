"""What the processes of a run tell each other; in a run of one process everything here is the identity.

torchrun starts the processes and says who they are in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; ``value`` itself in a run of one."""
    return value if world_size() == 1 else sum_over_ranks(value) / world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient; ``value`` itself in a run of one."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather(value: Tensor) -> Tensor:
    """Rows [N, …] of all processes, [ranks × N, …] in their order, without gradient; N is the same everywhere."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(value: Tensor) -> Tensor:
    """As :func:`gather`; the gradient of all processes' losses flows back to the rows of each, summed."""
    return value if world_size() == 1 else _Gather.apply(value)  # pyright: ignore[reportReturnType]


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded, without gradient; ``value`` itself if it is not."""
    part = getattr(value.detach(), "to_local", None)  # of DTensor, which takes long to import
    return part() if part else value


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return gather(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()].contiguous()

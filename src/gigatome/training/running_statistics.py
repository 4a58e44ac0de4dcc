"""Running means and variances of batch norms, in runs of many processes and through steps that are left out."""

from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gigatome.distributed import mean_over_ranks
from gigatome.training.method import Method


@final
class RunningStatistics:
    """Keeps what batch norms remember the same in all processes, and free of steps that are left out.

    A forward pass changes it before one knows whether the step is finite, and in each process by its own tiles.
    """

    def __init__(self, method: Method):
        norms = [module for module in cast(nn.Module, method).modules() if isinstance(module, _NormBase)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """To be called before the forward pass."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def settle(self, finite: Tensor) -> None:
        """To be called after it: takes the mean of all processes, or what was before if not ``finite`` (a scalar)."""
        if not self._buffers:
            return
        means = mean_over_ranks(torch.cat([buffer.flatten().float() for buffer in self._buffers]))
        split = means.split([buffer.numel() for buffer in self._buffers])
        for buffer, before, mean in zip(self._buffers, self._before, split, strict=True):
            buffer.copy_(torch.where(finite, mean.view_as(buffer).to(buffer.dtype), before))

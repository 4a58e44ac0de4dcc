"""LARS, which MoCo v3 trains ResNets with."""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

from gigatome.distributed import sum_over_ranks

_TRUST = 0.001


@final
class Lars(torch.optim.Optimizer):
    """Gradient descent with momentum whose step is in proportion to the length of each weight.

    Biases and 1-D parameters, which do not decay either, take plain steps. As in PyTorch's fused optimisers, a step is
    passed over where ``found_inf`` is not 0.

    Args:
        groups: as ``torch.optim.Optimizer`` takes them, with ``lr_scale`` and ``decay_scale``.
        momentum: of the update.
        sharded: each process has its part of each parameter.

    Source: arXiv 1708.03888, algorithm 1, as facebookresearch/moco-v3 has it: the learning rate multiplies the
    momentum, not what joins it.
    """

    found_inf: Tensor

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, *, sharded: bool):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self._sharded = sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; ``closure`` is not used."""
        skip = self.found_inf > 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = [parameter.grad for parameter in parameters]
            if group["decay_scale"] and parameters:
                updates = self._in_proportion(parameters, updates, group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                state = self.state[parameter]
                before = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                after = group["momentum"] * before + update
                before.copy_(torch.where(skip, before, after))
                parameter.sub_(torch.where(skip, 0.0, group["lr"] * after))

    def _in_proportion(self, parameters: list[Tensor], gradients: list[Tensor], weight_decay: float) -> list[Tensor]:
        updates = [gradient + weight_decay * weight for gradient, weight in zip(gradients, parameters, strict=True)]
        lengths = torch.stack(torch._foreach_norm([*parameters, *updates]))  # pyright: ignore[reportPrivateImportUsage]
        if self._sharded:
            lengths = sum_over_ranks(lengths.square()).sqrt()
        of_weights, of_updates = lengths.chunk(2)
        ratios = torch.where((of_weights > 0) & (of_updates > 0), _TRUST * of_weights / of_updates, 1.0)
        return [update * ratio for update, ratio in zip(updates, ratios.unbind(), strict=True)]

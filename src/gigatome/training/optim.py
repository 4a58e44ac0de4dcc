"""The optimiser's parts: parameter groups, learning-rate rules, clipping, and steps that pass over what is not finite.

Nothing here makes the host wait for the device: whether a step is finite is a boolean scalar that stays on the device.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gigatome.distributed import local, sum_over_ranks
from gigatome.training.lars import Lars

LrScaling = Literal["none", "linear", "sqrt"]
OptimizerName = Literal["adamw", "adam", "sgd", "lars"]
Clipping = Literal["global", "per_parameter"]


def make_optimizer(
    kind: OptimizerName,
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr_scales: Mapping[str, float] = {},
    momentum: float = 0.9,
    *,
    undecayed: Collection[str] = (),
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser of named parameters; those that need no gradient are left out, biases and 1-D ones do not decay.

    Its rates are set before each step with :func:`set_rates`, times ``lr_scales`` of those that are named there. It is
    a fused one, on the CPU too, because that one can pass over a step without asking the host (:func:`step_if`).

    Args:
        kind: ``"adamw"``, ``"adam"``, ``"sgd"`` or ``"lars"``.
        parameters: with their names.
        lr_scales: factors of the learning rate.
        momentum: of sgd and lars.
        undecayed: names of others that do not decay.
        sharded: each process has its part of each parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            scales = lr_scales.get(name, 1.0), float(name not in undecayed and _decays(name, parameter))
            groups.setdefault(scales, []).append(parameter)
    listed = [{"params": members, "lr_scale": lr, "decay_scale": decay} for (lr, decay), members in groups.items()]
    if kind == "lars":
        return Lars(listed, momentum, sharded=sharded)
    if kind == "sgd":
        sgd = torch.optim.SGD(listed, momentum=momentum, fused=True)
        if momentum:  # else a first step that is passed over would leave it whatever was in memory
            for parameter in itertools.chain.from_iterable(groups.values()):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(listed, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets learning rate and weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["decay_scale"]


def scaled_lr(lr: float, batch_size: int, rule: LrScaling) -> float:
    """Learning rate for a batch: ``"linear"`` lr × batch / 256 (DINO), ``"sqrt"`` lr × √(batch / 1024) (DINOv2)."""
    if rule == "linear":
        return lr * batch_size / 256
    return lr * math.sqrt(batch_size / 1024) if rule == "sqrt" else lr


def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float | None, mode: Clipping, *, sharded: bool = False
) -> Tensor:
    """Shortens gradients, in place, that are longer than ``limit``.

    Args:
        parameters: those without a gradient are passed over.
        limit: greatest Euclidean norm; None leaves all as they are.
        mode: ``"global"``, of all gradients together, or ``"per_parameter"``, of each alone, as DINO's code does.
        sharded: each process has its part of each gradient.

    Returns:
        float32 scalar: norm of all gradients together before clipping; not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    if sharded:
        norms = sum_over_ranks(norms.square()).sqrt()
    total = norms.norm()
    if limit is not None:
        lengths = norms if mode == "per_parameter" else total.expand_as(norms)
        factors = (limit / (lengths + 1e-6)).clamp(max=1).nan_to_num(nan=1.0)  # so that NaN stays where it was
        torch._foreach_mul_(gradients, factors.unbind())  # pyright: ignore[reportPrivateImportUsage]
    return total


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Steps if ``finite`` (bool scalar); otherwise weights, moments and step counts stay as they are."""
    # the channel through which torch.amp.GradScaler tells a fused optimiser to pass over a step
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


@torch.no_grad()
def update_average(average: list[Tensor], values: list[Tensor], momentum: float, finite: Tensor) -> None:
    """Moves ``average`` in place to ``momentum`` · average + (1 − momentum) · values, if ``finite`` (bool scalar).

    Sharded tensors are moved part by part; both lists must be cut alike.
    """
    average, values = [local(tensor) for tensor in average], [local(tensor) for tensor in values]
    keep = torch.where(finite, momentum, 1.0)
    take = torch.where(finite, 1.0 - momentum, 0.0)
    torch._foreach_mul_(average, keep)  # pyright: ignore[reportPrivateImportUsage]
    moved = torch._foreach_mul(values, take)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(average, moved)  # pyright: ignore[reportPrivateImportUsage]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """State of an optimiser as ``{"<parameter>/<quantity>": tensor}``; its rates are not part of it."""
    return {
        f"{names[parameter]}/{quantity}": value
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what :func:`optimizer_tensors` gave; raises KeyError if it is of other parameters."""
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][quantity] = value.to(parameter.device)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith(".bias")

"""Dropout at a fraction of its usual cost on a CPU, where PyTorch draws its masks one number after another.

An ABMIL over 10,000 instances spends a third of its time on drawing masks. Here each element takes one byte of a fast
generator, which PyTorch's own seeds at each call; so the rate is rounded to 1/256 (0.25, 0.5 and the like are exact).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

LEVELS = 256  # of a rate
_FEW = 1 << 14  # elements below which PyTorch's own is as fast
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """Each element 0 with probability ``p``, in steps of 1/256, else divided by 1 − p; gradients likewise.

    Args:
        x: real, any shape.
        p: in [0, 1].
    """
    dropped = round(p * LEVELS)
    if x.device.type != "cpu" or x.numel() < _FEW or not 0 < dropped < LEVELS:
        return F.dropout(x, p)
    words = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 8))
    kept = torch.from_numpy(words.view(np.uint8)[: x.numel()]).view(x.shape) >= dropped
    return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def drop_(x: Tensor, dropped: int, random: np.random.SFC64) -> None:
    """Makes each element 0 with probability ``dropped`` / 256, in place and without a gradient; the rest stay.

    Args:
        x: real [N, D] on the CPU, D values of a row side by side.
        dropped: 0 to 255.
        random: drawn from, a byte an element.
    """
    if not dropped:
        return
    words = random.random_raw(-(-x.numel() // 8))
    kept = torch.from_numpy(np.greater_equal(words.view(np.uint8)[: x.numel()], np.uint8(dropped)).view(np.int8))
    bits = _BITS[x.element_size()]
    x.view(bits).bitwise_and_(kept.view(x.shape).to(bits).neg_())  # -1 has all bits


@contextmanager
def with_fast_dropout(model: nn.Module) -> Iterator[None]:
    """Has every :class:`torch.nn.Dropout` in ``model`` use :func:`fast_dropout` within the block."""
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is nn.Dropout]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    return fast_dropout(x, layer.p) if layer.training else x

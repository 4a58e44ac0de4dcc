"""Softmax attention that also gives the log-sum-exp, by the fastest kernel that takes the tensors.

Kernels need no mask and keep no scores: a caller that knows the log-sum-exp of a row over more keys than it passes
gets the gradient of the attention over all of them, a part at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gigatome.core.native import NATIVE

_FLASH_TYPES = (torch.float16, torch.bfloat16)
_FLASH_DIM = 256
_SCORES = 2**20  # that products hold at once
_LSE_ALIGNMENT = 32  # rows that CUDA's memory-efficient kernel reads at once
_NATIVE_STEP, _NATIVE_DIM = 8, 48  # longer heads are PyTorch's matter, whose products of matrices are as fast


class Gradients(NamedTuple):
    """Gradients of queries [b, h, n, d], and of keys and values [b, h, m, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


@final
@dataclass(frozen=True)
class InPlace:
    """Attention of q [places, n, d] to k and v [places, m, d], with four dimensions of places and any strides.

    Attributes:
        attend: of q, k, v, the output [places, n, d] and the log-sum-exp [places, n, 1] of other keys, and how many
            further keys and values are 0: changes output and log-sum-exp to those of all.
        add_gradients: of the output's gradient, q, k, v, the output, the log-sum-exp, and three tensors that the
            gradients of q, k and v are added to. Output and log-sum-exp may be those of more keys than k.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]
    add_gradients: Callable[..., None]


@final
@dataclass(frozen=True)
class Kernel:
    """Attention of q [b, h, n, d] to k and v [b, h, m, d], with scores times d^-0.5, and its gradient.

    Attributes:
        forward: of q, k and v: the output [b, h, n, d], and the log-sum-exp of the scores [b, h, n], which is float32
            or float64.
        backward: of the output's gradient, q, k, v, the output and the log-sum-exp. Weights are exp(score - lse), so
            output and log-sum-exp may be those of more keys than k.
        in_place: the same without copies, where a kernel can.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
    in_place: InPlace | None = None


def kernel_for(q: Tensor) -> Kernel:
    """The kernel for tensors like this one, [..., d]."""
    dim = q.shape[-1]
    fits = q.device.type == "cpu" and q.dtype == torch.float32 and dim <= _NATIVE_DIM and dim % _NATIVE_STEP == 0
    return CPU_NATIVE if fits and getattr(NATIVE, "ATTENTION_LANES", 0) else pytorch_kernel_for(q)


def pytorch_kernel_for(q: Tensor) -> Kernel:
    """Likewise, of PyTorch's own."""
    dim, device = q.shape[-1], q.device
    if device.type == "cpu" and q.dtype in (torch.float32, torch.float64, *_FLASH_TYPES):
        return CPU_FLASH
    if device.type == "cuda" and torch.version.hip is None:
        flash = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (
            8,
            0,
        )
        if flash and q.dtype in _FLASH_TYPES and dim % 8 == 0 and dim <= _FLASH_DIM:
            return CUDA_FLASH
        if q.dtype == torch.float32 and dim % 4 == 0:
            return CUDA_EFFICIENT
    return PRODUCTS


@torch.library.custom_op("gigatome::attend", mutates_args=("out", "lse"), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, padded: int) -> None:
    NATIVE.attend(*map(_array, (q, k, v)), out.numpy(), lse.numpy(), padded, torch.get_num_threads())


@torch.library.custom_op("gigatome::add_gradients", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _add_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    given = map(_array, (grad, q, k, v, out, lse))
    NATIVE.add_gradients(*given, dq.numpy(), dk.numpy(), dv.numpy(), torch.get_num_threads())


def _array(x: Tensor) -> np.ndarray:
    """With the numbers of each row side by side."""
    x = x.detach()
    return (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()).numpy()


@register_flop_formula(torch.ops.gigatome.attend)
def _attend_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products, as PyTorch counts them."""
    return 2 * 2 * prod(q) * k[-2]


@register_flop_formula(torch.ops.gigatome.add_gradients)
def _gradient_flops(_grad: Sequence[int], q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Of five."""
    return 5 * 2 * prod(q) * k[-2]


def _native(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros(q.shape), torch.full((*q.shape[:3], 1), float("-inf"))
    _attend(*map(_placed, (q, k, v, out, lse)), 0)
    return out, lse.squeeze(-1)


def _native_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    found = Gradients(*(torch.zeros(x.shape) for x in (q, k, v)))
    _add_gradients(*map(_placed, (grad, q, k, v, out, lse[..., None], *found)))
    return found


def _placed(batch: Tensor) -> Tensor:
    """[b, h, n, d] with four dimensions of places."""
    return batch[:, None, None]


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _cpu_flash_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))  # in half precision it is slow
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return Gradients(*flash(grad, q, k, v, out, lse.contiguous(), 0.0, False))


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _cuda_flash_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    n, m, seed = q.shape[2], k.shape[2], _no_seed(q)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return Gradients(*flash(grad, q, k, v, out, lse.contiguous(), None, None, n, m, 0.0, False, seed, seed))


def _cuda_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]


def _cuda_efficient_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=float("inf")).contiguous()
    seed, wanted = _no_seed(q), [True, True, True, False]
    return Gradients(*efficient(grad, q, k, v, None, out, lse, seed, seed, 0.0, wanted)[:3])


def _products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In float32 or better, a bounded number of scores at a time."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=exact, device=q.device)
    q, k, v, flat_out, flat_lse = (x.flatten(0, 1) for x in (q, k, v, out, lse))
    for places, rows in _blocks(len(q), q.shape[1], k.shape[1]):
        scores = _scores(q[places, rows], k[places], exact)
        total = scores.logsumexp(-1, keepdim=True)
        flat_out[places, rows] = (scores.sub_(total).exp_() @ v[places].to(exact)).to(out.dtype)
        flat_lse[places, rows] = total.squeeze(-1)
    return out, lse


def _products_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    exact, scale = lse.dtype, q.shape[-1] ** -0.5
    found = Gradients(*(torch.zeros(x.shape, dtype=exact, device=q.device) for x in (q, k, v)))
    dq, dk, dv = (x.flatten(0, 1) for x in found)
    grad, q, k, v, out, lse = (x.flatten(0, 1) for x in (grad, q, k, v, out, lse))
    for places, rows in _blocks(len(q), q.shape[1], k.shape[1]):
        own_grad, own_q = grad[places, rows].to(exact), q[places, rows]
        weights = _scores(own_q, k[places], exact).sub_(lse[places, rows, None]).exp_()
        dv[places] += weights.mT @ own_grad
        mean = (own_grad * out[places, rows]).sum(-1, keepdim=True)
        pull = (own_grad @ v[places].to(exact).mT).sub_(mean).mul_(weights)
        dq[places, rows] = (pull @ k[places].to(exact)).mul_(scale)
        dk[places] += (pull.mT @ own_q.to(exact)).mul_(scale)
    return found


def _scores(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT


def _blocks(places: int, n: int, m: int) -> list[tuple[slice, slice]]:
    """Slices of the batch and of the rows that hold at most ``_SCORES`` scores together, or one row of them."""
    batch, rows = max(1, _SCORES // (n * m)), max(1, min(n, _SCORES // m))
    return [
        (slice(i, i + batch), slice(j, min(j + rows, n))) for i in range(0, places, batch) for j in range(0, n, rows)
    ]


def _no_seed(q: Tensor) -> Tensor:
    """What stands for the seed of dropout where there is none."""
    return torch.empty(0, dtype=torch.int64, device=q.device)


CPU_NATIVE = Kernel(_native, _native_gradients, InPlace(_attend, _add_gradients))
"""Our own, for float32 on processors with AVX-512, where the C extension is built."""

CPU_FLASH = Kernel(_cpu_flash, _cpu_flash_gradients)
"""PyTorch's blockwise kernel for processors."""

CUDA_FLASH = Kernel(_cuda_flash, _cuda_flash_gradients)
"""FlashAttention, for half precision on NVIDIA devices of compute capability 8 and more."""

CUDA_EFFICIENT = Kernel(_cuda_efficient, _cuda_efficient_gradients)
"""The memory-efficient kernel, for float32 on NVIDIA devices."""

PRODUCTS = Kernel(_products, _products_gradients)
"""Matrix products in blocks, for everything else."""

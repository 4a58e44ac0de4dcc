"""Attention pooling of bags on a CPU: the whole of it in one step, a block of instances after another.

A bag of 10,000 instances makes arrays of 10 to 20 MB at each operation, and writing and reading those takes longer than
the arithmetic. Here a block goes through all layers while it is in the cache, and of it are kept the instances after
the first layer and the branches of the attention, in the precision of the matrix products. The gradient is written out:
an element that ReLU or dropout made 0 has none, so no mask is kept; and embeddings get no gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigatome.mil.dropout import LEVELS, drop_
from gigatome.mil.model import BagBatch
from gigatome.mil.segments import segment_dot, segment_pool, segment_softmax, segment_sum

_BLOCK = 1024  # instances: 1 MiB of each array in bfloat16

_tanh_backward = torch.ops.aten.tanh_backward
_sigmoid_backward = torch.ops.aten.sigmoid_backward
_relu_backward = torch.ops.aten.threshold_backward


@final
@dataclass(frozen=True)
class AttentionLayers:
    """The layers of h = dropout(ReLU(embed(x))) and scores last(dropout(tanh(·)) ⊙ dropout(σ(·))).

    Attributes:
        embed: D to H.
        branches: H to W, of the tanh and, if gated, of the sigmoid.
        last: W to K.
        dropout: rate of h and rate of each branch; zeros but in training.
    """

    embed: nn.Linear
    branches: tuple[nn.Linear, ...]
    last: nn.Linear
    dropout: tuple[float, float]


class Attended(NamedTuple):
    """What attention pooling gives.

    Attributes:
        pooled: [B, K, H].
        attention: [T, K], at least float32.
        scores: [T, K] before the softmax, without gradients.
        h: [T, H].
    """

    pooled: Tensor
    attention: Tensor
    scores: Tensor
    h: Tensor


def can_pool(layers: AttentionLayers, x: Tensor) -> bool:
    """Whether :func:`attention_pool` is for these: on a CPU, no gradient of ``x``, no dropout without a gate."""
    fits = x.device.type == "cpu" and x.ndim == 2 and x.is_floating_point() and not x.requires_grad
    return fits and max(layers.dropout) < 1 and (len(layers.branches) == 2 or not layers.dropout[1])


def attention_pool(layers: AttentionLayers, x: Tensor, bags: BagBatch) -> Attended:
    """Pools each bag; products are in autocast's type or in that of the weights, softmax and sums in float32.

    Args:
        layers: for which :func:`can_pool` holds.
        x: float [T, D], of any precision.
        bags: of T instances.
    """
    linear = (layers.embed, layers.last, *layers.branches)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layers.embed.weight.dtype
    parameters = [parameter for layer in linear for parameter in (layer.weight, layer.bias)]
    kept = _Kept(bags, dtype, layers.dropout, torch.is_grad_enabled())
    return Attended(*_AttentionPool.apply(x, kept, *parameters))  # type: ignore[misc]


class _Kept(NamedTuple):
    """What is not a tensor."""

    bags: BagBatch
    dtype: torch.dtype
    dropout: tuple[float, float]
    grads: bool


class _Weights(NamedTuple):
    """Weights of a step, in the type of the products; the scale of dropout is in those before it."""

    embed: Tensor
    embed_bias: Tensor
    last: Tensor
    last_bias: Tensor
    branches: Tensor
    branch_bias: Tensor


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: _Kept, *parameters: Tensor) -> tuple[Tensor, ...]:
        embed, embed_bias, last, last_bias, *branches = parameters
        levels = _levels(kept.dropout)
        ctx.scales = scale, gate_scale = [LEVELS / (LEVELS - dropped) for dropped in levels]
        joined = torch.cat(branches[::2]), torch.cat(branches[1::2])
        scaled = (embed * scale, embed_bias * scale, last * gate_scale, last_bias, *joined)
        with torch.autocast("cpu", enabled=False):
            weights = _Weights(*(value.to(kept.dtype) for value in scaled))
            h, z, scores = _run(x, weights, levels, kept)
            attention = segment_softmax(scores, kept.bags)
            pooled = segment_pool(attention, h, kept.bags)
        ctx.kept, ctx.gates = kept, len(branches) // 2
        if kept.grads:
            ctx.save_for_backward(x, h, z, attention, *weights)
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)
        return pooled, attention, scores, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pooled_grad, attention_grad, _, h_grad = grads
        x, h, z, attention, *values = ctx.saved_tensors
        weights, bags = _Weights(*values), ctx.kept.bags
        if pooled_grad is None:
            pooled_grad = h.new_zeros(len(bags), attention.shape[1], h.shape[1])
        with torch.autocast("cpu", enabled=False):
            flow = segment_dot(h, pooled_grad, bags).to(attention.dtype)
            flow = attention * (flow if attention_grad is None else flow + attention_grad)
            scores_grad = flow - attention * segment_sum(flow, bags)[bags.bag]
            found = [torch.zeros(value.shape, dtype=attention.dtype) for value in weights]
            flows = scores_grad, attention.to(h.dtype), pooled_grad.to(h.dtype), h_grad
            _run_back(x, h, z, weights, flows, bags, found)
        embed, embed_bias, last, last_bias, joined, joined_bias = found
        scale, gate_scale = ctx.scales
        parts = zip(joined.chunk(ctx.gates), joined_bias.chunk(ctx.gates), strict=True)
        branches = [value for pair in parts for value in pair]
        return None, None, embed * scale, embed_bias * scale, last * gate_scale, last_bias, *branches


def _levels(dropout: tuple[float, float]) -> tuple[int, int]:
    """How many in 256 elements of h and of the product of the branches become 0."""
    kept = 1 - dropout[0], (1 - dropout[1]) ** 2
    return round(LEVELS * (1 - kept[0])), round(LEVELS * (1 - kept[1]))


def _run(x: Tensor, weights: _Weights, levels: tuple[int, int], kept: _Kept) -> tuple[Tensor, Tensor, Tensor]:
    """Instances h [T, H], branches [T, W] or [T, 2 W] and scores [T, K]; without gradients one block of branches."""
    width = weights.last.shape[1]
    h = torch.empty(len(x), len(weights.embed), dtype=kept.dtype)
    z = torch.empty(len(x) if kept.grads else min(len(x), _BLOCK), len(weights.branches), dtype=kept.dtype)
    scores = torch.empty(len(x), len(weights.last), dtype=kept.dtype)
    random = np.random.SFC64(int(torch.randint(2**62, ()))) if any(levels) else None
    for rows in _blocks(len(x)):
        part = torch.addmm(weights.embed_bias, x[rows].to(kept.dtype), weights.embed.T, out=h[rows]).relu_()
        activations = z[rows] if kept.grads else z[: len(part)]
        if random is not None:
            drop_(part, levels[0], random)
        torch.addmm(weights.branch_bias, part, weights.branches.T, out=activations)
        gate, sigmoid = activations[:, :width].tanh_(), activations[:, width:]
        if sigmoid.shape[1]:
            sigmoid.sigmoid_()
            if random is not None:
                drop_(sigmoid, levels[1], random)
            gate = gate * sigmoid
        torch.addmm(weights.last_bias, gate, weights.last.T, out=scores[rows])
    return h, z, scores


def _run_back(
    x: Tensor,
    h: Tensor,
    z: Tensor,
    weights: _Weights,
    flows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    bags: BagBatch,
    found: Sequence[Tensor],
) -> None:
    """Adds to ``found`` the gradients of ``weights``; ``flows`` are of scores, attention itself, of pooled and of h."""
    scores_grad, attention, pooled_grad, h_grad = flows
    width, bounds = weights.last.shape[1], bags.bounds.tolist()
    for rows in _blocks(len(x)):
        grad, part, activations = scores_grad[rows].to(h.dtype), h[rows], z[rows]
        tanh, sigmoid = activations[:, :width], activations[:, width:]
        gate_grad = grad @ weights.last
        if sigmoid.shape[1]:
            branch_grad = torch.empty_like(activations)
            _tanh_backward(gate_grad * sigmoid, tanh, grad_input=branch_grad[:, :width])
            _sigmoid_backward(gate_grad.mul_(tanh), sigmoid, grad_input=branch_grad[:, width:])
            _add_linear(found[2:4], grad, tanh * sigmoid)
        else:
            branch_grad = _tanh_backward(gate_grad, tanh)
            _add_linear(found[2:4], grad, tanh)
        _add_linear(found[4:6], branch_grad, part)
        part_grad = branch_grad @ weights.branches
        for bag, start, stop in _overlaps(bounds, rows):
            part_grad[start - rows.start : stop - rows.start].addmm_(attention[start:stop], pooled_grad[bag])
        if h_grad is not None:
            part_grad += h_grad[rows]
        _add_linear(found[:2], _relu_backward(part_grad, part, 0), x[rows].to(h.dtype))


def _add_linear(found: Sequence[Tensor], grad: Tensor, x: Tensor) -> None:
    """Adds the gradients of a linear layer's weight and bias, of its output's gradient and its input."""
    found[0].add_(grad.T @ x)
    found[1].add_((grad.new_ones(1, len(grad)) @ grad)[0])


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _overlaps(bounds: Sequence[int], rows: slice) -> Iterator[tuple[int, int, int]]:
    """Each bag that has some of the rows, with the first and the end of these."""
    bag = int(np.searchsorted(bounds, rows.start, side="right")) - 1
    while bag < len(bounds) - 1 and bounds[bag] < rows.stop:
        yield bag, max(bounds[bag], rows.start), min(bounds[bag + 1], rows.stop)
        bag += 1

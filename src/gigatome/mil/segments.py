"""Sums, maxima and softmaxes over each bag of a batch, with gradients.

Three products do the work, and the gradient of each is made of the other two:

===========  =========================================  ===============================
pool         weights [T, K], values [T, D] → [B, K, D]  Σ over a bag of w_tk v_t
dot          values [T, D], keys [B, K, D] → [T, K]     v_t · k of its bag
spread       weights [T, K], keys [B, K, D] → [T, D]    Σ over k of w_tk times k of its bag
===========  =========================================  ===============================

Where the bounds lie in main memory, or there is one bag only, they are one matrix product a bag. On an accelerator the
host does not know the bounds, and asking would make it wait: there, a product with the bags' indicator columns does it
for several bags at once. Neither adds in an order that changes from run to run.

A segment may be empty here, though a bag of a model may not: its sum, mean and maximum are zeros.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from gigatome.mil.model import BagBatch

_MAX_INDICATORS = 2**26  # numbers in a block of indicator columns: 256 MiB


def segment_sum(values: Tensor, bags: BagBatch) -> Tensor:
    """Sum of values [T, K] over each bag, [B, K]."""
    return segment_pool(values.new_ones(len(values), 1), values, bags).squeeze(1)


def segment_mean(values: Tensor, bags: BagBatch) -> Tensor:
    """Mean of values [T, K] over each bag, [B, K]."""
    return segment_sum(values, bags) / bags.sizes.clamp(min=1)[:, None]


def segment_max(values: Tensor, bags: BagBatch) -> Tensor:
    """Maximum of values [T, K] over each bag, [B, K]; the gradient goes to one maximum, the first on a CPU."""
    if not len(values):
        return values.new_zeros(len(bags), values.shape[1])
    return values.gather(0, segment_argmax(values, bags)).where(bags.sizes[:, None] > 0, 0)


@torch.no_grad()
def segment_argmax(values: Tensor, bags: BagBatch) -> Tensor:
    """Row of the maximum of values [T, K] over each bag, int64 [B, K]; any row for an empty bag."""
    spans = _spans(bags)
    if spans is not None:
        return torch.stack(
            [
                values[start:end].argmax(0) + start if end > start else bags.bounds.new_zeros(values.shape[1])
                for start, end in spans
            ]
        )
    bag = bags.bag[:, None].expand_as(values)
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    rows = rows.where(values == _max(values, bags).gather(0, bag), len(values))
    first = rows.new_full((len(bags), values.shape[1]), len(values)).scatter_reduce_(0, bag, rows, "amin")
    return first.clamp(max=len(values) - 1)


def segment_softmax(values: Tensor, bags: BagBatch) -> Tensor:
    """Softmax of values [T, K] over each bag, [T, K]; at least float32, so that the weights of a bag sum to 1."""
    values = values if values.dtype == torch.float64 else values.float()
    return _Softmax.apply(values, bags)  # type: ignore[return-value]


def segment_pool(weights: Tensor, values: Tensor, bags: BagBatch) -> Tensor:
    """Weighted sums over each bag: Σ w_tk v_t.

    Args:
        weights: [T, K].
        values: [T, D]; the result has its type.
        bags: of T instances.

    Returns:
        [B, K, D].
    """
    return _Pool.apply(weights.to(values.dtype), values, bags)  # type: ignore[return-value]


def segment_dot(values: Tensor, keys: Tensor, bags: BagBatch) -> Tensor:
    """Scalar products of each instance with the K keys of its bag.

    Args:
        values: [T, D].
        keys: [B, K, D]; the result has the type of ``values``.
        bags: of T instances.

    Returns:
        [T, K].
    """
    return _Dot.apply(values, keys.to(values.dtype), bags)  # type: ignore[return-value]


@torch.no_grad()
def segment_extremes(values: Tensor, bags: BagBatch, count: int) -> tuple[Tensor, Tensor]:
    """Rows of the highest and the lowest values of each bag.

    A bag of n < ``count`` instances has only n of each; the places after those repeat its last.

    Args:
        values: [T, K].
        bags: of T instances.
        count: how many of each, at least 1.

    Returns:
        int64 [B, K, count] rows from the highest downwards, and [B, K, count] from the lowest upwards.
    """
    order = values.argsort(0)
    order = order.gather(0, bags.bag[order].argsort(dim=0, stable=True))  # by bag, and by value within it
    place = torch.arange(count, device=order.device)
    first, last = bags.bounds[:-1, None], bags.bounds[1:, None] - 1
    highest, lowest = torch.maximum(last - place, first), torch.minimum(first + place, last)
    return order[highest].mT, order[lowest].mT


def _spans(bags: BagBatch) -> list[tuple[int, int]] | None:
    """Where each bag begins and ends, if that can be told without waiting for an accelerator."""
    if len(bags) == 1:
        return [(0, len(bags.x))]
    return list(itertools.pairwise(bags.bounds.tolist())) if bags.bounds.device.type == "cpu" else None


def _max(values: Tensor, bags: BagBatch) -> Tensor:
    """Maximum [B, K] over each bag of values [T, K]; -inf of an empty bag."""
    spans = _spans(bags)
    lowest = values.new_full((len(bags), values.shape[1]), float("-inf"))
    if spans is None:
        return lowest.scatter_reduce_(0, bags.bag[:, None].expand_as(values), values, "amax")
    for row, (start, end) in zip(lowest, spans, strict=True):
        if end > start:
            torch.amax(values[start:end], 0, out=row)
    return lowest


def _pool(weights: Tensor, values: Tensor, bags: BagBatch) -> Tensor:
    (size, dim), count, branches = values.shape, len(bags), weights.shape[1]
    spans = _spans(bags)
    if spans is not None:
        pooled = values.new_empty(count, branches, dim)
        for out, (start, end) in zip(pooled, spans, strict=True):
            torch.mm(weights[start:end].T, values[start:end], out=out)
        return pooled
    block = max(1, _MAX_INDICATORS // max(1, size * branches))
    parts = []
    for start in range(0, count, block):
        columns = torch.arange(start, min(start + block, count), device=values.device)
        belongs = bags.bag[:, None] == columns
        spread = torch.where(belongs[:, :, None], weights[:, None], 0).flatten(1)
        parts.append((spread.T @ values).view(-1, branches, dim))
    return torch.cat(parts)


def _dot(values: Tensor, keys: Tensor, bags: BagBatch) -> Tensor:
    spans = _spans(bags)
    if spans is None:
        return torch.stack([(values * key[bags.bag]).sum(1) for key in keys.unbind(1)], 1)
    products = values.new_empty(len(values), keys.shape[1])
    for key, (start, end) in zip(keys, spans, strict=True):
        torch.mm(values[start:end], key.T, out=products[start:end])
    return products


def _spread(weights: Tensor, keys: Tensor, bags: BagBatch) -> Tensor:
    spans = _spans(bags)
    if spans is None:
        branches = zip(weights.split(1, 1), keys.unbind(1), strict=True)
        weight, key = next(branches)
        total = key[bags.bag].mul_(weight)
        for weight, key in branches:
            total.addcmul_(key[bags.bag], weight)
        return total
    total = keys.new_empty(len(weights), keys.shape[2])
    for key, (start, end) in zip(keys, spans, strict=True):
        torch.mm(weights[start:end], key, out=total[start:end])
    return total


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, bags: BagBatch) -> Tensor:
        ctx.save_for_backward(weights, values)
        ctx.bags = bags
        with torch.autocast(values.device.type, enabled=False):
            return _pool(weights, values, bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, values = ctx.saved_tensors
        needs_weights, needs_values, _ = ctx.needs_input_grad
        return (
            _Dot.apply(values, grads[0], ctx.bags) if needs_weights else None,
            _Spread.apply(weights, grads[0], ctx.bags) if needs_values else None,
            None,
        )  # type: ignore[return-value]


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, keys: Tensor, bags: BagBatch) -> Tensor:
        ctx.save_for_backward(values, keys)
        ctx.bags = bags
        with torch.autocast(values.device.type, enabled=False):
            return _dot(values, keys, bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, keys = ctx.saved_tensors
        needs_values, needs_keys, _ = ctx.needs_input_grad
        return (
            _Spread.apply(grads[0], keys, ctx.bags) if needs_values else None,
            _Pool.apply(grads[0], values, ctx.bags) if needs_keys else None,
            None,
        )  # type: ignore[return-value]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, keys: Tensor, bags: BagBatch) -> Tensor:
        ctx.save_for_backward(weights, keys)
        ctx.bags = bags
        with torch.autocast(keys.device.type, enabled=False):
            return _spread(weights, keys, bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, keys = ctx.saved_tensors
        needs_weights, needs_keys, _ = ctx.needs_input_grad
        return (
            _Dot.apply(grads[0], keys, ctx.bags) if needs_weights else None,
            _Pool.apply(weights, grads[0], ctx.bags) if needs_keys else None,
            None,
        )  # type: ignore[return-value]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, bags: BagBatch) -> Tensor:
        spans = _spans(bags)
        if spans is None:
            exponentials = (values - _max(values, bags)[bags.bag]).exp_()
            weights = exponentials / _sum(exponentials, bags)[bags.bag]
        else:
            weights = torch.cat([values[start:end].softmax(0) for start, end in spans])
        ctx.save_for_backward(weights)
        ctx.bags = bags
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        flow = weights * grads[0]
        return flow - weights * _each(segment_sum(flow, ctx.bags), ctx.bags), None


def _sum(values: Tensor, bags: BagBatch) -> Tensor:
    return _pool(values.new_ones(len(values), 1), values, bags).squeeze(1)


def _each(values: Tensor, bags: BagBatch) -> Tensor:
    """Values [B, K] of the bag of each instance, [T, K]."""
    return values if len(bags) == 1 else values[bags.bag]

"""Sparse maps of slides: which cells are active, and convolutions that compute at active cells alone.

A cell of a map is the integer slide · 2^42 + x · 2^21 + y, so that the cells of a batch are one sorted list and a
neighbour is found by bisection. What meets what is worked out once for a set of cells, as rows that each of the nine
places of a kernel joins; places that join nothing cost nothing. Values have one row a cell. Memory is linear in cells.

The rows of a kernel run along y and its columns along x, as for an image. No sum depends on an order that changes from
run to run.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor

MAX_SPAN = 2**20
"""Cells that a slide may span along x or y, less one."""

_SHIFT = 21  # bits of x and of y: one more than MAX_SPAN needs, so that no step across an edge ends in another cell
_CENTRE = 4


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """Which rows a 3 × 3 kernel joins.

    Attributes:
        inputs: number of input cells.
        outputs: number of output cells.
        places: (place, input rows, output rows) of each place of the kernel, 0 to 8 row by row, that joins any; rows
            are int64 and differ from each other within a place. None stands for all rows in their order.
    """

    inputs: int
    outputs: int
    places: tuple[tuple[int, Tensor | None, Tensor | None], ...]

    @property
    def centre(self) -> "Pairs":
        """Those of the place in the middle of the kernel alone."""
        return Pairs(self.inputs, self.outputs, tuple(joint for joint in self.places if joint[0] == _CENTRE))


@final
@dataclass(frozen=True, eq=False)
class Cells:
    """The active cells of the maps of several slides.

    Attributes:
        keys: int64 [N], sorted, no two the same.
        slides: number of slides.
    """

    keys: Tensor
    slides: int

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [slides], the first row of each slide."""
        return torch.searchsorted(self.keys, torch.arange(self.slides, device=self.keys.device) << 2 * _SHIFT)

    @property
    def places(self) -> Tensor:
        """int64 [N, 2], x and y of each cell."""
        low = (1 << _SHIFT) - 1
        return torch.stack([self.keys >> _SHIFT & low, self.keys & low], 1)

    @cached_property
    def neighbours(self) -> Pairs:
        """Joints of a submanifold convolution: from active cells to active cells, one step or none apart."""
        steps = torch.tensor([1, (1 << _SHIFT) - 1, 1 << _SHIFT, (1 << _SHIFT) + 1], device=self.keys.device)
        wanted = self.keys + steps[:, None]
        rows = torch.searchsorted(self.keys, wanted).clamp_(max=len(self) - 1)
        step, here = torch.nonzero(self.keys[rows] == wanted, as_tuple=True)
        joints: list[tuple[int, Tensor | None, Tensor | None]] = [(_CENTRE, None, None)]
        counts = torch.bincount(step, minlength=4).tolist()
        for place, ours, theirs in zip((7, 2, 5, 8), here.split(counts), rows[step, here].split(counts), strict=True):
            if len(ours):
                joints += [(place, theirs, ours), (8 - place, ours, theirs)]
        return Pairs(len(self), len(self), tuple(joints))


def map_cells(locations: Tensor, bounds: Tensor, *, shifted: bool = True) -> tuple[Cells, Tensor]:
    """The cells that tiles lie in.

    Args:
        locations: int64 [T, 2], (x, y) of each tile's cell.
        bounds: int64 [B + 1]; slide b has the tiles ``bounds[b]`` to ``bounds[b + 1]``. None is empty.
        shifted: subtract the least x and y of each slide; without, they must not be negative.

    Returns:
        The cells, and int64 [T], the row of each tile's cell.

    Raises:
        ValueError: locations are negative, or span more than ``MAX_SPAN``; the message names the slide.
    """
    slides = len(bounds) - 1
    slide = torch.repeat_interleave(
        torch.arange(slides, device=bounds.device), bounds.diff(), output_size=len(locations)
    )
    if shifted:
        least = locations.new_full((slides, 2), torch.iinfo(torch.int64).max)
        least = least.scatter_reduce_(0, slide[:, None].expand(-1, 2), locations, "amin")
        locations = locations - least[slide]
    wrong = ((locations < 0) | (locations > MAX_SPAN)).any(1)  # a difference beyond int64 comes out negative
    if wrong.any():
        number = int(slide[wrong.nonzero()[0, 0]])
        raise ValueError(
            f"slide {number} of the batch: its locations must {'span' if shifted else 'lie within'} 0 to {MAX_SPAN} "
            "cells along each axis; divide coordinates by the side of a tile"
        )
    keys = slide << 2 * _SHIFT | locations[:, 0] << _SHIFT | locations[:, 1]
    keys, rows = torch.unique(keys, return_inverse=True)
    return Cells(keys, slides), rows


def halve(cells: Cells, size: tuple[int, int] | None = None) -> tuple[Cells, Pairs]:
    """What a 3 × 3 kernel with a stride of 2 and no padding makes of a map.

    The cell o of the output sees 2o to 2o + 2 of the input, and is active if any of these is.

    Args:
        cells: of the input.
        size: odd numbers of columns and rows of the input, at least 3 and more than its greatest x and y; output cells
            that would see beyond these are left out. None: maps have no far edge.

    Returns:
        The cells of the output, and the joints from input to output.

    Raises:
        ValueError: the size is even, or cells lie outside.
    """
    x, y = cells.places.unbind(1)
    if size is not None:
        reach = int(x.max()), int(y.max())
        if any(side % 2 == 0 or side < 3 or side <= most for side, most in zip(size, reach, strict=True)):
            raise ValueError(f"a map that reaches to {reach} needs odd sides beyond these, at least 3, not {size}")
    step = torch.arange(3, device=x.device)[:, None]
    columns, rows = x - step, y - step  # twice the output's x and y
    fits_x, fits_y = ((twice % 2 == 0) & (twice >= 0) for twice in (columns, rows))
    if size is not None:
        fits_x, fits_y = fits_x & (columns <= size[0] - 3), fits_y & (rows <= size[1] - 3)
    fits = (fits_y[:, None] & fits_x).flatten(0, 1)
    slide = cells.keys >> 2 * _SHIFT << 2 * _SHIFT
    keys = ((columns >> 1 << _SHIFT) + (rows >> 1)[:, None] + slide).flatten(0, 1)
    place, source = torch.nonzero(fits, as_tuple=True)
    keys, target = torch.unique(keys[place, source], return_inverse=True)
    counts = torch.bincount(place, minlength=9).tolist()
    joints = enumerate(zip(source.split(counts), target.split(counts), strict=True))
    places = tuple((number, ours, theirs) for number, (ours, theirs) in joints if len(ours))
    return Cells(keys, cells.slides), Pairs(len(cells), len(keys), places)


def convolve(values: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """3 × 3 convolution over the joints of ``pairs``, without bias.

    Under autocast, products are of its type and sums float32.

    Args:
        values: [inputs, I].
        weight: [O, I, 3, 3]; fastest in the memory format ``channels_last``, in which each place is a matrix as it is.
        pairs: the joints.

    Returns:
        [outputs, O].
    """
    kind = values.device.type
    if torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        values, weight = (value.to(torch.get_autocast_dtype(kind)) for value in (values, weight))
    return _Convolution.apply(values, weight.contiguous(memory_format=torch.channels_last), pairs)  # type: ignore[return-value]


def window_sum(values: Tensor, pairs: Pairs) -> Tensor:
    """Sums [outputs, C] of the values [inputs, C] that ``pairs`` joins to each output."""
    total = values.new_zeros(pairs.outputs, values.shape[1])
    for _, source, target in pairs.places:
        _add(total, target, values if source is None else values.index_select(0, source))
    return total


def segment_mean(values: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Means [S, C] over segments of rows of values [T, C]; no segment is empty.

    Args:
        values: float.
        rows: int64, rows of ``values``, those of one segment after those of another.
        starts: int64 [S], where each segment begins in ``rows``.
    """
    return F.embedding_bag(rows, values, starts, mode="mean")


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pairs = pairs
        kernels = _by_place(weight)
        total = _zeros(values, pairs.outputs, len(weight))
        with torch.autocast(values.device.type, enabled=False):
            for place, source, target in pairs.places:
                _add(total, target, _pick(values, source) @ kernels[place].T)
        return total.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors
        needs_values, needs_weight, _ = ctx.needs_input_grad
        to_values = _zeros(values, *values.shape) if needs_values else None
        to_weight = torch.zeros_like(weight) if needs_weight else None
        kernels, to_kernels = _by_place(weight), None if to_weight is None else _by_place(to_weight)
        with torch.autocast(values.device.type, enabled=False):
            for place, source, target in ctx.pairs.places:
                grad = _pick(grads[0], target)
                if to_values is not None:
                    _add(to_values, source, grad @ kernels[place])
                if to_kernels is not None:
                    to_kernels[place] = grad.T @ _pick(values, source)
        return None if to_values is None else to_values.to(values.dtype), to_weight, None


def _by_place(weight: Tensor) -> Tensor:
    """View [9, O, I] of a weight [O, I, 3, 3]."""
    return weight.permute(2, 3, 0, 1).flatten(0, 1)


def _zeros(values: Tensor, rows: int, columns: int) -> Tensor:
    """A place for sums, at least of float32."""
    return values.new_zeros(rows, columns, dtype=torch.promote_types(values.dtype, torch.float32))


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def _add(total: Tensor, rows: Tensor | None, values: Tensor) -> None:
    """Adds values to rows of ``total``, in place."""
    if rows is None:
        total += values
    else:
        total.index_add_(0, rows, values.to(total.dtype))

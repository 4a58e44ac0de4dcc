"""What a training step of a LongViT takes, in pretraining and fine-tuning, before it is started."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch

from gigatome.core.errors import ConfigError
from gigatome.distributed import world_size
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longnet_plan import (
    Plan,
    gradient_traffic,
    parse_memory,
    plan_longnet,
    plan_table,
    size_text,
    suggest,
)
from gigatome.recipes.finetune_schema import FinetuneRecipe
from gigatome.recipes.schema import AnyRecipe, PixelRecipe
from gigatome.selfsup.views import ViewOptions, check_patches
from gigatome.training.flops import measured_flops
from gigatome.training.memory import total_memory
from gigatome.training.options import FitOptions

_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block")  # from the least arithmetic to the most


@final
@dataclass(frozen=True)
class StepPlan:
    """A step of one part of the batch in one process, forward and backward.

    Attributes:
        parts: that the batch is cut into, processes × ``fit.grad_accumulation``.
        images: of a part.
        views: what the student takes to learn from the views of each size, by name.
        rest_bytes: the teacher, DINO's head, its logits and the views' pixels.
    """

    parts: int
    images: int
    views: dict[str, Plan]
    rest_bytes: int

    @property
    def memory(self) -> int:
        """Bytes on the device; the views of both sizes are kept until the backward pass."""
        first = next(iter(self.views.values()))
        activations = sum(plan.activation_bytes for plan in self.views.values())
        return first.parameter_bytes + first.optimizer_bytes + activations + self.rest_bytes

    @property
    def flops(self) -> int:
        """Operations of the student, forward and backward, and of the teacher, without patches and heads."""
        student = sum(plan.forward_flops + plan.backward_flops for plan in self.views.values())
        return student + self.views["global"].forward_flops

    @property
    def checkpointing(self) -> Checkpointing:
        """What is kept of a block for the gradient."""
        return next(iter(self.views.values())).checkpointing


def plan_step(recipe: AnyRecipe, parts: int, checkpointing: Checkpointing | None = None) -> StepPlan:
    """What a step takes when its batch is cut into ``parts``.

    Args:
        recipe: of level pixels.
        parts: processes × parts of the batch in each.
        checkpointing: in place of the recipe's.

    Raises:
        ConfigError: the recipe is of another level, its batch cannot be cut so, or its views do not divide into
            patches.
    """
    if not isinstance(recipe, PixelRecipe):
        raise ConfigError(
            f"{recipe.name}: only recipes of level pixels, which train a LongViT, can be planned, and this is of level "
            f"{recipe.level}; --dry-run counts its steps and parameters"
        )
    views, encoder, batch = recipe.dino.views, recipe.encoder, recipe.fit.batch_size
    if batch % parts:
        raise ConfigError(f"fit.batch_size {batch} cannot be cut into {parts} parts")
    assert isinstance(views, ViewOptions)  # noqa: S101 - a recipe of this level has no others
    sizes = {"views.global_size": views.global_size, "views.local_size": views.local_size}
    check_patches(sizes, encoder.patch_size)
    images, kinds = batch // parts, {"global": (views.global_size, 2), "local": (views.local_size, views.local_views)}
    plans = {
        name: plan_longnet(
            encoder.encoder(), (side // encoder.patch_size) ** 2, precision=recipe.fit.precision, batch=count * images,
            checkpointing=checkpointing or recipe.checkpointing,
        )
        for name, (side, count) in kinds.items()
        if count
    }  # fmt: skip
    pixels = sum(count * side**2 for side, count in kinds.values())
    rest = plans["global"].parameter_bytes + 12 * images * pixels + _head(recipe, images)
    return StepPlan(parts, images, plans, rest)


def plan_text(recipe: AnyRecipe, processes: int = 1, max_memory: str | None = None) -> str:
    """What a step of the recipe takes, in words, and what to change if it does not fit.

    Args:
        recipe: of level pixels.
        processes: that the run has.
        max_memory: that there is for each, such as ``"40GB"``.

    Raises:
        ConfigError: as for :func:`plan_step`; ``max_memory`` is no amount of memory, or not even a part of two images
            fits into it.
    """
    plan = plan_step(recipe, processes * recipe.fit.grad_accumulation)
    assert isinstance(recipe, PixelRecipe)  # noqa: S101 - or there were no plan
    lines = [
        f"{plan.images} images at a time: batch of {recipe.fit.batch_size}, processes × grad_accumulation = "
        f"{processes} × {recipe.fit.grad_accumulation}"
    ]
    lines += [line for name, part in plan.views.items() for line in ("", f"{name} views", plan_table(part))]
    learnt = next(iter(plan.views.values())).optimizer_bytes // 12 + _head_parameters(recipe)
    lines += ["", f"in all, with teacher, head and views: {size_text(plan.memory)}"]
    flops, received = recipe.fit.grad_accumulation * plan.flops, gradient_traffic(learnt, processes)
    lines.append(_time_text(flops, received, recipe.fit))
    if max_memory is not None:
        most = parse_memory(max_memory)
        lines.append(_fit_text(plan.memory, most, lambda: _change(recipe, plan, most)))
    return "\n".join(lines)


def step_advice(recipe: AnyRecipe, processes: int, device: torch.device) -> str:
    """What to say when a step has run out of memory: what it takes, what there is, and what would fit.

    What has failed is taken to need a quarter less than it was estimated to at least.

    Args:
        recipe: of level pixels.
        processes: that the run has.
        device: that lacked memory.

    Raises:
        ConfigError: not even a part of two images would fit.
    """
    plan, total = plan_step(recipe, processes * recipe.fit.grad_accumulation), total_memory(device)
    said = f"{plan.images} images at a time take about {size_text(plan.memory)}, and {device} has {size_text(total)}"
    return f"{said}; {_change(recipe, plan, _less(plan.memory, total))}"


def _less(memory: int, total: int) -> int:
    """Bytes to try with after so many were too many."""
    return min(total, 3 * memory // 4)


def _fit_text(memory: int, most: int, change: Callable[[], str]) -> str:
    return f"fits into {size_text(most)}" if memory <= most else f"does not fit into {size_text(most)}; {change()}"


def _time_text(flops: int, received: int, fit: FitOptions) -> str:
    """What a step computes and receives in each process, and how long that takes on the recipe's device."""
    said = f"a step in each process: {flops / 1e12:,.4g} TFLOP, {size_text(received)} received"
    rate = measured_flops(torch.device(fit.device), fit.precision)
    if rate is None:
        return f"{said}; there is no {fit.device} here to say how long that takes"
    return (
        f"{said}, {flops / rate:,.3g} s at least: at {rate / 1e12:,.3g} TFLOP/s, which {fit.device} reaches here in "
        "products of large matrices; attention and reading slides are slower"
    )


def _change(recipe: AnyRecipe, plan: StepPlan, most: int) -> str:
    """What to change; the plan of the fewest parts, and then of the least arithmetic, that fits."""
    batch, parts, least = recipe.fit.batch_size, plan.parts, plan
    while parts <= batch // 2:
        for checkpointing in _CHECKPOINTING:
            found = plan_step(recipe, parts, checkpointing)
            if found.memory <= most:
                return (
                    f'{found.images} images at a time with checkpointing "{checkpointing}" do, in '
                    f"{size_text(found.memory)}: make processes × fit.grad_accumulation {parts}, and --set "
                    f"checkpointing={checkpointing}"
                )
            least = min(least, found, key=lambda it: it.memory)
        parts = next((count for count in range(2 * parts, batch // 2 + 1, parts) if batch % count == 0), batch)
    raise ConfigError(
        f"{recipe.name}: does not fit into {size_text(most)} in parts of any size; {least.images} images take "
        f'{size_text(least.memory)} with checkpointing "{least.checkpointing}". Use smaller views or fewer of them'
    )


def _head(recipe: PixelRecipe, images: int) -> int:
    """Bytes of both heads, one of them with gradient and moments, and of the logits."""
    assert isinstance(recipe.dino.views, ViewOptions)  # noqa: S101 - a recipe of this level has no others
    logits = images * (2 + recipe.dino.views.local_views) * recipe.dino.out_dim
    return 20 * _head_parameters(recipe) + 3 * 4 * logits


def _head_parameters(recipe: PixelRecipe) -> int:
    """Weights of a head."""
    options = recipe.dino
    hidden, bottleneck, layers = options.head_hidden_dim, options.head_bottleneck_dim, options.head_layers
    between = [recipe.encoder.dim, *[hidden] * (layers - 1), bottleneck, options.out_dim]
    return sum(before * after for before, after in pairwise(between))


@final
@dataclass(frozen=True)
class FinetunePlan:
    """A step of fine-tuning, in the process that has most.

    Attributes:
        encoder: of the images that are worked on at a time, forward and backward.
        parts: of so many images that a process works on in a step, one after another.
        sequences: slides, or batches of them, that the run works on side by side.
        patch_flops: operations of a part on patches and positions, forward and backward.
        patch_bytes: weights for patches and positions, their gradients and moments.
        pixel_bytes: images of a part, as far as a process holds them.
        communication_bytes: that a process receives in a step.
    """

    encoder: Plan
    parts: int
    sequences: int
    patch_flops: int
    patch_bytes: int
    pixel_bytes: int
    communication_bytes: int

    @property
    def memory(self) -> int:
        """Bytes on the device of a process."""
        return self.encoder.memory + self.patch_bytes + self.pixel_bytes

    @property
    def host_memory(self) -> int:
        """Bytes of images on the host of a process: those of a step, and of the next, which are being read."""
        return 2 * self.parts * self.pixel_bytes

    @property
    def flops(self) -> int:
        """Operations of a step in a process."""
        return self.parts * (self.encoder.forward_flops + self.encoder.backward_flops + self.patch_flops)


def plan_finetune(recipe: FinetuneRecipe, processes: int) -> FinetunePlan:
    """What a step of fine-tuning takes.

    Args:
        recipe: what to plan.
        processes: that the run has, a multiple of those that share a slide.

    Raises:
        ConfigError: the batch cannot be cut so, or an image has fewer rows of patches than processes share it.
    """
    if processes % recipe.processes:
        raise ConfigError(f"{recipe.name}: {processes} processes are no multiple of the {recipe.processes} of a slide")
    encoder, precision, side = recipe.encoder, recipe.fit.precision, recipe.images.image_size
    sequences, columns, grid = processes // recipe.processes, side // encoder.patch_size, encoder.grid
    parts = recipe.cut_for(sequences).grad_accumulation
    plan = plan_longnet(
        encoder.encoder(), columns**2, ranks=recipe.processes, precision=precision, unit=columns,
        checkpointing=recipe.checkpointing, batch=recipe.at_once,
    )  # fmt: skip
    rows, values = plan.tokens_per_rank // columns, 3 * encoder.patch_size**2
    patches = 2 * recipe.at_once * plan.tokens_per_rank * values * encoder.dim
    positions = 2 * rows * grid * encoder.dim * grid, 2 * rows * grid * encoder.dim * columns
    parameters = (values + 1 + grid**2) * encoder.dim
    of_encoder = plan.optimizer_bytes // 12
    own = plan.communication_bytes - gradient_traffic(of_encoder, recipe.processes)
    return FinetunePlan(
        encoder=plan, parts=parts, sequences=sequences,
        patch_flops=3 * patches + 3 * positions[0] + 2 * positions[1],
        patch_bytes=(16 if precision == "fp32" else 18) * parameters,
        pixel_bytes=recipe.at_once * plan.tokens_per_rank * values,
        communication_bytes=parts * own + gradient_traffic(of_encoder + parameters, processes),
    )  # fmt: skip


def finetune_text(recipe: FinetuneRecipe, processes: int = 1, max_memory: str | None = None) -> str:
    """What a step of fine-tuning takes, in words, and what to change if it does not fit.

    Args:
        recipe: what to plan.
        processes: that the run has; as many as share a slide at least.
        max_memory: that there is for each, such as ``"40GB"``.

    Raises:
        ConfigError: as for :func:`plan_finetune`; ``max_memory`` is no amount of memory, or nothing fits into it.
    """
    plan = plan_finetune(recipe, max(processes, recipe.processes))
    lines = [
        f"batch of {recipe.fit.batch_size} slides of {recipe.images.image_size:,} px: {plan.sequences} × "
        f"{recipe.processes} processes, {plan.parts} × {recipe.at_once} slides in each",
        f"{recipe.at_once} at a time:",
        plan_table(plan.encoder),
        f"in all, with patches and pixels: {size_text(plan.memory)}; on the host, pixels of two steps: "
        f"{size_text(plan.host_memory)}",
        _time_text(plan.flops, plan.communication_bytes, recipe.fit),
    ]
    if max_memory is not None:
        most = parse_memory(max_memory)
        lines.append(_fit_text(plan.memory, most, lambda: _finetune_change(recipe, plan, most)))
    return "\n".join(lines)


def finetune_advice(recipe: FinetuneRecipe, device: torch.device) -> str:
    """What to say when fine-tuning has run out of memory; see :func:`step_advice`.

    Raises:
        ConfigError: nothing would fit.
    """
    plan, total = plan_finetune(recipe, world_size()), total_memory(device)
    said = f"a step takes about {size_text(plan.memory)} in each process, and {device} has {size_text(total)}"
    return f"{said}; {_finetune_change(recipe, plan, _less(plan.memory, total))}"


def _finetune_change(recipe: FinetuneRecipe, plan: FinetunePlan, most: int) -> str:
    """What to change; with one image at a time, the fewest processes a slide, and the least arithmetic, that fit."""
    rest = plan.memory - plan.encoder.memory
    if rest >= most:
        raise ConfigError(
            f"{recipe.name}: pixels, and weights for patches and positions, take {size_text(rest)} of "
            f"{size_text(most)} alone; use a smaller images.image_size, a smaller at_once, or more processes a slide"
        )
    columns = recipe.images.image_size // recipe.encoder.patch_size
    fits = suggest(
        recipe.encoder.encoder(), columns**2, max_memory=most - rest, precision=recipe.fit.precision, unit=columns,
        least_ranks=recipe.processes, most_ranks=max(64, recipe.processes),
    )  # fmt: skip
    start = "" if fits.ranks <= recipe.processes * plan.sequences else f", and start {fits.ranks} processes"
    return (
        f"{size_text(fits.memory + rest)} would do: --set processes={fits.ranks} --set at_once=1 --set "
        f"checkpointing={fits.checkpointing}{start}"
    )

"""What a training step of a LongViT recipe takes, before it is started."""

from dataclasses import dataclass
from itertools import pairwise
from typing import final

from gigatome.core.errors import ConfigError
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longnet_plan import Plan, parse_memory, plan_longnet, plan_table, size_text
from gigatome.recipes.schema import AnyRecipe, PixelRecipe
from gigatome.selfsup.views import ViewOptions, check_patches

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
    parts = processes * recipe.fit.grad_accumulation
    plan = plan_step(recipe, parts)
    lines = [
        f"{plan.images} images at a time: batch of {recipe.fit.batch_size}, processes × grad_accumulation = "
        f"{processes} × {recipe.fit.grad_accumulation}"
    ]
    lines += [line for name, part in plan.views.items() for line in ("", f"{name} views", plan_table(part))]
    lines += ["", f"in all, with teacher, head and views: {size_text(plan.memory)}"]
    if max_memory is not None:
        lines.append(_advice(recipe, plan, parse_memory(max_memory)))
    return "\n".join(lines)


def _advice(recipe: AnyRecipe, plan: StepPlan, most: int) -> str:
    """What to change; the plan of the fewest parts, and then of the least arithmetic, that fits."""
    if plan.memory <= most:
        return f"fits into {size_text(most)}"
    batch, parts, least = recipe.fit.batch_size, plan.parts, plan
    while parts <= batch // 2:
        for checkpointing in _CHECKPOINTING:
            found = plan_step(recipe, parts, checkpointing)
            if found.memory <= most:
                return (
                    f"does not fit into {size_text(most)}; {found.images} images at a time with checkpointing "
                    f'"{checkpointing}" do, in {size_text(found.memory)}: make processes × fit.grad_accumulation '
                    f"{parts}, and --set checkpointing={checkpointing}"
                )
            least = min(least, found, key=lambda it: it.memory)
        parts = next((count for count in range(2 * parts, batch // 2 + 1, parts) if batch % count == 0), batch)
    raise ConfigError(
        f"{recipe.name}: does not fit into {size_text(most)} in parts of any size; {least.images} images take "
        f'{size_text(least.memory)} with checkpointing "{least.checkpointing}". Use smaller views or fewer of them'
    )


def _head(recipe: PixelRecipe, images: int) -> int:
    """Bytes of both heads, one of them with gradient and moments, and of the logits."""
    options, width = recipe.dino, recipe.encoder.dim
    hidden, bottleneck, layers = options.head_hidden_dim, options.head_bottleneck_dim, options.head_layers
    between = [width, *[hidden] * (layers - 1), bottleneck, options.out_dim]
    parameters = sum(before * after for before, after in pairwise(between))
    assert isinstance(options.views, ViewOptions)  # noqa: S101 - a recipe of this level has no others
    logits = images * (2 + options.views.local_views) * options.out_dim
    return 20 * parameters + 3 * 4 * logits

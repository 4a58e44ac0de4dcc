"""End-to-end training on whole slides: a LongViT with a head learns from the pixels of slides what is known of them.

It is what the one loop of :mod:`gigatome.training.loop` trains, on the images of a stream of slides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.device import usable_device
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, save_slide_vit
from gigatome.mil.losses import Comparing
from gigatome.mil.model import Criterion, Targets
from gigatome.tiles.slide_images import SlideImage
from gigatome.training.schedules import Clock


@final
class EndToEnd(nn.Module):
    """A LongViT with a head that learns targets; a :class:`gigatome.training.method.Method`.

    Args:
        model: trained in place.
        targets: of all units, such as slides or patients.
        criterion: loss of logits, such as of :mod:`gigatome.mil.losses`.
        order: of a step, which units' images the stream gives: int64 [B], indices into ``targets``.
        card: what is written with the model.
        share: how several processes share the rows of patches of each image; None if this one reads all of them.

    Attributes:
        model: see above.
        host_images: a batch stays on the host; :meth:`loss` moves the images of a part to the device.

    Raises:
        ConfigError: the images do not divide into patches, or ``share`` is of other images.
    """

    host_images = True

    def __init__(
        self,
        model: SlideVit,
        targets: Targets,
        criterion: Criterion,
        order: Callable[[int], NDArray[np.int64]],
        card: SlideVitCard,
        *,
        share: Share | None = None,
    ):
        super().__init__()
        self.model = model
        self._targets, self._criterion, self._order = targets, criterion, order
        self._card, self._share = card, share
        side, patch = card.images.image_size, model.backbone.patch_size
        if side % patch or (share is not None and share.count * patch != side):
            shared = "" if share is None else f" in {share.count} rows"
            raise ConfigError(f"images of {side} px do not divide into patches of {patch} px{shared}")
        self._height = side if share is None else len(share.own) * patch

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """The images and their targets: y, and of a survival time and event; what is to be drawn, the stream draws.

        Args:
            images: uint8 [B, rows, image_size, 3] of the units that ``order`` gives for the step.
            generator: not used.
            clock: of the step.

        Raises:
            RunError: they are of another size, or of another number of units.
        """
        wanted = (self._height, self._card.images.image_size, 3)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            raise RunError(
                f"this run learns from images of slides, uint8 [B, {', '.join(map(str, wanted))}], and its stream "
                f"gives {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        units = self._order(clock.step)
        if len(units) != len(images):
            raise RunError(
                f"step {clock.step}: the stream gives {len(images)} images, and the order has {len(units)} units; make "
                "both with one order"
            )
        targets = self._targets[torch.from_numpy(units)].to(self.model.head.weight.device)
        known = (targets.y, targets.time, targets.event)
        return [images, *(value for value in known if value is not None)]

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of some images, and of classes the share of them that is right.

        Raises:
            ConfigError: the criterion compares images, and there is one only.
        """
        images, *known = views
        if isinstance(self._criterion, Comparing) and len(images) == 1:
            raise ConfigError(
                "this loss compares slides with one another, and was given one; let a process work on several at a "
                "time (a larger batch_size, or fewer parts of it), or use the loss nll"
            )
        targets = Targets(*known)
        logits = self.model(images.to(targets.y.device, non_blocking=True), self._share)
        loss = self._criterion(logits, targets)
        if targets.event is not None:
            return loss, {}
        return loss, {"accuracy": (logits.detach().argmax(1) == targets.y).float().mean()}

    def trained(self) -> nn.Module:
        """The model."""
        return self.model

    def lr_scales(self) -> Mapping[str, float]:
        """All parameters learn at one rate."""
        return {}

    def undecayed(self) -> frozenset[str]:
        """The position embedding, which does not decay, nor do biases and what has one dimension."""
        return frozenset({"model.backbone.pos_embed"})

    def after_backward(self, clock: Clock) -> None:
        """Nothing."""

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Nothing changes but the learning rate."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes the model with its card, as :func:`gigatome.encoders.slide_vit.save_slide_vit`."""
        save_slide_vit(self.model, folder, self._card)


def predict_slides(
    model: SlideVit,
    images: Iterable[SlideImage | NDArray[np.uint8]],
    *,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
    share: Share | None = None,
) -> NDArray[np.float64]:
    """Logits float64 [N, outputs] of N images, one at a time.

    The model is left on ``device``, in the mode it was in.

    Args:
        model: trained.
        images: of slides, or their pixels, uint8 [H, W, 3]; with ``share`` this process's rows.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …
        precision: of the network.
        share: how several processes share the rows of patches of each image; all of them call this together, and each
            is given all the logits.

    Raises:
        ConfigError: the device cannot be used, or an image does not divide into patches.
        RunError: logits are not finite, or a process that shares the images does not answer.
    """
    where = usable_device(str(device))
    model.to(where)
    mode, logits = model.training, [torch.zeros(0, model.head.out_features, dtype=torch.float64)]
    model.eval()
    try:
        for number, image in enumerate(images, 1):
            pixels = image.pixels if isinstance(image, SlideImage) else image
            batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].to(where)
            autocast = torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16")
            with torch.no_grad(), autocast:  # inference tensors would be left in a model that is still being trained
                logits.append(model(batch, share).double().cpu())
            if not bool(torch.isfinite(logits[-1]).all()):
                raise RunError(
                    f"the model's output is not finite for the image number {number}; train it again with a lower rate"
                )
    finally:
        model.train(mode)
    return torch.cat(logits).numpy()

"""DINOv2: DINO on whole views, iBOT on masked patches, and a term that keeps the embeddings of a batch apart.

Source: arXiv 2304.07193 (DINOv2); the defaults are those of its code's ``ssl_default_config.yaml``. Differs: frozen
prototypes get no gradient, where the code sets their rate to 0 and lets Adam's moments run; Sinkhorn-Knopp and the
spread terms see a micro-batch if the batch is cut into parts; the code clips the gradients of encoder and heads apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import torch_seed
from gigatome.distributed import mean_over_ranks, sum_over_ranks
from gigatome.encoders.heads import DinoHead
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import save_encoder
from gigatome.selfsup.levels import tile_views
from gigatome.selfsup.losses import (
    dino_loss,
    entropy,
    ibot_loss,
    kde_loss,
    koleo_loss,
    sinkhorn_knopp,
    teacher_probabilities,
    update_center,
)
from gigatome.selfsup.masking import MaskOptions, block_masks, masked_patches
from gigatome.selfsup.views import ViewOptions, check_patches
from gigatome.training.optim import update_average
from gigatome.training.schedules import Clock, cosine


@dataclass(frozen=True)
class Dinov2Options:
    """DINOv2's own options; registers, SwiGLU and LayerScale are the encoder's (DINOv2: ``layer_scale: 1e-5``).

    Attributes:
        views: crops and colours.
        masks: which patches of the student's global views are masked.
        high_resolution_epochs: last epochs of the run, in which views have the two sizes below; 0 for none.
        high_resolution_global_size: side in pixels; the default is Midnight's, for patches of 14 px.
        high_resolution_local_size: side in pixels.
        out_dim: prototypes, K.
        head_layers: linear layers of the head's MLP.
        head_hidden_dim: its width.
        head_bottleneck_dim: its output.
        head_batch_norm: batch norm in the heads; keeps short runs of small batches from collapsing to one output.
        norm_last_layer: keep the prototypes at unit length; DINOv2's code, unlike DINO's, learns their lengths.
        separate_head: masked patches have a head of their own, with the four sizes below.
        patch_out_dim: its prototypes.
        patch_head_layers: as ``head_layers``.
        patch_head_hidden_dim: as ``head_hidden_dim``.
        patch_head_bottleneck_dim: as ``head_bottleneck_dim``.
        freeze_last_layer_epochs: the prototypes stay as they are in the first epochs.
        dino_weight: of the loss on whole views.
        ibot_weight: of the loss on masked patches.
        koleo_weight: of :func:`gigatome.selfsup.losses.koleo_loss`, summed over the two global views.
        kde_weight: the same of :func:`gigatome.selfsup.losses.kde_loss`; Virchow2 and Midnight take it, at 0.05,
            instead of KoLeo.
        kde_concentration: of its kernel.
        centering: how the teacher is kept from giving all images one answer: ``"centering"`` as in DINO, or
            ``"sinkhorn_knopp"``, which DINOv2's large models use.
        sinkhorn_iterations: of ``"sinkhorn_knopp"``.
        center_momentum: of ``"centering"``: share that the centre keeps of itself at a step.
        drop_path: stochastic depth of the student.
        uniform_drop_path: the same in all blocks; otherwise it grows linearly from 0 in the first block.
        layer_decay: the learning rate shrinks by this factor from block to block towards the input; 1 for none.
        patch_embed_lr: further factor for the patch embedding.
        student_temperature: of its softmax.
        teacher_temperature_start: at the first step.
        teacher_temperature: after the warm-up, which is linear.
        teacher_temperature_warmup_epochs: 0 for none.
        teacher_momentum: share that the teacher keeps of itself at a step; rises to 1 on a cosine.
    """

    views: ViewOptions = field(default_factory=ViewOptions.dinov2)
    masks: MaskOptions = field(default_factory=MaskOptions)
    high_resolution_epochs: float = 0.0
    high_resolution_global_size: int = 392
    high_resolution_local_size: int = 168
    out_dim: int = 65536
    head_layers: int = 3
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    head_batch_norm: bool = False
    norm_last_layer: bool = False
    separate_head: bool = False
    patch_out_dim: int = 65536
    patch_head_layers: int = 3
    patch_head_hidden_dim: int = 2048
    patch_head_bottleneck_dim: int = 256
    freeze_last_layer_epochs: int = 1
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    kde_weight: float = 0.0
    kde_concentration: float = 5.0
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    drop_path: float = 0.3
    uniform_drop_path: bool = True
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    student_temperature: float = 0.1
    teacher_temperature_start: float = 0.04
    teacher_temperature: float = 0.07
    teacher_temperature_warmup_epochs: int = 30
    teacher_momentum: float = 0.992

    def __post_init__(self):
        sizes = [name for name in vars(self) if name.endswith(("_dim", "_layers"))]
        if any(getattr(self, name) < 1 for name in (*sizes, "sinkhorn_iterations")):
            raise ValueError(f"{', '.join(sizes)} and sinkhorn_iterations must be at least 1")
        weights = (self.dino_weight, self.ibot_weight, self.koleo_weight, self.kde_weight, self.high_resolution_epochs)
        if min(weights) < 0:
            raise ValueError("the weights of the losses and high_resolution_epochs must not be negative")
        if min(self.student_temperature, self.teacher_temperature_start, self.teacher_temperature) <= 0:
            raise ValueError("temperatures must be positive")
        if not (0 <= self.teacher_momentum <= 1 and 0 <= self.center_momentum <= 1):
            raise ValueError("teacher_momentum and center_momentum must lie within 0 to 1")
        if not 0 < self.layer_decay <= 1 or self.patch_embed_lr < 0:
            raise ValueError("layer_decay must lie above 0 and up to 1, patch_embed_lr must not be negative")


@final
class Dinov2(nn.Module):
    """Student, teacher and centres; a :class:`gigatome.training.loop.Method`.

    Attributes:
        student: learns; its encoder is in training mode.
        teacher: the moving average of the student, which is what one keeps; without gradient and stochastic depth.
        center: float32 [1, K], moving average of the teacher's logits of whole views; unused by Sinkhorn-Knopp.
        patch_center: the same of its masked patches.

    Args:
        encoder: of the tile encoder.
        options: of the method.
        seed: of the initial weights.
        name: the encoder's name on its card; by default its timm name.
        mpp: resolutions that it is trained at, for its card.

    Raises:
        ConfigError: a view does not divide into patches, or the encoder cannot be made or is no transformer.
    """

    center: Tensor
    patch_center: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        options: Dinov2Options = Dinov2Options(),
        *,
        seed: int = 0,
        name: str | None = None,
        mpp: tuple[float, ...] = (),
    ):
        super().__init__()
        self.options, self.mpp = options, mpp
        self.student = _branch(encoder, options, seed, name, drop_path=options.drop_path)
        self.teacher = _branch(replace(encoder, weights=None, pretrained=False), options, seed, name, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(1, options.out_dim))
        patch_prototypes = options.patch_out_dim if options.separate_head else options.out_dim
        self.register_buffer("patch_center", torch.zeros(1, patch_prototypes))
        self._teacher_means: list[Tensor] = []  # of the logits of whole views, one of each micro-batch of the step
        self._patch_totals: list[Tensor] = []  # of the logits of masked patches, with their number behind
        _check_sizes(options, self.teacher.encoder.patch_size)

    def train(self, mode: bool = True) -> "Dinov2":
        """Sets the student's mode; the teacher stays in evaluation."""
        self.training = mode
        self.student.train(mode)
        return self

    def trained(self) -> nn.Module:
        """The student; the loop spreads it over processes."""
        return self.student

    def lr_scales(self) -> dict[str, float]:
        """Factors of the student's parameters: layer decay, and that of the patch embedding."""
        options, depth = self.options, len(self.teacher.encoder.vit.blocks)
        scales = {}
        for name, _ in self.named_parameters():
            if not name.startswith("student."):
                continue
            block = re.search(r"\.blocks\.(\d+)\.", name)
            embeds = name.endswith((".pos_embed", ".cls_token", ".reg_token", ".mask_token")) or ".patch_embed." in name
            layer = 0 if embeds else int(block[1]) + 1 if block else depth + 1
            scales[name] = options.layer_decay ** (depth + 1 - layer)
            if ".patch_embed." in name:
                scales[name] *= options.patch_embed_lr
        return scales

    def views(self, images: Tensor, generator: torch.Generator, clock: Clock) -> list[Tensor]:
        """Normalised views [B, 3, size, size] of tiles uint8 [B, H, W, 3], the two global ones first, and their masks.

        The masks, last, are bool [B, 2, patches] on the CPU.
        """
        encoder, options = self.teacher.encoder, self._view_options(clock)
        views = tile_views(encoder, images, options, generator)
        masks = block_masks(
            2 * len(images), options.global_size // encoder.patch_size, self.options.masks, generator
        ).unflatten(0, (-1, 2))
        return [*views, masks]

    def loss(self, views: Sequence[Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch of views and masks, its parts, and what shows a collapse.

        Returns:
            The loss; ``dino``, ``ibot``, ``koleo`` and ``kde``, unweighted; ``teacher_entropy`` and ``kl``, which add
            up to ``dino``, as in DINO; ``patch_entropy``, of the teacher's answers to masked patches.

        Raises:
            ConfigError: the micro-batch is a single tile, whose embedding has no neighbours to keep apart from.
        """
        options, (*pictures, masks_B2P) = self.options, views
        if len(masks_B2P) < 2 and options.koleo_weight + options.kde_weight > 0:
            raise ConfigError(
                "koleo_weight and kde_weight need at least 2 tiles at a time; raise fit.batch_size, "
                "lower fit.grad_accumulation, or set both weights to 0"
            )
        masks = masks_B2P.transpose(0, 1).flatten(0, 1)
        masks, index, weights = (_send(value, pictures[0].device) for value in (masks, *masked_patches(masks)))
        torch._dynamo.maybe_mark_dynamic(index, 0)  # its length is chance: networks are compiled once for all
        targets_GBK, patch_targets_MK = self._targets(pictures[:2], index, clock)
        logits_VBK, patch_logits_MK, embeddings_GBD = self.student(pictures, masks, index)

        dino = dino_loss(logits_VBK, targets_GBK, options.student_temperature)
        ibot = ibot_loss(patch_logits_MK, patch_targets_MK, weights, options.student_temperature)
        loss = options.dino_weight * dino + options.ibot_weight * ibot
        spread = entropy(targets_GBK)
        facts = {"dino": dino, "ibot": ibot, "teacher_entropy": spread, "kl": dino - spread}
        facts |= {"patch_entropy": entropy(patch_targets_MK)}
        if options.koleo_weight > 0:
            facts["koleo"] = torch.stack([koleo_loss(x_BD) for x_BD in embeddings_GBD]).sum()
            loss = loss + options.koleo_weight * facts["koleo"]
        if options.kde_weight > 0:
            facts["kde"] = torch.stack([kde_loss(x_BD, options.kde_concentration) for x_BD in embeddings_GBD]).sum()
            loss = loss + options.kde_weight * facts["kde"]
        return loss, {name: value.detach() for name, value in facts.items()}

    def after_backward(self, clock: Clock) -> None:
        """Keeps the prototypes as they are in the first epochs, without weight decay too."""
        if clock.epoch < self.options.freeze_last_layer_epochs:
            for name, parameter in self.student.named_parameters():
                if ".last_layer." in name:
                    parameter.grad = None

    def after_step(self, clock: Clock, finite: Tensor) -> None:
        """Moves teacher and centres, unless the step was not ``finite`` (bool scalar) and has been left out."""
        if self.options.centering == "centering":
            mean = mean_over_ranks(torch.stack(self._teacher_means).mean(0))
            total = sum_over_ranks(torch.stack(self._patch_totals).sum(0))
            for center, value in ((self.center, mean), (self.patch_center, total[:-1] / total[-1])):
                moved = update_center(center, value[None], self.options.center_momentum)
                center.copy_(torch.where(finite, moved, center))
            self._teacher_means.clear()
            self._patch_totals.clear()
        update_average(list(self.teacher.parameters()), list(self.student.parameters()), self._momentum(clock), finite)

    def schedule(self, clock: Clock) -> dict[str, float]:
        """What changes with the step, for the log."""
        return {
            "momentum": self._momentum(clock),
            "teacher_temp": self._temperature(clock),
            "global_size": float(self._view_options(clock).global_size),
        }

    def export(self, folder: Path) -> None:
        """Writes the teacher's encoder, with its card."""
        save_encoder(self.teacher.encoder, folder, source="gigatome, DINOv2", mpp=self.mpp)

    @torch.no_grad()
    def _targets(self, views: Sequence[Tensor], index: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """What the student is to predict: probabilities [2, B, K] of whole views and [M, K] of masked patches."""
        options, temperature = self.options, self._temperature(clock)
        logits_GBK, patches_MK, _ = self.teacher(views, None, index)
        if options.centering == "sinkhorn_knopp":
            targets_NK = sinkhorn_knopp(logits_GBK.flatten(0, 1), temperature, options.sinkhorn_iterations)
            patch_targets_MK = sinkhorn_knopp(patches_MK, temperature, options.sinkhorn_iterations)
            return targets_NK.view(logits_GBK.shape), patch_targets_MK
        self._teacher_means.append(logits_GBK.float().mean((0, 1)))
        totals_K = patches_MK.float().sum(0)
        self._patch_totals.append(torch.cat([totals_K, totals_K.new_full((1,), len(patches_MK))]))
        return (
            teacher_probabilities(logits_GBK, self.center, temperature),
            teacher_probabilities(patches_MK, self.patch_center, temperature),
        )

    def _view_options(self, clock: Clock) -> ViewOptions:
        options = self.options
        if clock.step < clock.steps - round(options.high_resolution_epochs * clock.epoch_steps):
            return options.views
        return _high_resolution(options)

    def _momentum(self, clock: Clock) -> float:
        return cosine(clock, self.options.teacher_momentum, 1.0)

    def _temperature(self, clock: Clock) -> float:
        options = self.options
        steps = options.teacher_temperature_warmup_epochs * clock.epoch_steps
        if clock.step >= steps:
            return options.teacher_temperature
        rise = options.teacher_temperature - options.teacher_temperature_start
        return options.teacher_temperature_start + rise * clock.step / max(1, steps - 1)


class _Branch(nn.Module):
    """An encoder with its heads."""

    def __init__(self, encoder: TileEncoder, heads: dict[str, DinoHead]):
        super().__init__()
        self.encoder, self.head = encoder, nn.ModuleDict(heads)

    def forward(self, views: Sequence[Tensor], masks: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What encoder and heads make of V views [B, 3, size, size], global ones first.

        Args:
            views: 2 global ones of one size, and any number of local ones of another.
            masks: bool [2 · B, patches] of the global views.
            index: [M], patches of the global views that are wanted, as numbers in the flat [2 · B · patches].

        Returns:
            Logits [V, B, K] of the views, logits [M, K] of the patches, and embeddings [2, B, D] of the global views.
        """
        classes, patches = self.encoder.forward_tokens(torch.cat(list(views[:2])), masks)
        embeddings = [classes]
        if len(views) > 2:
            embeddings.append(self.encoder(torch.cat(list(views[2:]))))
        logits = self.head["view"](torch.cat(embeddings)).unflatten(0, (len(views), -1))
        patch_head = self.head["patch" if "patch" in self.head else "view"]
        return logits, patch_head(patches.flatten(0, 1)[index]), classes.unflatten(0, (2, -1))


def _branch(config: EncoderConfig, options: Dinov2Options, seed: int, name: str | None, drop_path: float) -> _Branch:
    encoder = build_encoder(
        config,
        drop_path=drop_path,
        uniform_drop_path=options.uniform_drop_path,
        mask_token=True,
        seed=torch_seed(seed, "encoder"),
        name=name,
    )
    if encoder.mask_token is None:
        raise ConfigError(f"DINOv2 masks patches: it needs a vision transformer, not {config.model}")

    def head(kind: str, prototypes: int, layers: int, hidden_dim: int, bottleneck_dim: int) -> DinoHead:
        return DinoHead(
            encoder.dim,
            prototypes,
            torch.Generator().manual_seed(torch_seed(seed, "head", kind)),
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            layers=layers,
            batch_norm=options.head_batch_norm,
            norm_last_layer=options.norm_last_layer,
        )

    o = options
    heads = {"view": head("view", o.out_dim, o.head_layers, o.head_hidden_dim, o.head_bottleneck_dim)}
    if o.separate_head:
        sizes = o.patch_out_dim, o.patch_head_layers, o.patch_head_hidden_dim, o.patch_head_bottleneck_dim
        heads["patch"] = head("patch", *sizes)
    return _Branch(encoder, heads)


def _send(value: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the CPU to a device; a GPU's work goes on meanwhile."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


def _high_resolution(options: Dinov2Options) -> ViewOptions:
    return replace(
        options.views,
        global_size=options.high_resolution_global_size,
        local_size=options.high_resolution_local_size,
    )


def _check_sizes(options: Dinov2Options, patch_size: int) -> None:
    phases = {"views.": options.views}
    if options.high_resolution_epochs > 0:
        phases["high_resolution_"] = _high_resolution(options)
    for prefix, views in phases.items():
        local = {f"{prefix}local_size": views.local_size} if views.local_views else {}
        check_patches({f"{prefix}global_size": views.global_size} | local, patch_size)

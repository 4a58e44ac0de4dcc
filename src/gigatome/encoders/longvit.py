"""LongViT: a vision transformer over the pixels of a whole slide, of up to a million patches and more.

Source: Wang et al., "When an Image is Worth 1,024 × 1,024 Words: A Case Study in Computational Pathology",
arXiv 2312.03558, and the code released with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.distributed import sum_over_sequence
from gigatome.encoders.dilated import DilatedOptions
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.longnet import Checkpointing, LongNetConfig, LongNetEncoder, again
from gigatome.encoders.weights import encoder_weights, load_weights, read_weights

_PIXELS = 2**22  # that are floating-point numbers at once
_SEGMENTS = {  # by the side of an image in pixels
    1024: (64, 128, 256, 512, 1024),
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}


def segments_for(image_size: int) -> tuple[int, ...]:
    """Segment lengths of attention for square images of a side in pixels, in patches of 32 px.

    Sizes between the authors' have those of the next larger one, and larger ones those of 32,768.

    Source: arXiv 2312.03558, tables 5 and 7.
    """
    return _SEGMENTS[min((side for side in _SEGMENTS if side >= image_size), default=max(_SEGMENTS))]


@final
@dataclass(frozen=True)
class LongVitConfig:
    """What defines a LongViT; the defaults are those of the pretrained LongViT-S.

    Attributes:
        image_size: side in pixels that the segments are chosen for. Images of other sizes may be given.
        patch_size: side of a patch in pixels.
        dim: width of a token, and size of an embedding.
        depth: number of blocks.
        heads: attention heads.
        ffn_dim: width of the middle of a feed-forward layer.
        grid: side of the square grid of patches that the position embedding is made for; it is interpolated to others.
        segments: of the attention; None takes :func:`segments_for` the image size.
        ratios: of the attention's branches.
        offsets: as in :class:`~gigatome.encoders.dilated.DilatedOptions`, and so are ``padding`` and ``merge``.
        padding: likewise.
        merge: likewise.
        norm: ``"pretrain"`` puts tokens through a norm and takes their mean, ``"finetune"`` takes their mean and puts
            it through a new norm. Each needs weights of its stage.
        pos_embed: how position embeddings are interpolated to an image: ``"size"``, cubic to the exact size, as the
            authors do it before fine-tuning, or ``"dino"``, with DINO's factor of (rows + 0.1) / grid, as they do it
            in pretraining.
        mean: per channel, subtracted from images in [0, 1].
        std: per channel, divided by.

    Raises:
        ConfigError: sizes are not positive or do not divide.
    """

    image_size: int = 1024
    patch_size: int = 32
    dim: int = 384
    depth: int = 12
    heads: int = 16
    ffn_dim: int = 1536
    grid: int = 32
    segments: tuple[int, ...] | None = None
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16)
    offsets: Literal["torchscale", "paper"] = "torchscale"
    padding: Literal["masked", "torchscale"] = "masked"
    merge: Literal["gradient", "detached"] = "gradient"
    norm: Literal["pretrain", "finetune"] = "pretrain"
    pos_embed: Literal["size", "dino"] = "size"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if min(self.patch_size, self.grid) < 1:
            raise ConfigError(f"patch_size {self.patch_size} and grid {self.grid} must be positive")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be positive, not {self.std}")
        self.encoder()

    def encoder(self) -> LongNetConfig:
        """Of the transformer."""
        segments = segments_for(self.image_size) if self.segments is None else self.segments
        attention = DilatedOptions(segments, self.ratios, self.heads, self.offsets, self.padding, self.merge)
        return LongNetConfig(self.dim, self.depth, self.ffn_dim, attention)


@final
class LongVit(nn.Module):
    """Maps whole images to embeddings.

    State-dict keys are the authors': ``pos_embed``, ``patch_embed.proj.weight``, ``encoder.layers.0.…`` as of
    :class:`~gigatome.encoders.longnet.LongNetEncoder`, and ``norm.weight`` or ``fc_norm.weight``.

    Args:
        config: what to make. Parameters are initialised by the global generator.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
        checkpointing: as for :class:`~gigatome.encoders.longnet.LongNetEncoder`.

    Attributes:
        config: what it was made from.
        dim: size of an embedding.
        patch_size: side of a patch in pixels.

    Source: arXiv 2312.03558, §2; differs: the position embedding keeps its grid and is interpolated to the image in
    each call, where the authors interpolate it once and train on that.
    """

    def __init__(self, config: LongVitConfig, *, drop_path: float = 0.0, checkpointing: Checkpointing = "none"):
        super().__init__()
        self.config = config
        dim = self.dim = config.dim
        self.patch_size = config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, config.patch_size, config.patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, dim))
        self.encoder = LongNetEncoder(config.encoder(), drop_path=drop_path, checkpointing=checkpointing)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if config.norm == "pretrain" else None
        self.fc_norm = nn.LayerNorm(dim, eps=1e-5) if config.norm == "finetune" else None
        trunc_normal_(self.pos_embed, std=0.02)

    @property
    def mean(self) -> Tensor:
        """The config's, for values of 0 to 255: float32 [3, 1, 1] on the encoder's device; so is :attr:`std`."""
        return torch.tensor(self.config.mean, device=self.pos_embed.device).view(3, 1, 1) * 255

    @property
    def std(self) -> Tensor:
        """See :attr:`mean`."""
        return torch.tensor(self.config.std, device=self.pos_embed.device).view(3, 1, 1) * 255

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] on the encoder's device; :meth:`forward` normalises them, some rows at a time."""
        return images.to(self.pos_embed.device, non_blocking=True)

    def forward(self, images: Tensor, share: Share | None = None) -> Tensor:
        """Embeddings [B, dim] of images.

        Args:
            images: uint8 [B, H, W, 3], on any device, or normalised, float [B, 3, H, W]. They are embedded some rows of
                patches at a time, so that pixels of 1 byte never are floating-point numbers all at once.
            share: how several processes share the rows of patches of each image, ``Share(group, rows)``; ``images`` are
                then the rows ``share.own`` alone. All of them return the same embeddings, and the mean of parameters'
                gradients over them is the gradient of their loss.

        Raises:
            ConfigError: H or W is not a multiple of the patch size, or H is not that of the rows of ``share``.
            RunError: a process that shares the images does not answer.
        """
        tokens = self.forward_tokens(images, share)
        if share is None:
            mean = tokens.mean(1)
        else:
            exact = torch.promote_types(tokens.dtype, torch.float32)
            total = sum_over_sequence(tokens.sum(1, dtype=exact), share.group)
            mean = (total / (tokens.shape[1] // len(share.own) * share.count)).to(tokens.dtype)
        return mean if self.fc_norm is None else self.fc_norm(mean)

    def forward_tokens(self, images: Tensor, share: Share | None = None) -> Tensor:
        """Tokens [B, patches, dim], row-major, after the norm if it is ``norm="pretrain"``.

        Arguments are those of :meth:`forward`; with ``share`` these are the tokens of this process's rows.
        """
        entering = self._embed(images, share)
        if share is not None:
            share = Share(share.group, share.count, entering.shape[1] // len(share.own))
        tokens = self.encoder(entering, share)
        return tokens if self.norm is None else self.norm(tokens)

    def _embed(self, images: Tensor, share: Share | None = None) -> Tensor:
        """Tokens [B, patches, dim] that enter the first block."""
        pixels = images.dtype == torch.uint8
        if images.ndim != 4 or images.shape[3 if pixels else 1] != 3:
            raise ValueError(f"need uint8 [B, H, W, 3] or float [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        size = self.config.patch_size
        height, width = images.shape[1:3] if pixels else images.shape[2:]
        if height % size or width % size or not height or not width:
            raise ConfigError(f"images of {height} × {width} px do not divide into patches of {size} px")
        own = range(height // size) if share is None else share.own
        if height != len(own) * size:
            raise ConfigError(f"images are {height} px high, but this process's rows {own} are {len(own) * size} px")
        rows, columns = self._positions(own.stop if share is None else share.count, width // size)
        rows = rows[own.start : own.stop]
        step = max(1, _PIXELS // (len(images) * width * size))
        parts = zip(images.split(step * size, 1 if pixels else 2), rows.split(step), strict=True)
        return torch.cat([again(self._embed_rows, part, own_rows, columns) for part, own_rows in parts], 1)

    def _positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Matrices that interpolate the rows [rows, grid] and columns [columns, grid] of the position embedding."""
        side = self.config.grid
        how = "size" if rows == columns == side else self.config.pos_embed
        return _interpolation(side, rows, how).to(self.pos_embed), _interpolation(side, columns, how).to(self.pos_embed)

    def _embed_rows(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Tokens of some rows of patches, whose positions are ``rows`` [rows, grid] × ``columns`` [columns, grid]."""
        images = images.to(rows.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = (images.permute(0, 3, 1, 2) - self.mean) / self.std
        patches = self.patch_embed["proj"](images.to(rows.dtype)).flatten(2).mT
        with torch.autocast(rows.device.type, enabled=False):
            grid = self.pos_embed.unflatten(1, (self.config.grid, -1))
            return patches + (columns @ torch.einsum("ri,bijd->brjd", rows, grid)).flatten(1, 2)


def load_longvit(
    weights: str | Path | Mapping[str, Any],
    config: LongVitConfig | None = None,
    *,
    part: Literal["teacher", "student"] = "teacher",
) -> LongVit:
    """A LongViT of given weights, in evaluation mode.

    Args:
        weights: the authors' ``longvit_small_patch32_1024.pth``, a model that was fine-tuned from it, or the content of
            such a file.
        config: what to make; LongViT-S as pretrained by default. A position embedding of another grid is interpolated
            to its ``grid``. With ``norm="finetune"`` the norm of pretraining is left out, and the new one is made where
            the file has none.
        part: which of the two networks of a checkpoint; the teacher is the one to use.

    Raises:
        StoreError: the file cannot be read.
        RunError: it is a checkpoint of another model; the message names the keys that are missing or unexpected.
    """
    config = config or LongVitConfig()
    given = isinstance(weights, Mapping)
    source = "LongViT weights" if given else str(weights)
    found = encoder_weights(weights, source=source, part=part) if given else read_weights(weights, part=part)
    state = {f"encoder.{key}" if key.startswith("layers.") else key: value for key, value in found.items()}
    if config.norm == "finetune":
        new = {"fc_norm.weight": torch.ones(config.dim), "fc_norm.bias": torch.zeros(config.dim)}
        state = new | {key: value for key, value in state.items() if not key.startswith("norm.")}
    if "pos_embed" in state:
        state["pos_embed"] = _resized(state["pos_embed"], config.grid)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = LongVit(config)
    load_weights(model, state, source=source)
    return model.eval()


def _resized(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, old², dim] on a grid of another side; as they are if they are of no square grid."""
    old = isqrt(positions.shape[1])
    if old == side or old**2 != positions.shape[1]:
        return positions
    matrix = _interpolation(old, side, "size")
    grid = positions.float().unflatten(1, (old, old))
    return (matrix @ torch.einsum("ri,bijd->brjd", matrix, grid)).flatten(1, 2)


def _interpolation(side: int, count: int, how: Literal["size", "dino"]) -> Tensor:
    """Matrix [count, side] that interpolates along one axis, cubic and without antialiasing."""
    size, factors = ((count, 1), None) if how == "size" else (None, ((count + 0.1) / side, 1.0))
    basis = torch.eye(side)[None, :, :, None]
    return F.interpolate(basis, size=size, scale_factor=factors, mode="bicubic")[0, :, :, 0].T  # pyright: ignore

"""The tile encoder: a timm vision transformer whose class token is the embedding, and whose attention can be seen."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.weights import load_weights, read_weights, resize_grid

_RESNETS = {"resnet"}  # timm's module of them


_FEW_TOKENS = 576


@dataclass(frozen=True)
class EncoderConfig:
    """What defines a tile encoder.

    Attributes:
        model: name of a timm vision transformer with a class token, or of a ResNet (:mod:`gigatome.encoders.resnet`),
            to which only ``image_size``, ``weights``, ``pretrained``, ``mean`` and ``std`` apply.
        image_size: side in pixels that the position embedding is made for; it is interpolated to other sizes at
            each call.
        patch_size: side of a patch in pixels; None keeps the model's own. So do ``dim``, ``depth`` and ``heads``.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        registers: extra tokens that gather what is of no single patch; None keeps the model's own number, and so do
            ``ffn`` and ``layer_scale``. A number given here, 0 too, leaves the class token without an embedding of its
            position, as in timm's models with registers.
        ffn: the blocks' second half: ``"mlp"`` with GELU, or ``"swiglu"``, gated, of DINOv2's width: two thirds of the
            MLP's, rounded up to a multiple of 8.
        layer_scale: initial value of the factors on what a block adds to each channel; 0 for none.
        weights: local file to start from, ``.safetensors`` or a PyTorch checkpoint; its keys must be timm's.
        pretrained: start from timm's published weights of ``model``.
        mean: per channel, subtracted from images in [0, 1].
        std: per channel, divided by.
        pos_embed: how position embeddings are interpolated: ``"timm"`` to the exact size with antialiasing, or
            ``"dino"`` as the code of DINO and HIPT does it, which gives other numbers and is what their weights need.
    """

    model: str = "vit_small_patch16_224"
    image_size: int = 224
    patch_size: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    registers: int | None = None
    ffn: Literal["mlp", "swiglu"] | None = None
    layer_scale: float | None = None
    weights: str | None = None
    pretrained: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pos_embed: Literal["timm", "dino"] = "timm"

    def __post_init__(self):
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained exclude each other; give one")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if (self.registers or 0) < 0 or (self.layer_scale or 0) < 0:
            raise ValueError("registers and layer_scale must not be negative")


class TileEncoder(nn.Module):
    """Maps tiles to embeddings with a vision transformer.

    Attributes:
        config: what it was made from.
        name: short name for people; :func:`gigatome.encoders.zoo.encoder_name` makes it unique.
        vit: the timm model; its state dict has the keys that timm and DINO use.
        dim: size of an embedding.
        patch_size: side of a patch in pixels.
        mask_token: float32 [1, dim], what stands for a masked patch; None unless asked for. It is not part of ``vit``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: VisionTransformer, config: EncoderConfig, name: str, *, mask_token: bool = False):
        super().__init__()
        self.vit = vit
        self.config = config
        self.name = name
        self.dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(1, self.dim)) if mask_token else None
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Images as the transformer wants them.

        Args:
            images: uint8 [B, H, W, 3] or [B, 3, H, W], on any device.

        Returns:
            float [B, 3, H, W] on the encoder's device.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
            raise ValueError(f"need uint8 images [B, H, W, 3], got {images.dtype} {list(images.shape)}")
        if images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        images = images.to(self.mean.device, non_blocking=True)
        return ((images - self.mean) / self.std).contiguous()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim] of normalised images [B, 3, H, W]: the class token after the last norm.

        Raises:
            ConfigError: H or W is not a multiple of the patch size.
        """
        return self.vit.norm(self.vit.blocks(self._embed(images))[:, 0])

    def forward_tokens(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All tokens after the last norm, but registers.

        Args:
            images: normalised, float [B, 3, H, W].
            masks: bool [B, patches]; the encoder sees its mask token in the place of these patches.

        Returns:
            Class token [B, dim] and patch tokens [B, patches, dim], patches in row-major order.

        Raises:
            ConfigError: H or W is not a multiple of the patch size.
            ValueError: masks for an encoder without a mask token.
        """
        x = self.vit.norm(self.vit.blocks(self._embed(images, masks)))
        return x[:, 0], x[:, self.vit.num_prefix_tokens :]

    def attention(self, images: Tensor) -> Tensor:
        """How the class token of the last block attends to the patches.

        Args:
            images: normalised, float [B, 3, H, W].

        Returns:
            float32 [B, heads, H / patch_size, W / patch_size]. A head's values are its softmax over all tokens, so
            they sum to 1 minus what it gives to the class and register tokens.

        Raises:
            ConfigError: the model's blocks are not plain attention blocks.
        """
        norm, attn = self._last_attention()
        x = self._embed(images)
        for block in self.vit.blocks[:-1]:
            x = block(x)
        b, n, _ = x.shape
        q_BNHD, k_BNHD, _ = attn.qkv(norm(x)).view(b, n, 3, attn.num_heads, attn.head_dim).unbind(2)
        q_BHD, k_BNHD = attn.q_norm(q_BNHD[:, 0]), attn.k_norm(k_BNHD)
        logits_BHN = torch.einsum("bhd,bnhd->bhn", q_BHD.float(), k_BNHD.float()) * attn.scale
        weights = logits_BHN.softmax(-1)[..., self.vit.num_prefix_tokens :]
        return weights.unflatten(2, (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size))

    @property
    def heads(self) -> int:
        """Attention heads of the last block; raises :class:`ConfigError` as :meth:`attention` does."""
        return self._last_attention()[1].num_heads

    def _last_attention(self) -> tuple[nn.Module, Attention]:
        last = self.vit.blocks[-1]
        if not isinstance(last, Block) or type(last.attn) is not Attention:
            kind = type(last).__name__
            raise ConfigError(f"{self.config.model}: attention maps need plain attention blocks, not {kind}")
        return last.norm1, last.attn

    def _embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens [B, prefix + patches, dim] that enter the first block."""
        vit, size = self.vit, self.patch_size
        height, width = images.shape[-2:]
        if height % size or width % size:
            raise ConfigError(
                f"{self.name}: images of {height} × {width} px do not divide into patches of {size} px; "
                f"use a tile size such as {max(1, round(max(height, width) / size)) * size}"
            )
        patches = vit.patch_embed(images).flatten(1, 2)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError(f"{self.name}: this encoder has no mask token; build it with mask_token=True")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        position = self._position(height // size, width // size)
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        tokens = [token.expand(len(patches), -1, -1) for token in prefix]
        if vit.no_embed_class:
            x = torch.cat([*tokens, patches + position], 1)
        else:
            x = torch.cat([*tokens, patches], 1) + position
        return vit.norm_pre(vit.patch_drop(vit.pos_drop(x)))

    def _position(self, height: int, width: int) -> Tensor:
        """Position embedding [1, prefix + patches, dim] of a grid of patches; no prefix if the model embeds none."""
        position = cast(Tensor, self.vit.pos_embed)
        rows, columns = self.vit.patch_embed.grid_size
        if (height, width) == (rows, columns):
            return position
        split = position.shape[1] - rows * columns
        grid = position[:, split:].unflatten(1, (rows, columns))
        return torch.cat(
            [position[:, :split], resize_grid(grid, height, width, how=self.config.pos_embed).flatten(1, 2)], 1
        )


def build_encoder(
    config: EncoderConfig,
    *,
    drop_path: float = 0.0,
    uniform_drop_path: bool = False,
    mask_token: bool = False,
    seed: int,
    name: str | None = None,
) -> TileEncoder:
    """Makes an encoder, in training mode, on the CPU.

    A ResNet's name gives a :class:`gigatome.encoders.resnet.ResNetEncoder`, which knows no tokens and no attention but
    is otherwise used alike; drop path and mask tokens are for transformers only.

    Args:
        config: what to make.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
        uniform_drop_path: the rate is the same in all blocks, as in DINOv2.
        mask_token: give it one.
        seed: of the random initialisation; the global generators are left as they are.
        name: short name; the timm name by default.

    Raises:
        ConfigError: timm has no such model, it is no vision transformer with a class token, or the sizes do not fit.
        StoreError: the weights cannot be read, or cannot be fetched.
        RunError: the weights are those of another model.
    """
    if is_model_in_modules(config.model, _RESNETS):
        from gigatome.encoders.resnet import build_resnet  # that module needs this one

        return build_resnet(config, seed, name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vit = _create(config, drop_path)
    if uniform_drop_path and drop_path > 0:
        for block in vit.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    if config.weights is not None:
        load_weights(vit, read_weights(config.weights), source=config.weights, pos_embed=config.pos_embed)
    return TileEncoder(vit, config, name or config.model, mask_token=mask_token)


def unfuse_attention(network: nn.Module) -> None:
    """Has attention over few tokens computed as a product, a softmax and a product.

    In bfloat16 on a CPU the backward pass of PyTorch's fused attention takes several times as long. Over many tokens
    the products would take too much memory, and it stays.
    """
    for module in network.modules():
        if isinstance(module, TileEncoder):
            side = module.config.image_size // module.patch_size
        elif isinstance(module, RegionVit):
            side = module.config.grid
        else:
            continue
        for part in module.modules():
            if hasattr(part, "fused_attn") and side**2 <= _FEW_TOKENS:
                part.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def restore_encoder(config: EncoderConfig, weights: Mapping[str, Tensor], *, source: str, name: str) -> TileEncoder:
    """Makes an encoder of given weights, which are copied, in evaluation mode, on the CPU.

    Args:
        config: what to make; its ``weights`` and ``pretrained`` are not used.
        weights: with timm's keys.
        source: where the weights come from, for messages.
        name: short name.

    Raises:
        ConfigError: as :func:`build_encoder`.
        RunError: the weights are those of another model.
    """
    if is_model_in_modules(config.model, _RESNETS):
        from gigatome.encoders.resnet import restore_resnet

        return restore_resnet(config, weights, source=source, name=name)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        vit = _create(replace(config, pretrained=False), drop_path=0.0)
    load_weights(vit, weights, source=source, pos_embed=config.pos_embed)
    return TileEncoder(vit, config, name).eval()


def _create(config: EncoderConfig, drop_path: float) -> VisionTransformer:
    sizes: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "reg_tokens": config.registers,
        "no_embed_class": None if config.registers is None else True,
        "init_values": config.layer_scale,
    }
    if not timm.is_model(config.model):
        near = difflib.get_close_matches(config.model, timm.list_models(), n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "timm.list_models() lists them"
        raise ConfigError(f"timm has no model {config.model}; {hint}")
    if config.ffn is not None:
        sizes |= {"mlp_layer": Mlp if config.ffn == "mlp" else _swiglu, "mlp_ratio": 4.0, "act_layer": nn.GELU}
    try:
        vit = timm.create_model(
            config.model,
            pretrained=config.pretrained,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
            img_size=config.image_size,
            drop_path_rate=drop_path,
            **{key: value for key, value in sizes.items() if value is not None},
        )
    except (TypeError, AssertionError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot make {config.model} as a class-token encoder like this: {error}") from error
    except OSError as error:
        raise StoreError(
            f"the published weights of {config.model} are not in the cache and cannot be fetched ({error}); "
            "fetch them on another machine and give the file as weights"
        ) from error
    # a subclass or another patch embedding computes something else than TileEncoder does
    if type(vit) is VisionTransformer and isinstance(vit.patch_embed, PatchEmbed) and vit.pos_embed is not None:
        return vit
    raise ConfigError(
        f"{config.model} is not a plain vision transformer with a class token and position embeddings; "
        "choose another, such as vit_small_patch16_224"
    )


def _swiglu(in_features: int, hidden_features: int, act_layer: type[nn.Module], **options: Any) -> nn.Module:
    """DINOv2's SwiGLU as a block's ``mlp_layer``, with about as many weights as an MLP of ``hidden_features``."""
    width = (int(hidden_features * 2 / 3) + 7) // 8 * 8
    return SwiGLUPacked(in_features, 2 * width, act_layer=nn.SiLU, **options)

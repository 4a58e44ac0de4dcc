"""Tile encoders that are not read at the class token of a plain vision transformer: other poolings, other networks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, final

import timm
import torch
from timm.models import eva, is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.encoders.published import EncoderCard, Pooling
from gigatome.encoders.resnet import ResNetEncoder
from gigatome.encoders.vit import EncoderConfig, TileEncoder, restore_encoder
from gigatome.encoders.weights import load_weights


@final
class PooledEncoder(TileEncoder):
    """A vision transformer whose embedding is the class token followed by the mean of the patch tokens.

    Attributes:
        pooling: ``"cls+mean"``.
        dim: size of an embedding, twice that of a token.
    """

    pooling: Pooling = "cls+mean"

    def __init__(self, vit: VisionTransformer, config: EncoderConfig, name: str):
        super().__init__(vit, config, name)
        self.dim = 2 * vit.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim] of normalised images [B, 3, H, W]."""
        token, patches = self.forward_tokens(images)
        return torch.cat([token, patches.mean(1)], 1)


class _OtherEncoder(TileEncoder):
    """A network of timm's that is no plain vision transformer, and of which only embeddings are to be had."""

    def __init__(self, network: nn.Module, config: EncoderConfig, name: str, *, dim: int, patch_size: int):
        nn.Module.__init__(self)
        self.vit = cast(VisionTransformer, network)
        self.config, self.name, self.dim, self.patch_size = config, name, dim, patch_size
        self.mask_token = None
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1) * 255, persistent=False)

    def _last_attention(self) -> Any:
        raise ConfigError(f"{self.config.model}: attention maps need a plain vision transformer")


@final
class RotaryEncoder(_OtherEncoder):
    """DINOv3: a vision transformer with rotary position embeddings; the embedding is its class token."""

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim] of normalised images [B, 3, H, W].

        Raises:
            ConfigError: H or W is not a multiple of the patch size.
        """
        return self.forward_tokens(images)[0]

    def forward_tokens(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class token and patch tokens, as of :class:`TileEncoder`, which takes no masks here."""
        if masks is not None:
            raise ConfigError(f"{self.config.model}: has no mask token")
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"{self.name}: images of {height} × {width} px do not divide into patches of {self.patch_size} px"
            )
        x = self.vit.forward_features(images)
        return x[:, 0], x[:, self.vit.num_prefix_tokens :]


@final
class CTransPathEncoder(_OtherEncoder):
    """CTransPath: a Swin transformer behind a stem of convolutions; the embedding is the mean over all places.

    Source: Wang et al., "Transformer-based unsupervised contrastive learning for histopathological image
    classification", Medical Image Analysis 2022, and the code released with it.
    """

    pooling: Pooling = "mean"

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim] of normalised images [B, 3, 224, 224].

        Raises:
            ConfigError: the images are of another size.
        """
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ConfigError(f"{self.name}: takes tiles of {size} px alone; use tile size {size}")
        return self.vit.forward_features(images).mean((1, 2))

    def forward_tokens(self, images: Tensor, masks: Tensor | None = None) -> Any:
        """Raises ConfigError: there is no class token."""
        raise ConfigError(f"{self.config.model}: has no class token")


class _ConvStem(nn.Module):
    """Embeds patches of 4 px by two strided convolutions and one of a single pixel; channels last."""

    def __init__(self, *, img_size: tuple[int, int], patch_size: int, embed_dim: int, norm_layer: Any, **_: Any):
        super().__init__()
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        layers: list[nn.Module] = []
        before = 3
        for width in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(before, embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Patches [B, H / 4, W / 4, dim] of images [B, 3, H, W]."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


def is_rotary(model: str) -> bool:
    """Whether timm's ``model`` is DINOv3's transformer."""
    return "_dinov3" in model and is_model_in_modules(model, {"eva"})


def pooling_of(encoder: TileEncoder) -> Pooling:
    """How an encoder makes its embeddings, as its card says it."""
    return "mean" if isinstance(encoder, ResNetEncoder) else getattr(encoder, "pooling", "cls")


def restore(card: EncoderCard, weights: Mapping[str, Tensor], *, source: str) -> TileEncoder:
    """Makes the encoder that a card describes, of given weights, in evaluation mode, on the CPU.

    Args:
        card: its configuration, pooling and name are used.
        weights: with timm's keys.
        source: where the weights come from, for messages.

    Raises:
        ConfigError: there is no such model, or it cannot be pooled like this.
        RunError: the weights are those of another model.
    """
    config = replace(card.config, weights=None, pretrained=False)
    if config.model == "ctranspath":
        return _restore_ctranspath(config, weights, source, card.name)
    if is_rotary(config.model):
        return _restore_rotary(config, weights, source, card.name)
    encoder = restore_encoder(config, weights, source=source, name=card.name)
    if isinstance(encoder, ResNetEncoder) or card.pooling == "cls":
        return encoder
    if card.pooling == "cls+mean":
        return PooledEncoder(encoder.vit, config, card.name).eval()
    raise ConfigError(f"{card.name}: pooling {card.pooling} is not there for {config.model}; use cls or cls+mean")


def fetch_rotary(model: str) -> TileEncoder:
    """DINOv3's ``model`` with the weights that timm publishes.

    Raises:
        StoreError: they cannot be fetched.
    """
    published = timm.get_pretrained_cfg(model)
    if published is None:
        raise ConfigError(f"timm publishes no weights of {model}; add a tag such as {model}.lvd1689m")
    try:
        network = timm.create_model(model, pretrained=True, num_classes=0)
    except OSError as error:
        raise StoreError(
            f"the published weights of {model} are not in the cache and cannot be fetched ({error}); "
            "fetch them on another machine and give the file of weights"
        ) from error
    mean, std = cast(Any, published.mean), cast(Any, published.std)
    config = EncoderConfig(model, image_size=published.input_size[-1], mean=mean, std=std)
    return _rotary(network, config, model)


def _restore_rotary(config: EncoderConfig, weights: Mapping[str, Tensor], source: str, name: str) -> TileEncoder:
    network = _create(config.model)
    load_weights(network, eva.checkpoint_filter_fn(dict(weights), network), source=source)
    return _rotary(network, config, name)


def _restore_ctranspath(config: EncoderConfig, weights: Mapping[str, Tensor], source: str, name: str) -> TileEncoder:
    network = _create("swin_tiny_patch4_window7_224", embed_layer=_ConvStem)
    load_weights(network, weights, source=source)
    return CTransPathEncoder(network, config, name, dim=network.num_features, patch_size=4).eval()


def _rotary(network: Any, config: EncoderConfig, name: str) -> TileEncoder:
    patch_size = network.patch_embed.patch_size[0]
    return RotaryEncoder(network, config, name, dim=network.embed_dim, patch_size=patch_size).eval()


def _create(model: str, **options: Any) -> Any:
    """A network with random weights; not on the device ``meta``, as it computes what no file holds."""
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(model, num_classes=0, **options)

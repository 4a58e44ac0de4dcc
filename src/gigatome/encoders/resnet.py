"""The tile encoder as a residual network, whole or cut after one of its layers; its embedding is a spatial mean."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn, cast, final

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.encoders.vit import EncoderConfig, TileEncoder
from gigatome.encoders.weights import load_weights, read_weights

_LAYERS = 4


@final
class ResNetEncoder(TileEncoder):
    """Maps tiles to embeddings with a ResNet; for all but tokens and attention it stands in for a ViT.

    Attributes:
        config: what it was made from. Its model is a timm ResNet, such as ``resnet18``, or ``resnet18.layer3`` for one
            that ends after its third layer (Giga-SSL's, 256 numbers).
        name: short name for people.
        vit: the timm ResNet, under the name that a transformer has in :class:`~gigatome.encoders.vit.TileEncoder`, so
            that what saves, hashes and loads encoders need not ask which it is; torchvision's keys.
        dim: size of an embedding, the channels of the last layer.
        patch_size: 1, as images of any size will do.
    """

    def __init__(self, resnet: ResNet, config: EncoderConfig, name: str):
        nn.Module.__init__(self)
        self.vit = cast(VisionTransformer, resnet)
        self.config, self.name = config, name
        self.dim = int(resnet.feature_info[_split(config.model)[1]]["num_chs"])
        self.patch_size = 1
        self.mask_token = None
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, dim] of normalised images [B, 3, H, W]: the mean over all places of the last layer."""
        return self.vit.forward_features(images).mean((2, 3))

    def forward_tokens(self, images: Tensor, masks: Tensor | None = None) -> NoReturn:
        """Raises ConfigError: a ResNet has no tokens."""
        raise ConfigError(f"{self.config.model} is a ResNet and has no tokens; choose a vision transformer")

    def attention(self, images: Tensor) -> NoReturn:
        """Raises ConfigError: a ResNet has no attention."""
        raise ConfigError(f"{self.config.model} is a ResNet and has no attention maps; choose a vision transformer")

    @property
    def heads(self) -> NoReturn:
        """Raises ConfigError, as :meth:`attention` does."""
        raise ConfigError(f"{self.config.model} is a ResNet and has no attention heads; choose a vision transformer")


def build_resnet(config: EncoderConfig, seed: int, name: str | None = None) -> ResNetEncoder:
    """Makes a ResNet encoder, in training mode, on the CPU.

    Args:
        config: what to make; its ``weights`` have torchvision's keys, and may have layers that ``model`` ends before.
        seed: of the random initialisation; the global generators are left as they are.
        name: short name; ``config.model`` by default.

    Raises:
        ConfigError: timm has no such ResNet, or ``config`` holds sizes that only transformers have.
        StoreError: the weights cannot be read, or cannot be fetched.
        RunError: the weights are those of another model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        resnet = _create(config)
    if config.weights is not None:
        load_weights(resnet, _fitting(read_weights(config.weights), config.model), source=config.weights)
    return ResNetEncoder(resnet, config, name or config.model)


def restore_resnet(config: EncoderConfig, weights: Mapping[str, Tensor], *, source: str, name: str) -> ResNetEncoder:
    """Makes a ResNet encoder of given weights, which are copied, in evaluation mode, on the CPU.

    Args:
        config: what to make; its ``weights`` and ``pretrained`` are not used.
        weights: with torchvision's keys; layers that ``config.model`` ends before are left aside.
        source: where the weights come from, for messages.
        name: short name.

    Raises:
        ConfigError: as :func:`build_resnet`.
        RunError: the weights are those of another model.
    """
    config = replace(config, weights=None, pretrained=False)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        resnet = _create(config)
    load_weights(resnet, _fitting(weights, config.model), source=source)
    return ResNetEncoder(resnet, config, name).eval()


def cut_resnet(encoder: ResNetEncoder, layer: int) -> ResNetEncoder:
    """A copy of an encoder that ends after ``layer``, 1 to 4, in evaluation mode, on the CPU.

    Raises:
        ConfigError: the encoder ends before that layer.
    """
    base, last = _split(encoder.config.model)
    if not 1 <= layer <= last:
        raise ConfigError(f"{encoder.config.model} has layers 1 to {last}, not {layer}")
    config = replace(encoder.config, model=f"{base}.layer{layer}")
    return restore_resnet(config, encoder.vit.state_dict(), source=encoder.name, name=encoder.name)


def _split(model: str) -> tuple[str, int]:
    """Name that timm knows and last layer, of ``NAME`` or ``NAME.layerN``."""
    base, _, layer = model.rpartition(".layer")
    return (base, int(layer)) if base and layer in {"1", "2", "3", "4"} else (model, _LAYERS)


def _create(config: EncoderConfig) -> ResNet:
    base, last = _split(config.model)
    sizes = ("patch_size", "dim", "depth", "heads", "registers", "ffn", "layer_scale")
    given = [size for size in sizes if getattr(config, size) is not None]
    if given:
        raise ConfigError(f"{config.model} is a ResNet; leave out {', '.join(given)}, which only transformers have")
    try:
        resnet = timm.create_model(base, pretrained=config.pretrained, num_classes=0)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"timm cannot make {base}: {error}") from error
    except OSError as error:
        raise StoreError(
            f"the published weights of {base} are not in the cache and cannot be fetched ({error}); "
            "fetch them on another machine and give the file as weights"
        ) from error
    if type(resnet) is not ResNet:
        raise ConfigError(f"{config.model} is not a ResNet of timm's; choose one such as resnet18 or resnet18.layer3")
    for layer in range(last + 1, _LAYERS + 1):
        setattr(resnet, f"layer{layer}", nn.Identity())
    return resnet


def _fitting(weights: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Weights without those of the layers that ``model`` ends before."""
    absent = tuple(f"layer{layer}." for layer in range(_split(model)[1] + 1, _LAYERS + 1))
    return {key: value for key, value in weights.items() if not key.startswith(absent)}

"""An encoder as the extraction uses it: its name and hash in files, and tiles through it on a device."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.core.errors import ConfigError
from gigatome.encoders.device import usable_device
from gigatome.encoders.folders import weights_digest
from gigatome.encoders.longvit import LongVit
from gigatome.encoders.longvit_zoo import longvit_digest
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import encoder_digest, encoder_name

Precision = Literal["fp32", "bf16", "fp16"]

PRECISIONS = ("fp32", "bf16", "fp16")
"""What the encoder can compute in: plain float32, or PyTorch's autocast to the others."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REGIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Maker:
    """The encoder as files name it.

    Attributes:
        name: for file and folder names.
        weights: hash of what decides its embeddings.
        dim: size of an embedding.
    """

    name: str
    weights: str
    dim: int

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise ConfigError(f"an encoder's name holds letters, digits and . _ - alone, unlike {self.name!r}")

    @classmethod
    def of(cls, model: nn.Module, name: str | None) -> "Maker":
        """Names ``model``; the default name is its own with a hash, so that no encoder with other weights has it.

        Raises:
            ConfigError: the model is no tile encoder, or ``name`` does not do for a folder.
        """
        for attribute in ("dim", "normalise"):
            if not hasattr(model, attribute):
                raise ConfigError(f"{type(model).__name__} is no tile encoder: it has no {attribute}")
        known = isinstance(model, TileEncoder)
        digest = longvit_digest(model) if isinstance(model, LongVit) else None
        weights = encoder_digest(model) if known else digest or _digest(model)
        name = name or (encoder_name(model) if known else f"{type(model).__name__.lower()}-{weights[:8]}")
        return cls(name, weights, int(getattr(model, "dim")))  # noqa: B009 - nn.Module does not declare it


def encode(
    model: nn.Module,
    images: NDArray[np.uint8],
    *,
    device: str,
    precision: Precision,
    view: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Embeddings float32 [B, dim], on the device, of tiles uint8 [B, H, W, 3].

    Args:
        model: the encoder, on the device.
        images: the tiles.
        device: where the encoder is.
        precision: what it computes in.
        view: makes what the encoder takes of the tiles; its own ``normalise`` by default.

    Raises:
        ConfigError: the device's memory does not hold the batch.
    """
    tensor = torch.from_numpy(images)
    if device.startswith("cuda"):
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    try:
        with torch.inference_mode():
            seen = view(tensor) if view else model.normalise(tensor)  # pyright: ignore[reportCallIssue]
            with computing_in(precision, device):
                return model(seen).float()
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{device} lacks the memory for {len(images)} tiles at once; use a smaller batch") from error


def computing_in(precision: Precision, device: str) -> torch.autocast:
    """PyTorch's autocast to a precision; it does nothing for ``"fp32"``."""
    return torch.autocast(torch.device(device).type, _AUTOCAST.get(precision), enabled=precision != "fp32")


def encode_grids(
    model: RegionVit, grids: NDArray[np.floating], mask: NDArray[np.bool_], *, device: str
) -> NDArray[np.float32]:
    """Embeddings [R, dim] of regions, in float32 whatever the grids were computed in: it takes next to no time.

    Args:
        model: the region encoder, on the device.
        grids: [R, T, D] of tile embeddings, row by row; T is a square.
        mask: bool [R, T], the tiles that are there; no token attends to the others.
        device: where the region encoder is.
    """
    side = math.isqrt(grids.shape[1])
    found = [np.zeros((0, model.dim), np.float32)]
    with torch.inference_mode():
        for start in range(0, len(grids), _REGIONS_AT_ONCE):
            part = slice(start, start + _REGIONS_AT_ONCE)
            x = torch.from_numpy(grids[part]).to(device).float()
            there = torch.from_numpy(mask[part]).to(device)
            vectors = model(x.mT.unflatten(2, (side, side)), there.unflatten(1, (side, side)))
            found.append(vectors.cpu().numpy())
    return np.concatenate(found)


@contextmanager
def ready(model: nn.Module, device: str) -> Iterator[None]:
    """The model on the device and in evaluation mode; as it was before, afterwards.

    Raises:
        ConfigError: there is no such device here.
    """
    training = model.training
    home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    model.to(usable_device(device)).eval()
    try:
        yield
    finally:
        model.train(training)
        if home is not None:
            model.to(home)


def try_out(model: nn.Module, maker: Maker, tile_size: int, *, device: str, precision: Precision) -> None:
    """Embeds one white tile, so that an encoder that does not fit is found before hours of work.

    Raises:
        ConfigError: the tile size does not suit the encoder, or its output is not [1, dim].
    """
    white = np.full((1, tile_size, tile_size, 3), 255, np.uint8)
    shape = tuple(encode(model, white, device=device, precision=precision).shape)
    if shape != (1, maker.dim):
        raise ConfigError(f"{maker.name}: embeds one tile as {list(shape)}, and should as [1, {maker.dim}]")


def _digest(model: nn.Module) -> str:
    """Hash of the weights of a module that is not ours."""
    return weights_digest(type(model).__name__, model.state_dict())

"""Prov-GigaPath's slide encoder: from the embeddings of all tiles of a slide, and their places, to one embedding.

Source: Xu et al., "A whole-slide foundation model for digital pathology from real-world data", Nature 630 (2024), and
the code released with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import log2
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.dilated import DilatedOptions
from gigatome.encoders.longnet import Checkpointing, LongNetConfig, LongNetEncoder
from gigatome.encoders.weights import encoder_weights, load_weights, read_weights

_TILES = 2**15  # whose embeddings are on the device at once


def gigapath_segments(slide_size: int, tile_size: int) -> tuple[int, ...]:
    """Segment lengths of attention: five, from 1024 tiles to those of a square slide, in equal ratios and cut.

    Args:
        slide_size: side of the largest slide in pixels, at the resolution of the tiles.
        tile_size: side of a tile in pixels.

    Source: the authors' code, which takes 262,144 px for pretraining and 250,000 px for PANDA.
    """
    last = int(log2((slide_size // tile_size) ** 2))
    return tuple(int(2 ** (10 + (last - 10) * number / 4)) for number in range(5))


@final
@dataclass(frozen=True)
class GigapathConfig:
    """What defines a slide encoder; the defaults are those of the published weights, ``gigapath_slide_enc12l768d``.

    Attributes:
        input_dim: size of a tile's embedding.
        dim: width of a token, and size of an embedding; a multiple of 4.
        depth: number of blocks.
        heads: attention heads.
        ffn_dim: width of the middle of a feed-forward layer.
        tile_size: side of a tile in pixels.
        slide_size: side of the largest slide in pixels, which the segments are chosen for. Larger ones may be given.
        grid: columns, and rows, of places that tiles can have.
        segments: of the attention; None takes :func:`gigapath_segments`.
        ratios: of the attention's branches.
        offsets: as in :class:`~gigatome.encoders.dilated.DilatedOptions`, and so are ``padding`` and ``merge``. The
            defaults are torchscale's, with which the published weights were trained; the one difference that
            :meth:`~gigatome.encoders.dilated.DilatedOptions.compat` names begins at slides of 185,363 tiles.
        padding: likewise.
        merge: likewise.
        final: which tokens an embedding is made of. ``"encoder_out"`` are those that leave the last block and the
            encoder's own norm, as in the authors' quick start; the default, as it leaves none of their weights out.
            ``"encoder_states"`` are those that leave a block, without that norm, as in the authors' pipeline and in
            their fine-tuning.
        layer: with ``"encoder_states"``, how many blocks the tokens have gone through; None is all of them.
        pooling: ``"cls"`` puts the class token through a last norm, ``"mean"`` the mean of the tiles' tokens.

    Raises:
        ConfigError: sizes are not positive or do not divide, or there is no such layer.
    """

    input_dim: int = 1536
    dim: int = 768
    depth: int = 12
    heads: int = 16
    ffn_dim: int = 3072
    tile_size: int = 256
    slide_size: int = 262_144
    grid: int = 1000
    segments: tuple[int, ...] | None = None
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16)
    offsets: Literal["torchscale", "paper"] = "torchscale"
    padding: Literal["masked", "torchscale"] = "torchscale"
    merge: Literal["gradient", "detached"] = "detached"
    final: Literal["encoder_out", "encoder_states"] = "encoder_out"
    layer: int | None = None
    pooling: Literal["cls", "mean"] = "cls"

    def __post_init__(self):
        if min(self.input_dim, self.grid, self.tile_size) < 1 or self.dim % 4:
            raise ConfigError(
                f"input_dim {self.input_dim}, grid {self.grid} and tile_size {self.tile_size} must be positive, and "
                f"dim {self.dim} a multiple of 4"
            )
        if self.slide_size < self.tile_size:
            raise ConfigError(f"a slide of {self.slide_size} px holds no tile of {self.tile_size} px")
        if self.layer is not None and (self.final == "encoder_out" or not 0 <= self.layer <= self.depth):
            raise ConfigError(
                f'layer {self.layer} needs final "encoder_states", and is at most the depth, {self.depth}'
            )
        self.encoder()

    def encoder(self) -> LongNetConfig:
        """Of the transformer."""
        segments = gigapath_segments(self.slide_size, self.tile_size) if self.segments is None else self.segments
        attention = DilatedOptions(segments, self.ratios, self.heads, self.offsets, self.padding, self.merge)
        return LongNetConfig(self.dim, self.depth, self.ffn_dim, attention, normalize_output=True)


@final
class GigapathEncoder(nn.Module):
    """Maps slides to embeddings, each of any number of tiles, all of which see each other.

    State-dict keys are the authors': ``cls_token``, ``patch_embed.proj.weight``, ``encoder.layers.0.…`` and
    ``encoder.layer_norm.weight`` as of :class:`~gigatome.encoders.longnet.LongNetEncoder`, and ``norm.weight``.

    Args:
        config: what to make. Parameters are initialised by the global generator, as :func:`build_gigapath` seeds it.
        dropout: share of numbers that training drops from the tokens that enter, and from what attention and
            feed-forward layers add to them; the authors' default is 0.25.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0; theirs is 0.1.
        checkpointing: as for :class:`~gigatome.encoders.longnet.LongNetEncoder`.

    Attributes:
        config: what it was made from.
        dim: size of an embedding.

    Source: Prov-GigaPath; differs: positions are computed for the tiles at hand, where the authors hold those of all
    1000 × 1000 places, and a place beyond the grid is an error, where theirs is another place or none.
    """

    def __init__(
        self,
        config: GigapathConfig,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        checkpointing: Checkpointing = "none",
    ):
        super().__init__()
        self.config = config
        self.dim, self._dropout = config.dim, dropout
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(config.input_dim, config.dim)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.encoder = LongNetEncoder(config.encoder(), drop_path=drop_path, checkpointing=checkpointing)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(_initialise)
        for layer in self.encoder.layers if dropout else ():
            for name in ("self_attn.out_proj", "ffn.fc2"):
                layer.get_submodule(name).register_forward_hook(self._drop)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Embeddings [B, dim] of slides, as ``config.final`` and ``config.pooling`` have them.

        Args:
            x: float [B, N, input_dim], embeddings of tiles, on any device. Dilated attention goes by their order.
            places: int64 [B, N, 2], (column, row) of each tile, as of :func:`grid_places`.

        Raises:
            ValueError: shapes or types are wrong, or there are no tiles.
            ConfigError: a place lies beyond the grid.
        """
        if self.config.final == "encoder_out":
            return self._pool(self.encoder(self._enter(x, places)))
        layer = self.config.depth if self.config.layer is None else self.config.layer
        return self._pool(next(islice(self._states(x, places), layer, None)))

    def all_layers(self, x: Tensor, places: Tensor) -> Tensor:
        """Embeddings [depth + 1, B, dim] of the tokens that enter, and of those that leave each block.

        The last is that of ``final="encoder_states"``. Arguments are those of :meth:`forward`.
        """
        return torch.stack([self._pool(tokens) for tokens in self._states(x, places)])

    def _states(self, x: Tensor, places: Tensor) -> Iterator[Tensor]:
        """Tokens [B, 1 + N, dim] that enter, and those that leave each block."""
        tokens = self._enter(x, places)
        yield tokens
        for layer in self.encoder.layers:
            tokens = layer(tokens, None)
            yield tokens

    def _enter(self, x: Tensor, places: Tensor) -> Tensor:
        _check(x, places, self.config)
        table = _waves(self.config.grid, self.dim // 2).to(self.cls_token)
        tokens = [self.cls_token.expand(len(x), -1, -1)]  # whose place is zeros
        for part, own in zip(x.split(_TILES, 1), places.split(_TILES, 1), strict=True):
            column, row = own.to(table.device).unbind(-1)
            tokens.append(self.patch_embed["proj"](part.to(table)) + torch.cat([table[row], table[column]], -1))
        return F.dropout(torch.cat(tokens, 1), self._dropout, self.training)

    def _pool(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens[:, 0] if self.config.pooling == "cls" else tokens[:, 1:].mean(1))

    def _drop(self, layer: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return F.dropout(out, self._dropout, layer.training)


def grid_places(coords: NDArray[np.int64], side: float) -> NDArray[np.int64]:
    """Places int64 […, 2] of tiles, (column, row).

    The authors divide pixels at the resolution of the tiles by their side, and cut to integers; in level-0 pixels,
    which are rounded, that takes one pixel of tolerance.

    Args:
        coords: int64 […, 2], (x, y) of tiles in level-0 pixels.
        side: of a tile in level-0 pixels.
    """
    return np.floor((coords + 1) / side).astype(np.int64)


def check_places(places: Tensor | NDArray[np.int64], grid: int) -> None:
    """Raises :class:`ConfigError` if places […, 2] of tiles lie beyond a grid."""
    low, high = int(places.min()), int(places.max())
    if low < 0 or high >= grid:
        raise ConfigError(
            f"places of tiles run from {low} to {high}, but Prov-GigaPath's grid from 0 to {grid - 1}; places are "
            "level-0 pixels divided by the side of a tile in level-0 pixels, and a larger slide needs larger tiles"
        )


def build_gigapath(
    config: GigapathConfig,
    seed: int,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    checkpointing: Checkpointing = "none",
) -> GigapathEncoder:
    """Makes a slide encoder with random weights, in training mode, on the CPU.

    Args:
        config: what to make.
        seed: of the initialisation; the global generators are left as they are.
        dropout: as for :class:`GigapathEncoder`.
        drop_path: likewise.
        checkpointing: likewise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return GigapathEncoder(config, dropout=dropout, drop_path=drop_path, checkpointing=checkpointing)


def load_gigapath(
    weights: str | Path | Mapping[str, Any],
    config: GigapathConfig | None = None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    checkpointing: Checkpointing = "none",
) -> GigapathEncoder:
    """A slide encoder of given weights, in evaluation mode, on the CPU.

    Args:
        weights: the authors' ``slide_encoder.pth``, or the content of such a file.
        config: what to make; by default the sizes that the weights have, with 16 heads as all of the authors' have.
        dropout: as for :class:`GigapathEncoder`.
        drop_path: likewise.
        checkpointing: likewise.

    Raises:
        StoreError: the file cannot be read.
        RunError: it holds the weights of another model; the message names keys that are missing or unexpected.
    """
    given = isinstance(weights, Mapping)
    source = "Prov-GigaPath weights" if given else str(weights)
    found = encoder_weights(weights, source=source) if given else read_weights(weights)
    inner = ("layers.", "layer_norm.")
    state = {f"encoder.{key}" if key.startswith(inner) else key: value for key, value in found.items()}
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = GigapathEncoder(
            config or _config_of(state, source), dropout=dropout, drop_path=drop_path, checkpointing=checkpointing
        )
    load_weights(model, state, source=source)
    return model.eval()


def _config_of(state: Mapping[str, Tensor], source: str) -> GigapathConfig:
    refusal = f"{source}: holds no weights of Prov-GigaPath's slide encoder"
    tiles, hidden = "patch_embed.proj.weight", "encoder.layers.0.ffn.fc1.bias"
    for key, axes in ((tiles, 2), (hidden, 1)):
        if key not in state:
            raise RunError(f"{refusal}, as {key} is missing; give its slide_encoder.pth")
        if state[key].ndim != axes:
            raise RunError(
                f"{refusal}, as {key} has shape {list(state[key].shape)}, not one of {axes} axes; give its "
                "slide_encoder.pth"
            )
    dim, input_dim = state[tiles].shape
    depth = sum(key.startswith("encoder.layers.") and key.endswith(".ffn.fc1.bias") for key in state)
    return GigapathConfig(input_dim, dim, depth, ffn_dim=len(state[hidden]))


def _check(x: Tensor, places: Tensor, config: GigapathConfig) -> None:
    if x.ndim != 3 or x.shape[2] != config.input_dim or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"need float embeddings [B, N, {config.input_dim}] of tiles, got {x.dtype} {list(x.shape)}")
    if places.shape != (*x.shape[:2], 2) or places.dtype != torch.int64:
        raise ValueError(f"need int64 places {[*x.shape[:2], 2]}, got {places.dtype} {list(places.shape)}")
    check_places(places, config.grid)


def _waves(count: int, dim: int) -> Tensor:
    """Sines, and then cosines, float64 [count, dim] of the numbers from 0."""
    rates = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

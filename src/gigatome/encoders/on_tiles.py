"""What encoders that take embeddings of tiles have in common: the tile encoder, kept with them, and its hash."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from gigatome.core.errors import ConfigError
from gigatome.encoders.folders import CARD_FILE, write_folder
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder, save_encoder

_TILE = "tile"


class _Card(Protocol):
    """A card of an encoder of tile embeddings."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def tile_encoder(self) -> str: ...
    @property
    def tile_weights(self) -> str: ...


def check_tiles(card: _Card, encoder: str, weights: str, dim: int, where: object) -> None:
    """Raises :class:`ConfigError` if embeddings by ``encoder`` are not what the encoder of ``card`` takes.

    Args:
        card: of the encoder.
        encoder: name of the tile encoder.
        weights: hash of its weights; "" if not known.
        dim: size of its embeddings.
        where: what holds the embeddings, for the message.
    """
    if dim != card.config.input_dim:
        raise ConfigError(
            f"{where}: embeddings of {dim} numbers by {encoder}; {card.name} takes {card.config.input_dim}"
            + (f" by {card.tile_encoder}" if card.tile_encoder else "")
        )
    if card.tile_weights and weights and weights != card.tile_weights:
        raise ConfigError(
            f"{where}: embeddings by {encoder} (weights {weights}); {card.name} was trained on those by "
            f"{card.tile_encoder} (weights {card.tile_weights}). Embed the tiles with that encoder"
        )


def write_with_tiles(folder: Path, network: nn.Module, content: dict[str, Any], tile: TileEncoder | None) -> None:
    """Writes an encoder's folder, with its tile encoder in it if there is one."""
    if tile is not None:
        save_encoder(tile, folder / _TILE)
    write_folder(folder, network, content)


def tile_encoder_of(spec: str | Path) -> TileEncoder | None:
    """The tile encoder that is kept with the encoder at ``spec``; None if there is none."""
    kept = (folder / _TILE for folder in (Path(spec), Path(spec) / "encoder"))
    found = next((folder for folder in kept if (folder / CARD_FILE).is_file()), None)
    return None if found is None else load_encoder(found)


def weights_with_tiles(digest: str, tile_weights: str) -> str:
    """Hash of an encoder's digest and of its tile encoder's weights: 16 hexadecimal digits."""
    return hashlib.sha256(f"{digest} {tile_weights}".encode()).hexdigest()[:16]

"""Prov-GigaPath's slide encoders on disk: the authors' file, or a folder as of other slide encoders."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, StoreError
from gigatome.encoders.folders import check_digest, find_folder, read_folder, stated, weights_digest
from gigatome.encoders.gigapath import GigapathConfig, GigapathEncoder, load_gigapath
from gigatome.encoders.hub import HUB, fetch
from gigatome.encoders.on_tiles import check_tiles, write_with_tiles
from gigatome.encoders.vit import TileEncoder

_MODEL = "gigapath"
_FILE, _LICENCE = "slide_encoder.pth", "Apache-2.0 with conditions of use"  # as the authors publish it


@dataclass(frozen=True)
class GigapathCard:
    """What one must know to use one of Prov-GigaPath's slide encoders.

    Attributes:
        name: short name.
        config: architecture.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        tile_encoder: name of the encoder whose embeddings it takes; empty if that is not known.
        tile_weights: hash of that encoder's weights; likewise.
        mpp: of the tiles, µm per pixel.
    """

    name: str
    config: GigapathConfig
    source: str = ""
    licence: str = ""
    tile_encoder: str = ""
    tile_weights: str = ""
    mpp: float = 0.5

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.config.tile_size

    def check_tiles(self, encoder: str, weights: str, dim: int, where: object) -> None:
        """Raises :class:`ConfigError` if embeddings by ``encoder`` are not what the slide encoder takes.

        Args:
            encoder: name of the tile encoder.
            weights: hash of its weights; "" if not known.
            dim: size of its embeddings.
            where: what holds the embeddings, for the message.
        """
        check_tiles(self, encoder, weights, dim, where)


def save_gigapath(
    encoder: GigapathEncoder, folder: str | Path, card: GigapathCard, *, tile: TileEncoder | None = None
) -> None:
    """Writes a slide encoder, its card, and the tile encoder if there is one, into ``folder``."""
    card_and_digest = {"card": configuration.to_dict(card), "digest": gigapath_digest(encoder)}
    write_with_tiles(Path(folder), encoder, {"level": "slide", "model": _MODEL} | card_and_digest, tile)


def is_gigapath(spec: str | Path) -> bool:
    """Whether :func:`open_gigapath` is to open ``spec``: it says ``model=gigapath``, or is a folder whose card does."""
    text, _, query = str(spec).partition("?")
    if ("model", _MODEL) in parse_qsl(query):
        return True
    folder = find_folder(Path(text))
    return folder is not None and stated(folder, "model") == _MODEL


def open_gigapath(spec: str | Path) -> tuple[GigapathEncoder, GigapathCard]:
    """One of Prov-GigaPath's slide encoders in evaluation mode, on the CPU, and its card.

    Args:
        spec: a folder that :func:`save_gigapath` wrote; the authors' file, ``slide_encoder.pth``, or a folder with it;
            or ``hf-hub:prov-gigapath/prov-gigapath``, fetched once and then cached. After it may stand
            ``?model=gigapath``, and what is to be different in the config, such as
            ``?model=gigapath&pooling=mean&final=encoder_states&layer=11``.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be fetched or read.
        RunError: it is no such encoder.
        ConfigError: the config has no such field or value.
    """
    text, _, query = str(spec).partition("?")
    changes = dict(parse_qsl(query))
    if changes.pop("model", _MODEL) != _MODEL:
        raise ConfigError(f"{spec}: is to be opened as {_MODEL}; write {text}?model={_MODEL}")
    path = fetch(text.removeprefix(HUB), (_FILE,)) if text.startswith(HUB) else Path(text)
    folder = find_folder(path)
    encoder, card = _read_authors(path) if folder is None else _read_folder(folder)
    if changes:
        config = configuration.parse(GigapathConfig, configuration.to_dict(card.config) | changes, source=str(spec))
        encoder, card = load_gigapath(encoder.state_dict(), config), replace(card, config=config)
    return encoder, card


def gigapath_digest(encoder: GigapathEncoder) -> str:
    """Hash of all that decides a slide's embedding, given those of its tiles: 16 hexadecimal digits."""
    seen = asdict(encoder.config) | {"segments": encoder.config.encoder().attention.segments}
    for key in ("merge", "tile_size", "slide_size"):  # of training, and of the choice of segments
        del seen[key]
    return weights_digest(json.dumps(seen, sort_keys=True), encoder.state_dict())


def _read_authors(path: Path) -> tuple[GigapathEncoder, GigapathCard]:
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"{path}: no such slide encoder; give the folder of one, or the authors' {_FILE}")
    encoder = load_gigapath(file)
    return encoder, GigapathCard(_MODEL, encoder.config, source=file.name, licence=_LICENCE, tile_encoder=_MODEL)


def _read_folder(folder: Path) -> tuple[GigapathEncoder, GigapathCard]:
    card, weights, digest = read_folder(
        folder, GigapathCard, what="a slide encoder of Prov-GigaPath's", refusal=_refusal
    )
    encoder = load_gigapath(weights, card.config)
    check_digest(folder, gigapath_digest(encoder), digest)
    return encoder, card


def _refusal(level: str) -> str:
    return "" if level == "slide" else f"is the encoder of {level}s, not one of slides by Prov-GigaPath"

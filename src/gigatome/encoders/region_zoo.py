"""Region encoders on disk, with the tile encoder whose embeddings they take.

A folder holds ``encoder.safetensors``, ``encoder.json``, the card, and, where its tile encoder was at hand, that
encoder's own folder as ``tile/``; so one path is enough to go from pixels to regions.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gigatome import config as configuration
from gigatome.core.errors import RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.folders import (
    WEIGHTS_FILE,
    check_digest,
    find_folder,
    last_checkpoint,
    read_folder,
    unique_name,
    weights_digest,
)
from gigatome.encoders.hipt import load_vit4096
from gigatome.encoders.on_tiles import check_tiles, weights_with_tiles, write_with_tiles
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.weights import load_weights, read_weights


@dataclass(frozen=True)
class RegionCard:
    """What one must know to use a region encoder.

    Attributes:
        name: short name.
        config: architecture.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        tile_encoder: name of the encoder whose embeddings it takes; empty if that is not known.
        tile_weights: hash of that encoder's weights; likewise.
        tile_size: side of a tile in pixels.
        mpp: of the tiles, µm per pixel.
        tiles: tiles along the side of a region that it was trained on.
    """

    name: str
    config: RegionVitConfig
    source: str = ""
    licence: str = ""
    tile_encoder: str = ""
    tile_weights: str = ""
    tile_size: int = 256
    mpp: float = 0.5
    tiles: int = 16

    def check_tiles(self, encoder: str, weights: str, dim: int, where: object) -> None:
        """Raises :class:`ConfigError` if embeddings by ``encoder`` are not what the region encoder takes.

        Args:
            encoder: name of the tile encoder.
            weights: hash of its weights; "" if not known.
            dim: size of its embeddings.
            where: what holds the embeddings, for the message.
        """
        check_tiles(self, encoder, weights, dim, where)


def save_region_encoder(
    encoder: RegionVit, folder: str | Path, card: RegionCard, *, tile: TileEncoder | None = None
) -> None:
    """Writes a region encoder, its card, and the tile encoder if there is one, into ``folder``."""
    content = {"level": "region", "card": configuration.to_dict(card), "digest": region_digest(encoder)}
    write_with_tiles(Path(folder), encoder, content, tile)


def open_region_encoder(spec: str | Path) -> tuple[RegionVit, RegionCard]:
    """A region encoder in evaluation mode, on the CPU, and its card.

    Args:
        spec: a run folder of ``gigatome train`` with a recipe of level region, also of a run that has not finished;
            the folder of a region encoder; or a file of weights by HIPT's authors, ``vit4k_xs_dino.pth``.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be read.
        RunError: it is no region encoder.
    """
    path = Path(spec)
    if path.is_file():
        return load_vit4096(path), RegionCard(path.stem, RegionVitConfig(), source=path.name)
    if not path.is_dir():
        raise StoreError(f"{spec}: no such region encoder; give a run folder, the folder of one, or a file of weights")
    folder = find_folder(path)
    return _read_folder(folder) if folder else _read_unfinished(path)


def region_digest(encoder: RegionVit) -> str:
    """Hash of all that decides a region's embedding, given those of its tiles: 16 hexadecimal digits."""
    seen = asdict(replace(encoder.config, dropout=0.0))  # which no embedding knows of
    return weights_digest(json.dumps(seen, sort_keys=True), encoder.state_dict())


def region_weights(encoder: RegionVit, tile_weights: str) -> str:
    """Hash of all that decides a region's embedding, the tile encoder's hash included: 16 hexadecimal digits."""
    return weights_with_tiles(region_digest(encoder), tile_weights)


def region_name(encoder: RegionVit, card: RegionCard, tile_weights: str) -> str:
    """Name for files and folders that no pair of tile and region encoder with other weights has."""
    return unique_name(card.name, region_weights(encoder, tile_weights))


def _read_folder(folder: Path) -> tuple[RegionVit, RegionCard]:
    refusal = "is the encoder of tiles, not of regions; give the run of a recipe of level region"
    card, weights, digest = read_folder(
        folder, RegionCard, what="a region encoder", refusal=lambda level: "" if level == "region" else refusal
    )
    encoder = _restore(card.config, weights, str(folder / WEIGHTS_FILE))
    check_digest(folder, region_digest(encoder), digest)
    return encoder, card


def _read_unfinished(run: Path) -> tuple[RegionVit, RegionCard]:
    """The teacher in the last checkpoint of a run that has not written its encoder yet."""
    last = last_checkpoint(run, "a region encoder")
    recipe = configuration.read_yaml(run / "recipe.yaml")
    if recipe.get("level") != "region":
        raise RunError(f"{run}: trains an encoder of tiles, not of regions; give the run of a recipe of level region")
    record = run / "run.yaml"
    card = configuration.parse(RegionCard, configuration.read_yaml(record).get("card", {}), source=str(record))
    log.warning("%s: the run has not finished; taking the teacher at %s", run, last.parent.name)
    encoder = _restore(card.config, read_weights(last), str(last))
    return encoder, replace(card, source=f"gigatome, {last.parent.name} of an unfinished run")


def _restore(config: RegionVitConfig, weights: Mapping[str, Tensor], source: str) -> RegionVit:
    with torch.device("meta"):
        encoder = RegionVit(replace(config, dropout=0.0))
    load_weights(encoder, weights, source=source, pos_embed="dino")
    return encoder.eval()

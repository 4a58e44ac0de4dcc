"""Region encoders on disk, with the tile encoder whose embeddings they take.

A folder holds ``encoder.safetensors``, ``encoder.json``, the card, and, where its tile encoder was at hand, that
encoder's own folder as ``tile/``; so one path is enough to go from pixels to regions.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigatome import config as configuration
from gigatome.blob.store import atomic_path, write_atomic
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.hipt import load_vit4096
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.weights import load_weights, read_weights
from gigatome.encoders.zoo import load_encoder, save_encoder

_WEIGHTS, _CARD, _TILE = "encoder.safetensors", "encoder.json", "tile"


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
        if dim != self.config.input_dim:
            raise ConfigError(
                f"{where}: embeddings of {dim} numbers by {encoder}; {self.name} takes {self.config.input_dim}"
                + (f" by {self.tile_encoder}" if self.tile_encoder else "")
            )
        if self.tile_weights and weights and weights != self.tile_weights:
            raise ConfigError(
                f"{where}: embeddings by {encoder} (weights {weights}); {self.name} was trained on those by "
                f"{self.tile_encoder} (weights {self.tile_weights}). Embed the tiles with that encoder"
            )


def save_region_encoder(
    encoder: RegionVit, folder: str | Path, card: RegionCard, *, tile: TileEncoder | None = None
) -> None:
    """Writes a region encoder, its card, and the tile encoder if there is one, into ``folder``."""
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    if tile is not None:
        save_encoder(tile, folder / _TILE)
    with atomic_path(folder / _WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    content = {"level": "region", "card": configuration.to_dict(card), "digest": region_digest(encoder)}
    write_atomic(folder / _CARD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
    folder = next((folder for folder in (path, path / "encoder") if (folder / _CARD).is_file()), None)
    return _read_folder(folder) if folder else _read_unfinished(path)


def tile_encoder_of(spec: str | Path) -> TileEncoder | None:
    """The tile encoder that is kept with the region encoder at ``spec``; None if there is none."""
    kept = (folder / _TILE for folder in (Path(spec), Path(spec) / "encoder"))
    found = next((folder for folder in kept if (folder / _CARD).is_file()), None)
    return None if found is None else load_encoder(found)


def region_digest(encoder: RegionVit) -> str:
    """Hash of all that decides a region's embedding, given those of its tiles: 16 hexadecimal digits."""
    seen = asdict(replace(encoder.config, dropout=0.0))  # which no embedding knows of
    digest = hashlib.sha256(json.dumps(seen, sort_keys=True).encode())
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def region_weights(encoder: RegionVit, tile_weights: str) -> str:
    """Hash of all that decides a region's embedding, the tile encoder's hash included: 16 hexadecimal digits."""
    return hashlib.sha256(f"{region_digest(encoder)} {tile_weights}".encode()).hexdigest()[:16]


def region_name(encoder: RegionVit, card: RegionCard, tile_weights: str) -> str:
    """Name for files and folders that no pair of tile and region encoder with other weights has."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", card.name).strip("-")
    return f"{name}-{region_weights(encoder, tile_weights)[:8]}"


def _read_folder(folder: Path) -> tuple[RegionVit, RegionCard]:
    try:
        content = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        if content.get("level") != "region":
            raise RunError(
                f"{folder}: is the encoder of tiles, not of regions; give the run of a recipe of level region"
            )
        card = configuration.parse(RegionCard, content["card"], source=str(folder / _CARD))
        weights = load_file(folder / _WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, ConfigError) as error:
        raise RunError(f"{folder}: cannot be read as a region encoder: {error}") from error
    encoder = _restore(card.config, weights, str(folder / _WEIGHTS))
    if region_digest(encoder) != content["digest"]:
        raise RunError(f"{folder}: {_WEIGHTS} and {_CARD} do not belong together; write the encoder again")
    return encoder, card


def _read_unfinished(run: Path) -> tuple[RegionVit, RegionCard]:
    """The teacher in the last checkpoint of a run that has not written its encoder yet."""
    steps = sorted(run.glob("checkpoints/step-*/model.safetensors"), key=lambda path: (len(path.parent.name), path))
    if not steps or not (run / "recipe.yaml").is_file():
        raise RunError(f"{run}: is neither the folder of a region encoder nor a run with a checkpoint")
    recipe = configuration.read_yaml(run / "recipe.yaml")
    if recipe.get("level") != "region":
        raise RunError(f"{run}: trains an encoder of tiles, not of regions; give the run of a recipe of level region")
    record = run / "run.yaml"
    card = configuration.parse(RegionCard, configuration.read_yaml(record).get("card", {}), source=str(record))
    log.warning("%s: the run has not finished; taking the teacher at %s", run, steps[-1].parent.name)
    encoder = _restore(card.config, read_weights(steps[-1]), str(steps[-1]))
    return encoder, replace(card, source=f"gigatome, {steps[-1].parent.name} of an unfinished run")


def _restore(config: RegionVitConfig, weights: Mapping[str, Tensor], source: str) -> RegionVit:
    with torch.device("meta"):
        encoder = RegionVit(replace(config, dropout=0.0))
    load_weights(encoder, weights, source=source, pos_embed="dino")
    return encoder.eval()

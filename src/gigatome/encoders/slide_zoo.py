"""Slide encoders on disk, with the tile encoder whose embeddings they take.

A folder holds ``encoder.safetensors``, ``encoder.json``, the card, and, where its tile encoder was at hand, that
encoder's own folder as ``tile/``; so one path is enough to go from pixels to slides.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
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
from gigatome.encoders.giga import GigaConfig, GigaEncoder, build_giga, from_resnet, load_gigassl
from gigatome.encoders.gigapath import GigapathEncoder
from gigatome.encoders.gigapath_zoo import GigapathCard, is_gigapath, open_gigapath
from gigatome.encoders.on_tiles import check_tiles, weights_with_tiles, write_with_tiles
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.weights import load_weights, read_weights
from gigatome.encoders.zoo import load_encoder

_TRAINED = "student.encoder."  # in a checkpoint

Frame = Literal["tile", "authors_training", "authors_inference"]
"""What the places of tiles count. ``"tile"``: the column and row in the slide's grid, so that neighbours are 1 apart
whatever the scanner. Giga-SSL's authors divide level-0 pixels by 224 in training and by 896 at inference, without
rounding: at 10× of a slide scanned at 40×, neighbours are 4 apart in the one and 1 in the other."""


_AUTHORS_SIDES = {"authors_training": 224.0, "authors_inference": 896.0}


def frame_places(coords: NDArray[np.int64], sides: float | NDArray[np.float64], frame: Frame) -> NDArray[np.float64]:
    """Places […, 2] of tiles in a frame.

    Args:
        coords: int64 […, 2], (x, y) in level-0 pixels.
        sides: steps from a tile to its neighbour in level-0 pixels, to be broadcast.
        frame: what places count.
    """
    return np.rint(coords / sides) if frame == "tile" else coords / _AUTHORS_SIDES[frame]


@dataclass(frozen=True)
class SlideCard:
    """What one must know to use a slide encoder.

    Attributes:
        name: short name.
        config: architecture.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        tile_encoder: name of the encoder whose embeddings it takes; empty if that is not known.
        tile_weights: hash of that encoder's weights; likewise.
        tile_size: side of a tile in pixels.
        mpp: of the tiles, µm per pixel.
        tiles: of a view in training, T; a view at inference should have as many.
        frame: of the places that it was trained on.
    """

    name: str
    config: GigaConfig
    source: str = ""
    licence: str = ""
    tile_encoder: str = ""
    tile_weights: str = ""
    tile_size: int = 256
    mpp: float = 1.0
    tiles: int = 5
    frame: Frame = "tile"

    def check_tiles(self, encoder: str, weights: str, dim: int, where: object) -> None:
        """Raises :class:`ConfigError` if embeddings by ``encoder`` are not what the slide encoder takes.

        Args:
            encoder: name of the tile encoder.
            weights: hash of its weights; "" if not known.
            dim: size of its embeddings.
            where: what holds the embeddings, for the message.
        """
        check_tiles(self, encoder, weights, dim, where)


def new_slide_encoder(config: GigaConfig, weights: str | None, seed: int) -> GigaEncoder:
    """A slide encoder to be trained, in training mode, on the CPU.

    Args:
        config: what to make.
        weights: a file of weights of a ResNet, or what :func:`gigatome.encoders.zoo.load_encoder` takes, such as
            ``timm:resnet18.tv_in1k``: it starts as that ResNet's layer 4. None for random weights.
        seed: of random weights.

    Raises:
        StoreError: the weights cannot be found or read.
        RunError: they are of another network.
    """
    if weights is None:
        return build_giga(config, seed)
    found = read_weights(weights) if Path(weights).is_file() else load_encoder(weights).vit.state_dict()
    return from_resnet(found, config, source=weights)


def save_slide_encoder(
    encoder: GigaEncoder, folder: str | Path, card: SlideCard, *, tile: TileEncoder | None = None
) -> None:
    """Writes a slide encoder, its card, and the tile encoder if there is one, into ``folder``."""
    content = {"level": "slide", "card": configuration.to_dict(card), "digest": slide_digest(encoder)}
    write_with_tiles(Path(folder), encoder, content, tile)


def open_slide_encoder(spec: str | Path) -> tuple[GigaEncoder, SlideCard]:
    """A slide encoder in evaluation mode, on the CPU, and its card.

    Args:
        spec: a run folder of ``gigatome train`` with a recipe of level slide, also of a run that has not finished;
            the folder of a slide encoder; or a checkpoint of Giga-SSL's authors, which are used as at their inference.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be read.
        RunError: it is no slide encoder, or one of Prov-GigaPath's.
    """
    if is_gigapath(spec):
        raise RunError(f"{spec}: is a slide encoder of Prov-GigaPath's, which embeds slides and is not trained here")
    path = Path(spec)
    if path.is_file():
        try:
            encoder = load_gigassl(path)
        except RunError as error:
            raise RunError(f"{error}; for weights of Prov-GigaPath write {spec}?model=gigapath") from error
        authors = {"tile_size": 224, "mpp": 1.0, "tiles": 5, "frame": "authors_inference"}
        return encoder, SlideCard(path.stem, encoder.config, source=path.name, **authors)
    if not path.is_dir():
        raise StoreError(f"{spec}: no such slide encoder; give a run folder, the folder of one, or a file of weights")
    folder = find_folder(path)
    return _read_folder(folder) if folder else _read_unfinished(path)


def open_any_slide_encoder(
    spec: str | Path,
) -> tuple[GigaEncoder, SlideCard] | tuple[GigapathEncoder, GigapathCard]:
    """As :func:`open_slide_encoder`, or :func:`gigatome.encoders.gigapath_zoo.open_gigapath` where ``spec`` says so."""
    return open_gigapath(spec) if is_gigapath(spec) else open_slide_encoder(spec)


def slide_digest(encoder: GigaEncoder) -> str:
    """Hash of all that decides a slide's embedding, given those of its tiles: 16 hexadecimal digits."""
    return weights_digest(json.dumps(asdict(encoder.config), sort_keys=True), encoder.state_dict())


def slide_weights(encoder: GigaEncoder, tile_weights: str) -> str:
    """Hash of all that decides a slide's embedding, the tile encoder's hash included: 16 hexadecimal digits."""
    return weights_with_tiles(slide_digest(encoder), tile_weights)


def slide_name(encoder: GigaEncoder, card: SlideCard, tile_weights: str) -> str:
    """Name for files and folders that no pair of tile and slide encoder with other weights has."""
    return unique_name(card.name, slide_weights(encoder, tile_weights))


def _read_folder(folder: Path) -> tuple[GigaEncoder, SlideCard]:
    card, weights, digest = read_folder(folder, SlideCard, what="a slide encoder", refusal=_refusal)
    encoder = _restore(card.config, weights, str(folder / WEIGHTS_FILE))
    check_digest(folder, slide_digest(encoder), digest)
    return encoder, card


def _refusal(level: str) -> str:
    wanted = "not of slides; give the run of a recipe of level slide"
    return "" if level == "slide" else f"is the encoder of {level}s, {wanted}"


def _read_unfinished(run: Path) -> tuple[GigaEncoder, SlideCard]:
    """The encoder in the last checkpoint of a run that has not written its own yet."""
    last = last_checkpoint(run, "a slide encoder")
    recipe = configuration.read_yaml(run / "recipe.yaml")
    if recipe.get("level") != "slide":
        raise RunError(
            f"{run}: trains an encoder of {recipe.get('level', 'tile')}s, not of slides; give the run of a recipe of "
            "level slide"
        )
    record = run / "run.yaml"
    card = configuration.parse(SlideCard, configuration.read_yaml(record).get("card", {}), source=str(record))
    log.warning("%s: the run has not finished; taking the encoder at %s", run, last.parent.name)
    try:
        state = load_file(last)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{last}: cannot be read as weights: {error}") from error
    weights = {key.removeprefix(_TRAINED): value for key, value in state.items() if key.startswith(_TRAINED)}
    encoder = _restore(card.config, weights, str(last))
    return encoder, replace(card, source=f"gigatome, {last.parent.name} of an unfinished run")


def _restore(config: GigaConfig, weights: Mapping[str, Tensor], source: str) -> GigaEncoder:
    with torch.device("meta"):
        encoder = GigaEncoder(config)
    load_weights(encoder, weights, source=source)
    return encoder.to(memory_format=torch.channels_last).eval()

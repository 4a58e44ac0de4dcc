"""Encoders on disk: those that gigatome trained, those that others published, and the cards that describe them.

An encoder's folder holds ``encoder.safetensors``, with timm's keys, and ``encoder.json``, its card.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigatome import config as configuration
from gigatome.blob.store import atomic_path, write_atomic
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.hipt import VIT256
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder, restore_encoder
from gigatome.encoders.weights import read_weights

_WEIGHTS, _CARD = "encoder.safetensors", "encoder.json"


@dataclass(frozen=True)
class EncoderCard:
    """What one must know to use an encoder.

    Attributes:
        name: short name.
        config: architecture and normalisation.
        dim: size of an embedding.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        mpp: resolutions it was trained at, µm per pixel.
        pooling: how tokens become an embedding; ``"cls"``: the class token after the last norm.
    """

    name: str
    config: EncoderConfig
    dim: int
    source: str = ""
    licence: str = ""
    mpp: tuple[float, ...] = ()
    pooling: str = "cls"


def _kaiko(name: str, model: str, dim: int, image_size: int = 224) -> EncoderCard:
    return EncoderCard(
        name=f"kaiko-{name}",
        config=EncoderConfig(model=model, image_size=image_size),
        dim=dim,
        source="https://github.com/kaiko-ai/towards_large_pathology_fms, release 0.0.1",
        licence="Kaiko non-commercial licence",
        mpp=(0.25, 0.5, 1.0, 2.0),
    )


PUBLISHED: tuple[EncoderCard, ...] = (
    _kaiko("vits16", "vit_small_patch16_224", 384),
    _kaiko("vits8", "vit_small_patch8_224", 384),
    _kaiko("vitb16", "vit_base_patch16_224", 768),
    _kaiko("vitb8", "vit_base_patch8_224", 768),
    _kaiko("vitl14", "vit_large_patch14_reg4_dinov2", 1024, image_size=518),
    EncoderCard(
        name="hipt-vit256",
        config=VIT256,
        dim=384,
        source="https://github.com/mahmoodlab/HIPT, HIPT_4K/Checkpoints/vit256_small_dino.pth",
        licence="Apache-2.0 with Commons Clause, non-commercial",
        mpp=(0.5,),
    ),
)
"""Published encoders that gigatome can load from a file that the user has; no weights come with gigatome."""


def save_encoder(
    encoder: TileEncoder,
    folder: str | Path,
    *,
    name: str | None = None,
    source: str = "",
    licence: str = "",
    mpp: tuple[float, ...] = (),
) -> EncoderCard:
    """Writes ``encoder.safetensors`` and ``encoder.json`` into ``folder``, and returns the card.

    Args:
        encoder: what to write; nothing but the transformer, without head or optimiser.
        folder: made if needed.
        name: short name; the encoder's own by default.
        source: where the weights come from, such as a recipe.
        licence: terms of the weights, if they are not one's own.
        mpp: resolutions it was trained at, µm per pixel.
    """
    folder = Path(folder)
    config = replace(encoder.config, weights=None, pretrained=False)
    card = EncoderCard(name or encoder.name, config, encoder.dim, source, licence, mpp)
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.vit.state_dict().items()}
    with atomic_path(folder / _WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    content = {"card": configuration.to_dict(card), "digest": encoder_digest(encoder)}
    write_atomic(folder / _CARD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return card


def load_encoder(spec: str | Path | TileEncoder, *, model: str | None = None) -> TileEncoder:
    """An encoder in evaluation mode, on the CPU.

    Args:
        spec: one of

            * an encoder, returned as it is;
            * a run folder of ``gigatome train``, also of a run that has not finished, or the folder of an encoder;
            * a file of weights with the model they are for, ``weights.pth?model=kaiko-vits16``: a name in
              :data:`PUBLISHED`, or a timm model, which is then fed images normalised with mean and std 0.5;
            * ``timm:NAME``, the weights and normalisation that timm publishes, fetched once and then cached.
        model: the model of a file of weights, if ``spec`` does not say it.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be read.
        RunError: the folder holds no encoder, or the weights are those of another model.
        ConfigError: the model of a file of weights is not given or not known.
    """
    if isinstance(spec, TileEncoder):
        return spec
    text = str(spec)
    if text.startswith("timm:"):
        return _timm_encoder(text.removeprefix("timm:")).eval()
    text, _, query = text.partition("?")
    path = Path(text)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise StoreError(
            f"{text}: no such encoder; give a run folder, the folder of an encoder, "
            "a file of weights as FILE?model=NAME, or timm:NAME"
        )
    return _read_file(path, model or _model_in(query, text))


def encoder_digest(encoder: TileEncoder) -> str:
    """Hash of all that decides an embedding, weights and normalisation: 16 hexadecimal digits."""
    config = encoder.config
    seen = (config.model, config.heads, config.mean, config.std, config.pos_embed)
    digest = hashlib.sha256(json.dumps(seen).encode())
    for key, value in sorted(encoder.vit.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def encoder_name(encoder: TileEncoder) -> str:
    """Name for files and folders that no encoder with other weights has, such as ``kaiko-vits16-5f0c9a1e``."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', encoder.name).strip('-')}-{encoder_digest(encoder)[:8]}"


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_folder(path: Path) -> TileEncoder:
    folder = next((folder for folder in (path, path / "encoder") if (folder / _CARD).is_file()), None)
    if folder is None:
        return _read_unfinished(path)
    try:
        content = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        card = configuration.parse(EncoderCard, content["card"], source=str(folder / _CARD))
        weights = load_file(folder / _WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, ConfigError) as error:
        raise RunError(f"{folder}: cannot be read as an encoder: {error}") from error
    encoder = restore_encoder(card.config, weights, source=str(folder / _WEIGHTS), name=card.name)
    if encoder_digest(encoder) != content["digest"]:
        raise RunError(f"{folder}: {_WEIGHTS} and {_CARD} do not belong together; write the encoder again")
    return encoder


def _read_unfinished(run: Path) -> TileEncoder:
    """The teacher in the last checkpoint of a run that has not written its encoder yet."""
    steps = sorted(run.glob("checkpoints/step-*/model.safetensors"), key=lambda path: (len(path.parent.name), path))
    if not steps or not (run / "recipe.yaml").is_file():
        raise RunError(f"{run}: is neither the folder of an encoder nor a run with a checkpoint")
    config = configuration.parse(
        EncoderConfig, configuration.read_yaml(run / "recipe.yaml").get("encoder", {}), source=str(run / "recipe.yaml")
    )
    log.warning("%s: the run has not finished; taking the teacher at %s", run, steps[-1].parent.name)
    return restore_encoder(config, read_weights(steps[-1]), source=str(steps[-1]), name=config.model)


def _read_file(path: Path, model: str) -> TileEncoder:
    weights = read_weights(path)
    card = next((card for card in PUBLISHED if card.name == model), None)
    if card is not None:
        return restore_encoder(card.config, weights, source=str(path), name=card.name)
    return restore_encoder(_config_for(model, weights), weights, source=str(path), name=path.stem)


def _config_for(model: str, weights: dict[str, Tensor]) -> EncoderConfig:
    """Configuration of timm's ``model`` with the image size that the position embedding in ``weights`` is for."""
    config = EncoderConfig(model=model)
    position, patch = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3 or patch.ndim != 4:
        return config
    side = math.isqrt(position.shape[1])  # the class and register tokens never complete another square
    return replace(config, image_size=side * patch.shape[-1])


def _model_in(query: str, text: str) -> str:
    options = dict(parse_qsl(query))
    if set(options) != {"model"}:
        names = ", ".join(card.name for card in PUBLISHED)
        raise ConfigError(f"{text}: say which model the weights are for, as {text}?model=NAME: {names} or a timm model")
    return options["model"]


def _timm_encoder(name: str) -> TileEncoder:
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if published is None:
        return build_encoder(EncoderConfig(model=name, pretrained=True), seed=0)
    config = EncoderConfig(
        model=name,
        image_size=published.input_size[-1],
        pretrained=True,
        mean=published.mean,  # pyright: ignore[reportArgumentType]
        std=published.std,  # pyright: ignore[reportArgumentType]
    )
    return build_encoder(config, seed=0)

"""Encoders on disk: those that gigatome trained, those that others published, and the cards that describe them.

An encoder's folder holds ``encoder.safetensors``, with timm's keys, and ``encoder.json``, its card.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import timm
from torch import Tensor

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.folders import (
    CARD_FILE,
    WEIGHTS_FILE,
    check_digest,
    find_folder,
    last_checkpoint,
    read_folder,
    unique_name,
    weights_digest,
    write_folder,
)
from gigatome.encoders.hub import HUB, WEIGHTS, fetch
from gigatome.encoders.others import fetch_rotary, is_rotary, pooling_of, restore
from gigatome.encoders.published import PUBLISHED, EncoderCard, published_card
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.weights import read_weights

_TIMM = "config.json"
_PUBLISHED = "hub:"
_LONGVIT = "is a LongViT; gigatome embed takes it at level tile, and gigatome.encoders.longvit_zoo opens it in Python"
_SIZES = {  # what timm calls the fields of EncoderConfig
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "reg_tokens": "registers",
    "init_values": "layer_scale",
}
_IMPLIED = {  # by the weights, or by what an encoder is
    "act_layer", "class_token", "dynamic_img_size", "global_pool", "in_chans", "mlp_layer", "mlp_ratio",
    "no_embed_class", "num_classes",
}  # fmt: skip


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
    config = replace(encoder.config, weights=None, pretrained=False)
    card = EncoderCard(name or encoder.name, config, encoder.dim, source, licence, mpp, pooling_of(encoder))
    content = {"card": configuration.to_dict(card), "digest": encoder_digest(encoder)}
    write_folder(Path(folder), encoder.vit, content)
    return card


def load_encoder(spec: str | Path | TileEncoder, *, model: str | None = None) -> TileEncoder:
    """An encoder in evaluation mode, on the CPU.

    Args:
        spec: one of

            * an encoder, returned as it is;
            * a run folder of ``gigatome train``, also of a run that has not finished, or the folder of an encoder;
            * a file of weights with the model they are for, ``weights.pth?model=kaiko-vits16``: a name in
              :data:`~gigatome.encoders.published.PUBLISHED`, or a timm model, which is then fed images normalised with
              mean and std 0.5;
            * ``hub:NAME``, the weights of a name in ``PUBLISHED``, fetched once and then cached;
            * ``timm:NAME``, the weights and normalisation that timm publishes;
            * ``hf-hub:OWNER/NAME``, a repository on the Hugging Face hub in timm's layout, or a folder in that layout.
        model: the model of a file of weights, if ``spec`` does not say it.

    Raises:
        StoreError: there is nothing at ``spec``, it cannot be fetched, or it cannot be read.
        RunError: the folder holds no encoder, or the weights are those of another model.
        ConfigError: the model of a file of weights is not given or not known.
    """
    return open_encoder(spec, model=model)[0]


def open_encoder(spec: str | Path | TileEncoder, *, model: str | None = None) -> tuple[TileEncoder, EncoderCard]:
    """An encoder as of :func:`load_encoder`, and its card."""
    if isinstance(spec, TileEncoder):
        return spec, _card_of(spec)
    text = str(spec)
    if text.startswith("timm:"):
        encoder = _timm_encoder(text.removeprefix("timm:")).eval()
        return encoder, _card_of(encoder, source=f"timm, {encoder.name}")
    if text.startswith(_PUBLISHED):
        card = _known(text.removeprefix(_PUBLISHED), text)
        return _read_published(fetch(card.hub), card)
    if text.startswith(HUB):
        repository = text.removeprefix(HUB)
        return _read_timm(fetch(repository, (_TIMM,)), fetch(repository), text)
    text, _, query = text.partition("?")
    path = Path(text)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise StoreError(
            f"{text}: no such encoder; give a run folder, the folder of an encoder, a file of weights as "
            f"FILE?model=NAME, {_PUBLISHED}NAME, timm:NAME or {HUB}OWNER/NAME"
        )
    return _read_file(path, model or _model_in(query, text))


def saved_digest(folder: str | Path) -> str:
    """:func:`encoder_digest` of the encoder that :func:`save_encoder` wrote into ``folder``; "" if there is none."""
    try:
        return str(json.loads((Path(folder) / CARD_FILE).read_text(encoding="utf-8"))["digest"])
    except (OSError, KeyError, TypeError, ValueError):
        return ""


def encoder_digest(encoder: TileEncoder) -> str:
    """Hash of all that decides an embedding, weights and normalisation: 16 hexadecimal digits."""
    config = encoder.config
    seen = [config.model, config.heads, config.mean, config.std, config.pos_embed]
    if pooling_of(encoder) != "cls":
        seen.append(pooling_of(encoder))
    return weights_digest(json.dumps(seen), encoder.vit.state_dict())


def encoder_name(encoder: TileEncoder) -> str:
    """Name for files and folders that no encoder with other weights has, such as ``kaiko-vits16-5f0c9a1e``."""
    return unique_name(encoder.name, encoder_digest(encoder))


def _read_folder(path: Path) -> tuple[TileEncoder, EncoderCard]:
    folder = find_folder(path)
    if folder is None:
        weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if weights and (path / _TIMM).is_file():
            return _read_timm(path / _TIMM, weights, str(path))
        return _read_unfinished(path)
    refusal = partial(_refusal, tile=folder / "tile")
    card, weights, digest = read_folder(folder, EncoderCard, what="an encoder", refusal=refusal)
    encoder = restore(card, weights, source=str(folder / WEIGHTS_FILE))
    check_digest(folder, encoder_digest(encoder), digest)
    return encoder, card


def _refusal(level: str, tile: Path) -> str:
    if level in ("pixels", "slide pixels"):
        return _LONGVIT
    return "" if level == "tile" else f"is an encoder of {level}s, not of tiles; that of its tiles is {tile}"


def _read_unfinished(run: Path) -> tuple[TileEncoder, EncoderCard]:
    """The teacher in the last checkpoint of a run that has not written its encoder yet."""
    last = last_checkpoint(run, "an encoder")
    recipe = configuration.read_yaml(run / "recipe.yaml")
    if recipe.get("level") == "pixels":
        raise RunError(f"{run}: {_LONGVIT}")
    config = configuration.parse(EncoderConfig, recipe.get("encoder", {}), source=str(run / "recipe.yaml"))
    log.warning("%s: the run has not finished; taking the teacher at %s", run, last.parent.name)
    card = EncoderCard(config.model, config, 0, source=f"gigatome, {last.parent.name} of an unfinished run")
    encoder = restore(card, read_weights(last), source=str(last))
    return encoder, replace(card, config=encoder.config, dim=encoder.dim, pooling=pooling_of(encoder))


def _read_file(path: Path, model: str) -> tuple[TileEncoder, EncoderCard]:
    card = published_card(model)
    if card is not None:
        return _read_published(path, card)
    weights = read_weights(path)
    config = _with_grid_of(EncoderConfig(model=model), weights)
    encoder = restore(EncoderCard(path.stem, config, 0), weights, source=str(path))
    return encoder, _card_of(encoder, source=path.name)


def _read_published(path: Path, card: EncoderCard) -> tuple[TileEncoder, EncoderCard]:
    weights = read_weights(path)
    card = replace(card, config=_with_grid_of(card.config, weights))
    return restore(card, weights, source=str(path)), card


def _read_timm(description: Path, path: Path, source: str) -> tuple[TileEncoder, EncoderCard]:
    """An encoder in timm's layout for the hub: a description of model and normalisation, and a file of weights."""
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        model, arguments = content["architecture"], content.get("model_args", {})
        facts = content.get("pretrained_cfg", content)
        mean, std = facts["mean"], facts["std"]
        ours = content.get("gigatome", {})  # what our export adds
        pos_embed, name = ours.get("pos_embed", "timm"), ours.get("name") or source.rstrip("/").rpartition("/")[2]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{description}: is not timm's description of a model: {error!r}") from error
    unknown = sorted(set(arguments) - set(_SIZES) - _IMPLIED)
    if unknown:
        raise ConfigError(f"{source}: gigatome cannot make {model} with {', '.join(unknown)}; load it by timm itself")
    weights = read_weights(path)
    fc1, fc2 = weights.get("blocks.0.mlp.fc1.weight"), weights.get("blocks.0.mlp.fc2.weight")
    values = {_SIZES[key]: value for key, value in arguments.items() if key in _SIZES and value is not None}
    values |= {"model": model, "mean": mean, "std": std, "pos_embed": pos_embed}
    if fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:
        values["ffn"] = "swiglu"
    config = _with_grid_of(configuration.parse(EncoderConfig, values, source=str(description)), weights)
    encoder = restore(EncoderCard(name, config, 0), weights, source=str(path))
    return encoder, _card_of(encoder, source=source, licence=str(facts.get("license", "")))


def _with_grid_of(config: EncoderConfig, weights: Mapping[str, Tensor]) -> EncoderConfig:
    """``config`` with the image size that the position embedding in ``weights`` is for."""
    position, patch = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3 or patch.ndim != 4:
        return config
    side = math.isqrt(position.shape[1])  # the class and register tokens never complete another square
    return replace(config, image_size=side * patch.shape[-1])


def _card_of(encoder: TileEncoder, *, source: str = "", licence: str = "") -> EncoderCard:
    config = replace(encoder.config, weights=None, pretrained=False)
    return EncoderCard(encoder.name, config, encoder.dim, source, licence, pooling=pooling_of(encoder))


def _known(name: str, text: str) -> EncoderCard:
    card = published_card(name)
    if card is None or not card.hub:
        names = ", ".join(card.name for card in PUBLISHED if card.hub)
        raise ConfigError(f"{text}: no published encoder to be fetched goes by that name; there are {names}")
    return card


def _model_in(query: str, text: str) -> str:
    options = dict(parse_qsl(query))
    if set(options) != {"model"}:
        names = ", ".join(card.name for card in PUBLISHED)
        raise ConfigError(f"{text}: say which model the weights are for, as {text}?model=NAME: {names} or a timm model")
    return options["model"]


def _timm_encoder(name: str) -> TileEncoder:
    if is_rotary(name):
        return fetch_rotary(name)
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

"""An encoder for other libraries: a folder in timm's layout, checked against gigatome, and code that loads it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.mlp import GluMlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.export_text import model_card, snippet
from gigatome.encoders.published import EncoderCard
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import open_encoder

Target = Literal["timm", "trident", "eva", "lazyslide"]

TARGETS: tuple[Target, ...] = get_args(Target)
"""Libraries that an encoder can be written for; all of them read timm's layout."""

_TOLERANCE = 1e-4  # share of the largest number in an embedding


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: holds ``model.safetensors``, ``config.json``, ``README.md`` and a Python file for each target but timm.
        card: the encoder's.
        files: names of the files.
        difference: largest difference between a number that gigatome and one that timm computes for the same tiles.
        scale: the largest number, for comparison.
        tiles: how many tiles they were compared on.
    """

    folder: Path
    card: EncoderCard
    files: tuple[str, ...]
    difference: float
    scale: float
    tiles: int


def export_encoder(spec: str | Path | TileEncoder, folder: str | Path, *, to: tuple[Target, ...] = TARGETS) -> Exported:
    """Writes an encoder for other libraries, and makes sure that timm computes the same from what was written.

    Args:
        spec: what :func:`gigatome.encoders.zoo.load_encoder` takes. Of a run it is the encoder that the method exports,
            or in an unfinished one the teacher at the last checkpoint; never a student.
        folder: must not exist, or be empty. It may be moved afterwards.
        to: libraries to write code for.

    Raises:
        ConfigError: the folder is in use, a target is unknown, or timm has no such encoder: a network that ends early,
            a pooling of its own.
        RunError: timm computes other embeddings.
        StoreError: the encoder cannot be read.
    """
    folder = Path(folder)
    unknown = [target for target in to if target not in TARGETS]
    if unknown:
        raise ConfigError(f"cannot export to {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty; give a new folder")
    encoder, card = open_encoder(spec)
    architecture, arguments = _timm_arguments(encoder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        state = {key: value.detach().cpu().contiguous() for key, value in encoder.vit.state_dict().items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        description = _description(encoder, card, architecture, arguments)
        texts = {"config.json": json.dumps(description, indent=2) + "\n"}
        texts |= {f"{target}_encoder.py": snippet(target, encoder, card) for target in to if target != "timm"}
        difference, scale, tiles = _compare(encoder, temporary, architecture, arguments)
        texts["README.md"] = model_card(encoder, card, tuple(sorted(texts)), difference, scale)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, card, tuple(sorted([*texts, "model.safetensors"])), difference, scale, tiles)


def _timm_arguments(encoder: TileEncoder) -> tuple[str, dict[str, Any]]:
    """The name and the arguments, all of them plain values, by which timm makes the encoder's network."""
    network: nn.Module = encoder.vit
    base = encoder.config.model.partition(".")[0]
    if type(encoder) is TileEncoder and isinstance(network, VisionTransformer):
        block: Any = network.blocks[0]
        gated = isinstance(block.mlp, GluMlp)
        if encoder.config.ffn is not None:  # a class, which a file cannot name: take it from a model that has it
            base = "vit_giant_patch14_dinov2" if gated else "vit_base_patch16_224"
        return base, {
            "img_size": network.patch_embed.img_size[0],  # pyright: ignore[reportOptionalSubscript]
            "patch_size": encoder.patch_size,
            "embed_dim": network.embed_dim,
            "depth": len(network.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": (block.mlp.fc1.out_features + 0.5) / network.embed_dim,  # timm rounds the product down
            "init_values": 1e-5 if hasattr(block.ls1, "gamma") else 0.0,
            "reg_tokens": network.num_reg_tokens,
            "no_embed_class": network.no_embed_class,
            "num_classes": 0,
            "global_pool": "token",
            "dynamic_img_size": True,
        }
    if "." not in encoder.config.model and timm.is_model(base) and "resnet" in base:
        return base, {"num_classes": 0}
    raise ConfigError(
        f"{encoder.name}: timm has no model that gives this embedding ({encoder.config.model}); only whole ResNets "
        "and vision transformers read at their class token can be exported"
    )


def _description(encoder: TileEncoder, card: EncoderCard, architecture: str, arguments: dict[str, Any]) -> dict:
    """What timm keeps in config.json."""
    config = encoder.config
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "license": card.licence,
        },
        "gigatome": {
            "name": card.name,
            "source": card.source,
            "mpp": list(card.mpp),
            "pooling": card.pooling,
            "pos_embed": config.pos_embed,
        },
    }


def _compare(
    encoder: TileEncoder, folder: Path, architecture: str, arguments: dict[str, Any]
) -> tuple[float, float, int]:
    """Embeds random tiles by gigatome and by timm from the files; largest difference, largest number, tiles."""
    model = timm.create_model(architecture, **arguments).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    side = encoder.config.image_size
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        images = encoder.normalise(tiles)
        ours, theirs = encoder(images), model(images.cpu())
    difference, scale = _largest(ours.cpu() - theirs), _largest(theirs)
    if not difference <= _TOLERANCE * scale:
        raise RunError(
            f"{encoder.name}: timm computes other embeddings than gigatome (they differ by {difference:g}, the largest "
            f"number is {scale:g}); nothing was written"
        )
    return difference, scale, len(tiles)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())

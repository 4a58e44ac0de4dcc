"""The texts beside an exported encoder: its card, and code by which other libraries load it."""

import shlex

from gigatome.core.errors import ConfigError
from gigatome.encoders.published import EncoderCard
from gigatome.encoders.vit import TileEncoder

_HEAD = '''"""{title}

{usage}
"""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torchvision.transforms import v2

NAME = "{name}"
FOLDER = Path(__file__).resolve().parent


def load_model() -> torch.nn.Module:
    """Maps images, float [B, 3, H, W] as `transform` makes them, to embeddings [B, {dim}].{sides}"""
    config = json.loads((FOLDER / "config.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()


transform = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize({mean}, {std}),
    ]
)
'''

_USAGE = {
    "trident": """Cut the tiles by TRIDENT{tiles}, then, beside this file:

    from trident_encoder import load_encoder
    slide.extract_patch_features(load_encoder(), coords_path, save_features="features", device="cuda")""",
    "eva": """Run any of eva's configurations for tiles with it:

    export MODEL_NAME={quoted} IN_FEATURES={dim} NORMALIZE_MEAN='{mean_list}' NORMALIZE_STD='{std_list}'
    python eva_encoder.py predict_fit --config configs/vision/pathology/offline/classification/bach.yaml""",
    "lazyslide": """Find tissue and cut tiles by LazySlide{tiles}, then, beside this file:

    from lazyslide_encoder import extract
    extract(wsi)                                  # table {name}_tiles""",
}

_TAIL = {
    "trident": '''

def load_encoder(precision: torch.dtype = torch.float32):
    """The encoder as TRIDENT takes it."""
    from trident.patch_encoder_models import CustomInferenceEncoder

    return CustomInferenceEncoder(enc_name=NAME, model=load_model(), transforms=transform, precision=precision)
''',
    "eva": '''

def register() -> None:
    """Makes the encoder known to eva under its name."""
    from eva.vision.models.networks.backbones import backbone_registry

    @backbone_registry.register(NAME)
    def _backbone(out_indices=None, **_) -> torch.nn.Module:
        if out_indices is not None:
            raise ValueError(f"{NAME} gives embeddings of whole tiles; out_indices is for segmentation")
        return load_model()


if __name__ == "__main__":
    from eva.core.cli import cli

    register()
    cli()
''',
    "lazyslide": '''

def extract(wsi, **options):
    """Embeds the slide's tiles; options are those of lazyslide.tl.feature_extraction."""
    import lazyslide

    return lazyslide.tl.feature_extraction(wsi, model=load_model(), transform=transform, model_name=NAME, **options)
''',
}

_TITLES = {"trident": "TRIDENT", "eva": "eva", "lazyslide": "LazySlide"}


def snippet(target: str, encoder: TileEncoder, card: EncoderCard) -> str:
    """Python file by which ``target`` loads the encoder from the folder that the file lies in.

    Raises:
        ConfigError: the name cannot stand in code.
    """
    name = card.name
    if not name.isprintable() or '"' in name or "\\" in name:
        raise ConfigError(f"{name!r}: an encoder of this name cannot be exported; give it one of letters and digits")
    patch, config = encoder.patch_size, encoder.config
    tiles = f" at {_mpp(card)} µm per pixel" if card.mpp else ""
    usage = _USAGE[target].format(
        name=name,
        quoted=shlex.quote(name),
        tiles=tiles,
        dim=encoder.dim,
        mean_list=list(config.mean),
        std_list=list(config.std),
    )
    text = _HEAD.format(
        title=f"{name} for {_TITLES[target]}.",
        usage=usage,
        name=name,
        dim=encoder.dim,
        sides=f" H and W are multiples of {patch}." if patch > 1 else "",
        mean=config.mean,
        std=config.std,
    )
    return text + _TAIL[target]


def model_card(encoder: TileEncoder, card: EncoderCard, files: tuple[str, ...], difference: float, scale: float) -> str:
    """README.md of the folder."""
    config = encoder.config
    lines = [
        "---",
        "library_name: timm",
        "tags: [pathology, feature-extraction]",
        "---",
        f"# {card.name}",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {config.model} |",
        f"| embedding | {encoder.dim} numbers, {_POOLINGS[card.pooling]} |",
        f"| trained at | {_mpp(card)} µm per pixel |" if card.mpp else "| trained at | not recorded |",
        f"| input | RGB, {config.image_size} px; scaled to 0 to 1, then mean {config.mean}, std {config.std} |",
        f"| source | {card.source or 'not recorded'} |",
        f"| licence | {card.licence or 'not recorded; say it before you publish the weights'} |",
        f"| check | timm and gigatome differ by {difference:.1e} at most; the largest number is {scale:.3g} |",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()    # timm 1.0.16 or newer',
        "```",
        "",
    ]
    if encoder.patch_size > 1 and config.pos_embed == "dino":
        lines += [
            f"Feed timm tiles of {config.image_size} px. At other sizes it interpolates the position embedding",
            "otherwise than gigatome and the code of DINO do it for these weights.",
            "",
        ]
    lines += [f"- `{name}`" for name in files if name.endswith(".py")]
    return "\n".join(lines).rstrip() + "\n"


_POOLINGS = {
    "cls": "the class token",
    "cls+mean": "the class token and the mean of the patch tokens",
    "mean": "the mean over all places",
}


def _mpp(card: EncoderCard) -> str:
    return ", ".join(f"{mpp:g}" for mpp in card.mpp)

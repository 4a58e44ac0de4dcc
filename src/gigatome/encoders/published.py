"""Cards of encoders, and those of the pathology encoders that others published."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from gigatome.encoders.hipt import VIT256
from gigatome.encoders.vit import EncoderConfig

Pooling = Literal["cls", "cls+mean", "mean"]

_IMAGENET = EncoderConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_LUNIT = EncoderConfig(mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464))
_BIOPTIMUS = EncoderConfig(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517))
_GIANT = "vit_giant_patch14_reg4_dinov2"
_HUGE = replace(_IMAGENET, model="vit_huge_patch14_224", ffn="swiglu", layer_scale=1e-5)


@dataclass(frozen=True)
class EncoderCard:
    """What one must know to use an encoder.

    Attributes:
        name: short name.
        config: architecture and normalisation.
        dim: size of an embedding.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        mpp: resolutions it was trained at, µm per pixel; empty if that is not known.
        pooling: how tokens become an embedding, after the last norm: ``"cls"``, the class token; ``"cls+mean"``, it and
            the mean of the patch tokens, one after the other; ``"mean"``, the mean over all places of a network without
            a class token.
        input_size: side in pixels of the tiles that its authors give it; None for ``config.image_size``.
        hub: repository on the Hugging Face hub that holds the weights, ``OWNER/NAME``.
        gated: the hub gives the weights only to those who have accepted the authors' terms.
    """

    name: str
    config: EncoderConfig
    dim: int
    source: str = ""
    licence: str = ""
    mpp: tuple[float, ...] = ()
    pooling: Pooling = "cls"
    input_size: int | None = None
    hub: str = ""
    gated: bool = False


def _kaiko(name: str, model: str, dim: int, image_size: int = 224) -> EncoderCard:
    return EncoderCard(
        name=f"kaiko-{name}",
        config=EncoderConfig(model=model, image_size=image_size),
        dim=dim,
        source="https://github.com/kaiko-ai/towards_large_pathology_fms, release 0.0.1",
        licence="Kaiko non-commercial licence",
        mpp=(0.25, 0.5, 1.0, 2.0),
        input_size=224,
        hub=f"1aurent/{model}.kaiko_ai_towards_large_pathology_fms",
    )


def _lunit(patch: int) -> EncoderCard:
    return EncoderCard(
        name=f"lunit-vits{patch}",
        config=replace(_LUNIT, model=f"vit_small_patch{patch}_224"),
        dim=384,
        source="https://github.com/lunit-io/benchmark-ssl-pathology, DINO",
        licence="Lunit non-commercial licence",
        mpp=(0.25, 0.5),
        hub=f"1aurent/vit_small_patch{patch}_224.lunit_dino",
    )


def _on_hub(name: str, hub: str, config: EncoderConfig, dim: int, licence: str, **facts: Any) -> EncoderCard:
    source = f"https://huggingface.co/{hub}"
    return replace(EncoderCard(name, config, dim, source, licence, hub=hub, input_size=224), **facts)


def _dinov2(size: str, dim: int, registers: bool) -> EncoderCard:
    # without registers, the authors resize the position embedding as in DINO; with them, as timm does
    model = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    return _on_hub(
        f"dinov2-vit{size[0]}14{'-reg4' if registers else ''}",
        f"timm/{model}.lvd142m",
        replace(_IMAGENET, model=model, image_size=518, pos_embed="timm" if registers else "dino"),
        dim,
        "Apache-2.0",
    )


def _dinov3(size: str, dim: int) -> EncoderCard:
    model = f"vit_{size}_patch16_dinov3"
    config = replace(_IMAGENET, model=model, image_size=256)
    return _on_hub(f"dinov3-vit{size[0]}16", f"timm/{model}.lvd1689m", config, dim, "DINOv3 licence", input_size=256)


PUBLISHED: tuple[EncoderCard, ...] = (
    _kaiko("vits16", "vit_small_patch16_224", 384),
    _kaiko("vits8", "vit_small_patch8_224", 384),
    _kaiko("vitb16", "vit_base_patch16_224", 768),
    _kaiko("vitb8", "vit_base_patch8_224", 768),
    _kaiko("vitl14", "vit_large_patch14_reg4_dinov2", 1024, image_size=518),
    _on_hub(
        "midnight-12k",
        "kaiko-ai/midnight",
        EncoderConfig("vit_giant_patch14_dinov2", image_size=224),
        3072,
        "MIT",
        mpp=(0.25, 0.5, 1.0, 2.0),
        pooling="cls+mean",
    ),
    EncoderCard(
        name="hipt-vit256",
        config=VIT256,
        dim=384,
        source="https://github.com/mahmoodlab/HIPT, HIPT_4K/Checkpoints/vit256_small_dino.pth",
        licence="Apache-2.0 with Commons Clause, non-commercial",
        mpp=(0.5,),
        input_size=256,
    ),
    _lunit(16),
    _lunit(8),
    _on_hub(
        "phikon",
        "owkin/phikon",
        replace(_IMAGENET, model="vit_base_patch16_224"),
        768,
        "Owkin non-commercial licence",
        mpp=(0.5,),
    ),
    _on_hub(
        "phikon-v2",
        "owkin/phikon-v2",
        replace(_IMAGENET, model="vit_large_patch16_224", layer_scale=1.0),
        1024,
        "Owkin non-commercial licence",
        mpp=(0.5,),
    ),
    _on_hub(
        "uni",
        "MahmoodLab/UNI",
        replace(_IMAGENET, model="vit_large_patch16_224", layer_scale=1e-5),
        1024,
        "CC-BY-NC-ND-4.0",
        mpp=(0.5,),
        gated=True,
    ),
    _on_hub(
        "uni2-h",
        "MahmoodLab/UNI2-h",
        replace(_IMAGENET, model=_GIANT, image_size=224, depth=24, registers=8),
        1536,
        "CC-BY-NC-ND-4.0",
        gated=True,
    ),
    _on_hub("virchow", "paige-ai/Virchow", _HUGE, 2560, "Apache-2.0", mpp=(0.5,), pooling="cls+mean", gated=True),
    _on_hub(
        "virchow2",
        "paige-ai/Virchow2",
        replace(_HUGE, registers=4),
        2560,
        "CC-BY-NC-ND-4.0",
        mpp=(0.25, 0.5, 1.0, 2.0),
        pooling="cls+mean",
        gated=True,
    ),
    _on_hub(
        "gigapath",
        "prov-gigapath/prov-gigapath",
        replace(_IMAGENET, model="vit_giant_patch14_dinov2", image_size=224, patch_size=16),
        1536,
        "Apache-2.0 with conditions of use",
        mpp=(0.5,),
        gated=True,
    ),
    _on_hub(
        "h-optimus-0",
        "bioptimus/H-optimus-0",
        replace(_BIOPTIMUS, model=_GIANT, image_size=224),
        1536,
        "Apache-2.0",
        mpp=(0.5,),
    ),
    _on_hub(
        "h-optimus-1",
        "bioptimus/H-optimus-1",
        replace(_BIOPTIMUS, model=_GIANT, image_size=224),
        1536,
        "CC-BY-NC-ND-4.0",
        mpp=(0.5,),
        gated=True,
    ),
    _on_hub(
        "ctranspath",
        "1aurent/swin_tiny_patch4_window7_224.CTransPath",
        replace(_IMAGENET, model="ctranspath"),
        768,
        "GPL-3.0",
        pooling="mean",
    ),
    _on_hub(
        "resnet50-layer3",
        "timm/resnet50.tv_in1k",
        replace(_IMAGENET, model="resnet50.layer3"),
        1024,
        "BSD-3-Clause",
        pooling="mean",
    ),
    *(
        _dinov2(*facts, registers)
        for facts in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
        for registers in (False, True)
    ),
    *(_dinov3(*facts) for facts in (("small", 384), ("base", 768), ("large", 1024))),
)
"""Published encoders that gigatome loads from a file that the user has, or fetches; no weights come with gigatome."""


def published_card(name: str) -> EncoderCard | None:
    """The card of that name in :data:`PUBLISHED`."""
    return next((card for card in PUBLISHED if card.name == name), None)

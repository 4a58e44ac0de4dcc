"""Weights as others name them, renamed as timm names them."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TRANSFORMERS = (
    (r"^embeddings\.(cls_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
_TRANSFORMERS_EXTRA = ("pooler.", "embeddings.mask_token")
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_QUERY = re.compile(r"\.attention\.attention\.query\.(weight|bias)$")


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under timm's names; those that have them already are left as they are.

    Known are the vision transformers of Hugging Face's transformers (``ViTModel``, ``Dinov2Model`` with and without
    registers), the code of DINOv2 (registers, gated MLP, blocks in chunks as FSDP stores them), and Swin transformers
    of timm before 0.9 (CTransPath).
    """
    prefix = next((key.removesuffix(_PATCHES) for key in weights if key.endswith(_PATCHES)), None)
    if prefix is not None:
        return _from_transformers({key.removeprefix(prefix): value for key, value in weights.items()})
    if "layers.0.downsample.reduction.weight" in weights:
        return _from_old_swin(weights)
    return _from_dinov2(weights)


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in weights.items():
        if key.startswith(_TRANSFORMERS_EXTRA):
            continue
        if query := _QUERY.search(key):
            names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            value = torch.cat([weights[name] for name in names if name in weights])
            key = key[: query.start()] + f".attn.qkv.{query[1]}"
        elif ".attention.attention." in key:
            continue  # the query has brought them
        for pattern, name in _TRANSFORMERS:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


def _from_dinov2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in weights.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # the number in front is the chunk's
        key = re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", key)
        key = re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", key)
        found["reg_token" if key == "register_tokens" else key] = value
    return found


def _from_old_swin(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stage's downsampling stood at its end, and stands at the next one's beginning."""
    found = {}
    for key, value in weights.items():
        if key.endswith(("attn_mask", "relative_position_index")):
            continue  # follow from the architecture
        stage = re.match(r"layers\.(\d+)\.downsample\.", key)
        found[f"layers.{int(stage[1]) + 1}.{key[stage.end(1) + 1 :]}" if stage else key] = value
    return found

import re

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.layers.pos_embed import resample_abs_pos_embed

from gigatome.core.errors import RunError, StoreError
from gigatome.encoders.vit import EncoderConfig, build_encoder, restore_encoder
from gigatome.encoders.weights import encoder_weights, load_weights, read_weights, resize_grid

PLAIN = EncoderConfig("vit_tiny_patch16_224", image_size=64, patch_size=8, dim=32, depth=3, heads=2)
REGISTERS = EncoderConfig("vit_small_patch14_reg4_dinov2", image_size=70, dim=32, depth=3, heads=2)
GATED = EncoderConfig("vit_giant_patch14_dinov2", image_size=70, dim=48, depth=3, heads=2)


def state(config):
    """Weights without two alike."""
    generator = torch.Generator().manual_seed(0)
    found = build_encoder(config, seed=0).vit.state_dict()
    return {key: torch.randn(value.shape, generator=generator) for key, value in found.items()}


def same(weights, expected):
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


def renamed(weights, *rules):
    for pattern, name in rules:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights


def as_transformers(weights, *rules):
    """timm's names of a vision transformer as those of Hugging Face's transformers."""
    found = {}
    for key, value in weights.items():
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            found[key] = value
    return renamed(
        found,
        (r"^(cls_token)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        *rules,
        (r"^blocks\.", "encoder.layer."),
    )


@pytest.mark.parametrize("prefix", ["", "vit.", "model.dinov2."])
def test_a_vit_of_transformers(prefix):
    rules = (
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    theirs = as_transformers(state(PLAIN), *rules) | {"pooler.dense.weight": torch.zeros(2, 2)}
    same(encoder_weights({prefix + key: value for key, value in theirs.items()}, source="phikon"), state(PLAIN))


@pytest.mark.parametrize("config", [REGISTERS, GATED], ids=["registers", "gated MLP"])
def test_a_dinov2_of_transformers(config):
    rules = [(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1")]
    if config is GATED:
        rules += [(r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out.")]
    theirs = as_transformers(state(config), *rules) | {"embeddings.mask_token": torch.zeros(1, 32)}
    same(encoder_weights(theirs, source="phikon-v2"), state(config))


@pytest.mark.parametrize(
    ("kind", "options", "config"),
    [
        ("ViT", {}, PLAIN),
        ("Dinov2", {}, EncoderConfig("vit_small_patch14_dinov2", image_size=70, dim=32, depth=3, heads=2)),
        ("Dinov2", {"use_swiglu_ffn": True}, GATED),
        ("Dinov2WithRegisters", {}, REGISTERS),
    ],
    ids=["ViT", "DINOv2", "gated MLP", "registers"],
)
def test_embeddings_are_those_of_transformers_where_it_is_installed(tmp_path, kind, options, config):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": config.dim, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": config.image_size, "patch_size": config.patch_size or 14, "layer_norm_eps": 1e-6}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **options)).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    encoder = restore_encoder(config, read_weights(tmp_path / "model.safetensors"), source="hub", name="x")
    images = torch.rand(2, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        expected = model(images).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_dinov2s_training():
    expected = state(REGISTERS)
    theirs = renamed(
        expected,
        (r"^blocks\.(\d+)", lambda block: f"blocks.{int(block[1]) // 2}.{block[1]}"),  # two blocks a chunk
        (r"^reg_token", "register_tokens"),
        (r"^", "backbone."),
    )
    theirs |= {"dino_head.mlp.0.weight": torch.zeros(2), "ibot_head.mlp.0.weight": torch.zeros(2)}
    theirs["backbone.mask_token"] = torch.zeros(1, 32)
    same(encoder_weights({"teacher": theirs, "student": {}}, source="teacher_checkpoint.pth"), expected)
    gated = renamed(state(GATED), (r"\.fc1\.", ".w12."), (r"\.fc2\.", ".w3."))
    same(encoder_weights(gated, source="dinov2_vitg14_pretrain.pth"), state(GATED))


@pytest.mark.parametrize(("trained", "average"), [("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder")])
def test_the_trained_network_of_mocos_checkpoint(trained, average):
    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    networks = {f"module.{trained}.{key}": value for key, value in weights.items()}
    networks |= {f"module.{average}.{key}": value + 1 for key, value in weights.items()}
    networks |= {f"module.{trained}.fc.0.weight": torch.zeros(2), "module.queue": torch.zeros(2, 2)}
    same(encoder_weights({"state_dict": networks, "arch": "resnet18"}, source="moco.pth.tar"), weights)


def test_downsampling_of_an_old_swin_is_the_next_stages():
    names = ("reduction.weight", "norm.weight")
    theirs = {f"layers.{i}.downsample.{name}": torch.tensor(i) for i in range(3) for name in names}
    theirs |= {"layers.0.blocks.1.attn_mask": torch.zeros(1), "norm.weight": torch.zeros(1)}
    theirs |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(1)}
    found = encoder_weights({"model": theirs}, source="ctranspath.pth")
    assert {key: int(value) for key, value in found.items() if "downsample" in key} == {
        f"layers.{i + 1}.downsample.{name}": i for i in range(3) for name in names
    }
    assert sorted(set(found) - {key for key in found if "downsample" in key}) == ["norm.weight"]


@pytest.mark.parametrize("side", [4, 11])
def test_a_position_embedding_of_another_grid_is_interpolated(side):
    weights = state(PLAIN)
    model = build_encoder(EncoderConfig(**{**vars(PLAIN), "image_size": 8 * side}), seed=1)
    load_weights(model.vit, weights, source="file")
    expected = resample_abs_pos_embed(weights["pos_embed"], [side, side], num_prefix_tokens=1)
    torch.testing.assert_close(model.vit.pos_embed.detach(), expected)
    load_weights(model.vit, weights, source="file", pos_embed="dino")
    grid = weights["pos_embed"][:, 1:].unflatten(1, (8, 8))
    assert torch.equal(model.vit.pos_embed[:, 1:], resize_grid(grid, side, side, how="dino").flatten(1, 2))
    assert not torch.allclose(model.vit.pos_embed.detach(), expected)


def test_dinos_interpolation_is_what_its_encoders_do():
    encoder = build_encoder(EncoderConfig(**{**vars(PLAIN), "pos_embed": "dino"}), seed=1)
    grid = encoder.vit.pos_embed[:, 1:].unflatten(1, (8, 8))
    assert torch.equal(resize_grid(grid, 5, 9, how="dino").flatten(1, 2), encoder._position(5, 9)[:, 1:])


@pytest.mark.parametrize("only_class", [True, False], ids=["DINOv2's, for the class", "Virchow2's, for all"])
def test_positions_of_tokens_join_the_tokens(only_class):
    weights = state(REGISTERS)
    places = torch.randn(1, 1 if only_class else 5, 32, generator=torch.Generator().manual_seed(1))
    weights["pos_embed"] = torch.cat([places, weights["pos_embed"]], 1)
    encoder = restore_encoder(REGISTERS, weights, source="file", name="x")
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=70, embed_dim=32, depth=3, num_heads=2, num_classes=0,
        no_embed_class=only_class,
    ).eval()  # fmt: skip
    if only_class:  # which timm's own reader of DINOv2's files adds in the same way
        weights["cls_token"] = weights["cls_token"] + places
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    model.load_state_dict(weights)
    images = torch.rand(2, 3, 70, 70, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), model(images))


def test_positions_that_cannot_be_made_to_fit():
    weights = state(PLAIN)
    weights["pos_embed"] = torch.cat([weights["pos_embed"], torch.zeros(1, 2, 32)], 1)
    with pytest.raises(RunError, match=r"of another shape: pos_embed \(\[1, 67, 32\] in the file, \[1, 65, 32\]"):
        load_weights(build_encoder(PLAIN, seed=0).vit, weights, source="file")


def failure(kind, text=""):
    """An error of the hub's, without the response that its constructor asks for."""
    return kind.__new__(kind, text)


def hub(monkeypatch, files=(), error=None):
    """A hub that has these files, and fails like this for others; what it is asked for is noted."""
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name in files:
            return files[name]
        raise error or failure(RemoteEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_weights_from_the_hub(monkeypatch, tmp_path):
    torch.save(state(PLAIN), tmp_path / "pytorch_model.bin")
    asked = hub(monkeypatch, {"pytorch_model.bin": str(tmp_path / "pytorch_model.bin")})
    same(read_weights("hf-hub:owner/name"), state(PLAIN))
    assert asked == [("owner/name", "model.safetensors"), ("owner/name", "pytorch_model.bin")]
    started = build_encoder(EncoderConfig(**{**vars(PLAIN), "weights": "hf-hub:owner/name"}), seed=0)
    assert torch.equal(started.vit.pos_embed, state(PLAIN)["pos_embed"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (failure(GatedRepoError), r"accept their terms at https://huggingface.co/o/n; .*HF_TOKEN, or give the file"),
        (failure(RepositoryNotFoundError), "no such repository, or it is closed to you"),
        (LocalEntryNotFoundError("no network"), r"cannot be fetched \(no network\); fetch it on another machine"),
        (OSError("disk full"), r"cannot be fetched \(disk full\)"),
        (None, "has no model.safetensors or pytorch_model.bin"),
    ],
    ids=["gated", "unknown", "offline", "other", "empty"],
)
def test_a_hub_that_gives_nothing(monkeypatch, error, message):
    hub(monkeypatch, error=error)
    with pytest.raises(StoreError, match=message):
        read_weights("hf-hub:o/n")


def test_a_cache_that_has_the_second_name_alone(monkeypatch, tmp_path):
    torch.save(state(PLAIN), tmp_path / "pytorch_model.bin")
    files = {"pytorch_model.bin": str(tmp_path / "pytorch_model.bin")}
    hub(monkeypatch, files, LocalEntryNotFoundError("no network"))
    same(read_weights("hf-hub:o/n"), state(PLAIN))

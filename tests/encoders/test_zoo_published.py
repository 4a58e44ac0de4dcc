"""Cards of published encoders against what their authors publish: keys, shapes, sizes, normalisation."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders import zoo
from gigatome.encoders.others import PooledEncoder, RotaryEncoder, _ConvStem, _create, restore
from gigatome.encoders.published import PUBLISHED, EncoderCard, published_card
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.weights import encoder_weights
from gigatome.encoders.zoo import encoder_digest, encoder_name, load_encoder, open_encoder, save_encoder

TINY = EncoderConfig("vit_tiny_patch16_224", image_size=64, patch_size=8, dim=32, depth=2, heads=2)
VITS = {  # name: (width, depth, patch, positions in the authors' file, registers, LayerScale, width of fc1, of fc2)
    "midnight-12k": (1536, 40, 14, 257, 0, True, 8192, 4096),
    "lunit-vits16": (384, 12, 16, 197, 0, False, 1536, 1536),
    "lunit-vits8": (384, 12, 8, 785, 0, False, 1536, 1536),
    "phikon": (768, 12, 16, 197, 0, False, 3072, 3072),
    "phikon-v2": (1024, 24, 16, 197, 0, True, 4096, 4096),
    "uni": (1024, 24, 16, 197, 0, True, 4096, 4096),
    "uni2-h": (1536, 24, 14, 256, 8, True, 8192, 4096),
    "virchow": (1280, 32, 14, 257, 0, True, 6832, 3416),
    "virchow2": (1280, 32, 14, 261, 4, True, 6832, 3416),
    "gigapath": (1536, 40, 16, 197, 0, True, 8192, 4096),
    "h-optimus-0": (1536, 40, 14, 256, 4, True, 8192, 4096),
    "h-optimus-1": (1536, 40, 14, 256, 4, True, 8192, 4096),
    "dinov2-vits14": (384, 12, 14, 1370, 0, True, 1536, 1536),
    "dinov2-vits14-reg4": (384, 12, 14, 1369, 4, True, 1536, 1536),
    "dinov2-vitb14": (768, 12, 14, 1370, 0, True, 3072, 3072),
    "dinov2-vitb14-reg4": (768, 12, 14, 1369, 4, True, 3072, 3072),
    "dinov2-vitl14": (1024, 24, 14, 1370, 0, True, 4096, 4096),
    "dinov2-vitl14-reg4": (1024, 24, 14, 1369, 4, True, 4096, 4096),
    "dinov2-vitg14": (1536, 40, 14, 1370, 0, True, 8192, 4096),
    "dinov2-vitg14-reg4": (1536, 40, 14, 1369, 4, True, 8192, 4096),
}
MILLIONS = {  # of weights, as their authors or lists of models print them
    "phikon": 85.8, "phikon-v2": 303.4, "uni": 303.4, "uni2-h": 681.4, "virchow": 632, "gigapath": 1134.95,
    "lunit-vits8": 21.7, "ctranspath": 27.5,
}  # fmt: skip


def authors_file(dim, depth, patch, positions, registers, scaled, fc1, fc2):
    """Names and shapes of a vision transformer's weights, without memory behind them."""
    found = {"cls_token": (1, 1, dim), "pos_embed": (1, positions, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    found |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    found |= {"reg_token": (1, registers, dim)} if registers else {}
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (fc1, dim), "mlp.fc2": (dim, fc2)}
    for block in range(depth):
        for name, shape in layers.items():
            found |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[f"blocks.{block}.{name}"] = (dim,)
        found |= {f"blocks.{block}.ls{i}.gamma": (dim,) for i in (1, 2)} if scaled else {}
    return {key: torch.empty(shape, device="meta") for key, shape in found.items()}


def images(side=64):
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def embed(encoder, side=64):
    with torch.inference_mode():
        return encoder(encoder.normalise(images(side)))


@pytest.mark.parametrize("name", VITS)
def test_the_card_takes_the_authors_file(name):
    card = published_card(name)
    weights = encoder_weights(authors_file(*VITS[name]), source=name)
    encoder = restore(replace(card, config=zoo._with_grid_of(card.config, weights)), weights, source=name)
    assert encoder.dim == card.dim == VITS[name][0] * (2 if card.pooling == "cls+mean" else 1)
    assert encoder.patch_size == VITS[name][2]
    assert encoder.config == card.config  # the file's grid is the card's
    assert (card.input_size or card.config.image_size) % encoder.patch_size == 0
    if name in MILLIONS:
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)


def test_every_card_is_whole():
    names = [card.name for card in PUBLISHED]
    assert len(set(names)) == len(names)
    tested = {*VITS, *(name for name in names if name.startswith(("kaiko-", "dinov3-")))}
    assert set(names) == tested | {"hipt-vit256", "ctranspath", "resnet50-layer3"}
    for card in PUBLISHED:
        assert card.licence, card.name
        assert card.source.startswith("https://"), card.name
        assert card.hub or card.name == "hipt-vit256"
        assert card.config.weights is None, card.name
        assert not card.config.pretrained, card.name


def test_virchows_embedding_is_the_class_token_and_the_mean_of_the_patches():
    config = EncoderConfig(**{**vars(TINY), "registers": 4, "ffn": "swiglu", "layer_scale": 1e-5})
    base = build_encoder(config, seed=0).eval()
    card = EncoderCard("pooled", config, 64, pooling="cls+mean")
    pooled = restore(card, base.vit.state_dict(), source="file")
    with torch.inference_mode():
        tokens = base.vit.forward_features(base.normalise(images()))
    torch.testing.assert_close(embed(pooled), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))
    assert pooled.attention(pooled.normalise(images())).shape == (2, 2, 8, 8)
    assert encoder_digest(pooled) != encoder_digest(base)


@pytest.mark.parametrize("kind", ["pooled", "rotary", "ctranspath", "resnet"])
def test_other_encoders_are_saved_and_come_back(tmp_path, kind, ctranspath):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        side = 224 if kind == "ctranspath" else 64
        if kind == "pooled":
            encoder = PooledEncoder(build_encoder(TINY, seed=0).vit, TINY, "pooled").eval()
        elif kind == "rotary":
            encoder = rotary(tmp_path)
        elif kind == "ctranspath":
            encoder = ctranspath[0]
        else:
            encoder = build_encoder(EncoderConfig("resnet18.layer3", image_size=64), seed=0).eval()
    card = save_encoder(encoder, tmp_path / "saved", mpp=(0.5,))
    back, read = open_encoder(tmp_path / "saved")
    assert torch.equal(embed(back, side), embed(encoder, side))
    assert embed(back, side).shape == (2, card.dim) == (2, back.dim)
    assert (type(back), read, encoder_name(back)) == (type(encoder), card, encoder_name(encoder))
    assert card.pooling == {"pooled": "cls+mean", "rotary": "cls"}.get(kind, "mean")


def rotary(folder):
    network = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    save_file(network.state_dict(), folder / "dinov3.safetensors")
    return load_encoder(f"{folder}/dinov3.safetensors?model=dinov3-vits16")


@pytest.fixture(scope="module")
def ctranspath(tmp_path_factory):
    """Encoder from a made-up file with the authors' names, which are those of timm 0.5; and the file."""
    path = tmp_path_factory.mktemp("ctranspath") / "ctranspath.pth"
    weights = {}
    for key, value in _create("swin_tiny_patch4_window7_224", embed_layer=_ConvStem).state_dict().items():
        stage, _, rest = key.partition(".downsample.")
        weights[f"layers.{int(stage[-1]) - 1}.downsample.{rest}" if rest else key] = value
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": weights}, path)
    encoder, card = open_encoder(f"{path}?model=ctranspath")
    assert card == published_card("ctranspath")
    return encoder, path


def test_dinov3_is_timms(tmp_path):
    encoder = rotary(tmp_path)
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, global_pool="token").eval()
    model.load_state_dict(encoder.vit.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(embed(encoder, 80), model(encoder.normalise(images(80))))
    assert isinstance(encoder, RotaryEncoder)
    with pytest.raises(ConfigError, match="do not divide into patches of 16 px"):
        embed(encoder, 60)
    with pytest.raises(ConfigError, match="attention maps need a plain vision transformer"):
        encoder.attention(torch.zeros(1, 3, 64, 64))


def test_ctranspath_sees_its_size_alone(ctranspath):
    encoder, path = ctranspath
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(MILLIONS["ctranspath"], rel=2e-3)
    with pytest.raises(ConfigError, match="takes tiles of 224 px alone"):
        embed(encoder, 256)
    with pytest.raises(RunError, match=r"the weights do not fit the model; .*missing"):
        load_encoder(path, model="uni")


def test_a_published_encoder_is_fetched_by_its_name(tmp_path, monkeypatch):
    card = EncoderCard("mine", TINY, 32, hub="owner/mine", licence="MIT")
    weights = build_encoder(TINY, seed=0).vit.state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(zoo, "published_card", lambda name: card if name == "mine" else None)
    monkeypatch.setattr(zoo, "fetch", lambda name: asked.append(name) or tmp_path / "model.safetensors")
    encoder, read = open_encoder("hub:mine")
    assert (asked, read, encoder.name) == (["owner/mine"], card, "mine")
    with pytest.raises(
        ConfigError, match=r"hub:unii: no published encoder to be fetched goes by that name; there are "
    ):
        open_encoder("hub:unii")


def timm_folder(folder, model="vit_tiny_patch16_224", **arguments):
    folder.mkdir()
    network = timm.create_model(model, num_classes=0, **arguments)
    save_file(network.state_dict(), folder / "model.safetensors")
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "license": "mit"}
    content = {"architecture": model, "num_classes": 0, "model_args": arguments, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(content))
    return network.eval()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_repository_in_timms_layout(tmp_path, monkeypatch, where):
    arguments = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 2, "reg_tokens": 8}
    arguments |= {"init_values": 1e-5, "no_embed_class": True}
    network = timm_folder(tmp_path / "uni2", "vit_giant_patch14_dinov2", **arguments)
    monkeypatch.setattr(zoo, "fetch", lambda _, names=("model.safetensors",): tmp_path / "uni2" / names[0])
    encoder, card = open_encoder(tmp_path / "uni2" if where == "folder" else "hf-hub:owner/uni2")
    with torch.inference_mode():
        torch.testing.assert_close(embed(encoder, 56), network(encoder.normalise(images(56))))
    assert (encoder.config.mean, encoder.config.std, encoder.name) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "uni2")
    assert card.licence == "mit"


def test_repositories_that_cannot_be_read(tmp_path):
    timm_folder(tmp_path / "a", img_size=32, embed_dim=48, depth=1, num_heads=1, qk_norm=True)
    with pytest.raises(ConfigError, match="cannot make vit_tiny_patch16_224 with qk_norm; load it by timm itself"):
        load_encoder(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="is not timm's description of a model"):
        load_encoder(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(RunError, match="neither the folder of an encoder nor a run"):
        load_encoder(tmp_path / "a")
    with pytest.raises(StoreError, match="hub:NAME, timm:NAME or hf-hub:OWNER/NAME"):
        load_encoder("uni")


def test_weights_of_dinov3_from_timm(monkeypatch):
    create = timm.create_model
    asked = []

    def offline(name, *, pretrained=False, **options):
        asked.append((name, pretrained))
        return create(name.partition(".")[0], **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = load_encoder("timm:vit_small_patch16_dinov3.lvd1689m")
    assert asked == [("vit_small_patch16_dinov3.lvd1689m", True)]
    assert (encoder.config.image_size, encoder.config.std) == (256, (0.229, 0.224, 0.225))

    def unreachable(*_args, **_kwargs):
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(StoreError, match="not in the cache and cannot be fetched"):
        load_encoder("timm:vit_small_patch16_dinov3.lvd1689m")


def test_poolings_that_a_network_does_not_have(tmp_path):
    weights = build_encoder(TINY, seed=0).vit.state_dict()
    with pytest.raises(ConfigError, match="pooling mean is not there for vit_tiny_patch16_224"):
        restore(EncoderCard("x", TINY, 32, pooling="mean"), weights, source="file")

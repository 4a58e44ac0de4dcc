import argparse
import json
import pickle
import shutil

import pytest
import timm
import torch

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.hipt import load_vit256
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import PUBLISHED, encoder_digest, encoder_name, load_encoder, save_encoder
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.checkpoint import save_checkpoint

TINY = EncoderConfig(model="vit_tiny_patch16_224", image_size=64, patch_size=8, dim=32, depth=2, heads=2)
KAIKO = {  # model: (dim, patch, positions, depth, registers and LayerScale)
    "kaiko-vits16": (384, 16, 197, 12, False),
    "kaiko-vits8": (384, 8, 785, 12, False),
    "kaiko-vitb16": (768, 16, 197, 12, False),
    "kaiko-vitb8": (768, 8, 785, 12, False),
    "kaiko-vitl14": (1024, 14, 1369, 24, True),
}


def shapes(dim, patch, positions, depth, registers):
    """Keys and shapes of a vision transformer's state dict, as the published files have them."""
    found = {"cls_token": (1, 1, dim), "pos_embed": (1, positions, dim)}
    found |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    found |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    found |= {"reg_token": (1, 4, dim)} if registers else {}
    for block in range(depth):
        linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim)}
        linears |= {"mlp.fc2": (dim, 4 * dim)}
        for name, shape in linears.items():
            found |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            found |= {f"blocks.{block}.{name}.weight": (dim,), f"blocks.{block}.{name}.bias": (dim,)}
        found |= {f"blocks.{block}.ls{i}.gamma": (dim,) for i in (1, 2)} if registers else {}
    return found


def zeros(found):
    return {key: torch.zeros(shape) for key, shape in found.items()}


def embed(encoder):
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return encoder(encoder.normalise(images))


@pytest.fixture
def encoder():
    config = EncoderConfig(**{**vars(TINY), "mean": (0.4, 0.5, 0.6), "pos_embed": "dino"})
    return build_encoder(config, seed=3, name="our own").eval()


@pytest.mark.parametrize("folder", ["", "encoder"], ids=["encoder folder", "run folder"])
def test_what_is_saved_comes_back(tmp_path, encoder, folder):
    card = save_encoder(encoder, tmp_path / folder, source="a recipe", mpp=(0.5, 1.0))
    back = load_encoder(tmp_path)
    assert torch.equal(embed(back), embed(encoder))
    assert (back.config, back.name, back.training) == (encoder.config, "our own", False)
    assert encoder_name(back) == encoder_name(encoder)
    stored = json.loads((tmp_path / folder / "encoder.json").read_text())["card"]
    assert (stored["name"], stored["mpp"], stored["dim"], stored["pooling"]) == ("our own", [0.5, 1.0], 32, "cls")
    assert card.source == "a recipe"
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_card_says_nothing_of_this_machine(tmp_path, encoder):
    torch.save(encoder.vit.state_dict(), tmp_path / "start.pth")
    started = build_encoder(EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "start.pth")}), seed=0)
    save_encoder(started, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "encoder.json").read_text()
    assert load_encoder(tmp_path / "out").config.weights is None


def test_name_tells_apart_all_that_changes_an_embedding(encoder):
    name = encoder_name(encoder)
    assert name == f"our-own-{encoder_digest(encoder)[:8]}"
    others = [
        build_encoder(encoder.config, seed=4, name="our own"),
        build_encoder(EncoderConfig(**{**vars(encoder.config), "std": (0.2, 0.2, 0.2)}), seed=3, name="our own"),
        build_encoder(EncoderConfig(**{**vars(encoder.config), "pos_embed": "timm"}), seed=3, name="our own"),
        build_encoder(EncoderConfig(**{**vars(encoder.config), "heads": 4}), seed=3, name="our own"),
    ]
    assert len({name, *map(encoder_name, others)}) == 5
    assert encoder_name(build_encoder(encoder.config, seed=3, name="our own")) == name


def test_an_encoder_is_returned_as_it_is(encoder):
    assert load_encoder(encoder) is encoder


def test_teacher_of_a_run_that_has_not_finished(tmp_path):
    options = DinoOptions(views=ViewOptions(global_size=64, local_size=32), out_dim=16, head_hidden_dim=16)
    for step, seed in ((900000, 1), (1000000, 2)):
        method = Dino(TINY, options, seed=seed)
        torch.nn.init.constant_(method.student.encoder.vit.norm.bias, 7)
        save_checkpoint(tmp_path / "checkpoints", step, {"model": method.state_dict()}, identity="a", keep=2)
    (tmp_path / "recipe.yaml").write_text(configuration.to_yaml({"encoder": TINY, "fit": {"steps": 2000000}}))
    encoder = load_encoder(tmp_path)
    assert encoder_digest(encoder) == encoder_digest(method.teacher.encoder)
    assert not encoder.training


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "encoder.safetensors").unlink(), "cannot be read as an encoder"),
        (lambda folder: (folder / "encoder.safetensors").write_bytes(b"0" * 40), "cannot be read as an encoder"),
        (lambda folder: (folder / "encoder.json").write_text("{}"), "cannot be read as an encoder"),
        (lambda folder: (folder / "encoder.json").unlink(), "neither the folder of an encoder nor a run"),
        (lambda folder: shutil.copy(folder.parent / "b" / "encoder.json", folder), "do not belong together"),
    ],
    ids=["no weights", "damaged weights", "no card in the file", "no file of the card", "card of another encoder"],
)
def test_damaged_folder(tmp_path, encoder, damage, message):
    save_encoder(encoder, tmp_path / "a")
    save_encoder(build_encoder(TINY, seed=9), tmp_path / "b")
    damage(tmp_path / "a")
    with pytest.raises(RunError, match=message):
        load_encoder(tmp_path / "a")


@pytest.mark.parametrize("name", KAIKO)
def test_published_cards_have_the_published_shapes(name):
    card = next(card for card in PUBLISHED if card.name == name)
    with torch.device("meta"):
        encoder = build_encoder(card.config, seed=0)
    assert {key: tuple(value.shape) for key, value in encoder.vit.state_dict().items()} == shapes(*KAIKO[name])
    assert (card.dim, card.config.mean, card.config.std) == (encoder.dim, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_weights_from_a_file_of_the_user(tmp_path, suffix):
    from safetensors.torch import save_file

    weights = zeros(shapes(*KAIKO["kaiko-vits16"]))
    weights["norm.bias"] = torch.arange(384.0)  # with all else zero, this is the embedding
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    for encoder in (load_encoder(f"{path}?model=kaiko-vits16"), load_encoder(path, model="kaiko-vits16")):
        assert torch.equal(embed(encoder)[0], torch.arange(384.0))
        assert encoder_name(encoder).startswith("kaiko-vits16-")
    with pytest.raises(RunError, match=r"of another shape: patch_embed\.proj\.weight \(\[384, 3, 16, 16\] in the file"):
        load_encoder(f"{path}?model=kaiko-vits8")


def test_large_published_weights_that_are_not_whole(tmp_path):
    found = {key: shape for key, shape in shapes(*KAIKO["kaiko-vitl14"]).items() if not key.startswith("blocks")}
    torch.save(zeros(found), tmp_path / "l14.pth")
    with pytest.raises(RunError, match=r"336 missing: blocks\.0\.attn\.proj\.bias"):
        load_encoder(f"{tmp_path}/l14.pth?model=kaiko-vitl14")


def test_foreign_weights_of_a_timm_model(tmp_path):
    # 12 blocks of a timm model at another image size, which the position embedding tells
    weights = zeros(shapes(192, 16, 37, 12, False))
    torch.save(
        {"state_dict": {f"module.encoder.{key}": value for key, value in weights.items()}}, tmp_path / "mine.ckpt"
    )
    encoder = load_encoder(f"{tmp_path}/mine.ckpt?model=vit_tiny_patch16_224")
    assert (encoder.config.image_size, encoder.name) == (96, "mine")


def test_timms_own_weights_come_with_timms_normalisation(monkeypatch):
    asked = []
    create = timm.create_model

    def offline(name, *, pretrained, **options):
        asked.append((name, pretrained, options["img_size"]))
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = load_encoder("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", True, 224)]
    assert encoder.config.mean == (0.5, 0.5, 0.5)
    imagenet = load_encoder("timm:vit_small_patch16_224.dino")
    assert imagenet.config.std == pytest.approx((0.229, 0.224, 0.225))
    assert not imagenet.training


@pytest.mark.parametrize("query", ["", "?modle=kaiko-vits16", "?model=a&other=b"])
def test_file_of_weights_needs_its_model(tmp_path, query):
    torch.save({"norm.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"\?model=NAME: kaiko-vits16, .* or a timm model"):
        load_encoder(f"{tmp_path}/w.pth{query}")


def test_what_is_no_encoder(tmp_path):
    with pytest.raises(StoreError, match="no such encoder; give a run folder"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(RunError, match="neither"):
        load_encoder(tmp_path)
    with pytest.raises(ConfigError, match="timm has no model vit_none"):
        load_encoder("timm:vit_none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read as weights"):
        load_encoder(f"{tmp_path}/notes.txt?model=kaiko-vits16")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(RunError, match="holds no weights but a Tensor"):
        load_encoder(f"{tmp_path}/tensor.pth?model=kaiko-vits16")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(RunError, match="holds no weights of an encoder"):
        load_encoder(f"{tmp_path}/empty.pth?model=kaiko-vits16")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"teacher": Malicious()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(StoreError, match="cannot be read as weights"):
            load_vit256(tmp_path / name)


def test_vit256_from_a_checkpoint_as_the_authors_wrote_it(tmp_path):
    weights = zeros(shapes(384, 16, 197, 12, False))
    networks = {}
    for part, value in (("student", 1.0), ("teacher", 2.0)):
        network = {f"module.backbone.{key}": tensor for key, tensor in weights.items()}
        network["module.backbone.norm.bias"] = torch.full((384,), value)
        networks[part] = network | {"module.head.last_layer.weight_g": torch.zeros(5, 1)}
    arguments = argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4)
    torch.save(networks | {"epoch": 99, "args": arguments, "optimizer": {"state": {}}}, tmp_path / "vit256.pth")
    assert (embed(load_vit256(tmp_path / "vit256.pth")) == 2).all()
    assert (embed(load_vit256(tmp_path / "vit256.pth", part="student")) == 1).all()
    assert (embed(load_encoder(f"{tmp_path}/vit256.pth?model=hipt-vit256")) == 2).all()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_vit256_copies_the_weights_it_is_given():
    weights = zeros(shapes(384, 16, 197, 12, False))
    encoder = load_vit256(weights)
    weights["norm.bias"] += 1
    assert (embed(encoder) == 0).all()


def test_vit256_from_another_model():
    weights = zeros(shapes(192, 16, 197, 6, False))  # as HIPT's second level, which has no patch embedding
    weights = {key: value for key, value in weights.items() if not key.startswith("patch_embed")}
    with pytest.raises(RunError, match=r"74 missing: .*1 unexpected: phi\.0\.weight.*of another shape: ") as caught:
        load_vit256({"teacher": weights | {"phi.0.weight": torch.zeros(192, 384)}})
    assert len(str(caught.value)) < 1000

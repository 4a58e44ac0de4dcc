import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from typer.testing import CliRunner

from gigatome import config as configuration
from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders import export as export_module
from gigatome.encoders.export import export_encoder
from gigatome.encoders.others import PooledEncoder
from gigatome.encoders.resnet import cut_resnet
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import load_encoder, save_encoder
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.checkpoint import save_checkpoint

TINY = EncoderConfig("vit_tiny_patch16_224", image_size=64, patch_size=8, dim=32, depth=2, heads=2)
MODELS = {
    "plain": TINY,
    "registers": EncoderConfig("vit_small_patch14_reg4_dinov2", image_size=70, dim=32, depth=2, heads=2),
    "as a DINOv2 recipe has it": EncoderConfig(
        **{**vars(TINY), "registers": 4, "ffn": "swiglu", "layer_scale": 1e-5, "mean": (0.7, 0.5, 0.6)}
    ),
    "MLP again": EncoderConfig("vit_giant_patch14_dinov2", image_size=70, dim=32, depth=2, heads=2, ffn="mlp"),
    "no LayerScale": EncoderConfig(**{**vars(TINY), "ffn": "swiglu", "layer_scale": 0.0}),
    "ResNet": EncoderConfig("resnet18", image_size=64),
}


def tiles(side, count=3):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3), np.uint8)


def embed(encoder, images):
    with torch.inference_mode():
        return encoder(encoder.normalise(torch.from_numpy(images)))


def perturbed(config, name="our own"):
    """An encoder whose every weight counts, LayerScale and biases too."""
    encoder = build_encoder(config, seed=0, name=name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return encoder


@pytest.fixture
def code(tmp_path):
    """Exports the tiny encoder; gives it and a function that imports a file of the export."""
    encoder = perturbed(TINY, "our-own")
    export_encoder(encoder, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, tmp_path / "moved" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return encoder, load, tmp_path / "moved"


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_timm_loads_it_by_one_line(tmp_path, config):
    encoder = perturbed(config)
    exported = export_encoder(encoder, tmp_path / "out", to=("timm",))
    assert exported.difference <= 1e-5 * exported.scale
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    images = tiles(config.image_size)
    with torch.inference_mode():
        torch.testing.assert_close(model(encoder.normalise(torch.from_numpy(images))), embed(encoder, images))
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["mean"]), tuple(data["std"]), data["crop_pct"]) == (config.mean, config.std, 1.0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(exported.files)
    back = load_encoder(tmp_path / "out")
    torch.testing.assert_close(embed(back, images), embed(encoder, images))
    assert (back.config.mean, back.name) == (config.mean, "our own")


@pytest.fixture
def run(tmp_path):
    """An unfinished run whose student and teacher differ."""
    method = Dino(TINY, DinoOptions(views=ViewOptions(global_size=64, local_size=32), out_dim=16, head_hidden_dim=16))
    torch.nn.init.constant_(method.student.encoder.vit.norm.bias, 7)
    save_checkpoint(tmp_path / "run" / "checkpoints", 5, {"model": method.state_dict()}, identity="a", keep=2)
    (tmp_path / "run" / "recipe.yaml").write_text(configuration.to_yaml({"encoder": TINY}))
    return method, tmp_path / "run"


@pytest.mark.parametrize("finished", [True, False])
def test_a_runs_teacher_is_written_and_not_its_student(tmp_path, run, finished):
    method, folder = run
    if finished:
        method.export(folder / "encoder")
    result = CliRunner().invoke(app, ["export", str(folder), "-o", str(tmp_path / "out"), "--to", "trident"])
    assert result.exit_code == 0, result.output
    assert "embed 4 random tiles alike: they differ by " in result.stdout
    assert f'timm.create_model("local-dir:{tmp_path}/out", pretrained=True)' in result.stdout
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    images = tiles(64)
    with torch.inference_mode():
        theirs = model(method.teacher.encoder.normalise(torch.from_numpy(images)))
    torch.testing.assert_close(theirs, embed(method.teacher.encoder, images))
    assert not torch.allclose(theirs, embed(method.student.encoder.eval(), images), atol=1)


def test_dinos_interpolation_is_kept_and_told_of(tmp_path):
    encoder = perturbed(EncoderConfig(**{**vars(TINY), "pos_embed": "dino"}))
    export_encoder(encoder, tmp_path / "out")
    assert "Feed timm tiles of 64 px." in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(embed(load_encoder(tmp_path / "out"), tiles(96)), embed(encoder, tiles(96)))


def test_the_card_says_what_one_must_know(tmp_path):
    save_encoder(perturbed(TINY), tmp_path / "e", source="gigatome, DINO", licence="CC-BY-4.0", mpp=(0.5, 1.0))
    export_encoder(tmp_path / "e", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "# our own",
        "0.5, 1 µm per pixel",
        "32 numbers, the class token",
        "64 px",
        "CC-BY-4.0",
        "(0.5, 0.5, 0.5)",
    ):
        assert fact in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["gigatome"]["mpp"] == [0.5, 1.0]
    everything = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path) not in everything


@pytest.mark.parametrize("name", ["trident_encoder", "eva_encoder", "lazyslide_encoder"])
def test_code_that_needs_no_other_library_to_be_read(code, name):
    encoder, load, _ = code
    module = load(name)
    images = tiles(64)
    batch = torch.stack([module.transform(image) for image in images])
    with torch.inference_mode():
        torch.testing.assert_close(module.load_model()(batch), embed(encoder, images), rtol=1e-4, atol=1e-5)


def test_tridents_code_where_trident_is_installed(code):
    pytest.importorskip("trident")
    from PIL import Image

    encoder, load, _ = code
    theirs = load("trident_encoder").load_encoder()
    images = tiles(64)
    batch = torch.stack([theirs.eval_transforms(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(batch), embed(encoder, images), rtol=1e-4, atol=1e-5)
    assert (theirs.enc_name, theirs.precision) == ("our-own", torch.float32)


def test_evas_code_where_eva_is_installed(code):
    pytest.importorskip("eva.vision")
    from eva.vision.models import ModelFromRegistry

    encoder, load, folder = code
    module = load("eva_encoder")
    module.register()
    images = tiles(64)
    batch = torch.stack([module.transform(image) for image in images])
    with torch.inference_mode():
        theirs = ModelFromRegistry("our-own", model_extra_kwargs={"out_indices": None})(batch)
    torch.testing.assert_close(theirs, embed(encoder, images), rtol=1e-4, atol=1e-5)
    command = [sys.executable, str(folder / "eva_encoder.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "predict_fit" in shown.stdout, shown.stderr


def test_lazyslides_code_where_lazyslide_is_installed(code, tmp_path):
    zs = pytest.importorskip("lazyslide")
    pytest.importorskip("openslide")
    from wsidata import open_wsi

    from gigatome.slides.synthetic import KINDS, make_slide

    encoder, load, _ = code
    make_slide(tmp_path / "slide.svs", KINDS[0], seed=0)
    wsi = open_wsi(str(tmp_path / "slide.svs"))
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, 64, mpp=2.0)
    load("lazyslide_encoder").extract(wsi, device="cpu", pbar=False)
    images = np.stack([item["image"] for item in wsi.ds.tile_images(tile_key="tiles")])
    theirs = torch.from_numpy(np.asarray(wsi["our-own_tiles"].X))
    torch.testing.assert_close(theirs, embed(encoder, images), rtol=1e-4, atol=1e-5)


def test_what_timm_cannot_make(tmp_path):
    short = cut_resnet(build_encoder(EncoderConfig("resnet18", image_size=64), seed=0), 3)
    pooled = PooledEncoder(build_encoder(TINY, seed=0).vit, TINY, "pooled")
    for encoder in (short, pooled):
        with pytest.raises(ConfigError, match="timm has no model that gives this embedding"):
            export_encoder(encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_answer_of_timms_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    arguments = export_module._timm_arguments

    def wrong(encoder):
        model, values = arguments(encoder)
        return model, values | {"num_heads": 4}

    monkeypatch.setattr(export_module, "_timm_arguments", wrong)
    with pytest.raises(RunError, match="timm computes other embeddings than gigatome"):
        export_encoder(perturbed(TINY), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty; give a new folder"):
        export_encoder(perturbed(TINY), tmp_path / "full")
    with pytest.raises(ConfigError, match="cannot export to clam; there are timm, trident, eva, lazyslide"):
        export_encoder(perturbed(TINY), tmp_path / "out", to=("clam",))
    with pytest.raises(ConfigError, match="cannot be exported; give it one of letters"):
        export_encoder(perturbed(TINY, 'a"; import os'), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]

"""Recipes of level slide: from augmented embeddings to a slide encoder."""

import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from typer.testing import CliRunner

from gigatome import config
from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.embeddings.augmented_files import pack_augmented
from gigatome.encoders.giga import GigaConfig
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.slide_zoo import open_slide_encoder, slide_digest
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, save_encoder
from gigatome.recipes.run import plan, train
from gigatome.recipes.schema import SlideRecipe, TileRecipe, load_recipe
from gigatome.recipes.watch import WatchOptions
from gigatome.selfsup.simclr import SimclrOptions
from gigatome.selfsup.slide_views import SlideViewOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.slides.cohort import Cohort
from gigatome.training.options import FitOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "embeddings"))
from made_augmented import made_bag, made_store

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "gigassl/pretrain_resnet18"
NAMES = [NAME, *(f"gigassl/table3_{what}" for what in ("no_slide_augmentation", "not_shared", "imagenet_tiles"))]
SMALL = [
    "fit.steps=2", "fit.epochs=null", "fit.warmup_epochs=0.5", "fit.batch_size=4", "fit.device=cpu", "fit.log_every=1",
    "encoder.weights=null", "encoder.input_dim=4", "simclr.projector=[16,8]", "slides.threads=1",
]  # fmt: skip
TINY = [*SMALL, "encoder.pooling=mlp", "encoder.dim=16"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Embeddings of tiles that share their augmentations, and of others that do not."""
    return {
        sharing: made_store(tmp_path_factory.mktemp(sharing), [made_bag(n, sharing=sharing) for n in range(9)])
        for sharing in ("shared", "each")
    }


@pytest.fixture(scope="module")
def store(stores):
    return stores["shared"]


def small(*changes):
    return load_recipe(NAME, [*TINY, *changes])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, stores, tmp_path):
    recipe = load_recipe(name, SMALL if name == NAMES[1] else TINY)
    run = train(recipe, stores["each" if "not_shared" in name else "shared"].job, tmp_path / "run")
    assert run.finished
    assert [line["step"] for line in lines(run.folder)] == [1, 2]
    assert all(line["skipped"] == 0 and math.isfinite(line["loss"]) for line in lines(run.folder))
    encoder, card = open_slide_encoder(run.folder)
    assert slide_digest(run.encoder) == slide_digest(encoder)
    assert (card.tile_encoder, card.tile_weights, card.tile_size, card.mpp) == ("tiny", "abc", 256, 1.0)
    assert (card.name, card.tiles, card.frame) == (name.replace("/", "-"), 5, "tile")


def test_the_papers_numbers():
    recipe = load_recipe(NAME)
    assert isinstance(recipe, SlideRecipe)
    assert recipe.simclr == SimclrOptions()
    assert recipe.simclr.views == SlideViewOptions.paper()
    assert recipe.encoder.network_config == GigaConfig()
    assert recipe.slides.tiles == 5
    assert timm.models.is_model_pretrained(recipe.encoder.weights.removeprefix("timm:"))
    fit = recipe.fit.of_epoch(11_754)
    assert (fit.epoch_steps, fit.total_steps, fit.warmup) == (45, 45_000, 450)
    assert (fit.optimizer, fit.lr, fit.lr_scaling, fit.weight_decay) == ("adam", 0.03, "linear", 0)
    ablations = {name: load_recipe(name) for name in NAMES[1:]}
    assert ablations[NAMES[1]].simclr.views == SlideViewOptions.none()
    assert [recipe.slides.sharing for recipe in ablations.values()] == ["shared", "each", "shared"]
    code = load_recipe(NAME, ["simclr.views.scale=[0.7,1.3]", "simclr.views.round=truncate"])
    assert code.simclr.views == SlideViewOptions.code()


def test_an_epoch_is_all_slides(store, tmp_path):
    recipe = small("fit.steps=null", "fit.epochs=3", "fit.warmup_epochs=1")
    facts = plan(recipe, store)
    assert (facts["slides"], facts["steps"], facts["images"]) == (9, 6, 24)  # 2 steps of 4 slides an epoch
    run = train(recipe, store, tmp_path / "run")
    assert (run.step, run.recipe.fit.epoch_images, run.recipe.fit.warmup) == (6, 9, 2)
    assert [round(line["lr"] * 64 / 0.03, 6) for line in lines(run.folder)][:2] == [0, 1]
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["fit"]["epoch_images"] == 9


def test_epochs_that_do_not_fit(store):
    with pytest.raises(ConfigError, match=r"with epochs of 9 images, the 4 steps of warmup_epochs must be less than"):
        plan(small("fit.warmup_epochs=2"), store)
    with pytest.raises(ConfigError, match="epoch_images must be a number, as tiles have no natural epoch"):
        load_recipe("gigassl/moco_resnet18", ["fit.epoch_images=null"])
    with pytest.raises(ValueError, match="either warmup_steps or warmup_epochs"):
        FitOptions(steps=3, warmup_steps=1, warmup_epochs=1)
    with pytest.raises(ConfigError, match="epoch_images is null"):
        _ = FitOptions(epochs=3, epoch_images=None).total_steps


def test_it_resumes_to_the_same_weights_wherever_the_embeddings_lie(store, tmp_path):
    whole = train(small("fit.steps=5", "slides.resident=mapped"), store, tmp_path / "whole")

    def stop(stage, done, total):
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    recipe = small("fit.steps=5", "fit.save_every=2", "slides.resident=device")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, store, tmp_path / "parts", progress=stop)
    unfinished, card = open_slide_encoder(tmp_path / "parts")
    assert card.source == "gigatome, step-000002 of an unfinished run"
    parts = train(recipe, store, tmp_path / "parts", resume=True)
    assert slide_digest(parts.encoder) == slide_digest(whole.encoder) != slide_digest(unfinished)
    with pytest.raises(RunError, match="another recipe"):
        train(small("fit.steps=5", "slides.tiles=4"), store, tmp_path / "parts", resume=True)


def test_a_packed_cohort(store, tmp_path):
    packed = tmp_path / "cohort.h5"
    pack_augmented(store, packed)
    run, other = train(small(), packed, tmp_path / "packed"), train(small(), store, tmp_path / "store")
    assert slide_digest(run.encoder) == slide_digest(other.encoder)


def test_the_tile_encoder_is_kept(tmp_path):
    store = made_store(tmp_path, [made_bag(number) for number in range(5)])
    tile = build_encoder(EncoderConfig(image_size=32, patch_size=8, dim=4, depth=1, heads=1), seed=0)
    save_encoder(tile, store.encoder_folder)
    run = train(small(), store, tmp_path / "run")
    assert encoder_digest(tile_encoder_of(run.folder)) == encoder_digest(tile)


def test_it_starts_from_a_resnet(store, tmp_path):
    resnet = timm.create_model("resnet18")
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    wide = made_store(tmp_path / "wide", [made_bag(number, dim=256, tiles=2) for number in range(4)])
    rates = ["fit.lr=0.0", "encoder.input_dim=256", f"encoder.weights={tmp_path / 'resnet18.pth'}"]
    run = train(load_recipe(NAME, [*SMALL, *rates, "slides.tiles=2"]), wide, tmp_path / "run")
    for key in ("0.conv1.weight", "1.conv2.weight"):
        assert torch.equal(run.encoder.network.state_dict()[key], resnet.state_dict()[f"layer4.{key}"])


def test_what_does_not_fit_is_refused(stores, store, tmp_path):
    with pytest.raises(ConfigError, match=r"embeddings of 4 numbers by tiny.* set encoder\.input_dim=4"):
        plan(small("encoder.input_dim=5"), store)
    with pytest.raises(StoreError, match=r"augmentations are each, and slides\.sharing asks for shared"):
        plan(small(), stores["each"])
    with pytest.raises(StoreError, match="9 slides can be used, and a batch is of 16 different ones"):
        plan(small("fit.batch_size=16"), store)
    with pytest.raises(ConfigError, match="learns from augmented embeddings"):
        plan(small(), Cohort("nothing", ()))
    with pytest.raises(ConfigError, match="a run of level slide is not watched"):
        train(small(), store, tmp_path / "run", watch=WatchOptions())
    with pytest.raises(ConfigError, match="needs no tissue"):
        train(small(), store, tmp_path / "run", job=tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key encoder\.weight; did you mean weights"):
        small("encoder.weight=x")
    with pytest.raises(ConfigError, match="has a section slides, not tiles"):
        small("tiles.tile_size=4")


def test_the_command(store, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(config.to_yaml(small()))

    def command(out, steps):
        arguments = ["train", recipe, "--data", store.job, "-o", tmp_path / out, "--steps", steps]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    done = command("run", 3)
    assert done.exit_code == 0, done.output
    assert "step 3 of 3" in done.output
    store.path("s99").write_bytes(b"no slide")
    try:
        part = command("part", 2)
    finally:
        store.path("s99").unlink()
    assert part.exit_code == 3, part.output
    assert "s99" in (tmp_path / "part" / "failures.csv").read_text()


def test_simclr_of_tiles(tmp_path):
    values = config.to_dict(load_recipe("gigassl/moco_resnet18")) | {"method": "simclr", "moco": None, "simclr": {}}
    (tmp_path / "tiles.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "tiles.yaml")
    assert isinstance(recipe, TileRecipe)
    assert recipe.simclr.views == ViewOptions.moco_v2()
    with pytest.raises(ConfigError, match="larger than the tile of 128 px"):
        load_recipe(tmp_path / "tiles.yaml", ["tiles.tile_size=128"])

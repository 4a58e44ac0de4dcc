"""Recipes of level region: from a store of grids to a region encoder."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from gigatome import config
from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.embeddings.store import Bag, write_bag
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import open_region_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, save_encoder
from gigatome.recipes.main_job import run_main_job
from gigatome.recipes.run import plan, train
from gigatome.recipes.schema import RegionRecipe, load_recipe
from gigatome.recipes.watch import WatchOptions
from gigatome.selfsup.grid_views import GridViewOptions, embed_grids
from gigatome.slides.cohort import Cohort

sys.path.insert(0, str(Path(__file__).parents[1] / "embeddings"))
from made_regions import ENCODER, HASH, make_grids, make_store

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "hipt/stage2_vit4096"
SMALL = [
    "fit.steps=2", "fit.warmup_steps=1", "fit.batch_size=4", "fit.device=cpu", "fit.precision=fp32", "fit.log_every=1",
    "encoder.input_dim=8", "encoder.dim=24", "encoder.depth=2", "encoder.heads=2", "encoder.grid=5",
    "dino.views.global_size=5", "dino.views.local_size=3", "dino.out_dim=32", "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8", "regions.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), (5, 3, 4), absent=0.2)


def small(*changes):
    return load_recipe(NAME, [*SMALL, *changes])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_papers_numbers():
    recipe = load_recipe(NAME)
    assert isinstance(recipe, RegionRecipe)
    assert recipe.dino.views == GridViewOptions.paper()
    assert load_recipe(NAME, ["dino.views.dropout=0"]).dino.views == GridViewOptions.code()
    assert recipe.encoder == RegionVitConfig()
    assert (recipe.fit.total_steps, recipe.fit.batch_size, recipe.fit.lr) == (200_000, 256, 5e-4)
    assert recipe.fit.warmup_steps == 10 * recipe.fit.epoch_steps
    first = load_recipe("hipt/stage1_vit256")
    assert replace(recipe.dino, views=first.dino.views) == first.dino
    assert replace(recipe.dino, views=GridViewOptions()) == recipe.dino


@pytest.mark.parametrize("folder", ["job", "tiling", "features"])
def test_two_steps(folder, store, tmp_path):
    data = {"job": store.job, "tiling": store.tiles.path, "features": store.folder}[folder]
    run = train(small(), data, tmp_path / "run")
    assert run.finished
    assert not run.failures
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert all(line["skipped"] == 0 and math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
    assert isinstance(run.encoder, RegionVit)
    encoder, card = open_region_encoder(tmp_path / "run")
    assert (card.name, card.config, card.source) == ("hipt-stage2_vit4096", small().encoder, "gigatome, DINO")
    assert (card.tile_encoder, card.tile_weights, card.tile_size) == (ENCODER, HASH, 256)
    assert (card.mpp, card.tiles) == (0.5, 6)
    grids = torch.from_numpy(make_grids(2)[0]).view(2, 6, 6, 8).movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(embed_grids(encoder, grids), embed_grids(run.encoder, grids))


def test_the_tile_encoder_is_kept_with_the_region_encoder(tmp_path):
    tile = build_encoder(EncoderConfig(image_size=32, patch_size=8, dim=8, depth=1, heads=2), seed=0, name="tile")
    store = make_store(tmp_path / "store", (4,), weights=encoder_digest(tile))
    save_encoder(tile, store.encoder_folder)
    train(small(), store, tmp_path / "run")
    assert encoder_digest(tile_encoder_of(tmp_path / "run")) == open_region_encoder(tmp_path / "run")[1].tile_weights


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not_stopped(store, tmp_path):
    recipe = small("fit.steps=4", "fit.save_every=2", "fit.keep=9")
    whole = train(recipe, store, tmp_path / "whole").encoder
    train(recipe, store, tmp_path / "run")
    for gone in (tmp_path / "run" / "encoder", *(tmp_path / "run" / "checkpoints").glob("step-*4")):
        gone.rename(tmp_path / gone.name)
    _, card = open_region_encoder(tmp_path / "run")
    assert (card.tile_encoder, card.tile_weights, card.tiles, card.config) == (ENCODER, HASH, 6, recipe.encoder)
    assert "of an unfinished run" in card.source
    again = train(recipe, store, tmp_path / "run", resume=True).encoder
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_run_is_resumed_on_its_own_grids_only(store, tmp_path):
    train(small(), store, tmp_path / "run")
    with pytest.raises(RunError, match="pass --resume"):
        train(small(), store, tmp_path / "run")
    assert train(small("regions.prefetch=1"), store, tmp_path / "run", resume=True).finished
    for number, change in enumerate([{"weights": "f" * 16}, {"tiles": 7}, {"absent": 0.2, "mpp": 0.25}]):
        other = make_store(tmp_path / str(number), (5, 3, 4), **change)
        with pytest.raises(RunError, match="holds a run on other slides or embeddings"):
            train(small(), other, tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"another recipe .*regions\.slide_weights is regions there and slides here"):
        train(small("regions.slide_weights=slides"), store, tmp_path / "run", resume=True)


def test_a_damaged_slide_is_reported_and_the_others_are_learnt_from(tmp_path):
    store = make_store(tmp_path / "store", (5, 3))
    store.path("s0").write_bytes(b"no file of grids")
    run = train(small("fit.batch_size=2"), store, tmp_path / "run")
    assert run.finished
    assert [failure.slide for failure in run.failures] == ["s0"]
    assert "s0,regions,StoreError" in (tmp_path / "run" / "failures.csv").read_text()


def test_a_watched_run_tells_of_its_embeddings(store, tmp_path):
    recipe = small("fit.evaluate_every=1")
    assert train(recipe, store, tmp_path / "run", watch=WatchOptions(tiles=10)).finished
    alone = train(recipe, store, tmp_path / "alone")
    assert all(1 <= line["rankme"] <= 10 and line["std"] > 0 for line in lines(tmp_path / "run"))
    assert all("rankme" not in line for line in lines(tmp_path / "alone"))
    watched = open_region_encoder(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(value, watched[name]) for name, value in alone.encoder.state_dict().items())
    with pytest.raises(ConfigError, match="labelled tiles tell nothing of an encoder of regions"):
        train(recipe, store, tmp_path / "other", watch=WatchOptions(labelled=str(tmp_path)))


def test_data_of_another_kind_are_refused(store, tmp_path):
    tiles = tmp_path / "tiles" / "20x_256px_0px_overlap" / "features_tiny" / "s0.h5"
    write_bag(tiles, Bag("s0", "tiny", np.zeros((3, 2), np.int64), np.ones((3, 8), np.float32)))
    with pytest.raises(StoreError, match="of tiles, and regions are learnt from grids of them"):
        train(small(), tmp_path / "tiles", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds embeddings of 8 numbers by tiny-0123abcd.*encoder\.input_dim=8"):
        train(small("encoder.input_dim=6"), store, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"global_size 7 is larger than a region of 6 × 6 tiles"):
        train(small("dino.views.global_size=7"), store, tmp_path / "run")
    with pytest.raises(ConfigError, match="learns from a store of grids"):
        train(small(), Cohort("nothing", ()), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"level tile learns from slides, not from the embeddings in .*features_tiny"):
        train(load_recipe("demo/dino_vit_mini"), store, tmp_path / "run")
    with pytest.raises(ConfigError, match="level region needs no tissue"):
        train(small(), store, tmp_path / "run", job=tmp_path / "job")
    with pytest.raises(ConfigError, match="the main job trains an encoder of tiles"):
        run_main_job(small(), tmp_path / "job")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tiles.mpp=[0.5]"], "stage2_vit4096: a recipe of level region has a section regions, not tiles"),
        (["regions.min_tile=3"], r"unknown key regions\.min_tile; did you mean min_tiles\?"),
        (["encoder.model=vit"], r"stage2_vit4096, level region: unknown key encoder\.model; "),
        (["encoder.heads=5"], "dim must be a multiple of heads"),
        (["dino.views.global_scale=[0.4,1]"], r"dino\.views: unknown key global_scale; did you mean global_size\?"),
        (["dino.views.dropout=1"], "dropout must be at least 0 and less than 1"),
        (["regions.slide_weights=uniform"], r"regions\.slide_weights"),
        (["level=cell"], "level must be tile.* region.*, not 'cell'"),
        (["method=dinov2"], "method: .*'dino'"),
        (["moco={}"], "level region: unknown key moco"),
        (["fit.batch_size=1"], "leaves less than 2 regions to a part"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(NAME, changes)


def test_a_tile_recipe_has_no_regions():
    with pytest.raises(ConfigError, match="level tile has a section tiles, not regions"):
        load_recipe("demo/dino_vit_mini", ["regions={}"])
    with pytest.raises(ConfigError, match=r"dino\.views: unknown key dropout"):
        load_recipe("demo/dino_vit_mini", ["dino.views.dropout=0.1"])


def test_identity_and_resolved_recipe(tmp_path):
    recipe = small()
    assert small("regions.threads=5").identity() == recipe.identity()
    for change in ("dino.views.dropout=0", "regions.min_tiles=2", "encoder.depth=1", "fit.seed=2"):
        assert small(change).identity() != recipe.identity()
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(recipe))
    assert load_recipe(path) == recipe


def test_the_views_may_be_left_out(tmp_path):
    values = yaml.safe_load(config.to_yaml(small()))
    values["dino"].pop("views")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(path).dino.views == GridViewOptions()


def test_the_command(store, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(config.to_yaml(small()))
    arguments = ["train", str(recipe), "--data", str(store.folder)]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    expected = plan(small(), store)
    assert (expected["slides"], expected["regions"], expected["images"]) == (3, 12, 8)
    assert "regions: 12" in dry.output
    assert "slide_weights: regions" in dry.output
    trained = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "run"), "--watch", "1"])
    assert trained.exit_code == 0, trained.output
    assert lines(tmp_path / "run")[-1]["rankme"] >= 1
    refused = CliRunner().invoke(app, [*arguments, "--dry-run", "--slide-mpp", "0.5"])
    assert refused.exit_code == 2
    assert "reads no slides" in refused.output

"""LongViT's pretraining, from slides to embeddings, at a 64th of its size; and the plan of a step."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gigatome import config
from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, RunError
from gigatome.embeddings.extract import embed
from gigatome.encoders.longvit_zoo import longvit_digest, open_longvit
from gigatome.recipes.longvit_plan import plan_step, plan_text
from gigatome.recipes.main_job import run_main_job
from gigatome.recipes.run import plan, train
from gigatome.recipes.schema import load_recipe
from gigatome.recipes.watch import WatchOptions
from gigatome.slides.synthetic import SyntheticOptions, make_cohort

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "longvit/pretrain_1024"
SMALL = [
    "fit.steps=2", "fit.epochs=null", "fit.epoch_images=8", "fit.warmup_epochs=0.5", "fit.batch_size=4",
    "fit.device=cpu", "fit.precision=fp32", "fit.log_every=1", "encoder.image_size=16", "encoder.patch_size=4",
    "encoder.grid=4", "encoder.dim=24", "encoder.depth=2", "encoder.heads=4", "encoder.ffn_dim=48",
    "encoder.segments=[1, 2, 4, 8, 16]", "tiles.tile_size=24", "tiles.mpp=[2.0]", "tiles.threads=1",
    "dino.views.global_size=16", "dino.views.local_size=8", "dino.out_dim=32", "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    options = SyntheticOptions(width=1024, height=1024, mpp=0.5, pen=0, bubbles=0, fat=0, pale=0)
    return make_cohort(folder, patients=2, slides_per_patient=1, options=options)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


def small(*changes):
    return load_recipe(NAME, [*SMALL, *changes])


def command(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_the_sizes_that_it_trains():
    recipe = load_recipe(NAME)
    assert recipe.fit.epoch_steps == 976
    assert recipe.fit.warmup == 9760
    assert recipe.encoder.mean == (0.485, 0.456, 0.406)
    assert (recipe.tiles.tile_size, recipe.tiles.mpp) == (1536, (0.5,))
    assert recipe.encoder.pos_embed == "dino"


def test_from_slides_to_embeddings(cohort, job, tmp_path):
    """Two steps; the run's encoder embeds tiles of any size."""
    recipe = small()
    folder = tmp_path / "run"
    run = train(recipe, cohort, folder, job=job, watch=WatchOptions(tiles=6))
    assert run.finished
    assert not run.failures
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["skipped"] == 0 and math.isfinite(line["loss"]) for line in lines)
    assert 1 <= lines[-1]["rankme"] <= 6
    encoder, card = open_longvit(folder)
    assert (card.name, card.mpp, card.config) == ("longvit-pretrain_1024", (2.0,), recipe.encoder)
    assert longvit_digest(run.encoder) == longvit_digest(encoder)
    store = embed(cohort, encoder=folder, out=tmp_path / "emb", tile_size=32, mpp=2.0)
    assert store.encoder == f"longvit-{longvit_digest(encoder)[:8]}"
    bag = store.read(cohort.slides[0].name)
    assert bag.embeddings.shape == (len(bag.coords), 24)
    x, y = bag.coords[0]
    with cohort.slides[0].open() as slide, torch.no_grad():
        tile = torch.from_numpy(np.asarray(slide.read_tile(int(x), int(y), 32, 2.0, exact=False))[None])
        np.testing.assert_allclose(bag.embeddings[0], encoder(tile)[0].numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="do not divide into patches of 4 px"):
        embed(cohort, encoder=folder, out=tmp_path / "emb", tile_size=30, mpp=2.0)


def test_a_run_goes_on_and_is_known_again(cohort, job, tmp_path):
    whole = train(small(), cohort, tmp_path / "whole", job=job)
    train(small("fit.save_every=1", "checkpointing=block"), cohort, tmp_path / "run", job=job)
    with pytest.raises(RunError, match="holds this run already; pass --resume"):
        train(small(), cohort, tmp_path / "run", job=job)
    with pytest.raises(RunError, match=r"another recipe \(encoder\.depth is 2 there and 1 here\)"):
        train(small("encoder.depth=1"), cohort, tmp_path / "run", job=job)
    max((tmp_path / "run" / "checkpoints").iterdir()).rename(tmp_path / "gone")
    (tmp_path / "run" / "encoder").rename(tmp_path / "its-encoder")
    again = train(small(), cohort, tmp_path / "run", resume=True, job=job)
    for name, value in whole.encoder.state_dict().items():
        torch.testing.assert_close(again.encoder.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder.segmnts=[4]", r"level pixels: unknown key encoder\.segmnts; did you mean segments\?"),
        ("encoder.model=vit_small_patch16_224", r"unknown key encoder\.model"),
        ("checkpointing=all", "checkpointing: Input should be 'none', 'selective' or 'block'"),
        ("tiles.tile_size=1000", "views.global_size 1024 is larger than the tile of 1000 px"),
        ("regions={}", "a recipe of level pixels has a section tiles, not regions"),
        ("method=dinov2", "method"),
        ("level=pixel", "level must be tile or pixels or region or slide, not 'pixel'"),
        ("fit.epoch_images=null", "fit.epoch_images must be a number, as tiles have no natural epoch"),
        ("encoder.heads=5", "dim must be a multiple of heads"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(NAME, [change])


def test_views_must_divide_into_patches(cohort, tmp_path):
    wrong = small("dino.views.local_size=10")
    for call in (lambda: plan(wrong, cohort), lambda: train(wrong, cohort, tmp_path / "run"), lambda: plan_text(wrong)):
        with pytest.raises(ConfigError, match="views of 10 px do not divide into patches of 4 px; change views"):
            call()
    assert plan(small(), cohort)["slides"] == 2


def test_the_main_job_is_for_tile_encoders(cohort, tmp_path):
    with pytest.raises(ConfigError, match=r"the main job trains an encoder of tiles; .* is of level pixels"):
        run_main_job(small(), tmp_path, cohort=cohort)


def test_a_plan_counts_the_views_of_a_part():
    recipe = load_recipe(NAME)
    found = plan_step(recipe, 64)
    assert found.images == 16
    assert {name: (view.tokens, view.batch) for name, view in found.views.items()} == {
        "global": (1024, 32), "local": (256, 128),
    }  # fmt: skip
    parts = [plan_step(recipe, count).memory for count in (64, 32, 16)]
    assert parts == sorted(parts)
    less = [plan_step(recipe, 64, checkpointing).memory for checkpointing in ("block", "selective", "none")]
    assert less == sorted(less)
    assert list(plan_step(load_recipe(NAME, ["dino.views.local_views=0"]), 64).views) == ["global"]
    with pytest.raises(ConfigError, match="batch_size 1024 cannot be cut into 3 parts"):
        plan_step(recipe, 3)


def test_what_makes_it_fit():
    said = plan_text(load_recipe(NAME, ["fit.grad_accumulation=4"]), 16, "80GB")
    assert "16 images at a time: batch of 1024, processes × grad_accumulation = 16 × 4" in said
    assert "tokens       1,024 × 32" in said
    assert said.endswith("fits into 80 GB")
    advice = plan_text(load_recipe(NAME), 1, "40GB").splitlines()[-1]
    assert advice.startswith('does not fit into 40 GB; 128 images at a time with checkpointing "block" do')
    assert plan_step(load_recipe(NAME), 8, "block").memory <= 40e9
    assert plan_step(load_recipe(NAME), 4, "block").memory > 40e9
    assert plan_step(load_recipe(NAME), 8, "selective").memory > 40e9
    with pytest.raises(ConfigError, match=r"does not fit into 1 GB in parts of any size; 2 images take .* GB"):
        plan_text(load_recipe(NAME), 1, "1GB")
    with pytest.raises(ConfigError, match="'much' is no amount of memory"):
        plan_text(load_recipe(NAME), 1, "much")


def test_the_command_plans_instead_of_training(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml(replace(load_recipe(NAME), checkpointing="selective")))
    assert 'checkpointing "selective"' in command(path, "--plan").output
    for option in (["--plan"], ["--max-memory", "40GB"]):
        planned = command(NAME, *option, "--set", "fit.grad_accumulation=8")
        assert planned.exit_code == 0, planned.output
        assert "128 images at a time" in planned.output
        assert ("fit into 40 GB" in planned.output) == (len(option) == 2)
    refused = command("demo/dino_vit_mini", "--plan")
    assert isinstance(refused.exception, ConfigError)
    assert "only recipes of level pixels, which train a LongViT, can be planned" in str(refused.exception)
    missing = command(NAME, "-o", tmp_path / "run")
    assert missing.exit_code == 2
    assert "--data" in missing.output
    assert not Path(tmp_path / "run").exists()

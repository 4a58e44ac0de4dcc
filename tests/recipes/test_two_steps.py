"""Every built-in recipe of level tile trains for two steps on a CPU, made small in its numbers only."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gigatome import config
from gigatome.cli.main import app
from gigatome.core.errors import NoTissueError
from gigatome.encoders.zoo import load_encoder
from gigatome.recipes.run import train
from gigatome.recipes.schema import load_recipe, recipe_header, recipe_names
from gigatome.recipes.watch import WatchOptions
from gigatome.slides.synthetic import SyntheticOptions, make_cohort

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "fit.steps=2", "fit.epochs=null", "fit.warmup_steps=1", "fit.batch_size=4", "fit.grad_accumulation=1",
    "fit.device=cpu", "fit.precision=fp32", "fit.log_every=1", "encoder.pretrained=false", "tiles.threads=1",
    "tiles.prefetch=1",
]  # fmt: skip
VIT = ["encoder.dim=24", "encoder.depth=2", "encoder.heads=2"]
HEADS = {
    "dino": ["out_dim=32", "head_hidden_dim=16", "head_bottleneck_dim=8"],
    "dinov2": [
        "out_dim=32", "head_hidden_dim=16", "head_bottleneck_dim=8", "patch_out_dim=32", "patch_head_hidden_dim=16",
        "patch_head_bottleneck_dim=8",
    ],
    "moco": ["queue=8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two slides that hold tiles of 256 px at 2 mpp."""
    folder = tmp_path_factory.mktemp("slides")
    options = SyntheticOptions(width=3072, height=3072, mpp=0.25, pen=0, bubbles=0, fat=0, pale=0)
    return make_cohort(folder, patients=2, slides_per_patient=1, options=options)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Where the tissue is kept."""
    return tmp_path_factory.mktemp("job")


def small(name, *changes):
    recipe = load_recipe(name)
    head = [f"{recipe.method}.{change}" for change in HEADS[recipe.method]]
    vit = [] if "resnet" in recipe.encoder.model else VIT
    return load_recipe(name, [*SMALL, *vit, *head, *changes])


@pytest.mark.parametrize("name", [name for name in recipe_names() if recipe_header(name)["level"] == "tile"])
def test_two_steps(name, cohort, job, tmp_path):
    recipe = small(name)
    run = train(recipe, cohort, tmp_path / "run", job=job)
    assert run.finished
    assert not run.failures
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["skipped"] == 0 and math.isfinite(line["loss"]) for line in lines)
    assert load_encoder(tmp_path / "run").dim == (256 if recipe.method == "moco" else 24)


def test_a_resolution_that_no_slide_has_is_refused(cohort, job, tmp_path):
    with pytest.raises(NoTissueError, match=r"0\.25 mpp is the finest there is; tiles at 0\.1 mpp would be enlarged"):
        train(small("demo/dino_vit_mini", "tiles.mpp=[0.1]"), cohort, tmp_path / "no", job=job)
    allowed = small("demo/dino_vit_mini", "tiles.mpp=[0.1]", "tiles.max_enlargement=2.5")
    assert train(allowed, cohort, tmp_path / "yes", job=job).finished


@pytest.mark.parametrize("name", ["demo/dino_vit_mini", "kaiko/table7_dinov2", "gigassl/moco_resnet18"])
def test_a_watched_run_tells_of_its_embeddings(name, cohort, job, tmp_path):
    pytest.importorskip("tensorboard")
    watch = WatchOptions(tiles=6, labelled=str(labelled_tiles(tmp_path)), neighbours=2, tensorboard=True)
    recipe = small(name, "fit.evaluate_every=1")
    assert train(recipe, cohort, tmp_path / "run", job=job, watch=watch).finished
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 1 <= line["rankme"] <= 6
        assert 0 <= line["knn"] <= 1
        assert 0 <= line["linear"] <= 1
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_command_watches(cohort, job, tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    recipe = tmp_path / "mini.yaml"
    recipe.write_text(config.to_yaml(small("demo/dino_vit_mini")))
    arguments = ["train", recipe, "--data", Path(cohort.slides[0].uri).parent, "--job", job, "-o", folder]
    watched = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--watch", 1, "--tensorboard")])
    assert watched.exit_code == 0, watched.output
    assert all("rankme" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    refused = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--tensorboard")])
    assert refused.exit_code == 2
    assert "--watch 500" in refused.output


def labelled_tiles(folder):
    """Two classes of plain tiles."""
    rng = np.random.default_rng(0)
    for label, value in (("dark", 40), ("light", 200)):
        for number in range(6):
            path = folder / "labelled" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 40, (96, 96, 3))
            Image.fromarray((noise + value).astype(np.uint8)).save(path)
    return folder / "labelled"

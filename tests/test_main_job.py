"""The main job, whole, through the commands and through Python, on a very small cohort."""

import json
import re
from pathlib import Path

import h5py
import pytest
from typer.testing import CliRunner

import gigatome as gt
from gigatome.cli.main import app
from gigatome.slides.synthetic import SyntheticOptions, make_cohort

SMALL = [
    "encoder.dim=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "encoder.image_size=32",
    "dino.views.global_size=32",
    "dino.views.local_size=16",
    "dino.views.local_views=2",
    "dino.out_dim=64",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "tiles.tile_size=64",
    "tiles.mpp=[2.0]",
    "fit.batch_size=8",
    "fit.warmup_steps=2",
    "fit.save_every=4",
]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    options = SyntheticOptions(width=1024, height=1024)
    make_cohort(folder, patients=8, slides_per_patient=1, options=options, seed=1)
    return folder / "cohort.csv"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code != code and result.exception is not None:
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def changes(steps: int) -> list[str]:
    return [part for change in [*SMALL, f"fit.steps={steps}"] for part in ("--set", change)]


def test_the_demo_command_does_the_whole_job_and_goes_on(cohort, tmp_path):
    arguments = ("demo", "-o", tmp_path, "--slides", cohort, "--folds", 4, *changes(6))
    output = run(*arguments)
    assert len(re.findall(r"AUROC 0\.\d{3}|AUROC 1\.000", output)) == 4
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "random initialisation" in page
    assert page.count("data:image/") >= 8 + 1 + 4
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 6
    assert len(list((tmp_path / "heatmaps").glob("*.geojson"))) == 2
    assert not (tmp_path / "failures.csv").exists()

    weights = (tmp_path / "run" / "encoder" / "encoder.safetensors").read_bytes()
    assert run(*arguments).splitlines()[:4] == output.splitlines()[:4]
    assert (tmp_path / "run" / "encoder" / "encoder.safetensors").read_bytes() == weights


def test_the_commands_are_the_same_chain(cohort, tmp_path):
    assert "8" in run("check", cohort)
    job, run_folder = tmp_path / "job", tmp_path / "run"
    run("tissue", cohort, "-o", job)
    run("tile", cohort, "-o", job, "--tile-size", 64, "--mpp", 2)
    assert "student parameters" in run("train", "demo/dino_vit_mini", "--data", cohort, "--dry-run", *changes(4))
    run("train", "demo/dino_vit_mini", "--data", cohort, "-o", run_folder, "--job", job, *changes(4))
    run("embed", cohort, "--encoder", run_folder, "-o", job, "--tile-size", 64, "--mpp", 2)
    files = list(job.glob("5x_64px_0px_overlap/features_*/*.h5"))
    assert len(files) == 8
    with h5py.File(files[0]) as file:
        assert file["features"].shape == (len(file["coords"]), 32)
    printed = json.loads(run("evaluate", job, "--labels", cohort, "--target", "subtype", "--folds", 2, "--json"))
    assert printed["n_slides"] == 8
    slide = next(iter(gt.Cohort.read(cohort))).uri
    run("heatmap", slide, "--model", run_folder, "-o", tmp_path / "maps", "--tile-size", 64, "--mpp", 2)
    assert list((tmp_path / "maps").glob("*.png"))
    assert "P001" in run("info", slide)


def test_a_run_folder_belongs_to_one_recipe_and_one_cohort(cohort, tmp_path):
    recipe = gt.load_recipe("demo/dino_vit_mini", [*SMALL, "fit.steps=2", "fit.warmup_steps=1"])
    gt.train(recipe, cohort, tmp_path)
    with pytest.raises(gt.GigatomeError, match="holds this run already; pass --resume"):
        gt.train(recipe, cohort, tmp_path)
    other = gt.load_recipe("demo/dino_vit_mini", [*SMALL, "fit.steps=2", "fit.warmup_steps=1", "fit.lr=0.1"])
    with pytest.raises(gt.GigatomeError, match=r"another recipe \(fit\.lr is 0\.001 there and 0\.1 here\)"):
        gt.train(other, cohort, tmp_path, resume=True)
    fewer = gt.Cohort(gt.Cohort.read(cohort).slides[:4])
    with pytest.raises(gt.GigatomeError, match="on other slides"):
        gt.train(recipe, fewer, tmp_path, resume=True)
    assert gt.train(recipe, cohort, tmp_path, resume=True).finished


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("slide,grade\nP001-1,a\n", "there is no label column .subtype. .label columns: grade."),
        ("slide,subtype\nP001-1,a\nP002-1,b\nP003-1,b\n", "class a has one patient"),
        ("slide,subtype\nP001-1,a\nP002-1,a\n", "at least two classes"),
    ],
)
def test_labels_that_cannot_be_evaluated_are_refused_before_training(cohort, tmp_path, labels, message):
    table = tmp_path / "labels.csv"
    table.write_text(labels)
    with pytest.raises(gt.GigatomeError, match=message):
        run(
            "demo",
            "-o",
            tmp_path / "out",
            "--slides",
            cohort.parent / "slides",
            "--labels",
            table,
            "--target",
            "subtype",
            *changes(3),
        )
    assert not (tmp_path / "out" / "run").exists()

"""Fine-tuning on slides: from slides and labels to folds, scores, a report, and predictions of new slides."""

import csv
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.longvit_zoo import open_longvit
from gigatome.evaluation import image_model
from gigatome.evaluation.image_model import load_image_model
from gigatome.mil.end_to_end import EndToEnd
from gigatome.recipes.finetune import finetune
from gigatome.recipes.finetune_schema import load_finetune
from gigatome.recipes.schema import finetune_names, load_recipe, recipe_header, recipe_names
from gigatome.slides.cohort import Cohort
from gigatome.slides.synthetic import SyntheticOptions, make_cohort

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "weights=null", "encoder.patch_size=8", "encoder.grid=4", "encoder.dim=24", "encoder.depth=2", "encoder.heads=4",
    "encoder.ffn_dim=48", "encoder.segments=[4, 16, 64]", "encoder.ratios=[1, 2, 4]", "images.image_size=64",
    "fit.device=cpu", "fit.precision=fp32", "fit.batch_size=2", "fit.log_every=1", "outcome.resamples=20", "threads=1",
    "fit.warmup_epochs=0",
]  # fmt: skip
CLASSES = [
    *TINY, "outcome.target=subtype", "outcome.label_map=null", "outcome.select=last", "fit.epochs=2",
    "outcome.splits={kind: kfold, folds: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Eight patients of two subtypes."""
    folder = tmp_path_factory.mktemp("slides")
    options = SyntheticOptions(width=400, height=320, mpp=1.0, pen=0, bubbles=0, fat=0, pale=0)
    return make_cohort(folder, patients=8, slides_per_patient=1, options=options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cohort):
    out = tmp_path_factory.mktemp("finetuned") / "run"
    return finetune(load_finetune("longvit/table1_brca", CLASSES), cohort, out, command="the command")


def test_the_recipes_are_those_of_the_tables():
    sizes = (1024, 4096, 8192, 16384, 32768)
    table3 = [f"longvit/table3_{which}_{side}" for which in ("brca", "nsclc", "rcc") for side in sizes]
    table1 = [f"longvit/table1_{which}" for which in ("brca", "nsclc", "rcc")]
    table2 = [f"longvit/table2_{which}" for which in ("brca", "luad", "ucec")]
    assert finetune_names() == sorted([*table1, *table2, *table3])
    assert not set(finetune_names()) & set(recipe_names())


@pytest.mark.parametrize("name", finetune_names())
def test_a_recipe_says_what_the_paper_does(name):
    recipe, header = load_finetune(name, ["weights=null"]), recipe_header(name)
    assert header["command"].split("-m ")[1].startswith(f"gigatome train {name} ")
    assert (recipe.fit.epochs, recipe.fit.batch_size, recipe.fit.lr, recipe.drop_path) == (10, 8, 5e-5, 0.1)
    assert recipe.encoder.image_size == recipe.images.image_size
    assert recipe.encoder.encoder().depth == 12
    assert len(recipe.reproduces) == 1
    assert not load_finetune(name, ["weights=null", "images.image_size=512"]).reproduces
    assert name.split("_")[-1] in (str(recipe.images.image_size), *("brca", "nsclc", "rcc", "luad", "ucec"))


def test_a_recipe_that_starts_from_a_longvit_wants_to_know_which():
    with pytest.raises(ConfigError, match="weights=PATH"):
        load_finetune("longvit/table1_brca")
    with pytest.raises(ConfigError, match="gigatome train longvit/table1_brca --data"):
        load_recipe("longvit/table1_brca")
    with pytest.raises(ConfigError, match="no fine-tuning"):
        load_finetune("longvit/pretrain_1024")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("images.image_size=1000", "does not divide into patches"),
        ("encoder.image_size=4096", "leave it out"),
        ("encoder.norm=pretrain", "norm must be finetune"),
        ("fit.grad_accumulation=2", "at_once"),
        ("outcome.splits.val_fraction=0", "validation part"),
        ("outcome.survival={time: t, event: e}", "either target"),
        ("outcome.splits.seed=1", r"fit\.seed"),
        ("fit.parallel=fsdp", r"fit\.parallel must be ddp"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        load_finetune("longvit/table3_brca_1024", ["weights=null", change])


def test_a_loss_that_compares_slides_needs_several_at_once():
    changes = ["weights=null", "outcome.loss.survival_loss=cox"]
    with pytest.raises(ConfigError, match="set at_once to 2"):
        load_finetune("longvit/table2_ucec", changes)
    assert load_finetune("longvit/table2_ucec", [*changes, "at_once=2"]).cut_for(1).grad_accumulation == 4


def test_a_batch_is_cut_for_the_processes():
    recipe = load_finetune("longvit/table3_brca_1024", ["weights=null"])
    assert recipe.cut_for(1).grad_accumulation == 8
    assert recipe.cut_for(8).grad_accumulation == 1
    with pytest.raises(ConfigError, match="multiple of 3 slides"):
        recipe.cut_for(3)


def test_every_slide_is_predicted_once_and_reported(run, cohort):
    assert run.study is not None
    assert (run.done, run.folds) == ((0, 1), 2)
    result = run.study.arms[0].result
    assert sorted(result.predictions.slides) == sorted(slide.name for slide in cohort)
    assert run.study.arms[0].reported is None  # the paper's value is of another question
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "LongViT, 64 × 64 px" in page
    assert "the command" in page
    rows = list(csv.DictReader((run.folder / "splits.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert rows
    assert [line["step"] for line in _metrics(run.folder / "fold_0")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", finetune_names())
def test_two_steps_of_each_recipe_at_a_64th_of_its_pixels(name, cohort, tmp_path):
    whole = load_finetune(name, ["weights=null"])
    segments = [length // 64 for length in whole.encoder.encoder().attention.segments]
    changes = [
        "weights=null", f"images.image_size={whole.images.image_size // 8}", f"encoder.segments={segments}",
        "encoder.dim=32", "encoder.depth=1", "encoder.ffn_dim=64", "encoder.grid=4", "fit.device=cpu",
        "fit.batch_size=2", "fit.steps=2", "fit.epochs=null", "fit.warmup_epochs=0", "fit.precision=fp32", "threads=1",
        "outcome.resamples=20",
    ]  # fmt: skip
    if whole.outcome.survival is None:
        changes += ["outcome.target=subtype", "outcome.label_map=null", "outcome.splits.val_fraction=0.25"]
    labels = None if whole.outcome.survival is None else _survival(cohort, tmp_path)
    recipe = load_finetune(name, [*changes, "outcome.splits.folds=2", "outcome.loss.bins=2"])
    found = finetune(recipe, cohort, tmp_path / "run", labels=labels, folds=[0])
    assert found.done == (0,)
    said = json.loads((tmp_path / "run/fold_0/predictions.json").read_text(encoding="utf-8"))
    assert np.isfinite(said["test"]).all()
    tokens = (recipe.images.image_size // recipe.encoder.patch_size) ** 2
    assert tokens * 64 == (whole.images.image_size // whole.encoder.patch_size) ** 2


def test_finished_folds_are_not_trained_again(run, cohort):
    recipe = load_finetune("longvit/table1_brca", CLASSES)
    before = {path: path.stat().st_mtime_ns for path in run.folder.glob("fold_*/**/*") if path.is_file()}
    again = finetune(recipe, cohort, run.folder, resume=True, command="the command")
    assert again.study is not None
    assert {path: path.stat().st_mtime_ns for path in before} == before
    one, two = (study.arms[0].result.predictions.probabilities for study in (run.study, again.study))
    assert np.array_equal(one, two)


def test_folds_one_by_one_give_what_all_at_once_do(run, cohort, tmp_path):
    recipe = load_finetune("longvit/table1_brca", CLASSES)
    assert finetune(recipe, cohort, tmp_path, folds=[1]).study is None
    whole = finetune(recipe, cohort, tmp_path, folds=[0])
    assert whole.study is not None
    one, two = (study.arms[0].result.predictions.probabilities for study in (run.study, whole.study))
    assert np.array_equal(one, two)


def test_a_folder_of_another_run_is_refused(run, cohort):
    recipe = load_finetune("longvit/table1_brca", CLASSES)
    with pytest.raises(RunError, match="--resume"):
        finetune(recipe, cohort, run.folder)
    other = load_finetune("longvit/table1_brca", [*CLASSES, "fit.lr=1e-3"])
    with pytest.raises(RunError, match="another recipe"):
        finetune(other, cohort, run.folder, resume=True)
    fewer = cohort.select([slide.name for slide in cohort][:-1])
    with pytest.raises(RunError, match="other slides"):
        finetune(recipe, fewer, run.folder, resume=True)
    first, other_class = next(iter(cohort)), next(s.labels for s in cohort if s.labels != next(iter(cohort)).labels)
    changed = [replace(slide, labels=other_class) if slide is first else slide for slide in cohort]
    with pytest.raises(RunError, match="other slides, outcomes or splits"):
        finetune(recipe, Cohort(tuple(changed)), run.folder, resume=True)
    gone = [replace(slide, uri="gone.svs") if slide is first else slide for slide in cohort]
    with pytest.raises(RunError, match=f"slide {first.name} could be opened when this run began"):
        finetune(recipe, Cohort(tuple(gone)), run.folder, resume=True)
    with pytest.raises(ConfigError, match="folds 0 to 1"):
        finetune(recipe, cohort, run.folder, folds=[2])


def test_a_run_that_cannot_begin_leaves_its_folder_to_the_next(cohort, tmp_path):
    with pytest.raises(ConfigError, match=r"fold 0 trains on 4 slides, fewer than a batch; --set fit\.batch_size=4"):
        finetune(load_finetune("longvit/table1_brca", [*CLASSES, "fit.batch_size=6"]), cohort, tmp_path)
    lost = load_finetune("longvit/table1_brca", [*CLASSES, f"weights={tmp_path / 'nowhere'}"])
    with pytest.raises(StoreError, match="nowhere"):
        finetune(lost, cohort, tmp_path)
    assert not list(tmp_path.iterdir())
    assert finetune(load_finetune("longvit/table1_brca", CLASSES), cohort, tmp_path, folds=[0]).done == (0,)


def test_other_weights_to_start_from_are_another_run(run, cohort, tmp_path):
    start = [*CLASSES, f"weights={run.folder / 'fold_0'}"]
    found = finetune(load_finetune("longvit/table1_brca", start), cohort, tmp_path, folds=[0])
    assert found.done == (0,)
    other = [*CLASSES, f"weights={run.folder / 'fold_1'}"]
    with pytest.raises(RunError, match="started from other weights"):
        finetune(load_finetune("longvit/table1_brca", other), cohort, tmp_path, resume=True)


def test_a_fold_that_is_killed_goes_on_from_its_last_epoch(cohort, tmp_path, monkeypatch):
    recipe = load_finetune("longvit/table1_brca", [*CLASSES, "fit.save_every=1000", "at_once=2"])
    loss, calls = EndToEnd.loss, []

    def killed(self, views, clock):
        calls.append(clock.step)
        if clock.step == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return loss(self, views, clock)

    monkeypatch.setattr(EndToEnd, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, cohort, tmp_path / "killed", folds=[0])
    assert finetune(recipe, cohort, tmp_path / "killed", folds=[0]).done == (0,)
    assert calls == [0, 1, 2, 3, 2, 3]  # two steps are an epoch
    finetune(recipe, cohort, tmp_path / "whole", folds=[0])
    one, two = ((tmp_path / of / "fold_0/predictions.json").read_bytes() for of in ("killed", "whole"))
    assert one == two


@pytest.mark.parametrize("where", ["validation", "test part"])
def test_a_signal_while_slides_are_predicted_stops_the_run_and_loses_nothing(where, cohort, tmp_path, monkeypatch):
    changes = [*CLASSES, "outcome.splits={kind: monte_carlo, folds: 1, val_fraction: 0.25, test_fraction: 0.25}"]
    recipe = load_finetune("longvit/table1_brca", changes)
    whole = finetune(recipe, cohort, tmp_path / "whole")
    logits, calls = image_model.predict_images, []

    def stopped(model, images, **options):
        calls.append(model.training)
        if len(calls) == (1 if where == "validation" else 3):  # two epochs are validated, then the test part
            os.kill(os.getpid(), signal.SIGTERM)
        return logits(model, images, **options)

    monkeypatch.setattr(image_model, "predict_images", stopped)
    first = finetune(recipe, cohort, tmp_path / "stopped")
    assert (first.preempted, first.done, first.study) == (True, (), None)
    again = finetune(recipe, cohort, tmp_path / "stopped", resume=True)
    assert again.study is not None
    assert whole.study is not None
    one, two = (study.arms[0].result.predictions.probabilities for study in (whole.study, again.study))
    assert np.array_equal(one, two)
    lines = [[line.get("val_loss") for line in _metrics(tmp_path / of / "fold_0")] for of in ("whole", "stopped")]
    assert lines[0] == lines[1]


def test_a_slide_that_cannot_be_opened_is_left_out_and_named(cohort, tmp_path):
    broken = tmp_path / "slides"
    broken.mkdir()
    rows = [{"slide": slide.uri, "patient": slide.patient, **slide.labels} for slide in cohort]
    damaged = broken / "damaged.svs"
    damaged.write_bytes(b"II*\0 this is no slide")
    rows.append({**rows[0], "slide": str(damaged), "patient": "damaged"})
    table = tmp_path / "cohort.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = finetune(load_finetune("longvit/table1_brca", CLASSES), str(table), tmp_path / "run", folds=[0])
    assert [failure.slide for failure in found.failures] == ["damaged"]
    assert "damaged" in (tmp_path / "run/failures.csv").read_text(encoding="utf-8")


def test_the_best_epoch_is_chosen_by_the_validation_part(cohort, tmp_path):
    changes = [
        *CLASSES, "outcome.select=best", "outcome.splits={kind: monte_carlo, folds: 1, val_fraction: 0.25, "
        "test_fraction: 0.25}", "fit.epochs=4", "fit.lr=3e-2",
    ]  # fmt: skip
    found = finetune(load_finetune("longvit/table1_brca", changes), cohort, tmp_path)
    fold = tmp_path / "fold_0"
    lines = [line for line in _metrics(fold) if "val_loss" in line]
    best = json.loads((fold / "best.json").read_text(encoding="utf-8"))
    lowest = min(lines, key=lambda line: line["val_loss"])
    assert best == pytest.approx({"step": lowest["step"], "val_loss": lowest["val_loss"]})
    assert len(lines) == 4
    assert found.study is not None
    assert json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))["members"][0]["model"] == "fold_0/best"


def test_survival_from_slides(cohort, tmp_path):
    labels = _survival(cohort, tmp_path)
    changes = [*TINY, "outcome.splits={folds: 2}", "outcome.loss.bins=2", "fit.epochs=1"]
    found = finetune(load_finetune("longvit/table2_ucec", changes), cohort, tmp_path / "run", labels=labels)
    assert found.study is not None
    predictions = found.study.arms[0].result.predictions
    assert np.isfinite(predictions.risk).all()
    assert predictions.survival.shape == (len(cohort), 2)


def test_new_slides_are_predicted_by_all_folds_together(run, cohort, tmp_path):
    model = load_image_model(run.folder)
    rows, failures = model.predict(cohort)
    assert not failures
    assert [row.name for row in rows] == [slide.name for slide in cohort]
    assert {row.label for row in rows} <= set(model.classes)
    table = tmp_path / "slides.csv"
    table.write_text("\n".join(["slide", *(slide.uri for slide in cohort)]), encoding="utf-8")
    said = CliRunner().invoke(app, ["predict", str(run.folder), str(table), "-o", str(tmp_path / "predicted.csv")])
    assert said.exit_code == 0, said.output
    written = list(csv.DictReader((tmp_path / "predicted.csv").open(encoding="utf-8")))
    assert [float(row[f"p_{model.classes[1]}"]) for row in written] == pytest.approx(
        [row.probabilities[1] for row in rows], abs=1e-5
    )


def test_the_command_trains_and_reports(cohort, tmp_path):
    table, labels = tmp_path / "slides.csv", tmp_path / "labels.csv"
    table.write_text("\n".join(["slide", *(slide.uri for slide in cohort)]), encoding="utf-8")
    lines = ["slide_id,case_id,subtype", *(f"{s.name},{s.patient},{s.labels['subtype']}" for s in cohort)]
    labels.write_text("\n".join(lines), encoding="utf-8")
    sets = [word for change in [*CLASSES, "fit.epochs=1"] for word in ("--set", change)]
    arguments = ["train", "longvit/table1_brca", "--data", str(table), "--labels", str(labels), *sets]
    said = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "run")])
    assert said.exit_code == 0, said.output
    assert "2 of 2 folds done" in said.output
    assert (tmp_path / "run/report.html").is_file()


def test_the_trained_encoder_embeds(run):
    encoder, card = open_longvit(run.folder / "fold_0")
    assert card.config.norm == "finetune"
    assert encoder(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 24)


def test_a_plan_needs_no_slides():
    said = CliRunner().invoke(app, ["train", "longvit/table1_brca", "--plan"])
    assert said.exit_code == 0, said.output
    assert "1,048,576" in said.output


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _survival(cohort, folder):
    """A table of times, most of them of events, in MCAT's form."""
    rng, table = np.random.default_rng(0), folder / "labels.csv"
    lines = ["slide_id,case_id,survival_months,censorship"]
    for slide in cohort:
        lines.append(f"{slide.name},{slide.patient},{rng.uniform(1, 60):.2f},{int(rng.random() < 0.2)}")
    table.write_text("\n".join(lines), encoding="utf-8")
    return table

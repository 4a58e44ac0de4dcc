"""Heads on slide embeddings: the same protocol as on tiles, on one vector a slide, from files, tables and arrays."""

import csv
import logging
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.embeddings.slide_store import SlideStore, write_slide_vector
from gigatome.evaluation.predict import predict_slides
from gigatome.evaluation.protocol import evaluate
from gigatome.evaluation.study_options import StudyOptions
from gigatome.evaluation.study_run import run_study
from gigatome.evaluation.units import SurvivalTarget

STATED = {"target_mpp": 1.0, "patch_size": 256, "view_tiles": 5}


def made(folder, *, slides=60, dim=8, seed=0, weights="abc", classes=2, **stated):
    """A folder of slide embeddings, a table of labels as Giga-SSL's, and the vectors and classes in their order."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((slides, dim)).astype(np.float32), np.arange(slides) % classes
    x[np.arange(slides), y] += 1.2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    names = [f"TCGA-AA-{1000 * seed + i // 2:04}-01Z-00-DX{i % 2 + 1}.X{i}" for i in range(slides)]  # two a patient
    where = folder / "10x_256px_0px_overlap" / "slide_features_giga"
    stated = {**STATED, **stated}
    for name, vector in zip(names, x, strict=True):
        path = where / f"{name}.h5"
        write_slide_vector(path, vector, encoder="giga", weights=weights, patient=name[:12], stated=stated)
    months = np.repeat(1 + 9 * random.random(slides), 2)
    rows = ["ID,label,months,event", *(f"{names[i]},{y[i]},{months[i]:.3f},1" for i in range(slides))]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return where, folder / "labels.csv", names, x, y


def published_splits(folder, names, count=3):
    """``split_k.csv`` with train and test, slides of one patient on both sides."""
    folder.mkdir()
    for k in range(count):
        order = np.random.default_rng(k).permutation(names).tolist()
        train, test = order[:45], order[45:]
        with (folder / f"split_{k}.csv").open("w", newline="") as handle:
            csv.writer(handle).writerows([["", "train", "test"], *(
                [i, name, test[i] if i < len(test) else ""] for i, name in enumerate(train)
            )])  # fmt: skip
    return folder


def test_the_papers_evaluation_on_the_authors_tables(tmp_path, caplog):
    folder, labels, names, x, y = made(tmp_path, classes=3)
    splits = published_splits(tmp_path / "splits", names)
    with pytest.raises(EvaluationError, match="patients in both train and test, such as TCGA"):
        evaluate(folder, labels, target="label", head="giga", folds=splits)
    with caplog.at_level(logging.WARNING, "gigatome"):
        result = evaluate(folder, labels, target="label", head="giga", folds=splits, leaks="warn", resamples=9)
    assert "patients in both train and test" in caplog.text
    place = {name: i for i, name in enumerate(names)}
    for k, fold in enumerate(result.folds):
        with (splits / f"split_{k}.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        train, test = ([place[row[side]] for row in rows if row[side]] for side in ("train", "test"))
        model = LogisticRegression(C=10, class_weight="balanced", max_iter=1000, tol=1e-8)
        p = model.fit(x[train].astype(float), y[train]).predict_proba(x[test].astype(float))
        assert fold.auroc == pytest.approx(roc_auc_score(y[test], p, multi_class="ovr"), abs=1e-6)
    assert (result.encoder, result.n_slides) == ("giga", len(set(result.predictions.slides)))


def test_every_form_gives_the_same_scores(tmp_path):
    folder, labels, names, x, _ = made(tmp_path)
    np.save(tmp_path / "ids.npy", np.array(names))
    np.save(tmp_path / "embeddings.npy", x)
    shown = {}
    for head in ("linear", "knn", "prototype"):
        options = {"target": "label", "head": head, "folds": 3, "resamples": 9}
        shown[head] = evaluate(folder, labels, **options)
        arrays = evaluate(SlideStore.open(tmp_path), labels, **options)
        assert np.array_equal(arrays.predictions.probabilities, shown[head].predictions.probabilities)
    assert shown["linear"].scores.auroc > 0.8
    target = SurvivalTarget("months", event="event")
    survival = evaluate(folder, labels, target=target, head="cox", folds=3, resamples=9)
    assert (survival.level, survival.n_slides, survival.n_patients) == ("patient", 60, 30)
    pytest.importorskip("pyarrow", reason="the extra tables is not installed")
    SlideStore.open(folder).write_table(tmp_path / "all.parquet")
    table = evaluate(tmp_path / "all.parquet", labels, target="label", head="linear", folds=3, resamples=9)
    assert np.array_equal(table.predictions.probabilities, shown["linear"].predictions.probabilities)


def test_slides_without_a_sound_embedding_are_left_out(tmp_path):
    folder, labels, names, *_ = made(tmp_path)
    (folder / f"{names[0]}.h5").unlink()
    bad = np.full(8, np.nan, np.float32)
    write_slide_vector(folder / f"{names[1]}.h5", bad, encoder="giga", weights="abc", patient="", stated=STATED)
    result = evaluate(folder, labels, target="label", head="linear", folds=3, resamples=9)
    assert result.without_embeddings == tuple(sorted(names[:2]))
    with pytest.raises(EvaluationError, match="holds embeddings of slides, and level tile takes those of tiles"):
        evaluate(folder, labels, target="label", level="tile", folds=3)


def test_a_study_is_kept_and_predicts_new_slides(tmp_path):
    folder, labels, *_ = made(tmp_path / "a")
    options = StudyOptions((str(folder),), str(labels), target="label", heads=("giga", "mean"),
                           options={"mean": {"fit": {"epochs": 1}}}, resamples=9)  # fmt: skip
    study = run_study(replace(options, splits=replace(options.splits, folds=3)), tmp_path / "study")
    assert study.arms[0].result.scores.auroc > 0.8
    new = made(tmp_path / "b", slides=8, seed=1)[0]
    for slides in (new, tmp_path / "b"):
        model, rows, failures = predict_slides(tmp_path / "study", slides, arm="giga")
        assert (len(rows), failures, model.origin.tiling["view_tiles"]) == (8, (), 5)
    by_patient = predict_slides(tmp_path / "study", new, arm="giga", by_patient=True)[1]
    assert len(by_patient) == 4
    other = made(tmp_path / "c", slides=8, seed=1, weights="xyz")[0]
    with pytest.raises(EvaluationError, match=r"by giga \(weights xyz\); the head learnt from 8 by giga \(weights abc"):
        predict_slides(tmp_path / "study", other, arm="giga")
    wide = made(tmp_path / "d", slides=8, seed=1, view_tiles=20)[0]
    with pytest.raises(EvaluationError, match="tiles of 20 to a view of a slide, the head learnt from 5"):
        predict_slides(tmp_path / "study", wide, arm="giga")
    with pytest.raises(ConfigError, match=r"the heads learnt from slides; embed the slides with .* --level slide"):
        predict_slides(tmp_path / "study", "x.svs", arm="giga", encoder="e", job=tmp_path / "job")


def test_on_the_command_line(tmp_path):
    folder, labels, names, *_ = made(tmp_path)
    splits = published_splits(tmp_path / "splits", names)
    arguments = ["evaluate", folder, "--labels", labels, "--target", "label", "--head", "giga", "--folds", splits]
    for more in (["--leaks", "warn"], ["--leaks", "warn", "-o", tmp_path / "out", "--set", "resamples=9"]):
        said = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *more]])
        assert said.exit_code == 0, said.output
    assert "giga" in said.output
    assert (tmp_path / "out" / "models" / "giga" / "model.json").is_file()

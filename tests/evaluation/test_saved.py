"""Heads that are kept: an ensemble that predicts new slides, and refuses embeddings unlike those it knows."""

import csv
import io
import json

import numpy as np
import pytest
from made_stores import make

from gigatome.core.errors import ConfigError, EvaluationError, StoreError
from gigatome.embeddings.store import Bag, read_bag, write_bag
from gigatome.evaluation.heads import find_head
from gigatome.evaluation.predict import predict_slides
from gigatome.evaluation.protocol import learn, prepare
from gigatome.evaluation.saved import load_model, predictions_csv, save_model
from gigatome.evaluation.units import SurvivalTarget

SURVIVAL = SurvivalTarget("survival_months", censorship="censorship")
FAST = {"fit": {"epochs": 4, "lr": 3e-3, "batch_bags": 4}, "bins": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), patients=40, weights="w1")


def keep(made, folder, head="linear", target="subtype", level=None):
    prepared = prepare(made.store, made.cohort, target, 3, level=level)
    name, found = find_head(head, FAST if head == "abmil" else None)
    result, runs = learn(prepared, made.store, target, name, found, seed=0, resamples=20)
    save_model(folder, prepared.units, prepared.data, runs, result)
    return prepared, result, runs


@pytest.mark.parametrize("head", ["linear", "abmil"])
def test_new_slides_get_the_mean_of_all_heads(made, tmp_path, head):
    keep(made, tmp_path / "model", head)
    new = make(tmp_path / "new", patients=12, first=200, weights="w1")
    model, rows, failures = predict_slides(tmp_path / "model", new.store)
    assert not failures
    truth = {slide.name: slide.labels["subtype"] for slide in new.cohort}
    assert np.mean([row.label == truth[row.name] for row in rows]) > 0.8
    data = prepare(new.store, new.cohort, "subtype", 2).data
    every = np.stack([fitted.predict(data).probabilities for fitted in model.heads])
    np.testing.assert_allclose([row.probabilities for row in rows], every.mean(0))
    assert len(model.heads) == 3
    table = list(csv.DictReader(io.StringIO(predictions_csv(model.level, model.classes, rows))))
    assert list(table[0]) == ["slide", "predicted", "p_a", "p_b", "spread", "distance", "unusual"]
    assert [line["predicted"] for line in table] == [row.label for row in rows]


def test_the_threshold_is_the_best_out_of_fold(made, tmp_path):
    _, result, _ = keep(made, tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    p, y = result.predictions.probabilities[:, 1], result.predictions.y

    def balance(threshold):
        return (p[y == 1] >= threshold).mean() + (p[y == 0] < threshold).mean()

    assert balance(card["threshold"]) == max(balance(value) for value in [*p, 2.0])
    tiling = {"patch_size": 256.0, "target_magnification": 20.0}
    assert card["origin"] == {"encoder": "enc", "weights": "w1", "dim": 8, "tiling": tiling, "background": ""}
    assert card["cohort"]["counts"] == {"a": 20, "b": 20}
    assert card["split_hash"] == result.split_hash


@pytest.mark.parametrize("head", ["cox", "abmil"])
def test_risks_are_shares_of_the_training_patients(made, tmp_path, head):
    prepared, _, runs = keep(made, tmp_path / "model", head, SURVIVAL)
    model = load_model(tmp_path / "model")
    rows = model.predict(prepared.data)
    risk = np.array([row.risk for row in rows])
    assert (risk >= 0).all()
    assert (risk <= 1).all()
    assert {row.label for row in rows} == {"high risk", "low risk"}
    expected = np.mean(
        [[(run.training_risk < r).mean() for r in run.fitted.predict(prepared.data).risk] for run in runs], axis=0
    )
    np.testing.assert_allclose(risk, expected, atol=0.06)  # by percentiles of 26 training patients
    assert np.corrcoef(risk, expected)[0, 1] > 0.99


def test_slides_unlike_the_training_slides_are_marked(made, tmp_path):
    keep(made, tmp_path / "model")
    new = make(tmp_path / "new", patients=4, first=300, weights="w1")
    bag = read_bag(new.store.path("s301_0"))
    write_bag(new.store.path("s301_0"), Bag(bag.name, "enc", bag.coords, bag.embeddings + 5, bag.attrs, bag.encoding))
    _, rows, _ = predict_slides(tmp_path / "model", new.store)
    assert {row.name for row in rows if row.unusual} == {"s301_0"}


def test_patients_are_predicted_together(made, tmp_path):
    keep(made, tmp_path / "model")
    new = make(tmp_path / "new", patients=3, slides=2, first=400, weights="w1")
    _, rows, _ = predict_slides(tmp_path / "model", new.store, by_patient=False)
    assert len(rows) == 6
    keep(made, tmp_path / "patients", level="patient")
    _, rows, _ = predict_slides(tmp_path / "patients", new.store)
    assert len(rows) == 6  # no barcode says whose the slides are


def test_embeddings_of_another_encoder_or_tiling_are_refused(made, tmp_path):
    keep(made, tmp_path / "model")
    for number, (change, message) in enumerate(
        [
            ({"weights": "w2"}, "weights w2.*weights w1"),
            ({"dim": 5, "weights": "w1"}, "5 numbers"),
            ({"encoder": "other"}, "no hash says"),
        ]
    ):
        new = make(tmp_path / str(number), patients=2, **change)
        with pytest.raises(EvaluationError, match=message):
            predict_slides(tmp_path / "model", new.store)
    same = make(tmp_path / "same", patients=2)  # TRIDENT's files do not state a hash: the name must do
    assert len(predict_slides(tmp_path / "model", same.store)[1]) == 2
    path = same.store.path("s000_0")
    bag = read_bag(path)
    write_bag(path, Bag(bag.name, "enc", bag.coords, bag.embeddings, {**bag.attrs, "target_magnification": 10.0}))
    with pytest.raises(EvaluationError, match="cut into different tiles"):
        predict_slides(tmp_path / "model", same.store)
    same.store.path("s001_0").unlink()
    with pytest.raises(EvaluationError, match="tiles of 10 × magnification, the head learnt from 20"):
        predict_slides(tmp_path / "model", same.store)


def test_a_slide_that_cannot_be_used_is_a_failure_and_the_others_go_on(made, tmp_path):
    keep(made, tmp_path / "model")
    new = make(tmp_path / "new", patients=3, first=500, weights="w1")
    bag = read_bag(new.store.path("s501_0"))
    write_bag(
        new.store.path("s501_0"), Bag(bag.name, "enc", bag.coords[:0], bag.embeddings[:0], bag.attrs, bag.encoding)
    )
    _, rows, failures = predict_slides(tmp_path / "model", new.store)
    assert [row.name for row in rows] == ["s500_0", "s502_0"]
    assert [(failure.slide, failure.message) for failure in failures] == [("s501_0", "no tiles")]


def test_folders_that_hold_no_heads(made, tmp_path):
    with pytest.raises(StoreError, match="holds no heads"):
        predict_slides(tmp_path, made.store)
    for arm in ("one", "two"):
        keep(made, tmp_path / "models" / arm)
    with pytest.raises(ConfigError, match="name one of its arms: one, two"):
        predict_slides(tmp_path, made.store)
    assert len(predict_slides(tmp_path, made.store, arm="two")[1]) == 40
    with pytest.raises(ConfigError, match="give the encoder"):
        predict_slides(tmp_path, made.cohort, arm="two")
    for nonsense in ("[]", "{}", '{"members": null}'):
        (tmp_path / "models" / "two" / "model.json").write_text(nonsense)
        with pytest.raises(StoreError, match="holds no saved heads"):
            load_model(tmp_path / "models" / "two")
    (tmp_path / "models" / "one" / "fold_1.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="holds no saved heads"):
        load_model(tmp_path / "models" / "one")


def test_a_table_says_whose_the_slides_are(made, tmp_path):
    keep(made, tmp_path / "model")
    new = make(tmp_path / "new", patients=3, slides=2, first=600, weights="w1")
    model, rows, _ = predict_slides(tmp_path / "model", new.store, by_patient=True, patients=new.labels)
    assert [row.name for row in rows] == ["p600", "p601", "p602"]
    assert predictions_csv(model.level, model.classes, rows).startswith("patient,predicted")
    lines = new.labels.read_text().splitlines()
    new.labels.write_text("\n".join([*lines, *(line.replace(",a,", ",c,") for line in lines[1:])]))
    again = predict_slides(tmp_path / "model", new.store, by_patient=True, patients=new.labels)[1]
    assert [row.probabilities for row in again] == [row.probabilities for row in rows]  # a slide counts once


def test_heads_trained_on_another_device_predict_on_this_one(made, tmp_path):
    keep(made, tmp_path, "abmil")
    card = json.loads((tmp_path / "model.json").read_text())
    for member in card["members"]:
        member["head"]["fit"]["device"] = "cuda"
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert len(predict_slides(tmp_path, made.store)[1]) == 40


def test_files_by_different_encoders_in_one_folder_are_refused(made, tmp_path):
    new = make(tmp_path, patients=3)
    bag = read_bag(new.store.path("s001_0"))
    write_bag(new.store.path("s001_0"), Bag(bag.name, "uni", bag.coords, bag.embeddings, bag.attrs))
    with pytest.raises(StoreError, match=r"different encoders .*s001_0 by uni"):
        prepare(new.store, new.cohort, "subtype", 2)

"""Models of whole slides: several slides of a unit, the folds together, and slides that cannot be read."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from made_studies import class_result, survival_result
from typer.testing import CliRunner

from gigatome.cli.main import app
from gigatome.core.errors import RunError, StoreError
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.slide_vit import SlideVit, SlideVitCard, new_slide_vit, open_slide_vit, save_slide_vit
from gigatome.evaluation.crossval import FoldResult
from gigatome.evaluation.heads import Prediction
from gigatome.evaluation.image_model import is_image_model, load_image_model, save_image_model, unit_logits
from gigatome.evaluation.splits import Split
from gigatome.evaluation.units import ClassTarget, SurvivalTarget, make_units
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide
from gigatome.tiles.slide_image_stream import damage
from gigatome.tiles.slide_images import SlideImageOptions, read_slide_image, slide_frame
from tiff_files import aperio_pages, picture, write_tiff

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("IDC", "ILC")
MODELS = ("fold_0/best", "fold_1/encoder")
ENCODER = LongVitConfig(
    segments=(4, 8), ratios=(1, 2), patch_size=8, dim=12, depth=2, heads=3, ffn_dim=20, grid=4, norm="finetune"
)
CARD = SlideVitCard("mine", ENCODER, SlideImageOptions(32, crop=(0.5, 1.0), flip=True), "subtype", "slide", CLASSES)
SURVIVAL = replace(CARD, target="survival", level="patient", classes=(), edges=(0.0, 10.0, 20.0, 30.0))
TRAINING_RISK = (np.linspace(-3, 0, 50), np.linspace(-2, -1, 40))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six slides of four patients; B's are s4, s1 and s2 in the cohort's order."""
    folder = tmp_path_factory.mktemp("slides")
    patients = {"s0": "A", "s4": "B", "s1": "B", "s2": "B", "s3": "C", "s5": "D"}
    slides = []
    for number, (name, patient) in enumerate(patients.items()):
        path = folder / f"{name}.tif"
        image = picture(120 + 8 * number, 90, seed=number)
        image[:, : 20 * number] //= 3
        tifffile.imwrite(path, image, tile=(64, 64), compression="deflate", photometric="rgb")
        labels = {"subtype": CLASSES[patient in "BD"], "time": str(ord(patient)), "event": "1"}
        slides.append(CohortSlide(str(path), name, patient, 0.5, labels))
    return Cohort(tuple(slides), "six slides")


@pytest.fixture(scope="module")
def classes(tmp_path_factory, cohort):
    return written(tmp_path_factory.mktemp("classes"), cohort, CARD)


@pytest.fixture(scope="module")
def survival(tmp_path_factory, cohort):
    return written(tmp_path_factory.mktemp("survival"), cohort, SURVIVAL)


def written(folder, cohort, card, *, precision="fp32", slides="all", level=None):
    """A folder with models of two folds, far from their initial weights, and the card of both."""
    card = replace(card, level=level or card.level)
    for seed, name in enumerate(MODELS):
        random = torch.Generator().manual_seed(seed)
        made = new_slide_vit(ENCODER, len(card.classes) or len(card.edges) - 1, None, seed=seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
        save_slide_vit(made, folder / name, card)
    target = ClassTarget("subtype") if card.classes else SurvivalTarget("time", event="event")
    units = make_units(cohort, target, level=card.level)
    split = Split(np.arange(1, len(units)), np.arange(1))
    risks = (np.zeros(0), np.zeros(0)) if card.classes else TRAINING_RISK
    runs = [FoldResult(split, Prediction(np.zeros((1, len(card.classes)))), risk) for risk in risks]
    result = class_result(1.0, n=40, folds=4, level=card.level) if card.classes else survival_result(1.0, n=40)
    save_image_model(folder, MODELS, units, runs, result, precision=precision, slides=slides)
    return folder


def by_hand(folder, slide, precision="fp32"):
    """Logits [models, outputs] of a slide, without what is tested."""
    said = []
    with slide.open() as opened:
        pixels = read_slide_image(opened, slide_frame(opened, SlideImageOptions(32))).pixels
    for name in MODELS:
        model, _ = open_slide_vit(folder / name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            said.append(model(torch.from_numpy(pixels)[None])[0].double().numpy())
    return np.stack(said)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def of(cohort, *names):
    return [slide for name in names for slide in cohort if slide.name == name]


def unreadable(folder, name, patient):
    path = folder / f"{name}.tif"
    path.write_bytes(b"no slide at all" * 10)
    return CohortSlide(str(path), name, patient)


def damaged(folder, name="bad"):
    pages = aperio_pages(picture(900, 700))
    pages[0].chunks[50] = pages[2].chunks[4] = b"\xff\xd8\xff\xd9"
    return CohortSlide(str(write_tiff(folder / f"{name}.svs", pages)), name, name)


def probabilities(rows):
    return np.array([row.probabilities for row in rows])


def test_a_unit_is_the_mean_of_its_slides(classes, cohort):
    model, card = open_slide_vit(classes / MODELS[1])
    units = [of(cohort, "s3"), of(cohort, "s2", "s4", "s1"), of(cohort, "s0", "s5")]
    logits, failures = unit_logits(model, units, card.images, device=torch.device("cpu"))
    expected = [np.mean([by_hand(classes, slide)[1] for slide in unit], 0) for unit in units]
    assert (logits.shape, failures) == ((3, 2), [])
    assert np.allclose(logits, expected, atol=1e-6)
    assert np.abs(np.diff(logits, axis=0)).min() > 1e-3
    none, _ = unit_logits(model, [], card.images, device=torch.device("cpu"))
    assert none.shape == (0, 2)


def test_the_folds_together_are_the_mean_of_what_each_says(classes, cohort):
    rows, failures = load_image_model(classes).predict(cohort)
    said = softmax(np.stack([by_hand(classes, slide) for slide in cohort]))  # [slides, models, classes]
    assert failures == ()
    assert [row.name for row in rows] == [slide.name for slide in cohort]
    assert np.allclose(probabilities(rows), said.mean(1), atol=1e-6)
    chosen = [CLASSES.index(row.label) for row in rows]
    assert np.allclose([row.spread for row in rows], said.std(1)[np.arange(6), chosen], atol=1e-6)
    assert np.abs(said[:, 0] - said[:, 1]).max() > 0.05


@pytest.mark.parametrize("level", ["slide", "patient"])
def test_patients_are_the_mean_of_their_slides(tmp_path, cohort, level):
    folder = written(tmp_path, cohort, CARD, level=level)
    rows, _ = load_image_model(folder).predict(cohort, by_patient=True if level == "slide" else None)
    members = {"A": ["s0"], "B": ["s4", "s1", "s2"], "C": ["s3"], "D": ["s5"]}
    logits = [np.mean([by_hand(folder, slide) for slide in of(cohort, *names)], 0) for names in members.values()]
    assert [row.name for row in rows] == list(members)
    assert np.allclose(probabilities(rows), softmax(np.stack(logits)).mean(1), atol=1e-6)


def test_the_first_slide_of_a_patient_speaks_alone_if_that_was_learnt(tmp_path, cohort, classes):
    folder = written(tmp_path, cohort, CARD, slides="first", level="patient")
    rows, failures = load_image_model(folder).predict(cohort)
    expected = softmax(np.stack([by_hand(folder, slide) for slide in of(cohort, "s0", "s1", "s3", "s5")])).mean(1)
    assert failures == ()
    assert [row.name for row in rows] == ["A", "B", "C", "D"]
    assert np.allclose(probabilities(rows), expected, atol=1e-6)
    before = unreadable(tmp_path, "r9", "B")  # comes first by name, but cannot be opened
    again, (failure,) = load_image_model(folder).predict(Cohort((before, *cohort), "seven slides"))
    assert (failure.slide, failure.stage) == ("r9", "open")
    assert {row.name: row.probabilities for row in again} == {row.name: row.probabilities for row in rows}
    slides, _ = load_image_model(folder).predict(cohort, by_patient=False)
    assert len(slides) == len(cohort)


def test_survival_is_the_mean_share_of_training_risks(survival, cohort):
    rows, _ = load_image_model(survival).predict(cohort)
    members = {"A": ["s0"], "B": ["s4", "s1", "s2"], "C": ["s3"], "D": ["s5"]}
    expected = []
    for names in members.values():
        logits = np.mean([by_hand(survival, slide) for slide in of(cohort, *names)], 0)
        risk = -np.cumprod(1 - 1 / (1 + np.exp(-logits)), axis=1).sum(1)
        grid = np.linspace(0, 1, 101)
        expected.append([np.interp(r, np.quantile(t, grid), grid) for r, t in zip(risk, TRAINING_RISK, strict=True)])
    shares = np.array(expected)
    assert [row.name for row in rows] == list(members)
    assert np.allclose([row.risk for row in rows], shares.mean(1), atol=1e-5)
    assert np.allclose([row.spread for row in rows], shares.std(1), atol=1e-5)
    assert [row.label for row in rows] == ["high risk" if share > 0.5 else "low risk" for share in shares.mean(1)]
    assert 0 < shares.mean(1).min() < shares.mean(1).max() < 1


def test_slides_that_cannot_be_read_do_not_stop_the_others(tmp_path, classes, cohort):
    model = load_image_model(classes)
    alone, _ = model.predict(cohort)
    one, other = unreadable(tmp_path, "one", "E"), unreadable(tmp_path, "other", "F")
    mixed = Cohort((one, *cohort.slides[:3], other, *cohort.slides[3:]), "eight slides")
    done = []
    rows, failures = model.predict(mixed, progress=lambda stage, count, total: done.append((stage, count, total)))
    assert [(row.name, row.probabilities) for row in rows] == [(row.name, row.probabilities) for row in alone]
    assert [(failure.slide, failure.stage, failure.error) for failure in failures] == [
        ("one", "predict", "NotASlideError"),
        ("other", "predict", "NotASlideError"),
    ]
    assert done == [("predict", count, 8) for count in range(1, 9)]
    with pytest.raises(StoreError, match="two slides: no slide could be predicted, such as one: "):
        model.predict(Cohort((one, other), "two slides"))


def test_output_that_is_no_number_does_not_stop_the_others(classes, cohort, monkeypatch):
    forward, calls = SlideVit.forward, []

    def sometimes(self, images, share=None):
        calls.append(len(images))
        return forward(self, images, share) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(SlideVit, "forward", sometimes)
    rows, (failure,) = load_image_model(classes).predict(cohort)
    assert failure.slide == "s4"
    assert "not finite" in failure.message
    assert [row.name for row in rows] == ["s0", "s1", "s2", "s3", "s5"]


def test_damage_is_one_entry_whoever_meets_it(tmp_path, classes, cohort):
    bad, good = damaged(tmp_path), cohort.slides[0]
    model, card = open_slide_vit(classes / MODELS[0])
    _, (failure,) = unit_logits(model, [[good], [bad]], card.images, device=torch.device("cpu"))
    rows, (again,) = load_image_model(classes).predict(Cohort((bad, good), "two slides"))
    assert again == failure == damage("bad", failure.message)
    assert "chunk" in failure.message
    assert len(rows) == 2


def test_the_precision_is_that_of_the_scores(tmp_path, cohort):
    folder = written(tmp_path, cohort, CARD, precision="bf16")
    rows, _ = load_image_model(folder).predict(cohort)
    half, single = (
        softmax(np.stack([by_hand(folder, slide, precision) for slide in cohort])).mean(1)
        for precision in ("bf16", "fp32")
    )
    assert np.allclose(probabilities(rows), half, atol=1e-7)
    assert np.abs(half - single).max() > 1e-4


def test_the_next_slide_is_read_while_one_is_predicted(classes, cohort, monkeypatch):
    second, forward, read_axes = threading.Event(), SlideVit.forward, Slide.read_axes

    def note(self, *axes, **how):
        if self.name == "s4":
            second.set()
        return read_axes(self, *axes, **how)

    def wait(self, images, share=None):
        assert second.wait(20)  # the network is at the first slide until the second is being read
        return forward(self, images, share)

    monkeypatch.setattr(Slide, "read_axes", note)
    monkeypatch.setattr(SlideVit, "forward", wait)
    rows, failures = load_image_model(classes).predict(cohort)
    assert (len(rows), failures) == (6, ())


def test_memory_that_does_not_suffice_is_said_plainly(classes, cohort, monkeypatch):
    def full(self, images, share=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB. If reserved but")

    monkeypatch.setattr(SlideVit, "forward", full)
    with pytest.raises(RunError, match=r"out of memory \(.*40 GiB\); a slide of 32 × 32 px does not fit on cpu; use a"):
        load_image_model(classes).predict(cohort)


def test_what_is_not_finished_or_damaged_is_refused(tmp_path, classes, cohort):
    run = tmp_path / "run"
    run.mkdir()
    assert not is_image_model(run)
    (run / "recipe.yaml").write_text("name: mine\noutcome: {target: subtype}\n")
    assert is_image_model(run)
    with pytest.raises(StoreError, match="is not finished") as error:
        load_image_model(run)
    assert f"gigatome train {run / 'recipe.yaml'} --data SLIDES --labels CSV -o {run} --resume" in str(error.value)
    said = CliRunner().invoke(app, ["predict", str(run), cohort.slides[0].uri, "-o", str(tmp_path / "out.csv")])
    assert isinstance(said.exception, StoreError)
    assert "is not finished" in str(said.exception)
    card = json.loads((classes / "model.json").read_text(encoding="utf-8"))
    (run / "model.json").write_text(json.dumps(card | {"precision": "fp8"}))
    with pytest.raises(StoreError, match=r"holds no fine-tuned models .*fp8"):
        load_image_model(run)
    (run / "model.json").write_text(json.dumps(card))
    with pytest.raises(StoreError, match="holds no LongViT"):
        load_image_model(run)

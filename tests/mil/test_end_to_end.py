"""A LongViT with a head learns from images of slides, through the one loop."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.core.errors import ConfigError, RunError
from gigatome.distributed import SequenceGroup
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.slide_vit import SlideVitCard, new_slide_vit, open_slide_vit
from gigatome.mil.end_to_end import EndToEnd, predict_slides
from gigatome.mil.losses import cox, cross_entropy, ranking, risk, survival_nll, time_bins
from gigatome.mil.model import Targets
from gigatome.tiles.slide_image_stream import Order, SlideImageBatch
from gigatome.tiles.slide_images import SlideImage, SlideImageOptions
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

CONFIG = LongVitConfig(
    segments=(8, 16), ratios=(1, 2), patch_size=4, dim=16, depth=2, heads=2, ffn_dim=32, grid=4, norm="finetune"
)
CARD = SlideVitCard("toy", CONFIG, SlideImageOptions(image_size=16), "subtype", "slide", ("a", "b"))
COUNT = 24
CLOCK = Clock(2, 10, 6)
FIT = FitOptions(
    steps=60, epoch_images=COUNT, batch_size=8, lr=3e-3, lr_scaling="none", min_lr=1e-4, weight_decay=0.05,
    weight_decay_end=0.05, clip=None, log_every=1, save_every=30,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Images:
    """A stream of images that are at hand."""

    pixels: np.ndarray
    order: Order

    def state(self):
        return {}

    def restore(self, state):
        assert state == {}

    def batches(self, start_step=0):
        step = start_step
        while True:
            units = self.order(step)
            yield SlideImageBatch(step, self.pixels[units], units)
            step += 1


def noise(seed=0):
    return np.random.default_rng(seed).integers(60, 196, (COUNT, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def classes():
    """Images of noise; in those of class 1 one patch somewhere is red."""
    random, y, pixels = np.random.default_rng(1), np.arange(COUNT) % 2, noise()
    for number in np.flatnonzero(y):
        row, column = 4 * random.integers(0, 4, 2)
        pixels[number, row : row + 4, column : column + 4] = (250, 5, 5)
    return pixels, Targets(torch.from_numpy(y))


@pytest.fixture(scope="module")
def lives():
    """Images of noise, the redder the shorter the life; a third of the lives are censored."""
    random, pixels = np.random.default_rng(2), noise(3)
    time = random.permutation(np.arange(1, COUNT + 1)).astype(np.float32)
    pixels[..., 0] = (255 - 9 * time[:, None, None] + random.integers(-9, 9, pixels.shape[:3])).clip(0, 255)
    event = np.arange(COUNT) % 3 > 0
    y = torch.from_numpy(time_bins(time, event).of(time))
    return pixels, Targets(y, torch.from_numpy(time), torch.from_numpy(event))


def method(targets, criterion, outputs=2, order=None, seed=0, **arguments):
    model = new_slide_vit(CONFIG, outputs, None, seed=seed, drop_path=0.1)
    return EndToEnd(model, targets, criterion, order or Order(COUNT, 8, 5), CARD, **arguments)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_to_tell_classes(tmp_path, classes):
    pixels, targets = classes
    learner = method(targets, cross_entropy(smoothing=0.1))
    result = fit(learner, Images(pixels, Order(COUNT, 8, 5)), FIT, tmp_path)
    found = lines(tmp_path)
    assert np.mean([line["loss"] for line in found[-3:]]) < 0.5 * found[0]["loss"]
    assert [line["accuracy"] for line in found[-3:]] == [1, 1, 1]
    model, card = open_slide_vit(result.encoder)
    assert card == CARD
    logits = predict_slides(model, pixels)
    assert np.array_equal(logits.argmax(1), targets.y)
    assert np.array_equal(logits, predict_slides(learner.model, pixels))


@pytest.mark.parametrize(("criterion", "outputs"), [(survival_nll(), 4), (cox(), 1), (ranking(), 1)])
def test_it_learns_to_order_risks(tmp_path, lives, criterion, outputs):
    pixels, targets = lives
    learner = method(targets, criterion, outputs)
    before = concordance(predict_slides(learner.model, pixels), targets)
    fit(learner, Images(pixels, Order(COUNT, 8, 5)), FIT, tmp_path)
    assert "accuracy" not in lines(tmp_path)[-1]
    assert before < 0.3
    assert concordance(predict_slides(learner.model, pixels), targets) > 0.9


def concordance(logits, targets):
    """Share of the pairs, of which one is known to have died first, that the risks put in order."""
    risks, time = risk(torch.from_numpy(logits)), targets.time
    pairs = (time[:, None] < time[None, :]) & targets.event[:, None]
    return ((risks[:, None] > risks[None, :]) & pairs).sum().item() / pairs.sum().item()


def test_training_is_that_of_plain_pytorch(tmp_path, classes):
    pixels, targets = classes
    order = Order(COUNT, 8, 5)
    options = replace(FIT, steps=5, grad_accumulation=4, weight_decay=2.0, weight_decay_end=2.0)
    options = replace(options, lr=1e-2, min_lr=1e-2)
    learner, plain = (new_slide_vit(CONFIG, 2, None, seed=3) for _ in range(2))
    fit(EndToEnd(learner, targets, cross_entropy(), order, CARD), Images(pixels, order), options, tmp_path)
    kept, decaying = [], []
    for name, parameter in plain.named_parameters():
        (kept if parameter.ndim == 1 or name == "backbone.pos_embed" else decaying).append(parameter)
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decaying, "weight_decay": 2.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(5):
        units = order(step)
        optimizer.zero_grad()
        F.cross_entropy(plain(torch.from_numpy(pixels[units])), targets.y[units]).backward()
        optimizer.step()
    for (name, found), wanted in zip(learner.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, classes):
    pixels, targets = classes
    stream, options = Images(pixels, Order(COUNT, 8, 5)), replace(FIT, steps=6, save_every=3)
    whole, first, second = (method(targets, cross_entropy()) for _ in range(3))
    fit(whole, stream, options, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(first, stream, options, tmp_path / "cut", progress=stop_at(5))
    fit(second, stream, options, tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def stop_at(step):
    def progress(_what, done, _steps):
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_views_are_images_with_what_is_known_of_them(classes, lives):
    order = Order(COUNT, 8, 5)
    for (pixels, targets), count in ((classes, 2), (lives, 4)):
        images = torch.from_numpy(pixels[order(2)])
        views = method(targets, cross_entropy()).views(images, torch.Generator(), CLOCK)
        assert len(views) == count
        known = (targets.y, targets.time, targets.event)[: count - 1]
        assert views[0] is images
        for view, value in zip(views[1:], known, strict=True):
            assert torch.equal(view, value[order(2)])


def test_loss_is_the_criterion_and_accuracy_is_of_classes(classes, lives):
    for (pixels, targets), criterion, facts in ((classes, cross_entropy(), {"accuracy"}), (lives, cox(), set())):
        learner = method(targets, criterion, 2 if facts else 1).eval()
        part = [view[:3] for view in learner.views(torch.from_numpy(pixels[learner._order(2)]), None, CLOCK)]
        loss, found = learner.loss(part, CLOCK)
        logits = learner.model(part[0])
        torch.testing.assert_close(loss, criterion(logits, Targets(*part[1:])))
        assert set(found) == facts
        if facts:
            assert found["accuracy"] == (logits.argmax(1) == part[1]).float().mean()


def test_other_batches_are_refused(classes):
    learner = method(classes[1], cross_entropy())
    images = torch.from_numpy(classes[0][:8])
    wrong = {
        r"uint8 \[B, 16, 16, 3\], and its stream gives float32 \[8, 16, 16, 3\]": images.float(),
        r"gives uint8 \[8, 12, 16, 3\]": images[:, :12],
        r"gives uint8 \[8, 16, 16\]": images[..., 0],
        "step 2: the stream gives 7 images, and the order has 8 units": images[:7],
    }
    for message, batch in wrong.items():
        with pytest.raises(RunError, match=message):
            learner.views(batch, torch.Generator(), CLOCK)


def test_rows_of_a_share_are_what_is_taken(classes):
    share = Share(SequenceGroup(size=3, rank=1), 4)  # rows of patches 1 of 4, so pixels 4 to 8
    learner = method(classes[1], cross_entropy(), share=share)
    images = torch.from_numpy(classes[0][:8])
    assert learner.views(images[:, 4:8], torch.Generator(), CLOCK)[0].shape == (8, 4, 16, 3)
    with pytest.raises(RunError, match=r"uint8 \[B, 4, 16, 3\], and its stream gives uint8 \[8, 16, 16, 3\]"):
        learner.views(images, torch.Generator(), CLOCK)
    with pytest.raises(ConfigError, match="16 px do not divide into patches of 4 px in 5 rows"):
        method(classes[1], cross_entropy(), share=Share(SequenceGroup(size=3), 5))
    card = replace(CARD, images=SlideImageOptions(image_size=18))
    with pytest.raises(ConfigError, match="18 px do not divide into patches of 4 px"):
        EndToEnd(new_slide_vit(CONFIG, 2, None), classes[1], cross_entropy(), Order(COUNT, 8, 5), card)


def test_two_processes_that_share_slides_are_as_one(tmp_path):
    script = Path(__file__).with_name("sharing_ranks.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found["parameters"] == 47  # all there are
        assert max(found["loss"], found["gradients"], found["logits"]) < 1e-5


def test_a_loss_that_compares_needs_several(lives):
    learner = method(lives[1], cox(), 1)
    views = learner.views(torch.from_numpy(lives[0][:8]), torch.Generator(), CLOCK)
    with pytest.raises(ConfigError, match="compares slides with one another, and was given one"):
        learner.loss([view[:1] for view in views], CLOCK)
    assert torch.isfinite(learner.loss([view[:2] for view in views], CLOCK)[0])


def test_the_position_embedding_does_not_decay(classes):
    learner = method(classes[1], cross_entropy())
    names = dict(learner.named_parameters())
    assert [names[name] for name in learner.undecayed()] == [learner.model.backbone.pos_embed]
    assert set(learner.trained().parameters()) == set(learner.parameters())


def test_predictions(classes):
    pixels, _ = classes
    model = new_slide_vit(CONFIG, 2, None, drop_path=0.9).train()
    found = predict_slides(model, [pixels[0], SlideImage(pixels[1]), pixels[2][:8]])
    assert model.training
    assert (found.dtype, found.shape) == (np.float64, (3, 2))
    model.eval()
    for logits, image in zip(found, (pixels[0], pixels[1], pixels[2][:8]), strict=True):
        wanted = model(torch.from_numpy(image)[None])[0].detach().double().numpy()
        assert np.array_equal(logits, wanted)
    assert predict_slides(model, []).shape == (0, 2)
    assert np.array_equal(
        predict_slides(model, [pixels[0, :, ::-1]]), predict_slides(model, [pixels[0, :, ::-1].copy()])
    )
    coarse = predict_slides(model, pixels[:3], precision="bf16", device=torch.device("cpu"))
    np.testing.assert_allclose(coarse[:2], found[:2], rtol=0.1, atol=2e-3)
    assert not np.array_equal(coarse[:2], found[:2])


def test_predictions_in_the_midst_of_training(classes):
    learner = method(classes[1], cross_entropy())
    predict_slides(learner.model, classes[0][:2])
    views = learner.views(torch.from_numpy(classes[0][:8]), torch.Generator(), CLOCK)
    learner.loss(views, CLOCK)[0].backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_predictions_that_are_not_finite(classes):
    model = new_slide_vit(CONFIG, 2, None)
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    with pytest.raises(RunError, match="not finite for the image number 1"):
        predict_slides(model, classes[0][:2])
    assert model.training

"""DINOv2 as it learns, stops, goes on and is exported."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gigatome.encoders.vit import restore_encoder
from gigatome.encoders.weights import encoder_weights
from gigatome.encoders.zoo import load_encoder
from gigatome.selfsup.dinov2 import Dinov2
from gigatome.selfsup.losses import entropy
from gigatome.training.loop import FitOptions, fit

sys.path.insert(0, str(Path(__file__).parent))
from tiny_dinov2 import CLOCK, ENCODER, SEPARATE, SHARED, SINKHORN, VIEWS, TinyBatch, TinyStream, digest, make, views


@pytest.fixture
def tiles() -> torch.Tensor:
    return torch.from_numpy(next(TinyStream().batches()).images)


def test_it_learns_to_tell_a_few_tiles_apart(tmp_path):
    """It comes to predict views, and not because the teacher says the same of all tiles."""
    tiles = next(TinyStream(batch_size=16).batches()).images

    class Few(TinyStream):
        def batches(self, start_step=0):
            return itertools.repeat(TinyBatch(tiles))

    crops = replace(VIEWS, jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))
    options = replace(
        SHARED, views=crops, teacher_momentum=0.95, head_batch_norm=True, layer_decay=1.0, patch_embed_lr=1.0
    )
    method = Dinov2(ENCODER, options, seed=3)
    rates = {"lr": 3e-3, "lr_scaling": "none", "warmup_steps": 5}
    fit(method, Few(), FitOptions(steps=80, batch_size=16, epoch_images=160, log_every=10, **rates), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    with torch.no_grad():
        pictures = method.teacher.encoder.normalise(torch.from_numpy(tiles[:, :32, :32].copy()))
        answers = method.teacher.head["view"](method.teacher.encoder(pictures))
    answers = ((answers - method.center) / 0.07).softmax(-1)
    assert entropy(answers.mean(0)) - entropy(answers) > 0.3  # nats that the answer tells about the tile


def test_masked_patches_can_be_learnt_by_heart(tiles):
    """From what is around them: the loss comes down to the entropy of its targets, half of the views having any."""
    method = make(replace(SHARED, dino_weight=0.0, koleo_weight=0.0))
    batch, optimizer = views(method, tiles), torch.optim.Adam(method.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss, facts = method.loss(batch, CLOCK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) - float(facts["patch_entropy"]) / 2)
    assert losses[0] > 1
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("options", [replace(SHARED, drop_path=0.3), SINKHORN], ids=["centering", "sinkhorn"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(options, tmp_path):
    options = replace(options, high_resolution_epochs=1, high_resolution_global_size=40, high_resolution_local_size=24)
    run = FitOptions(steps=6, epoch_images=8, batch_size=4, lr=0.02, save_every=2, log_every=1, evaluate_every=3)

    def crash(step):
        raise KeyboardInterrupt(step)

    whole, first, second = make(options), make(options), make(options)
    fit(whole, TinyStream(), run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(first, TinyStream(), run, tmp_path / "cut", evaluate=crash)
    fit(second, TinyStream(), run, tmp_path / "cut", resume=True)
    assert digest(second.state_dict()) == digest(whole.state_dict())
    assert digest(first.state_dict()) != digest(whole.state_dict())


def test_export_writes_the_teachers_encoder(tmp_path, tiles):
    method = make(SEPARATE).eval()
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
    method.export(tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder")
    weights = encoder_weights(method.state_dict(), source="a checkpoint")  # what an unfinished run is read from
    unfinished = restore_encoder(encoder.config, weights, source="a checkpoint", name="tiny")
    images = encoder.normalise(tiles[:, :32, :32])
    with torch.no_grad():
        expected = method.teacher.encoder(images)
        assert torch.equal(encoder(images), expected)
        assert torch.equal(unfinished(images), expected)
        assert not torch.equal(method.student.encoder(images), expected)


def test_networks_are_compiled_once_however_many_patches_are_masked(tiles):
    method = make(SEPARATE)
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    for network in (method.student, method.teacher):
        network.compile(backend=backend, dynamic=False)
    counts, masked = [], set()
    for seed in range(4):
        batch = method.views(tiles, torch.Generator().manual_seed(seed), CLOCK)
        method.loss(batch, CLOCK)
        counts.append(len(compiled))
        masked.add(int(batch[-1].sum()))
    assert len(masked) > 1
    assert counts[0] > 0
    assert counts[-1] == counts[0]

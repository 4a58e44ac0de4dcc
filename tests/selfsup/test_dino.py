import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gigatome.core.errors import ConfigError
from gigatome.encoders.vit import EncoderConfig
from gigatome.encoders.zoo import load_encoder
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.losses import update_center
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from tiny_run import DINO, ENCODER, TinyBatch, TinyStream, make_dino

CLOCK = Clock(step=2, steps=10, epoch_steps=2)
FINITE = torch.tensor(True)


@pytest.fixture
def tiles() -> torch.Tensor:
    return torch.from_numpy(next(TinyStream().batches()).images)


def views(dino: Dino, tiles: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    return dino.views(tiles, torch.Generator().manual_seed(seed), CLOCK)


def test_the_defaults_are_dinos():
    options = DinoOptions()
    assert (options.out_dim, options.head_hidden_dim, options.head_bottleneck_dim) == (65536, 2048, 256)
    assert (options.student_temperature, options.teacher_temperature, options.center_momentum) == (0.1, 0.04, 0.9)
    assert (options.teacher_momentum, options.drop_path, options.freeze_last_layer_epochs) == (0.996, 0.1, 1)
    assert options.norm_last_layer
    assert (options.views.global_size, options.views.local_size, options.views.local_views) == (224, 96, 8)


def test_student_and_teacher_begin_alike_and_from_the_seed():
    one, again, other = make_dino(seed=1), make_dino(seed=1), make_dino(seed=2)
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, one.teacher.state_dict()[name])
        assert torch.equal(value, again.student.state_dict()[name])
    key = "encoder.vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(one.student.state_dict()[key], other.student.state_dict()[key])


def test_making_one_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make_dino()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_teacher_has_no_gradient_and_no_stochastic_depth(tiles):
    dino = make_dino().train()
    loss, _ = dino.loss(views(dino, tiles), CLOCK)
    loss.backward()
    assert dino.student.training
    assert not dino.teacher.training
    assert all(parameter.grad is None for parameter in dino.teacher.parameters())
    frozen = {"head.last_layer.weight_g"}  # of unit length
    assert {name for name, p in dino.student.named_parameters() if p.grad is None} == frozen
    globals_ = views(dino, tiles)[:2]
    assert torch.equal(dino.teacher(globals_), dino.teacher(globals_))
    assert not torch.equal(dino.student(globals_), dino.student(globals_))


def test_views_are_normalised_as_the_encoder_wants_them(tiles):
    config = replace(ENCODER, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    plain, shifted = views(make_dino(), tiles), views(Dino(config, DINO), tiles)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    for ours, theirs in zip(plain, shifted, strict=True):
        torch.testing.assert_close((ours * 0.5 + 0.5 - mean) / std, theirs, rtol=1e-5, atol=1e-5)


def test_logits_of_views_do_not_depend_on_their_company(tiles):
    dino = make_dino().eval()
    pictures = views(dino, tiles)
    together = dino.student(pictures)
    assert together.shape == (4, 4, 48)
    for view, logits in zip(pictures, together, strict=True):
        torch.testing.assert_close(dino.student([view])[0], logits, rtol=1e-4, atol=1e-5)


def test_loss_is_entropy_and_divergence(tiles):
    dino = make_dino()
    loss, facts = dino.loss(views(dino, tiles), CLOCK)
    torch.testing.assert_close(loss.detach(), facts["teacher_entropy"] + facts["kl"])
    assert 0 < float(facts["teacher_entropy"]) <= math.log(48)
    assert float(facts["kl"]) > 0


def test_after_step_moves_teacher_and_centre_exactly(tiles):
    dino = make_dino()
    pictures = views(dino, tiles)
    teacher_before = [p.clone() for p in dino.teacher.parameters()]
    with torch.no_grad():
        logits = dino.teacher(pictures[:2])
        for parameter in dino.student.parameters():
            parameter.add_(0.1)
    expected_center = update_center(dino.center, logits, DINO.center_momentum)
    dino.loss(pictures, CLOCK)
    dino.after_step(CLOCK, FINITE)
    momentum = 1 - (1 - DINO.teacher_momentum) * (1 + math.cos(math.pi * 0.2)) / 2
    torch.testing.assert_close(dino.center, expected_center)
    for now, before, student in zip(dino.teacher.parameters(), teacher_before, dino.student.parameters(), strict=True):
        torch.testing.assert_close(now, before * momentum + student * (1 - momentum), rtol=1e-6, atol=1e-7)


def test_after_a_bad_step_nothing_moves(tiles):
    dino = make_dino()
    before = {name: value.clone() for name, value in dino.state_dict().items()}
    with torch.no_grad():
        dino.loss([view * float("nan") for view in views(dino, tiles)], CLOCK)
    dino.after_step(CLOCK, torch.tensor(False))
    for name, value in dino.state_dict().items():
        assert torch.equal(value, before[name]), name
    dino.loss(views(dino, tiles), CLOCK)
    dino.after_step(CLOCK, FINITE)
    assert torch.isfinite(dino.center).all()  # nothing of the bad step is left over


def test_prototypes_are_frozen_in_the_first_epochs(tiles):
    dino = make_dino()
    for epoch, frozen in [(0, True), (1, False)]:
        dino.zero_grad()
        dino.loss(views(dino, tiles), CLOCK)[0].backward()
        dino.after_backward(Clock(epoch * 2, 10, epoch_steps=2))
        assert (dino.student.head.last_layer.weight_v.grad is None) == frozen
        assert dino.student.head.mlp[0].weight.grad is not None


def test_parts_of_a_batch_give_the_gradient_and_centre_of_the_whole(tiles):
    """Without stochastic depth, whose draws depend on the shape of the batch."""
    whole, parts = (make_dino(replace(DINO, drop_path=0.0)) for _ in range(2))
    pictures = views(whole, tiles)
    whole.loss(pictures, CLOCK)[0].backward()
    for part in (0, 1):
        (parts.loss([view[part * 2 : part * 2 + 2] for view in pictures], CLOCK)[0] / 2).backward()
    for one, other in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * float(one.grad.abs().max() + 1))
    for dino in (whole, parts):
        dino.after_step(CLOCK, FINITE)
    torch.testing.assert_close(whole.center, parts.center)


def test_it_learns_to_tell_a_few_tiles_apart(tmp_path):
    """The student comes to predict the teacher, and not because the teacher says the same of all tiles."""
    tiles = next(TinyStream(batch_size=16).batches()).images

    class Few(TinyStream):
        def batches(self, start_step=0):
            return itertools.repeat(TinyBatch(tiles))

    crops = replace(DINO.views, jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))
    options = replace(DINO, views=crops, drop_path=0.0, teacher_momentum=0.95, head_batch_norm=True)
    dino = make_dino(options)
    rates = {"lr": 3e-3, "lr_scaling": "none", "warmup_steps": 5}
    fit(dino, Few(), FitOptions(steps=80, batch_size=16, epoch_images=160, log_every=10, **rates), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert lines[-1]["loss"] < 0.95 * math.log(DINO.out_dim)  # 0.23 to 0.85 over eight seeds
    with torch.no_grad():
        answers = dino.teacher([dino.student.encoder.normalise(torch.from_numpy(tiles[:, :32, :32].copy()))])[0]
    assert len((answers - dino.center).argmax(-1).unique()) >= 4


def test_export_writes_the_teachers_encoder(tmp_path, tiles):
    dino = make_dino().eval()
    with torch.no_grad():
        for parameter in dino.teacher.parameters():
            parameter.mul_(1.1)
    dino.export(tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder")
    images = encoder.normalise(tiles[:, :32, :32])
    with torch.no_grad():
        assert torch.equal(encoder(images), dino.teacher.encoder(images))
        assert not torch.equal(encoder(images), dino.student.encoder(images))


@pytest.mark.parametrize("changes", [{"global_size": 36}, {"local_size": 20}])
def test_views_must_divide_into_patches(changes):
    with pytest.raises(ConfigError, match="do not divide into patches of 8 px"):
        make_dino(replace(DINO, views=replace(DINO.views, **changes)))


@pytest.mark.parametrize("changes", [{"student_temperature": 0.0}, {"teacher_momentum": 1.1}, {"out_dim": 0}])
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"must"):
        DinoOptions(**changes)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError):
        Dino(EncoderConfig(model="vit_tiny_misspelt"), DINO)

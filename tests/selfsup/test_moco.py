import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.core.seeding import generator
from gigatome.encoders.resnet import cut_resnet
from gigatome.encoders.vit import EncoderConfig
from gigatome.encoders.zoo import load_encoder
from gigatome.selfsup.contrastive import info_nce, info_nce_in_batch
from gigatome.selfsup.moco import Moco, MocoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from tiny_run import ENCODER, TinyBatch, TinyStream, digest

CLOCK = Clock(step=2, steps=10, epoch_steps=2)
FINITE = torch.tensor(True)
RESNET = EncoderConfig(model="test_resnet")
VIEWS = ViewOptions(global_size=32, local_views=0, global_scale=(0.2, 1.0))
PLAIN = ViewOptions(
    global_size=32, local_views=0, global_scale=(0.4, 1.0), jitter=1.0, brightness=0.8, contrast=0.0, saturation=0.0,
    hue=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
)  # fmt: skip
V2 = MocoOptions(views=VIEWS, out_dim=16, head_hidden_dim=32, queue=24, norm_group=2)
V3 = replace(V2, version="v3")
ALL = [(V2, RESNET), (V2, ENCODER), (V3, RESNET), (V3, ENCODER)]
NAMES = ["v2-resnet", "v2-vit", "v3-resnet", "v3-vit"]
each = pytest.mark.parametrize(("options", "encoder"), ALL, ids=NAMES)


@pytest.fixture
def tiles() -> torch.Tensor:
    return torch.from_numpy(next(TinyStream().batches()).images)


def make(options: MocoOptions, encoder: EncoderConfig = RESNET, seed: int = 3) -> Moco:
    return Moco(encoder, options, seed=seed, name="tiny")


def views(moco: Moco, tiles: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    return moco.views(tiles, torch.Generator().manual_seed(seed), CLOCK)


def widths(head: nn.Sequential) -> list[str]:
    return [
        f"{module.in_features}-{module.out_features}" if isinstance(module, nn.Linear) else type(module).__name__
        for module in head
    ]


def test_the_defaults_are_the_authors():
    with torch.device("meta"):
        v2 = Moco(EncoderConfig(model="resnet50"), MocoOptions())
    assert v2.view_options == ViewOptions.moco_v2()
    assert widths(v2.student.head) == ["2048-2048", "ReLU", "2048-128"]
    assert v2.student.predictor is None
    assert v2.queue.shape == (65536, 128)
    assert v2.temperature == 0.2
    assert [v2.schedule(Clock(step, 10, 1))["momentum"] for step in (0, 5)] == [0.999, 0.999]


@pytest.mark.parametrize(
    ("encoder", "hidden", "temperature"), [(RESNET, ["96-4096"], 1.0), (ENCODER, ["32-4096", "4096-4096"], 0.2)]
)
def test_the_defaults_of_v3_are_the_authors(encoder, hidden, temperature):
    v3 = Moco(encoder, MocoOptions(version="v3", views=VIEWS))
    between = ["SharedBatchNorm", "ReLU"]
    assert widths(v3.student.head) == [
        *itertools.chain(*([layer, *between] for layer in hidden)),
        "4096-256",
        between[0],
    ]
    end = [] if encoder is RESNET else between[:1]
    assert widths(v3.student.predictor) == ["256-4096", *between, "4096-256", *end]
    assert v3.temperature == temperature
    assert not hasattr(v3, "queue")
    assert [v3.schedule(Clock(step, 10, 1))["momentum"] for step in (0, 5)] == pytest.approx([0.99, 0.995])
    views = make(replace(V3, views=None), encoder).view_options
    assert views == replace(ViewOptions.moco_v3(), global_scale=(0.2 if encoder is RESNET else 0.08, 1.0))


@each
def test_both_encoders_begin_alike_and_from_the_seed(options, encoder):
    before = torch.get_rng_state()
    one, again, other = make(options, encoder, 1), make(options, encoder, 1), make(options, encoder, 2)
    assert torch.equal(torch.get_rng_state(), before)
    state = one.state_dict()
    for name, value in state.items():
        assert torch.equal(value, again.state_dict()[name])
        if name.startswith("teacher."):
            assert torch.equal(value, state[name.replace("teacher.", "student.")])
            assert value.data_ptr() != state[name.replace("teacher.", "student.")].data_ptr()
    assert not torch.equal(state["student.head.0.weight"], other.state_dict()["student.head.0.weight"])
    if options is V2:
        torch.testing.assert_close(one.queue.norm(dim=1), torch.ones(24))


@each
def test_only_the_query_encoder_has_a_gradient(tiles, options, encoder):
    moco = make(options, encoder).train()
    loss, facts = moco.loss(views(moco, tiles), CLOCK)
    loss.backward()
    assert all(parameter.grad is None for parameter in moco.teacher.parameters())
    without = {name for name, parameter in moco.trained().named_parameters() if parameter.grad is None}
    fixed = {"encoder.vit.pos_embed", "encoder.vit.patch_embed.proj.weight", "encoder.vit.patch_embed.proj.bias"}
    assert without == (fixed if options is V3 and encoder is ENCODER else set())
    assert 0 <= float(facts["accuracy"]) <= 1
    assert 0 < float(facts["spread"]) <= 1


@each
def test_in_bf16_the_loss_is_float32_and_near(tiles, options, encoder):
    moco = make(options, encoder)
    pictures = views(moco, tiles)
    exact, _ = moco.loss(pictures, CLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        loss, facts = make(options, encoder).loss(pictures, CLOCK)
    assert {value.dtype for value in (loss, *facts.values())} == {torch.float32}
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.0)


def test_v2_compares_with_its_own_key_and_the_queue(tiles):
    moco = make(replace(V2, batch_norm="local"))
    pictures = views(moco, tiles)
    loss, _ = moco.loss(pictures, CLOCK)
    query, key = moco.student(pictures[:1])[0], moco.teacher(pictures[1:])[0]
    torch.testing.assert_close(loss, info_nce(query, key, moco.queue, 0.2)[0])


def test_v3_compares_in_both_directions_within_the_batch(tiles):
    moco = make(V3)
    one, other = views(moco, tiles)
    loss, _ = moco.loss([one, other], CLOCK)
    queries, keys = moco.student([one, other]), moco.teacher([one, other])
    there = info_nce_in_batch(queries[0], keys[1], 1.0)[0]
    back = info_nce_in_batch(queries[1], keys[0], 1.0)[0]
    torch.testing.assert_close(loss, 2 * (there + back))
    torch.testing.assert_close(moco.loss([other, one], CLOCK)[0], loss)


def test_the_queue_takes_keys_in_turn(tiles):
    moco = make(replace(V2, queue=10))
    for step in range(4):
        before = moco.queue.clone()
        clock = Clock(step, 10, 2)
        for part in (0, 1):  # two micro-batches
            moco.loss([view[part * 2 : part * 2 + 2] for view in views(moco, tiles, seed=step)], clock)
        keys = torch.cat(moco._new_keys)
        moco.after_step(clock, FINITE)
        places = [(step * 4 + i) % 10 for i in range(4)]
        assert torch.equal(moco.queue[places], keys)
        others = [place for place in range(10) if place not in places]
        assert torch.equal(moco.queue[others], before[others])


def test_shuffling_gives_keys_other_company_and_then_their_place(tiles):
    moco = make(V2, seed=5)
    view = views(moco, tiles)[1]
    shuffled, plain = moco._shuffled_keys(view, CLOCK), moco.teacher([view])[0]
    assert not torch.allclose(shuffled, plain, atol=1e-4)  # groups of two tiles, but other twos
    assert torch.equal(shuffled, moco._shuffled_keys(view, CLOCK))
    moco.eval()
    torch.testing.assert_close(moco._shuffled_keys(view, CLOCK), moco.teacher([view])[0])


@each
def test_after_step_moves_the_key_encoder_exactly(tiles, options, encoder):
    moco = make(replace(options, momentum=0.9, momentum_end=1.0), encoder)
    before = {name: value.clone() for name, value in moco.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in moco.student.parameters():
            parameter.add_(0.1)
    moco.loss(views(moco, tiles), CLOCK)
    moco.after_step(CLOCK, FINITE)
    momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 0.2)) / 2
    students = dict(moco.student.named_parameters())
    for name, value in moco.teacher.named_parameters():
        torch.testing.assert_close(value, before[name] * momentum + students[name] * (1 - momentum))


@each
def test_after_a_bad_step_nothing_moves(tiles, options, encoder):
    moco = make(options, encoder)
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    moco.loss([view * float("nan") for view in views(moco, tiles)], CLOCK)
    moco.after_step(CLOCK, torch.tensor(False))
    for name, value in moco.state_dict().items():  # the loop takes care of batch norms
        assert torch.equal(value, before[name]) or "running_" in name or "tracked" in name, name
    moco.load_state_dict(before)
    moco.loss(views(moco, tiles), CLOCK)
    moco.after_step(CLOCK, FINITE)
    assert all(torch.isfinite(value).all() for value in moco.state_dict().values())


@each
def test_the_loop_leaves_out_bad_steps(tmp_path, monkeypatch, options, encoder):
    moco = make(options, encoder)
    loss, before = moco.loss, digest(moco.state_dict())
    monkeypatch.setattr(moco, "loss", lambda views, clock: loss([view * float("nan") for view in views], clock))
    fit(moco, TinyStream(), FitOptions(steps=2, batch_size=4, epoch_images=12, lr=0.01), tmp_path)
    assert digest(moco.state_dict()) == before


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiles):
    """In v2 without batch norm, as negatives come from the queue."""
    whole, parts = make(V2, ENCODER), make(V2, ENCODER)
    pictures = views(whole, tiles)
    whole.loss(pictures, CLOCK)[0].backward()
    for part in (0, 1):
        (parts.loss([view[part * 2 : part * 2 + 2] for view in pictures], CLOCK)[0] / 2).backward()
    for one, other in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_vit_of_v3_has_fixed_positions_and_projection():
    moco = make(V3, ENCODER)
    vit = moco.student.encoder.vit
    assert not vit.pos_embed.requires_grad
    assert not vit.patch_embed.proj.weight.requires_grad
    assert float(vit.pos_embed[0, 0].detach().abs().max()) == 0  # the class token's
    column, row = 2, 3
    rates = [10000 ** (-i / 8) for i in range(8)]
    waves = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos) for rate in rates]
    torch.testing.assert_close(vit.pos_embed[0, 1 + row * 4 + column], torch.tensor(waves))
    limit = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert 0.95 * limit < float(vit.patch_embed.proj.weight.detach().abs().max()) <= limit
    limit = math.sqrt(6 / (32 + 32))
    assert 0.95 * limit < float(vit.blocks[0].attn.qkv.weight.detach().abs().max()) <= limit
    free = make(replace(V3, freeze_patch_embed=False, sincos_position=False), ENCODER).student.encoder.vit
    assert free.pos_embed.requires_grad
    assert free.patch_embed.proj.weight.requires_grad


def test_a_warm_start_keeps_its_weights(tmp_path):
    source = make(V2, ENCODER, seed=9)
    source.export(tmp_path)
    warm = make(V3, replace(ENCODER, weights=str(tmp_path / "encoder.safetensors")))
    for name, value in source.student.encoder.vit.state_dict().items():
        assert torch.equal(value, warm.teacher.encoder.vit.state_dict()[name])
    assert warm.student.encoder.vit.pos_embed.requires_grad
    assert not warm.student.encoder.vit.patch_embed.proj.weight.requires_grad


@pytest.mark.parametrize("kept", ["query", "key"])
def test_export_writes_the_encoder_that_was_asked_for(tmp_path, tiles, kept):
    moco = make(replace(V2, export=kept)).eval()
    with torch.no_grad():
        for parameter in moco.teacher.parameters():
            parameter.mul_(1.1)
    moco.export(tmp_path)
    encoder = load_encoder(tmp_path)
    images = encoder.normalise(tiles)
    with torch.no_grad():
        for name, branch in (("query", moco.student), ("key", moco.teacher)):
            assert torch.equal(encoder(images), branch.encoder(images)) == (name == kept)


def test_export_can_end_after_a_layer(tmp_path, tiles):
    moco = make(replace(V2, export_layer=3)).eval()
    moco.export(tmp_path)
    encoder = load_encoder(tmp_path)
    assert (encoder.config.model, encoder.dim) == ("test_resnet.layer3", 192)
    images = encoder.normalise(tiles)
    with torch.no_grad():
        assert torch.equal(encoder(images), cut_resnet(moco.student.encoder, 3)(images))


class Colours(TinyStream):
    """Noise around a colour of each tile."""

    def batches(self, start_step=0):
        for step in itertools.count(start_step):
            random = generator(7, "colours", step)
            colours = random.uniform(30, 225, (self.batch_size, 1, 1, 3))
            pixels = colours + random.normal(0, 10, (self.batch_size, self.size, self.size, 3))
            yield TinyBatch(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("options", "encoder", "chance"),
    [
        pytest.param(V2, RESNET, math.log(65), id="v2-resnet"),
        pytest.param(V2, ENCODER, math.log(65), id="v2-vit"),
        pytest.param(V3, RESNET, 0.8 * math.log(32), id="v3-resnet", marks=pytest.mark.slow),
        pytest.param(V3, ENCODER, 0.8 * math.log(32), id="v3-vit"),
    ],
)
def test_it_learns_to_tell_tiles_apart(tmp_path, options, encoder, chance):
    """By their hue, as views differ in brightness; with their first weights all are near chance."""
    options = replace(options, views=PLAIN, temperature=0.2, momentum=0.99, momentum_end=0.99, norm_group=16, queue=64)
    rates = {"lr": 3e-3, "lr_scaling": "none", "weight_decay": 0.0, "weight_decay_end": 0.0, "warmup_steps": 5}
    fitting = FitOptions(steps=40, batch_size=32, epoch_images=320, log_every=10, **rates)
    fit(make(options, encoder), Colours(32), fitting, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.91 * chance


@each
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path, options, encoder):
    fitting = FitOptions(steps=6, batch_size=4, epoch_images=12, lr=0.01, save_every=2, log_every=2)
    whole, cut = make(options, encoder), make(options, encoder)
    fit(whole, TinyStream(), fitting, tmp_path / "whole")
    with pytest.raises(RunError, match="has ended at step 3"):
        fit(cut, TinyStream(end=3), fitting, tmp_path / "cut")
    again = make(options, encoder, seed=3)
    fit(again, TinyStream(), fitting, tmp_path / "cut", resume=True)
    assert digest(again.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize(
    ("changes", "encoder", "message"),
    [
        ({"views": replace(VIEWS, global_size=36)}, ENCODER, "do not divide into patches of 8 px"),
        ({"export_layer": 3}, ENCODER, "is for ResNets"),
        ({"export_layer": 4}, replace(RESNET, model="test_resnet.layer3"), "has layers 1 to 3, not 4"),
    ],
)
def test_options_that_do_not_fit_the_encoder_are_refused(changes, encoder, message):
    with pytest.raises(ConfigError, match=message):
        make(replace(V2, **changes), encoder)


@pytest.mark.parametrize(("options", "message"), [(replace(V2, queue=3), "does not fit into"), (V3, "2 or more")])
def test_batches_that_do_not_fit_are_refused(tiles, options, message):
    moco = make(options, ENCODER)
    with pytest.raises(ConfigError, match=message):
        moco.loss([view[: 1 if options is V3 else 4] for view in views(moco, tiles)], CLOCK)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"momentum": 1.1},
        {"out_dim": 0},
        {"queue": 0},
        {"norm_group": 1},
        {"export_layer": 5},
        {"views": ViewOptions()},
    ],
)
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"must"):
        MocoOptions(**changes)

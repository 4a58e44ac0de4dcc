import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError
from gigatome.encoders.vit import EncoderConfig
from gigatome.selfsup.dinov2 import Dinov2, Dinov2Options
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parent))
from tiny_dinov2 import CLOCK, SEPARATE, SHARED, SINKHORN, VIEWS, TinyStream, make, views

FINITE = torch.tensor(True)


@pytest.fixture
def tiles() -> torch.Tensor:
    return torch.from_numpy(next(TinyStream().batches()).images)


def test_the_defaults_are_dinov2s():
    options = Dinov2Options()
    assert (options.out_dim, options.head_bottleneck_dim, options.separate_head) == (65536, 256, False)
    assert (options.dino_weight, options.ibot_weight, options.koleo_weight, options.kde_weight) == (1, 1, 0.1, 0)
    assert (options.masks.share, options.masks.ratio, options.masks.min_patches) == (0.5, (0.1, 0.5), 4)
    assert (options.centering, options.sinkhorn_iterations) == ("centering", 3)
    assert (options.drop_path, options.uniform_drop_path) == (0.3, True)
    assert (options.layer_decay, options.patch_embed_lr) == (0.9, 0.2)
    assert (options.teacher_momentum, options.freeze_last_layer_epochs) == (0.992, 1)
    assert (options.teacher_temperature_start, options.teacher_temperature) == (0.04, 0.07)
    assert options.teacher_temperature_warmup_epochs == 30
    assert (options.views.global_scale, options.views.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (options.views.global_size, options.views.local_size, options.views.local_views) == (224, 96, 8)


@pytest.mark.parametrize("options", [SHARED, SEPARATE], ids=["shared head", "separate head"])
def test_student_and_teacher_begin_alike_and_from_the_seed(options):
    before = torch.get_rng_state()
    one, again, other = make(options, seed=1), make(options, seed=1), make(options, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, one.teacher.state_dict()[name])
        assert torch.equal(value, again.student.state_dict()[name])
    key = "head.view.last_layer.weight_v"
    assert not torch.equal(one.student.state_dict()[key], other.student.state_dict()[key])
    assert not any(p.requires_grad for p in one.teacher.parameters())
    assert one.student.head["view"].last_layer.weight_g.requires_grad


def test_views_come_with_masks_of_the_global_ones(tiles):
    *pictures, masks = views(make(), tiles)
    assert [picture.shape[-1] for picture in pictures] == [32, 32, 16, 16]
    assert masks.shape == (4, 2, 16)
    assert masks.dtype == torch.bool
    assert masks.any(2).sum() == 4  # half of the 8 global views


def test_local_views_may_be_left_out(tiles):
    method = make(replace(SHARED, views=replace(VIEWS, local_views=0, local_size=20)))
    *pictures, masks = batch = views(method, tiles)
    assert len(pictures) == 2
    _, facts = method.loss(batch, CLOCK)
    answers, _, _ = method.student(pictures, masks.transpose(0, 1).flatten(0, 1), torch.arange(2))
    targets, _ = method._targets(pictures, torch.arange(2), CLOCK)
    expected = (cross_entropy(answers[0], targets[1]) + cross_entropy(answers[1], targets[0])) / 8
    torch.testing.assert_close(facts["dino"], expected.detach())


def cross_entropy(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * (student / 0.1).log_softmax(-1)).sum()


@pytest.mark.parametrize("options", [SHARED, SEPARATE], ids=["shared head", "separate head"])
def test_the_loss_is_its_definition(options, tiles):
    """By loops over views, tiles and patches, from the parts of the networks."""
    method = make(options)
    torch.nn.init.normal_(method.center)
    torch.nn.init.normal_(method.patch_center)
    with torch.no_grad():  # so that the student is not the teacher
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    *pictures, masks = batch = views(method, tiles)
    loss, facts = method.loss(batch, CLOCK)

    temperature = 0.04 + 0.03 * 2 / 3
    student, teacher = method.student, method.teacher
    with torch.no_grad():
        patch_heads = [network.head["patch" if options.separate_head else "view"] for network in (student, teacher)]
        whole = [teacher.encoder(picture) for picture in pictures[:2]]
        targets = [((teacher.head["view"](x) - method.center) / temperature).softmax(-1) for x in whole]
        seen = [student.encoder.forward_tokens(pictures[g], masks[:, g]) for g in (0, 1)]
        embeddings = [seen[0][0], seen[1][0], *(student.encoder(picture) for picture in pictures[2:])]
        answers = [student.head["view"](x) for x in embeddings]
        pairs = [
            cross_entropy(answers[v][b], targets[g][b]) for b in range(4) for g in (0, 1) for v in range(4) if v != g
        ]
        ibot = torch.zeros(())
        for g, b in itertools.product((0, 1), range(4)):
            meant = patch_heads[1](teacher.encoder.forward_tokens(pictures[g][b : b + 1])[1][0])
            said = patch_heads[0](seen[g][1][b])
            for p in masks[b, g].nonzero()[:, 0]:
                target = ((meant[p] - method.patch_center[0]) / temperature).softmax(-1)
                ibot += cross_entropy(said[p], target) / masks[b, g].sum() / 8
        spread = torch.zeros(())
        for g in (0, 1):
            unit = embeddings[g] / embeddings[g].norm(dim=1, keepdim=True)
            distances = (unit[:, None] - unit + 1e-8).norm(dim=2) + 9 * torch.eye(4)
            spread -= options.koleo_weight * distances.min(1).values.log().mean()
            spread += options.kde_weight * (5 * unit @ unit.T).exp().mean(1).log().mean()
    torch.testing.assert_close(facts["dino"], sum(pairs) / len(pairs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(facts["ibot"], ibot, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach(), sum(pairs) / len(pairs) + ibot + spread, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(facts["dino"], facts["teacher_entropy"] + facts["kl"])


def test_sinkhorn_knopp_balances_the_batch(tiles):
    method = make(SINKHORN)
    with torch.no_grad():
        targets, patch_targets = method._targets(views(method, tiles)[:2], torch.arange(5), CLOCK)
    assert targets.shape == (2, 4, 48)
    assert patch_targets.shape == (5, 24)
    plain = make(replace(SEPARATE, centering="centering"))
    with torch.no_grad():
        unbalanced, _ = plain._targets(views(plain, tiles)[:2], torch.arange(5), CLOCK)
    assert targets.sum((0, 1)).std() < 0.3 * unbalanced.sum((0, 1)).std()


def test_every_parameter_learns_even_when_nothing_is_masked(tiles):
    """As several processes need it."""
    method = make(replace(SEPARATE, head_batch_norm=True))
    *pictures, masks = views(method, tiles)
    for batch in ([*pictures, masks], [*pictures, torch.zeros_like(masks)]):
        method.zero_grad()
        loss, facts = method.loss(batch, CLOCK)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None for p in method.student.parameters())
    assert facts["ibot"] == 0


@pytest.mark.parametrize("options", [SHARED, SINKHORN], ids=["centering", "sinkhorn"])
def test_after_step_moves_teacher_and_centres_exactly(options, tiles):
    method = make(options)
    batch = views(method, tiles)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    *pictures, masks = batch
    with torch.no_grad():
        logits = method.teacher.head["view"](method.teacher.encoder(torch.cat(pictures[:2])))
        tokens = method.teacher.encoder.forward_tokens(torch.cat(pictures[:2]))[1][masks.transpose(0, 1).flatten(0, 1)]
        patches = method.teacher.head["patch" if options.separate_head else "view"](tokens)
        for parameter in method.student.parameters():
            parameter.add_(0.1)
    method.loss(batch, CLOCK)
    method.after_step(CLOCK, FINITE)
    if options.centering == "centering":
        torch.testing.assert_close(method.center, 0.1 * logits.mean(0, keepdim=True))
        torch.testing.assert_close(method.patch_center, 0.1 * patches.mean(0, keepdim=True))
    else:
        assert method.center.eq(0).all()
    momentum = 1 - (1 - 0.992) * (1 + math.cos(math.pi * 0.2)) / 2
    for name, value in method.teacher.named_parameters():
        expected = before[f"teacher.{name}"] * momentum + method.student.get_parameter(name) * (1 - momentum)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_after_a_bad_step_nothing_moves(tiles):
    method = make()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    *pictures, masks = views(method, tiles)
    with torch.no_grad():
        method.loss([*(picture * float("nan") for picture in pictures), masks], CLOCK)
    method.after_step(CLOCK, torch.tensor(False))
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    method.loss([*pictures, masks], CLOCK)
    method.after_step(CLOCK, FINITE)
    assert torch.isfinite(method.center).all()  # nothing of the bad step is left over
    assert torch.isfinite(method.patch_center).all()


def test_parts_of_a_batch_give_the_gradient_and_centres_of_the_whole(tiles):
    """But for KoLeo, whose neighbours are those of the part."""
    options = replace(SHARED, koleo_weight=0.0)
    whole, parts = make(options), make(options)
    batch = views(whole, tiles)
    whole.loss(batch, CLOCK)[0].backward()
    for micro in zip(*(view.chunk(2) for view in batch), strict=True):
        (parts.loss(micro, CLOCK)[0] / 2).backward()
    for one, other in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * float(one.grad.abs().max() + 1))
    for method in (whole, parts):
        method.after_step(CLOCK, FINITE)
    torch.testing.assert_close(whole.center, parts.center)
    torch.testing.assert_close(whole.patch_center, parts.patch_center)


@pytest.mark.parametrize(("uniform", "rates"), [(True, [0.4, 0.4]), (False, [0.0, 0.4])])
def test_stochastic_depth_is_the_students_alone(uniform, rates):
    method = make(replace(SHARED, drop_path=0.4, uniform_drop_path=uniform)).train()
    found = [
        [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.encoder.vit.blocks]
        for network in (method.student, method.teacher)
    ]
    assert found == [pytest.approx(rates), [0.0, 0.0]]
    assert (method.student.training, method.teacher.training) == (True, False)


def test_learning_rates_shrink_towards_the_input():
    method = make(replace(SEPARATE, layer_decay=0.5, patch_embed_lr=0.2))
    scales = method.lr_scales()
    assert scales.keys() == {name for name, _ in method.named_parameters() if name.startswith("student.")}
    expected = {
        r"encoder\.vit\.patch_embed\.": 0.125 * 0.2,
        r"encoder\.(mask_token|vit\.(pos_embed|cls_token|reg_token))$": 0.125,
        r"encoder\.vit\.blocks\.0\.": 0.25,
        r"encoder\.vit\.blocks\.1\.": 0.5,
        r"encoder\.vit\.norm\.": 1.0,
        r"head\.": 1.0,
    }
    for name, scale in scales.items():
        (wanted,) = (value for pattern, value in expected.items() if re.match(rf"student\.{pattern}", name))
        assert scale == pytest.approx(wanted), name


def test_the_teachers_temperature_rises_linearly():
    method = make(replace(SHARED, teacher_temperature_warmup_epochs=3))
    expected = [*np.linspace(0.04, 0.07, 12), 0.07, 0.07]
    rising = [method.schedule(Clock(step, 20, epoch_steps=4))["teacher_temp"] for step in range(14)]
    assert rising == pytest.approx(expected)
    constant = make(replace(SHARED, teacher_temperature_warmup_epochs=0))
    assert constant.schedule(Clock(0, 20, 4))["teacher_temp"] == 0.07


def test_prototypes_are_frozen_in_the_first_epochs(tiles):
    method = make(SEPARATE)
    for epoch, frozen in [(0, True), (1, False)]:
        method.zero_grad()
        method.loss(views(method, tiles), CLOCK)[0].backward()
        method.after_backward(Clock(epoch * 2, 10, epoch_steps=2))
        for head in method.student.head.values():
            assert (head.last_layer.weight_v.grad is None) == frozen
            assert (head.last_layer.weight_g.grad is None) == frozen
            assert head.mlp[0].weight.grad is not None


def test_the_last_epochs_see_larger_views(tiles):
    options = replace(SHARED, high_resolution_epochs=1.5, high_resolution_global_size=48, high_resolution_local_size=24)
    method = make(options)
    sizes = []
    for step in (6, 7, 9):
        clock = Clock(step, steps=10, epoch_steps=2)
        *pictures, masks = batch = views(method, tiles, clock)
        sizes.append((pictures[0].shape[-1], pictures[2].shape[-1], masks.shape[-1]))
        assert method.schedule(clock)["global_size"] == pictures[0].shape[-1]
        assert torch.isfinite(method.loss(batch, clock)[0])
    assert sizes == [(32, 16, 16), (48, 24, 36), (48, 24, 36)]


def test_a_single_tile_has_no_neighbours(tiles):
    method = make()
    with pytest.raises(ConfigError, match="at least 2 tiles at a time"):
        method.loss(views(method, tiles[:1]), CLOCK)
    alone = make(replace(SHARED, koleo_weight=0.0))
    assert torch.isfinite(alone.loss(views(alone, tiles[:1]), CLOCK)[0])


def test_a_resnet_has_no_patches():
    with pytest.raises(ConfigError, match="needs a vision transformer, not resnet18"):
        Dinov2(EncoderConfig("resnet18"), SHARED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": replace(VIEWS, global_size=36)}, r"36 px do not divide into patches of 8 px; change views\.global"),
        ({"views": replace(VIEWS, local_size=20)}, r"20 px do not divide"),
        ({"high_resolution_epochs": 1, "high_resolution_local_size": 100}, r"100 px .* high_resolution_local_size"),
    ],
)
def test_views_must_divide_into_patches(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(replace(SHARED, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"out_dim": 0},
        {"patch_head_layers": 0},
        {"koleo_weight": -0.1},
        {"student_temperature": 0.0},
        {"teacher_momentum": 1.1},
        {"layer_decay": 0.0},
        {"high_resolution_epochs": -1},
    ],
)
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"must"):
        Dinov2Options(**changes)

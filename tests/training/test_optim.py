import copy

import pytest
import torch
from torch import nn

from gigatome.training.optim import (
    clip_gradients,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    scaled_lr,
    set_rates,
    step_if,
    update_average,
)

YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].bias.requires_grad_(False)
    return module


def backward(module, scale=1.0):
    module.zero_grad()
    (module(torch.arange(6.0).view(2, 3)).sum() * scale).backward()


def test_biases_and_norms_do_not_decay_and_frozen_ones_are_left_out(module):
    optimizer = make_optimizer("adamw", module.named_parameters())
    set_rates(optimizer, lr=0.1, weight_decay=0.3)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = {
        tuple(names[p] for p in group["params"]): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert groups == {("0.weight", "2.weight"): (0.1, 0.3), ("0.bias", "1.weight", "1.bias"): (0.1, 0.0)}


def test_those_that_are_named_do_not_decay_either(module):
    optimizer = make_optimizer("adamw", module.named_parameters(), undecayed={"2.weight"})
    names = {parameter: name for name, parameter in module.named_parameters()}
    decays = {names[p]: group["decay_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [name for name, scale in decays.items() if scale] == ["0.weight"]
    assert decays["2.weight"] == 0


@pytest.mark.parametrize(("rule", "expected"), [("none", 0.01), ("linear", 0.02), ("sqrt", 0.01 * 2**-0.5)])
def test_scaled_lr(rule, expected):
    assert scaled_lr(0.01, 512, rule) == pytest.approx(expected)


def test_clipping_globally_is_pytorchs(module):
    backward(module, 50)
    other = copy.deepcopy(module)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = clip_gradients(module.parameters(), 3.0, "global")
    expected = nn.utils.clip_grad_norm_(other.parameters(), 3.0)
    torch.testing.assert_close(norm, expected)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_clipping_per_parameter_is_dinos(module):
    backward(module)
    before = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    limit = sorted(float(gradient.norm()) for gradient in before.values())[2]
    clip_gradients(module.parameters(), limit, "per_parameter")
    lengths = set()
    for name, gradient in before.items():
        expected = gradient * min(
            1.0, limit / (float(gradient.norm()) + 1e-6)
        )  # clip_gradients of facebookresearch/dino
        torch.testing.assert_close(module.get_parameter(name).grad, expected)
        lengths.add(float(gradient.norm()) > limit)
    assert lengths == {True, False}


def test_no_clipping_still_measures(module):
    backward(module)
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    norm = clip_gradients(module.parameters(), None, "global")
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()))
    for gradient, parameter in zip(before, (p for p in module.parameters() if p.grad is not None), strict=True):
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("mode", ["global", "per_parameter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_norm_and_stays_in_its_parameter(module, mode, value):
    backward(module)
    module[0].weight.grad[0, 0] = value
    assert not torch.isfinite(clip_gradients(module.parameters(), 3.0, mode))
    assert not torch.isfinite(module[0].weight.grad).all()
    assert torch.isfinite(module[2].weight.grad).all()


def test_a_step_that_is_not_finite_changes_nothing(module):
    optimizer = make_optimizer("adamw", module.named_parameters())
    names = {p: name for name, p in module.named_parameters()}
    set_rates(optimizer, 0.1, 0.3)
    backward(module)
    step_if(optimizer, YES)
    weights = copy.deepcopy(module.state_dict())
    moments = {name: value.clone() for name, value in optimizer_tensors(optimizer, names).items()}
    backward(module, float("nan"))
    step_if(optimizer, NO)
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name])
    for name, value in optimizer_tensors(optimizer, names).items():
        assert torch.equal(value, moments[name]), name
    backward(module)
    step_if(optimizer, YES)
    assert not torch.equal(module[0].weight, weights["0.weight"])
    assert float(optimizer_tensors(optimizer, names)["0.weight/step"]) == 2


def test_steps_are_those_of_plain_adamw(module):
    other = copy.deepcopy(module)
    ours = make_optimizer("adamw", module.named_parameters())
    set_rates(ours, 0.01, 0.0)
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        backward(module)
        step_if(ours, YES)
        backward(other)
        theirs.step()
    for mine, reference in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_optimisers_state_goes_out_and_in(module):
    names = {p: name for name, p in module.named_parameters()}
    first = make_optimizer("adamw", module.named_parameters())
    set_rates(first, 0.1, 0.1)
    backward(module)
    step_if(first, YES)
    saved = {name: value.clone() for name, value in optimizer_tensors(first, names).items()}
    assert set(saved) >= {"0.weight/exp_avg", "0.weight/exp_avg_sq", "0.weight/step"}
    twin = copy.deepcopy(module)
    second = make_optimizer("adamw", twin.named_parameters())
    set_rates(second, 0.1, 0.1)
    load_optimizer_tensors(second, {p: name for name, p in twin.named_parameters()}, saved)
    for one, optimizer in ((module, first), (twin, second)):
        backward(one)
        step_if(optimizer, YES)
    for mine, reference in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, reference)
    with pytest.raises(KeyError):
        load_optimizer_tensors(second, {}, saved)


def test_the_moving_average_is_exact_and_in_place():
    torch.manual_seed(0)
    average, values = [torch.randn(4, 3), torch.randn(5)], [torch.randn(4, 3), torch.randn(5)]
    places = [tensor.data_ptr() for tensor in average]
    expected = [mean.clone() for mean in average]
    for momentum in (0.996, 0.5, 1.0):
        expected = [mean * momentum + value * (1 - momentum) for mean, value in zip(expected, values, strict=True)]
        update_average(average, values, momentum, YES)
    for mean, reference in zip(average, expected, strict=True):
        torch.testing.assert_close(mean, reference, rtol=1e-6, atol=1e-7)
    assert [tensor.data_ptr() for tensor in average] == places


def test_the_moving_average_stands_still_on_a_bad_step():
    average, values = [torch.randn(3)], [torch.randn(3)]
    before = average[0].clone()
    update_average(average, values, 0.1, NO)
    assert torch.equal(average[0], before)


def trajectory(optimizer, module, steps=3, skip=()):
    """Weights after steps with a gradient of its own for each, of which some are not finite."""
    for step in range(steps):
        set_rates(optimizer, lr=0.1, weight_decay=0.2)
        backward(module, float("nan") if step in skip else 1.0 + step)
        step_if(optimizer, NO if step in skip else YES)
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_steps_are_those_of_plain_sgd_and_adam(module, kind):
    other = copy.deepcopy(module)
    ours = trajectory(make_optimizer(kind, module.named_parameters(), momentum=0.8), module)
    decaying = [p for p in other.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in other.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": decaying, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    plain = torch.optim.SGD(groups, 0.1, momentum=0.8) if kind == "sgd" else torch.optim.Adam(groups, 0.1)
    for step in range(3):
        backward(other, 1.0 + step)
        plain.step()
    torch.testing.assert_close(ours, [parameter.detach() for parameter in other.parameters()])


def test_lars_is_moco_v3s(module):
    other = copy.deepcopy(module)
    trajectory(make_optimizer("lars", module.named_parameters(), momentum=0.8), module)
    buffers = {}
    for step in range(3):
        backward(other, 1.0 + step)
        for name, weight in other.named_parameters():
            if weight.grad is None:
                continue
            update = weight.grad.clone()
            if weight.ndim > 1:  # the formula of moco-v3
                update = update + 0.2 * weight.detach()
                update = update * (0.001 * float(weight.detach().norm()) / float(update.norm()))
            buffers[name] = 0.8 * buffers.get(name, 0.0) + update
            weight.data -= 0.1 * buffers[name]
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "lars"])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_step_that_is_left_out_leaves_no_trace(module, kind, skipped):
    other = copy.deepcopy(module)
    mine, theirs = (make_optimizer(kind, of.named_parameters()) for of in (module, other))
    trajectory(mine, module, steps=3, skip={skipped})
    for scale in [1.0 + step for step in range(3) if step != skipped]:
        set_rates(theirs, lr=0.1, weight_decay=0.2)
        backward(other, scale)
        step_if(theirs, YES)
    for ours, yours in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, yours)
    names = [{parameter: name for name, parameter in of.named_parameters()} for of in (module, other)]
    left, right = (optimizer_tensors(o, n) for o, n in zip((mine, theirs), names, strict=True))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_lars_takes_plain_steps_where_a_weight_or_its_update_is_nothing():
    module = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = make_optimizer("lars", module.named_parameters())
    set_rates(optimizer, lr=0.5, weight_decay=0.1)
    module.weight.grad = torch.ones(2, 2)
    step_if(optimizer, YES)
    assert torch.equal(module.weight, torch.full((2, 2), -0.5))

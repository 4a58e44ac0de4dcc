"""Attention pooling in blocks against the layers one after another."""

import copy

import numpy as np
import pytest
import torch
from bag_models import as_on_accelerator, make_bags, seeded
from torch import nn

from gigatome.mil import attention, dropout
from gigatome.mil.abmil import attend, embedded_attention, layers_of
from gigatome.mil.attention import can_pool
from gigatome.mil.clam import Clam, ClamOptions
from gigatome.mil.dropout import drop_
from gigatome.mil.model import BagBatch, Targets

CASES = {"gated": (True, 1), "plain": (False, 1), "branches": (True, 3)}


def network(gated=True, branches=1, rate=0.0, dim=12):
    return seeded(lambda: embedded_attention(dim, 9, 4, branches, gated=gated, dropout=rate))


def gradients(net, bags):
    """Of a loss that looks at everything the pooling gives."""
    net.zero_grad()
    pooled, weights, _, h = attend(net, bags)
    random = torch.Generator().manual_seed(3)
    parts = [torch.randn(part.shape, generator=random, dtype=torch.float64) for part in (pooled, weights, h)]
    sum((part * own).sum() for part, own in zip((pooled, weights, h), parts, strict=True)).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize(("gated", "branches"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("block", [7, 16, 1024])  # some blocks hold several bags, and some bags several blocks
def test_is_what_the_layers_give(gated, branches, dtype, tolerance, block, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    net, bags = network(gated, branches).to(dtype), make_bags(dtype=dtype)
    assert can_pool(layers_of(net), bags.x)
    output, found = attend(net, bags), gradients(net, bags)
    assert output.scores.requires_grad is False
    as_on_accelerator(monkeypatch)
    plain, expected = attend(net, bags), gradients(net, bags)
    for own, other in zip(output, plain, strict=True):
        torch.testing.assert_close(own, other, atol=tolerance, rtol=tolerance)
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1.0)  # that of the last bias is 0
        torch.testing.assert_close(found[name], gradient, atol=tolerance * scale, rtol=tolerance, msg=name)


def test_dropout_has_the_gradient_of_what_it_gave(monkeypatch):
    """With masks that are the same at each call, numerical differences must agree."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    net, bags = network(rate=0.25).double().train(), make_bags(dtype=torch.float64)
    parameters = list(net.parameters())

    def pooled(*_):
        torch.manual_seed(0)
        return attend(net, bags)[::3]  # pooled and h

    assert (pooled()[1] == 0).float().mean() > 0.4
    assert torch.autograd.gradcheck(pooled, parameters, eps=1e-6, atol=1e-6)


def test_dropout_is_that_of_the_layers():
    """The mean and the spread over many draws are those of PyTorch's dropout."""
    net, bags = network(rate=0.25).train(), make_bags((40,))
    plain = copy.deepcopy(net)
    torch.manual_seed(0)
    draws = []
    for one, run in ((net, attend), (plain, attend_plain)):
        with torch.no_grad():
            outputs = [run(one, bags) for _ in range(3000)]
        draws.append([torch.stack([output[part].double().flatten() for output in outputs]) for part in (0, 2, 3)])
    for own, other in zip(*draws, strict=True):
        spread = other.std(0)
        assert ((own.mean(0) - other.mean(0)).abs() <= 5 * spread * np.sqrt(2 / 3000) + 1e-6).all()
        assert ((own.std(0) - spread).abs() <= 0.15 * spread + 1e-6).all()


def attend_plain(net, bags):
    layers = nn.Sequential(*list(net)[:3])(bags.x)
    scores = net[3](layers)
    weights = scores.float().softmax(0)
    return weights.T @ layers, weights, scores, layers


def test_bfloat16_is_near_and_kinds_of_embeddings_are_alike():
    net, bags = network(), make_bags((300, 20))
    exact = gradients(net, bags)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = gradients(net, bags)
    for name, gradient in exact.items():
        assert coarse[name].dtype == torch.float32
        assert (coarse[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-3, name
    half = BagBatch(bags.x.half(), bags.bounds)
    single = BagBatch(half.x.float(), bags.bounds)
    for own, other in zip(attend(net, half), attend(net, single), strict=True):
        assert torch.equal(own, other)


def test_without_gradients_and_for_gradients_of_embeddings():
    net, bags = network(), make_bags()
    expected = attend(net, bags)
    with torch.inference_mode():
        for own, other in zip(attend(net, bags), expected, strict=True):
            assert torch.equal(own, other)
    x = bags.x.clone().requires_grad_()
    assert not can_pool(layers_of(net), x)
    attend(net, BagBatch(x, bags.bounds)).pooled.sum().backward()
    assert x.grad.abs().sum() > 0
    assert not can_pool(layers_of(network(gated=False, rate=0.25).train()), bags.x)
    assert not can_pool(layers_of(network(rate=1.0).train()), bags.x)


@pytest.mark.parametrize("multi", [False, True])
def test_the_instance_loss_of_clam_has_its_gradient(multi, monkeypatch):
    model = seeded(lambda: Clam(ClamOptions(hidden=9, attention=4, samples=3, multi_branch=multi), 12, 2))
    bags, targets = make_bags(), Targets(torch.tensor([0, 1, 1, 0, 1]))
    found = []
    for plain in (False, True):
        if plain:
            as_on_accelerator(monkeypatch)
        model.zero_grad()
        model.instance_loss(model(bags).instances, targets.y).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[1]["attention_net.0.weight"].any()
    for name, gradient in found[0].items():
        expected = found[1].get(name, torch.zeros_like(gradient))  # the scores have none
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drop(dtype):
    wide = torch.ones(400, 1000, dtype=dtype)
    part = wide[:, 300:]
    drop_(part, 64, np.random.SFC64(0))
    assert (wide[:, :300] == 1).all()
    assert set(part.unique().tolist()) == {0.0, 1.0}
    assert (part == 0).float().mean().item() == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / part.numel()))
    drop_(wide, 0, np.random.SFC64(0))
    assert dropout.LEVELS == 256
    with pytest.raises(OverflowError):
        drop_(wide, 256, np.random.SFC64(0))

"""Mean, max and Deep Sets."""

import pytest
import torch
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.mil.model import BagBatch
from gigatome.mil.pooling import DeepSets, DeepSetsOptions, MaxOptions, MaxPool, MeanOptions, MeanPool


@pytest.mark.parametrize("hidden", [0, 7])
def test_mean_holds_what_every_model_holds(hidden, monkeypatch):
    check_model(seeded(lambda: MeanPool(MeanOptions(hidden=hidden), 12, 3)), make_bags(), monkeypatch)


@torch.no_grad()
def test_mean_is_linear_on_the_mean():
    model, bags = seeded(lambda: MeanPool(MeanOptions(), 12, 3)), make_bags()
    expected = torch.stack([bag.x.mean(0) for bag in one_by_one(bags)]) @ model.classifier.weight.T
    torch.testing.assert_close(model(bags).logits, expected + model.classifier.bias)


@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize("best", ["probability", "risk"])
def test_max_holds_what_every_model_holds(outputs, best, monkeypatch):
    model = seeded(lambda: MaxPool(MaxOptions(best=best), 12, outputs))
    check_model(model, make_bags(sizes=(5, 1, 9), seed=3), monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("outputs", [2, 3])
def test_max_takes_the_instance_of_the_highest_probability(outputs):
    model, bags = seeded(lambda: MaxPool(MaxOptions(), 12, outputs)), make_bags()
    output = model(bags)
    for index, bag in enumerate(one_by_one(bags)):
        logits = model(bag).instances
        probabilities = logits.softmax(1)
        best = probabilities[:, 1].argmax() if outputs == 2 else probabilities.amax(1).argmax()
        torch.testing.assert_close(output.logits[index], logits[best])
        assert output.attention[bags.bag == index].squeeze(1).argmax() == best
    assert output.attention.sum() == len(bags)


@torch.no_grad()
def test_max_by_risk_takes_the_shortest_survival():
    model, bags = seeded(lambda: MaxPool(MaxOptions(best="risk"), 12, 4)), make_bags()
    for index, bag in enumerate(one_by_one(bags)):
        logits = model(bag).instances
        survival = (1 - logits.sigmoid()).cumprod(1).sum(1)
        torch.testing.assert_close(model(bags).logits[index], logits[survival.argmin()])


def test_max_does_not_saturate():
    # both probabilities are 1 in float32, yet the second instance is the better one
    model = MaxPool(MaxOptions(dropout=0), 2, 2)
    for layer, weight in ((model.classifier[0], torch.eye(2)), (model.classifier[2], torch.eye(2))):
        layer.weight.data.copy_(weight)
    x = torch.tensor([[0.0, 200.0], [0.0, 300.0]])
    assert model(BagBatch(x, torch.tensor([0, 2]))).logits.tolist() == [[0, 300]]


def test_max_keys_of_the_authors():
    layer = {"classifier.0.weight": (512, 1024), "classifier.0.bias": (512,)}
    last = {"weight": (2, 512), "bias": (2,)}
    check_keys(MaxPool(MaxOptions.clam(), 1024, 2), layer | {f"classifier.3.{key}": last[key] for key in last})
    without = MaxPool(MaxOptions(hidden=512, dropout=0), 1024, 2)
    check_keys(without, layer | {f"classifier.2.{key}": last[key] for key in last})
    check_keys(
        MaxPool(MaxOptions(), 384, 3),
        {"fc.0.weight": (384, 384), "fc.0.bias": (384,)}
        | {f"classifiers.{c}.weight": (1, 384) for c in range(3)}
        | {f"classifiers.{c}.bias": (1,) for c in range(3)},
    )


def test_max_starts_as_the_authors_do():
    model = seeded(lambda: MaxPool(MaxOptions(), 384, 2))
    assert not model.classifier[0].bias.any()
    assert model.classifier[0].weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_deep_sets_hold_what_every_model_holds(pool, monkeypatch):
    model = seeded(lambda: DeepSets(DeepSetsOptions(hidden=9, rho=6, pool=pool), 12, 3))
    check_model(model, make_bags(), monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_deep_sets_are_a_function_of_the_pool(pool):
    model, bags = seeded(lambda: DeepSets(DeepSetsOptions(hidden=9, rho=6, pool=pool), 12, 3)), make_bags()
    for index, bag in enumerate(one_by_one(bags)):
        h = (bag.x @ model.phi[0].weight.T + model.phi[0].bias).clamp(min=0)
        pooled = h.sum(0) if pool == "sum" else h.mean(0)
        expected = model.classifier((model.rho[0].weight @ pooled + model.rho[0].bias).clamp(min=0))
        torch.testing.assert_close(model(bags).logits[index], expected, atol=1e-5, rtol=1e-5)


def test_deep_sets_keys_of_the_authors():
    # as in Patch-GCN's checkpoints of "DS"
    check_keys(
        DeepSets(DeepSetsOptions.mcat(), 1024, 4),
        {
            "phi.0.weight": (512, 1024),
            "phi.0.bias": (512,),
            "rho.0.weight": (256, 512),
            "rho.0.bias": (256,),
            "classifier.weight": (4, 256),
            "classifier.bias": (4,),
        },
    )
    assert DeepSetsOptions.mcat().pool == "sum"


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeanPool(MeanOptions(), 8, 2),
        lambda: MaxPool(MaxOptions(), 8, 2),
        lambda: DeepSets(DeepSetsOptions(hidden=8, rho=4), 8, 2),
    ],
)
def test_long_bag(make):
    check_long(seeded(make))

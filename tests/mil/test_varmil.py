"""VarMIL's variance."""

import pytest
import torch
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.mil.varmil import VarMil, VarMilOptions


@pytest.fixture
def model():
    return seeded(lambda: VarMil(VarMilOptions(attention=4), 12, 3))


def test_holds_what_every_model_holds(model, monkeypatch):
    model.attention[2].bias.requires_grad_(False)  # the softmax does not change when all scores rise
    check_model(model, make_bags(), monkeypatch, idle=["attention.2.bias"])


@torch.no_grad()
def test_is_what_the_authors_wrote(model):
    bags = make_bags()
    for index, bag in enumerate(one_by_one(bags)):
        weights, count = model.attention(bag.x).softmax(0), len(bag.x)
        mean = (weights * bag.x).sum(0)
        upper = (weights * (bag.x - mean) ** 2).sum(0)
        lower = (count - 1) / count * weights.sum()
        variance = upper / lower if count > 1 else torch.zeros(12)
        expected = model.classifier(torch.cat([mean, variance]))
        torch.testing.assert_close(model(bags).logits[index], expected, atol=1e-5, rtol=1e-5)


def test_variance_of_equal_weights_is_the_sample_variance(model):
    model.attention[2].weight.data.zero_()
    model.classifier = torch.nn.Identity()
    bags = make_bags(sizes=(30, 1))
    statistics = model(bags).logits
    torch.testing.assert_close(statistics[0, 12:], bags.x[:30].var(0))
    assert statistics[1, 12:].tolist() == [0] * 12


def test_gradient_is_that_of_the_whole_formula(model):
    bags = make_bags(sizes=(6, 1, 9))
    model(bags).logits.square().sum().backward()
    actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for bag in one_by_one(bags):
        weights, count = model.attention(bag.x).softmax(0), len(bag.x)
        mean = (weights * bag.x).sum(0)
        variance = (weights * (bag.x - mean) ** 2).sum(0) * (count / max(count - 1, 1))
        total = total + model.classifier(torch.cat([mean, variance])).square().sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_weights_of_zero_do_not_count(model):
    # the authors count the weights that are not zero: two here, and the third instance is far away in score
    model.attention = torch.nn.Linear(12, 1, bias=False)
    model.attention.weight.data.fill_(0)[0, 0] = 1
    model.classifier = torch.nn.Identity()
    bags = make_bags(sizes=(3,))
    bags.x[:, 0] = torch.tensor([0.0, 0.0, -1e4])
    torch.testing.assert_close(model(bags).logits[0, 12:], bags.x[:2].var(0))


def test_keys_of_the_authors():
    check_keys(
        VarMil(VarMilOptions(), 512, 2),
        {
            "attention.0.weight": (128, 512),
            "attention.0.bias": (128,),
            "attention.2.weight": (1, 128),
            "attention.2.bias": (1,),
            "classifier.0.weight": (2, 1024),
            "classifier.0.bias": (2,),
        },
    )


def test_long_bag():
    check_long(seeded(lambda: VarMil(VarMilOptions(attention=4), 8, 2)))

"""DS-MIL's two streams."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.mil.ds_mil import DsMil, DsMilOptions
from gigatome.mil.model import Targets

OPTIONS = {
    "hipt": DsMilOptions(query=4),
    "original": DsMilOptions(query=4, query_network="mlp", value_network="identity", loss="separate"),
    "relu": DsMilOptions(query=4, value_network="relu"),
}


def make(options):
    return seeded(lambda: DsMil(options, 12, 3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_holds_what_every_model_holds(options, monkeypatch):
    model = make(options)
    separate = options.loss != "joint"
    # the instances' classifier learns through the loss of its own stream there
    check_model(model, make_bags(), monkeypatch, idle=["i_classifier"] if separate else [])


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_what_the_authors_wrote(options):
    model, bags = make(options), make_bags()
    output, stream = model(bags), model.b_classifier
    for index, bag in enumerate(one_by_one(bags)):
        scores = model.i_classifier["fc"](bag.x)
        values = stream.v(bag.x) if options.value_network != "identity" else bag.x
        queries = stream.q(bag.x)
        weights = torch.stack([(queries @ queries[scores[:, c].argmax()] / 2).softmax(0) for c in range(3)], 1)
        torch.testing.assert_close(output.attention[bags.bag == index], weights, atol=1e-5, rtol=1e-5)
        logits = stream.fcc((weights.T @ values)[None]).flatten()
        best = scores.amax(0)
        torch.testing.assert_close(output.instances[index], best)
        expected = (logits + best) / 2 if options.loss == "joint" else logits
        torch.testing.assert_close(output.logits[index], expected, atol=1e-5, rtol=1e-5)


def test_dropout_of_values_is_that_of_each_instance():
    # pooling before the linear layer must not turn it into a dropout of the pooled vector
    model = seeded(lambda: DsMil(DsMilOptions(query=4, dropout=0.5), 12, 2)).train()
    stream, bags = model.b_classifier, make_bags(sizes=(4000,))
    bags.x[:] = 1
    with torch.no_grad():
        stream.v[1].weight.copy_(torch.eye(12))
        stream.fcc.weight.zero_()[0, 0] = 1
        first, second = model(bags).logits, model(bags).logits
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=0.3, rtol=0)  # the sum of 12 means of 4,000 coins of 0 and 2


def criterion(logits, targets):
    return F.cross_entropy(logits, targets.y)


def test_losses():
    bags, targets = make_bags(), Targets(torch.tensor([2, 0, 1, 1, 2]))
    model = make(OPTIONS["hipt"])
    output = model(bags)
    assert model.loss(output, targets, criterion) == criterion(output.logits, targets)

    model = make(OPTIONS["original"])
    output = model(bags)
    expected = (criterion(output.logits, targets) + criterion(output.instances, targets)) / 2
    torch.testing.assert_close(model.loss(output, targets, criterion), expected)

    model = make(DsMilOptions.original())
    output = model(bags)
    classes = torch.eye(3)[targets.y]
    expected = sum(
        -(classes * logits.sigmoid().log() + (1 - classes) * (1 - logits.sigmoid()).log()).mean()
        for logits in (output.logits, output.instances)
    )
    loss = model.loss(output, targets, criterion)
    torch.testing.assert_close(loss, expected / 2)
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_survival_takes_its_criterion_for_both_streams():
    bags = make_bags()
    targets = Targets(torch.tensor([2, 0, 1, 1, 2]), torch.ones(5), torch.ones(5, dtype=torch.bool))
    model = make(DsMilOptions.original())
    output = model(bags)
    expected = (criterion(output.logits, targets) + criterion(output.instances, targets)) / 2
    torch.testing.assert_close(model.loss(output, targets, criterion), expected)


def test_keys_of_the_authors():
    # as in the authors' c16_aggregator.pth and tcga_aggregator.pth (one and two classes, embeddings of 512) …
    instances = {"i_classifier.fc.0.weight": (2, 512), "i_classifier.fc.0.bias": (2,)}
    last = {"b_classifier.fcc.weight": (2, 2, 512), "b_classifier.fcc.bias": (2,)}
    queries = {
        "b_classifier.q.0.weight": (128, 512),
        "b_classifier.q.0.bias": (128,),
        "b_classifier.q.2.weight": (128, 128),
        "b_classifier.q.2.bias": (128,),
    }
    check_keys(DsMil(DsMilOptions.original(), 512, 2), instances | queries | last)
    # … and in their init.pth
    older = {
        "b_classifier.q.weight": (128, 512),
        "b_classifier.q.bias": (128,),
        "b_classifier.v.1.weight": (512, 512),
        "b_classifier.v.1.bias": (512,),
    }
    check_keys(DsMil(DsMilOptions(), 512, 2), instances | older | last)


def test_long_bag():
    check_long(seeded(lambda: DsMil(DsMilOptions(query=4), 8, 2)))

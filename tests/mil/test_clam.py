"""CLAM, single- and multi-branch, and its instance loss."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.mil.clam import Clam, ClamOptions
from gigatome.mil.model import Targets

Y = torch.tensor([2, 0, 1, 1, 2])  # of the five bags that make_bags makes


def make(multi_branch=False, **options):
    return seeded(lambda: Clam(ClamOptions(multi_branch, hidden=9, attention=4, **options), 12, 3))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("multi_branch", [False, True])
def test_holds_what_every_model_holds(multi_branch, gated, monkeypatch):
    model = make(multi_branch, gated=gated)
    last = model.attention_net[3].attention_c.bias if gated else model.attention_net[3][3].bias
    last.requires_grad_(False)  # the softmax does not change when all scores rise
    idle = ["instance_classifiers", "attention_net.3.attention_c.bias", "attention_net.3.3.bias"]
    check_model(model, make_bags(), monkeypatch, idle=idle)


@torch.no_grad()
def test_each_branch_has_its_own_class():
    model, bags = make(multi_branch=True), make_bags()
    output = model(bags)
    assert output.attention.shape == (len(bags.x), 3)
    for index, bag in enumerate(one_by_one(bags)):
        linear, _, _, attention = model.attention_net
        h = linear(bag.x).clamp(min=0)
        pooled = attention(h).softmax(0).T @ h
        for c in range(3):
            torch.testing.assert_close(output.logits[index, c], model.classifiers[c](pooled[c])[0])


def expected_instance_loss(model, bag, y, *, loss, samples, subtyping):
    """Bag by bag and class by class, as the paper describes it."""
    linear, _, _, attention = model.attention_net
    h = linear(bag.x).clamp(min=0)
    scores = attention(h)
    half = len(h) / 2
    total = 0.0
    for c, classifier in enumerate(model.instance_classifiers):
        order = scores[:, c if scores.shape[1] > 1 else 0].argsort()
        high, low = order.flip(0)[: min(samples, int(half + 0.5))], order[: min(samples, int(half))]
        if c == y:
            logits, labels = classifier(h[torch.cat([high, low])]), torch.tensor([1] * len(high) + [0] * len(low))
        elif subtyping:
            logits, labels = classifier(h[high]), torch.zeros(len(high), dtype=torch.long)
        else:
            continue
        if loss == "cross_entropy":
            total += F.cross_entropy(logits, labels)
        else:
            own = logits[range(len(labels)), labels]
            other = logits[range(len(labels)), 1 - labels]
            total += (1 + (other + 1 - own).exp()).log().mean()
    return total / len(model.instance_classifiers) if subtyping else total


@pytest.mark.parametrize("multi_branch", [False, True])
@pytest.mark.parametrize("loss", ["svm", "cross_entropy"])
@pytest.mark.parametrize("subtyping", [False, True])
def test_instance_loss(multi_branch, loss, subtyping):
    model, bags = make(multi_branch, instance_loss=loss, subtyping=subtyping, samples=4), make_bags()
    actual = model.instance_loss(model(bags).instances, Y)
    parts = [
        expected_instance_loss(model, bag, y, loss=loss, samples=4, subtyping=subtyping)
        for bag, y in zip(one_by_one(bags), Y.tolist(), strict=True)
    ]
    torch.testing.assert_close(actual, torch.stack(parts).mean())
    # and with the same gradients
    actual.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.stack(parts).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    assert gradients["attention_net.0.weight"].any()


def criterion(logits, targets):
    return F.cross_entropy(logits, targets.y)


def test_loss_weighs_bag_and_instances():
    model, bags = make(), make_bags()
    output, targets = model(bags), Targets(Y)
    expected = 0.7 * criterion(output.logits, targets) + 0.3 * model.instance_loss(output.instances, Y)
    torch.testing.assert_close(model.loss(output, targets, criterion), expected)


def test_without_weight_there_is_no_instance_loss():
    model, bags = make(instance_weight=0), make_bags()
    output, targets = model(bags), Targets(Y)
    assert output.instances is None
    assert model.loss(output, targets, criterion) == criterion(output.logits, targets)


def test_survival_has_no_instance_loss():
    model, bags = make(), make_bags()
    targets = Targets(Y, torch.ones(5), torch.ones(5, dtype=torch.bool))
    output = model(bags)
    assert model.loss(output, targets, criterion) == criterion(output.logits, targets)


def test_keys_of_the_authors():
    gated = {
        "attention_net.0.weight": (512, 1024),
        "attention_net.0.bias": (512,),
        "attention_net.3.attention_a.0.weight": (256, 512),
        "attention_net.3.attention_a.0.bias": (256,),
        "attention_net.3.attention_b.0.weight": (256, 512),
        "attention_net.3.attention_b.0.bias": (256,),
    }
    instances = {f"instance_classifiers.{c}.weight": (2, 512) for c in range(3)}
    instances |= {f"instance_classifiers.{c}.bias": (2,) for c in range(3)}
    single = {
        "attention_net.3.attention_c.weight": (1, 256),
        "attention_net.3.attention_c.bias": (1,),
        "classifiers.weight": (3, 512),
        "classifiers.bias": (3,),
    }
    check_keys(Clam(ClamOptions(), 1024, 3), gated | instances | single)
    multi = {"attention_net.3.attention_c.weight": (3, 256), "attention_net.3.attention_c.bias": (3,)}
    multi |= {f"classifiers.{c}.weight": (1, 512) for c in range(3)} | {f"classifiers.{c}.bias": (1,) for c in range(3)}
    check_keys(Clam(ClamOptions.multi(), 1024, 3), gated | instances | multi)
    assert Clam(ClamOptions.big(), 1024, 2).attention_net[3].attention_c.in_features == 384
    assert Clam(ClamOptions.hipt(), 384, 2).classifiers.in_features == 384


def test_older_files_load():
    bags, model = make_bags(), make()
    state = {key.replace("attention_net.3.", "attention_net.2."): value for key, value in make().state_dict().items()}
    state["instance_loss_fn.labels"] = torch.arange(2)
    assert "attention_net.2.attention_c.bias" in state
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(bags).logits, make()(bags).logits)


def test_a_wrong_key_is_still_an_error():
    state = make().state_dict() | {"attention_net.4.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"attention_net\.4\.weight"):
        make().load_state_dict(state)


@pytest.mark.parametrize("multi_branch", [False, True])
def test_long_bag(multi_branch):
    check_long(seeded(lambda: Clam(ClamOptions(multi_branch, hidden=8, attention=4), 8, 2)))

"""ABMIL, plain and gated, and MCAT's form of it."""

import pytest
import torch
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.mil.abmil import Abmil, AbmilOptions

OPTIONS = {
    "plain": AbmilOptions(hidden=9, attention=4),
    "gated": AbmilOptions(hidden=9, attention=4, gated=True),
    "no layer": AbmilOptions(hidden=0, attention=4),
    "branches": AbmilOptions(hidden=9, attention=4, branches=2),
    "mcat": AbmilOptions(hidden=9, attention=4, gated=True, rho=6, form="mcat"),
    "mcat, no gate": AbmilOptions(hidden=9, attention=4, dropout=0.25, form="mcat"),
}


# the softmax does not change when all scores rise: these have no gradient but rounding
LAST_BIASES = ("attention.2.bias", "attention_w.bias", "attention_net.3.attention_c.bias", "attention_net.3.3.bias")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_holds_what_every_model_holds(options, monkeypatch):
    model = seeded(lambda: Abmil(options, 12, 3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in LAST_BIASES)
    check_model(model, make_bags(), monkeypatch, idle=LAST_BIASES)


def linear(module, x):
    return x @ module.weight.T + module.bias


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_is_what_ilse_wrote(gated):
    model, bags = seeded(lambda: Abmil(AbmilOptions(hidden=9, attention=4, gated=gated), 12, 2)), make_bags()
    for index, bag in enumerate(one_by_one(bags)):
        h = linear(model.feature_extractor_part2[0], bag.x).clamp(min=0)
        if gated:
            gate = 1 / (1 + (-linear(model.attention_U[0], h)).exp())
            scores = linear(model.attention_w, linear(model.attention_V[0], h).tanh() * gate)
        else:
            scores = linear(model.attention[2], linear(model.attention[0], h).tanh())
        weights = scores.exp() / scores.exp().sum()
        expected = linear(model.classifier[0], (weights * h).sum(0))
        torch.testing.assert_close(model(bags).logits[index], expected, atol=1e-5, rtol=1e-5)


def test_keys_of_the_authors():
    common = {"feature_extractor_part2.0.weight": (500, 800), "feature_extractor_part2.0.bias": (500,)}
    classifier = {"classifier.0.weight": (1, 500), "classifier.0.bias": (1,)}
    plain = {
        "attention.0.weight": (128, 500),
        "attention.0.bias": (128,),
        "attention.2.weight": (1, 128),
        "attention.2.bias": (1,),
    }
    check_keys(Abmil(AbmilOptions(), 800, 1), common | plain | classifier)
    gated = {
        "attention_V.0.weight": (128, 500),
        "attention_V.0.bias": (128,),
        "attention_U.0.weight": (128, 500),
        "attention_U.0.bias": (128,),
        "attention_w.weight": (1, 128),
        "attention_w.bias": (1,),
    }
    model = Abmil(AbmilOptions(gated=True), 800, 1)
    check_keys(model, common | gated | classifier)
    older = {key.replace("attention_w.", "attention_weights."): value for key, value in model.state_dict().items()}
    assert "attention_weights.bias" in older
    seeded(lambda: Abmil(AbmilOptions(gated=True), 800, 1)).load_state_dict(older, strict=True)


def test_keys_of_mcat():
    # as in Patch-GCN's checkpoints of "AMIL", without the "module." of data parallelism
    check_keys(
        Abmil(AbmilOptions.mcat(), 1024, 4),
        {
            "attention_net.0.weight": (512, 1024),
            "attention_net.0.bias": (512,),
            "attention_net.3.attention_a.0.weight": (256, 512),
            "attention_net.3.attention_a.0.bias": (256,),
            "attention_net.3.attention_b.0.weight": (256, 512),
            "attention_net.3.attention_b.0.bias": (256,),
            "attention_net.3.attention_c.weight": (1, 256),
            "attention_net.3.attention_c.bias": (1,),
            "rho.0.weight": (256, 512),
            "rho.0.bias": (256,),
            "classifier.weight": (4, 256),
            "classifier.bias": (4,),
        },
    )


def test_dropout_is_of_training_only():
    bags = make_bags()
    model = seeded(lambda: Abmil(AbmilOptions.mcat(), 12, 2))
    assert torch.equal(model(bags).logits, model(bags).logits)
    model.train()
    assert not torch.equal(model(bags).logits, model(bags).logits)


def test_long_bag():
    check_long(seeded(lambda: Abmil(AbmilOptions(hidden=8, attention=4), 8, 2)))

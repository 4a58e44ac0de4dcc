"""DeepAttnMISL's clusters."""

from dataclasses import replace

import pytest
import torch
from bag_models import check_keys, check_long, check_model, make_bags, one_by_one, seeded

from gigatome.core.errors import EvaluationError
from gigatome.mil.deep_attn_misl import DeepAttnMisl, DeepAttnMislOptions

OPTIONS = {
    "ignored": DeepAttnMislOptions(clusters=4, hidden=9, attention=5),
    "zeros": DeepAttnMislOptions(clusters=4, hidden=9, attention=5, empty="zeros"),
    "original": DeepAttnMislOptions(clusters=4, hidden=9, attention=5, form="original"),
}
LAST_BIASES = ("attention.2.bias", "attention_net.3.attention_c.bias")  # the softmax does not change with them


def make(options):
    return seeded(lambda: DeepAttnMisl(options, 12, 3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_holds_what_every_model_holds(options, monkeypatch):
    model = make(options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in LAST_BIASES)
    check_model(model, make_bags(clusters=4), monkeypatch, idle=LAST_BIASES)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_what_the_authors_wrote(options):
    model, bags = make(options), make_bags(clusters=4)
    empty = 0
    for index, bag in enumerate(one_by_one(bags)):
        clusters = []
        for c in range(4):
            x = bag.x[bag.clusters == c]
            empty += not len(x)
            if not len(x):
                h = torch.zeros(9) if options.empty == "zeros" else None
            elif options.form == "original":
                h = model.embedding_net(x[:, :, None, None])[:, :, 0, 0].mean(0)
            else:
                h = model.phis[c](x).mean(0)
            if h is not None:
                clusters.append(h)
        h = torch.stack(clusters)
        if options.form == "original":
            expected = model.fc6((model.attention(h).softmax(0) * h).sum(0))
        else:
            h = model.attention_net[:3](h)
            expected = model.classifier(model.rho((model.attention_net[3](h).softmax(0) * h).sum(0)))
        torch.testing.assert_close(model(bags).logits[index], expected, atol=1e-5, rtol=1e-5)
    assert empty >= 3  # the bag of one instance alone has three


def test_attention_is_shared_among_the_instances_of_a_cluster():
    bags = replace(make_bags(sizes=(4, 1)), clusters=torch.tensor([0, 0, 0, 3, 1]))
    for options in OPTIONS.values():
        weights = make(options)(bags).attention.flatten()
        assert weights[0] == weights[1] == weights[2]
        assert weights[3] != weights[0]
        torch.testing.assert_close(weights[4], torch.tensor(1.0))


def test_every_instance_passes_its_own_cluster_only():
    bags = make_bags(clusters=4)
    model = make(OPTIONS["ignored"])
    before = model(bags).logits
    with torch.no_grad():
        model.phis[2][0].bias += 1
    changed = (model(bags).logits != before).any(1)
    assert changed.tolist() == [bool((bag.clusters == 2).any()) for bag in one_by_one(bags)]
    assert 0 < changed.sum() < len(bags)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_clusters_that_the_model_does_not_have(wrong):
    bags = make_bags(clusters=4)
    bags.clusters[3] = wrong
    with pytest.raises(EvaluationError, match="4 clusters, 0 to 3, but the embeddings are of"):
        make(OPTIONS["ignored"])(bags)


def test_without_clusters():
    with pytest.raises(EvaluationError, match="needs the cluster"):
        make(OPTIONS["ignored"])(make_bags())


def test_keys_of_the_authors():
    expected = {
        "attention_net.0.weight": (512, 512),
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
    }
    for c in range(10):
        expected |= {f"phis.{c}.0.weight": (512, 1024), f"phis.{c}.0.bias": (512,)}
        expected |= {f"phis.{c}.3.weight": (512, 512), f"phis.{c}.3.bias": (512,)}
    check_keys(DeepAttnMisl(DeepAttnMislOptions.mcat(), 1024, 4), expected)
    check_keys(
        DeepAttnMisl(DeepAttnMislOptions.original(), 4096, 1),
        {
            "embedding_net.0.weight": (64, 4096, 1, 1),
            "embedding_net.0.bias": (64,),
            "attention.0.weight": (32, 64),
            "attention.0.bias": (32,),
            "attention.2.weight": (1, 32),
            "attention.2.bias": (1,),
            "fc6.0.weight": (32, 64),
            "fc6.0.bias": (32,),
            "fc6.3.weight": (1, 32),
            "fc6.3.bias": (1,),
        },
    )


@pytest.mark.parametrize("form", ["mcat", "original"])
def test_long_bag(form):
    options = DeepAttnMislOptions(clusters=4, hidden=8, attention=4, form=form)
    check_long(seeded(lambda: DeepAttnMisl(options, 8, 2)), clusters=4)

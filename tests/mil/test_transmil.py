import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gigatome.mil.model import BagBatch
from gigatome.mil.transmil import TransMil, TransMilOptions

DIM, OUTPUTS = 10, 3
SMALL = TransMilOptions(hidden=16, heads=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TransMil(SMALL, DIM, OUTPUTS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that softmaxes are not flat
    return model


def make_bags(sizes, seed=0):
    x = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(seed))
    return BagBatch(x, torch.tensor([0, *sizes]).cumsum(0))


def plain_attention(attn, x, landmarks):
    """The library's steps in the order of the paper, all n × m products written out; also the whole attention."""
    n, dim, heads = *x.shape, attn.heads
    every = math.ceil(n / landmarks)
    x = torch.cat([torch.zeros(every * landmarks - n, dim), x])
    q, k, v = ((x @ w.T).view(len(x), heads, -1).transpose(0, 1) for w in attn.to_qkv.weight.chunk(3))
    q = q / math.sqrt(dim / heads)
    q_land, k_land = (t.view(heads, landmarks, every, -1).mean(2) for t in (q, k))
    outer, middle, inner = ((a @ b.mT).softmax(-1) for a, b in ((q, k_land), (q_land, k_land), (q_land, k)))
    z = middle.mT / (middle.abs().sum(-1).max() * middle.abs().sum(-2).max())
    eye = torch.eye(landmarks)
    for _ in range(6):
        az = middle @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    whole = outer @ z @ inner
    out = whole @ v + F.conv2d(v[None], attn.res_conv.weight, padding=(16, 0), groups=heads)[0]
    return attn.to_out(out.transpose(0, 1).reshape(len(x), -1))[-n:], whole[:, -n:, -n:]


def plainly(model, x):
    """Logits and the class token's attention [heads, n] of one bag, step by step."""
    n, side = len(x), math.ceil(math.sqrt(len(x)))
    h = F.relu(model._fc1[0](x))
    h = torch.cat([h, h[: side**2 - n]])
    h = torch.cat([model.cls_token[0], h])
    h = h + plain_attention(model.layer1.attn, model.layer1.norm(h), 8)[0]
    square = h[1:].T.reshape(1, -1, side, side)
    layer = model.pos_layer
    square = layer.proj(square) + square + layer.proj1(square) + layer.proj2(square)
    h = torch.cat([h[:1], square.flatten(2)[0].T])
    out, attention = plain_attention(model.layer2.attn, model.layer2.norm(h), 8)
    return model._fc2(model.norm((h + out)[:1])), attention[:, 0, 1:]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 15, 16, 17, 40, 99])
def test_logits_and_attention_are_the_papers(model, n):
    bags = make_bags([n], seed=n)
    output = model(bags)
    logits, attention = plainly(model, bags.x)
    torch.testing.assert_close(output.logits, logits, atol=2e-5, rtol=1e-4)
    attention = attention.mean(0)
    seen = attention[:n].clone()
    seen[: len(attention) - n] += attention[n:]
    seen = seen.clamp(min=0)
    torch.testing.assert_close(output.attention[:, 0], seen / seen.sum(), atol=1e-5, rtol=1e-3)


def test_bags_side_by_side_are_bags_alone(model):
    sizes = [5, 1, 33, 2]
    bags = make_bags(sizes)
    output = model(bags)
    alone = [model(BagBatch(x, torch.tensor([0, len(x)]))) for x in bags.x.split(sizes)]
    assert output.logits.shape == (4, OUTPUTS)
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention, torch.cat([one.attention for one in alone]), atol=1e-5, rtol=0)
    for part in output.attention.split(sizes):
        torch.testing.assert_close(part.sum(0), torch.ones(1))
        assert (part >= 0).all()


def test_keys_and_shapes_are_the_authors():
    shapes = {key: tuple(value.shape) for key, value in TransMil(TransMilOptions(), 1024, 2).state_dict().items()}
    layer = {
        "norm.weight": (512,),
        "norm.bias": (512,),
        "attn.to_qkv.weight": (1536, 512),
        "attn.to_out.0.weight": (512, 512),
        "attn.to_out.0.bias": (512,),
        "attn.res_conv.weight": (8, 1, 33, 1),
    }
    assert shapes == {
        "cls_token": (1, 1, 512),
        "pos_layer.proj.weight": (512, 1, 7, 7),
        "pos_layer.proj.bias": (512,),
        "pos_layer.proj1.weight": (512, 1, 5, 5),
        "pos_layer.proj1.bias": (512,),
        "pos_layer.proj2.weight": (512, 1, 3, 3),
        "pos_layer.proj2.bias": (512,),
        "_fc1.0.weight": (512, 1024),
        "_fc1.0.bias": (512,),
        **{f"layer1.{key}": shape for key, shape in layer.items()},
        **{f"layer2.{key}": shape for key, shape in layer.items()},
        "norm.weight": (512,),
        "norm.bias": (512,),
        "_fc2.weight": (2, 512),
        "_fc2.bias": (2,),
    }


def test_every_parameter_learns_and_dropout_acts_in_training_only(model):
    bags = make_bags([20, 30])
    assert torch.equal(model(bags).logits, model(bags).logits)
    model.train()
    first, second = model(bags), model(bags)
    assert not torch.equal(first.logits, second.logits)
    assert first.attention is None  # nobody needs it there
    first.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_are_those_of_the_papers_steps(model):
    x = make_bags([23]).x
    grads = []
    for logits in (lambda x: model(BagBatch(x, torch.tensor([0, 23]))).logits, lambda x: plainly(model, x)[0]):
        leaf = x.clone().requires_grad_()
        logits(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


def test_bfloat16(model):
    bags = make_bags([50, 9])
    expected = model(bags)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(bags)
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.1, rtol=0.1)
    torch.testing.assert_close(output.attention.sum(), torch.tensor(2.0))


def test_a_large_bag_needs_no_quadratic_memory():
    """100,000 instances, forwards and backwards; their pairs would take 40 GB a head."""
    model = TransMil(TransMilOptions(hidden=8, heads=2), DIM, 2).train()
    output = model(make_bags([100_000]))
    output.logits.sum().backward()
    assert model._fc1[0].weight.grad.isfinite().all()


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="heads"):
        TransMilOptions(hidden=20, heads=8)

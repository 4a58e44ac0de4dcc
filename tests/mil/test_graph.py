import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gigatome.mil.graph import DeepGraphConv, DeepGraphConvOptions, PatchGcn, PatchGcnOptions
from gigatome.mil.model import BagBatch
from gigatome.mil.neighbours import knn_edges

DIM, OUTPUTS = 12, 3
MODELS = {
    "deep_graph_conv": lambda: DeepGraphConv(DeepGraphConvOptions(hidden=8), DIM, OUTPUTS),
    "patch_gcn": lambda: PatchGcn(PatchGcnOptions(hidden=8), DIM, OUTPUTS),
}


def make_bags(sizes, seed=0, k=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), DIM, generator=generator)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    return BagBatch(x, bounds, edges=knn_edges(torch.rand(sum(sizes), 2, generator=generator), k, bounds))


def single(bags, b):
    start, stop = bags.bounds[b : b + 2].tolist()
    inside = (bags.edges[0] >= start) & (bags.edges[0] < stop)
    return BagBatch(bags.x[start:stop], torch.tensor([0, stop - start]), edges=bags.edges[:, inside] - start)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def test_bags_side_by_side_are_bags_alone(model):
    sizes = [5, 1, 17, 2]
    bags = make_bags(sizes)
    output = model(bags)
    alone = [model(single(bags, b)) for b in range(len(sizes))]
    assert output.logits.shape == (4, OUTPUTS)
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention, torch.cat([one.attention for one in alone]), atol=1e-5, rtol=0)
    for part in output.attention.split(sizes):
        torch.testing.assert_close(part.sum(0), torch.ones(1))


def test_order_of_edges_and_of_instances_does_not_matter(model):
    bags = make_bags([11])
    output = model(bags)
    order = torch.randperm(bags.edges.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = model(BagBatch(bags.x, bags.bounds, edges=bags.edges[:, order]))
    torch.testing.assert_close(shuffled.logits, output.logits)
    rows = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    renumbered = BagBatch(bags.x[rows], bags.bounds, edges=rows.argsort()[bags.edges])
    torch.testing.assert_close(model(renumbered).logits, output.logits)
    torch.testing.assert_close(model(renumbered).attention, output.attention[rows])


def test_edges_matter_and_lead_from_first_row_to_second(model):
    """Only what an instance can be reached from changes it."""
    bags = make_bags([6])
    chain = torch.tensor([[0, 1], [1, 2]])  # 0 → 1 → 2
    scores = {}
    model.path_attention_head.register_forward_hook(lambda _module, inputs, _output: scores.update(x=inputs[0]))
    model(BagBatch(bags.x, bags.bounds, edges=chain))
    before = scores["x"]
    changed = bags.x.clone()
    changed[1] += 1
    model(BagBatch(changed, bags.bounds, edges=chain))
    assert (scores["x"] != before).any(1).tolist() == [False, True, True, False, False, False]


def test_isolated_instances_and_no_edges_at_all(model):
    bags = make_bags([4])
    empty = BagBatch(bags.x.requires_grad_(), bags.bounds, edges=torch.empty(2, 0, dtype=torch.int64))
    output = model(empty)
    output.logits.sum().backward()
    assert output.logits.isfinite().all()
    assert empty.x.grad.isfinite().all()


def test_bags_without_edges_are_refused(model):
    with pytest.raises(ValueError, match="knn_edges"):
        model(BagBatch(torch.zeros(3, DIM), torch.tensor([0, 3])))


def test_gradients(model):
    model = model.double()
    bags = make_bags([4, 3], k=2)
    x = bags.x.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model(BagBatch(x, bags.bounds, edges=bags.edges)).logits, x, fast_mode=True
    )
    if isinstance(model, PatchGcn):
        t = model.layers[0].conv.t

        def logits(value):
            parameters = {"layers.0.conv.t": value}
            return torch.func.functional_call(model, parameters, BagBatch(x, bags.bounds, edges=bags.edges)).logits

        assert torch.autograd.gradcheck(logits, t.detach().clone().requires_grad_(), fast_mode=True)


def dense(bags):
    """Adjacency [T, T]: row i has a 1 for each edge to i."""
    adjacency = torch.zeros(len(bags.x), len(bags.x))
    adjacency[bags.edges[1], bags.edges[0]] = 1
    return adjacency


def test_deep_graph_conv_is_its_formula():
    torch.manual_seed(0)
    model = MODELS["deep_graph_conv"]().eval()
    model.conv2.eps.fill_(0.3)
    bags = make_bags([9])
    x, adjacency = bags.x, dense(bags)
    for conv in (model.conv1, model.conv2, model.conv3):
        x = F.relu(conv.nn((1 + conv.eps) * x + adjacency @ x))
    weights = model.path_attention_head(x).softmax(0)
    torch.testing.assert_close(model(bags).logits, model.classifier(model.path_rho(weights.T @ x)))
    torch.testing.assert_close(model(bags).attention, weights)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_patch_gcn_is_its_formula(scale):
    """Also where the largest messages are far above the others."""
    torch.manual_seed(0)
    model = MODELS["patch_gcn"]().eval()
    model.layers[1].conv.t.data.fill_(1.7)
    bags = make_bags([9])
    bags = BagBatch(bags.x * scale, bags.bounds, edges=bags.edges)
    adjacency = dense(bags)

    def convolve(conv, x):
        messages = F.relu(x) + 1e-7
        # [target, source, channel]
        weights = (conv.t * messages).expand(9, 9, 8).masked_fill(adjacency[..., None] == 0, -torch.inf).softmax(1)
        return conv.mlp(x + (weights * messages).sum(1))

    x = model.fc(bags.x)
    outputs = [x, convolve(model.layers[0].conv, x)]
    for layer in model.layers[1:]:
        outputs.append(outputs[-1] + F.relu(layer.norm(convolve(layer.conv, outputs[-1]))))
    x = model.path_phi(torch.cat(outputs, 1))
    weights = model.path_attention_head(x).softmax(0)
    torch.testing.assert_close(
        model(bags).logits, model.classifier(model.path_rho(weights.T @ x)), atol=1e-5 * scale, rtol=1e-5
    )


def test_keys_and_shapes_are_the_authors():
    shapes = {key: tuple(value.shape) for key, value in PatchGcn(PatchGcnOptions(), 1024, 4).state_dict().items()}
    assert len(shapes) == 2 + 3 * 9 + 2 + 6 + 2 + 2
    assert {key: shape for key, shape in shapes.items() if key.startswith("layers.2.")} == {
        "layers.2.conv.t": (1,),
        "layers.2.conv.mlp.0.weight": (256, 128),
        "layers.2.conv.mlp.0.bias": (256,),
        "layers.2.conv.mlp.1.weight": (256,),
        "layers.2.conv.mlp.1.bias": (256,),
        "layers.2.conv.mlp.4.weight": (128, 256),
        "layers.2.conv.mlp.4.bias": (128,),
        "layers.2.norm.weight": (128,),
        "layers.2.norm.bias": (128,),
    }
    assert shapes["fc.0.weight"] == (128, 1024)
    assert shapes["path_phi.0.weight"] == shapes["path_attention_head.attention_b.0.weight"] == (512, 512)
    shapes = {key: tuple(v.shape) for key, v in DeepGraphConv(DeepGraphConvOptions(), 1024, 4).state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if not key.startswith("conv")} == {
        "path_attention_head.attention_a.0.weight": (256, 256),
        "path_attention_head.attention_a.0.bias": (256,),
        "path_attention_head.attention_b.0.weight": (256, 256),
        "path_attention_head.attention_b.0.bias": (256,),
        "path_attention_head.attention_c.weight": (1, 256),
        "path_attention_head.attention_c.bias": (1,),
        "path_rho.0.weight": (256, 256),
        "path_rho.0.bias": (256,),
        "classifier.weight": (4, 256),
        "classifier.bias": (4,),
    }
    assert {key: shape for key, shape in shapes.items() if key.startswith("conv1")} == {
        "conv1.eps": (1,),
        "conv1.nn.0.weight": (256, 1024),
        "conv1.nn.0.bias": (256,),
        "conv1.nn.2.weight": (256, 256),
        "conv1.nn.2.bias": (256,),
    }


def test_bfloat16(model):
    bags = make_bags([30, 20])
    expected = model(bags)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train(False)(bags)
    output.logits.sum().backward()
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.03, rtol=0.03)
    torch.testing.assert_close(output.attention.sum(), torch.tensor(2.0))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_only(model):
    bags = make_bags([30])
    assert torch.equal(model(bags).logits, model(bags).logits)
    model.train()
    assert not torch.equal(model(bags).logits, model(bags).logits)


def test_a_large_bag_needs_no_edge_by_channel_tensors(model):
    """100,000 instances of 8 neighbours, forwards and backwards."""
    n = 100_000
    near = (torch.arange(n)[:, None] + torch.arange(1, 9)) % n
    edges = torch.stack([near.flatten(), torch.arange(n).repeat_interleave(8)])
    output = model(BagBatch(torch.randn(n, DIM), torch.tensor([0, n]), edges=edges))
    output.logits.sum().backward()
    assert output.attention.shape == (n, 1)

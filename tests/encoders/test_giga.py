import argparse

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.core.errors import RunError
from gigatome.encoders.giga import GigaConfig, build_giga, from_resnet, load_gigassl

SMALL = {"input_dim": 6}
KINDS = {
    "average": GigaConfig(**SMALL),
    "strided": GigaConfig(**SMALL, shortcut="strided"),
    "resnet34": GigaConfig(**SMALL, network="resnet34"),
    "resnet50": GigaConfig(**SMALL, network="resnet50"),
    "batch": GigaConfig(**SMALL, edges="batch"),
    "mlp": GigaConfig(**SMALL, pooling="mlp", dim=12),
    "transformer": GigaConfig(**SMALL, pooling="transformer", dim=16, heads=4),
}
SPARSE = [kind for kind, config in KINDS.items() if config.pooling == "sparse_conv"]


def make_bags(sizes=(1, 5, 40, 5), side=9, seed=0):
    """Slides of these many tiles; in most of them some tiles lie in one cell."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    x = torch.randn(int(bounds[-1]), 6, generator=generator)
    locations = torch.randint(-side // 2, side // 2, (len(x), 2), generator=generator)
    return x, locations, bounds


def lively(config, seed=0):
    """An encoder whose batch norms do something, in evaluation mode."""
    encoder = build_giga(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if name.endswith("weight") else 0.2))
    return encoder.eval()


class Dense:
    """Layer 4 computed on whole maps, from the rules alone."""

    def __init__(self, encoder):
        self.blocks, self.config = encoder.network, encoder.config
        self.training = encoder.training

    def __call__(self, x, locations, bounds):
        spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        pairs = [self.fill(x[start:end], locations[start:end]) for start, end in spans]
        if self.config.edges == "batch":
            places = torch.cat([locations[start:end] - locations[start:end].amin(0) for start, end in spans])
            width, height = (self.authors_side(side) for side in places.amax(0).tolist())
            pairs = [(values[:, :height, :width], active[:height, :width]) for values, active in pairs]
        maps, active = ([pair[part] for pair in pairs] for part in (0, 1))
        ones = torch.ones(1, 1, 3, 3).to(x)
        halved = [F.conv2d(mask[None, None].to(x), ones, stride=2)[0, 0] > 0 for mask in active]
        for number, block in enumerate(self.blocks):
            strides = (1, 2) if self.config.network == "resnet50" else (2, 1)
            strides = strides if number == 0 else (1, 1)
            kept = active if number == 0 else halved
            inner = maps
            if self.config.network == "resnet50":
                inner = self.relu(self.norm(self.conv(inner, block.conv1, 1), kept, block.bn1), kept)
                inner = self.relu(self.norm(self.conv(inner, block.conv2, strides[1]), halved, block.bn2), halved)
                inner = self.norm(self.conv(inner, block.conv3, 1), halved, block.bn3)
            else:
                inner = self.relu(self.norm(self.conv(inner, block.conv1, strides[0]), halved, block.bn1), halved)
                inner = self.norm(self.conv(inner, block.conv2, 1), halved, block.bn2)
            if number == 0:
                project, norm = block.downsample
                if self.config.shortcut == "average":
                    shortcut = [F.avg_pool2d(values[None], 3, 2)[0] for values in maps]
                else:
                    shortcut = [values[:, 1:-1:2, 1:-1:2] for values in maps]
                maps = self.norm(self.conv(shortcut, project, 1), halved, norm)
            maps = self.relu([a + b for a, b in zip(inner, maps, strict=True)], halved)
        return torch.stack([values[:, mask].mean(1) for values, mask in zip(maps, halved, strict=True)])

    @staticmethod
    def fill(x, locations, side=15):
        locations = locations - locations.amin(0)
        values, active = x.new_zeros(x.shape[1], side, side), torch.zeros(side, side, dtype=torch.bool)
        for column, row in set(map(tuple, locations.tolist())):
            here = (locations == torch.tensor([column, row])).all(1)
            values[:, row, column] = x[here].mean(0)
            active[row, column] = True
        return values, active

    @staticmethod
    def authors_side(most):
        side = max(5, most + 1)
        side += side % 2 == 0
        return side + 2 if side // 2 % 2 == 0 else side

    @staticmethod
    def conv(maps, kernel, stride):
        size = kernel.weight.shape[-1]
        padding = size // 2 if stride == 1 else 0
        return [F.conv2d(values[None], kernel.weight, stride=stride, padding=padding)[0] for values in maps]

    def norm(self, maps, active, norm):
        rows = torch.cat([values[:, mask] for values, mask in zip(maps, active, strict=True)], 1).T
        statistics = norm.running_mean.clone(), norm.running_var.clone()
        rows = F.batch_norm(rows, *statistics, norm.weight, norm.bias, self.training, 0.1, norm.eps)
        made = []
        for part, mask in zip(rows.split([int(mask.sum()) for mask in active]), active, strict=True):
            values = part.new_zeros(part.shape[1], *mask.shape)
            values[:, mask] = part.T
            made.append(values)
        return made

    @staticmethod
    def relu(maps, active):
        return [F.relu(values) * mask for values, mask in zip(maps, active, strict=True)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SPARSE)
def test_equals_a_dense_network(kind, training):
    encoder = lively(KINDS[kind]).double().train(training)
    x, locations, bounds = make_bags()
    x = x.double().requires_grad_()
    expected = Dense(encoder)(x, locations, bounds)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).double()
    wanted = [x, encoder.network[0].conv2.weight, encoder.network[0].downsample[0].weight]
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), wanted)
    actual = encoder(x, locations, bounds)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad((actual * cotangent).sum(), wanted), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_slides_of_a_batch_and_alone(kind):
    encoder = lively(KINDS[kind])
    x, locations, bounds = make_bags()
    with torch.inference_mode():
        together = encoder(x, locations, bounds)
        assert together.shape == (4, encoder.dim)
        moved = encoder(x, (locations + torch.tensor([1000, -77])).int(), bounds.int())
        torch.testing.assert_close(moved, together)
        alone = [
            encoder(x[a:b], locations[a:b], torch.tensor([0, b - a]))[0]
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    same = [torch.allclose(one, row, atol=1e-4) for one, row in zip(alone, together, strict=True)]
    assert all(same) == (kind != "batch")  # there, a smaller slide's edge depends on the others


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tiles_does_not_matter(kind):
    encoder = lively(KINDS[kind])
    x, locations, _ = make_bags((30,))
    bounds, order = torch.tensor([0, 30]), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        encoder(x[order], locations[order], bounds), encoder(x, locations, bounds), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_places_matter_but_for_the_mlp(kind):
    encoder = lively(KINDS[kind])
    x, locations, bounds = make_bags((20, 5))
    same = torch.allclose(encoder(x, locations.flip(1), bounds), encoder(x, locations, bounds), atol=1e-4)
    assert same == (kind == "mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_near_float32(kind):
    encoder = lively(KINDS[kind]).train()
    x, locations, bounds = make_bags()
    exact = encoder(x, locations, bounds)
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(x.half(), locations, bounds)
    assert (low - exact).norm() < 0.03 * exact.norm()
    low.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_sparse_and_mlp_give_float32_under_autocast():
    x, locations, bounds = make_bags()
    for kind in ("average", "mlp"):
        with torch.autocast("cpu", torch.bfloat16):
            assert lively(KINDS[kind])(x, locations, bounds).dtype == torch.float32


@pytest.mark.parametrize("kind", ["average", "mlp"])
def test_running_statistics_are_of_active_cells(kind):
    encoder = build_giga(KINDS[kind], 0).train()
    x, locations, bounds = make_bags((5, 5))
    norm = encoder.network[0].bn1 if kind == "average" else encoder.network.blocks[0].layers[3]
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(x, locations, bounds)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen[0].var(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("network", "dim"), [("resnet18", 256), ("resnet34", 256), ("resnet50", 1024)])
def test_from_resnet(network, dim, transposed):
    resnet = timm.create_model(network, num_classes=3)
    state = resnet.state_dict()
    config = GigaConfig(input_dim=dim, network=network)
    encoder = from_resnet(state, config, source="timm", transposed=transposed)
    assert encoder.training
    assert encoder.dim == resnet.num_features
    own = encoder.network.state_dict()
    assert own.keys() == resnet.layer4.state_dict().keys()
    for key, value in resnet.layer4.state_dict().items():
        torch.testing.assert_close(own[key], value.mT if transposed and value.ndim == 4 else value)
        if value.ndim == 4:
            assert own[key].is_contiguous(memory_format=torch.channels_last)
        assert not value.numel() or own[key].data_ptr() != value.data_ptr()
    alone = from_resnet(resnet.layer4.state_dict(), config, source="timm", transposed=transposed)
    assert all(torch.equal(own[key], value) for key, value in alone.network.state_dict().items())


def test_transposed_weights_see_transposed_maps():
    state = lively(GigaConfig(**SMALL)).network.state_dict()
    upright, transposed = (
        from_resnet(state, GigaConfig(**SMALL), source="own", transposed=flag).eval() for flag in (False, True)
    )
    x, locations, bounds = make_bags()
    torch.testing.assert_close(
        upright(x, locations, bounds), transposed(x, locations.flip(1), bounds), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(upright(x, locations, bounds), transposed(x, locations, bounds), atol=1e-3)


def test_from_resnet_of_another_network():
    state = timm.create_model("resnet18").state_dict()
    with pytest.raises(RunError, match=r"file\.pth: the weights do not fit the model; 10 missing: 2\.bn1\.bias"):
        from_resnet(state, GigaConfig(network="resnet34"), source="file.pth")
    with pytest.raises(RunError, match=r"0\.conv1\.weight \(\[512, 256, 3, 3\] in the file, \[512, 6, 3, 3\]"):
        from_resnet(state, GigaConfig(input_dim=6), source="file.pth")
    with pytest.raises(RunError, match="fit the pooling sparse_conv, not mlp"):
        from_resnet(state, GigaConfig(pooling="mlp"), source="file.pth")


def authors(encoder, prefix="backbone.net.mil_model.sparse_pooling.0."):
    """The authors' keys and layout: [9, 1, in, out], x before y."""
    names = {"bn1": "norm1", "bn2": "norm2", "downsample.0": "convd", "downsample.1": "normd"}
    state = {}
    for key, value in encoder.network.state_dict().items():
        block, _, rest = key.partition(".")
        name, _, part = rest.rpartition(".")
        if part == "num_batches_tracked":
            continue
        if value.ndim == 4:
            outs, ins, rows, columns = value.shape
            flat = torch.empty(rows * columns, 1, ins, outs)
            for x in range(columns):
                for y in range(rows):
                    flat[x * rows + y, 0] = value[:, :, y, x].T
            value = flat
        state[f"{prefix}{block}.{names.get(name, name)}.{part}"] = value
    return state


@pytest.fixture(scope="module")
def published():
    return lively(GigaConfig())


@pytest.mark.parametrize(
    "prefix", ["backbone.net.mil_model.sparse_pooling.0.", "module.backbone.mil.sparse_pooling.0.", ""]
)
def test_load_gigassl(published, prefix):
    state = authors(published, prefix)
    state["projector.layer1.0.weight"] = torch.zeros(512, 512)
    loaded = load_gigassl({"epoch": 3, "state_dict": state, "config": argparse.Namespace(lr=1)})
    assert not loaded.training
    own = loaded.network.state_dict()
    for key, value in published.network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], value), key
    x, locations, bounds = torch.randn(12, 256), torch.arange(24).view(12, 2) % 5, torch.tensor([0, 4, 12])
    torch.testing.assert_close(loaded(x, locations, bounds), published(x, locations, bounds))
    assert load_gigassl({"state_dict": state}, edges="batch").config == GigaConfig(edges="batch")


def test_load_gigassl_from_a_file_with_aliases(published, tmp_path):
    state = authors(published) | authors(published, "encoder.0.net.mil_model.sparse_pooling.0.")
    torch.save({"epoch": 1, "state_dict": state, "config": argparse.Namespace(lr=1)}, tmp_path / "giga.pth")
    loaded = load_gigassl(tmp_path / "giga.pth")
    assert torch.equal(loaded.network[1].conv2.weight, published.network[1].conv2.weight)


def test_load_gigassl_of_something_else(published):
    state = authors(published)
    doubled = state | {"encoder.0.sparse_pooling.0.0.norm1.bias": torch.zeros(512)}
    with pytest.raises(RunError, match=r"several slide networks with 0\.bn1\.bias"):
        load_gigassl({"state_dict": doubled})
    del state["backbone.net.mil_model.sparse_pooling.0.1.conv2.weight"]
    with pytest.raises(RunError, match=r"1 missing: 1\.conv2\.weight"):
        load_gigassl({"state_dict": state})
    with pytest.raises(RunError, match="holds no weights of Giga-SSL's slide network"):
        load_gigassl({"state_dict": {"projector.layer1.0.weight": torch.zeros(2, 2)}})
    with pytest.raises(RunError, match="holds no weights of Giga-SSL's slide network"):
        load_gigassl(timm.create_model("resnet18").state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 5)}, r"need float embeddings \[T, 6\], got torch.float32 \[6, 5\]"),
        ({"x": torch.zeros(6, 6, dtype=torch.int64)}, r"need float embeddings \[T, 6\], got torch.int64"),
        ({"locations": torch.zeros(6, 2)}, r"need integer locations \[6, 2\], got torch.float32"),
        ({"locations": torch.zeros(5, 2, dtype=torch.int64)}, r"need integer locations \[6, 2\], got .* \[5, 2\]"),
        ({"bounds": torch.tensor([0, 2, 2, 6])}, "slide 1 of the batch has no tiles"),
        ({"bounds": torch.tensor([0, 5])}, r"need integer bounds \[B \+ 1\] from 0 to 6, got torch.int64 \[0, 5\]"),
        ({"bounds": torch.tensor([0.0, 6.0])}, r"need integer bounds .* got torch.float32"),
        ({"bounds": torch.tensor(6)}, "need integer bounds"),
        ({"locations": torch.arange(12).view(6, 2) * 2**20}, "slide 0 of the batch: its locations must span"),
    ],
)
def test_bad_input(change, message):
    given = {"x": torch.zeros(6, 6), "locations": torch.zeros(6, 2, dtype=torch.int64), "bounds": torch.tensor([0, 6])}
    with pytest.raises(ValueError, match=message):
        build_giga(KINDS["average"], 0)(**given | change)


def test_one_active_cell_has_no_variance():
    encoder, one = build_giga(KINDS["average"], 0), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="more than 1 value"):
        encoder(torch.zeros(1, 6), torch.zeros(1, 2, dtype=torch.int64), one)
    assert encoder.eval()(torch.zeros(1, 6), torch.zeros(1, 2, dtype=torch.int64), one).isfinite().all()


def test_bad_options():
    with pytest.raises(ValueError, match="at least 1"):
        GigaConfig(depth=0)
    with pytest.raises(ValueError, match="multiple of 4 and of heads, not 18 of 3"):
        GigaConfig(pooling="transformer", dim=18, heads=3)
    with pytest.raises(ValueError, match="dropout must lie within"):
        GigaConfig(dropout=1.0)


def test_a_weight_of_another_memory_format_gives_the_same():
    encoder = lively(KINDS["average"])
    x, locations, bounds = make_bags()
    expected = encoder(x, locations, bounds)
    expected.square().sum().backward()
    grad = encoder.network[1].conv1.weight.grad
    assert grad.is_contiguous(memory_format=torch.channels_last)
    other = lively(KINDS["average"]).to(memory_format=torch.contiguous_format)
    assert other.network[1].conv1.weight.is_contiguous()
    actual = other(x, locations, bounds)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(other.network[1].conv1.weight.grad, grad)


def test_seeds():
    first, second, other = (build_giga(KINDS["transformer"], seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["network.project.weight"], other["network.project.weight"])
    assert not torch.equal(first["network.blocks.0.linear1.weight"], first["network.blocks.1.linear1.weight"])
    before = torch.random.get_rng_state()
    build_giga(KINDS["average"], 0)
    assert torch.equal(torch.random.get_rng_state(), before)

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from gigatome.core.errors import ConfigError
from gigatome.encoders.hipt import VIT4096
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.mil import regions
from gigatome.mil.model import BagBatch
from gigatome.mil.regions import (
    HiptGpFc,
    HiptLgpFc,
    HiptNoneFc,
    HiptNoneOptions,
    HiptOptions,
    RegionTransformer,
    RegionTransformerOptions,
)

DIM, OUTPUTS, TILES = 12, 3, 6
SMALL = HiptOptions(rows=2)
MODELS = {
    "hipt_lgp_fc": lambda: HiptLgpFc(SMALL, DIM, OUTPUTS),
    "hipt_gp_fc": lambda: HiptGpFc(HiptOptions(), DIM, OUTPUTS),
    "hipt_none_fc": lambda: HiptNoneFc(HiptNoneOptions(hidden=8), DIM, OUTPUTS),
    "region_transformer": lambda: RegionTransformer(RegionTransformerOptions(hidden=24), DIM, OUTPUTS),
}


def make_bags(sizes, *, tiles, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(sizes), TILES, DIM) if tiles else (sum(sizes), DIM)
    coords = torch.randint(0, 50, (sum(sizes), 2), generator=generator) * 4096
    return BagBatch(torch.randn(shape, generator=generator), torch.tensor([0, *sizes]).cumsum(0), coords=coords)


def single(bags, b):
    start, stop = bags.bounds[b : b + 2].tolist()
    return BagBatch(bags.x[start:stop], torch.tensor([0, stop - start]), coords=bags.coords[start:stop])


def of_tiles(model):
    return isinstance(model, HiptLgpFc | HiptNoneFc)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_bags_side_by_side_are_bags_alone(model):
    sizes = [5, 1, 17, 2]
    bags = make_bags(sizes, tiles=of_tiles(model))
    output = model(bags)
    alone = [model(single(bags, b)) for b in range(len(sizes))]
    assert output.logits.shape == (4, OUTPUTS)
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention, torch.cat([one.attention for one in alone]), atol=1e-5, rtol=0)
    assert output.attention.shape == (25, 1)
    for part in output.attention.split(sizes):
        torch.testing.assert_close(part.sum(0), torch.ones(1))


def test_order_of_regions_does_not_matter(model):
    bags = make_bags([9], tiles=of_tiles(model))
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = model(BagBatch(bags.x[rows], bags.bounds, coords=bags.coords[rows]))
    torch.testing.assert_close(shuffled.logits, model(bags).logits)
    torch.testing.assert_close(shuffled.attention, model(bags).attention[rows])


def test_every_parameter_learns_and_dropout_acts_in_training_only(model):
    bags = make_bags([9, 4], tiles=of_tiles(model))
    assert torch.equal(model(bags).logits, model(bags).logits)
    model.train()
    output = model(bags)
    assert not torch.equal(output.logits, model(bags).logits)
    output.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("attention_c.bias"):  # a softmax does not see it
            assert parameter.grad.abs().sum() > 0, name


def test_bfloat16(model):
    bags = make_bags([9, 4], tiles=of_tiles(model))
    expected = model(bags)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(bags)
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.05, rtol=0.05)
    torch.testing.assert_close(output.attention.sum(), torch.tensor(2.0))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(bags).logits.sum().backward()


def test_transformer_over_regions_is_pytorchs():
    torch.manual_seed(0)
    model = MODELS["hipt_gp_fc"]().eval()
    reference = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, 3, DIM, 0.25), 2, enable_nested_tensor=False
    ).eval()
    reference.load_state_dict(model.global_transformer.state_dict())
    bags = make_bags([7], tiles=False)
    x = reference(model.global_phi(bags.x)[:, None])[:, 0]
    weights = model.global_attn_pool(x).softmax(0)
    expected = model.classifier(model.global_rho(weights.T @ x))
    torch.testing.assert_close(model(bags).logits, expected)
    torch.testing.assert_close(model(bags).attention, weights)


def test_region_transformer_is_pytorchs_with_a_class_token_and_positions():
    torch.manual_seed(0)
    model = MODELS["region_transformer"]().eval()
    layer = nn.TransformerEncoderLayer(24, 3, 96, norm_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    reference.load_state_dict(model.transformer.state_dict())
    bags = make_bags([7], tiles=False)
    steps = (bags.coords - bags.coords.amin(0)) / 4096
    frequencies = torch.tensor([10_000 ** (-i / 6) for i in range(6)])
    angles = torch.cat([steps[:, :1] * frequencies, steps[:, 1:] * frequencies], 1)
    x = torch.cat([model.cls_token, model.proj(bags.x) + torch.cat([angles.sin(), angles.cos()], 1)])
    torch.testing.assert_close(
        model(bags).logits, model.classifier(model.norm(reference(x[:, None])[:1, 0])), atol=1e-5, rtol=1e-5
    )
    entered = reference.layers[0](x[:, None])
    normed = reference.layers[1].norm1(entered)
    _, weights = reference.layers[1].self_attn(normed, normed, normed, average_attn_weights=False)
    weights = weights[0, :, 0, 1:]
    torch.testing.assert_close(model(bags).attention[:, 0], (weights / weights.sum(1, keepdim=True)).mean(0))


def test_places_matter_but_not_where_on_the_glass_the_tissue_is():
    torch.manual_seed(0)
    model = MODELS["region_transformer"]().eval()
    bags = make_bags([7, 5], tiles=False)
    moved = BagBatch(bags.x, bags.bounds, coords=bags.coords + torch.tensor([40960, 8192]))
    torch.testing.assert_close(model(moved).logits, model(bags).logits, atol=1e-5, rtol=0)
    apart = BagBatch(bags.x, bags.bounds, coords=bags.coords * 3)
    assert not torch.allclose(model(apart).logits, model(bags).logits, atol=1e-3)


def test_long_bags_attend_in_parts_with_dropout(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 4, requires_grad=True) for _ in range(3))
    monkeypatch.setattr(regions, "_QUERIES", 16)
    expected = F.scaled_dot_product_attention(q, k, v)
    parts = regions._attention(q, k, v, 1e-9)  # drops nothing but takes the other way
    torch.testing.assert_close(parts, expected)
    grads = torch.autograd.grad(parts.square().sum(), (q, k, v))
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, other)


def test_frozen_region_encoder_starts_from_weights_and_stays(tmp_path):
    torch.manual_seed(0)
    weights = RegionVit(VIT4096).state_dict()
    path = tmp_path / "vit4k_xs_dino.pth"
    torch.save({"teacher": {f"module.backbone.{key}": value for key, value in weights.items()}}, path)
    model = HiptLgpFc(HiptOptions.pretrained(str(path)), 384, 2).train()
    x = torch.randn(3, 256, 384)
    model(BagBatch(x, torch.tensor([0, 3]))).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("local_vit."), name
    assert all(torch.equal(value, weights[key]) for key, value in model.local_vit.state_dict().items())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 595_011  # as counted in the authors' code, of two classes


@pytest.mark.parametrize(
    "model",
    [
        lambda: HiptLgpFc(HiptOptions(rows=2), DIM, OUTPUTS),
        lambda: HiptNoneFc(HiptNoneOptions(hidden=8), DIM, OUTPUTS),
    ],
)
def test_empty_tiles_are_skipped_unless_as_the_authors_have_it(model):
    torch.manual_seed(0)
    model = model().eval()
    bags = make_bags([3], tiles=True)
    x = bags.x.clone()
    x[0, 4:] = 0
    x[2] = 0  # nothing there at all
    logits = model(BagBatch(x, bags.bounds)).logits
    assert logits.isfinite().all()
    if isinstance(model, HiptNoneFc):
        shorter = model.local_attn_pool(model.local_phi(x[0, :4])).softmax(0).T @ model.local_phi(x[0, :4])
        pooled = []
        model.global_phi.register_forward_hook(lambda _module, inputs, _output: pooled.append(inputs[0]))
        model(BagBatch(x, bags.bounds))
        torch.testing.assert_close(pooled[0][:1], shorter)
    model.options = replace(model.options, skip_empty=type(model.options).hipt().skip_empty)
    assert not torch.allclose(model(BagBatch(x, bags.bounds)).logits, logits, atol=1e-4)


def test_batches_of_regions_change_nothing(monkeypatch):
    torch.manual_seed(0)
    model = MODELS["hipt_lgp_fc"]().eval()
    bags = make_bags([9], tiles=True)
    whole = model(bags).logits
    monkeypatch.setattr(regions, "_REGIONS", 2)
    torch.testing.assert_close(model(bags).logits, whole)


@pytest.mark.parametrize("name", ["hipt_lgp_fc", "hipt_none_fc"])
def test_embeddings_of_tiles_without_regions_are_refused(name):
    with pytest.raises(ConfigError, match=r"regions \[T, tiles, D\]"):
        MODELS[name]()(make_bags([4], tiles=False))


def test_grids_are_square_unless_their_rows_are_given(tmp_path):
    config = RegionVitConfig(input_dim=DIM, dim=12, depth=1, heads=3, grid=2)
    model = HiptLgpFc(HiptOptions(encoder=config), DIM, OUTPUTS).eval()
    x = torch.randn(2, 4, DIM)
    bags = BagBatch(x, torch.tensor([0, 2]))
    expected = model(bags).logits
    model.options = HiptOptions(rows=2)
    torch.testing.assert_close(model(bags).logits, expected)
    model.options = HiptOptions()
    with pytest.raises(ConfigError, match=r"as many rows of tiles as columns, not \[2, 6, 12\]"):
        model(BagBatch(torch.randn(2, 6, DIM), bags.bounds))
    save_region_encoder(model.local_vit, tmp_path / "encoder", RegionCard("made", config))
    started = HiptLgpFc(HiptOptions(weights=str(tmp_path / "encoder")), DIM, OUTPUTS)
    torch.testing.assert_close(started.local_vit.state_dict(), model.local_vit.state_dict())
    assert started.local_vit.training
    with pytest.raises(ConfigError, match=r"input_dim=12.* and .*input_dim=7.* is wanted"):
        HiptLgpFc(HiptOptions(weights=str(tmp_path / "encoder")), 7, OUTPUTS)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="coordinates"):
        MODELS["region_transformer"]()(BagBatch(torch.zeros(2, DIM), torch.tensor([0, 2])))
    with pytest.raises(ConfigError, match="100 do not divide into 3 heads"):
        HiptGpFc(HiptOptions(), 100, 2)
    with pytest.raises(ValueError, match="heads"):
        RegionTransformerOptions(hidden=20)

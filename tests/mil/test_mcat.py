import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.mil.abmil import Abmil, AbmilOptions
from gigatome.mil.graph import PatchGcn, PatchGcnOptions
from gigatome.mil.mcat import LateFusion, LateFusionOptions, Mcat, McatOptions
from gigatome.mil.model import BagBatch

DIM, WIDTH, OUTPUTS, GENES = 10, 64, 4, (3, 7, 5)
MCAT = McatOptions(omic_sizes=GENES, hidden=WIDTH, heads=2)


def late(fusion):
    bag_model = Abmil(AbmilOptions(hidden=8, attention=6), DIM, WIDTH)
    return LateFusion(LateFusionOptions(omic_sizes=GENES, hidden=WIDTH, fusion=fusion), bag_model, OUTPUTS)


MODELS = {
    "mcat": lambda: Mcat(MCAT, DIM, OUTPUTS),
    "mcat, bilinear": lambda: Mcat(McatOptions(**{**vars(MCAT), "fusion": "bilinear"}), DIM, OUTPUTS),
    "late": lambda: late("concat"),
    "late, bilinear": lambda: late("bilinear"),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def make_bags(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), DIM, generator=generator)
    omics = tuple(torch.randn(len(sizes), size, generator=generator) for size in GENES)
    return BagBatch(x, torch.tensor([0, *sizes]).cumsum(0), omics=omics)


def single(bags, b):
    start, stop = bags.bounds[b : b + 2].tolist()
    omics = tuple(group[b : b + 1] for group in bags.omics)
    return BagBatch(bags.x[start:stop], torch.tensor([0, stop - start]), omics=omics)


def test_bags_side_by_side_are_bags_alone(model):
    sizes = [5, 1, 17, 2]
    bags = make_bags(sizes)
    output = model(bags)
    alone = [model(single(bags, b)) for b in range(len(sizes))]
    assert output.logits.shape == (4, OUTPUTS)
    torch.testing.assert_close(output.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention, torch.cat([one.attention for one in alone]), atol=1e-5, rtol=0)
    for part in output.attention.split(sizes):
        torch.testing.assert_close(part.sum(0), torch.ones(part.shape[1]))


def test_tiles_and_genes_both_matter(model):
    bags = make_bags([6, 6])
    logits = model(bags).logits
    others = make_bags([6, 6], seed=1)
    assert (model(BagBatch(others.x, bags.bounds, omics=bags.omics)).logits - logits).abs().max() > 1e-4
    for group in range(3):
        omics = tuple(b if i == group else a for i, (a, b) in enumerate(zip(bags.omics, others.omics, strict=True)))
        assert (model(BagBatch(bags.x, bags.bounds, omics=omics)).logits - logits).abs().max() > 1e-4


def test_every_parameter_learns_and_dropout_acts_in_training_only(model):
    bags = make_bags([20, 30, 7, 9])
    assert torch.equal(model(bags).logits, model(bags).logits)
    model.train()
    output = model(bags)
    assert not torch.equal(output.logits, model(bags).logits)
    output.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith(("attention_c.bias", "attention.2.bias")):  # a softmax does not see it
            assert parameter.grad.abs().sum() > 0, name


def test_bfloat16(model):
    bags = make_bags([20, 30])
    expected = model(bags)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(bags)
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.05, rtol=0.05)
    torch.testing.assert_close(output.attention.sum(0), torch.full((output.attention.shape[1],), 2.0))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(bags).logits.sum().backward()


def test_mcat_is_its_formula():
    """One bag, with keys and values of every instance, through PyTorch's modules."""
    torch.manual_seed(0)
    model = MODELS["mcat"]().eval()
    torch.nn.init.normal_(model.coattn.in_proj_bias)  # zeros at first, which would hide that they matter
    torch.nn.init.normal_(model.coattn.out_proj.bias)
    bags = make_bags([9])
    h = F.relu(F.linear(bags.x, model.wsi_net[0].weight, model.wsi_net[0].bias))[:, None]
    omics = []
    for net, group in zip(model.sig_networks, bags.omics, strict=True):
        inner = F.elu(F.linear(group, net[0][0].weight, net[0][0].bias))
        omics.append(F.elu(F.linear(inner, net[1][0].weight, net[1][0].bias)))
    omics = torch.stack(omics)  # [groups, 1, hidden], as nn.MultiheadAttention wants it
    path, attention = model.coattn(omics, h, h)
    vectors = []
    for x, transformer, head, rho in (
        (path, model.path_transformer, model.path_attention_head, model.path_rho),
        (omics, model.omic_transformer, model.omic_attention_head, model.omic_rho),
    ):
        tokens = transformer(x.transpose(0, 1))[0]
        vectors.append(rho(head(tokens).softmax(0).T @ tokens))
    expected = model.classifier(model.mm(torch.cat(vectors, 1)))
    output = model(bags)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.attention, attention[0].T)


def test_outer_product_holds_each_side_and_the_products():
    torch.manual_seed(0)
    fusion = MODELS["late, bilinear"]().eval().mm
    entered = []
    fusion.dropout.register_forward_hook(lambda _module, inputs, _output: entered.append(inputs[0]))
    fusion(torch.randn(5, 2 * WIDTH))
    product = entered[0].view(5, 9, 9)
    torch.testing.assert_close(product[:, 8, 8], torch.ones(5))
    torch.testing.assert_close(product[:, :8, :8], product[:, :8, 8:] * product[:, 8:, :8])
    assert (product[:, :8, :8] > 0).any()


def test_keys_and_shapes_are_the_authors():
    model = Mcat(McatOptions.luad(), 1024, 4)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layer = {
        "self_attn.in_proj_weight": (768, 256),
        "self_attn.in_proj_bias": (768,),
        "self_attn.out_proj.weight": (256, 256),
        "self_attn.out_proj.bias": (256,),
        "linear1.weight": (512, 256),
        "linear1.bias": (512,),
        "linear2.weight": (256, 512),
        "linear2.bias": (256,),
        "norm1.weight": (256,),
        "norm1.bias": (256,),
        "norm2.weight": (256,),
        "norm2.bias": (256,),
    }
    expected = {"wsi_net.0.weight": (256, 1024), "wsi_net.0.bias": (256,)}
    for group, size in enumerate((89, 334, 534, 471, 1510, 482)):
        expected |= {
            f"sig_networks.{group}.0.0.weight": (256, size),
            f"sig_networks.{group}.0.0.bias": (256,),
            f"sig_networks.{group}.1.0.weight": (256, 256),
            f"sig_networks.{group}.1.0.bias": (256,),
        }
    expected |= {
        "coattn.in_proj_weight": (768, 256),
        "coattn.in_proj_bias": (768,),
        "coattn.out_proj.weight": (256, 256),
        "coattn.out_proj.bias": (256,),
    }
    for part in ("path", "omic"):
        expected |= {f"{part}_transformer.layers.{i}.{key}": shape for i in range(2) for key, shape in layer.items()}
        for branch in "ab":
            expected |= {
                f"{part}_attention_head.attention_{branch}.0.weight": (256, 256),
                f"{part}_attention_head.attention_{branch}.0.bias": (256,),
            }
        expected |= {
            f"{part}_attention_head.attention_c.weight": (1, 256),
            f"{part}_attention_head.attention_c.bias": (1,),
            f"{part}_rho.0.weight": (256, 256),
            f"{part}_rho.0.bias": (256,),
        }
    expected |= {
        "mm.0.weight": (256, 512),
        "mm.0.bias": (256,),
        "mm.2.weight": (256, 256),
        "mm.2.bias": (256,),
        "classifier.weight": (4, 256),
        "classifier.bias": (4,),
    }
    assert shapes == expected


def test_keys_of_the_bilinear_fusion_are_the_authors():
    options = McatOptions(omic_sizes=(5,), fusion="bilinear")
    shapes = {key: tuple(value.shape) for key, value in Mcat(options, 20, 4).mm.state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if key.endswith("weight")} == {
        "linear_h1.0.weight": (32, 256),
        "linear_z1.0.weight": (32, 512),
        "linear_o1.0.weight": (32, 32),
        "linear_h2.0.weight": (32, 256),
        "linear_z2.0.weight": (32, 512),
        "linear_o2.0.weight": (32, 32),
        "encoder1.0.weight": (256, 33 * 33),
        "encoder2.0.weight": (256, 256),
    }


def test_late_fusion_needs_what_its_bag_model_needs():
    bag_model = PatchGcn(PatchGcnOptions(hidden=4), DIM, 16)
    model = LateFusion(LateFusionOptions(omic_sizes=GENES, hidden=16), bag_model, OUTPUTS)
    assert model.needs == {"edges", "omics"}
    assert bag_model.needs == PatchGcn.needs == {"edges"}
    assert LateFusion.needs == frozenset()


def test_late_fusion_passes_on_the_attention():
    torch.manual_seed(0)
    model = MODELS["late"]().eval()
    bags = make_bags([6, 3])
    torch.testing.assert_close(model(bags).attention, model.bag_model(bags).attention)


@pytest.mark.parametrize("sizes", [(), (3, 7), (3, 7, 6)])
def test_other_groups_of_genes_are_refused(model, sizes):
    bags = make_bags([4])
    bags = BagBatch(bags.x, bags.bounds, omics=tuple(torch.zeros(1, size) for size in sizes))
    with pytest.raises(EvaluationError, match=r"\(3, 7, 5\)"):
        model(bags)


@pytest.mark.parametrize("sizes", [(), (3, 0)])
def test_a_model_without_genes_is_refused(sizes):
    with pytest.raises(ConfigError, match="omic_sizes"):
        Mcat(McatOptions(omic_sizes=sizes), DIM, OUTPUTS)


def test_a_large_bag_needs_no_tensors_of_instances_by_groups_by_width():
    model = MODELS["mcat"]().train()
    output = model(make_bags([100_000]))
    output.logits.sum().backward()
    assert output.attention.shape == (100_000, 3)

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gigatome.encoders.heads import DinoHead


def make(seed=0, **options) -> DinoHead:
    return DinoHead(12, 20, torch.Generator().manual_seed(seed), hidden_dim=16, bottleneck_dim=8, **options)


def test_keys_and_shapes_are_the_authors():
    shapes = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (16, 12),
        "mlp.0.bias": (16,),
        "mlp.2.weight": (16, 16),
        "mlp.2.bias": (16,),
        "mlp.4.weight": (8, 16),
        "mlp.4.bias": (8,),
        "last_layer.weight_g": (20, 1),
        "last_layer.weight_v": (20, 8),
    }


def test_the_default_is_the_papers_size():
    head = DinoHead(384, 100, torch.Generator())
    assert [layer.out_features for layer in head.mlp if isinstance(layer, nn.Linear)] == [2048, 2048, 256]


def test_output_is_that_of_a_weight_normed_layer():
    head = make()
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2)
    reference = weight_norm(nn.Linear(8, 20, bias=False))
    reference.load_state_dict(head.last_layer.state_dict())  # PyTorch maps weight_g and weight_v itself
    x = torch.randn(5, 12)
    torch.testing.assert_close(head(x), reference(F.normalize(head.mlp(x), dim=-1)))


def test_batch_norm_stands_before_each_gelu_and_needs_no_running_statistics():
    head = make(batch_norm=True)
    kinds = [type(module).__name__ for module in head.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    x = torch.randn(64, 12) * 0.01 + 5  # embeddings that hardly differ
    assert torch.equal(head.train()(x), head.eval()(x))
    spread, without = (h(x).std(0).mean() for h in (head, make()))
    assert spread > 10 * without


def test_prototypes_of_unit_length_give_cosines():
    assert make()(torch.randn(50, 12) * 100).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_lengths_are_learnt_only_if_asked_for(norm_last_layer):
    head = make(norm_last_layer=norm_last_layer)
    head(torch.randn(3, 12)).sum().backward()
    assert (head.last_layer.weight_g.grad is None) == norm_last_layer
    assert head.last_layer.weight_v.grad is not None


def test_weights_depend_on_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if name.endswith(("weight", "weight_v")):
            assert not torch.equal(value, other.state_dict()[name])

import pytest
import torch
from torch import nn

from gigatome.selfsup.batch_norm import SharedBatchNorm, share_statistics
from gigatome.training.running_statistics import RunningStatistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6))
    model(torch.randn(4, 3, 5, 5))  # makes the lazy layer, and gives running statistics
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.mark.parametrize(("sharing", "size"), [("ranks", 2), ("group", 12), ("group", 100)])
def test_over_the_whole_batch_it_is_batch_norm(x, sharing, size):
    ours, theirs = network(), network()
    assert share_statistics(ours, sharing, size) == 2
    assert [type(ours[place]) for place in (1, 4)] == [SharedBatchNorm] * 2
    torch.testing.assert_close(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_groups_do_not_see_each_other(x):
    ours, theirs = nn.Sequential(network()[1]), network()[1]
    share_statistics(ours, "group", 4)
    x = x[:, :1].expand(-1, 4, -1, -1)
    y = ours(x)
    for group in range(3):
        torch.testing.assert_close(y[group::3], theirs(x[group::3]))


@pytest.mark.parametrize(("batch", "size", "groups"), [(12, 4, 3), (12, 5, 2), (7, 3, 1), (3, 4, 1), (10, 2, 5)])
def test_groups_divide_the_batch(batch, size, groups):
    assert SharedBatchNorm(nn.BatchNorm1d(2), "group", size)._groups(batch) == groups


def test_gradients_are_those_of_batch_norm(x):
    ours, theirs = network(), network()
    share_statistics(ours, "group", 12)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_running_statistics_move_by_the_mean_of_the_groups(x):
    model = network()
    share_statistics(model, "group", 4)
    before, number = model[1].running_mean.clone(), int(model[1].num_batches_tracked)
    with torch.no_grad():
        means = [model[0](x[group::3]).mean((0, 2, 3)) for group in range(3)]
        model(x)
    torch.testing.assert_close(model[1].running_mean, before * 0.9 + sum(means) / 3 * 0.1)
    assert int(model[1].num_batches_tracked) == number + 1


def test_the_loop_knows_it_for_a_batch_norm():
    """So that a step which is left out leaves no trace in its running statistics."""
    model = network()
    share_statistics(model, "group")
    assert len(RunningStatistics(model)._buffers) == 6


def test_a_network_without_norms_stays_as_it_is():
    assert share_statistics(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "group") == 0

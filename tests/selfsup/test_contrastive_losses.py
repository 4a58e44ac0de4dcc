import pytest
import torch
from torch.nn.functional import normalize

from gigatome.selfsup.contrastive import info_nce, info_nce_in_batch, ntxent, spread


def unit(count: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def surprise(similarities: torch.Tensor, right: int, temperature: float) -> torch.Tensor:
    """−log of the right one's share, as the equations have it."""
    shares = (similarities / temperature).exp()
    return -(shares[right] / shares.sum()).log()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_ntxent_is_its_equation(temperature):
    first, second = unit(3, seed=1) * 2, unit(3, seed=2) * 5
    vectors = normalize(torch.cat([first, second]))
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        losses.append(surprise(vectors[others] @ vectors[i], others.index((i + 3) % 6), temperature))
    torch.testing.assert_close(ntxent(first, second, temperature), torch.stack(losses).mean())


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_info_nce_is_its_equation(temperature):
    query, positive, negatives = unit(4, seed=1), unit(4, seed=2), unit(10, seed=3)
    expected = [surprise(torch.cat([positive[i : i + 1], negatives]) @ query[i], 0, temperature) for i in range(4)]
    loss, _ = info_nce(query, positive, negatives, temperature)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize("first", [0, 2, 6])
def test_in_a_batch_the_positives_begin_at_first(first):
    query, keys = unit(4, seed=1), unit(10, seed=2)
    expected = [surprise(keys @ query[i], first + i, 0.5) for i in range(4)]
    loss, _ = info_nce_in_batch(query, keys, 0.5, first)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_accuracy_counts_queries_that_find_their_key():
    query = torch.eye(8)[:4]
    half = query[[0, 1, 3, 2]]
    assert float(info_nce_in_batch(query, half, 0.2)[1]) == 0.5
    assert float(info_nce(query, half, query[2:], 0.2)[1]) == 0.5
    assert float(info_nce(query, query, half[:2] * -1, 0.2)[1]) == 1.0


def test_spread_tells_alike_from_different():
    assert float(spread(unit(1).expand(5, -1))) < 1e-3
    assert float(spread(torch.cat([unit(50), -unit(50)]))) == pytest.approx(1)


def test_bf16_around_it_changes_nothing():
    def losses():
        query, keys = unit(4, seed=1), unit(4, seed=2)
        return (
            info_nce(query, keys, unit(9), 0.07)[0],
            info_nce_in_batch(query, keys, 0.07)[0],
            ntxent(query, keys, 0.07),
        )

    with torch.autocast("cpu", torch.bfloat16):
        inside = losses()
    assert all(map(torch.equal, inside, losses()))

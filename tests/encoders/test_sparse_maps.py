import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.encoders.sparse import MAX_SPAN, convolve, halve, map_cells, segment_mean, window_sum

CASES = {
    "one tile": [[(0, 0)]],
    "lone tiles": [[(0, 0), (6, 2), (3, 9)]],
    "a row": [[(x, 0) for x in range(7)]],
    "a column": [[(0, y) for y in range(6)]],
    "full": [[(x, y) for x in range(5) for y in range(4)]],
    "neighbours across slides": [[(0, 0), (0, 3)], [(0, 0), (1, 0)], [(0, 0)], [(2, 2), (0, 0), (1, 1)]],
}


def random_map(seed, slides=3, side=9, tiles=14):
    generator = torch.Generator().manual_seed(seed)
    return [
        [tuple(place) for place in torch.randint(side, (tiles, 2), generator=generator).tolist()] for _ in range(slides)
    ]


CASES |= {f"random {seed}": random_map(seed) for seed in range(3)}


def make(slides):
    """Cells of maps given as lists of places."""
    locations = torch.tensor([place for slide in slides for place in slide])
    bounds = torch.tensor([0, *[len(slide) for slide in slides]]).cumsum(0)
    return map_cells(locations, bounds, shifted=False)[0]


def indices(cells):
    """Slide, row and column of each cell on a dense map."""
    slide = torch.searchsorted(cells.starts, torch.arange(len(cells)), right=True) - 1
    x, y = cells.places.unbind(1)
    return slide, y, x


def to_dense(values, cells, side):
    dense = values.new_zeros(cells.slides, side, side, values.shape[1])
    return dense.index_put(indices(cells), values).permute(0, 3, 1, 2)


def from_dense(dense, cells):
    return dense.permute(0, 2, 3, 1)[indices(cells)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_submanifold_is_a_masked_dense_convolution(case):
    cells = make(CASES[case])
    values, weight = normal(len(cells), 3), normal(4, 3, 3, 3, seed=1)
    expected = F.conv2d(to_dense(values, cells, 12), weight, padding=1)
    torch.testing.assert_close(convolve(values, weight, cells.neighbours), from_dense(expected, cells))


@pytest.mark.parametrize("size", [None, (11, 13)])
@pytest.mark.parametrize("case", CASES)
def test_strided_is_a_dense_convolution_of_what_it_reaches(case, size):
    cells = make(CASES[case])
    values, weight = normal(len(cells), 3), normal(4, 3, 3, 3, seed=1)
    halved, pairs = halve(cells, size)
    columns, rows = size or (15, 15)
    dense = to_dense(values, cells, 15)[:, :, :rows, :columns]
    active = F.conv2d(
        to_dense(torch.ones_like(values[:, :1]), cells, 15)[:, :, :rows, :columns],
        torch.ones(1, 1, 3, 3).double(),
        stride=2,
    )
    assert len(halved) == (active > 0).sum()
    assert (from_dense(active, halved) > 0).all()
    torch.testing.assert_close(convolve(values, weight, pairs), from_dense(F.conv2d(dense, weight, stride=2), halved))
    average = F.avg_pool2d(dense, 3, 2)
    torch.testing.assert_close(window_sum(values, pairs) / 9, from_dense(average, halved))
    centres = from_dense(dense[:, :, 1::2, 1::2], halved)
    torch.testing.assert_close(window_sum(values, pairs.centre), centres)


def test_the_far_edge_can_cut_places_off():
    cells = make([[(4, 4)]])
    assert halve(cells)[0].places.tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert halve(cells, (5, 7))[0].places.tolist() == [[1, 1], [1, 2]]
    assert halve(cells, (5, 5))[0].places.tolist() == [[1, 1]]
    for size in [(4, 5), (5, 6), (3, 5)]:
        with pytest.raises(ValueError, match=r"reaches to \(4, 4\) needs odd sides beyond"):
            halve(cells, size)


def test_places_that_join_nothing_are_left_out():
    cells = make([[(0, 0), (5, 5)], [(0, 0)]])
    assert [place for place, _, _ in cells.neighbours.places] == [4]
    assert [place for place, _, _ in make([[(2, 0), (2, 1)]]).neighbours.places] == [4, 7, 1]
    assert [place for place, _, _ in halve(make([[(1, 1)]]))[1].places] == [4]


@pytest.mark.parametrize("case", ["one tile", "random 0"])
def test_gradients(case):
    cells = make(CASES[case])
    _, strided = halve(cells)
    values, weight = normal(len(cells), 2).requires_grad_(), normal(3, 2, 3, 3, seed=1).requires_grad_()
    for pairs in (cells.neighbours, strided):
        assert torch.autograd.gradcheck(lambda v, w, p=pairs: convolve(v, w, p), (values, weight))
    assert torch.autograd.gradgradcheck(lambda v, w: convolve(v, w, strided), (values, weight))
    assert torch.autograd.gradcheck(lambda v: window_sum(v, strided), (values,))
    rows = torch.arange(len(cells))
    assert torch.autograd.gradcheck(lambda v: segment_mean(v, rows, cells.starts), (values,))


def test_gradients_only_where_they_are_needed():
    cells = make(CASES["random 1"])
    values, weight = normal(len(cells), 2), normal(3, 2, 3, 3, seed=1)
    only = weight.clone().requires_grad_()
    convolve(values, only, cells.neighbours).square().sum().backward()
    both = weight.clone().requires_grad_()
    convolve(values.requires_grad_(), both, cells.neighbours).square().sum().backward()
    torch.testing.assert_close(only.grad, both.grad)
    frozen = values.detach().clone().requires_grad_()
    convolve(frozen, weight, cells.neighbours).square().sum().backward()
    torch.testing.assert_close(frozen.grad, values.grad)


def test_autocast_is_near_float32():
    cells = make(CASES["full"])
    values, weight = (
        normal(len(cells), 32).float().requires_grad_(),
        normal(16, 32, 3, 3, seed=1).float().requires_grad_(),
    )
    exact = convolve(values, weight, cells.neighbours)
    exact_grad = torch.autograd.grad(exact.square().sum(), (values, weight))
    with torch.autocast("cpu", torch.bfloat16):
        low = convolve(values, weight, cells.neighbours)
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 0.01 * exact.norm()
    for ours, theirs in zip(torch.autograd.grad(low.float().square().sum(), (values, weight)), exact_grad, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_cells_of_tiles():
    locations = torch.tensor([[7, -2], [5, 3], [7, -2], [0, 0], [-9, 4], [-9, 3]])
    cells, rows = map_cells(locations, torch.tensor([0, 3, 4, 6]))
    assert cells.places.tolist() == [[0, 5], [2, 0], [0, 0], [0, 0], [0, 1]]
    assert rows.tolist() == [1, 0, 1, 2, 4, 3]
    assert cells.starts.tolist() == [0, 2, 3]


@pytest.mark.parametrize("far", [MAX_SPAN + 1, 2**62])
def test_slides_too_wide(far):
    bounds = torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=f"slide 1 of the batch: its locations must span 0 to {MAX_SPAN} cells"):
        map_cells(torch.tensor([[far, 0], [0, 0], [0, far]]), bounds)
    with pytest.raises(ValueError, match="slide 1 "):
        map_cells(torch.tensor([[0, 0], [-(2**62), 0], [2**62 + 5, 0]]), bounds)
    with pytest.raises(ValueError, match="slide 0 of the batch: its locations must lie within 0"):
        map_cells(torch.tensor([[-1, 0], [0, 0], [0, 1]]), bounds, shifted=False)


def test_the_widest_slides_keep_their_edges_apart():
    corners = [(0, 0), (0, MAX_SPAN), (MAX_SPAN, 0), (MAX_SPAN, MAX_SPAN)]
    cells = make([corners, corners])
    assert len(cells) == 8
    assert len(cells.neighbours.places) == 1
    halved, _ = halve(cells)
    assert halved.places.amax(0).tolist() == [MAX_SPAN // 2] * 2
    assert len(halved) == 2 * 9  # one, two, two and four places for the corners of each slide

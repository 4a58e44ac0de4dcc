"""Views of grids: exact blocks, drawn as they should be."""

import numpy as np
import pytest
import torch

from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.selfsup.grid_views import GridViewOptions, embed_grids, grid_crops

CODE = GridViewOptions.code()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(batch=3, rows=16, columns=16, dtype=torch.float32):
    """Grids that say of each place where it is: [..., 0] its grid, then row and column."""
    b, r, c = torch.meshgrid(torch.arange(batch), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([b, r, c, b * 0 + 7], -1).to(dtype)


def blocks(grid, size, options):
    """All views that can be made of a grid [rows, columns, D], by plain slicing, as bytes."""
    made = set()
    for top in range(grid.shape[0] - size + 1):
        for left in range(grid.shape[1] - size + 1):
            block = grid[top : top + size, left : left + size]
            turned = [np.rot90(block, k) for k in range(4)] if options.quarter_turns else [block]
            for one in turned:
                flipped = [one, one[:, ::-1]] if options.horizontal_flip else [one]
                flipped += [other[::-1] for other in flipped] if options.vertical_flip else []
                made |= {np.ascontiguousarray(other).tobytes() for other in flipped}
    return made


@pytest.mark.parametrize(
    "options",
    [
        CODE,
        GridViewOptions(horizontal_flip=0.0, dropout=0.0),
        GridViewOptions(vertical_flip=0.5, dropout=0.0),
        GridViewOptions(horizontal_flip=0.0, quarter_turns=True, dropout=0.0),
        GridViewOptions(global_size=5, local_size=2, local_views=3, vertical_flip=0.5, quarter_turns=True, dropout=0.0),
    ],
)
@pytest.mark.parametrize(("rows", "columns", "dtype"), [(16, 16, torch.float16), (14, 17, torch.float32)])
def test_views_are_blocks_of_their_grid(options, rows, columns, dtype):
    grids = numbered(4, rows, columns, dtype)
    before = grids.clone()
    views = grid_crops(grids, options, seeded())
    sizes = [options.global_size] * 2 + [options.local_size] * options.local_views
    assert [tuple(view.shape) for view in views] == [(4, 4, size, size) for size in sizes]
    assert torch.equal(grids, before)
    possible = {(index, size): blocks(grids[index].numpy(), size, options) for index in range(4) for size in {*sizes}}
    for view in views:
        assert view.dtype == dtype
        for index in range(4):
            block = np.ascontiguousarray(view[index].permute(1, 2, 0).numpy())
            assert block.tobytes() in possible[index, view.shape[-1]]


def test_each_grid_and_view_has_its_own_draw_and_all_are_as_likely():
    options = GridViewOptions(global_size=14, local_size=13, local_views=1, horizontal_flip=0.3, vertical_flip=0.6)
    options = GridViewOptions(**{**vars(options), "dropout": 0.0})
    views = grid_crops(numbered(6000), options, seeded(3))
    corners = []
    for view, choices in zip(views, (3, 3, 4), strict=True):
        rows, columns = view[:, 1], view[:, 2]
        top, left = rows.amin((1, 2)), columns.amin((1, 2))
        for offsets in (top, left):
            shares = torch.bincount(offsets.long(), minlength=choices) / 6000
            torch.testing.assert_close(shares, torch.full((choices,), 1 / choices), atol=0.03, rtol=0)
        assert abs(float((columns[:, 0, 0] > columns[:, 0, -1]).float().mean()) - 0.3) < 0.03
        assert abs(float((rows[:, 0, 0] > rows[:, -1, 0]).float().mean()) - 0.6) < 0.03
        assert abs(float(torch.corrcoef(torch.stack([top, left]))[0, 1])) < 0.05
        corners.append(top)
    assert abs(float(torch.corrcoef(torch.stack(corners[:2]))[0, 1])) < 0.05


def test_quarter_turns_are_as_likely_and_keep_what_is_beside_what():
    options = GridViewOptions(global_size=2, local_views=0, horizontal_flip=0.0, quarter_turns=True, dropout=0.0)
    view = grid_crops(numbered(4000, 2, 2), options, seeded())[0]
    names = view[:, 1] * 2 + view[:, 2]
    found = [tuple(block.flatten().int().tolist()) for block in names]
    turns = {tuple(np.rot90(np.arange(4).reshape(2, 2), k).flatten().tolist()) for k in range(4)}
    assert set(found) == turns
    assert all(abs(found.count(turn) / 4000 - 0.25) < 0.03 for turn in turns)


def test_the_crops_are_of_the_seed_alone():
    grids = torch.randn(5, 16, 16, 8, generator=seeded(9))
    once, again, other = (grid_crops(grids, CODE, seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    torch.manual_seed(0)
    paper = grid_crops(grids, GridViewOptions.paper(), seeded(1))
    for whole, dropped in zip(once, paper, strict=True):
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.9)


def test_dropout_takes_its_share_of_numbers_and_leaves_absent_tiles_absent():
    grids = torch.ones(40, 16, 16, 16, dtype=torch.float16)
    grids[:, ::2] = 0
    torch.manual_seed(4)
    views = grid_crops(grids, GridViewOptions.paper(), seeded())
    torch.manual_seed(4)
    for view, again in zip(views, grid_crops(grids, GridViewOptions.paper(), seeded()), strict=True):
        assert torch.equal(view, again)
    plain = grid_crops(grids, CODE, seeded())
    for view, whole in zip(views, plain, strict=True):
        absent = (whole == 0).all(1)
        assert torch.equal((view == 0).all(1), absent)
        present = view.movedim(1, -1)[~absent]
        assert abs(float((present == 0).float().mean()) - 0.1) < 0.01


def test_the_presets_are_the_papers_and_the_codes():
    paper, code = GridViewOptions.paper(), GridViewOptions.code()
    assert (paper.global_size, paper.local_size, paper.local_views, paper.dropout) == (14, 6, 8, 0.1)
    assert (paper.horizontal_flip, paper.vertical_flip, paper.quarter_turns) == (0.5, 0.0, False)
    assert paper == GridViewOptions()
    assert code == GridViewOptions(dropout=0.0)


@pytest.mark.parametrize(
    "changes", [{"dropout": 1.0}, {"horizontal_flip": 1.1}, {"local_size": 0}, {"local_views": -1}]
)
def test_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"must"):
        GridViewOptions(**changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_absent_tiles_do_not_count(dtype):
    """What lies at their place in the position embedding does not either: the rest alone decides."""
    torch.manual_seed(0)
    encoder = RegionVit(RegionVitConfig(input_dim=8, dim=12, depth=2, heads=2, grid=4)).eval()
    views = torch.randn(3, 8, 4, 4).to(dtype)
    views[1, :, :, 2:] = 0
    with torch.no_grad():
        ours = embed_grids(encoder, views)
        mask = torch.ones(3, 4, 4, dtype=torch.bool)
        mask[1, :, 2:] = False
        torch.testing.assert_close(ours, encoder(views.float() + 9.0 * ~mask[:, None], mask), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = embed_grids(encoder, views).float()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(rounded, ours, rtol=0.1, atol=0.1)

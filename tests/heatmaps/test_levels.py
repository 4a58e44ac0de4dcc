"""Maps of all levels of a slide, compared with loops over passes, regions and cells."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import shapely
import torch
from made_chains import PATCH, SIDE, TILE, NoiseSlide, make_chain, make_heads, make_tiles

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.encoders.region_zoo import region_name, region_weights
from gigatome.encoders.zoo import encoder_digest, encoder_name
from gigatome.heatmaps.attention import AttentionOptions, attention_map
from gigatome.heatmaps.hierarchy import HierarchyOptions
from gigatome.heatmaps.levels import level_maps
from gigatome.mil.model import BagBatch
from gigatome.tiles.regions import RegionOptions
from gigatome.tissue.mask import TissueMask

PLACES = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (1, 3)]
ALONE = AttentionOptions(rank="none", shifts=1)
ALL = RegionOptions(tiles=SIDE, min_tiles=1)
PER_TILE = TILE // PATCH


@pytest.fixture(scope="module")
def chain():
    return make_chain()


def plain(**changes):
    return HierarchyOptions(**{"regions": ALL, "region_shifts": 1, **changes})


@functools.cache
def embed(chain, x, y):
    with torch.inference_mode():
        image = chain.tile.normalise(torch.from_numpy(NoiseSlide().read_tile(x, y, TILE, 0.5))[None])
        return chain.tile(image)[0]


def rank(values):
    return (scipy.stats.rankdata(values) - 0.5) / len(values)


def brute_force(chain, places, shifts, region_shifts, ranked):
    """The map of the level tile, [heads, rows, columns] of cells, from loops over all passes, regions and places."""
    extent = (max(y for _, y in places) + 1) * PER_TILE, (max(x for x, _ in places) + 1) * PER_TILE
    sums = np.zeros((chain.region.config.heads, extent[0] + PER_TILE, extent[1] + PER_TILE))
    counts = np.zeros(sums.shape[1:])
    for dx, dy in itertools.product([k * PER_TILE // shifts for k in range(shifts)], repeat=2):
        vectors = {(x, y): embed(chain, (x * TILE + dx * PATCH) * 2, (y * TILE + dy * PATCH) * 2) for x, y in places}
        for sx, sy in itertools.product([k * SIDE // region_shifts for k in range(region_shifts)], repeat=2):
            regions = {((x + sx) // SIDE, (y + sy) // SIDE) for x, y in places}
            for i, j in regions:
                grid = torch.zeros(1, chain.tile.dim, SIDE, SIDE)
                mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
                inside = [(x, y) for x, y in places if ((x + sx) // SIDE, (y + sy) // SIDE) == (i, j)]
                for x, y in inside:
                    grid[0, :, (y + sy) % SIDE, (x + sx) % SIDE] = vectors[x, y]
                    mask[0, (y + sy) % SIDE, (x + sx) % SIDE] = True
                with torch.inference_mode():
                    weights = chain.region.attention(grid, mask)[0].numpy()
                found = np.array([weights[:, (y + sy) % SIDE, (x + sx) % SIDE] for x, y in inside]).T
                found = np.stack([rank(row) for row in found]) if ranked else found
                for (x, y), values in zip(inside, found.T, strict=True):
                    top, left = y * PER_TILE + dy, x * PER_TILE + dx
                    sums[:, top : top + PER_TILE, left : left + PER_TILE] += values[:, None, None]
                    counts[top : top + PER_TILE, left : left + PER_TILE] += 1
    tissue = np.zeros(counts.shape, bool)
    for x, y in places:
        tissue[y * PER_TILE : (y + 1) * PER_TILE, x * PER_TILE : (x + 1) * PER_TILE] = True
    with np.errstate(invalid="ignore"):
        return np.where(tissue, sums / counts, np.nan)[:, : extent[0], : extent[1]]


@pytest.mark.parametrize(
    ("shifts", "region_shifts", "ranked"), [(1, 1, False), (2, 1, True), (1, 2, True), (4, 2, False)]
)
def test_tiles_of_shifted_passes_equal_loops(chain, shifts, region_shifts, ranked):
    attention = AttentionOptions(rank="tile" if ranked else "none", shifts=shifts, batch_size=4)
    options = HierarchyOptions(regions=ALL, region_shifts=region_shifts)
    maps = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["tile", "cell"], attention, options)
    assert list(maps.levels) == ["cell", "tile"]
    expected = brute_force(chain, PLACES, shifts, region_shifts, ranked)
    for head in range(2):
        np.testing.assert_allclose(maps.heat(f"tile_h{head}").values[0], expected[head], atol=2e-5)
    heat = maps.heat("tile")
    np.testing.assert_allclose(heat.values[0], expected.mean(0), atol=2e-5)
    assert (heat.x, heat.y, heat.cell) == (0, 0, 2 * PATCH)


def test_cells_are_those_of_the_cell_level_alone(chain):
    attention, grid = AttentionOptions(shifts=2), make_tiles(PLACES)
    maps = level_maps(NoiseSlide(), chain, grid, ["cell", "tile"], attention, plain())
    alone = attention_map(NoiseSlide(), chain.tile, grid, attention)
    np.testing.assert_allclose(maps.levels["cell"].values, alone.values, rtol=1e-6)
    assert maps.channels == ("cell_h0", "cell_h1", "tile_h0", "tile_h1", "combined")
    assert maps.pictures == ("cell", "tile", "combined")


def test_one_whole_region_is_the_region_encoders_attention(chain):
    maps = level_maps(NoiseSlide(), chain, make_tiles([(0, 0), (1, 0), (0, 1), (1, 1)]), ["tile"], ALONE, plain())
    grid = torch.stack([embed(chain, x * 2 * TILE, y * 2 * TILE) for y, x in itertools.product(range(2), repeat=2)])
    with torch.inference_mode():
        expected = chain.region.attention(grid.T.reshape(1, -1, 2, 2))[0].numpy()
    np.testing.assert_allclose(maps.levels["tile"].values, expected, atol=1e-6)
    assert maps.channels == ("tile_h0", "tile_h1")


def test_rank_over_the_slide(chain):
    attention = AttentionOptions(rank="slide", shifts=1)
    maps = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["tile"], attention, plain())
    raw = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["tile"], ALONE, plain())
    present = np.isfinite(raw.levels["tile"].values[1])
    assert present.sum() == len(PLACES)
    np.testing.assert_allclose(maps.levels["tile"].values[1][present], rank(raw.levels["tile"].values[1][present]))


def test_regions_with_too_few_tiles_say_nothing(chain):
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]
    options = plain(regions=RegionOptions(tiles=SIDE, min_tiles=3))
    maps = level_maps(NoiseSlide(), chain, make_tiles(places), ["cell", "tile"], ALONE, options)
    assert np.isnan(maps.heat("tile").values[0, :, 2 * PER_TILE :]).all()
    assert np.isfinite(maps.heat("cell").values[0, :PER_TILE, 2 * PER_TILE :]).all()
    assert np.isnan(maps.heat("combined").values[0, :, 2 * PER_TILE :]).all()
    assert np.isfinite(maps.heat("combined").values[0, :, : 2 * PER_TILE]).all()


def test_background_is_seen_where_the_regions_say_so(chain):
    places = [(0, 0), (1, 0), (0, 1)]
    options = plain(regions=RegionOptions(tiles=SIDE, min_tiles=1, background="encode"))
    seen = level_maps(NoiseSlide(), chain, make_tiles(places), ["cell", "tile"], ALONE, options)
    whole = level_maps(NoiseSlide(), chain, make_tiles([*places, (1, 1)]), ["tile"], ALONE, plain())
    expected = whole.levels["tile"].values.copy()
    expected[:, 1, 1] = np.nan  # it is attended to, and not shown
    np.testing.assert_allclose(seen.levels["tile"].values, expected, atol=1e-6)
    assert np.isnan(seen.heat("cell").values[0, PER_TILE:, PER_TILE:]).all()


def origin_of(chain, dim, tiling=None):
    name, weights = encoder_name(chain.tile), encoder_digest(chain.tile)
    if dim != chain.tile.dim:
        name = region_name(chain.region, chain.card, weights)
        weights = region_weights(chain.region, weights)
    return {"encoder": name, "weights": weights, "dim": dim, "tiling": tiling or {}}


@pytest.fixture(scope="module")
def on_vectors(chain):
    return replace(chain, slide=make_heads("abmil", 12, origin_of(chain, 12)))


@pytest.fixture(scope="module")
def on_grids(chain):
    return replace(chain, slide=make_heads("hipt_none_fc", 16, origin_of(chain, 16), options={"hidden": 8}))


def region_inputs(chain, places):
    """Corners in regions of those with tiles, grids [R, 4, D] and masks, row by row."""
    corners = sorted({(y // SIDE, x // SIDE) for x, y in places})
    grids, masks = torch.zeros(len(corners), SIDE**2, chain.tile.dim), torch.zeros(len(corners), SIDE**2)
    for index, (j, i) in enumerate(corners):
        for slot, (y, x) in enumerate(itertools.product(range(SIDE), repeat=2)):
            if (i * SIDE + x, j * SIDE + y) in places:
                grids[index, slot] = embed(chain, (i * SIDE + x) * 2 * TILE, (j * SIDE + y) * 2 * TILE)
                masks[index, slot] = 1
    return corners, grids, masks.bool()


def slide_attention(chain, places):
    """Corners of the regions, and the mean attention of the heads to them."""
    corners, grids, masks = region_inputs(chain, places)
    with torch.inference_mode():
        x = grids if chain.on_grids else chain.region(grids.mT.unflatten(2, (2, 2)), masks.unflatten(1, (2, 2)))
        found = [head.network(BagBatch(x, torch.tensor([0, len(x)]))).attention for head in chain.slide.heads]
    return corners, torch.stack(found).mean(0)[:, 0].numpy(), masks.sum(1).numpy()


@pytest.mark.parametrize("kind", ["on_vectors", "on_grids"])
def test_regions_show_the_attention_of_the_slide_model(kind, request):
    chain = request.getfixturevalue(kind)
    maps = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["region"], ALONE, plain())
    corners, expected, _ = slide_attention(chain, PLACES)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(expected) > 1e-4
    values = maps.heat("region").values[0]
    assert values.shape == (4, 4)
    for (j, i), value in zip(corners, expected, strict=True):
        block = values[j * SIDE : (j + 1) * SIDE, i * SIDE : (i + 1) * SIDE]
        np.testing.assert_allclose(block[np.isfinite(block)], value, rtol=1e-4)
    assert {(int(x), int(y)) for y, x in np.argwhere(np.isfinite(values))} == set(PLACES)
    ranked = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["region"], AttentionOptions(shifts=1), plain())
    (j, i), best = corners[expected.argmax()], ranked.heat("region").values[0]
    block = best[j * SIDE : (j + 1) * SIDE, i * SIDE : (i + 1) * SIDE]
    np.testing.assert_allclose(block[np.isfinite(block)], 1 - 0.5 / len(corners))


def test_product_is_the_share_of_attention_relative_to_uniform(on_vectors):
    levels = ["cell", "tile", "region"]
    attention = AttentionOptions(shifts=1)  # ranks are drawn, and do not enter the product
    maps = level_maps(NoiseSlide(), on_vectors, make_tiles(PLACES), levels, attention, plain(combine="product"))
    raw = level_maps(NoiseSlide(), on_vectors, make_tiles(PLACES), ["cell", "tile"], ALONE, plain())
    combined = maps.heat("combined").values[0]
    present = np.isfinite(combined)
    assert present.sum() == len(PLACES) * PER_TILE**2
    assert combined[present].mean() == pytest.approx(1, abs=1e-5)
    corners, regions, _ = slide_attention(on_vectors, PLACES)
    cells, tiles = raw.levels["cell"].values, raw.levels["tile"].values
    for x, y in [(0, 0), (3, 0), (1, 3)]:
        members = [(i, j) for i, j in PLACES if (i // SIDE, j // SIDE) == (x // SIDE, y // SIDE)]
        own = np.array([tiles[:, j, i] for i, j in members])  # [members, heads]
        share = (own / own.sum(0)).mean(1)[members.index((x, y))] * regions[corners.index((y // SIDE, x // SIDE))]
        block = cells[:, y * PER_TILE : (y + 1) * PER_TILE, x * PER_TILE : (x + 1) * PER_TILE]
        block = (block / block.sum((1, 2), keepdims=True)).mean(0) * share
        np.testing.assert_allclose(
            combined[y * PER_TILE : (y + 1) * PER_TILE, x * PER_TILE : (x + 1) * PER_TILE],
            block * len(PLACES) * PER_TILE**2,
            rtol=1e-4,
        )


def test_product_of_chosen_heads(chain):
    one = plain(combine="product", heads={"cell": 1, "tile": 0})
    maps = level_maps(NoiseSlide(), chain, make_tiles(PLACES[:2]), ["cell", "tile"], ALONE, one)
    cells, tiles = maps.levels["cell"].values[1], maps.levels["tile"].values[0, 0]
    expected = cells[:, :PER_TILE] / cells[:, :PER_TILE].mean() * tiles[0] / tiles.mean()
    np.testing.assert_allclose(maps.heat("combined").values[0, :, :PER_TILE], expected, rtol=1e-4)


def test_mean_with_weights_and_heads(on_vectors):
    options = plain(weights={"cell": 2, "region": 0}, heads={"tile": 1})
    maps = level_maps(NoiseSlide(), on_vectors, make_tiles(PLACES), ["cell", "tile", "region"], ALONE, options)
    expected = (2 * maps.heat("cell").values + maps.heat("tile_h1").values) / 3
    np.testing.assert_allclose(maps.heat("combined").values, expected, rtol=1e-5)
    np.testing.assert_array_equal(maps.heat("tile").values, maps.heat("tile_h1").values)
    with pytest.raises(ConfigError, match="no channel tile_h2"):
        maps.heat("tile_h2")


def test_tiles_and_tissue(chain):
    maps = level_maps(NoiseSlide(), chain, make_tiles(PLACES), ["cell", "tile"], ALONE, plain())
    tiles = maps.tiles()
    assert tiles.channels == maps.channels
    assert (tiles.cell, tiles.values.shape) == (2 * TILE, (5, 4, 4))
    np.testing.assert_allclose(tiles.values[2:4], maps.levels["tile"].values, rtol=1e-6)
    np.testing.assert_allclose(tiles.values[0, 0, 0], maps.heat("cell_h0").values[0, :4, :4].mean(), rtol=1e-6)
    cut = maps.within(TissueMask((shapely.box(0, 0, 48, 640),), 640, 512))  # three cells of the first tile
    for name in ("cell", "tile", "combined"):
        present = np.isfinite(cut.heat(name).values[0])
        assert present[:8, :3].all()
        assert not present[:, 3:].any()


def test_progress_reaches_its_total(on_vectors):
    calls = []
    attention = AttentionOptions(shifts=2, batch_size=5)
    options = plain(regions=RegionOptions(tiles=SIDE, min_tiles=1, background="encode"))
    for levels in (["cell", "region"], ["tile"], ["region"]):
        level_maps(
            NoiseSlide(), on_vectors, make_tiles(PLACES), levels, attention, options,
            progress=lambda *call: calls.append(call),
        )  # fmt: skip
        assert calls[-1][1] == calls[-1][2]


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        (["cells"], {}, "no level cells; there are cell, tile, region"),
        ([], {}, "no level is asked for"),
        (["region"], {}, "needs a slide model: .* gigatome evaluate"),
        (["tile"], {"region_shifts": 3}, "regions of 2 tiles have no 3 shifts"),
        (["tile"], {"heads": {"tile": 2}}, "tile has attention heads 0 to 1, not 2"),
        (["cell", "tile"], {"weights": {"cell": 0, "tile": 0}}, "weigh nothing"),
    ],
)
def test_levels_that_cannot_be_shown(chain, levels, options, message):
    with pytest.raises(ConfigError, match=message):
        level_maps(NoiseSlide(), chain, make_tiles(PLACES), levels, ALONE, plain(**options))


def test_no_region_encoder(chain):
    with pytest.raises(ConfigError, match="needs a region encoder: give as model the run of a recipe of level region"):
        level_maps(NoiseSlide(), replace(chain, region=None, card=None), make_tiles(PLACES), ["tile"])


def test_without_a_region_encoder_regions_are_those_of_the_slide_model(chain):
    origin = origin_of(chain, 16, {"patch_size": SIDE * TILE, "region_tiles": SIDE})
    heads = make_heads("hipt_none_fc", 16, origin, options={"hidden": 8})
    alone, both = replace(chain, region=None, card=None, slide=heads), replace(chain, slide=heads)
    maps = [level_maps(NoiseSlide(), one, make_tiles(PLACES), ["region"], ALONE) for one in (alone, both)]
    np.testing.assert_array_equal(maps[0].levels["region"].values, maps[1].levels["region"].values)


def test_heads_of_other_regions(chain):
    heads = make_heads("abmil", 12, origin_of(chain, 12, {"patch_size": 4096.0}))
    with pytest.raises(EvaluationError, match="tiles of 64 px, the head learnt from 4096"):
        level_maps(NoiseSlide(), replace(chain, slide=heads), make_tiles(PLACES), ["region"], ALONE, plain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_shifts": 0}, "at least 1"),
        ({"weights": {"slide": 1}}, "no level slide"),
        ({"weights": {"tile": -1}}, "must not be negative"),
        ({"weights": {"tile": 1}, "combine": "product"}, "weights are of the mean"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        HierarchyOptions(**changes)

"""Giga-SSL's sparse layer 4 against the authors' rules, emulated densely, through ResNet's own key names."""

import numpy as np
import pytest
import torch

from gigatome.encoders.giga import GigaConfig, from_resnet
from gigatome.encoders.sparse import halve, map_cells

CASES = ("five_tiles", "cluster", "dense")


@pytest.fixture(scope="module")
def encoder(reference_shapes, seeded):
    state = seeded.state(reference_shapes("sparse")["resnet18_layer4"])
    weights = {key: torch.from_numpy(value) for key, value in state.items()}
    return from_resnet(weights, GigaConfig(), source="seeded", transposed=True).eval()


@pytest.fixture(scope="module")
def maps(reference, seeded):
    """Values, locations and size of each case."""
    expected = reference("sparse")
    places = {case: torch.from_numpy(expected[f"{case}.locations"]) for case in CASES}
    values = {case: torch.from_numpy(seeded.input(f"sparse.{case}", (len(places[case]), 256))) for case in CASES}
    return {case: (values[case], places[case], tuple(expected[f"{case}.size"].tolist())) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sparse(reference, encoder, maps, case):
    expected = reference("sparse")
    values, places, size = maps[case]
    cells, rows = map_cells(places, torch.tensor([0, len(places)]), shifted=False)
    assert len(halve(cells, size)[0]) == expected[f"{case}.active_out"]
    with torch.inference_mode():
        embedding = encoder.network.pool(values[rows.argsort()], cells, size)
    np.testing.assert_allclose(embedding[0].numpy(), expected[f"{case}.embedding"], atol=1e-4, rtol=0)


def test_tiles_in_disorder_and_slides_side_by_side(reference, encoder, maps):
    # a map that begins at 0 and ends where the authors' rule ends the batch needs no help
    values, places, _ = maps["dense"]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    authors = from_resnet_with_edges(encoder)
    with torch.inference_mode():
        batch = authors(
            torch.cat([values[order], values[:1], values]),
            torch.cat([places[order] + torch.tensor([100, -7]), places[:1], places]),
            torch.tensor([0, 121, 122, 243]),
        )
    for row in (0, 2):
        np.testing.assert_allclose(batch[row].numpy(), reference("sparse")["dense.embedding"], atol=1e-4, rtol=0)


def from_resnet_with_edges(encoder):
    """The same weights with the authors' far edge."""
    weights = encoder.network.state_dict()
    return from_resnet(weights, GigaConfig(edges="batch"), source="seeded").eval()

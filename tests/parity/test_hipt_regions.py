"""HIPT's region encoder, the two encoders chained, and the models of slides above them, against the authors' code."""

import numpy as np
import pytest
import torch

from gigatome.encoders.hipt import encode_regions, load_vit256, load_vit4096
from gigatome.mil.model import BagBatch
from gigatome.mil.regions import HiptLgpFc, HiptNoneFc, HiptNoneOptions, HiptOptions


@pytest.fixture(scope="module")
def weights(reference_shapes, seeded):
    """Maps a file stem and a model in it to its seeded weights."""
    return lambda stem, model: {
        key: torch.from_numpy(value) for key, value in seeded.state(reference_shapes(stem)[model]).items()
    }


@pytest.fixture(scope="module")
def region_encoder(weights):
    # as the authors' file has it: wrapped for data parallelism, with heads
    teacher = {f"module.backbone.{key}": value for key, value in weights("hipt", "vit4k").items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(4, 4)
    return load_vit4096({"student": {"module.backbone.norm.bias": torch.zeros(192)}, "teacher": teacher, "epoch": 1})


@pytest.mark.parametrize(
    ("name", "shape", "key"), [("grid16x16", (2, 384, 16, 16), "cls4k"), ("grid12x16", (1, 384, 12, 16), "cls4k_12x16")]
)
def test_cls4k(region_encoder, reference, seeded, name, shape, key):
    with torch.inference_mode():
        embeddings = region_encoder(torch.from_numpy(seeded.input(name, shape)))
    np.testing.assert_allclose(embeddings, reference("hipt")[key], atol=1e-4, rtol=0)


def test_attn4k(region_encoder, reference, seeded):
    with torch.inference_mode():
        attention = region_encoder.attention(torch.from_numpy(seeded.input("grid16x16", (2, 384, 16, 16))))
    np.testing.assert_allclose(attention.flatten(2), reference("hipt")["attn4k"], atol=1e-6, rtol=1e-3)


def test_encoders_chained_over_a_region(region_encoder, weights, reference, seeded):
    images = torch.from_numpy(seeded.input("region", (1, 3, 768, 1024)))
    tiles, regions = encode_regions(load_vit256(weights("hipt", "vit256")), region_encoder, images)
    assert tiles.shape == (1, 3, 4, 384)
    np.testing.assert_allclose(tiles.flatten(0, 2), reference("hipt")["region_cls256"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(regions, reference("hipt")["region_cls4k"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("hipt_lgp_fc", lambda: HiptLgpFc(HiptOptions.hipt(), 384, 2)),
        ("hipt_none_fc", lambda: HiptNoneFc(HiptNoneOptions.hipt(), 384, 2)),
    ],
)
def test_logits_of_slides(weights, reference, seeded, name, model):
    model = model().eval()
    model.load_state_dict(weights("mil", name))
    regions = torch.from_numpy(seeded.input("regions", (7, 256, 384)))
    with torch.inference_mode():
        logits = model(BagBatch(regions, torch.tensor([0, 7]))).logits
    np.testing.assert_allclose(logits, reference("mil")[f"{name}.logits"], atol=1e-4, rtol=0)

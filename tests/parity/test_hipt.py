"""HIPT's ViT256-16 against the authors' code, through the loader that takes their checkpoint."""

import numpy as np
import pytest
import torch

from gigatome.encoders.hipt import load_vit256


@pytest.fixture(scope="module")
def outputs(reference, reference_shapes, seeded):
    weights = {key: torch.from_numpy(value) for key, value in seeded.state(reference_shapes("hipt")["vit256"]).items()}
    # as the authors' file has it: two networks, wrapped for data parallelism, with heads
    teacher = {f"module.backbone.{key}": value for key, value in weights.items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(4, 4)
    encoder = load_vit256({"student": {"module.backbone.norm.bias": torch.zeros(384)}, "teacher": teacher, "epoch": 1})
    images = torch.from_numpy(seeded.input("patches256", (3, 3, 256, 256)))
    with torch.inference_mode():
        return reference("hipt"), encoder(images).numpy(), encoder.attention(images).flatten(2).numpy()


def test_cls256(outputs):
    expected, embeddings, _ = outputs
    np.testing.assert_allclose(embeddings, expected["cls256"], atol=1e-4, rtol=0)


def test_attn256(outputs):
    expected, _, attention = outputs
    np.testing.assert_allclose(attention, expected["attn256"], atol=1e-6, rtol=1e-3)

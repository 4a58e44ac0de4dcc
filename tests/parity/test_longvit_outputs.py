"""LongNet's dilated attention and LongViT against the authors' code.

``reference/longvit.npz`` holds every 7th token of outputs and input gradients, as the reference has of LongViT's tokens
in any case; a folder with all of them may be given instead.
"""

import numpy as np
import pytest
import torch

from gigatome.encoders.dilated import DilatedAttention, DilatedOptions
from gigatome.encoders.longvit import LongVitConfig, load_longvit

STEP = 7
SMALL = (16, 32, 64), (1, 2, 4)
CASES = {  # shape of the input; heads, segments and ratios
    "h4": ((2, 64, 48), 4, *SMALL),
    "h16": ((2, 256, 96), 16, (64, 128, 256), (1, 2, 4)),
    "paper": ((1, 1024, 96), 16, (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16)),
    "padded": ((2, 72, 48), 4, *SMALL),
    "heads_not_multiple": ((2, 64, 36), 3, *SMALL),
}


def assert_same(found, expected, tolerance):
    """Arrays [B, N, dim] against all of their tokens or every 7th, up to a share of the largest value."""
    expected = expected if expected.shape[1] != found.shape[1] else expected[:, ::STEP]
    np.testing.assert_allclose(found[:, ::STEP], expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_dilated(reference, reference_shapes, seeded, case):
    name = f"dilated_{case}"
    expected = {key.removeprefix(f"{name}."): value for key, value in reference("longvit").items() if name in key}
    shape, heads, segments, ratios = CASES[case]
    module = DilatedAttention(shape[2], DilatedOptions.compat(segments, ratios, heads), inner_norm=False)
    state = seeded.state(reference_shapes("longvit")[name])
    module.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    x = torch.from_numpy(seeded.input(name, shape)).requires_grad_()
    out = module(x)
    out.backward(torch.from_numpy(seeded.input(f"{name}.cotangent", shape)))
    assert_same(out.detach().numpy(), expected["out"], 1e-4)
    assert_same(x.grad.numpy(), expected["grad_x"], 1e-4)
    gradient, wanted = module.q_proj.weight.grad.numpy(), expected["grad_q_weight"]
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("name", "side"), [("longvit_1024", 1024), ("longvit_512_from_1024", 512)])
def test_longvit(reference, reference_shapes, seeded, name, side):
    state = seeded.state(reference_shapes("longvit")["longvit"])
    weights = {f"backbone.{key}": torch.from_numpy(value) for key, value in state.items()}
    config = LongVitConfig(dim=96, depth=3, ffn_dim=384, norm="finetune", padding="torchscale", pos_embed="dino")
    model = load_longvit({"teacher": weights | {"backbone.norm.bias": torch.zeros(96)}}, config)
    with torch.inference_mode():
        tokens = model.forward_tokens(torch.from_numpy(seeded.input(name, (1, 3, side, side)))).numpy()
    expected = reference("longvit")
    np.testing.assert_allclose(tokens[:, ::STEP], expected[f"{name}.tokens"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(tokens.mean(1), expected[f"{name}.mean"], rtol=0, atol=1e-3)

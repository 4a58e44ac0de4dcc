"""The slide-level models against the authors' code, through their own key names (dropout off)."""

import numpy as np
import pytest
import torch

from gigatome.mil.abmil import Abmil, AbmilOptions
from gigatome.mil.clam import Clam, ClamOptions
from gigatome.mil.deep_attn_misl import DeepAttnMisl, DeepAttnMislOptions
from gigatome.mil.ds_mil import DsMil, DsMilOptions
from gigatome.mil.model import BagBatch
from gigatome.mil.pooling import MaxOptions, MaxPool

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected(reference):
    return reference("mil")


@pytest.fixture(scope="module")
def load(reference_shapes, seeded):
    """Fills a model with the seeded weights of a case by the authors' keys; some of other shapes, or None: left out."""

    def fill(model, case, **changed):
        shapes = reference_shapes("mil")[case] | changed
        state = seeded.state({key: shape for key, shape in shapes.items() if shape is not None})
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
        return model.eval()

    return fill


@pytest.fixture(scope="module")
def bags(seeded):
    """The bag of the cases between two others, so that a batch must keep them apart."""
    bag = torch.from_numpy(seeded.input("bag", (40, 384)))
    others = torch.randn(9, 384, generator=torch.Generator().manual_seed(0)), torch.ones(1, 384)
    return BagBatch(
        torch.cat([others[0], bag, others[1]]),
        torch.tensor([0, 9, 49, 50]),
        clusters=torch.cat([torch.arange(9) % 4, torch.arange(40) % 10, torch.tensor([3])]),
    )


def check(actual, reference):
    np.testing.assert_allclose(actual.detach().numpy(), reference, atol=TOLERANCE, rtol=0)


def check_attention(output, reference):
    # the authors hand out the scores before the softmax
    check(output.attention[9:49].T, np.exp(reference) / np.exp(reference).sum())
    scores = output.attention[9:49].T.log()
    check(scores - scores.mean(), reference - reference.mean())


def test_abmil_clam_sb(expected, load, bags):
    output = load(Clam(ClamOptions.hipt(), 384, 3), "abmil_clam_sb")(bags)
    check(output.logits[1:2], expected["abmil_clam_sb.logits"])
    check_attention(output, expected["abmil_clam_sb.attention"])


def test_abmil_of_the_same_network(expected, reference_shapes, seeded, bags):
    # CLAM without its instance classifiers is a gated ABMIL of MCAT's form without rho
    state = seeded.state(reference_shapes("mil")["abmil_clam_sb"])
    own = {key: torch.from_numpy(value) for key, value in state.items() if "instance" not in key}
    model = Abmil(AbmilOptions(hidden=384, attention=256, gated=True, form="mcat"), 384, 3).eval()
    model.load_state_dict({key.replace("classifiers.", "classifier."): value for key, value in own.items()})
    output = model(bags)
    check(output.logits[1:2], expected["abmil_clam_sb.logits"])
    check_attention(output, expected["abmil_clam_sb.attention"])


def test_clam_sb_with_its_instance_loss(expected, load, bags):
    two_classes = {
        "classifiers.weight": [2, 384],
        "classifiers.bias": [2],
        "instance_classifiers.2.weight": None,
        "instance_classifiers.2.bias": None,
    }
    options = ClamOptions(hidden=0, samples=4, subtyping=True, instance_loss="cross_entropy")
    model = load(Clam(options, 384, 2), "abmil_clam_sb", **two_classes)
    output = model(bags)
    check(output.logits[1:2], expected["clam_sb.logits"])
    check(model.instance_loss(output.instances[1:2], torch.tensor([1])), expected["clam_sb.instance_loss"])


def test_max_mil(expected, load, bags):
    output = load(MaxPool(MaxOptions(dropout=0), 384, 2), "max_mil")(bags)
    check(output.logits[1:2], expected["max_mil.logits"])


def test_ds_mil(expected, load, bags):
    output = load(DsMil(DsMilOptions.hipt(), 384, 2), "ds_mil")(bags)
    check(output.logits[1:2], expected["ds_mil.logits"])


@pytest.mark.parametrize("empty", ["zeros", "ignored"])
def test_deep_attn_misl(expected, load, bags, empty):
    output = load(DeepAttnMisl(DeepAttnMislOptions(hidden=0, empty=empty), 384, 2), "deep_attn_misl")(bags)
    check(output.logits[1:2], expected["deep_attn_misl.logits"])

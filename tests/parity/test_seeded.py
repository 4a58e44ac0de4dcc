"""The seeded weights and inputs, on which every reference output rests."""

import numpy as np
from seeded import Seeded

EXPECTED = [0.542062, -0.4642605, 1.1298754]


def test_inputs_are_the_same_everywhere():
    np.testing.assert_allclose(Seeded(0).input("x", (3,)), EXPECTED, rtol=1e-6)
    assert Seeded(0).input("x", (3,)).dtype == np.float32
    np.testing.assert_allclose(Seeded(0).input("x", (3,), 0.5), np.array(EXPECTED) / 2, rtol=1e-6)
    assert not np.allclose(Seeded(1).input("x", (3,)), EXPECTED)


def test_weights_have_the_scale_of_their_kind():
    state = Seeded(0).state(
        {"a.weight": (200, 100), "norm.weight": (500,), "a.bias": (500,), "bn.running_var": (500,), "cls": (1, 1, 500)}
    )
    assert abs(np.std(state["a.weight"]) - 0.15) < 0.01
    assert abs(state["norm.weight"].mean() - 1) < 0.02
    assert abs(np.std(state["norm.weight"]) - 0.1) < 0.02
    assert abs(np.std(state["a.bias"]) - 0.05) < 0.01
    assert state["bn.running_var"].min() >= 0.5
    assert abs(np.std(state["cls"]) - 0.05) < 0.01

import json
import random

import numpy as np
import torch

from gigatome.training.random_state import own_random_state, random_state, set_random_state


def test_random_states_go_through_json():
    before = json.loads(json.dumps(random_state()))
    drawn = torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)  # noqa: NPY002
    set_random_state(before)
    again = torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)  # noqa: NPY002
    assert torch.equal(drawn[0], again[0])
    assert np.array_equal(drawn[1], again[1])
    assert drawn[2:] == again[2:]


def test_a_run_gives_the_random_states_back():
    before = random_state()
    with own_random_state(5, torch.device("cpu")):
        first = torch.rand(2), np.random.rand(2), random.random()  # noqa: NPY002
    assert random_state() == before
    with own_random_state(5, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first[0])
        assert np.array_equal(np.random.rand(2), first[1])  # noqa: NPY002
        assert random.random() == first[2]

from pathlib import Path

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError, RunError
from gigatome.training.memory import explained_memory, total_memory

WHOLE = 2**60  # more bytes than any machine has


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (
            lambda: torch.empty(WHOLE, dtype=torch.uint8),
            "can't allocate memory: you tried to allocate 11529215046",
        ),
        (lambda: np.ones(WHOLE, np.uint8), "Unable to allocate 1.00 EiB"),
    ],
)
def test_a_host_without_memory_is_told_what_would_fit(allocate, words):
    with pytest.raises(RunError) as caught, explained_memory(lambda: "use fewer"):
        allocate()
    assert str(caught.value).startswith("out of memory (")
    assert words in str(caught.value)
    assert str(caught.value).endswith("); use fewer")
    assert isinstance(caught.value.__cause__, RuntimeError | MemoryError)


def raise_error(error):
    raise error


def test_a_gpu_without_memory_says_so_in_its_words_but_for_the_settings():
    words = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 10 GiB free. If reserved but unallocated …"
    expected = (
        r"^out of memory \(CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 10 GiB free\); use 2 processes$"
    )
    with pytest.raises(RunError, match=expected), explained_memory(lambda: "use 2 processes"):
        raise_error(torch.OutOfMemoryError(words))


def test_that_nothing_would_fit_is_said_too():
    expected, nothing = r"out of memory \(no more of the host\); nothing fits", ConfigError("nothing fits")
    with pytest.raises(RunError, match=expected), explained_memory(lambda: raise_error(nothing)):
        raise_error(MemoryError())


def test_other_errors_are_left_alone_and_advice_is_not_asked_for():
    wrong = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError) as caught, explained_memory(lambda: raise_error(ValueError("asked"))):
        raise_error(wrong)
    assert caught.value is wrong


def test_the_memory_of_the_host():
    total = total_memory(torch.device("cpu"))
    stated = 1024 * int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    assert total == pytest.approx(stated, rel=0.01)

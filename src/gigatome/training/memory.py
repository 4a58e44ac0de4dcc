"""Running out of memory, said with what would fit."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from gigatome.core.errors import GigatomeError, RunError

_OF_THE_HOST = "can't allocate memory"  # in what PyTorch's allocator of the CPU says


@contextlib.contextmanager
def explained_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Says what would fit when the block runs out of memory, of the device or of the host.

    Args:
        advice: what to do, as half a sentence; asked for then only. If it raises a GigatomeError, that is said.

    Raises:
        RunError: in place of the error of PyTorch, NumPy or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _lacks_memory(error):
            raise
        words = str(error).split(" If reserved")[0].strip().rstrip(".") or "no more of the host"
        raise RunError(f"out of memory ({words}); {_said(advice)}") from error


def total_memory(device: torch.device) -> int:
    """Bytes that a device has, the host's for the CPU, whoever uses them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _OF_THE_HOST in str(error)


def _said(advice: Callable[[], str]) -> str:
    try:
        return advice()
    except GigatomeError as error:
        return str(error)

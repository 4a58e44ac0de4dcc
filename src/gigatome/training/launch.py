"""The processes of one run: how each joins the others, what they agree on, and how none is left behind.

torchrun starts the processes (``torchrun --nproc-per-node 8 -m gigatome train …``, with ``--nnodes`` on several
machines) and says who they are in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. They talk over NCCL about what is on
GPUs and over gloo about the rest.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist

from gigatome.core.errors import ConfigError, GigatomeError, RunError
from gigatome.distributed import answering, finish, naming_the_lost, rank, world_size

PREEMPTED = 75
"""Exit status of a process that a signal has stopped, after saving: the run is to be queued again."""

PATIENT = timedelta(days=7)
"""How long to wait for processes whose work may differ by hours."""

_TIMEOUT = timedelta(minutes=10)  # in which one process waits for another in a step before it gives the run up
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_T = TypeVar("_T")


def launch_rank() -> int:
    """Number of this process as torchrun has started it, also before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def launch_size() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def launched(device: str) -> Iterator[None]:
    """Joins this process with the others of its run for the block, if torchrun has started it.

    The process is killed when its launcher dies, and fails if another dies, or in a step does not answer for ten
    minutes. Does nothing if torchrun has not started it, or if it is joined already.

    Args:
        device: that the run is on, such as ``"cuda"``.

    Raises:
        ConfigError: ``device`` names one GPU for several processes.
    """
    if dist.is_initialized() or not all(name in os.environ for name in _TORCHRUN):
        yield
        return
    _die_with_parent()
    if launch_size() == 1:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    if cuda:
        torch.cuda.set_device(own_device(device))
    with answering():
        yield
    dist.destroy_process_group()  # not after an error: the others may not come to it


def own_device(name: str) -> torch.device:
    """This process's device: each of several on a machine has the GPU of its number.

    Raises:
        ConfigError: ``name`` is one GPU, and there are several processes.
    """
    device = torch.device(name)
    if device.type == "cpu" or world_size() == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device {name} is one GPU for {world_size()} processes; give device {device.type}")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The block runs in process 0, which may take hours, then in the others; if it fails there, it fails in all.

    Raises:
        RunError: in the others, if it fails in process 0.
    """
    if world_size() == 1:
        yield
        return
    group = _new_group(PATIENT)
    went_well = torch.zeros(1)
    if rank() == 0:
        try:
            yield
            went_well += 1
        finally:
            dist.broadcast(went_well, 0, group=group)
        return
    dist.broadcast(went_well, 0, group=group)
    if not went_well:
        raise RunError("process 0 could not begin the run; its message says why")
    yield


@final
class Control:
    """What the hosts of a run agree on, without a GPU having to wait; in a run of one process all is the identity.

    All processes make one together, and call its methods in the same order; each method waits for all of them.

    Args:
        timeout: in which one process waits for another before it gives the run up; :data:`PATIENT` where their work is
            uneven. One that dies is noticed at once all the same.

    Raises:
        RunError: by each method: a process is gone, or does not come in time; the message names it.
    """

    def __init__(self, timeout: timedelta = _TIMEOUT):
        self._group = _new_group(timeout) if world_size() > 1 else None

    def any(self, mine: bool) -> bool:
        """Whether it is true in any process."""
        if self._group is None:
            return mine
        flag = torch.tensor(int(mine))
        finish(dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag, self._group)
        return bool(flag)

    def gather(self, mine: _T) -> list[_T]:
        """The value of each process, in their order."""
        if self._group is None:
            return [mine]
        self.any(False)  # which looks, while it waits, whether a process is gone
        values: list[Any] = [None] * world_size()
        with naming_the_lost(self._group):
            dist.all_gather_object(values, mine, group=self._group)
        return values

    def together(self, action: Callable[[], _T]) -> _T:
        """Runs ``action`` in every process; if it fails in one, that raises its error and the others RunError."""
        result, failure = None, None
        try:
            result = action()
        except GigatomeError as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for number, message in enumerate(messages):
            if message is not None:
                raise RunError(f"process {number}: {message}")
        return cast(_T, result)

    def on_first(self, action: Callable[[], object]) -> None:
        """As :meth:`together`, in process 0 only, while the others wait."""
        self.together(action if rank() == 0 else lambda: None)


def _new_group(timeout: timedelta) -> dist.ProcessGroup:
    """All processes, for what lies in their hosts' memory."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # noqa: S101 - as all are members
    return group


def _die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies; Linux only.

    torchrun that is killed leaves its processes waiting for each other for ever otherwise. A checkpoint that is being
    written then is left unfinished, and the one before it stands.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

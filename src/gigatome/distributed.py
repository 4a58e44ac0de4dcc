"""What the processes of a run tell each other; in a run of one process everything here is the identity.

torchrun starts the processes and says who they are in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

Processes may share sequences too long for one of them: the run is then a mesh of sequences × parts of each. Losses of
the processes of a sequence are the same, and each gradient is that of the sum of all processes' losses. Its mean over
all processes, which data-parallel training takes anyway, is therefore the gradient of the mean loss of the sequences.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from gigatome.core.errors import ConfigError, RunError

_TIMEOUT = timedelta(minutes=10)  # in which one process of a sequence waits for another before it gives the run up
_LOOK = timedelta(seconds=1)  # after which a process that waits looks whether another has failed
_ROLL_CALL = timedelta(seconds=5)  # in which processes say that they are still there after a failure
_FAILED = "failed"  # tells all processes that something has, and names those that were to be together in it


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; ``value`` itself in a run of one."""
    return value if world_size() == 1 else sum_over_ranks(value) / world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient; ``value`` itself in a run of one."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    finish(dist.all_reduce(total, async_op=True), total)
    return total


def gather(value: Tensor) -> Tensor:
    """Rows [N, …] of all processes, [ranks × N, …] in their order, without gradient; N is the same everywhere."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    finish(dist.all_gather(parts, value.detach().contiguous(), async_op=True), parts[0])
    return torch.cat(parts)


def gather_with_gradient(value: Tensor) -> Tensor:
    """As :func:`gather`; the gradient of all processes' losses flows back to the rows of each, summed."""
    return value if world_size() == 1 else _Gather.apply(value)  # pyright: ignore[reportReturnType]


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded, without gradient; ``value`` itself if it is not."""
    part = getattr(value.detach(), "to_local", None)  # of DTensor, which takes long to import
    return part() if part else value


def finish(work: dist.Work | None, result: Tensor, processes: dist.ProcessGroup | None = None) -> None:
    """Waits for what several processes do together, and looks meanwhile whether one of the run has failed.

    Args:
        work: of a collective, which was asked for asynchronously.
        result: what it fills. One on a GPU is waited for by the device alone.
        processes: that take part; None for all.

    Raises:
        RunError: one of them is gone, or has not come in time; the message names it.
    """
    assert work is not None  # noqa: S101 - as it was asked for
    with naming_the_lost(processes):
        if result.is_cuda:  # PyTorch's watchdog looks after it
            work.wait()
        else:
            while not _completed(work):
                pass


@contextlib.contextmanager
def naming_the_lost(processes: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around what several processes do together, and nothing else.

    Args:
        processes: that take part; None for all.

    Raises:
        RunError: one of them is gone, or has not come in time; the message names it.
    """
    since = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited = time.monotonic() - since
        lost = _lost(processes, waited, timed_out="timed out" in str(error).lower())
        raise RunError(f"{lost}; the run stops, and its last checkpoint stands") from error


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """During the block a thread tells processes that look for a lost one that this one lives, however busy it is."""
    over = threading.Event()
    thread = threading.Thread(target=_say_alive, args=(_store().clone(), over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_ROLL_CALL.total_seconds())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return gather(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()].contiguous()


@final
@dataclass(frozen=True)
class SequenceGroup:
    """The processes that hold parts of the same sequence, in the order of the parts.

    Attributes:
        size: how many parts.
        rank: which of them this process holds.
        sequences: how many sequences the run works on at once.
        sequence: which of them this process works on; what data-parallel training calls the rank.
        processes: that hold parts of this sequence; None if this one holds all of it.
    """

    size: int = 1
    rank: int = 0
    sequences: int = 1
    sequence: int = 0
    processes: dist.ProcessGroup | None = None


def sequence_group(size: int, *, timeout: timedelta = _TIMEOUT) -> SequenceGroup:
    """This process's place when each sequence has ``size`` parts; all processes of the run call it together.

    Processes of consecutive numbers share a sequence, so that they are on one machine where that is possible.

    Args:
        size: parts of a sequence.
        timeout: in which one process waits for another before it fails.

    Raises:
        ConfigError: ``size`` does not divide the number of processes.
    """
    if size < 1 or world_size() % size:
        raise ConfigError(f"sequences of {size} parts need a multiple of {size} processes, not {world_size()}")
    sequences = world_size() // size
    sequence, place = divmod(rank(), size)
    if size == 1:
        return SequenceGroup(sequences=sequences, sequence=sequence)
    own = None
    for first in range(0, world_size(), size):  # every process makes the groups of all
        made = dist.new_group(list(range(first, first + size)), timeout=timeout)
        own = made if isinstance(made, dist.ProcessGroup) else own
    return SequenceGroup(size, place, sequences, sequence, own)


def sum_over_sequence(value: Tensor, group: SequenceGroup) -> Tensor:
    """Sum of a tensor over the processes of a sequence; the gradient is that of the sum of all their losses.

    Raises:
        RunError: a process does not answer; the message names it.
    """
    return value if group.size == 1 else _Sum.apply(value, group)  # pyright: ignore[reportReturnType]


@final
class Exchange:
    """Numbers on their way between the processes of a sequence.

    Args:
        sent: to each process of the sequence, flat and of one type on one device; none to itself.
        sizes: how many numbers come from each.
        group: the sequence's, all of whose processes exchange something now, if only nothing.
    """

    def __init__(self, sent: Sequence[Tensor], sizes: Sequence[int], group: SequenceGroup):
        self._group, self._sizes = group, list(sizes)
        self._sent = torch.cat(list(sent))
        self._received = self._sent.new_empty(sum(sizes))
        width = self._sent.element_size()
        self._work = dist.all_to_all_single(
            self._received.view(torch.uint8), self._sent.view(torch.uint8),  # as not every type can be sent
            [size * width for size in sizes], [len(part) * width for part in sent],
            group=group.processes, async_op=True,
        )  # fmt: skip

    def received(self) -> tuple[Tensor, ...]:
        """What came from each process, flat.

        Raises:
            RunError: a process does not answer; the message names it.
        """
        finish(self._work, self._received, self._group.processes)
        return self._received.split(self._sizes)


@final
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        total = value.detach().clone(memory_format=torch.contiguous_format)
        finish(dist.all_reduce(total, group=group.processes, async_op=True), total, group.processes)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(gradients[0], ctx.group), None  # pyright: ignore[reportReturnType]


def _completed(work: dist.Work) -> bool:
    """Waits for a moment; raises RuntimeError if the work has failed here or anything in another process."""
    try:
        return work.wait(_LOOK)
    except RuntimeError:
        if work.is_completed() or _store().check([_FAILED]):
            raise
        return False


def _lost(processes: dist.ProcessGroup | None, waited: float, *, timed_out: bool) -> str:
    """Which processes are gone, or were waited for in vain, now that this one has waited for so many seconds.

    Only those are asked for that were to be together in what failed first. One that is long at work on something else
    has a thread to answer for it, by :func:`answering`.
    """
    try:
        store, members = _store(), dist.get_process_group_ranks(processes)
        mine = {"members": members, "limit": waited if timed_out else None}
        failure = json.loads(store.compare_set(_FAILED, "", json.dumps(mine)))
        suspects: list[int] = failure["members"]
        store.set(f"there/{rank()}", str(waited))
        with contextlib.suppress(RuntimeError):  # as not all of them come
            store.wait([f"there/{member}" for member in suspects], _ROLL_CALL)
        waits = {member: float(store.get(f"there/{member}")) for member in suspects if store.check([f"there/{member}"])}
        gone = [member for member in suspects if member not in waits and not store.check([f"alive/{member}"])]
    except RuntimeError:
        return "process 0 or the launcher, through which the others find each other, does not answer any more"
    if gone:
        return f"process {_listed(gone)} of {world_size()} does not answer any more"
    if failure["limit"] is None:
        return f"processes {_listed(suspects)} lost their connection, though all are there"
    late = [member for member in suspects if waits.get(member, 0.0) < failure["limit"] / 2]
    return f"process {_listed(late or suspects)} of {world_size()} did not answer for {_spelt(failure['limit'])}"


def _say_alive(store: dist.Store, over: threading.Event) -> None:  # pyright: ignore[reportPrivateImportUsage]
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the run
        while not over.wait(_ROLL_CALL.total_seconds() / 4):
            if store.check([_FAILED]):
                store.set(f"alive/{rank()}", "")
                return


def _listed(processes: Sequence[int]) -> str:
    return ", ".join(map(str, processes))


def _spelt(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """What all processes of the run see."""
    world = dist.group.WORLD
    assert world is not None  # noqa: S101 - there is no collective without
    return world.get_group_store()

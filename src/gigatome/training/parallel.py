"""How the processes of a run share weights and gradients.

With ``"ddp"`` each process has all weights, and gradients are averaged while the backward pass still runs. With
``"fsdp"`` (FSDP2) each has its part of every weight and of what the optimiser keeps, and a block's weights are gathered
when it is due. PyTorch's DistributedDataParallel is not used: it cuts gradients into other buckets after its first
step, so more than two processes would round otherwise after a resume than without one.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gigatome.core.errors import RunError
from gigatome.distributed import finish, gather, local, rank, world_size
from gigatome.training.checkpoint import Checkpoint
from gigatome.training.method import Method
from gigatome.training.optim import load_optimizer_tensors, optimizer_tensors
from gigatome.training.options import ParallelMode

_BUCKET = 25 << 20  # bytes of gradients that travel together


@final
class Parallel:
    """A method's networks as this process has them; in a run of one process, as they are.

    Args:
        method: with the weights to begin with; changed in place.
        device: where it is put.
        mode: ``"ddp"`` or ``"fsdp"``.
        compiled: whether ``torch.compile`` is to compile the networks.

    Attributes:
        sharded: this process has its part of each weight only.
        parameters: what the optimiser moves, by name: the trained parameters, or this process's parts of them.
    """

    def __init__(self, method: Method, device: torch.device, mode: ParallelMode, *, compiled: bool):
        self.sharded = mode == "fsdp" and world_size() > 1
        self._method, self._module = method, cast(nn.Module, method)
        self._plain = copy.deepcopy(method) if self.sharded and rank() == 0 else method
        method.to(device)
        networks = [child for child in self._module.children() if any(True for _ in child.parameters())]
        for network in networks:
            if compiled:
                network.compile(dynamic=False)
            if self.sharded:
                _shard(network, device)
        self._trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        self.parameters = self._trained
        if self.sharded:  # optimisers then need not know that tensors may be sharded
            self.parameters = {name: nn.Parameter(local(p)) for name, p in self._trained.items()}
        self._average = _Average(list(self._trained.values())) if world_size() > 1 and not self.sharded else None

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        for parameter in self._trained.values():
            parameter.grad = None

    @contextlib.contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch; gradients travel in the ``last`` one of a step only."""
        if self.sharded:
            for unit in self._units():
                unit.set_requires_gradient_sync(last, recurse=False)
        if self._average and last:
            with self._average.of_backward():
                yield
        else:
            yield

    def gradients(self) -> list[nn.Parameter]:
        """The ``parameters``, with the gradient of the whole batch, or this process's part of it."""
        if self.sharded:
            for name, parameter in self._trained.items():
                self.parameters[name].grad = None if parameter.grad is None else local(parameter.grad)
        return list(self.parameters.values())

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Every process has all weights in the block, so that parts of the networks can be called on their own."""
        for unit in self._units():
            unit.unshard()
        yield
        for unit in self._units():
            unit.reshard()

    def state(self) -> dict[str, Tensor]:
        """The method's state dict, whole; under fsdp on the CPU, and empty but in process 0."""
        return self._gathered(self._method.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimiser's tensors, as :meth:`state`."""
        tensors = optimizer_tensors(optimizer, self._names())
        return self._gathered({key: self._part_of_optimizer(key, value, whole=False) for key, value in tensors.items()})

    def load_optimizer(self, optimizer: torch.optim.Optimizer, last: Checkpoint) -> None:
        """Puts back what :meth:`optimizer_state` gave; raises RunError if it is of other parameters."""
        try:
            tensors = last.tensors("optimizer")
            parts = {key: local(self._part_of_optimizer(key, value, whole=True)) for key, value in tensors.items()}
            load_optimizer_tensors(optimizer, self._names(), parts)
        except KeyError as error:
            raise last.misfit(error) from error

    def plain(self) -> Method:
        """The method with all its weights, in process 0."""
        if self.sharded:
            state = self.state()
            if rank() == 0:
                self._plain.load_state_dict(state)
        return self._plain

    def check_replicas(self) -> None:
        """Makes sure that all processes have the same weights.

        Raises:
            RunError: they have not, as a method has not told the others of something.
        """
        if world_size() == 1 or self.sharded:
            return
        state = self._method.state_dict()
        sums = torch.stack([value.detach().double().sum() for value in state.values()])
        same = (gather(sums[None]) == sums).all(0).tolist()
        if not all(same):
            name = next(name for name, agrees in zip(state, same, strict=True) if not agrees)
            raise RunError(
                f"the processes do not agree on {name} any more; nothing was saved, the last checkpoint stands"
            )

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}

    def _units(self) -> list[FSDPModule]:
        return [module for module in self._module.modules() if isinstance(module, FSDPModule)]

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.sharded:
            return dict(tensors)
        whole: dict[str, Tensor] = {}
        for name, value in tensors.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if rank() == 0:
                whole[name] = full.cpu()
        return whole

    def _part_of_optimizer(self, key: str, value: Tensor, whole: bool) -> Tensor:
        """A tensor of the optimiser as a sharded one, from this process's part or from the whole; scalars as is."""
        if not self.sharded or value.ndim == 0:
            return value
        like = self._trained[key.rpartition("/")[0]]
        assert isinstance(like, DTensor)  # noqa: S101 - all that is trained is sharded
        if whole:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


@final
class _Average:
    """Averages gradients over processes, each bucket as soon as the backward pass is through with it.

    Buckets are filled from the last parameter to the first and sent in that order, the same in all processes. A
    parameter without a gradient counts as 0.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self._buckets: list[list[nn.Parameter]] = []
        room = 0
        for parameter in reversed(parameters):
            if parameter.nbytes > room:
                self._buckets.append([])
                room = _BUCKET
            self._buckets[-1].append(parameter)
            room -= parameter.nbytes
        self._place: dict[Tensor, int] = {
            parameter: place for place, bucket in enumerate(self._buckets) for parameter in bucket
        }
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work | None]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    @contextlib.contextmanager
    def of_backward(self) -> Iterator[None]:
        """Around the backward pass after which gradients are averaged."""
        self._missing, self._sent = [len(bucket) for bucket in self._buckets], []
        yield
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            finish(work, flat)
            for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(mean.view_as(parameter))
        self._missing = []

    def _ready(self, parameter: Tensor) -> None:
        if not self._missing:  # gradients of this micro-batch stay here
            return
        self._missing[self._place[parameter]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        self._sent.append((flat, dist.all_reduce(flat.div_(world_size()), async_op=True)))


def _shard(network: nn.Module, device: torch.device) -> None:
    """Shards a network: each block on its own, the rest together."""
    # methods take views of the logits and change none in place, which is what this warns of at every step
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (world_size(),))
    for unit in (*_blocks(network), network):  # the root too lets go of its weights: a teacher has no backward pass
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in lists that are made of others themselves, such as a transformer's blocks."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and any(True for _ in child.children()):
            yield child
        else:
            yield from _blocks(child)

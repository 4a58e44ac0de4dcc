"""How much of a device's arithmetic a run uses."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_PEAKS = {  # TFLOP/s without sparsity: bfloat16 on tensor cores, float32 without them; the vendor's data sheets
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "V100": (0.0, 15.7),
}

_SIDES = {"cuda": 8192, "cpu": 1024}  # of matrices large enough to keep a device busy
_LONG_ENOUGH = 0.2  # seconds


@final
class FlopCounter:
    """Counts the floating-point operations of matrix products, convolutions and attention in a step.

    Attributes:
        counts: operations of a step in this process, by the shapes of its views; a multiplication and an addition
            count as two.
    """

    def __init__(self, counts: Mapping[str, int]):
        self.counts = dict(counts)

    @contextlib.contextmanager
    def counting(self, views: Sequence[Tensor]) -> Iterator[None]:
        """Counts in the block, if views of these shapes are new; what is compiled runs uncompiled then."""
        if _shapes(views) in self.counts:
            yield
            return
        with torch.compiler.set_stance("force_eager"), _Mode() as mode:
            yield
        self.counts[_shapes(views)] = mode.total

    def of(self, views: Sequence[Tensor]) -> int:
        """Operations of a step with views of these shapes."""
        return self.counts[_shapes(views)]


def _shapes(views: Sequence[Tensor]) -> str:
    return " ".join("x".join(map(str, view.shape)) for view in views)


class _Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def speed(
    line: Mapping[str, float | int | None], flops: int, batch_size: int, device: torch.device, precision: str
) -> dict[str, float]:
    """What a line of the log says about speed.

    Args:
        line: with ``images_per_s`` of all processes and ``data_wait_s`` a step.
        flops: of a step in this process.
        batch_size: images of a step, of all processes.
        device: that the run is on.
        precision: of the run.

    Returns:
        ``data_wait``, share of the time in which process 0 waited for tiles; ``tflops``, TFLOP/s of a process; and
        ``mfu``, as a share of what the device can do, where that is known.
    """
    steps_per_s = (line["images_per_s"] or 0.0) / batch_size
    said = {"data_wait": round((line["data_wait_s"] or 0.0) * steps_per_s, 4)}
    if flops:
        said["tflops"] = round(flops * steps_per_s / 1e12, 4)
        peak = peak_tflops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
        if peak:
            said["mfu"] = round(flops * steps_per_s / 1e12 / peak, 4)
    return said


def peak_tflops(device: str, precision: str) -> float | None:
    """TFLOP/s that a GPU of this name can do at most, or None if it is not known."""
    for name, (bf16, fp32) in _PEAKS.items():
        if name in device:
            return (bf16 if precision == "bf16" else fp32) or None
    return None


def measured_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second of products of large matrices, the best of a fraction of a second.

    Args:
        device: to measure.
        precision: ``"fp32"`` or ``"bf16"``.

    Returns:
        None if there is no such device here.
    """
    if device.type not in _SIDES or (device.type == "cuda" and not torch.cuda.is_available()):
        return None
    side, best, start = _SIDES[device.type], float("inf"), time.perf_counter()
    left, right, out = torch.rand(3, side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    rounds = 0
    while rounds < 2 or time.perf_counter() - start < _LONG_ENOUGH:  # the first one warms up
        _synchronise(device)
        before = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronise(device)
        best, rounds = min(best, time.perf_counter() - before), rounds + 1
    return 2 * side**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Which bags go side by side, and their reading ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.mil.model import BagBatch, Targets
from gigatome.mil.source import BagSource


def balanced(train: NDArray[np.int64], targets: Targets, random: np.random.Generator) -> NDArray[np.int64]:
    """Draws as many of ``train``, with replacement, each class as likely; classes are also told apart by ``event``."""
    rows = torch.from_numpy(train)
    kinds = targets.y.cpu()[rows].numpy()
    if targets.event is not None:
        kinds = 2 * kinds + targets.event.cpu()[rows].numpy()
    _, place, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    return random.choice(train, len(train), p=1 / (len(counts) * counts[place]))


def chunks(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cuts ``order`` into parts of ``size``, the last of which may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def packs(order: NDArray[np.int64], sizes: NDArray[np.int64], bags: int, instances: int) -> list[NDArray[np.int64]]:
    """Cuts ``order`` into runs of at most so many bags and instances, or of one bag."""
    packs: list[list[int]] = []
    room = 0
    for place, bag in enumerate(order):
        if place % bags == 0 or sizes[bag] > room:
            packs.append([])
            room = instances
        packs[-1].append(bag)
        room -= sizes[bag]
    return [np.array(pack, np.int64) for pack in packs]


def read(
    source: BagSource,
    packs: Sequence[NDArray[np.int64]],
    needs: frozenset[str],
    device: torch.device,
    draws: Callable[[int], np.random.Generator] | None = None,
    instances: int | None = None,
) -> Iterator[tuple[NDArray[np.int64], BagBatch]]:
    """The batch of each pack on the device; a thread reads the next one meanwhile.

    Args:
        source: of bags.
        packs: the bags of each batch.
        needs: as of :meth:`BagSource.batch`.
        device: where batches go.
        draws: generator of the instances of each pack, by its number.
        instances: the most of each bag; None for all.
    """

    def made(place: int) -> BagBatch:
        random = None if draws is None else draws(place)
        batch = source.batch(packs[place], random, needs, instances)
        return _pinned(batch) if device.type == "cuda" else batch

    with ThreadPoolExecutor(1, thread_name_prefix="bags") as pool:
        ahead = pool.submit(made, 0) if packs else None
        for place, pack in enumerate(packs):
            assert ahead is not None  # noqa: S101 - for the type checker
            batch = ahead.result()
            ahead = pool.submit(made, place + 1) if place + 1 < len(packs) else None
            yield pack, batch.to(device)


def _pinned(batch: BagBatch) -> BagBatch:
    """The same in memory from which a GPU copies by itself."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **pinned, omics=tuple(group.pin_memory() for group in batch.omics))

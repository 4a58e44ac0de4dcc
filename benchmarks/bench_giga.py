"""Giga-SSL's pretraining beside its authors' way of loading: ``python -m benchmarks.bench_giga``; prints JSON.

Synthetic embeddings of augmented tiles, two views of 5 tiles a slide, SimCLR of a ResNet-18's layer 4. The arms:

- the authors' style, written for this comparison: an ``.npy`` of embeddings and one of coordinates for each
  augmentation of each slide, read whole for each view, augmented by NumPy, by the workers of a ``DataLoader``;
- gigatome with its embeddings on the device, in one packed file, and in a file a slide.

``loader``: views a second of the loader alone, slide-level augmentation included. ``step``: seconds of an epoch of
training, and 1000 epochs projected from it; gigatome's is that of ``fit``. All in turn in each round; medians, and the
medians of the rounds' ratios. ``--no-files`` makes the embeddings on the device and leaves the files out, as 77 GB fit
on a large GPU and on few disks: ``python -m benchmarks.gpu giga`` does that at the scale of TCGA.
"""

import argparse
import datetime
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.output import add_write, listed, row, write_result
from gigatome.embeddings.augmented import AugmentedBag, AugmentedStore, write_augmented
from gigatome.embeddings.augmented_files import pack_augmented
from gigatome.embeddings.augmented_stream import (
    AugmentedBatch,
    AugmentedStream,
    AugmentedStreamOptions,
    ResidentTable,
    draw_epoch,
)
from gigatome.encoders.giga import GigaConfig
from gigatome.encoders.slide_zoo import SlideCard
from gigatome.selfsup.levels import SlideLevel
from gigatome.selfsup.simclr import Simclr
from gigatome.selfsup.slide_views import SlideViewOptions, slide_views
from gigatome.tiles.bench_result import machine
from gigatome.training.loop import FitOptions, Stream, fit
from gigatome.training.optim import scaled_lr
from gigatome.training.schedules import Clock

DIM, TILES, SIDE = 256, 5, 120  # of an embedding, tiles a view, cells along a slide
AUTHORS, RESIDENT, PACKED, MAPPED = "the authors' style", "on the device", "one packed file", "a file a slide"
RATE = 0.03


@dataclass(frozen=True)
class Measured:
    """What one arm reached.

    Attributes:
        arm: which.
        views_per_second: of the loader alone, median over rounds.
        loader_times: median over rounds of its rate over that of the authors' style; None without them.
        epoch_seconds: of training, median over rounds.
        step_times: median over rounds of the authors' epoch over its own.
        thousand_epochs_minutes: projected.
    """

    arm: str
    views_per_second: float
    loader_times: float | None
    epoch_seconds: float
    step_times: float | None
    thousand_epochs_minutes: float


@final
class AuthorsDataset(Dataset[Tensor]):
    """Two views of each slide, of files that are read for each."""

    def __init__(self, folder: Path, slides: int, augmentations: int):
        self.folder, self.slides, self.augmentations = folder, slides, augmentations

    def __len__(self) -> int:
        return self.slides

    def __getitem__(self, slide: int) -> Tensor:
        return torch.stack([self._view(slide) for _ in range(2)])

    def _view(self, slide: int) -> Tensor:
        draw = np.random.randint(self.augmentations)  # noqa: NPY002 - as is common in such datasets
        tiles = np.load(self.folder / "tiles" / f"{slide}" / f"{draw}.npy")
        places = np.load(self.folder / "coordinates" / f"{slide}" / f"{draw}.npy")
        chosen = np.random.randint(len(tiles), size=TILES)  # noqa: NPY002
        angle, *scale = np.random.uniform([0, 0.5, 0.5], [2 * np.pi, 2, 2])  # noqa: NPY002
        flips = np.random.choice([-1, 1], 2)  # noqa: NPY002
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        moved = (places[chosen] * flips) @ turn.T * scale
        return torch.from_numpy(np.concatenate([tiles[chosen], np.rint(moved - moved.min(0))], 1).astype(np.float32))


@final
class SyntheticStream:
    """Slides whose embeddings are made on the device, batch by batch as :class:`AugmentedStream` gives them."""

    def __init__(self, slides: int, augmentations: int, tiles: int, batch_size: int, device: str):
        self._batch, self._options = batch_size, AugmentedStreamOptions(tiles=TILES)
        self._draws, self._tiles = np.full(slides, augmentations), np.full(slides, tiles)
        self._starts = np.arange(slides) * augmentations * tiles
        embeddings = torch.empty(slides * augmentations * tiles, DIM, dtype=torch.float16, device=device)
        for part in embeddings.split(1 << 22):
            part.normal_()
        places = torch.randint(SIDE, (len(embeddings), 2), dtype=torch.float32, device=device)
        self._table = ResidentTable(embeddings, places)

    def batches(self, start_step: int = 0) -> Iterator[AugmentedBatch]:
        each = len(self._draws) // self._batch
        for epoch in itertools.count(start_step // each):
            drawn = draw_epoch(0, epoch, self._starts, self._draws, self._tiles, self._options)
            rows = torch.from_numpy(drawn.rows).to(self._table.embeddings.device)
            for place in range(max(0, start_step - epoch * each), each):
                mine = slice(place * self._batch, (place + 1) * self._batch)
                yield AugmentedBatch(epoch * each + place, self._table.images(rows[mine]), drawn.slides[mine])

    def state(self) -> dict[str, list[int]]:
        return {}

    def restore(self, state: Mapping[str, list[int]]) -> None:
        pass


def make_files(folder: Path, slides: int, augmentations: int, tiles: int) -> AugmentedStore:
    """The same embeddings for both ways of loading."""
    random = np.random.default_rng(0)
    attrs = {"patch_size": 256, "overlap": 0, "target_mpp": 1.0, "mpp_level0": 0.25}
    store = folder / "job" / "10x_256px_0px_overlap" / "augmented_synthetic"
    for slide in range(slides):
        embeddings = random.standard_normal((augmentations, tiles, DIM), np.float32).astype(np.float16)
        coords = random.integers(SIDE, size=(augmentations, tiles, 2)) * 1024
        write_augmented(store / f"{slide:05}.h5", AugmentedBag(f"{slide:05}", "synthetic", coords, embeddings, attrs))
        for kind, values in (("tiles", embeddings.astype(np.float32)), ("coordinates", coords / 1024)):
            (folder / kind / f"{slide}").mkdir(parents=True)
            for draw, part in enumerate(values):
                np.save(folder / kind / f"{slide}" / f"{draw}.npy", part)
    return AugmentedStore.open(store)


def method(options: argparse.Namespace) -> Simclr:
    """A new network; random weights, as they do not change the time."""
    config = GigaConfig(pooling="mlp", dim=16) if options.tiny else GigaConfig()
    return Simclr(SlideLevel(SlideCard("bench", config))).to(options.device)


def our_loader(stream: Stream, batches: int, device: str) -> float:
    """Views a second."""
    options, random, source = SlideViewOptions(), torch.Generator().manual_seed(0), stream.batches()
    next(source)  # loads, and starts reading ahead
    start, views = _now(device), 0
    for batch in itertools.islice(source, batches):
        images = torch.as_tensor(batch.images).to(device, non_blocking=True)
        views += sum(map(len, slide_views(images, options, random)))
    return views / (_now(device) - start)


def our_epoch(stream: Stream, options: argparse.Namespace, folder: Path) -> float:
    """Seconds of an epoch in ``fit``; the first, which warms up, and the last, which saves, do not count."""
    each, ends = options.slides // options.batch_size, []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "train" and done % each == 0:
            ends.append(_now(options.device))

    steps = each * (options.epochs + 2)
    fitting = FitOptions(
        steps=steps, epoch_images=options.slides, batch_size=options.batch_size, lr=RATE, optimizer="adam", clip=None,
        weight_decay=0.0, weight_decay_end=0.0, precision=options.precision, device=options.device, save_every=steps,
        log_every=each,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as out:
        fit(method(options), stream, fitting, Path(out) / "run", progress=progress)
    return (ends[-2] - ends[0]) / options.epochs


def authors_loader(loader: DataLoader[Tensor], epochs: int) -> float:
    """Views a second, from one epoch's first batch on to its end."""
    start, views = time.perf_counter(), 0
    for _ in range(epochs):
        for images in loader:
            views += 2 * len(images)
    return views / (time.perf_counter() - start)


def authors_epoch(loader: DataLoader[Tensor], options: argparse.Namespace) -> float:
    """Seconds of an epoch of plain training on their loader."""
    network, clock = method(options), Clock(0, 1, 1)
    optimizer = torch.optim.Adam(network.parameters(), scaled_lr(RATE, options.batch_size, "linear"), fused=True)
    start = 0.0
    for epoch in range(options.epochs + 1):
        for images in loader:
            first, second = images.to(options.device, non_blocking=True).unbind(1)
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, options.precision == "bf16"):
                loss, _ = network.loss([first, second], clock)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not epoch:
            start = _now(options.device)
    return (_now(options.device) - start) / options.epochs


def measure(options: argparse.Namespace, folder: Path) -> list[Measured]:
    """All arms in turn in each round; the first round is to warm up."""
    each = options.slides // options.batch_size
    jobs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {}
    if options.files:
        store = make_files(folder, options.slides, options.augmentations, options.tiles)
        pack_augmented(store, folder / "packed.h5")
        dataset = AuthorsDataset(folder, options.slides, options.augmentations)
        loader = DataLoader(
            dataset, options.batch_size, shuffle=True, drop_last=True, num_workers=options.workers,
            persistent_workers=options.workers > 0, pin_memory=options.device != "cpu",
        )  # fmt: skip
        jobs[AUTHORS] = lambda: authors_loader(loader, options.epochs), lambda: authors_epoch(loader, options)
        mapped = AugmentedStreamOptions(TILES, resident="mapped", threads=options.workers or 1)
        sources = {RESIDENT: (store, replace(mapped, resident="device")), PACKED: (folder / "packed.h5", mapped)}
        streams: dict[str, Any] = {
            arm: AugmentedStream(source, how, batch_size=options.batch_size, device=options.device)
            for arm, (source, how) in (sources | {MAPPED: (store, mapped)}).items()
        }
    else:
        shape = options.slides, options.augmentations, options.tiles
        streams = {RESIDENT: SyntheticStream(*shape, options.batch_size, options.device)}
    for arm, stream in streams.items():
        jobs[arm] = (
            lambda stream=stream: our_loader(stream, each * options.epochs, options.device),
            lambda stream=stream: our_epoch(stream, options, folder),
        )
    rounds = [{arm: (loader(), step()) for arm, (loader, step) in jobs.items()} for _ in range(options.rounds + 1)]
    found = {arm: [taken[arm] for taken in rounds[1:]] for arm in jobs}
    return [_summary(arm, pairs, found.get(AUTHORS)) for arm, pairs in found.items()]


def _summary(arm: str, rounds: list[tuple[float, float]], authors: list[tuple[float, float]] | None) -> Measured:
    rates, seconds = zip(*rounds, strict=True)
    pairs = list(zip(rounds, authors, strict=True)) if authors else []
    return Measured(
        arm,
        round(median(rates)),
        round(median(ours[0] / theirs[0] for ours, theirs in pairs), 1) if pairs else None,
        round(median(seconds), 4),
        round(median(theirs[1] / ours[1] for ours, theirs in pairs), 1) if pairs else None,
        round(median(seconds) * 1000 / 60, 2),
    )


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown(found: list[Measured], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Pretraining of Giga-SSL",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "See `benchmarks/bench_giga.py`. Ratios: over the authors' style, medians of rounds.",
        "",
        "| embeddings | views/s of the loader | × | s an epoch | × | min for 1000 epochs |",
        "|---|---|---|---|---|---|",
    ]
    for item in found:
        times = ["" if value is None else f"{value:g}" for value in (item.loader_times, item.step_times)]
        rate, epoch, all_ = f"{item.views_per_second:,.0f}", f"{item.epoch_seconds:g}", item.thousand_epochs_minutes
        lines.append(row([item.arm, rate, times[0], epoch, times[1], f"{all_:g}"]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--slides", type=int, default=1024)
    made.add_argument("--augmentations", type=int, default=4)
    made.add_argument("--tiles", type=int, default=256, help="of an augmentation")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--epochs", type=int, default=2, help="that are measured in each round")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--workers", type=int, default=2, help="of the DataLoader, and threads that read")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--no-files", dest="files", action="store_false", help="embeddings are made on the device")
    made.add_argument("--tiny", action="store_true", help="a few slides and a small network, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.tiny:
        options.slides, options.augmentations, options.tiles, options.batch_size = 6, 2, 8, 3
        options.epochs, options.rounds, options.workers = 1, 1, 1
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{key: getattr(options, key) for key in ("slides", "augmentations", "tiles", "batch_size", "precision")},
        **{key: getattr(options, key) for key in ("workers", "rounds")},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.write:
        write_result(options.write, "giga", markdown(found, "python -m benchmarks.bench_giga", conditions), conditions)
    return {"conditions": conditions, "measured": [vars(item) for item in found]}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

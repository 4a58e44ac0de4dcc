"""An epoch of ABMIL, gigatome's and CLAM's way: ``python -m benchmarks.bench_mil [--full] [--write]``; prints JSON.

CLAM's loop is written here in ordinary PyTorch as its authors order it: one bag at a time, read whole from its .h5,
gated attention with each operation after the other, float32, Adam, the loss fetched at every bag. gigatome's is
``fit_bags`` on the same files. Both have the same layers, learn the same bags and step as often. One epoch of each in
turn in each round, medians; ``drawn`` draws 2,048 instances of each bag anew in each epoch, which is another training.

The area under the curve is of a smaller cohort with a faint signal, learnt by each with the same number of steps, on
bags that none of them has seen, over several seeds; compared by seed, as cohorts differ more than arms do.
"""

import argparse
import datetime
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.output import add_write, listed, row, write_result
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.evaluation.metrics import auroc
from gigatome.mil.fit import BagFitOptions, fit_bags, predict_bags
from gigatome.mil.losses import cross_entropy
from gigatome.mil.model import BagModel, Targets
from gigatome.mil.source import ArrayBags, StoreBags
from gigatome.mil.zoo import bag_model
from gigatome.tiles.bench_result import machine

LR, WEIGHT_DECAY, DROPOUT, HIDDEN, ATTENTION = 2e-4, 1e-5, 0.25, 512, 256
DRAWN = 2048
ARMS = {
    "gigatome": {},
    "gigatome, bf16": {"precision": "bf16"},
    "gigatome, drawn": {"instances": DRAWN},
    "gigatome, drawn, bf16": {"instances": DRAWN, "precision": "bf16"},
}


@dataclass(frozen=True)
class Cohort:
    """Bags of known truth.

    Attributes:
        bags: how many.
        instances: of a bag, on average; a third of it either way.
        dim: size of an embedding.
        share: of the instances of a bag of class 1, that carry the signal.
        signal: its strength, in standard deviations along one direction.
    """

    bags: int
    instances: int
    dim: int
    share: float = 0.02
    signal: float = 3.0

    def make(self, number: int, seed: int = 0) -> np.ndarray:
        """Bag ``number``, float32 [n, dim]; of class ``number`` mod 2."""
        random = np.random.Generator(np.random.Philox(key=[seed, number]))
        rows = int(self.instances * random.uniform(2 / 3, 4 / 3))
        x = random.standard_normal((rows, self.dim), np.float32)
        if number % 2:
            x[random.random(rows) < self.share, :4] += self.signal / 2
        return x

    def targets(self) -> Targets:
        """The class of each."""
        return Targets(torch.arange(self.bags) % 2)


class PlainAbmil(nn.Module):
    """CLAM's attention network and classifier, one operation after another."""

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT))
        self.a = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Tanh(), nn.Dropout(DROPOUT))
        self.b = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Sigmoid(), nn.Dropout(DROPOUT))
        self.c, self.classifier = nn.Linear(ATTENTION, 1), nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        attention = F.softmax(self.c(self.a(h) * self.b(h)).transpose(1, 0), dim=1)
        return self.classifier(torch.mm(attention, h))


class PlainBags(Dataset):
    """One bag at a time, from its file or from memory."""

    def __init__(self, bags: Sequence[Path | np.ndarray], y: Tensor):
        self.bags, self.y = bags, y

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        bag = self.bags[place]
        if isinstance(bag, Path):
            with h5py.File(bag, "r") as file:
                bag = np.asarray(file["features"])
        return torch.from_numpy(bag), self.y[place]


def plain_epoch(model: PlainAbmil, optimizer: torch.optim.Optimizer, loader: DataLoader, device: str) -> float:
    """CLAM's training loop over all bags; the mean loss."""
    total = 0.0
    model.train()
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x), y)
        total += loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return total / len(loader)


def plain_loader(bags: PlainBags, device: str, seed: int = 0) -> DataLoader:
    """CLAM's: workers only where there is a GPU."""
    workers = 4 if device.startswith("cuda") else 0
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(
        bags,
        1,
        shuffle=True,
        collate_fn=lambda items: (items[0][0], items[0][1][None]),
        num_workers=workers,
        generator=shuffle,
    )


def own_model(dim: int, seed: int = 0) -> BagModel:
    """The same layers as :class:`PlainAbmil`."""
    options = {"variant": "mcat", "hidden": HIDDEN, "attention": ATTENTION, "dropout": DROPOUT, "rho": 0}
    return bag_model("abmil", dim, 2, options, seed=seed)


def own_options(device: str, epochs: int = 1, **more: Any) -> BagFitOptions:
    """CLAM's settings."""
    return BagFitOptions(epochs=epochs, lr=LR, weight_decay=WEIGHT_DECAY, device=device, **more)


def write_cohort(folder: Path, cohort: Cohort) -> EmbeddingStore:
    """The cohort's files, as gigatome writes them; made where missing."""
    files = folder / f"features_{cohort.instances}x{cohort.dim}"
    files.mkdir(parents=True, exist_ok=True)
    missing = cohort.bags - len(list(files.glob("*.h5")))
    need = 1.05 * max(0, missing) * cohort.instances * cohort.dim * 4
    if need > (room := shutil.disk_usage(files).free):
        raise SystemExit(f"{files}: {need / 1e9:.1f} GB are needed, and {room / 1e9:.1f} GB are free; name a --folder")
    for number in range(cohort.bags):
        path = files / f"bag{number:04}.h5"
        if not path.is_file():
            x = cohort.make(number)
            write_bag(path, Bag(path.stem, "bench", np.zeros((len(x), 2), np.int64), x))
    return EmbeddingStore.open(files)


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch of each arm, medians, and how often they go into those of CLAM's loop, medians of rounds."""
    cohort = Cohort(options.bags, options.instances, options.dim)
    store = write_cohort(options.folder, cohort)
    names = store.names()[: cohort.bags]
    device, targets, every = options.device, cohort.targets(), np.arange(cohort.bags)
    plain = PlainAbmil(cohort.dim).to(device)
    adam = torch.optim.Adam(plain.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loader = plain_loader(PlainBags([store.path(name) for name in names], targets.y), device)
    source = StoreBags(BagReader(store, names), [(name,) for name in names])

    def arm(settings: dict[str, Any]) -> Callable[[], object]:
        model = own_model(cohort.dim)
        return lambda: fit_bags(model, source, targets, cross_entropy(), own_options(device, **settings), train=every)

    def reading() -> None:
        for x, _ in loader:
            x.sum()

    jobs: dict[str, Callable[[], object]] = {
        "CLAM's loop": lambda: plain_epoch(plain, adam, loader, device),
        **{name: arm(settings) for name, settings in ARMS.items()},
        "CLAM's reading alone": reading,
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    used: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(options.rounds + 1):
        for name, job in jobs.items():
            start, before = _now(device), time.process_time()
            job()
            if number:  # the first round is to warm up, and brings the files into memory
                seconds[name].append(_now(device) - start)
                used[name].append(time.process_time() - before)
    base, work = seconds["CLAM's loop"], used["CLAM's loop"]
    return {
        name: {
            "seconds": round(statistics.median(taken), 3),
            "cpu_seconds": round(statistics.median(used[name]), 3),
            "times": round(statistics.median(a / b for a, b in zip(base, taken, strict=True)), 2),
            "cpu_times": round(statistics.median(a / b for a, b in zip(work, used[name], strict=True)), 2),
        }
        for name, taken in seconds.items()
    }


def measure_auroc(options: argparse.Namespace) -> dict[str, list[float]]:
    """AUROC on unseen bags of each arm, by seed."""
    first, last = options.auc_train, options.auc_train + options.auc_test
    cohort = Cohort(last, options.auc_instances, options.dim, signal=options.auc_signal)
    targets, device = cohort.targets(), options.device
    train, test = np.arange(first), np.arange(first, last)
    draws = {"instances": max(1, cohort.instances * DRAWN // 10_000)}
    found: dict[str, list[float]] = {"CLAM's loop": [], **{name: [] for name in ARMS}}
    for seed in range(options.seeds):
        bags = [cohort.make(number, seed + 1) for number in range(cohort.bags)]
        torch.manual_seed(seed)
        plain = PlainAbmil(cohort.dim).to(device)
        adam = torch.optim.Adam(plain.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        loader = plain_loader(PlainBags(bags[:first], targets.y), device, seed)
        for _ in range(options.auc_epochs):
            plain_epoch(plain, adam, loader, device)
        plain.eval()
        with torch.no_grad():
            logits = [plain(torch.from_numpy(bags[number]).to(device)).cpu()[0].numpy() for number in test]
        found["CLAM's loop"].append(_auroc(np.array(logits), test))
        source = ArrayBags(bags)
        for name, settings in ARMS.items():
            model = own_model(cohort.dim, seed)
            own = own_options(device, options.auc_epochs, **(settings | draws if "instances" in settings else settings))
            fit_bags(model, source, targets, cross_entropy(), own, train=train, seed=seed)
            found[name].append(_auroc(predict_bags(model, source, test, own).logits, test))
    return found


def differences(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Mean over seeds of each arm's AUROC less that of CLAM's loop, and the ends of its 95 % t interval."""
    made = {}
    for name, values in found.items():
        gaps = np.array(values) - found["CLAM's loop"]
        if len(gaps) > 1 and name in ARMS:
            half = float(student_t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
            made[name] = [round(float(gaps.mean() + side), 4) for side in (0.0, -half, half)]
    return made


def _auroc(logits: np.ndarray, numbers: np.ndarray) -> float:
    return round(float(auroc((numbers % 2).astype(bool), logits[:, 1] - logits[:, 0])), 4)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown(results: dict[str, Any], command: str, conditions: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# An epoch of ABMIL",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "*CLAM's loop*: a bag at a time, read whole from its .h5, float32, see `benchmarks/bench_mil.py`. gigatome's "
        f"learns the same bags from the same files; *drawn*: {DRAWN:,} instances of each bag, anew in each epoch. "
        "Medians of interleaved rounds, files in memory.",
        "",
        "| | seconds an epoch | × | CPU-seconds | × |",
        "|---|---|---|---|---|",
    ]
    for name, item in results["speed"].items():
        cells = name, f"{item['seconds']:g}", f"{item['times']:.2f}", f"{item['cpu_seconds']:g}"
        lines.append(row([*cells, f"{item['cpu_times']:.2f}"]))
    lines += [
        "",
        f"AUROC on unseen bags, {results['cohort']}. Differences from CLAM's loop: by seed, with 95 % interval.",
        "",
        "| | mean ± SD over seeds | difference |",
        "|---|---|---|",
    ]
    for name, values in results["auroc"].items():
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        gap = results["differences"].get(name)
        lines.append(row([name, spread, f"{gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f})" if gap else ""]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gigatome-bench-mil")
    made.add_argument("--full", action="store_true", help="1,000 bags: 15 GB of files, and as much memory, are needed")
    made.add_argument("--bags", type=int, default=24)
    made.add_argument("--instances", type=int, default=10_000, help="of a bag, on average")
    made.add_argument("--dim", type=int, default=384)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seeds", type=int, default=6, help="cohorts that the AUROC is measured on")
    made.add_argument("--auc-train", type=int, default=160, help="bags that each arm learns")
    made.add_argument("--auc-test", type=int, default=300, help="bags that it is asked about")
    made.add_argument("--auc-instances", type=int, default=400)
    made.add_argument("--auc-epochs", type=int, default=5)
    made.add_argument("--auc-signal", type=float, default=3.8)
    made.add_argument("--tiny", action="store_true", help="tiny cohorts, to see whether it works")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    if options.full:
        options.bags = 1000
    if options.tiny:
        options.bags, options.instances, options.rounds, options.seeds = 4, 50, 1, 2
        options.auc_train, options.auc_test, options.auc_instances, options.auc_epochs = 10, 10, 20, 1
        options.dim = 16
    conditions = {
        **machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bags": options.bags,
        "instances": options.instances,
        "dim": options.dim,
    }
    speed, found = measure_speed(options), measure_auroc(options)
    cohort = (
        f"{options.seeds} seeds, each {options.auc_train} bags of {options.auc_instances} instances to learn in "
        f"{options.auc_epochs} epochs and {options.auc_test} to be asked about"
    )
    results = {"speed": speed, "cohort": cohort, "auroc": found, "differences": differences(found)}
    if options.write:
        command = f"python -m benchmarks.bench_mil --bags {options.bags} --rounds {options.rounds}"
        write_result(options.write, "mil", markdown(results, command, conditions), conditions)
    return {"conditions": conditions, **results}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

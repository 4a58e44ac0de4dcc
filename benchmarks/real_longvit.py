"""LongViT on real tissue, small: ``python -m benchmarks.real_longvit TABLE [--write]``; prints JSON.

A small LongViT is pretrained by ``longvit/pretrain_1024`` with a smaller network, fewer steps and what keeps short runs
from collapsing (:func:`recipe`), from several seeds, and compared with the same network untrained and with colour
statistics. All embed the same regions of ``--size`` pixels, which do not overlap, as far as they hold tissue.

Heads, nearest neighbours and a linear one, have seen no region of a region's patient (see :mod:`benchmarks.left_out`).
*Neighbours of the class* are a region's 20 nearest on other slides, and those *of the slide* are of the 20 nearest of
all, as multiples of chance (see :mod:`benchmarks.real_tissue`). The encoders have seen all slides, without labels.
Intervals are over seeds and do not hold the chance of which slides there are, which is larger.

Global views have the side of a region and local views half of it, 1,024 and 256 patches by default. ``--size 512`` has
a quarter of them, for two cores and few minutes. Trainings are kept under ``--runs`` and gone on with if the script is
called again.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from benchmarks.left_out import KNN, LINEAR, left_out
from benchmarks.output import add_write, listed, row, write_result
from benchmarks.real_tissue import Samples, colour_statistics, minutes_of, neighbours, read_samples
from gigatome.core.seeding import torch_seed
from gigatome.embeddings.encoding import encode, ready
from gigatome.encoders.longvit import LongVit, LongVitConfig
from gigatome.encoders.longvit_zoo import open_longvit
from gigatome.evaluation.metrics import balanced_accuracy
from gigatome.evaluation.unsupervised import rankme
from gigatome.recipes.run import train
from gigatome.recipes.schema import PixelRecipe, load_recipe
from gigatome.slides.cohort import Cohort
from gigatome.tiles.bench_result import machine

FIGURES = {
    "knn": "kNN", "linear": "linear", "near_class": "neighbours of the class", "near_slide": "of the slide",
    "rankme": "RankMe",
}  # fmt: skip
TRAINED = "LongViT, DINO"
DIGITS = {"near_class": 2, "near_slide": 2, "rankme": 1}


@dataclass(frozen=True)
class Outcome:
    """One encoder.

    Attributes:
        arm: how it was trained.
        seed: of its training, or of its initial weights.
        knn: balanced accuracy of regions, one patient left out at a time, by nearest neighbours.
        linear: the same of a linear head.
        near_class: neighbours on other slides that are of the same class, as a multiple of chance.
        near_slide: neighbours on the same slide, as a multiple of chance.
        rankme: effective rank of the embeddings, their mean taken away.
        minutes: that the training took; None if there was none.
        ends: means of the training's first five steps and of its last: the ``loss``, and ``kl``, which is the loss
            without the entropy of the teacher's targets, as that changes too.
    """

    arm: str
    seed: int
    knn: float
    linear: float
    near_class: float
    near_slide: float
    rankme: float
    minutes: float | None = None
    ends: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def recipe(options: argparse.Namespace, seed: int) -> PixelRecipe:
    """The training: the paper's, but for its length, the network's size, and what keeps short runs from collapsing."""
    config = network(options)
    sizes = [f"encoder.{key}={getattr(config, key)}" for key in ("patch_size", "dim", "depth", "heads", "ffn_dim")]
    settings = [
        *sizes, f"encoder.grid={config.grid}", f"tiles.tile_size={options.size * 3 // 2}", f"tiles.mpp=[{options.mpp}]",
        "tiles.min_tissue=0.4", "tiles.max_enlargement=2", "tiles.threads=2", f"dino.views.global_size={options.size}",
        f"dino.views.local_size={options.size // 2}", f"dino.views.local_views={options.local_views}",
        "dino.views.quarter_turns=true", "dino.views.hed_probability=0.8", "dino.views.hed=0.1",
        "dino.views.blur=[0.3, 0.1, 0.3]", "dino.views.solarize=[0, 0, 0]", "dino.out_dim=256",
        "dino.head_hidden_dim=512", "dino.head_bottleneck_dim=128", "dino.head_batch_norm=true",
        "dino.freeze_last_layer_epochs=0", "dino.drop_path=0.0", "dino.teacher_temperature_start=0.02",
        "dino.teacher_temperature=0.02", "dino.teacher_momentum=0.98", "fit.epochs=null", f"fit.steps={options.steps}",
        "fit.warmup_epochs=null", f"fit.warmup_steps={options.steps // 10}", f"fit.batch_size={options.batch_size}",
        f"fit.lr={options.lr}", "fit.lr_scaling=none", "fit.weight_decay_end=0.1", "fit.save_every=20",
        "fit.log_every=5", f"fit.precision={options.precision}", f"fit.device={options.device}", f"fit.seed={seed}",
    ]  # fmt: skip
    made = load_recipe("longvit/pretrain_1024", settings)
    assert isinstance(made, PixelRecipe)
    return made


def network(options: argparse.Namespace) -> LongVitConfig:
    """The network of all arms; its segments are those of 1024 px, as of the paper's."""
    return LongVitConfig(
        patch_size=options.patch_size, dim=options.dim, depth=options.depth, heads=options.heads,
        ffn_dim=4 * options.dim, grid=options.size // options.patch_size, pos_embed="dino",
    )  # fmt: skip


def pretrain(options: argparse.Namespace, cohort: Cohort, seed: int) -> Path:
    """The folder of a finished training."""
    folder = options.runs / f"longvit-seed{seed}"
    run = train(recipe(options, seed), cohort, folder, resume=True, job=options.runs / "job")
    if not run.finished:
        raise SystemExit(f"stopped at step {run.step}; the same command goes on")
    return folder


def first_and_last(folder: Path) -> dict[str, tuple[float, float]]:
    """What :attr:`Outcome.ends` says, from a training's record."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: (records[0][name], records[-1][name]) for name in ("loss", "kl")}


def outcomes(options: argparse.Namespace, cohort: Cohort, samples: Samples) -> Iterator[Outcome]:
    """Trains and judges."""
    yield judge(samples, colour_statistics(samples.images), "colour statistics", 0)
    for seed in range(options.untrained_seeds):
        torch.manual_seed(torch_seed(seed, "encoder"))
        untrained = LongVit(network(options)).eval()
        yield judge(samples, embedded(untrained, samples.images, options.device), "untrained", seed)
    for seed in range(options.seeds):
        folder = pretrain(options, cohort, seed)
        x = embedded(open_longvit(folder)[0], samples.images, options.device)
        yield replace(
            judge(samples, x, TRAINED, seed), minutes=minutes_of(folder, options.batch_size),
            ends=first_and_last(folder),
        )  # fmt: skip


def judge(samples: Samples, x: NDArray[np.float32], arm: str, seed: int) -> Outcome:
    """What embeddings [N, D] of the regions are good for."""
    y, (near_class, near_slide) = samples.target[samples.slide], neighbours(samples, x)
    knn, linear = (balanced_accuracy(y, left_out(samples, x, probe)) for probe in (KNN, LINEAR))
    return Outcome(arm, seed, knn, linear, near_class, near_slide, rankme(x - x.mean(0)))


def embedded(encoder: LongVit, images: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """Embeddings [N, dim]."""
    with ready(encoder, device):
        parts = [
            encode(encoder, images[at : at + 8], device=device, precision="fp32") for at in range(0, len(images), 8)
        ]
    return torch.cat(parts).cpu().numpy()


def summary(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each arm: mean and deviation over seeds, and by how much it differs from untrained, with the 95 % interval."""
    rows, untrained = [], [item for item in found if item.arm == "untrained"]
    for arm in dict.fromkeys(item.arm for item in found):
        members = [item for item in found if item.arm == arm]
        minutes = [item.minutes for item in members if item.minutes is not None]
        line: dict[str, Any] = {"arm": arm, "seeds": len(members), "minutes": sum(minutes) / max(1, len(minutes))}
        for name in FIGURES:
            values, base = ([getattr(item, name) for item in group] for group in (members, untrained))
            line[name] = statistics.mean(values)
            line[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            if arm != "untrained" and min(len(values), len(base)) > 1:
                interval = stats.ttest_ind(values, base, equal_var=False).confidence_interval()
                line[f"{name}_gain"] = [float(interval.low), float(interval.high)]
        rows.append(line)
    return rows


def markdown(rows: Sequence[dict[str, Any]], found: Sequence[Outcome], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    trained = [item for item in found if item.arm == TRAINED]
    lines = [
        "# LongViT on real tissue",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "*kNN*, *linear*: balanced accuracy of regions, one patient left out at a time. *neighbours*: those on other",
        "slides that are of a region's class, and those on its own slide, as multiples of chance. Mean ± standard",
        "deviation over seeds; in brackets the 95 % interval of the difference from untrained (Welch's t). More:",
        "`benchmarks/real_longvit.py`.",
        "",
        row(["encoder", "seeds", *FIGURES.values(), "minutes of training"]),
        row(["---"] * (len(FIGURES) + 3)),
    ]
    for line in rows:
        minutes = f"{line['minutes']:.1f}" if line["minutes"] else "–"
        lines.append(row([line["arm"], str(line["seeds"]), *(_cell(line, name) for name in FIGURES), minutes]))
    spans = {
        name: " to ".join(
            f"{statistics.mean(at):.2f}" for at in zip(*(item.ends[name] for item in trained), strict=True)
        )
        for name in ("loss", "kl")
    }
    lines += [
        "",
        f"Loss {spans['loss']} from the first five steps to the last, without the teacher's entropy {spans['kl']}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(line: dict[str, Any], name: str) -> str:
    digits, deviation, gain = DIGITS.get(name, 3), line[f"{name}_sd"], line.get(f"{name}_gain")
    text = f"{line[name]:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
    return text if gain is None else f"{text} [{gain[0]:+.{digits}f}, {gain[1]:+.{digits}f}]"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("table", help="cohort, such as a CSV of slides, patients and labels")
    made.add_argument("--target", default="organ")
    made.add_argument("--runs", type=Path, default=Path("runs/real_longvit"))
    made.add_argument("--size", type=int, default=1024, help="side of regions and global views in pixels")
    made.add_argument("--mpp", type=float, default=0.5)
    made.add_argument("--patch-size", type=int, default=32)
    made.add_argument("--dim", type=int, default=128)
    made.add_argument("--depth", type=int, default=4)
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--local-views", type=int, default=4)
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--seeds", type=int, default=2, help="of training")
    made.add_argument("--untrained-seeds", type=int, default=5)
    made.add_argument("--regions-per-slide", dest="tiles_per_slide", type=int, default=100, help="at most, judged by")
    made.add_argument("--device", default="cpu")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the training")
    add_write(made)
    return made


def main() -> None:
    options = parser().parse_args()
    options.tile_size = options.size
    cohort = Cohort.read(options.table)
    samples = read_samples(options, cohort)
    found = []
    for outcome in outcomes(options, cohort, samples):
        found.append(outcome)
        print(json.dumps(asdict(outcome)), flush=True)
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__, "slides": len(samples.target),
        "regions": len(samples.slide), "of px": options.size, "mpp": options.mpp,
        "patches": (options.size // options.patch_size) ** 2, "dim": options.dim, "blocks": options.depth,
        "steps": options.steps, "batch": options.batch_size, "chance": round(1 / len(samples.classes), 3),
    }  # fmt: skip
    rows = summary(found)
    print(json.dumps({"conditions": conditions, "summary": rows}, indent=2))
    if options.write:
        command = (
            f"python -m benchmarks.real_longvit … --size {options.size} --mpp {options.mpp:g} --steps {options.steps} "
            f"--seeds {options.seeds}"
        )
        write_result(options.write, "longvit-tissue", markdown(rows, found, command, conditions), conditions)


if __name__ == "__main__":
    main()

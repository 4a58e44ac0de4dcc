"""Whether self-supervision learns on real tissue: ``python -m benchmarks.real_tissue TABLE [--write]``; prints JSON.

Trains a vision transformer on the slides of a table with DINO at one resolution, with DINO at several, and with DINOv2,
each from several seeds, and compares them with the same networks untrained, with plain colour statistics and, if a file
is at hand, with ImageNet weights. All see the same tiles, as many of each slide, at the resolution of the first arm;
an embedding is the class token. The encoders have seen all slides, without labels. Two questions are put to them:

*One patient left out.* Heads learn the target from the tiles of all patients but one and are tested on that one's.
Nothing of a tested patient is among what a head has seen, so stain and scanner do not help; this is the hard question.
With two to four slides a class it has to be asked with care:

- Leaving a patient out makes its class rarer. Both heads therefore weigh classes alike (the linear one in its loss, kNN
  in its votes); otherwise a head that learns nothing scores far below chance.
- Tiles of a slide are no independent samples: the linear head has a strong penalty (C = 0.01, standardised features).
- kNN takes 20 neighbours by cosine, of features standardised on its training tiles: embeddings of an untrained network
  point nearly all in one direction, and their raw cosines say little.
- Figures are means over classes of the share of tiles, or of slides by the mean of their tiles' probabilities, that
  are right; that of tiles says more, as slides are few.

*Halves.* A linear head learns on the left part of every slide which of the slides a tile is of, and is tested on the
right part, with at least a tile between. That shows what an encoder sees of tissue without the change from slide to
slide. In colour the stain gives a slide away, so it is asked in grey too, where only form is left.

*Neighbours*: of a tile's 20 nearest on other slides, how many are of its class; and of the 20 nearest of all, how many
are of its own slide. Both are multiples of what chance would give. Intervals are over seeds, of training and of initial
weights. They do not hold the chance of which slides there are, which is larger.

Trainings are kept under ``--runs`` and gone on with if the script is called again. On a GPU::

    python -m benchmarks.real_tissue TABLE --device cuda --encoder vit_small_patch16_224 --tile-size 224 --steps 500
"""

import argparse
import datetime
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.left_out import KNN, LINEAR, Labelled, left_out
from benchmarks.output import add_write, listed, row, write_result
from gigatome.core.extras import require
from gigatome.core.job import Job
from gigatome.core.seeding import generator, torch_seed
from gigatome.embeddings.encoding import encode, ready
from gigatome.embeddings.reading import SlideTiles
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import load_encoder
from gigatome.evaluation.metrics import balanced_accuracy
from gigatome.evaluation.probes import fit_predict
from gigatome.evaluation.unsupervised import rankme
from gigatome.recipes.run import train
from gigatome.recipes.schema import Recipe, load_recipe
from gigatome.selfsup.dinov2 import Dinov2Options
from gigatome.slides.cohort import Cohort
from gigatome.tiles.bench_result import machine
from gigatome.tiles.grid import GridOptions, tile_cohort

SMALL = "small"
VIEWS = [
    "local_views=4", "global_scale=[0.4, 1.0]", "local_scale=[0.1, 0.4]", "hed_probability=0.5", "brightness=0.3",
    "contrast=0.3", "saturation=0.2", "hue=0.1", "grayscale=0.3", "blur=[0.3, 0.1, 0.3]",
]  # fmt: skip
FIGURES = {
    "linear": "linear", "knn": "kNN", "linear_slides": "linear, slides", "halves": "halves",
    "halves_grey": "halves, grey", "near_class": "neighbours of the class", "near_slide": "of the slide",
    "rankme": "RankMe",
}  # fmt: skip


@dataclass(frozen=True)
class Samples(Labelled):
    """The tiles that encoders are judged by, as many of each slide as there are or are wanted.

    Attributes:
        images: uint8 [N, size, size, 3].
        left: [N], left edge in tiles' sides from the middle tile of the slide.
    """

    images: NDArray[np.uint8]
    left: NDArray[np.float64]

    @cached_property
    def grey(self) -> NDArray[np.uint8]:
        """The tiles without their colour."""
        luma = (self.images @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
        return np.repeat(luma[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Outcome:
    """One encoder.

    Attributes:
        arm: how it was trained.
        seed: of its training, or of its initial weights.
        minutes: that the training took; None if there was none.
        linear: balanced accuracy of tiles, one patient left out at a time.
        knn: the same of kNN.
        linear_slides: the same of slides, by the mean of their tiles' probabilities.
        halves: accuracy of telling the slides apart, from left parts to right ones.
        halves_grey: the same without colour.
        near_class: neighbours on other slides that are of the same class, as a multiple of chance.
        near_slide: neighbours on the same slide, as a multiple of chance.
        rankme: effective rank of the embeddings, their mean taken away.
    """

    arm: str
    seed: int
    minutes: float | None
    linear: float
    knn: float
    linear_slides: float
    halves: float
    halves_grey: float
    near_class: float
    near_slide: float
    rankme: float


def read_samples(options: argparse.Namespace, cohort: Cohort) -> Samples:
    """Reads the tiles that encoders are judged by."""
    grid = GridOptions(tile_size=options.tile_size, mpp=options.mpp)
    grids, _ = tile_cohort(cohort, Job(options.runs / "job"), options=grid)
    labels = cohort.column(options.target)
    slides = [slide for slide in cohort if slide.name in grids and slide.name in labels]
    classes = tuple(sorted({labels[slide.name] for slide in slides}))
    images, numbers, left = [], [], []
    for number, slide in enumerate(slides):
        lattice = grids[slide.name]
        count = min(options.tiles_per_slide, len(lattice))
        chosen = np.sort(generator(0, "tiles", slide.name).choice(len(lattice), count, replace=False))
        tiles = SlideTiles(slide, lattice)
        images += [tile for k in chosen if (tile := tiles.read(int(k))) is not None]
        tiles.close()
        if tiles.error is not None:
            raise tiles.error
        x = lattice.coords[:, 0] / lattice.side
        left.append(x[chosen] - np.median(x))
        numbers += [number] * count
    return Samples(
        images=np.stack(images),
        slide=np.array(numbers),
        left=np.concatenate(left),
        target=np.array([classes.index(labels[slide.name]) for slide in slides]),
        patients=tuple(slide.patient for slide in slides),
        classes=classes,
    )


def recipes(options: argparse.Namespace) -> dict[str, Recipe]:
    """The trainings that are compared."""
    size, mpp = options.tile_size, options.mpp
    settings = [
        f"tiles.tile_size={size * 3 // 2}", f"tiles.mpp=[{mpp}]", f"tiles.threads={min(16, os.cpu_count() or 1)}",
        *(f"dino.views.{view}" for view in [*VIEWS, *options.views]), f"dino.views.global_size={size}",
        f"dino.views.local_size={size * 3 // 112 * 16}", f"dino.out_dim={options.prototypes}",
        f"fit.steps={options.steps}", f"fit.warmup_steps={options.steps // 10}", f"fit.batch_size={options.batch_size}",
        f"fit.device={options.device}", f"fit.lr={options.lr}", "fit.precision=bf16", "fit.save_every=200",
    ]  # fmt: skip
    one = replace(load_recipe("demo/dino_vit_mini", settings), encoder=encoder_config(options))
    several = replace(one, tiles=replace(one.tiles, mpp=(mpp / 2, mpp, 2 * mpp)))
    assert one.dino is not None
    dinov2 = Dinov2Options(
        views=one.dino.views, out_dim=options.prototypes, head_hidden_dim=512, head_bottleneck_dim=128,
        head_batch_norm=True, freeze_last_layer_epochs=0, drop_path=0.0, layer_decay=1.0, patch_embed_lr=1.0,
        centering="sinkhorn_knopp", teacher_temperature_start=0.02, teacher_temperature=0.02,
        teacher_temperature_warmup_epochs=0, teacher_momentum=one.dino.teacher_momentum,
    )  # fmt: skip
    resolutions = f"{mpp / 2:g}, {mpp:g} and {2 * mpp:g} mpp"
    return {
        f"DINO, {mpp:g} mpp": one,
        f"DINO, {resolutions}": several,
        f"DINOv2, {resolutions}": replace(several, method="dinov2", dino=None, dinov2=dinov2),
    }


def encoder_config(options: argparse.Namespace) -> EncoderConfig:
    """The network of all arms."""
    if options.encoder == SMALL:
        return EncoderConfig("vit_tiny_patch16_224", image_size=options.tile_size, depth=4)
    return EncoderConfig(options.encoder, image_size=options.tile_size)


def encoders(options: argparse.Namespace, cohort: Cohort) -> Iterator[tuple[str, int, TileEncoder, float | None]]:
    """Every encoder, with its arm, its seed, and the minutes of its training."""
    if options.imagenet:
        yield "ImageNet weights", 0, load_encoder(options.imagenet), None
    for seed in range(options.untrained_seeds):
        yield "untrained", seed, build_encoder(encoder_config(options), seed=torch_seed(seed, "encoder")), None
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, recipe in recipes(options).items():
            seeded = replace(recipe, fit=replace(recipe.fit, seed=seed))
            folder = options.runs / f"{arm.lower().replace(', ', '-').replace(' ', '-')}-seed{seed}"
            run = train(seeded, cohort, folder, resume=True, job=options.runs / "job")
            if not run.finished:
                raise SystemExit(f"stopped at step {run.step}; the same command goes on")
            yield arm, seed, run.encoder, minutes_of(folder, options.batch_size)


def minutes_of(folder: Path, batch_size: int) -> float:
    """How long a training took, interruptions left out, by its record."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    speed = {record["step"]: record["images_per_s"] for record in records}  # the last word on each step
    steps = np.diff([0, *speed])
    return float(np.sum(steps * batch_size / np.array(list(speed.values())))) / 60


def embedded(encoder: TileEncoder, images: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """Embeddings [N, D]."""
    with ready(encoder, device):
        parts = [
            encode(encoder, images[at : at + 64], device=device, precision="bf16") for at in range(0, len(images), 64)
        ]
    return torch.cat(parts).cpu().numpy()


def colour_statistics(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean and deviation of each channel [N, 6]."""
    return np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1).astype(np.float32)


def halves(samples: Samples, x: NDArray[np.float32]) -> float:
    """Balanced accuracy of telling the slides apart, from the left parts to the right ones."""
    known, tested = samples.left <= -1, samples.left >= 1
    p = fit_predict(LINEAR, x[known], samples.slide[known], x[tested], len(samples.patients))
    return balanced_accuracy(samples.slide[tested], p)


def neighbours(samples: Samples, x: NDArray[np.float32]) -> tuple[float, float]:
    """Neighbours of the same class on other slides, and neighbours on the same slide, as multiples of chance."""
    units = (x - x.mean(0)) / (x.std(0) + 1e-9)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosine, own = units @ units.T, samples.slide[:, None] == samples.slide
    y, shares = samples.target[samples.slide], []
    for same, allowed in ((y[:, None] == y, ~own), (own, ~np.eye(len(x), dtype=bool))):
        near = np.argsort(np.where(allowed, -cosine, np.inf), axis=1)[:, : KNN.k]
        found = np.take_along_axis(same, near, axis=1).mean()
        shares.append(float(found / ((same & allowed).sum(1) / allowed.sum(1)).mean()))
    return shares[0], shares[1]


def judge(samples: Samples, x: NDArray[np.float32], grey: NDArray[np.float32], arm: str, seed: int) -> Outcome:
    """What embeddings [N, D] of the tiles, and of the same in grey, are good for."""
    y, linear = samples.target[samples.slide], left_out(samples, x, LINEAR)
    near_class, near_slide = neighbours(samples, x)
    slides = np.stack([linear[samples.slide == k].mean(0) for k in range(len(samples.target))])
    return Outcome(
        arm=arm,
        seed=seed,
        minutes=None,
        linear=balanced_accuracy(y, linear),
        knn=balanced_accuracy(y, left_out(samples, x, KNN)),
        linear_slides=balanced_accuracy(samples.target, slides),
        halves=halves(samples, x),
        halves_grey=halves(samples, grey),
        near_class=near_class,
        near_slide=near_slide,
        rankme=rankme(x - x.mean(0)),
    )


def outcomes(options: argparse.Namespace, cohort: Cohort) -> Iterator[Outcome]:
    """Trains and judges."""
    samples = read_samples(options, cohort)
    yield judge(samples, colour_statistics(samples.images), colour_statistics(samples.grey), "colour statistics", 0)
    for arm, seed, encoder, minutes in encoders(options, cohort):
        x, grey = (embedded(encoder, images, options.device) for images in (samples.images, samples.grey))
        yield replace(judge(samples, x, grey, arm, seed), minutes=minutes)


def summary(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each arm: mean and standard deviation over seeds, and by how much it differs from the untrained networks.

    A difference is given with its 95 % interval by Welch's t.
    """
    stats = require("scipy.stats", "learn", "compare encoders")
    untrained, rows = [item for item in found if item.arm == "untrained"], []
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
                line[f"{name}_gain"] = [line[name] - statistics.mean(base), float(interval.low), float(interval.high)]
        rows.append(line)
    return rows


def markdown(rows: Sequence[dict[str, Any]], command: str, conditions: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Self-supervision on real tissue",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "*linear*, *kNN*: balanced accuracy of tiles, one patient left out at a time; *slides*: of slides, by the mean",
        "of their tiles' probabilities. *halves*: telling the slides apart, from the left part of each to the right",
        "one, in colour and in grey. *neighbours*: those on other slides that are of a tile's class, and those on its",
        "own slide, as multiples of chance. Mean ± standard deviation over seeds. More: `benchmarks/real_tissue.py`.",
        "",
        row(["encoder", "seeds", *FIGURES.values(), "minutes of training"]),
        row(["---"] * (len(FIGURES) + 3)),
    ]
    for line in rows:
        cells = [line["arm"], str(line["seeds"])]
        for name in FIGURES:
            digits = 1 if name == "rankme" else 2 if name.startswith("near") else 3
            deviation = line[f"{name}_sd"]
            cells.append(f"{line[name]:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}"))
        lines.append(row([*cells, f"{line['minutes']:.1f}" if line["minutes"] else "–"]))
    if compared := [line for line in rows if "linear_gain" in line]:
        shown = [name for name in FIGURES if name != "rankme"]
        lines += ["", "More than untrained, with the 95 % interval over seeds (Welch's t):", ""]
        lines += [row(["encoder", *(FIGURES[name] for name in shown)]), row(["---"] * (len(shown) + 1))]
        for line in compared:
            gains = [line[f"{name}_gain"] for name in shown]
            lines.append(row([line["arm"], *(f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" for gain, low, high in gains)]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("table", help="cohort, such as a CSV of slides, patients and labels")
    parser.add_argument("--target", default="organ")
    parser.add_argument("--runs", type=Path, default=Path("runs/real_tissue"))
    parser.add_argument("--encoder", default=SMALL, help="a timm vision transformer; small: four blocks of ViT-Tiny")
    parser.add_argument("--tile-size", type=int, default=112, help="side of tiles and of global views in pixels")
    parser.add_argument("--mpp", type=float, default=1.0, help="resolution that encoders are judged at")
    parser.add_argument("--views", nargs="*", default=[], help="changes of the views, such as hed=0.1 hue=0.2")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--prototypes", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--untrained-seeds", type=int, default=5)
    parser.add_argument("--tiles-per-slide", type=int, default=100, help="that encoders are judged by")
    parser.add_argument("--imagenet", help="an encoder with ImageNet weights, as gigatome embed takes it")
    parser.add_argument("--device", default="cpu")
    add_write(parser)
    options = parser.parse_args()
    cohort = Cohort.read(options.table)
    found = []
    for outcome in outcomes(options, cohort):
        found.append(outcome)
        print(json.dumps(asdict(outcome)), flush=True)
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__, "slides": len(cohort),
        "encoder": options.encoder, "tiles of px": options.tile_size, "mpp": options.mpp, "steps": options.steps,
        "batch": options.batch_size, "chance": round(1 / len(set(cohort.column(options.target).values())), 3),
        "chance of halves": round(1 / len(cohort), 3),
    }  # fmt: skip
    rows = summary(found)
    print(json.dumps({"conditions": conditions, "summary": rows}, indent=2))
    if options.write:
        first = f" --first-seed {options.first_seed}" if options.first_seed else ""
        views = f" --views {' '.join(options.views)}" if options.views else ""
        command = f"python -m benchmarks.real_tissue … --steps {options.steps} --seeds {options.seeds}{first}{views}"
        write_result(options.write, "tissue", markdown(rows, command, conditions), conditions)


if __name__ == "__main__":
    main()

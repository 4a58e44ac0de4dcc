"""Whether self-supervision learns on real tissue: ``python -m benchmarks.real_tissue TABLE [--write]``; prints JSON.

Trains a small vision transformer on the slides of a table with DINO at one resolution, with DINO at several, and with
DINOv2, each from several seeds, and compares them with the same networks untrained and, if a file is at hand, with
ImageNet weights. All embed the same tiles, which a linear and a kNN head classify by the target, one patient left out
at a time: no tile of a tested slide, nor of its patient, is among those that the head has seen. The encoders have seen
all slides, without labels. Leaving one of a class's few patients out makes that class rarer in training, so that a head
that learns nothing scores below chance; compare with the untrained rows.

Trainings are kept under ``--runs`` and gone on with if the script is called again.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import add_write, listed, write_result
from gigatome.core.seeding import torch_seed
from gigatome.embeddings.extract import embed
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import load_encoder
from gigatome.evaluation.protocol import evaluate
from gigatome.recipes.run import train
from gigatome.recipes.schema import Recipe, load_recipe
from gigatome.selfsup.dinov2 import Dinov2Options
from gigatome.slides.cohort import Cohort
from gigatome.tiles.bench_result import machine

TILE, MPP = 112, 0.5
ENCODER = EncoderConfig(model="vit_tiny_patch16_224", image_size=TILE, depth=6)
DINO = [
    "tiles.tile_size=160", "tiles.mpp=[0.5]", f"dino.views.global_size={TILE}", "dino.views.local_size=48",
    "dino.out_dim=2048", "dino.views.hed_probability=0.5", "fit.precision=bf16", "fit.save_every=200",
    "fit.warmup_steps=100",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One encoder.

    Attributes:
        arm: how it was trained.
        seed: of its training.
        minutes: that the training took; None if it was not trained now.
        linear: balanced accuracy of tiles, one patient left out at a time.
        knn: the same of kNN.
        linear_slides: of slides, by the mean of their tiles' probabilities.
    """

    arm: str
    seed: int
    minutes: float | None
    linear: float
    knn: float
    linear_slides: float


def recipes(steps: int, batch_size: int, device: str) -> dict[str, Recipe]:
    """The trainings that are compared."""
    common = [*DINO, f"fit.steps={steps}", f"fit.batch_size={batch_size}", f"fit.device={device}"]
    one = replace(load_recipe("demo/dino_vit_mini", common), encoder=ENCODER)
    several = replace(one, tiles=replace(one.tiles, mpp=(0.5, 1.0, 2.0)))
    assert one.dino is not None
    dinov2 = Dinov2Options(
        views=one.dino.views, out_dim=2048, head_hidden_dim=512, head_bottleneck_dim=128,
        head_batch_norm=True, freeze_last_layer_epochs=0, drop_path=0.0, teacher_temperature_start=0.04,
        teacher_temperature=0.04, teacher_temperature_warmup_epochs=0, teacher_momentum=0.98,
    )  # fmt: skip
    return {
        "DINO, 0.5 mpp": one,
        "DINO, 0.5, 1 and 2 mpp": several,
        "DINOv2, 0.5, 1 and 2 mpp": replace(several, method="dinov2", dino=None, dinov2=dinov2),
    }


def encoders(options: argparse.Namespace, cohort: Cohort) -> Iterator[tuple[str, int, TileEncoder, float | None]]:
    """Every encoder, with its arm, its seed, and the minutes of its training."""
    if options.imagenet:
        yield "ImageNet weights", 0, load_encoder(options.imagenet), None
    arms = recipes(options.steps, options.batch_size, options.device)
    for seed in range(options.seeds):
        yield "untrained", seed, build_encoder(ENCODER, seed=torch_seed(seed, "encoder")).eval(), None
        for arm, recipe in arms.items():
            seeded = replace(recipe, fit=replace(recipe.fit, seed=seed))
            folder = options.runs / f"{arm.lower().replace(', ', '-').replace(' ', '-')}-seed{seed}"
            began = time.perf_counter()
            run = train(seeded, cohort, folder, resume=True, job=options.runs / "job")
            yield arm, seed, run.encoder, (time.perf_counter() - began) / 60


def judge(options: argparse.Namespace, cohort: Cohort, arm: str, seed: int, encoder: TileEncoder) -> Outcome:
    """Embeds the tiles of all slides and classifies them."""
    store = embed(
        cohort,
        encoder=encoder,
        out=options.runs / "job",
        tile_size=TILE,
        mpp=MPP,
        device=options.device,
        threads=2,
        precision="bf16",
    )
    results = {
        head: evaluate(
            store, cohort, target=options.target, head=head, folds="patient", level="tile",
            tiles_per_slide=options.tiles_per_slide, resamples=200,
        )
        for head in ("linear", "knn")
    }  # fmt: skip
    accuracy = {head: result.scores.balanced_accuracy for head, result in results.items()}
    slides = results["linear"].by_slide["mean"].balanced_accuracy
    return Outcome(arm, seed, None, accuracy["linear"], accuracy["knn"], slides)


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, of each arm."""
    rows = []
    for arm in dict.fromkeys(item.arm for item in outcomes):
        members = [item for item in outcomes if item.arm == arm]
        row: dict[str, Any] = {"arm": arm, "seeds": len(members)}
        for name in ("linear", "knn", "linear_slides"):
            values = [getattr(item, name) for item in members]
            row[name] = round(statistics.mean(values), 3)
            row[f"{name}_sd"] = round(statistics.stdev(values), 3) if len(values) > 1 else None
        minutes = [item.minutes for item in members if item.minutes is not None]
        row["minutes"] = round(statistics.mean(minutes), 1) if minutes else None
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Self-supervision on real tissue",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Balanced accuracy of tiles, one patient left out at a time; mean ± standard deviation over seeds of training.",
        "*slides*: of slides, by the mean of their tiles' probabilities. `benchmarks/real_tissue.py` says more.",
        "",
        "| encoder | seeds | linear | kNN | linear, slides | minutes of training |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[name]:.3f}" + ("" if row[f"{name}_sd"] is None else f" ± {row[f'{name}_sd']:.3f}")
            for name in ("linear", "knn", "linear_slides")
        ]
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:g}"
        lines.append(f"| {row['arm']} | {row['seeds']} | {' | '.join(cells)} | {minutes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("table", help="cohort, such as a CSV of slides, patients and labels")
    parser.add_argument("--target", default="organ")
    parser.add_argument("--runs", type=Path, default=Path("runs/real_tissue"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiles-per-slide", type=int, default=300, help="that the heads learn from")
    parser.add_argument("--imagenet", help="an encoder with ImageNet weights, as gigatome embed takes it")
    parser.add_argument("--device", default="cpu")
    add_write(parser)
    options = parser.parse_args()
    cohort = Cohort.read(options.table)
    outcomes = []
    for arm, seed, encoder, minutes in encoders(options, cohort):
        outcomes.append(replace(judge(options, cohort, arm, seed, encoder), minutes=minutes))
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__, "slides": len(cohort),
        "steps": options.steps, "batch": options.batch_size, "encoder": "ViT of 6 blocks of 192, patches of 16 px",
    }  # fmt: skip
    rows = summary(outcomes)
    print(json.dumps({"conditions": conditions, "summary": rows}, indent=2))
    if options.write:
        command = f"python -m benchmarks.real_tissue … --steps {options.steps} --seeds {options.seeds}"
        write_result(options.write, "tissue", markdown(rows, command, conditions), conditions)


if __name__ == "__main__":
    main()

"""HIPT's chain on real tissue, small: ``python -m benchmarks.real_hipt TABLE [--write]``; prints JSON.

Stage 1: DINO on tiles of the slides. Then grids of tile embeddings, stage 2: DINO on the grids, and region embeddings.
Each region is classified by its nearest neighbours among the regions of other patients (20 by cosine, of standardised
features, classes weighed alike; see :mod:`benchmarks.real_tissue`), from the mean embedding of its tiles, from its
region embedding, from both, and from region embeddings by encoders that were not trained. The encoders have seen all
slides, without labels. Intervals over seeds of stage 2 do not hold the chance of which slides there are.

Everything is kept under ``--runs`` and gone on with if the script is called again. On a GPU::

    python -m benchmarks.real_hipt TABLE --device cuda --stage1-steps 5000 --stage2-steps 5000
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.left_out import KNN, Labelled, left_out
from benchmarks.output import add_write, listed, row, write_result
from gigatome.embeddings.encoding import encode_grids
from gigatome.embeddings.extract_regions import embed_regions
from gigatome.embeddings.regions import RegionBag, read_regions
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import open_region_encoder
from gigatome.evaluation.metrics import balanced_accuracy
from gigatome.recipes.run import train
from gigatome.recipes.schema import load_recipe
from gigatome.slides.cohort import Cohort
from gigatome.tiles.bench_result import machine
from gigatome.tiles.regions import RegionOptions

TILE, MPP = 128, 0.5
CONFIG = RegionVitConfig(input_dim=128, dim=96, depth=4, heads=4)


def stage1(options: argparse.Namespace, cohort: Cohort) -> Path:
    """The folder of a small tile encoder, trained here unless one is given."""
    if options.encoder:
        return options.encoder
    settings = [
        "encoder.image_size=112", "encoder.pos_embed=dino", f"tiles.tile_size={TILE}", f"tiles.mpp=[{MPP}]",
        "dino.views.global_size=112", "dino.views.local_size=48", f"fit.steps={options.stage1_steps}",
        "fit.warmup_steps=100", "fit.batch_size=48", "fit.precision=bf16", f"fit.device={options.device}",
    ]  # fmt: skip
    return train(load_recipe("demo/dino_vit_mini", settings), cohort, options.runs / "stage1", resume=True).folder


def stage2(options: argparse.Namespace, grids: EmbeddingStore, seed: int) -> RegionVit:
    """A small region encoder, trained on the grids."""
    sizes = [f"encoder.{key}={getattr(CONFIG, key)}" for key in ("input_dim", "dim", "depth", "heads")]
    settings = [
        *sizes, f"fit.steps={options.stage2_steps}", f"fit.warmup_steps={options.stage2_steps // 10}",
        "fit.batch_size=32", "fit.lr=1e-3", "fit.lr_scaling=none", f"fit.device={options.device}",
        f"fit.seed={seed}", "dino.views.local_views=4",
        "fit.weight_decay_end=0.1", "dino.out_dim=256", "dino.head_hidden_dim=512", "dino.head_bottleneck_dim=128",
        "dino.head_batch_norm=true", "dino.freeze_last_layer_epochs=0", "dino.drop_path=0.0",
        "dino.teacher_temperature_start=0.02", "dino.teacher_temperature=0.02", "dino.teacher_momentum=0.98",
        "dino.views.vertical_flip=0.5",
    ]  # fmt: skip
    recipe = load_recipe("hipt/stage2_vit4096", settings)
    return open_region_encoder(train(recipe, grids.folder, options.runs / f"stage2-seed{seed}", resume=True).folder)[0]


def embedded(encoder: RegionVit, bags: list[RegionBag]) -> NDArray[np.float32]:
    """Embeddings of all regions [N, dim]."""
    return np.concatenate([encode_grids(encoder, bag.grids, bag.mask, device="cpu") for bag in bags])


def arms(options: argparse.Namespace, grids: EmbeddingStore, bags: list[RegionBag]) -> Iterator[tuple[str, int, Any]]:
    """Name, seed and embeddings [N, …] of what is compared."""
    tiles = np.concatenate([bag.grids.sum(1) / bag.mask.sum(1, keepdims=True) for bag in bags]).astype(np.float32)
    yield "mean of tiles", 0, tiles
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        yield "regions, untrained", seed, embedded(RegionVit(CONFIG).eval(), bags)
    for seed in range(options.seeds):
        regions = embedded(stage2(options, grids, seed), bags)
        yield "regions", seed, regions
        scaled = [(x - x.mean(0)) / x.std(0) / x.shape[1] ** 0.5 for x in (tiles, regions)]
        yield "mean of tiles and regions", seed, np.concatenate(scaled, 1)


def labelled(cohort: Cohort, target: str, bags: list[RegionBag]) -> Labelled:
    """Whose regions they are, and what."""
    labels, patients = cohort.column(target), {slide.name: slide.patient for slide in cohort}
    classes = tuple(sorted({labels[bag.name] for bag in bags}))
    return Labelled(
        slide=np.repeat(np.arange(len(bags)), [len(bag) for bag in bags]),
        target=np.array([classes.index(labels[bag.name]) for bag in bags]),
        patients=tuple(patients[bag.name] for bag in bags),
        classes=classes,
    )


def markdown(found: dict[str, list[float]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# HIPT's chain on real tissue",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Balanced accuracy of regions by nearest neighbours, one patient left out at a time; mean ± standard deviation",
        "over seeds of stage 2. More: `benchmarks/real_hipt.py`.",
        "",
        row(["embedding of a region", "seeds", "kNN"]),
        row(["---"] * 3),
    ]
    for arm, values in found.items():
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        lines.append(row([arm, str(len(values)), f"{statistics.mean(values):.3f}{deviation}"]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("table", help="cohort, such as a CSV of slides, patients and labels")
    parser.add_argument("--target", default="organ")
    parser.add_argument("--runs", type=Path, default=Path("runs/real_hipt"))
    parser.add_argument("--encoder", type=Path, help="a tile encoder of 128 numbers, in place of training one")
    parser.add_argument("--stage1-steps", type=int, default=1500)
    parser.add_argument("--stage2-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="of stage 2")
    parser.add_argument("--device", default="cpu")
    add_write(parser)
    options = parser.parse_args()
    cohort = Cohort.read(options.table)
    grids = embed_regions(
        cohort, encoder=stage1(options, cohort), out=options.runs / "job", tile_size=TILE, mpp=MPP,
        device=options.device, precision="bf16", regions=RegionOptions(min_tiles=64),
    ).grids  # fmt: skip
    bags = [read_regions(grids.path(name)) for name in grids.names()]
    units = labelled(cohort, options.target, bags)
    found: dict[str, list[float]] = {}
    for arm, seed, x in arms(options, grids, bags):
        value = balanced_accuracy(units.target[units.slide], left_out(units, x, KNN))
        found.setdefault(arm, []).append(value)
        print(json.dumps({"arm": arm, "seed": seed, "knn": value}), flush=True)
    steps = f"--stage1-steps {options.stage1_steps} --stage2-steps {options.stage2_steps}"
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__, "slides": len(bags),
        "regions": len(units.slide), "of px": 16 * TILE, "mpp": MPP, "chance": round(1 / len(units.classes), 3),
    }  # fmt: skip
    print(json.dumps({"conditions": conditions}, indent=2))
    if options.write:
        text = markdown(found, f"python -m benchmarks.real_hipt … {steps}", conditions)
        write_result(options.write, "hipt", text, conditions)


if __name__ == "__main__":
    main()

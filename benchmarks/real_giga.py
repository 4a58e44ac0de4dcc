"""Giga-SSL on real tissue: ``python -m benchmarks.real_giga TABLE --encoder FOLDER [--write]``; prints JSON.

Few slides are at hand, so that each is cut into squares, and these are the slides here. Their tiles are embedded as
they are and augmented; Giga-SSL learns from all squares without labels. A square's organ is found by heads that have
seen no square of its patient (nearest neighbours, and a linear one; classes weighed alike, see
:mod:`benchmarks.real_tissue`), from the mean embedding of its tiles, from Giga-SSL untrained, and from Giga-SSL. The
tile encoder may have seen the slides too, without labels. Figures are balanced accuracies of squares; with as few
patients as there are, more than chance is hard to come by.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.left_out import KNN, LINEAR, Labelled, left_out
from benchmarks.output import add_write, listed, row, write_result
from gigatome.core.job import TilesDir
from gigatome.core.seeding import generator, torch_seed
from gigatome.embeddings.augmented import AugmentedStore, write_augmented
from gigatome.embeddings.extract import embed
from gigatome.embeddings.slide_vectors import SlideVectorOptions, embed_slide_vectors
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.giga import GigaConfig
from gigatome.encoders.slide_zoo import SlideCard, new_slide_encoder, open_slide_encoder
from gigatome.evaluation.metrics import balanced_accuracy
from gigatome.recipes.run import train
from gigatome.recipes.schema import load_recipe
from gigatome.selfsup.embed_augmented import embed_augmented
from gigatome.slides.cohort import Cohort
from gigatome.tiles.bench_result import machine

SQUARES, LEAST = "squares", 16  # name of their embeddings; tiles of a square, fewer are left out
HEADS = {"kNN": KNN, "linear": LINEAR}


def cut(plain: EmbeddingStore, augmented: AugmentedStore, parts: int, folder: Path) -> dict[str, str]:
    """Cuts slides into ``parts`` × ``parts`` squares, writes both embeddings of each, and names the slide of each."""
    job, slide_of = TilesDir(folder), {}
    for slide in plain.names():
        whole, draws = plain.read(slide), augmented.read(slide)
        origin = whole.coords.min(0)
        side = (whole.coords.max(0) - origin + 1) / parts
        square, drawn = ((coords - origin) // side @ [1, parts] for coords in (whole.coords, draws.coords))
        for number in range(parts**2):
            name, mine, random = f"{slide}-{number:02}", square == number, generator(0, "squares", slide, number)
            found = [np.flatnonzero(draw == number) for draw in drawn]
            if min(mine.sum(), *map(len, found)) < LEAST:
                continue
            slide_of[name] = slide
            part = Bag(name, whole.encoder, whole.coords[mine], whole.embeddings[mine], whole.attrs, whole.encoding)
            write_bag(job.features(SQUARES) / f"{name}.h5", part)
            count = min(map(len, found))
            rows = np.stack([np.sort(random.permutation(places)[:count]) for places in found])
            coords, embeddings = (
                np.take_along_axis(values, rows[..., None], 1) for values in (draws.coords, draws.embeddings)
            )
            few = replace(draws, name=name, coords=coords, embeddings=embeddings)
            write_augmented(job.augmented(SQUARES) / f"{name}.h5", few)
    return slide_of


def arms(options: argparse.Namespace, folder: Path, names: list[str]) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """Name, seed and embeddings [N, …] of what is compared."""
    plain = EmbeddingStore.open(folder, encoder=SQUARES)
    first = plain.read(names[0])
    config = GigaConfig(input_dim=first.embeddings.shape[1])
    views = SlideVectorOptions(views=options.views)

    def vectors(arm: str, encoder: Any) -> NDArray[np.float32]:
        store = embed_slide_vectors(plain, slide_encoder=encoder, out=folder.parent / arm, options=views)
        return store.slide_vectors(names)[1]

    yield "mean of tiles", 0, vectors("mean", None)
    for seed in range(options.seeds):
        untrained = new_slide_encoder(config, None, torch_seed(seed, "untrained")).eval()
        card = SlideCard("untrained", config, tiles=options.tiles)
        yield "Giga-SSL, untrained", seed, vectors(f"untrained-{seed}", (untrained, card))
        settings = [
            f"encoder.input_dim={config.input_dim}", "encoder.weights=null", f"slides.tiles={options.tiles}",
            "simclr.temperature=0.1", "fit.epochs=null", f"fit.steps={options.steps}", "fit.warmup_epochs=null",
            f"fit.warmup_steps={options.steps // 10}", f"fit.batch_size={options.batch_size}", "fit.lr=1e-3",
            "fit.lr_scaling=none", f"fit.save_every={options.steps}", f"fit.device={options.device}",
            "fit.precision=bf16", f"fit.seed={seed}",
        ]  # fmt: skip
        store, recipe = AugmentedStore.open(folder, encoder=SQUARES), load_recipe("gigassl/pretrain_resnet18", settings)
        run = train(recipe, store, options.runs / f"giga-seed{seed}", resume=True)
        yield "Giga-SSL", seed, vectors(f"giga-{seed}", open_slide_encoder(run.folder))


def markdown(found: dict[str, dict[str, list[float]]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Giga-SSL on real tissue",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Balanced accuracy of squares of slides, one patient left out at a time; mean ± standard deviation over seeds.",
        "More: `benchmarks/real_giga.py`.",
        "",
        row(["embedding of a square", "seeds", *HEADS]),
        row(["---"] * (2 + len(HEADS))),
    ]
    for arm, scores in found.items():
        cells = [
            f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
            for values in scores.values()
        ]
        lines.append(row([arm, str(len(next(iter(scores.values())))), *cells]))
    return "\n".join(lines) + "\n"


def read_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("table", help="cohort, such as a CSV of slides, patients and labels")
    parser.add_argument("--target", default="organ")
    parser.add_argument("--runs", type=Path, default=Path("runs/real_giga"))
    parser.add_argument("--encoder", type=Path, required=True, help="of tiles")
    parser.add_argument("--tile-size", type=int, default=128)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--parts", type=int, default=4, help="squares along a slide")
    parser.add_argument("--augmentations", type=int, default=6)
    parser.add_argument("--augmented-tiles", type=int, default=512, help="of a slide in each augmentation")
    parser.add_argument("--tiles", type=int, default=16, help="of a view")
    parser.add_argument("--views", type=int, default=8, help="of a square")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    add_write(parser)
    return parser.parse_args()


def labelled(cohort: Cohort, target: str, slide_of: dict[str, str]) -> Labelled:
    """Whose squares they are, sorted by name, and what."""
    labels, patients = cohort.column(target), {slide.name: slide.patient for slide in cohort}
    slides = sorted(set(slide_of.values()))
    classes = tuple(sorted({labels[name] for name in slides}))
    return Labelled(
        slide=np.array([slides.index(slide_of[name]) for name in sorted(slide_of)]),
        target=np.array([classes.index(labels[name]) for name in slides]),
        patients=tuple(patients[name] for name in slides),
        classes=classes,
    )


def main() -> None:
    options = read_options()
    cohort = Cohort.read(options.table)
    how: dict[str, Any] = {"tile_size": options.tile_size, "mpp": options.mpp, "device": options.device}
    how |= {"encoder": options.encoder, "out": options.runs / "job", "precision": "bf16"}
    plain = embed(cohort, **how)
    augmented = embed_augmented(cohort, augmentations=options.augmentations, tiles=options.augmented_tiles, **how)
    folder = options.runs / "squares" / "tiles"
    slide_of = cut(plain, augmented, options.parts, folder)
    squares = labelled(cohort, options.target, slide_of)
    found: dict[str, dict[str, list[float]]] = {}
    for arm, seed, x in arms(options, folder, sorted(slide_of)):
        for head, probe in HEADS.items():
            value = balanced_accuracy(squares.target[squares.slide], left_out(squares, x, probe))
            found.setdefault(arm, {}).setdefault(head, []).append(value)
        last = {head: scores[-1] for head, scores in found[arm].items()}
        print(json.dumps({"arm": arm, "seed": seed, **last}), flush=True)
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__, "slides": len(squares.target),
        "squares": len(slide_of), "tiles of px": options.tile_size, "mpp": options.mpp,
        "tiles of a view": options.tiles, "chance": round(1 / len(squares.classes), 3),
    }  # fmt: skip
    print(json.dumps({"conditions": conditions}, indent=2))
    if options.write:
        command = f"python -m benchmarks.real_giga … --steps {options.steps} --seeds {options.seeds}"
        write_result(options.write, "giga-tissue", markdown(found, command, conditions), conditions)


if __name__ == "__main__":
    main()

"""Whether Giga-SSL learns what slides differ in: ``python -m benchmarks.giga_works [--write]``; prints JSON.

Three cohorts are made in the space of tile embeddings, without pictures. A tile is of a type, the type's prototype plus
noise. What stain and scanner do to an embedding is a shift within a few directions, and so is what an augmentation
does; a slide has a small one of its own.

*Arrangement*: patients have two slides with the same tiles, in one of them in patches by type, in the other shuffled.
What is far from what, not what there is, tells the classes apart; a mean embedding cannot.

*Composition*: the classes differ in their share of one type, and in nothing else. A mean embedding loses nothing.

*Confounder*: composition again, the sites' stains as strong as an augmentation, and in the sites that a head learns from
a class goes with the site; it is tested on slides of other sites, where it does not. Pretraining on views whose tiles
share an augmentation should make the encoder blind to stain; where each tile has its own, they average out, and a
slide's stain is a fine way to recognise it.

Giga-SSL is pretrained on all slides of a cohort, without labels, by the recipe of the paper with fewer tiles and steps,
from random weights; then slides are embedded as ``gigatome embed --level slide`` does. Each seed is another cohort with
other networks. Heads are logistic regressions, of embeddings scaled to unit variance, on patients that are kept whole:
five folds, five times over; or the sites above. Figures are AUROC, mean over folds, then mean ± standard deviation over
seeds; differences are paired by seed, with the 95 % interval by Student's t.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.output import add_write, listed, row, write_result
from gigatome.core.job import TilesDir
from gigatome.core.seeding import generator, torch_seed
from gigatome.embeddings.augmented import SHARING, AugmentedBag, AugmentedStore, write_augmented
from gigatome.embeddings.slide_vectors import SlideVectorOptions, embed_slide_vectors
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.giga import GigaConfig, GigaEncoder
from gigatome.encoders.slide_zoo import SlideCard, new_slide_encoder, open_slide_encoder
from gigatome.evaluation.comparison import corrected_t
from gigatome.evaluation.metrics import auroc
from gigatome.evaluation.probes import LinearProbe, fit_predict
from gigatome.recipes.run import train
from gigatome.recipes.schema import load_recipe
from gigatome.tiles.bench_result import machine

Task = Literal["arrangement", "composition", "confounder"]
Sharing = Literal["shared", "each"]
TASKS: tuple[Task, ...] = ("arrangement", "composition", "confounder")
DIM, TYPES, STAINS = 32, 3, 4  # of an embedding; kinds of tiles; directions of stain
SIDE, SITES = 16, 16  # tiles along a slide; of the confounder, the first half to learn from
NOISE, AUGMENTED, STAIN = 0.5, 0.4, 0.1  # deviations: of a tile; of an augmentation, per direction; of a slide's stain
ATTRS = {"patch_size": 256, "overlap": 0, "target_mpp": 1.0, "mpp_level0": 1.0}
MEAN, UNTRAINED = "mean of tiles", "Giga-SSL, untrained"


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slides of one size, in the space of embeddings.

    Attributes:
        tiles: float32 [S, SIDE², DIM], row after row.
        directions: float32 [STAINS, DIM], in which stain moves an embedding.
        y: int64 [S], class.
        patient: int64 [S].
        site: int64 [S].
    """

    tiles: NDArray[np.float32]
    directions: NDArray[np.float32]
    y: NDArray[np.int64]
    patient: NDArray[np.int64]
    site: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """One arm on one cohort: AUROC of slides, and the seconds of its training."""

    task: Task
    arm: str
    seed: int
    auroc: float
    seconds: float | None = None


def make_cohort(task: Task, seed: int, slides: int) -> Cohort:
    """The slides of a task."""
    random = generator(seed, "cohort", task)
    prototypes = random.standard_normal((TYPES, DIM))
    directions = random.standard_normal((STAINS, DIM))
    index = np.arange(slides)
    paired = task == "arrangement"
    patient = index // 2 if paired else index
    site = index % SITES
    y = index % 2 if paired else random.permutation(index % 2)
    if task == "confounder":
        common = np.where(site % 2, 0.9, 0.1)  # of class 1 in a site that heads learn from
        y = (random.random(slides) < np.where(site >= SITES // 2, 0.5, common)).astype(np.int64)
    stains = STAIN * random.standard_normal((slides, STAINS))
    if task == "confounder":
        stains += AUGMENTED * random.standard_normal((SITES, STAINS))[site]
    tiles = np.empty((slides, SIDE**2, DIM), np.float32)
    shares = np.empty(0)
    for slide in range(slides):
        if not paired or slide % 2 == 0:
            shares = random.dirichlet(np.full(TYPES, 3.0))
        if not paired:
            first = np.clip(0.3 + 0.15 * (y[slide] - 0.5) + 0.08 * random.standard_normal(), 0.02, 0.9)
            shares = np.array([first, *(1 - first) * shares[1:] / shares[1:].sum()])
        patches = bool(y[slide]) if paired else bool(random.integers(2))
        types = layout(random, shares, patches=patches)
        tiles[slide] = prototypes[types] + NOISE * random.standard_normal((SIDE**2, DIM)) + stains[slide] @ directions
    return Cohort(tiles, directions.astype(np.float32), y, patient, site)


def layout(random: np.random.Generator, shares: NDArray[np.float64], *, patches: bool) -> NDArray[np.int64]:
    """Types [SIDE²] of the tiles of a slide, as many of each as the shares say."""
    ends = np.rint(shares.cumsum() * SIDE**2).astype(np.int64)
    order = random.permutation(TYPES)
    counted = np.repeat(order, np.diff(ends, prepend=0)[order])
    field = random.standard_normal((SIDE, SIDE))
    if patches:
        field = ndimage.gaussian_filter(field, 2.5, mode="wrap")
    types = np.empty(SIDE**2, np.int64)
    types[field.ravel().argsort()] = counted
    return types


def write_cohort(cohort: Cohort, folder: Path, seed: int, draws: int, sharing: Sequence[Sharing]) -> None:
    """Writes the embeddings of plain tiles, and of augmented ones for each kind of sharing."""
    job, side = TilesDir(folder / "tiles"), int(ATTRS["patch_size"])
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2) * side
    for slide, tiles in enumerate(cohort.tiles):
        name, encoding = f"{slide:04}", {"encoder_weights": f"{seed:016x}"}
        write_bag(job.features("synthetic") / f"{name}.h5", Bag(name, "synthetic", grid, tiles, ATTRS, encoding))
        for kind in sharing:
            random = generator(seed, "augment", name)
            chosen = np.stack([random.permutation(SIDE**2)[: SIDE**2 // 2] for _ in range(draws)])
            shape = (draws, 1 if kind == "shared" else SIDE**2 // 2, STAINS)
            shifted = tiles[chosen] + (AUGMENTED * random.standard_normal(shape)) @ cohort.directions
            bag = AugmentedBag(
                name, "synthetic", grid[chosen], shifted.astype(np.float16), ATTRS, {**encoding, SHARING: kind}
            )
            write_augmented(job.augmented(kind) / f"{name}.h5", bag)


def pretrain(folder: Path, kind: Sharing, seed: int, options: argparse.Namespace) -> tuple[GigaEncoder, SlideCard]:
    """A slide encoder that has learnt from the augmented tiles."""
    settings = [
        f"encoder.pooling={options.pooling}", f"encoder.input_dim={DIM}", "encoder.weights=null",
        f"slides.tiles={options.tiles}", f"slides.sharing={kind}", "slides.replacement=false", "slides.threads=1",
        f"simclr.temperature={options.temperature}", "fit.epochs=null", f"fit.steps={options.steps}",
        "fit.warmup_epochs=null", f"fit.warmup_steps={options.steps // 10}", f"fit.batch_size={options.batch_size}",
        f"fit.lr={options.lr}", "fit.lr_scaling=none", f"fit.save_every={options.steps}", "fit.log_every=20",
        f"fit.device={options.device}", "fit.precision=bf16", f"fit.seed={seed}",
    ]  # fmt: skip
    store = AugmentedStore.open(folder / "tiles", encoder=kind)
    run = train(load_recipe("gigassl/pretrain_resnet18", settings), store, folder / f"run-{kind}")
    if not run.finished:
        raise SystemExit("stopped")
    return open_slide_encoder(run.folder)

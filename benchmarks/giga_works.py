"""Whether Giga-SSL learns what slides differ in: ``python -m benchmarks.giga_works [--write]``; prints JSON.

Three cohorts are made in the space of tile embeddings, without pictures. A tile is of a type, the type's prototype plus
noise. What stain and scanner do to an embedding is a shift within a few directions, and so is what an augmentation
does; a slide has a small one of its own.

*Arrangement*: patients have two slides with the same types as often, in one of them in patches, in the other shuffled.
What lies next to what, not what there is, tells the classes apart; a mean embedding cannot.

*Composition*: the classes differ in their share of one type, and in nothing else. A mean embedding loses nothing.

*Confounder*: composition again, with a stain of each site. The head learns from two sites, in each of which four of
five slides are of one class, not the same, and is tested on eight others, where classes are even. Pretraining on views
whose tiles share an augmentation should make the encoder blind to stain. Where each tile has its own (NS), they average
out, and a slide's stain is a fine way to recognise it.

Giga-SSL is pretrained on all slides of a cohort, without labels, by the paper's recipe with more tiles a view, fewer
steps and another rate, from random weights; then slides are embedded as ``gigatome embed --level slide`` does, each
tile seen once. Each seed is another cohort with other networks. Heads are logistic regressions of embeddings scaled to
unit variance, their penalty chosen in folds of the slides that they learn from; four folds, three times over, patients
kept whole, or the sites above. Figures are AUROC, mean over folds, then mean ± standard deviation over seeds;
differences are paired by seed, with the 95 % interval by Student's t.

``--found`` keeps what is found and goes on with it, so that tasks and poolings may be run one by one, with other
``--steps``; the table has all that the file holds.
"""

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
DIM, TYPES, STAINS = 32, 6, 4  # of an embedding; kinds of tiles; directions of stain
SIDE, LEARNT_SITES, SITES = 16, 2, 10  # tiles along a slide; of the confounder, half of the slides of each kind
NOISE, AUGMENTED, STAIN, SITE = 0.5, 0.4, 0.1, 0.6  # deviations of a tile; per direction of augmentation, slide, site
ATTRS = {"patch_size": 256, "overlap": 0, "target_mpp": 1.0, "mpp_level0": 1.0}
HEADS = tuple(LinearProbe(C=penalty) for penalty in (0.01, 0.1, 1.0, 10.0))
FOLDS, REPEATS = 4, 3
MEAN = "mean of tiles"
LEARNT: Mapping[Sharing, str] = {"shared": "Giga-SSL", "each": "Giga-SSL, NS"}


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
    """One arm on one cohort: AUROC of slides, and the steps and seconds of its training."""

    task: Task
    arm: str
    seed: int
    auroc: float
    steps: int | None = None
    seconds: float | None = None


def make_cohort(task: Task, seed: int, slides: int) -> Cohort:
    """The slides of a task."""
    random = generator(seed, "cohort", task)
    prototypes = random.standard_normal((TYPES, DIM))
    directions = random.standard_normal((STAINS, DIM))
    index = np.arange(slides)
    paired = task == "arrangement"
    patient = index // 2 if paired else index
    site = np.where(index % 4 < 2, index % LEARNT_SITES, LEARNT_SITES + index // 4 % (SITES - LEARNT_SITES))
    y = index % 2 if paired else random.permutation(index % 2)
    if task == "confounder":
        common = np.where(site % 2, 0.8, 0.2)  # of class 1 in a site that heads learn from
        y = (random.random(slides) < np.where(site >= LEARNT_SITES, 0.5, common)).astype(np.int64)
    stains = STAIN * random.standard_normal((slides, STAINS))
    if task == "confounder":
        stains += SITE * random.standard_normal((SITES, STAINS))[site]
    tiles = np.empty((slides, SIDE**2, DIM), np.float32)
    shares = np.empty(0)
    for slide in range(slides):
        if not paired or slide % 2 == 0:
            shares = random.dirichlet(np.ones(TYPES))
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


def pretrain(
    folder: Path, pooling: str, kind: Sharing, seed: int, options: argparse.Namespace
) -> tuple[GigaEncoder, SlideCard]:
    """A slide encoder that has learnt from the augmented tiles."""
    settings = [
        f"encoder.pooling={pooling}", f"encoder.input_dim={DIM}", "encoder.weights=null",
        f"slides.tiles={options.tiles}", f"slides.sharing={kind}", "slides.replacement=false", "slides.threads=1",
        f"simclr.temperature={options.temperature}", "fit.epochs=null", f"fit.steps={options.steps}",
        "fit.warmup_epochs=null", f"fit.warmup_steps={options.steps // 10}", f"fit.batch_size={options.batch_size}",
        f"fit.lr={options.lr}", "fit.lr_scaling=none", f"fit.save_every={options.steps}", "fit.log_every=20",
        f"fit.device={options.device}", "fit.precision=bf16", f"fit.seed={seed}",
    ]  # fmt: skip
    store = AugmentedStore.open(folder / "tiles", encoder=kind)
    run = train(load_recipe("gigassl/pretrain_resnet18", settings), store, folder / f"run-{pooling}-{kind}")
    if not run.finished:
        raise SystemExit("stopped")
    return open_slide_encoder(run.folder)


def vectors(
    cohort: Cohort, folder: Path, arm: str, encoder: tuple[GigaEncoder, SlideCard] | None, tiles: int
) -> NDArray[np.float32]:
    """Embeddings [S, …] of the slides, each of whose tiles is seen once."""
    names = [f"{slide:04}" for slide in range(len(cohort.y))]
    source = EmbeddingStore.open(folder / "tiles", encoder="synthetic")
    views = SlideVectorOptions(views=SIDE**2 // tiles)
    store = embed_slide_vectors(source, slide_encoder=encoder, out=folder / arm, options=views)
    return store.slide_vectors(names)[1]


def score(cohort: Cohort, x: NDArray[np.float32], task: Task, seed: int) -> float:
    """AUROC of slides that the head has not seen, mean over folds."""
    groups = cohort.site if task == "confounder" else cohort.patient
    if task == "confounder":
        parts = [cohort.site >= LEARNT_SITES]
    else:
        parts = [part for k in range(REPEATS) for part in folds(groups, generator(seed, "folds", k))]
    scores = []
    for number, tested in enumerate(parts):
        known = x[~tested], cohort.y[~tested]
        head = choose(*known, groups[~tested], generator(seed, "inner folds", number))
        scores.append(auroc(cohort.y[tested], fit_predict(head, *known, x[tested], 2)))
    return statistics.mean(scores)


def choose(
    x: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64], random: np.random.Generator
) -> LinearProbe:
    """The penalty that does best in folds of the training slides."""
    parts = [part for part in folds(groups, random) if len(set(y[part])) == len(set(y[~part])) == 2]

    def value(head: LinearProbe) -> float:
        return statistics.mean(auroc(y[part], fit_predict(head, x[~part], y[~part], x[part], 2)) for part in parts)

    return max(HEADS, key=value)


def folds(groups: NDArray[np.int64], random: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Which samples each of the folds tests, groups kept whole."""
    members, place = np.unique(groups, return_inverse=True)
    fold = random.permutation(len(members)) % FOLDS
    return [fold[place] == k for k in range(FOLDS)]


def outcomes(task: Task, seed: int, options: argparse.Namespace, known: Collection[str]) -> Iterator[Outcome]:
    """All arms on one cohort but the known ones."""
    cohort = make_cohort(task, seed, options.slides)
    kinds: tuple[Sharing, ...] = ("shared", "each") if task == "confounder" else ("shared",)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_cohort(cohort, folder, seed, options.draws, kinds)

        def outcome(arm: str, encoder: tuple[GigaEncoder, SlideCard] | None, seconds: float | None = None) -> Outcome:
            x = vectors(cohort, folder, arm, encoder, options.tiles)
            steps = None if seconds is None else options.steps
            return Outcome(task, arm, seed, score(cohort, x, task, seed), steps, seconds)

        if MEAN not in known:
            yield outcome(MEAN, None)
        for pooling in options.poolings:
            arm, config = f"{pooling}, untrained", GigaConfig(pooling=pooling, input_dim=DIM)
            if arm not in known:
                encoder = new_slide_encoder(config, None, torch_seed(seed, "untrained")).eval()
                yield outcome(arm, (encoder, SlideCard("untrained", config, tiles=options.tiles)))
            for kind in kinds:
                if (arm := f"{pooling}, {LEARNT[kind]}") not in known:
                    start = time.perf_counter()
                    trained = pretrain(folder, pooling, kind, seed, options)
                    yield outcome(arm, trained, time.perf_counter() - start)


def difference(found: Sequence[Outcome], task: Task, arm: str, base: str) -> dict[str, Any] | None:
    """By how much one arm is better than another, paired by seed; None with fewer than two seeds of both."""
    first, second = ({o.seed: o.auroc for o in found if (o.task, o.arm) == (task, name)} for name in (arm, base))
    gains = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if arm == base or len(gains) < 2:
        return None
    paired = corrected_t(gains, tested=0, trained=1)  # cohorts have nothing in common
    return {"value": paired.value, "ci": paired.ci}


def summary(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each task and arm: mean and deviation over seeds, and what it gains."""
    rows = []
    arms: dict[tuple[Task, str], None] = dict.fromkeys((item.task, item.arm) for item in found)
    for task, arm in sorted(arms, key=lambda key: TASKS.index(key[0])):
        members = [item for item in found if (item.task, item.arm) == (task, arm)]
        values = [item.auroc for item in members]
        seconds = [item.seconds for item in members if item.seconds is not None]
        pooling = arm.partition(",")[0]
        bases = {"mean": MEAN, "untrained": f"{pooling}, untrained", "each": f"{pooling}, {LEARNT['each']}"}
        if task != "confounder" or arm != f"{pooling}, {LEARNT['shared']}":
            del bases["each"]
        rows.append(
            {
                "task": task,
                "arm": arm,
                "seeds": len(members),
                "auroc": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "gains": {name: difference(found, task, arm, base) for name, base in bases.items()},
                "steps": members[0].steps,
                "minutes": statistics.mean(seconds) / 60 if seconds else None,
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Whether Giga-SSL works",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "AUROC of a linear head on slides that it has not seen, mean ± standard deviation over seeds, each another",
        "cohort. Differences are paired by seed, with the 95 % interval by Student's t. What the cohorts are:",
        "`benchmarks/giga_works.py`.",
        "",
        row(
            [
                "cohort",
                "slides by",
                "seeds",
                "AUROC",
                "over the mean",
                "over untrained",
                "over NS",
                "steps",
                "min",
            ]
        ),
        row(["---"] * 9),
    ]
    for line in rows:
        deviation = "" if line["sd"] is None else f" ± {line['sd']:.3f}"
        gains = [_gain(line["gains"].get(name)) for name in ("mean", "untrained", "each")]
        steps = str(line["steps"] or "–")
        minutes = f"{line['minutes']:.1f}" if line["minutes"] else "–"
        score_ = f"{line['auroc']:.3f}{deviation}"
        lines.append(row([line["task"], line["arm"], str(line["seeds"]), score_, *gains, steps, minutes]))
    return "\n".join(lines) + "\n"


def _gain(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['value']:+.3f} [{found['ci'][0]:+.3f}, {found['ci'][1]:+.3f}]"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    made.add_argument("--poolings", nargs="+", choices=["sparse_conv", "mlp", "transformer"], default=["sparse_conv"])
    made.add_argument("--seeds", type=int, default=3, help="cohorts of a task")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--slides", type=int, default=200)
    made.add_argument("--draws", type=int, default=16, help="augmentations of a slide")
    made.add_argument("--tiles", type=int, default=16, help="of a view")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--temperature", type=float, default=0.1)
    made.add_argument("--device", default="cpu")
    made.add_argument("--found", type=Path, help="file of outcomes, which is gone on with")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is found, as plain values."""
    kept = options.found.read_text("utf-8").splitlines() if options.found and options.found.is_file() else []
    found = [Outcome(**json.loads(line)) for line in kept]
    seeds, tasks = range(options.first_seed, options.first_seed + options.seeds), cast(list[Task], options.tasks)
    for seed, task in itertools.product(seeds, tasks):
        known = {item.arm for item in found if (item.task, item.seed) == (task, seed)}
        for outcome in outcomes(task, seed, options, known):
            found.append(outcome)
            if options.found:
                with options.found.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
    keys = ("slides", "draws", "tiles", "batch_size", "lr", "temperature")
    conditions = {
        **machine(), "device": options.device, "torch": torch.__version__,
        **{key.replace("_", " "): getattr(options, key) for key in keys},
    }  # fmt: skip
    rows = summary(found)
    if options.write:
        text = markdown(rows, "python -m benchmarks.giga_works", conditions)
        write_result(options.write, "works", text, conditions)
    return {"conditions": conditions, "found": [asdict(item) for item in found], "summary": rows}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

"""Embeddings made up for tests: cohorts in which some tiles of one class are shifted, and lives that depend on it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigatome.core.job import Job
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.slides.cohort import Cohort, CohortSlide

TILING = {"patch_size": 256, "patch_size_level0": 256, "target_magnification": 20.0, "level0_magnification": 20.0}


@dataclass(frozen=True)
class Made:
    """A cohort and its embeddings."""

    store: EmbeddingStore
    cohort: Cohort
    labels: Path


def make(
    folder,
    *,
    patients=40,
    slides=1,
    shift=3.0,
    share=0.3,
    dim=8,
    seed=0,
    encoder="enc",
    first=0,
    weights="",
    hazard=1.5,
) -> Made:
    """Patients of two classes in turn; in class b a share of the tiles is shifted along the first dimension.

    The hazard of death of class b is exp(``hazard``) times that of class a; some patients are censored.
    """
    rng = np.random.default_rng([seed, first])
    tiles = Job(folder / "job").tiles(256, 0.5)
    members, rows = [], ["case_id,slide_id,subtype,survival_months,censorship"]
    for number in range(first, first + patients):
        positive = number % 2
        life, sight = rng.exponential(30 * np.exp(-hazard * positive)), rng.exponential(60)
        for k in range(slides):
            name, count = f"s{number:03}_{k}", int(rng.integers(12, 30))
            x = rng.normal(size=(count, dim)).astype(np.float32)
            x[: max(1, round(share * count)), 0] += shift * positive
            coords = np.stack([np.arange(count) % 6 * 256, np.arange(count) // 6 * 256], 1).astype(np.int64)
            encoding = {"encoder_weights": weights} if weights else {}
            bag = Bag(name, encoder, coords, x[rng.permutation(count)], TILING, encoding)
            write_bag(tiles.features(encoder) / f"{name}.h5", bag)
            values = ["ab"[positive], f"{max(0.1, min(life, sight)):.3f}", str(int(sight < life))]
            rows.append(",".join([f"p{number:03}", name, *values]))
            columns = dict(zip(("subtype", "survival_months", "censorship"), values, strict=True))
            members.append(CohortSlide(f"{name}.svs", name, f"p{number:03}", None, columns))
    labels = folder / "labels.csv"
    labels.write_text("\n".join(rows) + "\n")
    return Made(EmbeddingStore.open(folder / "job", encoder=encoder), Cohort(tuple(members), "made"), labels)

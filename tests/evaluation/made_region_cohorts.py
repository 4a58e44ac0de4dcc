"""Grids and embeddings of regions made up for tests, with the labels and splits that HIPT's authors publish."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gigatome.core.job import Job
from gigatome.embeddings.regions import RegionBag, region_attributes, write_regions
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.tiles.grid import TileGrid
from gigatome.tiles.regions import RegionOptions, make_regions

DIM, SIDE, TILE, LEVEL0 = 16, 4, 256, 512
CONFIG = RegionVitConfig(input_dim=DIM, dim=12, depth=1, heads=3, grid=SIDE)


@dataclass(frozen=True)
class MadeRegions:
    """A cohort's regions."""

    job: Path
    grids: EmbeddingStore
    vectors: EmbeddingStore
    encoder: Path
    labels: Path
    names: tuple[str, ...]


def grid_of(rng, width=8, height=8):
    """Tiles, about two thirds of which are tissue, on a slide of 0.25 mpp."""
    y, x = np.nonzero(rng.random((height, width)) < 0.66)
    return TileGrid(
        coords=np.stack([x, y], 1).astype(np.int64) * LEVEL0,
        tissue_fraction=np.ones(len(x), np.float32),
        tile_size=TILE,
        mpp=0.5,
        overlap=0,
        slide_mpp=0.25,
        slide_width=width * LEVEL0,
        slide_height=height * LEVEL0,
    )


def make(folder, *, patients=16, slides=1, shift=2.0, weights="w1", codes=("IDC", "ILC"), seed=0) -> MadeRegions:
    """Patients of all classes in turn; tiles of a later class are shifted, and its patients die sooner."""
    rng = np.random.default_rng(seed)
    tiles = Job(folder / "job").tiles(SIDE * TILE, 0.5)
    torch.manual_seed(seed)
    encoder = RegionVit(CONFIG).eval()
    card = RegionCard("made", CONFIG, tile_encoder="enc", tile_weights=weights, tiles=SIDE)
    save_region_encoder(encoder, folder / "region_encoder", card)
    rows, names = ["case_id,slide_id,oncotree_code,survival_months,censorship"], []
    for number in range(patients):
        kind = number % len(codes)
        life, sight = rng.exponential(30 * np.exp(-1.5 * kind)), rng.exponential(60)
        for k in range(slides):
            name = f"TCGA-A{number % 3}-{number:04}-01Z-00-DX{k + 1}"
            regions = make_regions(grid_of(rng), RegionOptions(tiles=SIDE, min_tiles=1))
            x = rng.normal(size=(*regions.mask.shape, DIM)).astype(np.float32)
            x[..., 0] += shift * kind
            x[~regions.mask] = 0
            attrs = region_attributes(regions, name, "")
            bag = RegionBag(name, "enc", regions.coords, x, regions.mask, attrs, {"encoder_weights": weights})
            write_regions(tiles.features("enc") / f"{name}.h5", bag)
            with torch.inference_mode():
                grids = torch.from_numpy(x).mT.unflatten(2, (SIDE, SIDE))
                y = encoder(grids, torch.from_numpy(regions.mask).unflatten(1, (SIDE, SIDE))).numpy()
            region = Bag(name, "made", regions.coords, y, attrs, {"encoder_weights": f"{weights}-r"})
            write_bag(tiles.features("made") / f"{name}.h5", region)
            seen = f"{max(0.1, min(life, sight)):.3f},{int(sight < life)}"
            rows.append(f"TCGA-A{number % 3}-{number:04},{name}.svs,{codes[kind]},{seen}")
            names.append(name)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    open_store = EmbeddingStore.open
    return MadeRegions(
        folder / "job", open_store(folder / "job", encoder="enc"), open_store(folder / "job", encoder="made"),
        folder / "region_encoder", folder / "labels.csv", tuple(names),
    )  # fmt: skip


def write_splits(folder, names, *, splits=2, seed=0):
    """``splits_{k}.csv`` as HIPT has them: Monte-Carlo splits of slides, whoever they are of."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for k in range(splits):
        order = rng.permutation(len(names))
        test, val = np.split(order[: len(names) // 2], [len(names) // 3])
        parts = [[names[i] for i in part] for part in (order[len(names) // 2 :], val, test)]
        lines = [",train,val,test"]
        lines += [f"{i},{','.join(part[i] if i < len(part) else '' for part in parts)}" for i in range(len(parts[0]))]
        (folder / f"splits_{k}.csv").write_text("\n".join(lines) + "\n")
    return folder

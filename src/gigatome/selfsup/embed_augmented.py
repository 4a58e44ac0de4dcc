"""Tiles of slides in, K augmented draws of N tile embeddings a slide out: what slide-level pretraining learns from.

It stands here and not among the embeddings because augmentations are of self-supervised learning. A tile is read and
decoded once, whichever draws have it: the rows of a slide are worked off in the order of its grid, and each is put
where its draw wants it. In memory are the tiles of a few batches, and the embeddings of the slides being worked on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, final, get_args

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.core.job import Job
from gigatome.core.logs import Progress, log, silent
from gigatome.embeddings.augmented import SHARING, AugmentedBag, AugmentedStore, write_augmented
from gigatome.embeddings.encoding import Maker, Precision, ready, try_out
from gigatome.embeddings.extract_regions import keep_encoder
from gigatome.embeddings.run import (
    EmbedOptions,
    State,
    embed_slides,
    encoding_attributes,
    shard_of,
    unfinished,
    write_shard_failures,
)
from gigatome.embeddings.store import WEIGHTS
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import open_encoder
from gigatome.selfsup.render import render_views
from gigatome.selfsup.tile_augment import (
    AugmentDraws,
    Sharing,
    TileAugmentOptions,
    draw_augmentations,
    gather_draws,
)
from gigatome.selfsup.views import check_patches
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import GridOptions, TileGrid, coords_attributes, tile_cohort
from gigatome.tissue.segment import SegmentOptions

OPTIONS = "augmentation_options"
"""Attribute of ``features``: what decides the draws but the grid, as JSON."""

GRID = "grid_digest"
"""Attribute of ``features``: hash of the coordinates of the grid that the tiles were drawn from."""

_SLIDES_AT_ONCE = 16


def embed_augmented(
    cohort: Cohort | str | Path,
    *,
    encoder: nn.Module | str | Path,
    out: str | Path,
    augmentations: int = 50,
    tiles: int = 256,
    augmentation: Sharing = "shared",
    options: TileAugmentOptions | None = None,
    seed: int = 0,
    tile_size: int = 256,
    mpp: float = 0.5,
    min_tissue: float = 0.4,
    overlap: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    precision: Precision = "fp32",
    threads: int = 4,
    name: str | None = None,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    segment_options: SegmentOptions | None = None,
    progress: Progress = silent,
) -> AugmentedStore:
    """Embeds augmented tiles of every slide of a cohort, in float16.

    It finds tissue, goes on after an interruption, shares a job directory and leaves slides out as
    :func:`~gigatome.embeddings.extract.embed` does. A slide's file depends on the seed, its name, its grid, the encoder
    and the options alone, save for rounding. A copy of the tile encoder is kept beside the files.

    Args:
        cohort: slides, or what :meth:`~gigatome.slides.cohort.Cohort.read` takes.
        encoder: of tiles, as for ``embed``. One without ``mean`` and ``std`` is given 8-bit views by its ``normalise``.
        out: job directory.
        augmentations: draws of each slide, K.
        tiles: tiles of a draw, N; a slide with fewer has some of them twice.
        augmentation: ``"shared"`` gives the tiles of a draw one augmentation, which did better in the paper;
            ``"each"`` gives each tile its own, the paper's NS.
        options: the augmentations; the paper's by default.
        seed: of all draws, ≥ 0.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: resolution in µm per pixel; the paper's is 1, 10×.
        min_tissue: least share of a tile's area that is tissue.
        overlap: of neighbouring tiles, in pixels at ``mpp``.
        batch_size: see :class:`~gigatome.embeddings.run.EmbedOptions`, as for the next three.
        device: where tiles are augmented and the encoder runs.
        precision: what the encoder computes in; augmentations are made in float32.
        threads: threads that read tiles.
        name: of the encoder in file and folder names; the default tells encoders with other weights apart. Another
            name lets two kinds of augmentation lie side by side.
        shard: (i, n) takes every n-th slide from the i-th, from 0.
        overwrite: replace embeddings by other weights or of other augmentations.
        segment_options: how tissue is found.
        progress: called with the number of augmented tiles done.

    Returns:
        The store; its ``failures`` are the slides that could not be embedded, also in ``failures.csv``.

    Raises:
        CohortError: there is no slide.
        ConfigError: an option or the encoder does not fit.
        StoreError: the folder holds embeddings by other weights of the same name, or of other augmentations, which may
            have taken days, or cannot be written. Files on another grid are made again.

    Source: Giga-SSL (arXiv:2212.03273), section 3.2, and its code; differs: tiles are drawn without replacement, see
    :class:`~gigatome.selfsup.tile_augment.TileAugmentOptions`.
    """
    if augmentations < 1 or tiles < 1:
        raise ConfigError(f"augmentations and tiles must be at least 1, not {augmentations} and {tiles}")
    if seed < 0:
        raise ConfigError(f"seed must not be negative, like {seed}")
    if augmentation not in get_args(Sharing):
        raise ConfigError(f"there is no augmentation {augmentation}; there are {', '.join(get_args(Sharing))}")
    running = EmbedOptions(batch_size, device, precision, threads, "float16")
    try:
        grid = GridOptions(tile_size=tile_size, mpp=mpp, overlap=overlap, min_tissue=min_tissue)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cohort, job = shard_of(Cohort.read(cohort), shard), Job(Path(out))
    model, card = open_encoder(encoder) if isinstance(encoder, str | Path | TileEncoder) else (encoder, None)
    maker = Maker.of(model, name)
    store = AugmentedStore(job.path, job.tiles(tile_size, mpp, overlap), maker.name)
    options = options or TileAugmentOptions()
    size = _size(model, options, tile_size)
    plan = _Plan(augmentations, tiles, augmentation, seed, replace(options, size=size))
    with ready(model, device):
        try_out(model, maker, size, device=device, precision=precision)
        grids, failures = tile_cohort(
            cohort, job, options=grid, segment_options=segment_options, threads=threads, progress=progress
        )
        views = _Views(plan, size, grids, model)
        output = _Augmented(store, maker, grids, views, running, overwrite)
        todo = [(slide, views.count) for slide, _ in unfinished(cohort, output)]
        if card is not None and isinstance(model, TileEncoder):
            keep_encoder(model, card, maker, store.encoder_folder)
        failures = failures + embed_slides(todo, model, maker, output, running, progress, views)
    write_shard_failures(job, shard, failures)
    return replace(store, failures=tuple(failures))


@final
@dataclass(frozen=True)
class _Plan:
    """What decides the draws of a slide, but its name and grid."""

    augmentations: int
    tiles: int
    augmentation: Sharing
    seed: int
    options: TileAugmentOptions

    def text(self) -> str:
        """All of it, as files state it."""
        values = asdict(self)
        return json.dumps({**values.pop("options"), **values}, sort_keys=True)


@final
class _Views:
    """Augmented tiles, in the order of their grid; a :class:`~gigatome.embeddings.run.Views`."""

    def __init__(self, plan: _Plan, size: int, grids: Mapping[str, TileGrid], model: nn.Module):
        self.plan, self.count = plan, plan.augmentations * plan.tiles
        self._size, self._grids, self._model = size, grids, model
        self.draws = lru_cache(_SLIDES_AT_ONCE)(self._draw)

    def tiles(self, name: str) -> Sequence[int]:
        draws, pairs = self.draws(name)
        return draws.tiles.ravel()[pairs].tolist()

    def make(self, rows: Sequence[tuple[str, int]], images: Tensor) -> Tensor:
        parts = []
        for name in dict.fromkeys(name for name, _ in rows):  # rows of a slide follow one another
            draws, pairs = self.draws(name)
            parts.append((draws.views, draws.rows(pairs[[row for slide, row in rows if slide == name]])))
        mean, std = (getattr(self._model, key, None) for key in ("mean", "std"))
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            return render_views(images, [gather_draws(parts)], [self._size], mean, std)[0]
        views = render_views(images, [gather_draws(parts)], [self._size])[0]
        pixels = views.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1)
        return self._model.normalise(pixels.contiguous())  # pyright: ignore[reportCallIssue]

    def _draw(self, name: str) -> tuple[AugmentDraws, NDArray[np.int64]]:
        """Draws of a slide, and in which order the pairs of draw and tile, int64 [K · N], are worked off."""
        plan, grid = self.plan, self._grids[name]
        draws = draw_augmentations(
            plan.options,
            name=name,
            grid=len(grid),
            tile_size=grid.tile_size,
            augmentations=plan.augmentations,
            tiles=plan.tiles,
            sharing=plan.augmentation,
            seed=plan.seed,
        )
        return draws, np.argsort(draws.tiles.ravel(), kind="stable")


@final
@dataclass(frozen=True)
class _Augmented:
    """One file of augmented embeddings a slide; an :class:`~gigatome.embeddings.run.Output`."""

    store: AugmentedStore
    maker: Maker
    grids: Mapping[str, TileGrid]
    views: _Views
    options: EmbedOptions
    overwrite: bool

    def state(self, name: str) -> State:
        path = self.store.path(name)
        if not path.is_file():
            return "missing"
        try:
            dim, attrs = _header(path)
        except StoreError as error:
            log.warning("%s; it is embedded again", error)
            return "missing"
        if dim != self.maker.dim or attrs.get(WEIGHTS) != self.maker.weights:
            return "missing" if self.overwrite else "foreign"
        wanted = self.views.plan.text()
        if attrs.get(OPTIONS) != wanted:
            if self.overwrite:
                return "missing"
            raise StoreError(
                f"{self.store.folder}: holds embeddings of other augmentations (slide {name}: "
                f"{_difference(attrs.get(OPTIONS), wanted)}); give this encoder another name, or pass overwrite to "
                "replace them"
            )
        if attrs.get(GRID) != _digest(self.grids[name]):
            log.info("%s: was made on another grid; it is embedded again", path)
            return "missing"
        return "done"

    def foreign(self, name: str) -> AugmentedStore:
        return self.store

    def write(self, slide: CohortSlide, embeddings: NDArray[np.float32]) -> None:
        name, grid, plan = slide.name, self.grids[slide.name], self.views.plan
        draws, pairs = self.views.draws(name)
        placed = np.empty(embeddings.shape, np.float16)
        placed[pairs] = embeddings
        encoding = {
            **encoding_attributes(self.maker, self.options),
            SHARING: plan.augmentation,
            OPTIONS: plan.text(),
            GRID: _digest(grid),
        }
        bag = AugmentedBag(
            name,
            self.maker.name,
            grid.coords[draws.tiles],
            placed.reshape(*draws.tiles.shape, -1),
            coords_attributes(grid, name, str(self.store.folder)),
            encoding,
        )
        write_augmented(self.store.path(name), bag)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Size of an embedding, and the attributes; raises :class:`StoreError` if the file is damaged."""
    try:
        with h5py.File(path, "r") as file:
            features: Any = file["features"]
            if features.ndim != 3 or file["coords"].shape != (*features.shape[:2], 2):  # pyright: ignore
                raise StoreError(f"{path}: holds no augmented embeddings [K, N, D] with coords [K, N, 2]")
            return features.shape[2], dict(features.attrs)
    except (OSError, KeyError, RuntimeError, AttributeError) as error:
        raise StoreError(f"{path}: is damaged and cannot be read ({error})") from error


def _difference(held: Any, wanted: str) -> str:
    """What two texts of :class:`_Plan` do not agree on."""
    try:
        old, new = dict(json.loads(held)), json.loads(wanted)
    except (TypeError, ValueError):
        return "it does not say which"
    return ", ".join(f"{key} {old.get(key)}, not {new[key]}" for key in new if old.get(key) != new[key])


def _digest(grid: TileGrid) -> str:
    return sha256(grid.coords.tobytes()).hexdigest()[:16]


def _size(model: nn.Module, options: TileAugmentOptions, tile_size: int) -> int:
    """Side of a view: as asked for, or what the encoder is made for, or the tile's."""
    if options.size is None:
        return model.config.image_size if isinstance(model, TileEncoder) else tile_size
    if isinstance(model, TileEncoder):
        check_patches({"size": options.size}, model.patch_size)
    return options.size

"""Tiles of slides in, one file of embeddings a slide out; killed at any moment, it goes on where it was."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gigatome.core.errors import ConfigError
from gigatome.core.job import Job
from gigatome.core.logs import Progress, silent
from gigatome.embeddings.encoding import Maker, Precision, ready, try_out
from gigatome.embeddings.run import (
    EmbedOptions,
    State,
    embed_slides,
    encoding_attributes,
    file_state,
    shard_of,
    unfinished,
    write_config,
    write_shard_failures,
)
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.longvit_zoo import open_pixel_encoder
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import GridOptions, TileGrid, coords_attributes, tile_cohort
from gigatome.tissue.segment import SegmentOptions


def embed(
    cohort: Cohort | str | Path,
    *,
    encoder: nn.Module | str | Path,
    out: str | Path,
    tile_size: int = 256,
    mpp: float = 0.5,
    min_tissue: float = 0.4,
    overlap: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    precision: Precision = "fp32",
    threads: int = 4,
    dtype: Literal["float32", "float16"] = "float32",
    name: str | None = None,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    segment_options: SegmentOptions | None = None,
    progress: Progress = silent,
) -> EmbeddingStore:
    """Embeds the tissue tiles of every slide of a cohort.

    Finds tissue and lays the grid where that is not done yet, then writes one file a slide, whole or not at all. Slides
    that have their embeddings already are skipped; so the same call goes on after an interruption, several processes
    may share one job directory, and none waits for another. One slide that cannot be read, or whose embeddings are
    not finite, becomes a failure, and the others go on.

    Args:
        cohort: slides, or what :meth:`Cohort.read` takes.
        encoder: what :func:`~gigatome.encoders.longvit_zoo.open_pixel_encoder` takes, or any module with ``dim``,
            ``normalise`` and ``forward`` like :class:`~gigatome.encoders.vit.TileEncoder`.
        out: job directory.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: resolution in µm per pixel.
        min_tissue: least share of a tile's area that is tissue.
        overlap: of neighbouring tiles, in pixels at ``mpp``.
        batch_size: see :class:`EmbedOptions`, as for the next four.
        device: where the encoder runs.
        precision: what it computes in.
        threads: threads that read tiles.
        dtype: of the files.
        name: of the encoder in file and folder names; the default tells encoders with other weights apart.
        shard: (i, n) takes every n-th slide from the i-th, from 0: static shards for several machines.
        overwrite: replace embeddings that other weights of the same name made.
        segment_options: how tissue is found.
        progress: called with the number of tiles done.

    Returns:
        The store; its ``failures`` are the slides that could not be embedded, also in ``failures.csv``.

    Raises:
        CohortError: there is no slide.
        ConfigError: an option or the encoder does not fit.
        StoreError: the folder holds embeddings by other weights of the same name, or cannot be written.
    """
    options = EmbedOptions(batch_size, device, precision, threads, dtype)
    try:
        grid = GridOptions(tile_size=tile_size, mpp=mpp, overlap=overlap, min_tissue=min_tissue)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cohort, job = shard_of(Cohort.read(cohort), shard), Job(Path(out))
    model = open_pixel_encoder(encoder) if isinstance(encoder, str | Path) else encoder
    maker = Maker.of(model, name)
    store = EmbeddingStore(job.path, job.tiles(tile_size, mpp, overlap), maker.name)
    with ready(model, device):
        try_out(model, maker, tile_size, device=device, precision=precision)
        grids, failures = tile_cohort(
            cohort, job, options=grid, segment_options=segment_options, threads=threads, progress=progress
        )
        output = _Tiles(store, maker, grids, options, overwrite)
        todo = unfinished(cohort, output)
        write_config(store.tiles, maker, grid, options)
        failures = failures + embed_slides(todo, model, maker, output, options, progress)
    write_shard_failures(job, shard, failures)
    return replace(store, failures=tuple(failures))


@final
@dataclass(frozen=True)
class _Tiles:
    """One file of tile embeddings a slide."""

    store: EmbeddingStore
    maker: Maker
    grids: Mapping[str, TileGrid]
    options: EmbedOptions
    overwrite: bool

    def state(self, name: str) -> State:
        return file_state(self.store, name, self.maker, self.grids[name].coords, overwrite=self.overwrite)

    def foreign(self, name: str) -> EmbeddingStore:
        return self.store

    def write(self, slide: CohortSlide, embeddings: NDArray[np.float32]) -> None:
        grid, name = self.grids[slide.name], slide.name
        attrs = coords_attributes(grid, name, str(self.store.folder))
        bag = Bag(name, self.maker.name, grid.coords, embeddings, attrs, encoding_attributes(self.maker, self.options))
        write_bag(self.store.path(name), bag, dtype=self.options.dtype)

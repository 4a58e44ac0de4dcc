"""Regions of slides in; grids of tile embeddings, and an embedding of each region, out.

A slide passes through the tile encoder once. Its grids are written as soon as they are complete, and the embeddings of
its regions are computed from that file, at once or in a later call with another region encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.core.job import Job
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.embeddings.encoding import Maker, Precision, encode_grids, ready, try_out
from gigatome.embeddings.lock import Lock
from gigatome.embeddings.regions import REGIONS, RegionBag, read_mask, read_regions, region_attributes, write_regions
from gigatome.embeddings.run import (
    EmbedOptions,
    State,
    check_finite,
    embed_slides,
    encoding_attributes,
    file_state,
    remove_leftovers,
    shard_of,
    unfinished,
    write_config,
    write_shard_failures,
)
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.encoders.published import EncoderCard
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.region_zoo import RegionCard, open_region_encoder, region_weights
from gigatome.encoders.region_zoo import region_name as unique_name
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import open_encoder, save_encoder, saved_digest
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.tiles.grid import GridOptions, TileGrid, tile_cohort
from gigatome.tiles.regions import RegionGrid, RegionOptions, make_regions
from gigatome.tissue.segment import SegmentOptions


@dataclass(frozen=True)
class RegionEmbeddings:
    """What :func:`embed_regions` wrote.

    Attributes:
        grids: grids of tile embeddings, to be read with :func:`~gigatome.embeddings.regions.read_regions`.
        vectors: embeddings of the regions, a region for a tile; None without a region encoder.
        failures: slides that could not be embedded.
    """

    grids: EmbeddingStore
    vectors: EmbeddingStore | None
    failures: tuple[Failure, ...] = ()


def embed_regions(
    cohort: Cohort | str | Path,
    *,
    encoder: nn.Module | str | Path,
    out: str | Path,
    region_encoder: RegionVit | str | Path | None = None,
    regions: RegionOptions | None = None,
    tile_size: int = 256,
    mpp: float = 0.5,
    min_tissue: float = 0.4,
    batch_size: int = 64,
    device: str = "cpu",
    precision: Precision = "fp32",
    threads: int = 4,
    dtype: Literal["float32", "float16"] = "float32",
    name: str | None = None,
    region_name: str | None = None,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    segment_options: SegmentOptions | None = None,
    progress: Progress = silent,
) -> RegionEmbeddings:
    """Embeds the regions of every slide of a cohort.

    The tiles are those that :func:`~gigatome.embeddings.extract.embed` would embed, gathered into regions; it goes on,
    shares a job directory, and leaves slides out, as that does. Slides whose grids are there are not read again, so a
    second region encoder costs next to nothing. A copy of the tile encoder is kept beside the grids.

    Args:
        cohort: slides, or what :meth:`Cohort.read` takes.
        encoder: of tiles, as for :func:`~gigatome.embeddings.extract.embed`.
        out: job directory.
        region_encoder: of regions, or what :func:`~gigatome.encoders.region_zoo.open_region_encoder` takes; None
            writes grids alone. It does not see the places of a region that hold no tile.
        regions: which regions, and which of their tiles are read; the defaults are HIPT's, without background.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: resolution in µm per pixel.
        min_tissue: least share of a tile's area that is tissue.
        batch_size: see :class:`~gigatome.embeddings.run.EmbedOptions`, as for the next four.
        device: where the encoders run.
        precision: what the tile encoder computes in; the region encoder takes float32.
        threads: threads that read tiles.
        dtype: of the files.
        name: of the tile encoder in file and folder names; the default tells encoders with other weights apart.
        region_name: of the two encoders together; likewise.
        shard: (i, n) takes every n-th slide from the i-th, from 0.
        overwrite: replace embeddings that other weights of the same name made.
        segment_options: how tissue is found.
        progress: called with the number of tiles done.

    Raises:
        CohortError: there is no slide.
        ConfigError: an option or an encoder does not fit, or the region encoder is for tiles by another encoder.
        StoreError: a folder holds embeddings by other weights of the same name, or cannot be written.

    Source: Chen et al., CVPR 2022 (HIPT), and the authors' code; differs: background is not read, and no token attends
    to it, unless ``regions.background`` is ``"encode"``.
    """
    options, regions = EmbedOptions(batch_size, device, precision, threads, dtype), regions or RegionOptions()
    try:
        grid = GridOptions(tile_size=tile_size, mpp=mpp, min_tissue=min_tissue)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cohort, job = shard_of(Cohort.read(cohort), shard), Job(Path(out))
    model, card = open_encoder(encoder) if isinstance(encoder, str | Path | TileEncoder) else (encoder, None)
    maker = Maker.of(model, name)
    store = EmbeddingStore(job.path, job.tiles(regions.tiles * tile_size, mpp), maker.name)
    upper = None if region_encoder is None else _upper(region_encoder, region_name, maker, store, regions, grid)
    with ready(model, device), ready(upper.model if upper else nn.Identity(), device):
        try_out(model, maker, tile_size, device=device, precision=precision)
        grids, failures = tile_cohort(
            cohort, job, options=grid, segment_options=segment_options, threads=threads, progress=progress
        )
        made, odd = _gather(grids, regions)
        output = _Regions(store, maker, upper, made, options, overwrite)
        todo = unfinished(cohort, output)
        if card is not None and isinstance(model, TileEncoder):
            keep_encoder(model, card, maker, store.encoder_folder)
        for each in (maker, upper.maker) if upper else (maker,):
            write_config(store.tiles, each, grid, regions, options)
        failures = failures + odd + embed_slides(todo, model, maker, output, options, progress)
    write_shard_failures(job, shard, failures)
    return RegionEmbeddings(store, upper.store if upper else None, tuple(failures))


@dataclass(frozen=True)
class _Upper:
    """The region encoder, how files name it and its tile encoder together, and where they lie."""

    model: RegionVit
    maker: Maker
    store: EmbeddingStore


@final
class _Regions:
    """A file of grids a slide, and with a region encoder one of region embeddings."""

    def __init__(
        self,
        store: EmbeddingStore,
        maker: Maker,
        upper: _Upper | None,
        regions: Mapping[str, RegionGrid],
        options: EmbedOptions,
        overwrite: bool,
    ):
        self.store = store
        self.grids = {name: made.read_tiles() for name, made in regions.items()}
        self._maker, self._upper, self._regions = maker, upper, regions
        self._options, self._overwrite = options, overwrite

    def state(self, name: str) -> State:
        grids, vectors = self._grids_state(name), self._vectors_state(name)
        if "foreign" in (grids, vectors):
            return "foreign"
        return "missing" if grids == "missing" else "embedded" if vectors == "missing" else "done"

    def foreign(self, name: str) -> EmbeddingStore:
        return self._upper.store if self._upper and self._grids_state(name) != "foreign" else self.store

    def write(self, slide: CohortSlide, embeddings: NDArray[np.float32]) -> None:
        regions = self._regions[slide.name]
        if self._grids_state(slide.name) != "done":
            grids = np.zeros((*regions.mask.shape, self._maker.dim), self._options.dtype)
            grids[regions.mask] = embeddings
            attrs = region_attributes(regions, slide.name, str(self.store.folder))
            encoding = encoding_attributes(self._maker, self._options)
            bag = RegionBag(slide.name, self._maker.name, regions.coords, grids, regions.mask, attrs, encoding)
            write_regions(self.store.path(slide.name), bag, dtype=self._options.dtype)
        if self._upper:
            self._write_vectors(slide, regions, self._upper)

    def _write_vectors(self, slide: CohortSlide, regions: RegionGrid, upper: _Upper) -> None:
        path = upper.store.path(slide.name)
        remove_leftovers(path)
        grids = read_regions(self.store.path(slide.name))  # what is computed now is what would be computed later
        embeddings = encode_grids(upper.model, grids.grids, grids.mask, device=self._options.device)
        check_finite(slide, embeddings, grids.coords, self._options)
        attrs = region_attributes(regions, slide.name, str(upper.store.folder))
        encoding = {
            **encoding_attributes(upper.maker, self._options),
            "tile_encoder": self._maker.name,
            "tile_encoder_weights": self._maker.weights,
        }
        bag = Bag(slide.name, upper.maker.name, grids.coords, embeddings, attrs, encoding)
        write_bag(path, bag, dtype=self._options.dtype)

    def _grids_state(self, name: str) -> Literal["missing", "foreign", "done"]:
        regions = self._regions[name]
        state = file_state(self.store, name, self._maker, regions.coords, overwrite=self._overwrite)
        if state != "done":
            return state
        path = self.store.path(name)
        try:
            same = np.array_equal(read_mask(path), regions.mask)
        except StoreError as error:
            log.warning("%s; it is embedded again", error)
            return "missing"
        if not same:
            log.info("%s: other tiles of its regions were read; it is embedded again", path)
        return "done" if same else "missing"

    def _vectors_state(self, name: str) -> Literal["missing", "foreign", "done"]:
        if self._upper is None:
            return "done"
        regions = self._regions[name]
        store, maker = self._upper.store, self._upper.maker
        state = file_state(store, name, maker, regions.coords, overwrite=self._overwrite)
        outdated = state == "done" and store.attributes(name).get(REGIONS) != regions.digest
        return "missing" if outdated else state


def _upper(
    given: RegionVit | str | Path,
    name: str | None,
    tiles: Maker,
    grids: EmbeddingStore,
    regions: RegionOptions,
    grid: GridOptions,
) -> _Upper:
    """The region encoder; refused if it was made for tiles by another encoder."""
    used = regions.tiles, grid.tile_size, grid.mpp
    if isinstance(given, RegionVit):  # of which nothing else is known
        model, card = given, RegionCard("region-vit", given.config)
        trained = used
    else:
        model, card = open_region_encoder(given)
        trained = card.tiles, card.tile_size, card.mpp
    card.check_tiles(tiles.name, tiles.weights, tiles.dim, "encoder")
    if used != trained:
        text = "%s: was trained on regions of side %d × %d px at %g mpp; these are of %d × %d px at %g mpp"
        log.warning(text, card.name, *trained, *used)
    name = name or unique_name(model, card, tiles.weights)
    if name == tiles.name:
        raise ConfigError(f"grids and region embeddings cannot both be named {name}; give another region name")
    maker = Maker(name, region_weights(model, tiles.weights), model.dim)
    return _Upper(model, maker, replace(grids, encoder=name))


def _gather(grids: Mapping[str, TileGrid], options: RegionOptions) -> tuple[dict[str, RegionGrid], list[Failure]]:
    """The regions of each slide, and the slides whose grids, from another tool, cannot be gathered."""
    made: dict[str, RegionGrid] = {}
    failures: list[Failure] = []
    for name, grid in grids.items():
        try:
            made[name] = make_regions(grid, options)
        except ConfigError as error:
            failures.append(Failure.of(name, "tiles", error))
    return made, failures


def keep_encoder(model: TileEncoder, card: EncoderCard, maker: Maker, folder: Path) -> None:
    """Writes a copy of the tile encoder, unless it is there or another process is writing it."""
    lock = Lock(folder)
    if saved_digest(folder) == maker.weights or not lock.acquire():
        return
    try:
        save_encoder(model, folder, name=card.name, source=card.source, licence=card.licence, mpp=card.mpp)
    finally:
        lock.release()

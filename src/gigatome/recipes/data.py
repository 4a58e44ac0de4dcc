"""What a recipe of each level learns from: the slides of a cohort, a store of grids, or one of augmented embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from gigatome import config
from gigatome.core.errors import ConfigError
from gigatome.core.job import Job
from gigatome.core.logs import Progress
from gigatome.distributed import rank, world_size
from gigatome.embeddings.augmented import AugmentedStore
from gigatome.embeddings.augmented_stream import AugmentedStream
from gigatome.embeddings.region_stream import RegionStream
from gigatome.embeddings.store import EmbeddingStore
from gigatome.encoders.longvit_zoo import LongVitCard
from gigatome.encoders.region_zoo import RegionCard
from gigatome.encoders.slide_zoo import SlideCard
from gigatome.recipes.schema import AnyRecipe, PixelRecipe, RegionRecipe, SlideRecipe, TileRecipe
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.dinov2 import Dinov2, Dinov2Options
from gigatome.selfsup.levels import PixelLevel, RegionLevel, SlideLevel
from gigatome.selfsup.moco import Moco, MocoOptions
from gigatome.selfsup.simclr import Simclr, SimclrOptions
from gigatome.slides.cohort import Cohort
from gigatome.tiles.stream import TileStream
from gigatome.training.launch import own_device

Data = Cohort | EmbeddingStore | AugmentedStore | str | Path
"""What recipes learn from, or where it lies."""


@final
class TileData:
    """Tiles, read from slides as they are needed.

    Args:
        recipe: what is trained.
        data: a cohort, or what :meth:`Cohort.read` takes.

    Raises:
        ConfigError: ``data`` is a store.
        CohortError: the cohort cannot be used.
    """

    def __init__(self, recipe: TileRecipe | PixelRecipe, data: Data):
        if isinstance(data, EmbeddingStore | AugmentedStore):
            raise ConfigError(
                f"a recipe of level {recipe.level} learns from slides, not from the embeddings in {data.folder}"
            )
        self.recipe, self.cohort = recipe, Cohort.read(data)

    def facts(self) -> dict[str, int]:
        """How much there is."""
        return {"slides": len(self.cohort), "patients": len({slide.patient for slide in self.cohort})}

    def record(self) -> dict[str, Any]:
        """What a run folder keeps of the data, to know them again."""
        return {"cohort": config.digest([(slide.name, slide.mpp) for slide in self.cohort])}

    def method(self) -> Dino | Dinov2 | Moco | Simclr:
        """The method with its initial weights."""
        recipe = self.recipe
        if isinstance(recipe, PixelRecipe):
            card = LongVitCard(_short(recipe.name) or "longvit", recipe.encoder, mpp=recipe.tiles.mpp)
            return Dino(PixelLevel(card, recipe.checkpointing), recipe.dino, seed=recipe.fit.seed)
        more: Mapping[str, Any] = {"seed": recipe.fit.seed, "name": _short(recipe.name), "mpp": recipe.tiles.mpp}
        match recipe.options:
            case DinoOptions() as options:
                return Dino(recipe.encoder, options, **more)
            case Dinov2Options() as options:
                return Dinov2(recipe.encoder, options, **more)
            case MocoOptions() as options:
                return Moco(recipe.encoder, options, **more)
            case SimclrOptions() as options:
                return Simclr(recipe.encoder, options, **more)

    def stream(self, job: Path, progress: Progress) -> TileStream:
        """This process's tiles; takes tissue from ``job``, or finds it and keeps it there."""
        fit = self.recipe.fit
        return TileStream(
            self.cohort, self.recipe.tiles, batch_size=fit.batch_size, seed=fit.seed, job=Job(job),
            rank=rank(), world_size=world_size(), progress=progress,
        )  # fmt: skip


@final
class RegionData:
    """Regions, read from a store of grids.

    Args:
        recipe: what is trained.
        data: a store, or what :meth:`EmbeddingStore.open` takes.

    Raises:
        ConfigError: ``data`` is a cohort, or the encoder takes embeddings of another size.
        StoreError: the store holds no grids that can be used; :class:`RegionStream` says more.
    """

    def __init__(self, recipe: RegionRecipe, data: Data):
        if isinstance(data, Cohort | AugmentedStore):
            raise ConfigError(
                "a recipe of level region learns from a store of grids: give the folder of the embeddings"
            )
        store, fit = data if isinstance(data, EmbeddingStore) else EmbeddingStore.open(data), recipe.fit
        self.recipe, self._store = recipe, store
        self._stream = RegionStream(
            store, recipe.regions, batch_size=fit.batch_size, seed=fit.seed, rank=rank(), world_size=world_size()
        )
        if self._stream.dim != recipe.encoder.input_dim:
            raise ConfigError(
                f"{store.folder}: holds embeddings of {self._stream.dim} numbers by {self._stream.encoder}, and "
                f"encoder.input_dim is {recipe.encoder.input_dim}; set encoder.input_dim={self._stream.dim}, or take "
                "another store"
            )

    def facts(self) -> dict[str, int]:
        """How much there is."""
        return {"slides": len(self._stream.names), "regions": len(self._stream)}

    def record(self) -> dict[str, Any]:
        """What a run folder keeps of the data, to know them again, and the card of what it trains."""
        return {"cohort": self._stream.digest(), "card": config.to_dict(self._card())}

    def method(self) -> Dino:
        """The method with its initial weights."""
        tile = self._store.encoder_folder
        level = RegionLevel(self._card(), tile if tile.is_dir() else None)
        return Dino(level, self.recipe.dino, seed=self.recipe.fit.seed)

    def stream(self, job: Path, progress: Progress) -> RegionStream:
        """This process's regions; neither a job directory nor any preparation is needed."""
        return self._stream

    def _card(self) -> RegionCard:
        stream = self._stream
        return RegionCard(
            _short(self.recipe.name) or "region-vit", self.recipe.encoder, tile_encoder=stream.encoder,
            tile_weights=stream.weights, tile_size=stream.tile_size, mpp=stream.mpp, tiles=stream.tiles,
        )  # fmt: skip


@final
class SlideData:
    """Slides, read from a store of augmented embeddings.

    Args:
        recipe: what is trained.
        data: a store, or what :class:`gigatome.embeddings.augmented_files.AugmentedFiles` takes.

    Attributes:
        recipe: with the number of slides for an epoch, if it names none.

    Raises:
        ConfigError: ``data`` is something else, the encoder takes embeddings of another size, or the run is too short
            for its warm-up.
        StoreError: the store cannot be used; :class:`AugmentedStream` says more.
    """

    def __init__(self, recipe: SlideRecipe, data: Data):
        if isinstance(data, Cohort | EmbeddingStore):
            raise ConfigError(
                "a recipe of level slide learns from augmented embeddings: give the folder that gigatome embed "
                "--augmentations has written"
            )
        fit = recipe.fit
        self._stream = AugmentedStream(
            data, recipe.slides, batch_size=fit.batch_size, seed=fit.seed, rank=rank(), world_size=world_size(),
            device=own_device(fit.device),
        )  # fmt: skip
        kind = self._stream.kind
        if kind.dim != recipe.encoder.input_dim:
            raise ConfigError(
                f"{self._stream.where}: holds embeddings of {kind.dim} numbers by {kind.encoder}, and "
                f"encoder.input_dim is {recipe.encoder.input_dim}; set encoder.input_dim={kind.dim}, or take another "
                "store"
            )
        self.recipe = replace(recipe, fit=fit.of_epoch(len(self._stream)))

    def facts(self) -> dict[str, int]:
        """How much there is."""
        return {"slides": len(self._stream)}

    def record(self) -> dict[str, Any]:
        """What a run folder keeps of the data, to know them again, and the card of what it trains."""
        return {"cohort": self._stream.digest(), "card": config.to_dict(self._card())}

    def method(self) -> Simclr:
        """The method with its initial weights."""
        tile = self._stream.where / "encoder"
        level = SlideLevel(self._card(), self.recipe.encoder.weights, tile if tile.is_dir() else None)
        return Simclr(level, self.recipe.simclr, seed=self.recipe.fit.seed)

    def stream(self, job: Path, progress: Progress) -> AugmentedStream:
        """This process's slides; neither a job directory nor any preparation is needed."""
        self._stream.progress = progress
        return self._stream

    def _card(self) -> SlideCard:
        kind, slides = self._stream.kind, self.recipe.slides
        return SlideCard(
            _short(self.recipe.name) or "giga-ssl", self.recipe.encoder.network_config, tile_encoder=kind.encoder,
            tile_weights=kind.weights, tile_size=kind.tile_size, mpp=kind.mpp, tiles=slides.tiles, frame=slides.frame,
        )  # fmt: skip


def open_data(recipe: AnyRecipe, data: Data) -> TileData | RegionData | SlideData:
    """The data that a recipe learns from; raises what the classes above do."""
    match recipe:
        case TileRecipe() | PixelRecipe():
            return TileData(recipe, data)
        case RegionRecipe():
            return RegionData(recipe, data)
        case SlideRecipe():
            return SlideData(recipe, data)


def _short(name: str) -> str | None:
    return name.replace("/", "-") or None

"""The embeddings of units, slides or patients, in the forms that heads learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError, EvaluationError
from gigatome.embeddings.bags import BagReader
from gigatome.embeddings.region_tiles import RegionTiles
from gigatome.embeddings.regions import BACKGROUND, TILES
from gigatome.embeddings.slide_store import Embeddings
from gigatome.embeddings.slide_vectors import VIEW_TILES

_TILING = {
    "patch_size": "px",
    "target_mpp": "µm per pixel",
    "target_magnification": "× magnification",
    TILES: "to a region's side",
    VIEW_TILES: "to a view of a slide",
}


@final
@dataclass(frozen=True)
class Origin:
    """What made embeddings.

    Attributes:
        encoder: its name.
        weights: hash of its weights; "" if no file says.
        dim: size of an embedding.
        tiling: of "patch_size", "target_mpp", "target_magnification", for regions "region_tiles" and for slides
            "view_tiles" what the files state.
        background: of regions, whether their tiles without tissue were left out, "mask", or embedded too, "encode";
            "" if the files do not say.
    """

    encoder: str
    weights: str
    dim: int
    tiling: Mapping[str, float]
    background: str = ""

    def refuse_other(self, other: "Origin", where: object) -> None:
        """Raises :class:`EvaluationError` if embeddings of ``where`` are by another encoder, or of other tiles."""
        known = bool(self.weights and other.weights)
        if self.dim != other.dim or (self.weights != other.weights if known else self.encoder != other.encoder):
            unsure = "" if known or self.dim != other.dim else ", and no hash says that the weights are the same"
            raise EvaluationError(
                f"{where}: embeddings of {other.dim} numbers by {other.encoder} (weights "
                f"{other.weights or 'unknown'}); the head learnt from {self.dim} by {self.encoder} (weights "
                f"{self.weights or 'unknown'}){unsure}. Embed the slides with that encoder"
            )
        for key, unit in _TILING.items():
            here, there = other.tiling.get(key), self.tiling.get(key)
            if here is not None and there is not None and abs(here - there) > 0.01 * abs(there):
                raise EvaluationError(
                    f"{where}: tiles of {here:g} {unit}, the head learnt from {there:g}; embed such tiles"
                )
        if self.background and other.background and self.background != other.background:
            raise EvaluationError(
                f"{where}: regions embedded with --background {other.background}, the head learnt from those with "
                f"--background {self.background}; embed them so"
            )


@final
class UnitData:
    """The embeddings of units; a unit of several slides has the tiles, or regions, of all of them.

    Args:
        store: the embeddings.
        names: of the units.
        slides: names of each unit's slides, at least one.
        omics: groups of further values of each unit, float [N, n_k] each, for heads that take them.

    Attributes:
        store: the embeddings.
        names: of the units.
        slides: of each unit.
        omics: of each unit.
        tiles: reader of the tiles of all slides, which are those of their regions where files hold regions.
        reader: of all slides, one after another, as their files are: of tiles or of regions.

    Raises:
        StoreError: a slide has no embeddings or no tiles, or a file is damaged.
    """

    def __init__(
        self,
        store: Embeddings,
        names: Sequence[str],
        slides: Sequence[Sequence[str]],
        omics: tuple[NDArray[np.float64], ...] = (),
    ):
        self.store, self.names, self.omics = store, tuple(names), omics
        self.slides = tuple(tuple(members) for members in slides)
        self.reader = BagReader(store, list(dict.fromkeys(slide for members in slides for slide in members)))
        self.tiles = RegionTiles(self.reader) if len(self.reader.shape) == 2 else self.reader
        self._vectors: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def bags(self, needs: frozenset[str]) -> BagReader | RegionTiles:
        """What a model takes: the regions of files of regions, or their tiles.

        Args:
            needs: of the model, as of :attr:`~gigatome.mil.model.BagModel.needs`.

        Raises:
            ConfigError: the files do not hold what it needs.
        """
        grids = self.tiles is not self.reader
        if "regions" in needs and not grids:
            raise ConfigError(
                f"{self.store.folder}: holds one embedding of each tile, or of each region, and this head takes "
                "regions as grids of tile embeddings; write them with gigatome embed … --level region"
            )
        if "region embeddings" in needs and grids:
            raise ConfigError(
                f"{self.store.folder}: holds regions as grids of tile embeddings, and this head takes one embedding of "
                "each region; write them with gigatome embed … --level region and a region encoder, or use hipt_lgp_fc"
            )
        return self.reader if "regions" in needs else self.tiles

    @property
    def vectors(self) -> NDArray[np.float32]:
        """float32 [N, D], the mean embedding of each unit's tiles, those of regions too.

        Raises:
            EvaluationError: a slide has embeddings that are not finite.
            StoreError: a file is missing or damaged.
        """
        if self._vectors is None:
            found, means = self.store.slide_vectors(self.reader.names)
            lost = set(self.reader.names) - set(found)
            if lost:
                raise EvaluationError(f"{min(lost)}: has no usable embeddings in {self.store.folder}; embed it again")
            row = {name: k for k, name in enumerate(found)}
            rows = [[row[slide] for slide in members] for members in self.slides]
            sizes = self.tiles.sizes
            self._vectors = np.stack(
                [
                    means[members[0]] if len(members) == 1 else np.average(means[members], 0, sizes[members])
                    for members in rows
                ]
            ).astype(np.float32)
        return self._vectors

    @cached_property
    def origin(self) -> Origin:
        """What made the embeddings.

        Raises:
            EvaluationError: the slides' tiles differ in size or resolution, or the background of their regions does.
        """
        first, *others = self.reader.names
        tiling, background = _stated(self.store, first)
        for name in others:
            if (stated := _stated(self.store, name)) != (tiling, background):
                both = f"{first} ({tiling} {background}) and {name} ({stated[0]} {stated[1]})"
                raise EvaluationError(
                    f"{self.store.folder}: slides are cut into different tiles: {both}; embed them alike"
                )
        return Origin(self.reader.encoder, self.reader.weights, self.reader.dim, tiling, background)

    def select(self, indices: NDArray[np.int64]) -> "UnitData":
        """Some of the units; what has been read is shared."""
        part = UnitData.__new__(UnitData)
        part.store, part.reader, part.tiles = self.store, self.reader, self.tiles
        part.names, part.slides = tuple(self.names[i] for i in indices), tuple(self.slides[i] for i in indices)
        part.omics = tuple(group[indices] for group in self.omics)
        part._vectors = None if self._vectors is None else self._vectors[indices]
        return part


def tiling_of(store: Embeddings, name: str) -> dict[str, float]:
    """What a slide's file states of its tiling, as of :class:`Origin`; raises :class:`EvaluationError`."""
    return _stated(store, name)[0]


def _stated(store: Embeddings, name: str) -> tuple[dict[str, float], str]:
    """Tiling, and background of the regions, that a slide's file states."""
    attrs = store.attributes(name)
    try:
        stated = {key: float(attrs[key]) for key in _TILING if key in attrs}
    except ValueError as error:
        raise EvaluationError(f"{name}: its file states a tiling that is no number ({error})") from error
    rounded = {key: value if value.is_integer() else float(f"{value:.3g}") for key, value in stated.items()}
    return rounded, str(attrs.get(BACKGROUND, ""))

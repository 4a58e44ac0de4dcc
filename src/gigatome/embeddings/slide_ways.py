"""How the tiles of a slide become one vector: as Giga-SSL does it, as Prov-GigaPath does it, or by their mean."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import generator
from gigatome.embeddings.augmented import AugmentedBag, tile_side
from gigatome.embeddings.encoding import Maker, Precision, computing_in
from gigatome.embeddings.store import Bag, BagHeader
from gigatome.encoders.folders import unique_name
from gigatome.encoders.giga import GigaEncoder
from gigatome.encoders.gigapath import GigapathEncoder, check_places, grid_places
from gigatome.encoders.gigapath_zoo import GigapathCard, gigapath_digest
from gigatome.encoders.on_tiles import weights_with_tiles
from gigatome.encoders.slide_zoo import Frame, SlideCard, frame_places, slide_name, slide_weights

SlideEncoder: TypeAlias = tuple[GigaEncoder, SlideCard] | tuple[GigapathEncoder, GigapathCard]
"""A slide encoder and its card."""


@dataclass(frozen=True)
class SlideVectorOptions:
    """How a slide is seen; Source: Giga-SSL (arXiv:2212.03273), 50 views of 5 tiles.

    Attributes:
        views: R, whose embeddings are averaged; the mean is then L2-normalised.
        tiles: of a view, T; None for as many as a view had in training. A slide with fewer has one view, of them all.
        drawing: ``"partition"``, as in the authors' later work: tiles are dealt without replacement, T to a view, and
            again when they run out, so that all count alike; ``"replacement"``, as in the paper: each view draws T
            with replacement; ``"all"``: one view of all tiles.
        frame: of the places of tiles; None for the one that the slide encoder was trained on.
        seed: of the draws, ≥ 0. View k of a slide depends on the seed, the slide's name, its number of tiles and k.
    """

    views: int = 50
    tiles: int | None = None
    drawing: Literal["partition", "replacement", "all"] = "partition"
    frame: Frame | None = None
    seed: int = 0

    def __post_init__(self):
        if self.views < 1 or (self.tiles is not None and self.tiles < 1) or self.seed < 0:
            raise ConfigError("views and their tiles must be at least 1, and the seed not negative")
        if self.drawing not in ("partition", "replacement", "all"):
            raise ConfigError(f"there is no drawing {self.drawing}; there are partition, replacement, all")


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """A slide and its views: rows int64 [R, T] of their tiles, and places int64 [R, T, 2], (column, row)."""

    name: str
    bag: Bag | AugmentedBag
    rows: NDArray[np.int64]
    places: NDArray[np.int64]

    @property
    def tiles(self) -> NDArray[Any]:
        """[N, D]; of augmented tiles one draw after the other."""
        return self.bag.embeddings.reshape(-1, self.bag.embeddings.shape[-1])


class Way(Protocol):
    """One of the ways."""

    @property
    def model(self) -> nn.Module:
        """What has to be on the device."""
        ...

    @property
    def card(self) -> SlideCard | GigapathCard | None:
        """Of the slide encoder, if there is one."""
        ...

    @property
    def maker(self) -> Maker:
        """As files name the vectors' encoder."""
        ...

    @property
    def how(self) -> Mapping[str, Any]:
        """What decides a vector, given the tiles and the encoders."""
        ...

    @property
    def view_tiles(self) -> int | None:
        """Tiles of a view, 0 for all of them; None without views."""
        ...

    @property
    def alone(self) -> bool:
        """Whether slides are encoded one by one."""
        ...

    def look(self, name: str, bag: Bag | AugmentedBag) -> Seen:
        """What is seen of a slide.

        Raises:
            KeyError: the tiling does not state what it takes to know where tiles lie.
            ConfigError: they lie where the encoder knows no places.
        """
        ...

    def encode(self, seen: Sequence[Seen]) -> list[NDArray[np.float32]]:
        """Vectors [D] of some slides, by the model on its device.

        Raises:
            ValueError: it cannot encode one of the slides.
        """
        ...


def way_of(
    given: SlideEncoder | None,
    tiles: BagHeader,
    options: SlideVectorOptions,
    *,
    name: str | None,
    device: str,
    precision: Precision,
    augmented: bool,
) -> Way:
    """The way of a slide encoder, or the mean of tiles without one.

    Args:
        given: the slide encoder.
        tiles: of any slide, for the tile encoder.
        options: how slides are seen.
        name: of the slide encoder in file and folder names; the default tells other weights apart.
        device: where it runs.
        precision: that Prov-GigaPath's computes in.
        augmented: whether the tiles are draws of augmented ones.

    Raises:
        ConfigError: the options or the tiles are not for this slide encoder.
    """
    match given:
        case None:
            return _Mean(tiles, name)
        case (GigaEncoder() as encoder, SlideCard() as card):
            return _Views(encoder, card, tiles, options, name, device)
        case (GigapathEncoder() as encoder, GigapathCard() as card):
            if augmented or options not in (SlideVectorOptions(), SlideVectorOptions(drawing="all")):
                raise ConfigError(
                    f"{card.name} sees all tiles of a slide at once and as they are; leave out views, their tiles, "
                    "drawing, frame and seed, and give it no augmented tiles"
                )
            return _Whole(encoder, card, tiles, name, device, precision)
    raise ConfigError("a slide encoder and its own card are needed, such as open_any_slide_encoder gives them")


@final
class _Mean:
    """The mean of tiles."""

    card, view_tiles, alone = None, None, True
    how: Mapping[str, Any] = {"pooling": "mean"}

    def __init__(self, tiles: BagHeader, name: str | None):
        self.model = nn.Identity()
        digest = hashlib.sha256(f"mean {tiles.weights}".encode()).hexdigest()[:16]
        self.maker = Maker(name or f"mean-{tiles.encoder}", digest if tiles.weights else "", tiles.dim)

    def look(self, name: str, bag: Bag | AugmentedBag) -> Seen:
        return Seen(name, bag, np.zeros((0, 0), np.int64), np.zeros((0, 0, 2), np.int64))

    def encode(self, seen: Sequence[Seen]) -> list[NDArray[np.float32]]:
        return [one.tiles.mean(0, dtype=np.float64).astype(np.float32) for one in seen]


@final
class _Views:
    """The normalised mean over views of a few tiles each, through Giga-SSL's encoder."""

    def __init__(
        self,
        encoder: GigaEncoder,
        card: SlideCard,
        tiles: BagHeader,
        options: SlideVectorOptions,
        name: str | None,
        device: str,
    ):
        self.model, self.card, self._device = encoder, card, device
        self._options = replace(options, tiles=options.tiles or card.tiles, frame=options.frame or card.frame)
        name = name or slide_name(encoder, card, tiles.weights)
        self.maker = Maker(name, slide_weights(encoder, tiles.weights), encoder.dim)
        self.how = asdict(self._options)
        self.view_tiles = 0 if options.drawing == "all" else self._options.tiles
        self.alone = encoder.config.edges == "batch"  # then a slide depends on the others of a batch

    def look(self, name: str, bag: Bag | AugmentedBag) -> Seen:
        groups = len(bag.embeddings) if isinstance(bag, AugmentedBag) else 1
        rows = draw_views(self._options, name, bag.coords[..., 0].size // groups, groups)
        coords = bag.coords.reshape(-1, 2)
        frame = self._options.frame or "tile"
        seen = frame_places(coords, tile_side(bag.attrs) if frame == "tile" else 1.0, frame)[rows]
        return Seen(name, bag, rows, np.floor(seen - seen.min(1, keepdims=True)).astype(np.int64))

    def encode(self, seen: Sequence[Seen]) -> list[NDArray[np.float32]]:
        x = np.concatenate([one.tiles[one.rows.ravel()] for one in seen], dtype=np.float32)
        cells = np.concatenate([one.places.reshape(-1, 2) for one in seen])
        bounds = np.cumsum([0, *(one.rows.shape[1] for one in seen for _ in one.rows)])
        parts = (torch.from_numpy(part).to(self._device) for part in (x, cells, bounds))
        try:
            with torch.inference_mode():
                found = self.model(*parts).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{self._device} lacks the memory for {len(x)} tiles at once") from error
        vectors = []
        for start, one in zip(np.cumsum([0, *(len(one.rows) for one in seen)]), seen, strict=False):
            mean = found[start : start + len(one.rows)].mean(0, dtype=np.float64)
            vectors.append((mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32))
        return vectors


@final
class _Whole:
    """All tiles at once, in the order of their file, through Prov-GigaPath's encoder."""

    view_tiles, alone = 0, True

    def __init__(
        self,
        encoder: GigapathEncoder,
        card: GigapathCard,
        tiles: BagHeader,
        name: str | None,
        device: str,
        precision: Precision,
    ):
        self.model, self.card, self._device = encoder, card, device
        self._precision: Precision = precision
        self.how = {"drawing": "all", "precision": precision}
        weights = weights_with_tiles(gigapath_digest(encoder), tiles.weights)
        self.maker = Maker(name or unique_name(card.name, weights), weights, encoder.dim)

    def look(self, name: str, bag: Bag | AugmentedBag) -> Seen:
        places = grid_places(bag.coords, tile_side({**bag.attrs, "overlap": 0}))
        check_places(places, self.model.config.grid)
        return Seen(name, bag, np.arange(len(places))[None], places[None])

    def encode(self, seen: Sequence[Seen]) -> list[NDArray[np.float32]]:
        return [self._encode(one) for one in seen]

    def _encode(self, seen: Seen) -> NDArray[np.float32]:
        x, places = torch.from_numpy(seen.tiles)[None], torch.from_numpy(seen.places)
        try:
            with torch.inference_mode(), computing_in(self._precision, self._device):
                return self.model(x, places)[0].float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            hint = "; compute in bf16, which takes less" if self._precision == "fp32" else ""
            raise ConfigError(
                f"{seen.name}: {self._device} lacks the memory for its {len(seen.tiles)} tiles{hint}"
            ) from error


def draw_views(options: SlideVectorOptions, name: str, tiles: int, groups: int = 1) -> NDArray[np.int64]:
    """Which tiles each view of a slide has, int64 [R, T].

    Args:
        options: how; without ``tiles`` a view has 5.
        name: of the slide.
        tiles: of each group.
        groups: draws of augmented tiles, one after the other; view k sees the (k mod ``groups``)-th.
    """
    wanted = options.tiles or 5
    if options.drawing == "all" or (tiles <= wanted and options.drawing == "partition"):
        return np.arange(groups * tiles).reshape(groups, tiles)[: options.views]
    random = generator(options.seed, "slide_vectors", name)
    if options.drawing == "replacement":
        chosen = random.integers(tiles, size=(options.views, wanted))
    else:
        each, rounds = tiles // wanted, -(-options.views // (groups * (tiles // wanted)))
        dealt = [[random.permutation(tiles)[: each * wanted] for _ in range(groups)] for _ in range(rounds)]
        hands = np.array(dealt).reshape(rounds, groups, each, wanted)
        chosen = hands.transpose(0, 2, 1, 3).reshape(-1, wanted)[: options.views]
    return chosen + np.arange(options.views)[:, None] % groups * tiles

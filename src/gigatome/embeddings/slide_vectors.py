"""Embeddings of tiles in, one embedding a slide out: the mean over views of a few tiles each."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gigatome.core.errors import ConfigError, MissingExtraError, StoreError
from gigatome.core.job import Job, TilesDir
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.seeding import generator
from gigatome.core.version import __version__
from gigatome.embeddings.augmented import AugmentedBag, AugmentedStore, tile_cells
from gigatome.embeddings.encoding import Maker, ready
from gigatome.embeddings.run import write_shard_failures
from gigatome.embeddings.slide_store import TABLE, SlideStore, read_slide_vector, write_slide_vector
from gigatome.embeddings.store import WEIGHTS, Bag, BagHeader, EmbeddingStore, read_header
from gigatome.encoders.giga import GigaEncoder
from gigatome.encoders.slide_zoo import Frame, SlideCard, open_slide_encoder, slide_name, slide_weights
from gigatome.slides.cohort import Cohort, patient_of

HOW = "slide_options"
"""Attribute of ``features``: what decides a slide's vector, given its tiles and the encoders, as JSON."""

VIEW_TILES = "view_tiles"
"""Attribute of ``features``: tiles of a view; 0 for all of them."""

_GRID = "grid_digest"
_OF_THE_FILE = ("name", "savetodir")
_TILES_AT_ONCE = 8192
_AUTHORS_SIDES = {"authors_training": 224.0, "authors_inference": 896.0}


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


def embed_slide_vectors(
    source: EmbeddingStore | AugmentedStore | str | Path,
    *,
    slide_encoder: tuple[GigaEncoder, SlideCard] | str | Path | None,
    out: str | Path | None = None,
    cohort: Cohort | None = None,
    options: SlideVectorOptions | None = None,
    device: str = "cpu",
    name: str | None = None,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: Progress = silent,
) -> SlideStore:
    """Embeds slides from the embeddings of their tiles; no slide is read.

    Writes a file a slide, whole or not at all, and, when it works on all slides and not on a shard of them, one table
    of all that lie in the folder. Slides that are done are skipped; one that cannot be embedded becomes a failure.
    Several processes may work at once: they write the same. A vector does not depend on the other slides, save for
    rounding.

    Args:
        source: embeddings of tiles, or what :meth:`EmbeddingStore.open` takes; those of augmented tiles are used as
            the authors' code does, which augments at inference too.
        slide_encoder: what :func:`~gigatome.encoders.slide_zoo.open_slide_encoder` takes; None for the mean embedding.
        out: job directory; that of ``source`` by default.
        cohort: which slides, and their patients; all of ``source`` by default, patients by their TCGA barcodes.
        options: how slides are seen.
        device: where the slide encoder runs, in float32.
        name: of the slide encoder in file and folder names; the default tells other weights apart.
        shard: (i, n) takes every n-th slide from the i-th, from 0.
        overwrite: replace embeddings by other weights, or made in another way, of the same name.
        progress: told of each slide.

    Returns:
        The store of all slides in the folder; its ``failures`` are the slides that could not be embedded.

    Raises:
        ConfigError: an option does not fit, or the tiles are by another encoder than the slide encoder was made for.
        StoreError: there are no embeddings of tiles, they are by different encoders, or the folder holds embeddings by
            other weights, or made in another way, of the same name.

    Source: Giga-SSL; differs: tiles without replacement by default, and neighbours 1 cell apart as in our training.
    """
    store = source if isinstance(source, EmbeddingStore | AugmentedStore) else EmbeddingStore.open(source)
    names = store.names()[shard[0] :: shard[1]] if cohort is None else [s.name for s in cohort][shard[0] :: shard[1]]
    patients = {} if cohort is None else {slide.name: slide.patient for slide in cohort}
    run = _Run(store, slide_encoder, Path(out or store.job), options or SlideVectorOptions(), name, device)
    run.failures += store.failures
    lost = {failure.slide for failure in store.failures}
    with ready(run.model, device):
        todo = run.unfinished([name for name in dict.fromkeys(names) if name not in lost], overwrite)
        done = len(names) - len(todo)
        for slide, vector, seen in run.vectors(todo):
            done += 1
            if vector is not None and seen is not None:
                run.write(seen, vector, patients.get(slide) or patient_of(slide))
            progress("slides", done, len(names))
    write_shard_failures(Job(run.job), shard, run.failures)
    return run.result(patients, table=shard[1] == 1)


def tiles_for(path: str | Path, card: SlideCard | None, encoder: str | None = None) -> EmbeddingStore:
    """The embeddings of tiles at ``path`` that a slide encoder takes; the only ones, where it does not say.

    Args:
        path: what :meth:`EmbeddingStore.open` takes.
        card: of the slide encoder; None for any.
        encoder: name of the tile encoder in folder names.

    Raises:
        StoreError: there are none, or several to choose from.
    """
    found = [store for store in EmbeddingStore.find(path) if encoder in (None, store.encoder)]
    if card is not None and len(found) > 1:
        found = [store for store in found if _takes(card, store)] or found
    if len(found) == 1:
        return found[0]
    return EmbeddingStore.open(path, encoder=encoder)


def _takes(card: SlideCard, store: EmbeddingStore) -> bool:
    header = next((read_header(store.path(name)) for name in store.names()[:1]), None)
    if header is None:
        return False
    return header.dim == card.config.input_dim and header.weights in (card.tile_weights, "")


@final
class _Run:
    """One call of :func:`embed_slide_vectors`."""

    def __init__(
        self,
        store: EmbeddingStore | AugmentedStore,
        slide_encoder: tuple[GigaEncoder, SlideCard] | str | Path | None,
        job: Path,
        options: SlideVectorOptions,
        name: str | None,
        device: str,
    ):
        self._store, self._device, self.job = store, device, job
        self.failures: list[Failure] = []
        first = next((header for slide in store.names() if (header := self._header(slide))), None)
        if first is None:
            why = "".join(f" ({one.slide}: {one.message})" for one in (*store.failures, *self.failures)[:1])
            raise StoreError(f"{store.folder}: holds no embeddings of tiles{why}; embed them first")
        self.failures.clear()  # each slide is looked at again
        self._tiles = first
        given = open_slide_encoder(slide_encoder) if isinstance(slide_encoder, str | Path) else slide_encoder
        augmented = {"tiles_of": "augmented"} if isinstance(store, AugmentedStore) else {}
        if given is None:
            digest = hashlib.sha256(f"mean {first.weights}".encode()).hexdigest()[:16]
            self.model, self.card, self.options = nn.Identity(), None, options
            self.maker = Maker(name or f"mean-{first.encoder}", digest if first.weights else "", first.dim)
            how: dict[str, Any] = {"pooling": "mean"}
        else:
            self.model, self.card = given
            self.card.check_tiles(first.encoder, first.weights, first.dim, store.folder)
            self.options = replace(
                options, tiles=options.tiles or self.card.tiles, frame=options.frame or self.card.frame
            )
            name = name or slide_name(self.model, self.card, first.weights)
            self.maker = Maker(name, slide_weights(self.model, first.weights), self.model.dim)
            how = asdict(self.options)
        self.how = json.dumps({**how, **augmented}, sort_keys=True)
        self.folder = TilesDir(job / store.tiles.path.name).slide_features(self.maker.name)

    def unfinished(self, names: Sequence[str], overwrite: bool) -> list[str]:
        """Slides with tiles that have no vector of this kind yet; the others are done, or failures."""
        there = set(self._store.names())
        for name in (name for name in names if name not in there):
            message = f"has no embeddings of tiles in {self._store.folder}"
            self.failures.append(Failure(name, "embed", StoreError.__name__, message))
        todo = []
        for name in (name for name in names if name in there):
            header = self._header(name)
            if header is None:
                continue
            if (header.weights, header.dim) != (self._tiles.weights, self._tiles.dim):
                raise StoreError(
                    f"{self._store.folder}: embeddings of tiles are by different encoders: slide {name} by "
                    f"{header.encoder} (weights {header.weights or 'unknown'}), others by {self._tiles.encoder} "
                    f"(weights {self._tiles.weights or 'unknown'}); embed all by one"
                )
            if not header.coords.size:
                self.failures.append(Failure(name, "embed", StoreError.__name__, "has no tiles"))
            elif not self._done(name, header, overwrite):
                todo.append(name)
        return todo

    def vectors(self, names: Sequence[str]) -> "Iterator[tuple[str, NDArray[np.float32] | None, _Seen | None]]":
        """The vector of each slide and its tiles; None where there is none, for which a failure tells the reason."""
        alone = self.card is None or self.card.config.edges == "batch"  # then a slide depends on the others of a batch
        waiting: list[_Seen] = []
        for name in names:
            try:
                waiting.append(self._look(name))
                if name == names[0]:
                    self._compare(waiting[0].bag.attrs)
            except StoreError as error:
                self._fail(name, error)
                yield name, None, None
                continue
            if alone or sum(seen.rows.size for seen in waiting) >= _TILES_AT_ONCE:
                yield from self._encoded(waiting)
                waiting = []
        yield from self._encoded(waiting)

    def write(self, seen: "_Seen", vector: NDArray[np.float32], patient: str) -> None:
        """Writes a slide's file."""
        stated = {key: value for key, value in seen.bag.attrs.items() if key not in _OF_THE_FILE}
        stated |= {"tile_encoder": self._tiles.encoder, "tile_encoder_weights": self._tiles.weights}
        stated |= {HOW: self.how, _GRID: _digest(seen.bag.coords), "version": __version__}
        if self.card is not None:
            stated[VIEW_TILES] = 0 if self.options.drawing == "all" else self.options.tiles
        write_slide_vector(
            self.folder / f"{seen.name}.h5", vector,
            encoder=self.maker.name, weights=self.maker.weights, patient=patient, stated=stated,
        )  # fmt: skip

    def result(self, patients: Mapping[str, str], *, table: bool) -> SlideStore:
        """What lies in the folder, and was made a table if asked for."""
        if self.folder.is_dir():
            store = SlideStore.open(self.folder)
        else:
            nothing = np.zeros((0, self.maker.dim), np.float32)
            store = SlideStore(self.folder, self.maker.name, self.maker.weights, (), nothing)
        store = replace(store, patients={**store.patients, **patients}, failures=tuple(self.failures))
        if table and len(store):
            try:
                store.write_table(self.folder / TABLE)
            except MissingExtraError as error:
                log.warning("%s: %s is left out; %s", self.folder, TABLE, error)
        return store

    def _header(self, name: str) -> BagHeader | None:
        """What a slide's file of tiles says of itself; None, and a failure, if it cannot be read."""
        try:
            if isinstance(self._store, EmbeddingStore):
                return read_header(self._store.path(name))
            bag = self._store.read(name)
        except StoreError as error:
            self._fail(name, error)
            return None
        weights = str(bag.encoding.get(WEIGHTS, ""))
        return BagHeader(bag.encoder, weights, bag.embeddings.shape[-1], bag.coords)

    def _done(self, name: str, header: BagHeader, overwrite: bool) -> bool:
        path = self.folder / f"{name}.h5"
        if not path.is_file():
            return False
        try:
            vector, attrs = read_slide_vector(path)
        except StoreError as error:
            log.warning("%s; it is embedded again", error)
            return False
        held = attrs.get(WEIGHTS), attrs.get(HOW)
        if held != (self.maker.weights, self.how) or len(vector) != self.maker.dim:
            if overwrite:
                return False
            raise StoreError(
                f"{self.folder}: holds slide embeddings that are made otherwise (slide {name}: weights {held[0]}, "
                f"{held[1]}; wanted are {self.maker.weights}, {self.how}); give these another name, or pass overwrite "
                "to replace them"
            )
        return attrs.get(_GRID) == _digest(header.coords)

    def _look(self, name: str) -> "_Seen":
        """Views of a slide; raises :class:`StoreError`."""
        bag = self._store.read(name)
        if not np.isfinite(np.sum(bag.embeddings, dtype=np.float64)):
            raise StoreError(f"{self._store.path(name)}: has embeddings that are not finite; embed the slide again")
        if self.card is None:
            return _Seen(name, bag, np.zeros((0, 0), np.int64), np.zeros((0, 0, 2), np.int64))
        groups = len(bag.embeddings) if isinstance(bag, AugmentedBag) else 1
        rows = draw_views(self.options, name, bag.coords[..., 0].size // groups, groups)
        coords = bag.coords.reshape(-1, 2)
        try:
            frame = self.options.frame or "tile"
            places = tile_cells(coords, bag.attrs) if frame == "tile" else coords / _AUTHORS_SIDES[frame]
        except KeyError as error:
            raise StoreError(f"{self._store.path(name)}: does not state {error}, and so not where tiles lie") from error
        seen = places[rows]
        return _Seen(name, bag, rows, np.floor(seen - seen.min(1, keepdims=True)).astype(np.int64))

    def _compare(self, attrs: Mapping[str, Any]) -> None:
        """Warns of tiles unlike those of training."""
        used = attrs.get("patch_size"), attrs.get("target_mpp")
        if self.card is None or None in used or used == (self.card.tile_size, self.card.mpp):
            return
        text = "%s: was trained on embeddings of tiles of %d px at %g mpp; these are of %d px at %g mpp"
        log.warning(text, self.card.name, self.card.tile_size, self.card.mpp, *used)

    def _encoded(self, seen: "Sequence[_Seen]") -> "Iterator[tuple[str, NDArray[np.float32] | None, _Seen]]":
        try:
            vectors = self._encode(seen) if seen else []
        except ValueError as error:  # of one slide: find it
            if len(seen) > 1:
                yield from itertools.chain.from_iterable(self._encoded([one]) for one in seen)
                return
            self._fail(seen[0].name, error)
            vectors = [None]
        for one, vector in zip(seen, vectors, strict=True):
            if vector is not None and not np.isfinite(vector).all():
                self._fail(one.name, StoreError("its embedding is not finite"))
                vector = None
            yield one.name, vector, one

    def _encode(self, seen: "Sequence[_Seen]") -> list[NDArray[np.float32]]:
        if self.card is None:
            return [one.tiles.mean(0, dtype=np.float64).astype(np.float32) for one in seen]
        x = np.concatenate([one.tiles[one.rows.ravel()] for one in seen], dtype=np.float32)
        cells = np.concatenate([one.cells.reshape(-1, 2) for one in seen])
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

    def _fail(self, name: str, error: Exception) -> None:
        self.failures.append(Failure.of(name, "embed", error))


@final
@dataclass(frozen=True, eq=False)
class _Seen:
    """A slide and its views: rows int64 [R, T] of their tiles, and cells int64 [R, T, 2], from 0."""

    name: str
    bag: Bag | AugmentedBag
    rows: NDArray[np.int64]
    cells: NDArray[np.int64]

    @property
    def tiles(self) -> NDArray[Any]:
        """[N, D]; of augmented tiles one draw after the other."""
        return self.bag.embeddings.reshape(-1, self.bag.embeddings.shape[-1])


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


def _digest(coords: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(coords).tobytes()).hexdigest()[:16]

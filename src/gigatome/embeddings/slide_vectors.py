"""Embeddings of tiles in, one embedding a slide out."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gigatome.core.errors import ConfigError, MissingExtraError, StoreError
from gigatome.core.job import Job, TilesDir
from gigatome.core.logs import Failure, Progress, log, silent
from gigatome.core.version import __version__
from gigatome.embeddings.augmented import AugmentedStore
from gigatome.embeddings.encoding import Precision, ready
from gigatome.embeddings.run import write_shard_failures
from gigatome.embeddings.slide_store import TABLE, SlideStore, read_slide_vector, write_slide_vector
from gigatome.embeddings.slide_ways import Seen, SlideEncoder, SlideVectorOptions, way_of
from gigatome.embeddings.store import WEIGHTS, BagHeader, EmbeddingStore, read_header
from gigatome.encoders.gigapath_zoo import GigapathCard
from gigatome.encoders.slide_zoo import SlideCard, open_any_slide_encoder
from gigatome.slides.cohort import Cohort, patient_of

HOW = "slide_options"
"""Attribute of ``features``: what decides a slide's vector, given its tiles and the encoders, as JSON."""

VIEW_TILES = "view_tiles"
"""Attribute of ``features``: tiles of a view; 0 for all of them."""

_GRID = "grid_digest"
_OF_THE_FILE = ("name", "savetodir")
_TILES_AT_ONCE = 8192


def embed_slide_vectors(
    source: EmbeddingStore | AugmentedStore | str | Path,
    *,
    slide_encoder: SlideEncoder | str | Path | None,
    out: str | Path | None = None,
    cohort: Cohort | None = None,
    options: SlideVectorOptions | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
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
            Giga-SSL's code does, which augments at inference too.
        slide_encoder: what :func:`~gigatome.encoders.slide_zoo.open_any_slide_encoder` takes or returns; None for the
            mean embedding.
        out: job directory; that of ``source`` by default.
        cohort: which slides, and their patients; all of ``source`` by default, patients by their TCGA barcodes.
        options: how Giga-SSL's encoder sees slides; Prov-GigaPath's sees all tiles of one at once.
        device: where the slide encoder runs.
        precision: that Prov-GigaPath's computes in; Giga-SSL's computes in float32.
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
    run = _Run(store, slide_encoder, Path(out or store.job), options or SlideVectorOptions(), name, device, precision)
    run.failures += store.failures
    lost = {failure.slide for failure in store.failures}
    with ready(run.way.model, device):
        todo = run.unfinished([name for name in dict.fromkeys(names) if name not in lost], overwrite)
        done = len(names) - len(todo)
        for slide, vector, seen in run.vectors(todo):
            done += 1
            if vector is not None and seen is not None:
                run.write(seen, vector, patients.get(slide) or patient_of(slide))
            progress("slides", done, len(names))
    write_shard_failures(Job(run.job), shard, run.failures)
    return run.result(patients, table=shard[1] == 1)


def tiles_for(path: str | Path, card: SlideCard | GigapathCard | None, encoder: str | None = None) -> EmbeddingStore:
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


def _takes(card: SlideCard | GigapathCard, store: EmbeddingStore) -> bool:
    header = next((read_header(store.path(name)) for name in store.names()[:1]), None)
    if header is None:
        return False
    return header.dim == card.config.input_dim and (not card.tile_weights or header.weights in (card.tile_weights, ""))


@final
class _Run:
    """One call of :func:`embed_slide_vectors`."""

    def __init__(
        self,
        store: EmbeddingStore | AugmentedStore,
        slide_encoder: SlideEncoder | str | Path | None,
        job: Path,
        options: SlideVectorOptions,
        name: str | None,
        device: str,
        precision: Precision,
    ):
        self._store, self.job = store, job
        self.failures: list[Failure] = []
        first = next((header for slide in store.names() if (header := self._header(slide))), None)
        if first is None:
            why = "".join(f" ({one.slide}: {one.message})" for one in (*store.failures, *self.failures)[:1])
            raise StoreError(f"{store.folder}: holds no embeddings of tiles{why}; embed them first")
        self.failures.clear()  # each slide is looked at again
        self._tiles = first
        given = open_any_slide_encoder(slide_encoder) if isinstance(slide_encoder, str | Path) else slide_encoder
        if given is not None:
            given[1].check_tiles(first.encoder, first.weights, first.dim, store.folder)
        augmented = isinstance(store, AugmentedStore)
        self.way = way_of(given, first, options, name=name, device=device, precision=precision, augmented=augmented)
        self.maker = self.way.maker
        self.how = json.dumps({**self.way.how, **({"tiles_of": "augmented"} if augmented else {})}, sort_keys=True)
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

    def vectors(self, names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32] | None, Seen | None]]:
        """The vector of each slide and its tiles; None where there is none, for which a failure tells the reason."""
        waiting: list[Seen] = []
        for name in names:
            try:
                waiting.append(self._look(name))
                if name == names[0]:
                    self._compare(waiting[0].bag.attrs)
            except StoreError as error:
                self._fail(name, error)
                yield name, None, None
                continue
            if self.way.alone or sum(seen.rows.size for seen in waiting) >= _TILES_AT_ONCE:
                yield from self._encoded(waiting)
                waiting = []
        yield from self._encoded(waiting)

    def write(self, seen: Seen, vector: NDArray[np.float32], patient: str) -> None:
        """Writes a slide's file."""
        stated = {key: value for key, value in seen.bag.attrs.items() if key not in _OF_THE_FILE}
        stated |= {"tile_encoder": self._tiles.encoder, "tile_encoder_weights": self._tiles.weights}
        stated |= {HOW: self.how, _GRID: _digest(seen.bag.coords), "version": __version__}
        if self.way.view_tiles is not None:
            stated[VIEW_TILES] = self.way.view_tiles
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

    def _look(self, name: str) -> Seen:
        """What is seen of a slide; raises :class:`StoreError`."""
        bag, path = self._store.read(name), self._store.path(name)
        if not np.isfinite(np.sum(bag.embeddings, dtype=np.float64)):
            raise StoreError(f"{path}: has embeddings that are not finite; embed the slide again")
        try:
            return self.way.look(name, bag)
        except KeyError as error:
            raise StoreError(f"{path}: does not state {error}, and so not where tiles lie") from error
        except ConfigError as error:
            raise StoreError(f"{path}: {error}") from error

    def _compare(self, attrs: Mapping[str, Any]) -> None:
        """Warns of tiles unlike those of training."""
        used = attrs.get("patch_size"), attrs.get("target_mpp")
        card = self.way.card
        if card is None or None in used or used == (card.tile_size, card.mpp):
            return
        text = "%s: was trained on embeddings of tiles of %d px at %g mpp; these are of %d px at %g mpp"
        log.warning(text, card.name, card.tile_size, card.mpp, *used)

    def _encoded(self, seen: Sequence[Seen]) -> Iterator[tuple[str, NDArray[np.float32] | None, Seen]]:
        try:
            vectors = self.way.encode(seen) if seen else []
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

    def _fail(self, name: str, error: Exception) -> None:
        self.failures.append(Failure.of(name, "embed", error))


def _digest(coords: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(coords).tobytes()).hexdigest()[:16]

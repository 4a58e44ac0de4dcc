"""What lies under which key when a slide, or a cohort, is seen as a Zarr v3 hierarchy.

Levels of slides that are decoded here have the chunks of the file, as they stand in it. Levels that another reader
reads are cut into pieces of pixels.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final

from gigatome.blob.store import Blob, redact
from gigatome.slides.cohort import Cohort
from gigatome.slides.index import LevelIndex
from gigatome.slides.resample import WHITE
from gigatome.slides.slide import Slide
from gigatome.slides.zarr_codec import PIXELS, ChunkCodec

Axes = Literal["yxc", "cyx"]
"""Order of an array's axes: rows, columns, colours as everywhere in gigatome; or as OME-Zarr demands."""

Span = Callable[[int], tuple[int, int]]
"""From the length of a value to the part of it that is wanted: start and stop, inside it."""

_DOCUMENT = "zarr.json"
_NUMBER = "(0|[1-9][0-9]{0,8})"
_CHUNK = re.compile("/".join([_NUMBER, "c", _NUMBER, _NUMBER, _NUMBER]))
# A chunk's axes, whatever those of its array.
_STORED: Axes = "yxc"
_PIECE = 512
_MAX_PIECE = 2048
_COLOURS = {"red": "FF0000", "green": "00FF00", "blue": "0000FF"}


class Tree(Protocol):
    """Keys and values of a hierarchy; thread-safe. Everything may open slides, and raise what that raises."""

    label: str

    def read(self, key: str, span: Span) -> bytes | None:
        """Part of the value of a key; None if there is no such key."""
        ...

    def size(self, key: str) -> int | None:
        """Length of a value in bytes; None if there is no such key."""
        ...

    def children(self, prefix: str) -> Iterator[str]:
        """Names directly under a path, "" for the root; none if it does not exist."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that begin with ``prefix``."""
        ...


class _Level(Protocol):
    """Chunks of one level.

    Attributes:
        rows, columns: of chunks.
        chunk_width, chunk_height: of every chunk, in pixels.
        codecs: from uint8 [height, width, 3] to a chunk's bytes.
    """

    rows: int
    columns: int
    chunk_width: int
    chunk_height: int
    codecs: list[dict[str, Any]]

    def size(self, row: int, column: int) -> int:
        """Length of a chunk in bytes; 0 for one that is white and need not be read."""
        ...

    def read(self, row: int, column: int, start: int, stop: int) -> bytes:
        """Part of a chunk."""
        ...


@final
class _PixelLevel:
    """A level as pixels, in pieces of whole chunks of the file where they are not too large for that."""

    def __init__(self, slide: Slide, level: int):
        this = slide.levels[level]
        self._slide, self._level = slide, level
        self.chunk_width, self.chunk_height = _piece(this.chunk_width), _piece(this.chunk_height)
        self.rows, self.columns = -(-this.height // self.chunk_height), -(-this.width // self.chunk_width)
        self.codecs: list[dict[str, Any]] = [{"name": "bytes"}]

    def size(self, row: int, column: int) -> int:
        return self.chunk_height * self.chunk_width * 3

    def read(self, row: int, column: int, start: int, stop: int) -> bytes:
        return _pixels(self._slide, self._level, self, row, column)[start:stop]


def _piece(chunk: int) -> int:
    """Side of a piece: the fewest chunks that make 512 pixels; 512 if the reader does not tell or chunks are strips."""
    return chunk * -(-_PIECE // chunk) if 0 < chunk <= _MAX_PIECE else _PIECE


@final
class _StoredLevel:
    """A level as the compressed chunks of its file; a chunk that is left out and not white is given as pixels."""

    def __init__(self, slide: Slide, level: int, blob: Blob, index: LevelIndex, *, white: bool):
        self._slide, self._level, self._blob, self._index, self._white = slide, level, blob, index, white
        self.chunk_width, self.chunk_height = index.chunk_width, index.chunk_height
        self.rows, self.columns = index.counts.shape
        self.codecs = [ChunkCodec(redact(slide.uri), level, index.coding).to_dict()]

    def size(self, row: int, column: int) -> int:
        stored = int(self._index.counts[row, column])
        return stored or (0 if self._white else len(PIXELS) + self.chunk_height * self.chunk_width * 3)

    def read(self, row: int, column: int, start: int, stop: int) -> bytes:
        if self._index.counts[row, column]:
            return self._blob.read(int(self._index.offsets[row, column]) + start, stop - start)
        return (PIXELS + _pixels(self._slide, self._level, self, row, column))[start:stop]


def _pixels(slide: Slide, number: int, level: _Level, row: int, column: int) -> bytes:
    width, height = level.chunk_width, level.chunk_height
    return slide.read_level(number, column * width, row * height, width, height).tobytes()


@final
class SlideTree:
    """One slide: a group of OME-Zarr multiscales with an array for each level, named "0", "1" and so on.

    Args:
        slide: stays open for as long as the tree is read.
        axes: order of the axes of the arrays.
    """

    def __init__(self, slide: Slide, axes: Axes):
        self.label, self._slide, self._axes = redact(slide.uri), slide, axes
        self._levels = _levels(slide)
        self._documents = {_DOCUMENT: _group({"ome": _multiscales(slide, axes)})}
        for number, (stored, level) in enumerate(zip(slide.levels, self._levels, strict=True)):
            self._documents[f"{number}/{_DOCUMENT}"] = _array(stored.width, stored.height, level, axes)

    def read(self, key: str, span: Span) -> bytes | None:
        """See :meth:`Tree.read`."""
        document = self._documents.get(key)
        if document is not None:
            return document[slice(*span(len(document)))]
        place = self._place(key)
        if place is None:
            return None
        level, row, column = place
        return level.read(row, column, *span(level.size(row, column)))

    def size(self, key: str) -> int | None:
        """See :meth:`Tree.size`."""
        if key in self._documents:
            return len(self._documents[key])
        place = self._place(key)
        return place and place[0].size(*place[1:])

    def children(self, prefix: str) -> Iterator[str]:
        """See :meth:`Tree.children`."""
        start = f"{prefix}/" if prefix else ""
        levels = (f"{number}/c/" for number in range(len(self._levels)))
        # The chunks of a level are many, and looked through only where they are asked for.
        keys = self.keys(start) if "/" in prefix else [*self._documents, *levels]
        yield from dict.fromkeys(key[len(start) :].split("/", 1)[0] for key in keys if key.startswith(start))

    def keys(self, prefix: str) -> Iterator[str]:
        """See :meth:`Tree.keys`."""
        yield from (key for key in self._documents if key.startswith(prefix))
        for number, level in enumerate(self._levels):
            start = f"{number}/c/"
            if not start.startswith(prefix[: len(start)]):
                continue
            for row in range(level.rows):
                for column in range(level.columns):
                    place = {"y": row, "x": column, "c": 0}
                    key = start + "/".join(str(place[axis]) for axis in self._axes)
                    if key.startswith(prefix) and level.size(row, column):
                        yield key

    def close(self) -> None:
        """Closes the slide."""
        self._slide.close()

    def _place(self, key: str) -> tuple[_Level, int, int] | None:
        """Level, row and column of a chunk that has a value."""
        match = _CHUNK.fullmatch(key)
        if match is None:
            return None
        number, *numbers = (int(group) for group in match.groups())
        place = dict(zip(self._axes, numbers, strict=True))
        if number >= len(self._levels) or place["c"]:
            return None
        level, row, column = self._levels[number], place["y"], place["x"]
        there = row < level.rows and column < level.columns and level.size(row, column)
        return (level, row, column) if there else None


def _levels(slide: Slide) -> list[_Level]:
    if slide.source is None:
        return [_PixelLevel(slide, number) for number in range(len(slide.levels))]
    blob, index = slide.source
    return [
        _StoredLevel(slide, number, blob, level, white=number == 0 or index.gaps == "white")
        for number, level in enumerate(index.levels)
    ]


def _group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _multiscales(slide: Slide, axes: Axes) -> dict[str, Any]:
    """OME-Zarr metadata; in µm, or in pixels of level 0 without a unit where the slide has no mpp."""
    mpp, unit = (slide.mpp, {"unit": "micrometer"}) if slide.has_mpp else (1.0, {})
    described = {
        "y": {"name": "y", "type": "space", **unit},
        "x": {"name": "x", "type": "space", **unit},
        "c": {"name": "c", "type": "channel"},
    }
    datasets = []
    for number, level in enumerate(slide.levels):
        scale = {"y": level.scale_y * mpp, "x": level.scale_x * mpp, "c": 1.0}
        transformation = {"type": "scale", "scale": [scale[axis] for axis in axes]}
        datasets.append({"path": str(number), "coordinateTransformations": [transformation]})
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [{"label": label, "color": colour, "window": window} for label, colour in _COLOURS.items()]
    multiscale = {"name": slide.name, "axes": [described[axis] for axis in axes], "datasets": datasets}
    return {"version": "0.5", "multiscales": [multiscale], "omero": {"channels": channels}}


def _array(width: int, height: int, level: _Level, axes: Axes) -> bytes:
    shape = {"y": height, "x": width, "c": 3}
    chunk = {"y": level.chunk_height, "x": level.chunk_width, "c": 3}
    transpose = {"name": "transpose", "configuration": {"order": [axes.index(axis) for axis in _STORED]}}
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [shape[axis] for axis in axes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk[axis] for axis in axes]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": WHITE,
        "codecs": level.codecs if axes == _STORED else [transpose, *level.codecs],
        "dimension_names": list(axes),
        "attributes": {},
    }
    return json.dumps(document).encode()


@dataclass(eq=False)
class _Opened:
    users: int = 0
    tree: SlideTree | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)


@final
class CohortTree:
    """A group with a slide's group under each slide's name.

    Args:
        cohort: the slides.
        axes: order of the axes of the arrays.
        open_slides: how many slides to keep open, those last used; more may be open while they are read.
    """

    def __init__(self, cohort: Cohort, axes: Axes, open_slides: int):
        self.label, self._limit = cohort.source, open_slides
        self._axes: Axes = axes
        self._slides = {slide.name: slide for slide in cohort}
        self._document = _group({})
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, key: str, span: Span) -> bytes | None:
        """See :meth:`Tree.read`."""
        if key == _DOCUMENT:
            return self._document[slice(*span(len(self._document)))]
        name, _, rest = key.partition("/")
        if name not in self._slides:
            return None
        with self._use(name) as tree:
            return tree.read(rest, span)

    def size(self, key: str) -> int | None:
        """See :meth:`Tree.size`."""
        if key == _DOCUMENT:
            return len(self._document)
        name, _, rest = key.partition("/")
        if name not in self._slides:
            return None
        with self._use(name) as tree:
            return tree.size(rest)

    def children(self, prefix: str) -> Iterator[str]:
        """See :meth:`Tree.children`."""
        name, _, rest = prefix.partition("/")
        if not name:
            yield from (_DOCUMENT, *self._slides)
        elif name in self._slides:
            with self._use(name) as tree:
                yield from tree.children(rest)

    def keys(self, prefix: str) -> Iterator[str]:
        """See :meth:`Tree.keys`; opens the slides one after another."""
        if _DOCUMENT.startswith(prefix):
            yield _DOCUMENT
        start, inside, rest = prefix.partition("/")
        for name in self._slides:
            if name == start or (not inside and name.startswith(start)):
                with self._use(name) as tree:
                    yield from (f"{name}/{key}" for key in tree.keys(rest))

    def close(self) -> None:
        """Closes the slides that nobody reads; later use opens them again."""
        self._let_go(0)

    @contextmanager
    def _use(self, name: str) -> Iterator[SlideTree]:
        """Context in which a slide is open."""
        with self._lock:
            opened = self._opened.setdefault(name, _Opened())
            self._opened.move_to_end(name)
            opened.users += 1
        try:
            with opened.opening:
                if opened.tree is None:
                    opened.tree = SlideTree(self._slides[name].open(), self._axes)
            yield opened.tree
        finally:
            with self._lock:
                opened.users -= 1
            self._let_go(self._limit)

    def _let_go(self, limit: int) -> None:
        """Closes slides beyond ``limit``, those first that were used longest ago, and none that is being read."""
        with self._lock:
            surplus = max(0, len(self._opened) - limit)
            names = [name for name, opened in self._opened.items() if not opened.users][:surplus]
            idle = [self._opened.pop(name).tree for name in names]
        for tree in idle:
            if tree is not None:
                tree.close()

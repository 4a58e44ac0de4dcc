"""The streams that :mod:`benchmarks.bench_stream` compares, each as an iterator over batches of tiles.

All read the same tiles, drawn before by gigatome's sampler, and none looks for tissue, filters or augments while it is
timed. Peers read with OpenSlide, at whole pixels of the coarsest level that is fine enough (between the pixels of a
level OpenSlide interpolates, which is slower), and shrink where the level is finer; they do so in as many processes of
PyTorch's DataLoader as gigatome has threads, with as many batches read ahead. Their slides stay open.

``OpenSlide Dataset``: ``read_region``, ``convert("RGB")`` and, where need be, the fastest resize, OpenCV's by area.

``wsistream``: its ``WsiStreamDataset`` with ``OpenSlideBackend``, uint8 out. Its own classes are replaced as far as it
provides for that: the sampler by one that hands it the drawn tiles and has ``output_size``, so that the pipeline
resizes (bilinear); the tissue detector by one that calls everything tissue, and looks at no thumbnail. Each slide is
named once a worker, as workers share out the slides; ``patches_per_slide`` is so high that none is closed.

``wsistream, own sampler``: the same with ``MultiMagnificationSampler``. It takes the level nearest to the resolution
and reads it as it is: of slides with levels of 0.25 and 1.0 mpp, tiles of 0.5 mpp come at 0.25 and those of 2.0 at 1.0.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np

from gigatome.core.version import __version__
from gigatome.slides.slide import Slide
from gigatome.tiles.sampler import TileRequest
from gigatome.tiles.stream import TileStream

GIGATOME, PLAIN, WSISTREAM, WSISTREAM_OWN = "gigatome", "OpenSlide Dataset", "wsistream", "wsistream, own sampler"
BATCH, TILE = 64, 256
AHEAD = 2  # batches that each worker reads ahead
_TOLERANCE = 1.02  # a level may be coarser than wanted by this much
_ALL = 10**9


class Tile(NamedTuple):
    """A tile as a reader of levels takes it: its slide's path, the level, its corner in level-0 pixels, its side in
    pixels of the level, and the resolution that it is to have.
    """

    path: str
    level: int
    x: int
    y: int
    side: int
    mpp: float


@dataclass(frozen=True)
class Batch:
    """What a stream gives: images uint8 [B, H, W, 3] or [B, 3, H, W], and path, x, y and mpp of the first of them."""

    images: Any
    first: tuple[str, int, int, float]


@dataclass(frozen=True)
class Contender:
    """One stream.

    Attributes:
        name: for display.
        version: of its package.
        start: ``start(round)`` gives a context with an iterator over the batches of a round.
    """

    name: str
    version: str
    start: Callable[[int], AbstractContextManager[Iterator[Batch]]]


def on_level(slide: Slide, request: TileRequest, path: str) -> Tile:
    """The tile on the grid of the level that a user of OpenSlide would read, where gigatome would move it too."""
    wanted = request.mpp / slide.mpp
    fine = [k for k, level in enumerate(slide.levels) if level.downsample <= _TOLERANCE * wanted]
    index = max(fine, default=0)
    level = slide.levels[index]
    shrink = max(1, round(wanted / level.downsample))
    side = TILE * shrink
    x, y = (
        round(min(max(0, round(at / scale / shrink)), (size - side) // shrink) * shrink * scale)
        for at, scale, size in (
            (request.x, level.scale_x, level.width),
            (request.y, level.scale_y, level.height),
        )
    )
    return Tile(path, index, x, y, side, request.mpp)


def contenders(
    stream: TileStream, start_step: Callable[[int], int], tiles: Callable[[int], Sequence[Tile]], mpps: Sequence[float]
) -> tuple[list[Contender], dict[str, str]]:
    """All that are installed, gigatome first, and why others are left out.

    Args:
        stream: gigatome's.
        start_step: number of the first batch of a round.
        tiles: of the first batches of a round.
        mpps: resolutions, µm per pixel.
    """
    found = [Contender(GIGATOME, __version__, lambda number: _gigatome(stream, start_step(number)))]
    left_out: dict[str, str] = {}
    workers, paths = stream.options.threads, [slide.uri for slide in stream.cohort]
    for name, distributions, make in (
        (PLAIN, ("openslide-python", "openslide-bin"), _PlainDataset),
        (WSISTREAM, ("wsistream",), partial(_wsistream, paths, workers, mpps, False)),
        (WSISTREAM_OWN, ("wsistream",), partial(_wsistream, paths, workers, mpps, True)),
    ):
        try:
            version = ", ".join(importlib.metadata.version(item) for item in distributions)
        except importlib.metadata.PackageNotFoundError as error:
            left_out[name] = f"{error.name} is not installed"
            continue
        found.append(Contender(name, version, partial(_loaded, make, tiles, workers)))
    return found, left_out


@contextmanager
def _gigatome(stream: TileStream, start: int) -> Iterator[Iterator[Batch]]:
    with stream:
        yield (
            Batch(batch.images, (stream.cohort.slides[batch.slides[0]].uri, *batch.coords[0].tolist(), batch.mpp[0]))
            for batch in stream.batches(start)
        )


@contextmanager
def _loaded(
    make: Callable[[Sequence[Tile]], Any], tiles: Callable[[int], Sequence[Tile]], workers: int, number: int
) -> Iterator[Iterator[Batch]]:
    """Batches of a dataset that is made of a round's tiles, from a DataLoader."""
    data = importlib.import_module("torch.utils.data")
    options = {"num_workers": workers, "prefetch_factor": AHEAD, "multiprocessing_context": "fork"}
    batches = iter(data.DataLoader(make(tiles(number)), BATCH, worker_init_fn=_one_thread, **options))
    try:
        yield (
            Batch(found["image"], (found["slide_path"][0], *(found[key][0].item() for key in ("x", "y", "mpp"))))
            for found in batches
        )
    finally:
        batches._shutdown_workers()  # dropping it does so only when the last reference goes


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


class _PlainDataset:
    """A Dataset, as one writes it: opens each slide once a worker, reads, and shrinks if need be."""

    def __init__(self, tiles: Sequence[Tile]):
        self._tiles, self._open = tiles, {}

    def __len__(self) -> int:
        return _ALL

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, level, x, y, side, mpp = self._tiles[index % len(self._tiles)]
        if path not in self._open:
            self._open[path] = importlib.import_module("openslide").OpenSlide(path)
        image = np.array(self._open[path].read_region((x, y), level, (side, side)).convert("RGB"))
        if side != TILE:
            image = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
        return {"image": image, "slide_path": path, "x": x, "y": y, "mpp": mpp}


def _wsistream(paths: Sequence[str], workers: int, mpps: Sequence[float], own: bool, tiles: Sequence[Tile]) -> Any:
    backends, sampling, tissue, torch = (
        importlib.import_module(f"wsistream.{name}") for name in ("backends", "sampling", "tissue", "torch")
    )
    coordinate = importlib.import_module("wsistream.types").PatchCoordinate
    worker_info = importlib.import_module("torch.utils.data").get_worker_info

    class Drawn(sampling.PatchSampler):
        output_size = TILE

        def sample(self, slide: Any, tissue_mask: Any) -> Iterator[Any]:
            info, path = worker_info(), slide.properties.path
            mine = [tile for tile in tiles[info.id :: info.num_workers] if tile.path == path]
            while True:
                for tile in mine:
                    yield coordinate(tile.x, tile.y, tile.level, tile.side, tile.mpp, path)

    class Backend(backends.OpenSlideBackend):
        def get_thumbnail(self, size: tuple[int, int]) -> np.ndarray:
            return np.zeros((64, 64, 3), np.uint8)

    class All(tissue.TissueDetector):
        def detect(self, thumbnail: np.ndarray, downsample: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
            return np.ones(thumbnail.shape[:2], bool)

    return torch.WsiStreamDataset(
        [path for path in paths for _ in range(workers)],
        Backend(),
        All(),
        sampling.MultiMagnificationSampler(list(mpps), patch_size=TILE) if own else Drawn(),
        pool_size=len(paths),
        patches_per_slide=_ALL,
        seed=0,
        output_dtype="uint8",
    )


def difference(batch: Batch, slides: Mapping[str, Slide]) -> float:
    """Mean absolute difference of a batch's first tile from what gigatome reads there, in grey levels.

    Args:
        batch: of any stream.
        slides: by path.
    """
    path, x, y, mpp = batch.first
    image = np.asarray(batch.images[0])
    image = image.transpose(1, 2, 0) if image.shape[0] == 3 else image
    wanted = slides[path].read_tile(x, y, TILE, mpp, exact=False)
    return float(np.abs(image.astype(np.int16) - wanted).mean())

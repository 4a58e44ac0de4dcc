"""Reading slides from servers: ``python -m benchmarks.bench_remote [--write]``; prints JSON.

Starts each server of :mod:`benchmarks.servers` on this machine, whose cores it shares, and reads batches of random
unaligned tiles from it; beside that, in the same rounds, the same tiles from the disk and, where installed, with
tiffslide over fsspec (``pip install tiffslide "fsspec[http]" s3fs``).
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import operator
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import shapely

from benchmarks.output import add_slides, add_write, listed, write_result
from benchmarks.servers import SERVERS, MissingServerError, Server, nginx
from benchmarks.slides import ensure_slides
from gigatome.blob.remote import RemoteBlob
from gigatome.slides.cohort import Cohort, CohortSlide
from gigatome.slides.slide import Slide, open_slide
from gigatome.tiles.bench_result import machine
from gigatome.tiles.stream import TileStream
from gigatome.tissue.mask import TissueMask

TILE, BATCH, MPP = 256, 64, 0.25
# Batches that are on their way at a time, and slides that are opened at a time.
_AHEAD, _OPENING = 8, 16

Tiles = Sequence[tuple[int, int, int]]
"""Index of the slide, x and y of each tile."""


@dataclass(frozen=True)
class Result:
    """One slide on one server.

    Attributes:
        server: its name.
        delay_ms: added to each request.
        slide: the slide's coding.
        objects: under how many names the server has it; tiles are spread over all.
        opening_requests: to open one of them.
        tiles_per_second: remote; median.
        local_tiles_per_second: the same from the disk, by as many threads; median.
        share_of_local: remote over local, median of the rounds.
        tiffslide_tiles_per_second, times_tiffslide: of tiffslide over fsspec; None where it is not installed.
        fetched_over_needed: bytes.
        requests_per_tile: after joining.
        client_us, local_us, server_us: processor time a tile in the reader's process, remote and local, and in the
            server.
    """

    server: str
    delay_ms: float
    slide: str
    objects: int
    opening_requests: int
    tiles_per_second: float
    local_tiles_per_second: float
    share_of_local: float
    tiffslide_tiles_per_second: float | None
    times_tiffslide: float | None
    fetched_over_needed: float
    requests_per_tile: float
    client_us: float
    local_us: float
    server_us: float


def stream_of(slides: Sequence[Slide], uris: Sequence[str], options: argparse.Namespace) -> TileStream:
    """A stream of tiles at :data:`MPP` from anywhere on the slides, given under their addresses."""
    width, height = slides[0].width, slides[0].height
    anywhere = TissueMask.of([shapely.box(0, 0, width, height)], width, height, mpp=slides[0].mpp)
    entries = tuple(CohortSlide(uri, str(k), str(k), None) for k, uri in enumerate(uris))
    return TileStream(
        Cohort(entries, "benchmark"),
        masks={entry.name: anywhere for entry in entries},
        batch_size=BATCH,
        tile_size=TILE,
        mpp=[MPP],
        threads=options.threads,
        prefetch=_AHEAD,
        in_flight=options.in_flight,
    )


def take(stream: TileStream, step: int, count: int, server: Server) -> tuple[float, float, float]:
    """Seconds for ``count`` batches once the stream runs, and processor seconds of this process and of the server."""
    batches = stream.batches(step)
    for _ in range(_AHEAD):
        next(batches)
    began, used, served = time.perf_counter(), _cpu(), server.cpu_seconds()
    for _ in range(count):
        next(batches)
    spent = time.perf_counter() - began, _cpu() - used, server.cpu_seconds() - served
    batches.close()
    return spent


def measure(server: Server, key: str, path: Path, options: argparse.Namespace) -> Result:
    """Reads one slide, under each name that the server has it, in interleaved rounds."""
    uris = list(server.uris.values())
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_OPENING))
        remote = [stack.enter_context(slide) for slide in pool.map(partial(open_slide, keep_index=False), uris)]
        opening = _traffic(remote[0]).requests + 1
        local = [stack.enter_context(open_slide(path))] * len(remote)
        _check(local, remote, _draw(random.Random(0), remote, 8))
        streams = {
            "local": stack.enter_context(stream_of(local, [str(path)] * len(uris), options)),
            "remote": stack.enter_context(stream_of(remote, uris, options)),
        }
        rates, cpu = _rounds(streams, _tiffslide(server), partial(_draw, random.Random(1), remote), server, options)
        report = streams["remote"].report()
    count = options.rounds * options.batches * BATCH
    peer = statistics.median(rates["tiffslide"]) if rates["tiffslide"] else None
    speed = statistics.median(rates["remote"])
    return Result(
        server=server.name,
        delay_ms=1000 * server.delay,
        slide=key,
        objects=len(server.uris),
        opening_requests=opening,
        tiles_per_second=round(speed, 1),
        local_tiles_per_second=round(statistics.median(rates["local"]), 1),
        share_of_local=round(statistics.median(map(operator.truediv, rates["remote"], rates["local"])), 3),
        tiffslide_tiles_per_second=peer and round(peer, 2),
        times_tiffslide=peer and round(speed / peer, 1),
        fetched_over_needed=round(report.fetched / report.needed, 4),
        requests_per_tile=round(report.requests / report.tiles, 3),
        client_us=round(1e6 * cpu["remote"] / count),
        local_us=round(1e6 * cpu["local"] / count),
        server_us=round(1e6 * cpu["server"] / count),
    )


def _rounds(
    streams: Mapping[str, TileStream],
    peer: Any,
    draw: Callable[[int], Tiles],
    server: Server,
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tiles per second in each round, and processor seconds in all of them."""
    rates: dict[str, list[float]] = {"local": [], "remote": [], "tiffslide": []}
    cpu: dict[str, float] = {"local": 0.0, "remote": 0.0, "server": 0.0}
    for number in range(options.rounds):
        for name in sorted(streams, reverse=bool(number % 2)):
            seconds, used, served = take(streams[name], number * (options.batches + _AHEAD), options.batches, server)
            rates[name].append(options.batches * BATCH / seconds)
            cpu[name] += used
            cpu["server"] += served
        if peer is not None:
            began = time.perf_counter()
            for _, x, y in draw(options.peer_tiles):
                np.asarray(peer.read_region((x, y), 0, (TILE, TILE)))
            rates["tiffslide"].append(options.peer_tiles / (time.perf_counter() - began))
    return rates, cpu


def _draw(rng: random.Random, slides: Sequence[Slide], count: int) -> Tiles:
    """Random tiles that lie inside the slides."""
    width, height = slides[0].width - TILE, slides[0].height - TILE
    return [(rng.randrange(len(slides)), rng.randrange(width), rng.randrange(height)) for _ in range(count)]


def _check(local: Sequence[Slide], remote: Sequence[Slide], tiles: Tiles) -> None:
    """Raises SystemExit unless the server's pixels are those of the file."""
    for slide, x, y in tiles:
        for mpp in (MPP, 4 * MPP):
            expected, found = (slides[slide].read_tile(x, y, TILE, mpp) for slides in (local, remote))
            if not np.array_equal(expected, found):
                raise SystemExit(f"{remote[slide].uri}: the tile at {x}, {y} differs from the file's")


def _traffic(slide: Slide) -> Any:
    blob = slide.plan_tile(0, 0, TILE, MPP, exact=False).blob
    if not isinstance(blob, RemoteBlob):
        raise SystemExit(f"{slide.uri} is not read through ranges")
    return blob.traffic


def _tiffslide(server: Server) -> Any:
    """The slide opened by tiffslide, or None if that, or fsspec's part for this server, is not installed."""
    uri = next(iter(server.uris.values()))
    scheme = uri.partition(":")[0]
    needs = {"http": "aiohttp", "s3": "s3fs"}.get(scheme, "")
    if not needs or not all(importlib.util.find_spec(name) for name in ("tiffslide", needs)):
        return None
    import fsspec  # pyright: ignore[reportMissingImports]
    import tiffslide  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {}
    if scheme == "s3":
        where = server.environment
        options = {
            "key": where["AWS_ACCESS_KEY_ID"],
            "secret": where["AWS_SECRET_ACCESS_KEY"],
            "client_kwargs": {"endpoint_url": where["AWS_ENDPOINT_URL"], "region_name": where["AWS_REGION"]},
        }
    return tiffslide.TiffSlide(fsspec.open(uri, **options))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def run(options: argparse.Namespace) -> list[Result]:
    """All servers that are installed, all slides; nginx also with each slide under many names."""
    results = []
    paths = {key: path for key, path in ensure_slides(options.slides, options.side).items() if key in options.slide}
    for name in options.servers:
        for key, path in paths.items():
            for objects in (1, options.objects) if name == "nginx" and options.objects > 1 else (1,):
                names = {f"{key}_{k}.svs": path for k in range(objects)}
                start = partial(nginx, delay=options.delay / 1000) if name == "nginx" else SERVERS[name]
                print(f"{name}: {key} × {objects} …", file=sys.stderr)
                try:
                    with start(names) as server, _environment(server.environment):
                        results.append(measure(server, key, path, options))
                except MissingServerError as error:
                    print(f"{name} is left out: {error}", file=sys.stderr)
    return results


def markdown(results: Sequence[Result], command: str, conditions: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Reading slides from servers",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Batches of 64 random unaligned tiles of 256² pixels at 0.25 mpp, decoded to uint8. Server and reader share",
        "the cores. Rounds interleaved, medians; *share* is remote over local in the same round. nginx delays each",
        "request; the others answer as fast as they can, and are the limit. *objects*: the slide lies on the server",
        "under that many names, and tiles are spread over all. *µs*: processor time a tile, remote, local and in the",
        "server.",
        "",
        "| server | delay | slide | objects | tiles/s | local | share | tiffslide + fsspec | × | fetched / needed "
        "| requests a tile | requests to open | µs |",
        f"|{'---|' * 13}",
    ]
    for item in results:
        peer = "–" if item.tiffslide_tiles_per_second is None else f"{item.tiffslide_tiles_per_second:g}"
        times = "–" if item.times_tiffslide is None else f"{item.times_tiffslide:.0f}"
        lines.append(
            f"| {item.server} | {item.delay_ms:g} ms | {item.slide} | {item.objects} | {item.tiles_per_second:.0f} "
            f"| {item.local_tiles_per_second:.0f} | {item.share_of_local:.2f} | {peer} | {times} "
            f"| {item.fetched_over_needed:.3f} | {item.requests_per_tile:.2f} | {item.opening_requests} "
            f"| {item.client_us} / {item.local_us} / {item.server_us} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    add_slides(parser)
    parser.add_argument("--slide", nargs="+", default=["ycc422_256", "ycc420_240"], help="which of them to read")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--delay", type=float, default=50, help="ms that nginx adds to each request")
    parser.add_argument("--objects", type=int, default=64, help="names of each slide on nginx in a second run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=24, help="of 64 tiles, in a round")
    parser.add_argument("--peer-tiles", type=int, default=8, help="that tiffslide reads in a round")
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    parser.add_argument("--in-flight", type=int, default=512, help="requests")
    add_write(parser)
    options = parser.parse_args()
    conditions = {
        **machine(),
        "obstore": obstore.__version__,
        "threads": options.threads,
        "in flight": options.in_flight,
        "TOKIO_WORKER_THREADS": os.environ.get("TOKIO_WORKER_THREADS", "not set"),
    }
    results = run(options)
    print(json.dumps({"conditions": conditions, "results": [asdict(item) for item in results]}, indent=2))
    if options.write and results:
        command = f"python -m benchmarks.bench_remote --rounds {options.rounds} --batches {options.batches}"
        write_result(options.write, "remote", markdown(results, command, conditions), conditions)


if __name__ == "__main__":
    main()

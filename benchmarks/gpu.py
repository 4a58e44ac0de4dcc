"""Benchmarks that want a GPU: ``python -m benchmarks.gpu NAME``, from the working tree alone; prints JSON.

``stream``: DINO's training step of a ViT-S/16 in bfloat16, fed by :class:`TileStream` from synthetic slides made on the
spot. The same run on a few batches that are held in memory says how fast the device is; how much slower the run on the
stream is, is the share of the time that the device waited for tiles. Both in turn, medians of the rounds. On a CPU the
network and the decoding threads also share the cores.

Every other name is a script of its own, run on the GPU at the scale that matters there: ``step`` is
:mod:`benchmarks.bench_step`, and so on. ``giga`` is of TCGA's size, for which 80 GB must fit on the device.

Nothing is fetched. On a machine without a network bring the wheels of what is missing, as this says by name, and the
built extension (``src/gigatome/_native.abi3.so``), or build it there: ``python setup.py build_ext --inplace``.
``--device cpu --tiny`` shows that it works.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_NEEDED = {  # what is imported, and the package that holds it
    "cv2": "opencv-python-headless", "imagecodecs": "imagecodecs", "numpy": "numpy", "obstore": "obstore",
    "pydantic": "pydantic", "safetensors": "safetensors", "shapely": "shapely", "simplejpeg": "simplejpeg",
    "tifffile": "tifffile", "timm": "timm", "torch": "torch", "torchvision": "torchvision", "yaml": "pyyaml",
}  # fmt: skip
_NEEDED_BY = {
    "mil": {"h5py": "h5py", "scipy": "scipy", "sklearn": "scikit-learn"},
    "giga": {"h5py": "h5py"},
    "region_views": {"h5py": "h5py"},
    "regions": {"h5py": "h5py", "openslide": "openslide-python openslide-bin"},
}
_SCRIPTS = {  # what each measures, and the size at which it matters on a GPU
    "step": ("A step of DINO beside a plain one.", "--batch-size 64 --repeats 10 --precisions bf16"),
    "mil": ("An epoch of ABMIL beside CLAM's loop.", "--bags 200"),
    "regions": ("Regions embedded, beside HIPT's way.", "--regions 32"),
    "region_views": ("Views of regions, of which a GPU's stage 2 needs many.", ""),
    "sparse": ("Sparse convolutions beside dense ones.", ""),
    "giga": (
        "Epochs of Giga-SSL's pretraining at the scale of TCGA.",
        "--slides 11754 --augmentations 50 --tiles 256 --epochs 5 --no-files",
    ),
    "longnet": ("Dilated attention up to 1,048,576 tokens, and a training step of LongViT.", ""),
}
_LINES = 5  # lines of the log that each run writes; the first is its warm-up


def check(name: str) -> None:
    """Makes gigatome importable from the working tree; exits if a package that a benchmark needs is missing."""
    needed = _NEEDED | _NEEDED_BY.get(name, {})
    missing = sorted(package for module, package in needed.items() if importlib.util.find_spec(module) is None)
    if missing:
        packages = " ".join(missing)
        raise SystemExit(
            f"missing here: {packages}\nwith a network: pip install {packages}\n"
            f"without one: there, for Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
            f"pip download -d wheels {packages}; here, pip install --no-index --find-links wheels {packages}"
        )
    if importlib.util.find_spec("gigatome") is None:
        sys.path.insert(0, str(ROOT / "src"))


class _Held:
    """Batches held in memory, again and again: a stream that never keeps anyone waiting."""

    def __init__(self, batches: Iterator[Any], count: int = 4):
        self._batches = list(itertools.islice(batches, count))

    def batches(self, start_step: int = 0) -> Iterator[Any]:
        return itertools.cycle(self._batches)

    def state(self) -> dict[str, list[int]]:
        return {}

    def restore(self, state: Mapping[str, list[int]]) -> None:
        pass


def stream(options: argparse.Namespace) -> dict[str, Any]:
    """How long the device waits for tiles."""
    import torch

    from gigatome.core.native import NATIVE
    from gigatome.encoders.device import usable_device
    from gigatome.encoders.vit import EncoderConfig
    from gigatome.selfsup.dino import Dino, DinoOptions
    from gigatome.selfsup.views import ViewOptions
    from gigatome.slides.synthetic import SyntheticOptions, make_cohort
    from gigatome.tiles.stream import TileStream
    from gigatome.training.loop import FitOptions, fit

    device = usable_device(options.device)
    encoder, dino, tile = EncoderConfig(), DinoOptions(), {"tile_size": 256, "mpp": [0.25, 0.5, 1.0, 2.0]}
    if options.tiny:
        encoder = EncoderConfig(image_size=32, dim=48, depth=1, heads=2)
        views = ViewOptions(global_size=32, local_size=16, local_views=2)
        dino, tile = DinoOptions(views=views, out_dim=64, head_hidden_dim=32), {"tile_size": 64, "mpp": [0.5]}
    method = Dino(encoder, dino)
    fit_options = FitOptions(
        steps=options.steps, batch_size=options.batch_size, precision="bf16", device=options.device,
        log_every=max(1, options.steps // _LINES), save_every=options.steps,
    )  # fmt: skip
    rates: dict[str, list[float]] = {"held": [], "stream": []}
    waits, sentences = [], []
    with tempfile.TemporaryDirectory() as folder:
        print(f"making {options.slides} slides …", file=sys.stderr)
        size = SyntheticOptions(options.side, options.side, mpp=0.25)
        cohort = make_cohort(
            f"{folder}/cohort", patients=options.slides, slides_per_patient=1, options=size, threads=options.threads
        )
        tiles = TileStream(
            cohort, job=f"{folder}/job", batch_size=options.batch_size, threads=options.threads,
            prefetch=options.prefetch, **tile,
        )  # fmt: skip
        with tiles:
            held = _Held(tiles.batches())
        for number in range(options.rounds):
            for name, source in (("held", held), ("stream", tiles)):
                out = Path(folder) / f"{name}{number}"
                before = tiles.report()
                with tiles:
                    fit(method, source, fit_options, out)
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
                rates[name].append(len(lines) / sum(1 / line["images_per_s"] for line in lines))
                if name == "stream":
                    waits.append(sum(line["data_wait_s"] for line in lines) / len(lines))
                    sentences.append(tiles.report().since(before).sentence())
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "extension": NATIVE is not None,
        "encoder": dataclasses.asdict(encoder),
        "images_per_second_held": median(rates["held"]),
        "images_per_second_stream": median(rates["stream"]),
        "waited_share": median(1 - ours / free for ours, free in zip(rates["stream"], rates["held"], strict=True)),
        "host_waited_ms_a_step": 1000 * median(waits),
        "stream": sentences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    part = names.add_parser("stream", help=stream.__doc__)
    part.add_argument("--device", default="cuda")
    part.add_argument("--batch-size", type=int, default=256)
    part.add_argument("--steps", type=int, default=100, help="of each run")
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--threads", type=int, default=os.cpu_count(), help="that decode (default: as many as cores)")
    part.add_argument("--prefetch", type=int, default=4, help="batches read ahead")
    part.add_argument("--slides", type=int, default=16)
    part.add_argument("--side", type=int, default=8192, help="level-0 pixels along each side of a slide")
    part.add_argument("--tiny", action="store_true", help="a tiny network on tiny tiles, to see whether it works")
    for name, (about, _) in _SCRIPTS.items():
        names.add_parser(name, help=about, add_help=False)
    options, rest = parser.parse_known_args()
    check(options.name)
    if options.name == "stream":
        if rest:
            parser.error(f"unrecognised: {' '.join(rest)}")
        result = stream(options)
    else:
        script = importlib.import_module(f"benchmarks.bench_{options.name}")
        given = script.parser().parse_args(["--device", "cuda", *_SCRIPTS[options.name][1].split(), *rest])
        options = argparse.Namespace(name=options.name, **vars(given))
        result = script.run(options)
    print(json.dumps({"options": vars(options), **result}, indent=2, default=str))


if __name__ == "__main__":
    main()

"""``gigatome doctor``: what is installed, which devices there are, what each missing part would give."""

import importlib.metadata
import os
import platform
import sys

import typer
from rich.console import Console
from rich.table import Table

from gigatome.core.native import NATIVE
from gigatome.core.version import __version__

_PARTS = (
    # distribution, extra (None: always installed), what it gives
    ("simplejpeg", None, "decodes JPEG chunks"),
    ("imagecodecs", None, "decodes JPEG 2000, LZW and deflate chunks"),
    ("tifffile", None, "reads OME-TIFF and unusual TIFF"),
    ("obstore", None, "reads s3://, gs://, az:// and https://"),
    ("openslide-python", "openslide", "reads MRXS, SCN, DICOM and other formats that are not read directly"),
    ("zarr", "zarr", "shows slides and cohorts as Zarr"),
    ("torch", "learn", "trains and runs encoders"),
    ("timm", "learn", "the ViT architectures"),
    ("safetensors", "learn", "checkpoints and weights"),
    ("scikit-learn", "learn", "linear and kNN probes"),
    ("matplotlib", "learn", "charts of the report"),
    ("jinja2", "learn", "pages of the report"),
    ("tensorboard", "watch", "shows a training's figures (gigatome train --watch N --tensorboard)"),
    ("wandb", "watch", "reports a training to Weights & Biases"),
)


def doctor() -> None:
    """Say what is installed, which devices there are, and what each missing part would give."""
    console = Console()
    machine = f"{platform.system()} {platform.machine()} · {os.cpu_count()} cores"
    console.print(f"gigatome {__version__} · Python {platform.python_version()} · {machine}", highlight=False)
    table = Table("part", "version", "gives", box=None, pad_edge=False)
    missing: set[str] = set()
    for name, extra, gives in _PARTS:
        version = _version(name)
        if version is None:
            missing.add(extra or "")
            version = f"missing: pip install 'gigatome{f'[{extra}]' if extra else ''}'"
        table.add_row(name, version.replace("[", r"\["), gives)
    table.add_row("C extension", *_extension())
    console.print(table)
    console.print(f"devices: {', '.join(_devices())}", highlight=False)
    if "" in missing:
        console.print("A required part is missing: install gigatome again.", highlight=False)
        raise typer.Exit(1)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> tuple[str, str]:
    """Whether the C extension is there, and what it gives or why it is not used."""
    if NATIVE is not None:
        return "built", "decodes only what a tile needs of a JPEG chunk, without the GIL"
    if os.environ.get("GIGATOME_NATIVE") == "0":
        return "switched off", "GIGATOME_NATIVE is 0: the same pixels, at about half the speed"
    return "not built", "the same pixels at about half the speed; with GCC or Clang, install gigatome again from source"


def _devices() -> list[str]:
    if _version("torch") is None:
        return ["cpu (PyTorch is not installed, so no GPU can be seen)"]
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [
        f"cuda:{index} ({torch.cuda.get_device_name(index)}, {torch.cuda.mem_get_info(index)[1] / 2**30:.0f} GiB)"
        for index in range(torch.cuda.device_count())
    ]
    if sys.platform == "darwin" and torch.backends.mps.is_available():
        found.append("mps")
    return found

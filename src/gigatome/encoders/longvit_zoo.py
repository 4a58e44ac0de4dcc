"""LongViTs on disk.

A folder holds ``encoder.safetensors``, with the authors' keys, and ``encoder.json``, the card. One with a head, which
:mod:`gigatome.encoders.slide_vit` makes and writes, has the head among its weights and a card that says more. A fold of
a fine-tuning holds one of the last epoch in ``encoder/``, and, if an epoch was to be selected, that one's in ``best/``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.folders import (
    CARD_FILE,
    check_digest,
    find_folder,
    last_checkpoint,
    read_folder,
    stated,
    weights_digest,
    write_folder,
)
from gigatome.encoders.longvit import LongVit, LongVitConfig, load_longvit
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder
from gigatome.tiles.slide_images import SlideImageOptions

SLIDE_PIXELS = "slide pixels"
"""Level of a LongViT with a head."""

BEST = "best"
"""Folder, beside ``encoder/`` in that of a fold, of the LongViT that was selected; not there if none was to be."""

_MODEL = "?model=longvit"  # after a file of weights
_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class LongVitCard:
    """What one must know to use a LongViT.

    Attributes:
        name: short name.
        config: architecture, and the normalisation of its pixels.
        source: where the weights come from.
        licence: terms of the weights; empty for one's own.
        mpp: resolutions that it was trained at, µm per pixel.
    """

    name: str
    config: LongVitConfig
    source: str = ""
    licence: str = ""
    mpp: tuple[float, ...] = ()


@dataclass(frozen=True)
class SlideVitCard:
    """What one must know to use a LongViT with a head.

    Attributes:
        name: short name.
        config: architecture, and the normalisation of its pixels.
        images: what it was trained on; of these, ``image_size`` and ``aspect`` are those of prediction too.
        target: what it predicts: column of classes, or columns of a survival.
        level: what it predicts for, ``"slide"`` or ``"patient"``.
        classes: whose logits these are; empty for a survival.
        edges: of the time bins whose hazards these are, bins + 1; empty for classes, and for a log-risk.
        source: where the weights come from.
    """

    name: str
    config: LongVitConfig
    images: SlideImageOptions
    target: str
    level: str
    classes: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    source: str = ""


def save_longvit(encoder: LongVit, folder: str | Path, card: LongVitCard) -> None:
    """Writes a LongViT and its card into ``folder``."""
    content = {"level": "pixels", "card": configuration.to_dict(card), "digest": longvit_digest(encoder)}
    write_folder(Path(folder), encoder, content)


def open_longvit(spec: str | Path) -> tuple[LongVit, LongVitCard]:
    """A LongViT in evaluation mode, on the CPU, and its card.

    Args:
        spec: a run folder of ``gigatome train`` with a recipe of level pixels, also of a run that has not finished;
            the folder of a fold of a fine-tuning, or of a LongViT, whose head, if it has one, is left out; or the
            authors' file of weights, ``longvit_small_patch32_1024.pth``, after which ``?model=longvit`` may stand.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be read.
        RunError: it is no LongViT, or a fine-tuning, or a fold of one that is not finished.
    """
    path = longvit_path(spec)
    if path.is_file():
        model = load_longvit(path)
        return model, LongVitCard(path.stem, model.config, source=path.name)
    if not path.is_dir():
        raise StoreError(f"{spec}: no such LongViT; give a run folder, the folder of one, or a file of weights")
    folder = longvit_folder(path)
    return _read_folder(folder) if folder else _read_unfinished(path)


def open_pixel_encoder(spec: str | Path) -> TileEncoder | LongVit:
    """A LongViT as of :func:`open_longvit`, or a tile encoder as of :func:`gigatome.encoders.zoo.load_encoder`.

    Both have ``dim``, ``normalise`` and ``forward``, which is all that embedding tiles needs. Here a file of LongViT's
    weights needs ``?model=longvit``.
    """
    return open_longvit(spec)[0] if _is_longvit(str(spec)) else load_encoder(spec)


def longvit_path(spec: str | Path) -> Path:
    """The path in what :func:`open_longvit` takes."""
    return Path(str(spec).removesuffix(_MODEL))


def longvit_folder(path: Path) -> Path | None:
    """The folder with a card that ``path`` is or, of a run or a fold, has: of a fold the selected one; None without.

    Raises:
        RunError: it is a fine-tuning, which has one in each fold, or a fold of one that is not finished.
    """
    folder = find_folder(path)
    if folder is None and is_finetuning(path):
        raise RunError(f"{path}: is a fine-tuning, with a LongViT in each fold; give one of them, {path / 'fold_0'}")
    if folder is None and _is_fold(path):
        raise RunError(f"{path}: this fold is not finished; {finishing(path.parent)} goes on with it")
    selected = folder == path / "encoder" and (path / BEST / CARD_FILE).is_file()
    return path / BEST if selected else folder


def is_finetuning(path: Path) -> bool:
    """Whether a folder is that of a fine-tuning on slides, finished or not."""
    try:
        return "outcome" in configuration.read_yaml(path / _RECIPE)
    except (ValueError, ConfigError):
        return False


def finishing(run: Path) -> str:
    """The command that goes on with a fine-tuning."""
    return f"gigatome train {run / _RECIPE} --data SLIDES --labels CSV -o {run} --resume"


def longvit_digest(encoder: LongVit) -> str:
    """Hash of all that decides an embedding, weights and normalisation: 16 hexadecimal digits."""
    return state_digest(encoder.config, encoder.state_dict())


def state_digest(config: LongVitConfig, state: Mapping[str, Tensor]) -> str:
    """Hash of all that decides what a network says of an image: 16 hexadecimal digits.

    Args:
        config: of the LongViT.
        state: its weights by the authors' keys, and those of its head if it has one.
    """
    seen = asdict(config) | {"segments": config.encoder().attention.segments}
    del seen["image_size"]  # which only chooses the segments
    return weights_digest(json.dumps(seen, sort_keys=True), state)


def read_slide_vit(folder: Path) -> tuple[SlideVitCard, dict[str, Tensor]]:
    """Card and weights of a LongViT with a head, by the authors' keys; ``folder`` has a card.

    Raises:
        RunError: it holds another encoder, cannot be read, or weights and card do not belong together.
    """
    what = "a LongViT with a head"
    refusal = f"is not {what}; give what a fine-tuning on slides has written"
    card, weights, digest = read_folder(
        folder, SlideVitCard, what=what, refusal=lambda level: "" if level == SLIDE_PIXELS else refusal
    )
    check_digest(folder, state_digest(card.config, weights), digest)
    return card, weights


def is_slide_vit(path: Path) -> bool:
    """Whether a folder holds a LongViT with a head."""
    return path.is_dir() and _level(path) == SLIDE_PIXELS


def _is_longvit(spec: str) -> bool:
    path = Path(spec)
    if spec.endswith(_MODEL) or not path.is_dir():
        return spec.endswith(_MODEL)
    return _level(path) in ("pixels", SLIDE_PIXELS)


def _level(path: Path) -> str | None:
    """Which a folder of an encoder or of a run says that it is of."""
    folder = find_folder(path)
    if folder is not None:
        return stated(folder, "level")
    if is_finetuning(path) or _is_fold(path):
        return SLIDE_PIXELS
    try:
        return configuration.read_yaml(path / _RECIPE).get("level")
    except (OSError, ValueError, AttributeError, ConfigError):
        return None  # whoever opens it says what is wrong


def _is_fold(path: Path) -> bool:
    path = path.absolute()  # "." has no name
    return path.name.startswith("fold_") and not (path / _RECIPE).exists() and is_finetuning(path.parent)


def _read_folder(folder: Path) -> tuple[LongVit, LongVitCard]:
    if is_slide_vit(folder):
        slides, weights = read_slide_vit(folder)
        return load_longvit(weights, slides.config), LongVitCard(slides.name, slides.config, slides.source)
    card, weights, digest = read_folder(folder, LongVitCard, what="a LongViT", refusal=_refusal)
    encoder = load_longvit(weights, card.config)
    check_digest(folder, longvit_digest(encoder), digest)
    return encoder, card


def _refusal(level: str) -> str:
    wanted = "no LongViT; give the run of a recipe of level pixels"
    return "" if level == "pixels" else f"is an encoder of {level}s, {wanted}"


def _read_unfinished(run: Path) -> tuple[LongVit, LongVitCard]:
    """The teacher in the last checkpoint of a run that has not written its encoder yet."""
    last = last_checkpoint(run, "a LongViT")
    recipe = configuration.read_yaml(run / _RECIPE)
    if (level := recipe.get("level", "tile")) != "pixels":
        raise RunError(f"{run}: trains an encoder of {level}s, no LongViT; give the run of a recipe of level pixels")
    values = {
        "name": str(recipe.get("name", "")).replace("/", "-") or "longvit",
        "config": recipe.get("encoder", {}),
        "mpp": recipe.get("tiles", {}).get("mpp", []),
        "source": f"gigatome, {last.parent.name} of an unfinished run",
    }
    card = configuration.parse(LongVitCard, values, source=str(run / _RECIPE))
    log.warning("%s: the run has not finished; taking the teacher at %s", run, last.parent.name)
    return load_longvit(last, card.config), card

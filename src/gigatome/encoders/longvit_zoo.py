"""LongViTs on disk.

A folder holds ``encoder.safetensors``, with the authors' keys, and ``encoder.json``, the card.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.logs import log
from gigatome.encoders.folders import (
    CARD_FILE,
    check_digest,
    find_folder,
    last_checkpoint,
    read_folder,
    weights_digest,
    write_folder,
)
from gigatome.encoders.longvit import LongVit, LongVitConfig, load_longvit
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.zoo import load_encoder

_MODEL = "?model=longvit"  # after a file of weights


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


def save_longvit(encoder: LongVit, folder: str | Path, card: LongVitCard) -> None:
    """Writes a LongViT and its card into ``folder``."""
    content = {"level": "pixels", "card": configuration.to_dict(card), "digest": longvit_digest(encoder)}
    write_folder(Path(folder), encoder, content)


def open_longvit(spec: str | Path) -> tuple[LongVit, LongVitCard]:
    """A LongViT in evaluation mode, on the CPU, and its card.

    Args:
        spec: a run folder of ``gigatome train`` with a recipe of level pixels, also of a run that has not finished;
            the folder of a LongViT; or the authors' file of weights, ``longvit_small_patch32_1024.pth``, after which
            ``?model=longvit`` may stand.

    Raises:
        StoreError: there is nothing at ``spec``, or it cannot be read.
        RunError: it is no LongViT.
    """
    path = Path(str(spec).removesuffix(_MODEL))
    if path.is_file():
        model = load_longvit(path)
        return model, LongVitCard(path.stem, model.config, source=path.name)
    if not path.is_dir():
        raise StoreError(f"{spec}: no such LongViT; give a run folder, the folder of one, or a file of weights")
    folder = find_folder(path)
    return _read_folder(folder) if folder else _read_unfinished(path)


def open_pixel_encoder(spec: str | Path) -> TileEncoder | LongVit:
    """A LongViT as of :func:`open_longvit`, or a tile encoder as of :func:`gigatome.encoders.zoo.load_encoder`.

    Both have ``dim``, ``normalise`` and ``forward``, which is all that embedding tiles needs. Here a file of LongViT's
    weights needs ``?model=longvit``.
    """
    return open_longvit(spec)[0] if _is_longvit(str(spec)) else load_encoder(spec)


def longvit_digest(encoder: LongVit) -> str:
    """Hash of all that decides an embedding, weights and normalisation: 16 hexadecimal digits."""
    seen = asdict(encoder.config) | {"segments": encoder.config.encoder().attention.segments}
    del seen["image_size"]  # which only chooses the segments
    return weights_digest(json.dumps(seen, sort_keys=True), encoder.state_dict())


def _is_longvit(spec: str) -> bool:
    path = Path(spec)
    if spec.endswith(_MODEL) or not path.is_dir():
        return spec.endswith(_MODEL)
    folder = find_folder(path)
    try:
        if folder is not None:
            return json.loads((folder / CARD_FILE).read_text(encoding="utf-8")).get("level") == "pixels"
        return configuration.read_yaml(path / "recipe.yaml").get("level") == "pixels"
    except (OSError, ValueError, AttributeError, ConfigError):
        return False  # whoever opens it says what is wrong


def _read_folder(folder: Path) -> tuple[LongVit, LongVitCard]:
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
    recipe = configuration.read_yaml(run / "recipe.yaml")
    if (level := recipe.get("level", "tile")) != "pixels":
        raise RunError(f"{run}: trains an encoder of {level}s, no LongViT; give the run of a recipe of level pixels")
    values = {
        "name": str(recipe.get("name", "")).replace("/", "-") or "longvit",
        "config": recipe.get("encoder", {}),
        "mpp": recipe.get("tiles", {}).get("mpp", []),
        "source": f"gigatome, {last.parent.name} of an unfinished run",
    }
    card = configuration.parse(LongVitCard, values, source=str(run / "recipe.yaml"))
    log.warning("%s: the run has not finished; taking the teacher at %s", run, last.parent.name)
    return load_longvit(last, card.config), card

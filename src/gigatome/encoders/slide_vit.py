"""A LongViT with a head: from the pixels of a whole slide to logits.

A folder holds ``encoder.safetensors``, with the authors' keys, ``head.weight`` and ``head.bias`` among them, and
``encoder.json``, the card.

Source: Wang et al., arXiv 2312.03558, and the code released with it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from gigatome import config as configuration
from gigatome.core.errors import ConfigError, StoreError
from gigatome.core.logs import log
from gigatome.core.seeding import torch_seed
from gigatome.encoders.dilated_parallel import Share
from gigatome.encoders.folders import WEIGHTS_FILE, write_folder
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longvit import LongVit, LongVitConfig, load_longvit
from gigatome.encoders.longvit_zoo import (
    SLIDE_PIXELS,
    SlideVitCard,
    is_slide_vit,
    longvit_folder,
    longvit_path,
    open_longvit,
    read_slide_vit,
    state_digest,
)
from gigatome.encoders.weights import load_weights, read_content

__all__ = ["SlideVit", "SlideVitCard", "new_slide_vit", "open_slide_vit", "save_slide_vit"]

_STD = 0.02
_HEAD = ("weight", "bias")
_MUST_AGREE = ("patch_size", "dim", "depth", "heads", "ffn_dim", "mean", "std")
_PREDICTED = ("target", "classes", "edges")


@final
class SlideVit(nn.Module):
    """A LongViT and a linear layer on its embedding.

    Args:
        config: of the LongViT, with ``norm="finetune"``. Parameters are initialised by the global generator.
        outputs: logits of an image.
        drop_path: as for :class:`~gigatome.encoders.longvit.LongVit`.
        checkpointing: likewise.

    Attributes:
        backbone: the LongViT.
        head: the linear layer.

    Raises:
        ConfigError: the config is one of pretraining, or there are no outputs.

    Source: arXiv 2312.03558, and its code for the initial head: a normal distribution of standard deviation 0.02 cut
    at one, and no bias.
    """

    def __init__(
        self, config: LongVitConfig, outputs: int, *, drop_path: float = 0.0, checkpointing: Checkpointing = "none"
    ):
        super().__init__()
        if config.norm != "finetune":
            raise ConfigError(f"a LongViT with a head has norm finetune, not {config.norm}; set encoder.norm=finetune")
        if outputs < 1:
            raise ConfigError(f"a head has at least 1 output, not {outputs}")
        self.backbone = LongVit(config, drop_path=drop_path, checkpointing=checkpointing)
        self.head = nn.Linear(config.dim, outputs)
        trunc_normal_(self.head.weight, std=_STD, a=-_STD, b=_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, share: Share | None = None) -> Tensor:
        """Logits [B, outputs] of images, which are as for :meth:`gigatome.encoders.longvit.LongVit.forward`.

        With ``share``, ``images`` are this process's rows; all processes return the same logits, and the mean of
        parameters' gradients over them is the gradient of their loss.
        """
        return self.head(self.backbone(images, share))


def new_slide_vit(
    config: LongVitConfig,
    outputs: int,
    weights: str | Path | None,
    *,
    card: SlideVitCard | None = None,
    drop_path: float = 0.0,
    checkpointing: Checkpointing = "none",
    seed: int = 0,
) -> SlideVit:
    """A network to be trained, in training mode, on the CPU; the global generators are left as they are.

    It is logged whether a head of ``weights`` is kept.

    Args:
        config: of the LongViT, with ``norm="finetune"``. Position embeddings of ``weights`` are interpolated to its
            ``grid``.
        outputs: logits of an image.
        weights: to begin with: what :func:`~gigatome.encoders.longvit_zoo.open_longvit` takes, the folder of such a
            network, or the file of one that the authors' code has fine-tuned. None for random weights.
        card: what the logits are to be of. A head in ``weights`` is kept if it has as many outputs and, where both have
            cards, predicts the same: target, classes and edges of time bins.
        drop_path: as for :class:`SlideVit`.
        checkpointing: likewise.
        seed: of the random weights.

    Raises:
        ConfigError: ``config`` is not that of the weights.
        StoreError: there are no weights there, or they cannot be read.
        RunError: they are of another model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(seed, "encoder"))
        model = SlideVit(config, outputs, drop_path=drop_path, checkpointing=checkpointing)
    if weights is not None:
        backbone, head, theirs = _beginning(weights, config)
        model.backbone.load_state_dict(backbone)
        _take_head(model.head, head, str(weights), theirs, card)
    return model


def save_slide_vit(model: SlideVit, folder: str | Path, card: SlideVitCard) -> None:
    """Writes a network and its card into ``folder``."""
    flat = _by_authors_keys(model)
    digest = state_digest(card.config, flat.state_dict())
    content = {"level": SLIDE_PIXELS, "card": configuration.to_dict(card), "digest": digest}
    write_folder(Path(folder), flat, content)


def open_slide_vit(folder: str | Path) -> tuple[SlideVit, SlideVitCard]:
    """A network in evaluation mode, on the CPU, and its card.

    Args:
        folder: that :func:`save_slide_vit` has written, or one that has it as ``encoder/``, or of a fold of a
            fine-tuning, whose selected one is taken.

    Raises:
        StoreError: there is none.
        RunError: it holds another encoder, cannot be read, weights and card do not belong together, or the fine-tuning
            is not finished.
    """
    found = longvit_folder(Path(folder))
    if found is None:
        raise StoreError(f"{folder}: holds no LongViT with a head; give what a fine-tuning on slides has written")
    card, weights = read_slide_vit(found)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = SlideVit(card.config, len(weights.get("head.bias", ())) or 1)
    own = {key if key.startswith("head.") else f"backbone.{key}": value for key, value in weights.items()}
    load_weights(model, own, source=str(found / WEIGHTS_FILE))
    return model.eval(), card


def _by_authors_keys(model: SlideVit) -> nn.Module:
    """The same parameters, named as in the authors' files."""
    flat = nn.Module()
    flat.register_parameter("pos_embed", model.backbone.pos_embed)
    for name, part in (*model.backbone.named_children(), ("head", model.head)):
        flat.add_module(name, part)
    return flat


def _beginning(
    spec: str | Path, config: LongVitConfig
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], SlideVitCard | None]:
    """Weights of a LongViT of this config, those of a head, which may be none, and what that one's card says."""
    path = longvit_path(spec)
    if path.is_file():
        return load_longvit(path, config).state_dict(), _head_in(path), None
    head: Mapping[str, Tensor] = {}
    said: SlideVitCard | None = None
    if is_slide_vit(path):
        model, said = open_slide_vit(path)
        backbone, theirs, head = model.backbone, said.config, model.head.state_dict()
    else:
        backbone, card = open_longvit(spec)
        theirs = card.config
    for name in _MUST_AGREE:
        if (value := getattr(theirs, name)) != getattr(config, name):
            raise ConfigError(f"{spec}: has {name} {value}, but the encoder is to have {getattr(config, name)}")
    return load_longvit(backbone.state_dict(), config).state_dict(), head, said


def _take_head(
    own: nn.Linear,
    head: Mapping[str, Tensor],
    source: str,
    theirs: SlideVitCard | None,
    ours: SlideVitCard | None,
) -> None:
    """Puts the weights of a head into a new one if it predicts the same, as far as is known, and says what was done."""
    if not head:
        log.info("%s: has no head, so the head is a new one", source)
        return
    if _shapes(head) != _shapes(own.state_dict()):
        log.info("%s: has a head of other outputs, so the head is a new one", source)
        return
    if theirs is None or ours is None:
        log.warning("%s: its head is kept, as it has %d outputs; nothing says of what", source, own.out_features)
    else:
        for name in _PREDICTED:
            if (value := getattr(theirs, name)) != (wanted := getattr(ours, name)):
                log.info("%s: its head has %s %s, not %s, so the head is a new one", source, name, value, wanted)
                return
        log.info("%s: its head is kept, as it predicts the same", source)
    own.load_state_dict(head)


def _head_in(path: Path) -> dict[str, Tensor]:
    """Weights of the head in a file whose other weights have been read."""
    content = read_content(path)
    inner = content.get("model")
    state = inner if isinstance(inner, Mapping) else content
    return {key: state[f"head.{key}"] for key in _HEAD if isinstance(state.get(f"head.{key}"), Tensor)}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}

"""The encoders of a hierarchy, one upon another: of tiles, of regions, and heads of whole slides."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

import numpy as np
import torch
from numpy.typing import NDArray

from gigatome import config as configuration
from gigatome.core.errors import ConfigError
from gigatome.embeddings.encoding import Maker
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.region_vit import RegionVit
from gigatome.encoders.region_zoo import RegionCard, open_region_encoder, region_name, region_weights
from gigatome.encoders.vit import TileEncoder
from gigatome.encoders.weights import read_weights
from gigatome.encoders.zoo import load_encoder

if TYPE_CHECKING:
    from gigatome.evaluation.saved import SavedModel

LEVELS = ("cell", "tile", "region")
"""From the finest: patches of a tile, tiles of a region, regions of a slide."""


@final
@dataclass(frozen=True, eq=False)
class Chain:
    """What looks at a slide, level by level.

    Attributes:
        tile: sees the cells of a tile.
        region: sees the tiles of a region, as ``tile`` embeds them.
        card: of ``region``.
        slide: heads that see the regions of a slide, as grids of tile embeddings or as ``region`` embeds them.
    """

    tile: TileEncoder
    region: RegionVit | None = None
    card: RegionCard | None = None
    slide: "SavedModel | None" = None

    @property
    def on_grids(self) -> bool:
        """Whether the heads take regions as grids of tile embeddings."""
        if self.slide is None:
            return False
        from gigatome.heatmaps.slide_model import takes_grids

        return takes_grids(self.slide)

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return next(self.tile.parameters()).device

    def heads(self, level: str) -> int:
        """Attention heads of a level of the chain; those of the slide model count as one."""
        if level == "region":
            return 1
        return self.tile.heads if level == "cell" or self.region is None else self.region.config.heads

    def to(self, device: torch.device) -> Self:
        """Moves the encoders to a device."""
        self.tile.to(device)
        if self.region is not None:
            self.region.to(device)
        return self

    def check(self, levels: Collection[str]) -> None:
        """Raises :class:`ConfigError` for a level that there is no model of, or no level at all."""
        if unknown := set(levels) - set(LEVELS):
            raise ConfigError(f"there is no level {min(unknown)}; there are {', '.join(LEVELS)}")
        if not levels:
            raise ConfigError(f"no level is asked for; name one or more of {', '.join(LEVELS)}")
        if "tile" in levels and self.region is None:
            raise ConfigError(
                "the level tile needs a region encoder: give as model the run of a recipe of level region, or HIPT's "
                "vit4k_xs_dino.pth together with its tile encoder"
            )
        if "region" in levels and self.slide is None:
            raise ConfigError(
                "the level region needs a slide model: give the folder of heads that gigatome evaluate wrote, by a "
                "model of bags of regions (--slide-model)"
            )

    def check_slide(self, tiling: Mapping[str, float] = {}) -> None:
        """Raises :class:`EvaluationError` unless the heads learnt from what the encoders make.

        Args:
            tiling: of the regions, as :class:`~gigatome.evaluation.unit_data.Origin` has it; not compared if empty.
        """
        if self.slide is not None:
            from gigatome.evaluation.unit_data import Origin

            made = Maker.of(self.tile, None)
            origin = Origin(made.name, made.weights, made.dim, tiling)
            if not self.on_grids and self.region is not None and self.card is not None:
                name = region_name(self.region, self.card, made.weights)
                origin = Origin(name, region_weights(self.region, made.weights), self.region.dim, tiling)
            self.slide.origin.refuse_other(origin, "slide model")

    def attend(self, x: NDArray[np.floating], coords: NDArray[np.int64], *, label: str | None = None) -> NDArray:
        """Attention of the slide model to the regions of one slide, the mean over the heads of all folds.

        Args:
            x: float [R, T, D] grids or [R, D] embeddings, as :attr:`on_grids` says.
            coords: int64 [R, 2], (x, y) of the regions' corners, level-0 pixels.
            label: class whose attention is taken where each has its own; by default the one that is predicted.

        Returns:
            float32 [R], which sums to 1.

        Raises:
            ConfigError: there is no slide model, it has no attention, or there is no such class.
            RunError: its output is not finite.
        """
        self.check(["region"])
        from gigatome.heatmaps.slide_model import attend

        assert self.slide is not None  # noqa: S101 - checked just now
        return attend(self.slide, x, coords, label=label, device=str(self.device))


def open_chain(
    model: str | Path | TileEncoder,
    *,
    tile_encoder: str | Path | TileEncoder | None = None,
    slide_model: str | Path | None = None,
) -> Chain:
    """The models that stand upon one another, in evaluation mode, on the CPU.

    Args:
        model: a region encoder, as :func:`~gigatome.encoders.region_zoo.open_region_encoder` takes it; or, where there
            are no regions, a tile encoder, as :func:`~gigatome.encoders.zoo.load_encoder` takes it.
        tile_encoder: whose embeddings the region encoder takes; by default the one that is kept with it.
        slide_model: folder of a study with one arm, or of the heads of an arm.

    Raises:
        ConfigError: a region encoder comes without its tile encoder or with another, a tile encoder with a second one,
            or the heads have no attention.
        EvaluationError: the heads learnt from other embeddings.
        StoreError: something is not there, or cannot be read.
        RunError: it is no such model.
    """
    heads = None
    if slide_model is not None:
        from gigatome.heatmaps.slide_model import open_slide_model

        heads = open_slide_model(slide_model)
    if isinstance(model, TileEncoder) or not is_region_model(model):
        if tile_encoder is not None:
            raise ConfigError(f"{model} is a tile encoder itself; a second one goes with a region encoder only")
        chain = Chain(load_encoder(model), slide=heads)
    else:
        region, card = open_region_encoder(model)
        tile = tile_encoder_of(model) if tile_encoder is None else load_encoder(tile_encoder)
        if tile is None:
            raise ConfigError(
                f"{model}: no tile encoder is kept with this region encoder; name the one whose embeddings it learnt "
                "from (--tile-encoder)" + (f": {card.tile_encoder}" if card.tile_encoder else "")
            )
        made = Maker.of(tile, None)
        card.check_tiles(made.name, made.weights, made.dim, "tile encoder")
        chain = Chain(tile, region, card, heads)
    if heads is not None and not chain.on_grids and chain.region is None:
        raise ConfigError(
            f"{slide_model}: these heads learnt from embeddings of regions by {heads.origin.encoder}; give that region "
            "encoder as model"
        )
    chain.check_slide()
    return chain


def is_region_model(model: str | Path) -> bool:
    """Whether there is a region encoder at ``model``, finished or in training, or its bare weights."""
    path = Path(model)
    if path.is_file():
        return "phi.0.weight" in read_weights(path)
    for card in (path / "encoder.json", path / "encoder" / "encoder.json"):
        if card.is_file():
            try:
                return json.loads(card.read_text(encoding="utf-8")).get("level") == "region"
            except (OSError, ValueError, AttributeError):
                return False  # the tile encoder's loader says what is wrong with it
    recipe = path / "recipe.yaml"
    return recipe.is_file() and configuration.read_yaml(recipe).get("level") == "region"

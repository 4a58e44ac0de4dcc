"""What a method learns from: tiles, regions, or slides. A level supplies encoder and views, and writes what was learnt.

Methods know views, encoders and losses only; what is peculiar to a level stands here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, final

import torch
from torch import Tensor

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.giga import GigaEncoder
from gigatome.encoders.longnet import Checkpointing
from gigatome.encoders.longvit import LongVit, LongVitConfig
from gigatome.encoders.longvit_zoo import LongVitCard, save_longvit
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, save_region_encoder
from gigatome.encoders.slide_zoo import SlideCard, new_slide_encoder, save_slide_encoder
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import load_encoder, save_encoder
from gigatome.selfsup.grid_views import GridViewOptions, embed_grids, grid_crops
from gigatome.selfsup.slide_views import SlideViewOptions, slide_views
from gigatome.selfsup.views import ViewOptions, check_patches, multi_crop

E = TypeVar("E")
V = TypeVar("V", contravariant=True)


class Level(Protocol[E, V]):
    """A level whose encoders are E and whose views are made as V says."""

    def build(self, *, drop_path: float, seed: int, initial: bool = True) -> E:
        """An encoder, which has ``dim``, in training mode.

        Args:
            drop_path: rate of stochastic depth.
            seed: of its random weights; the global generators are left as they are.
            initial: give it the weights that its config names; otherwise whoever asks has others for it.
        """
        ...

    def check(self, encoder: E, options: V) -> None:
        """Raises :class:`ConfigError` if the encoder cannot take such views."""
        ...

    def views(self, encoder: E, images: Tensor, options: V, generator: torch.Generator) -> list[Tensor]:
        """Views of a batch, the two global ones first; raises :class:`RunError` if the batch is of another level."""
        ...

    def embed(self, encoder: E, views: Tensor) -> Tensor:
        """Embeddings [B, dim] of views of one size."""
        ...

    def export(self, encoder: E, folder: Path, method: str) -> None:
        """Writes the encoder that ``method`` has trained, with its card."""
        ...


@final
@dataclass(frozen=True)
class TileLevel:
    """Tiles, uint8 [B, H, W, 3]; views are crops of them with other colours.

    Attributes:
        config: of the tile encoder.
        name: the encoder's name on its card; by default its timm name.
        mpp: resolutions that it is trained at, for its card.
    """

    config: EncoderConfig
    name: str | None = None
    mpp: tuple[float, ...] = ()

    def build(self, *, drop_path: float, seed: int, initial: bool = True) -> TileEncoder:
        """As :func:`gigatome.encoders.vit.build_encoder`, which says what it raises."""
        config = self.config if initial else replace(self.config, weights=None, pretrained=False)
        return build_encoder(config, drop_path=drop_path, seed=seed, name=self.name)

    def check(self, encoder: TileEncoder, options: ViewOptions) -> None:
        """Views must divide into patches."""
        _check_tile_views(options, encoder.patch_size)

    def views(
        self, encoder: TileEncoder, images: Tensor, options: ViewOptions, generator: torch.Generator
    ) -> list[Tensor]:
        """Normalised views [B, 3, size, size]."""
        return tile_views(encoder, images, options, generator)

    def embed(self, encoder: TileEncoder, views: Tensor) -> Tensor:
        """Their class tokens."""
        return encoder(views)

    def export(self, encoder: TileEncoder, folder: Path, method: str) -> None:
        """As :func:`gigatome.encoders.zoo.save_encoder`."""
        save_encoder(encoder, folder, source=f"gigatome, {method}", mpp=self.mpp)


@final
@dataclass(frozen=True)
class PixelLevel:
    """Regions of pixels, that is large tiles, uint8 [B, H, W, 3], of which a LongViT sees every patch.

    Attributes:
        card: what is known of the encoder, and its config.
        checkpointing: what training keeps of a block, as of :class:`~gigatome.encoders.longnet.LongNetEncoder`.
    """

    card: LongVitCard
    checkpointing: Checkpointing = "none"

    def build(self, *, drop_path: float, seed: int, initial: bool = True) -> LongVit:
        """A LongViT of random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return LongVit(self.card.config, drop_path=drop_path, checkpointing=self.checkpointing)

    def check(self, encoder: LongVit, options: ViewOptions) -> None:
        """Views must divide into patches."""
        _check_tile_views(options, encoder.patch_size)

    def views(self, encoder: LongVit, images: Tensor, options: ViewOptions, generator: torch.Generator) -> list[Tensor]:
        """Normalised views [B, 3, size, size]."""
        return tile_views(encoder, images, options, generator)

    def embed(self, encoder: LongVit, views: Tensor) -> Tensor:
        """The means of their tokens."""
        return encoder(views)

    def export(self, encoder: LongVit, folder: Path, method: str) -> None:
        """As :func:`gigatome.encoders.longvit_zoo.save_longvit`."""
        save_longvit(encoder, folder, replace(self.card, source=f"gigatome, {method}"))


@final
@dataclass(frozen=True)
class RegionLevel:
    """Regions, grids of tile embeddings float [B, rows, columns, D]; views are blocks of them.

    Attributes:
        card: what is known of the regions, and the config of their encoder.
        tile: folder of the tile encoder, which is kept with the region encoder; None if it is not at hand.
    """

    card: RegionCard
    tile: Path | None = None

    def build(self, *, drop_path: float, seed: int, initial: bool = True) -> RegionVit:
        """A region encoder of random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return RegionVit(self.card.config, drop_path=drop_path)

    def check(self, encoder: RegionVit, options: GridViewOptions) -> None:
        """Views must fit into a region."""
        if not isinstance(options, GridViewOptions):
            raise ConfigError(f"views of regions are made as GridViewOptions say, not {type(options).__name__}")
        for key in ("global_size", "local_size") if options.local_views else ("global_size",):
            if getattr(options, key) > self.card.tiles:
                raise ConfigError(
                    f"views.{key} {getattr(options, key)} is larger than a region of {self.card.tiles} × "
                    f"{self.card.tiles} tiles; use smaller views, or larger regions"
                )

    def views(
        self, encoder: RegionVit, images: Tensor, options: GridViewOptions, generator: torch.Generator
    ) -> list[Tensor]:
        """Views [B, D, size, size] of the grids' precision."""
        dim, side = encoder.config.input_dim, options.global_size
        fits = images.is_floating_point() and images.ndim == 4 and images.shape[3] == dim
        if not fits or min(images.shape[1:3]) < side:
            raise RunError(
                f"this run learns from regions, float [B, ≥ {side}, ≥ {side}, {dim}], and its stream gives "
                f"{_described(images)}"
            )
        return grid_crops(images, options, generator)

    def embed(self, encoder: RegionVit, views: Tensor) -> Tensor:
        """Their class tokens, which see the tiles that are there."""
        return embed_grids(encoder, views)

    def export(self, encoder: RegionVit, folder: Path, method: str) -> None:
        """As :func:`gigatome.encoders.region_zoo.save_region_encoder`, with the tile encoder."""
        tile = load_encoder(self.tile) if self.tile else None
        save_region_encoder(encoder, folder, replace(self.card, source=f"gigatome, {method}"), tile=tile)


@final
@dataclass(frozen=True)
class SlideLevel:
    """Slides, two draws of T tiles each, float [B, 2, T, D + 2]; views are these with the tiles in other places.

    Attributes:
        card: what is known of the tiles, and the config of the slide encoder.
        weights: that it starts from, as of :func:`gigatome.encoders.slide_zoo.new_slide_encoder`.
        tile: folder of the tile encoder, which is kept with the slide encoder; None if it is not at hand.
    """

    card: SlideCard
    weights: str | None = None
    tile: Path | None = None

    def build(self, *, drop_path: float, seed: int, initial: bool = True) -> GigaEncoder:
        """As :func:`gigatome.encoders.slide_zoo.new_slide_encoder`; there is no stochastic depth."""
        return new_slide_encoder(self.card.config, self.weights if initial else None, seed)

    def check(self, encoder: GigaEncoder, options: SlideViewOptions) -> None:
        """Any view will do that is one of slides."""
        if not isinstance(options, SlideViewOptions):
            raise ConfigError(f"views of slides are made as SlideViewOptions say, not {type(options).__name__}")

    def views(
        self, encoder: GigaEncoder, images: Tensor, options: SlideViewOptions, generator: torch.Generator
    ) -> list[Tensor]:
        """Two views [B, T, D + 2]."""
        dim = encoder.config.input_dim
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1::2] != (2, dim + 2):
            raise RunError(
                f"this run learns from slides, float32 [B, 2, T, {dim} + 2], and its stream gives {_described(images)}"
            )
        return slide_views(images, options, generator)

    def embed(self, encoder: GigaEncoder, views: Tensor) -> Tensor:
        """Embeddings of slides [B, T, D + 2]."""
        slides, tiles = views.shape[:2]
        rows = views.flatten(0, 1)
        return encoder(rows[:, :-2], rows[:, -2:].long(), torch.arange(slides + 1) * tiles)

    def export(self, encoder: GigaEncoder, folder: Path, method: str) -> None:
        """As :func:`gigatome.encoders.slide_zoo.save_slide_encoder`, with the tile encoder."""
        tile = load_encoder(self.tile) if self.tile else None
        save_slide_encoder(encoder, folder, replace(self.card, source=f"gigatome, {method}"), tile=tile)


def level_of(
    encoder: EncoderConfig | LongVitConfig | RegionVitConfig, name: str | None, mpp: tuple[float, ...]
) -> Level:
    """The level of an encoder, of which no more is known."""
    if isinstance(encoder, EncoderConfig):
        return TileLevel(encoder, name, mpp)
    if isinstance(encoder, LongVitConfig):
        return PixelLevel(LongVitCard(name or "longvit", encoder, mpp=mpp))
    return RegionLevel(RegionCard(name or "region-vit", encoder, mpp=next(iter(mpp), 0.5)))


def tile_views(
    encoder: TileEncoder | LongVit, images: Tensor, options: ViewOptions, generator: torch.Generator
) -> list[Tensor]:
    """Views of tiles as of :func:`~gigatome.selfsup.views.multi_crop`, normalised as the encoder wants them.

    Raises:
        RunError: the batch holds no tiles.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise RunError(f"this run learns from tiles, uint8 [B, H, W, 3], and its stream gives {_described(images)}")
    return multi_crop(images, options, generator, encoder.mean, encoder.std)


def _check_tile_views(options: ViewOptions, patch_size: int) -> None:
    """Raises :class:`ConfigError` if these are no views of tiles, or do not divide into patches."""
    if not isinstance(options, ViewOptions):
        raise ConfigError(f"views of tiles are made as ViewOptions say, not {type(options).__name__}")
    sizes = {"views.global_size": options.global_size, "views.local_size": options.local_size}
    check_patches(sizes, patch_size)


def _described(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"

"""Augmented tiles for slide-level learning: which tiles a draw has, and what is done to them, together or one by one.

A slide is seen K times, each time as N of its tiles. The tiles of a draw share one augmentation, as if the slide had
been stained and scanned anew, or each has its own. All chance is in :func:`draw_augmentations`, from generators of the
seed, the slide's name and the draw, so that no draw depends on other slides, on the other draws, or on batches.

Source: Giga-SSL (arXiv:2212.03273) and its code; differs as :mod:`gigatome.selfsup.views` says, by which pixels are
made; so the blur is not cut off at 5 × 5 pixels, and crops are resampled with antialiasing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigatome.core.seeding import generator, torch_seed
from gigatome.selfsup.render import ViewDraw
from gigatome.selfsup.views import ViewOptions, draw_view

Sharing: TypeAlias = Literal["shared", "each"]
"""Whether the tiles of a draw share one augmentation (the paper's finding), or each has its own (the paper's NS)."""


@final
@dataclass(frozen=True)
class TileAugmentOptions:
    """How tiles are drawn and augmented; the defaults are the paper's.

    Attributes:
        size: side in pixels to which a crop is resampled; None takes what the encoder is made for.
        scale: range of the crop's share of the tile's area.
        ratio: range of the crop's width over its height.
        horizontal_flip: probability; so is vertical_flip.
        vertical_flip: see horizontal_flip.
        quarter_turns: rotate by a random multiple of 90°.
        jitter: probability of changing brightness, contrast, saturation and hue.
        brightness: factor in 1 ± this; so are contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift in ± this, as a part of the colour circle.
        grayscale: probability of losing all colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels.
        drawing: ``"distinct"`` has no tile twice in a draw, unless the slide has fewer than asked for: then it has
            each, and the rest with replacement. ``"with_replacement"`` is the authors'; two copies of a tile fall into
            one place of the slide's map, so that a view holds less than it could.
    """

    size: int | None = None
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    quarter_turns: bool = True
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 1.0)
    drawing: Literal["distinct", "with_replacement"] = "distinct"

    def __post_init__(self):
        if self.drawing not in ("distinct", "with_replacement"):
            raise ValueError(f"there is no drawing {self.drawing}; there are distinct, with_replacement")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be positive, not {self.size}")
        self.views()  # which checks the others

    @classmethod
    def paper(cls) -> "TileAugmentOptions":
        """What the paper lists, flips and rotations among it; rotations are quarter turns."""
        return cls()

    @classmethod
    def code(cls) -> "TileAugmentOptions":
        """What the authors' code does: no flips, no rotations, and tiles drawn with replacement."""
        return cls(horizontal_flip=0.0, vertical_flip=0.0, quarter_turns=False, drawing="with_replacement")

    def views(self) -> ViewOptions:
        """The same as options of views, of which the first global one is meant."""
        values = {key: value for key, value in asdict(self).items() if key not in ("size", "scale", "blur", "drawing")}
        return ViewOptions(
            global_scale=self.scale, blur=(self.blur, 0.0, 0.0), solarize=(0.0, 0.0, 0.0), local_views=0, **values
        )


@final
@dataclass(frozen=True, eq=False)
class AugmentDraws:
    """What chance decided for a slide.

    Attributes:
        tiles: int64 [K, N], the tiles of each draw by their place in the grid.
        views: what is done to them: K · N rows, draw by draw, or K if the tiles of a draw share it.
    """

    tiles: NDArray[np.int64]
    views: ViewDraw

    def rows(self, pairs: NDArray[np.int64]) -> Tensor:
        """Rows of ``views`` for tiles of draws, each given as draw · N + its place in the draw: int64 [B] for [B]."""
        shared = len(self.views.x) != self.tiles.size
        return torch.from_numpy(pairs // self.tiles.shape[1] if shared else pairs)


def draw_augmentations(
    options: TileAugmentOptions,
    *,
    name: str,
    grid: int,
    tile_size: int,
    augmentations: int,
    tiles: int,
    sharing: Sharing = "shared",
    seed: int = 0,
) -> AugmentDraws:
    """Draws tiles and augmentations for a slide.

    Args:
        options: the distributions.
        name: of the slide.
        grid: how many tiles it has, at least 1.
        tile_size: side of a tile in pixels.
        augmentations: draws, K.
        tiles: tiles of a draw, N.
        sharing: whether they share one augmentation. Which tiles are drawn does not depend on it.
        seed: a draw is the same whatever K, and whichever slides are drawn beside it.
    """
    chosen, draws = [], []
    views = options.views()
    for draw in range(augmentations):
        chosen.append(draw_tiles(grid, tiles, options.drawing, generator(seed, "augment", name, draw, "tiles")))
        chance = torch.Generator().manual_seed(torch_seed(seed, "augment", name, draw))
        one = draw_view(views, 0, 1 if sharing == "shared" else tiles, tile_size, tile_size, chance)
        order = torch.tensor(one.order, dtype=torch.uint8).expand(len(one.x), -1)
        draws.append((replace(one, order=order), slice(None)))
    return AugmentDraws(np.stack(chosen), gather_draws(draws))


def draw_tiles(
    grid: int, count: int, drawing: Literal["distinct", "with_replacement"], random: np.random.Generator
) -> NDArray[np.int64]:
    """Draws ``count`` of ``grid`` tiles, int64 [count], as :class:`TileAugmentOptions` says of ``drawing``."""
    if drawing == "with_replacement":
        return random.integers(grid, size=count)
    distinct = random.permutation(grid)[:count]
    return np.concatenate([distinct, random.integers(grid, size=count - len(distinct))])


def gather_draws(parts: Sequence[tuple[ViewDraw, Tensor | slice]]) -> ViewDraw:
    """Rows of several draws as one, for :func:`~gigatome.selfsup.render.render_views`; each has its own order."""
    names = [field.name for field in fields(ViewDraw)]
    return ViewDraw(**{name: torch.cat([getattr(draw, name)[rows] for draw, rows in parts]) for name in names})

"""What is on a synthetic slide: pieces of tissue, fat, glands, nuclei, pen marks and bubbles.

A scene is laid out once, in µm, from a seed, and painted later window by window
(:mod:`gigatome.slides.synthetic_paint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from gigatome.core.seeding import generator
from gigatome.slides.synthetic_glands import Gland, Points, make_gland, outline

KINDS = ("glandular", "solid")
"""The two classes of tissue."""

EPITHELIAL, FIBROBLAST, LYMPHOCYTE = range(3)
"""Types of nuclei."""

_HAEMATOXYLIN = (0.5626, 0.7201, 0.4062)  # optical density of red, green, blue; Macenko et al., ISBI 2009
_EOSIN = (0.2159, 0.8012, 0.5581)
_PENS = ((0.25, 0.45, 0.95), (0.2, 0.65, 0.35), (0.15, 0.15, 0.18), (0.9, 0.25, 0.25))
_RASTER = 2.0  # µm per pixel of the map that says where tissue is
_GLAND_REACH = 1.05  # how far a gland's wavy outline reaches, in mean radii


@dataclass(frozen=True)
class SyntheticOptions:
    """How synthetic slides look and how hard their classes are to tell apart.

    Attributes:
        width: level-0 pixels.
        height: level-0 pixels.
        mpp: µm per pixel of level 0.
        purity: share of a slide's glands that follow its class; 1 is easy, 0.5 is impossible.
        pen: share of slides with a pen mark.
        bubbles: share of slides with air bubbles.
        fat: share of slides with fat.
        pale: share of patients whose slides are pale.
        chunk: side of the compressed tiles in pixels, a multiple of 16.
        quality: JPEG quality.
    """

    width: int = 3000
    height: int = 2500
    mpp: float = 0.5
    purity: float = 0.85
    pen: float = 0.15
    bubbles: float = 0.15
    fat: float = 0.3
    pale: float = 0.1
    chunk: int = 240
    quality: int = 85

    def __post_init__(self):
        if min(self.width, self.height) * self.mpp < 300:
            raise ValueError(f"{self.width} × {self.height} px at {self.mpp} mpp is too small: each side needs 300 µm")
        if not 0.5 <= self.purity <= 1:
            raise ValueError(f"purity must lie between 0.5 and 1, not {self.purity}")
        if self.chunk % 16 or self.chunk <= 0:
            raise ValueError(f"chunk must be a multiple of 16, not {self.chunk}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie between 1 and 100, not {self.quality}")
        for name in ("pen", "bubbles", "fat", "pale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie between 0 and 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Look:
    """What differs between patients and means nothing: stain, cellularity, fibres.

    Attributes:
        haematoxylin: optical density of red, green and blue, unit length.
        eosin: the same for eosin.
        nuclear: haematoxylin of a nucleus.
        pink: eosin of stroma.
        cellularity: stromal nuclei per mm².
        fibre_angle: direction of the fibres in radians.
        gland_radius: mean radius of a gland in µm.
        gap: least distance between glands in µm.
    """

    haematoxylin: tuple[float, ...]
    eosin: tuple[float, ...]
    nuclear: float
    pink: float
    cellularity: float
    fibre_angle: float
    gland_radius: float
    gap: float

    @classmethod
    def draw(cls, rng: Generator, pale: bool = False) -> "Look":
        """A random look; a ``pale`` one has half the stain."""
        strength = 0.5 if pale else 1.0
        return cls(
            haematoxylin=_jitter(_HAEMATOXYLIN, 0.05, rng),
            eosin=_jitter(_EOSIN, 0.05, rng),
            nuclear=1.25 * strength * float(rng.lognormal(0, 0.15)),
            pink=0.42 * strength * float(rng.lognormal(0, 0.2)),
            cellularity=float(rng.uniform(700, 1800)),
            fibre_angle=float(rng.uniform(0, np.pi)),
            gland_radius=float(rng.uniform(36, 46)),
            gap=float(rng.uniform(3, 12)),
        )

    def again(self, rng: Generator) -> "Look":
        """The same patient on another slide: the stain differs a little."""
        return Look(
            haematoxylin=_jitter(self.haematoxylin, 0.02, rng),
            eosin=_jitter(self.eosin, 0.02, rng),
            nuclear=self.nuclear * float(rng.lognormal(0, 0.06)),
            pink=self.pink * float(rng.lognormal(0, 0.06)),
            cellularity=self.cellularity * float(rng.lognormal(0, 0.1)),
            fibre_angle=float(rng.uniform(0, np.pi)),
            gland_radius=self.gland_radius * float(rng.uniform(0.95, 1.05)),
            gap=self.gap * float(rng.uniform(0.9, 1.1)),
        )


@dataclass(frozen=True)
class Stroke:
    """Something on the glass that lets part of the light through: a pen mark, the rim of a bubble.

    ``points`` [N, 2] in px, ``width`` in px, ``light`` the share of red, green and blue that passes.
    """

    points: Points
    width: float
    light: tuple[float, float, float]
    closed: bool = False


@dataclass(frozen=True)
class Scene:
    """A slide before it is painted; all coordinates are level-0 pixels, (x, y).

    Attributes:
        pieces: outlines of the pieces of tissue.
        fat: centre and radius of each fat cell, [N, 3].
        epithelium: outlines of epithelium.
        lumens: outlines of what is white inside or beside it.
        nuclei: x, y of each nucleus, [N, 2].
        nucleus_types: EPITHELIAL, FIBROBLAST or LYMPHOCYTE, [N].
        nucleus_angles: direction of their long axes in radians, [N].
        strokes: pen marks and bubbles.
        look: stains.
        mpp: µm per pixel.
        seed: chooses textures and shading.
    """

    pieces: tuple[Points, ...]
    fat: Points
    epithelium: tuple[Points, ...]
    lumens: tuple[Points, ...]
    nuclei: Points
    nucleus_types: NDArray[np.int64]
    nucleus_angles: NDArray[np.float64]
    strokes: tuple[Stroke, ...]
    look: Look
    width: int
    height: int
    mpp: float
    seed: int


def lay_out(kind: str, seed: int, options: SyntheticOptions, look: Look) -> Scene:
    """Decides what is on a slide of one of :data:`KINDS`, from a seed."""
    rng = generator(seed, "scene")
    size = np.array([options.width, options.height]) * options.mpp
    pieces = _pieces(rng, size)
    tissue = _Tissue(pieces, size)
    fat = _fat(rng, tissue) if rng.random() < options.fat else np.empty((0, 3))
    spots = _pack(rng, tissue, tissue.draw(rng, 40), (0.7 * look.gland_radius, 1.4 * look.gland_radius), look.gap, fat)
    organised = options.purity if kind == KINDS[0] else 1 - options.purity
    # A generator for each gland: slides of both kinds from one seed are alike but for what is inside the glands.
    glands = [
        (spot[:2], make_gland(own, float(spot[2]) / _GLAND_REACH, bool(own.random() < organised)))
        for spot, own in zip(spots, rng.spawn(len(spots)), strict=True)
    ]
    nuclei, types, angles = _nuclei(rng, tissue, glands, np.vstack([fat, spots]), look)
    scale = 1 / options.mpp
    return Scene(
        pieces=tuple(piece * scale for piece in pieces),
        fat=fat * scale,
        epithelium=tuple((gland.epithelium + at) * scale for at, gland in glands),
        lumens=tuple((part + at) * scale for at, gland in glands for part in gland.white),
        nuclei=nuclei * scale,
        nucleus_types=types,
        nucleus_angles=angles,
        strokes=tuple(
            replace(stroke, points=stroke.points * scale, width=stroke.width * scale)
            for stroke in _strokes(rng, size, options)
        ),
        look=look,
        width=options.width,
        height=options.height,
        mpp=options.mpp,
        seed=int(rng.integers(2**31)),
    )


class _Tissue:
    """Whether a point lies in tissue, and how far from its edge."""

    def __init__(self, pieces: Sequence[Points], size: Points):
        self.size = size
        mask = np.zeros(tuple((size[::-1] / _RASTER).astype(int) + 3), np.uint8)
        for piece in pieces:
            cv2.fillPoly(mask, [np.round(piece / _RASTER).astype(np.int32)], 1)
        mask[[0, -1]] = mask[:, [0, -1]] = 0
        self.depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5) * _RASTER

    def at(self, points: Points) -> NDArray[np.float32]:
        """Distance to the edge of the tissue in µm, 0 outside it, [N]."""
        return self.look_up(self.depth, points)

    def draw(self, rng: Generator, count: int) -> Points:
        """Points anywhere on the slide, [count, 2]."""
        return rng.uniform(0, self.size, (count, 2))

    def covered(self, circles: Points, points: Points) -> NDArray[np.bool_]:
        """Whether each point lies in one of the circles (x, y, radius), [N]."""
        mask = np.zeros(self.depth.shape, np.uint8)
        for x, y, radius in np.round(circles / _RASTER * 16).astype(int).tolist():
            cv2.circle(mask, (x, y), radius, 1, -1, cv2.LINE_8, 4)
        return self.look_up(mask, points) > 0

    def look_up(self, raster: NDArray, points: Points) -> NDArray:
        """Values of a raster of this slide at points in µm; those outside it take the nearest."""
        column, row = np.round(points / _RASTER).astype(int).T
        return raster[row.clip(0, raster.shape[0] - 1), column.clip(0, raster.shape[1] - 1)]


def _pieces(rng: Generator, size: Points) -> list[Points]:
    """One piece that fills most of the slide, or two or three beside each other."""
    count = int(rng.integers(1, 4))
    long = int(size[0] < size[1])
    pieces = []
    for index in range(count):
        half = size / 2 * 0.9
        centre = size / 2
        half[long] /= count
        centre[long] = size[long] * (index + 0.5) / count
        half = half * rng.uniform(0.85, 1.0, 2)
        piece = outline(rng, 1.0, wobble=0.13, points=400)
        piece = (piece - piece.min(axis=0)) / np.ptp(piece, axis=0) * 2 - 1
        pieces.append(piece * half + centre)
    return pieces


def _pack(
    rng: Generator,
    tissue: _Tissue,
    starts: Points,
    radii: tuple[float, float],
    gap: float,
    taken: Points,
    most: int | None = None,
    inset: float = 1.0,
) -> Points:
    """Circles side by side, growing from the starts until there is no more room (or ``most`` lie).

    Args:
        rng: generator.
        tissue: the centre of each circle lies ``inset`` of its radii or more inside it.
        starts: first centres to try, [N, 2].
        radii: least and largest radius in µm.
        gap: least distance of two circles in µm.
        taken: circles that are there already, [N, 3].
        most: stop at so many.
        inset: see ``tissue``.

    Returns:
        x, y and radius of each new circle, [N, 3].
    """
    cell = 2 * radii[1] + gap
    grid: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    new: list[tuple[float, float, float]] = []
    active: list[int] = []

    def put(circle: tuple[float, float, float]) -> None:
        grid.setdefault((int(circle[0] // cell), int(circle[1] // cell)), []).append(circle)

    def place(spots: Points, radius: float) -> bool:
        spots = spots[tissue.at(spots) > inset * radius]
        if len(spots) and len(near := _near(grid, spots.mean(axis=0) // cell)):
            apart = np.hypot(spots[:, :1] - near[:, 0], spots[:, 1:] - near[:, 1]) - near[:, 2] - radius
            spots = spots[(apart >= gap).all(axis=1)]
        if not len(spots):
            return False
        new.append((float(spots[0, 0]), float(spots[0, 1]), radius))
        put(new[-1])
        active.append(len(new) - 1)
        return True

    for x, y, radius in taken.tolist():
        put((x, y, radius))
    for spot in starts:
        place(spot[None], rng.uniform(*radii))
    while active and (most is None or len(new) < most):
        index = int(rng.integers(len(active)))
        x, y, radius = new[active[index]]
        angle = rng.uniform(0, 2 * np.pi, 24)
        around = np.column_stack([np.cos(angle), np.sin(angle)])
        for other in (rng.uniform(*radii), rng.uniform(*radii), radii[0]):
            if place((x, y) + around * (radius + other + 1.02 * gap), other):
                break
        else:
            active[index] = active[-1]
            active.pop()
    return np.array(new, dtype=float).reshape(-1, 3)


def _near(grid: dict[tuple[int, int], list[tuple[float, float, float]]], at: Points) -> Points:
    """The circles in the 7 × 7 cells about one, [N, 3]."""
    column, row = int(at[0]), int(at[1])
    cells = [grid.get((column + x, row + y), ()) for x in range(-3, 4) for y in range(-3, 4)]
    return np.array([circle for cell in cells for circle in cell]).reshape(-1, 3)


def _fat(rng: Generator, tissue: _Tissue) -> Points:
    """Lobules of fat cells: x, y and radius in µm, [N, 3]."""
    cells = np.empty((0, 3))
    for start in tissue.draw(rng, int(rng.integers(2, 5))):
        lobule = _pack(rng, tissue, start[None], (16, 32), 1.5, cells, int(rng.integers(10, 60)), 0.4)
        cells = np.vstack([cells, lobule])
    return cells


def _nuclei(
    rng: Generator, tissue: _Tissue, glands: Sequence[tuple[Points, Gland]], keep_out: Points, look: Look
) -> tuple[Points, NDArray[np.int64], NDArray[np.float64]]:
    """All nuclei: places in µm, types and directions. Those of the stroma stay out of some circles."""
    count = int(tissue.size.prod() * look.cellularity / 1e6)
    clusters = tissue.draw(rng, int(rng.integers(0, 6)))
    crowds = [centre + rng.normal(0, rng.uniform(15, 60), (int(rng.integers(40, 160)), 2)) for centre in clusters]
    spots = np.concatenate([tissue.draw(rng, count), *crowds])
    is_round = np.concatenate([rng.random(count) < 0.3, np.ones(len(spots) - count, bool)])
    keep = (tissue.at(spots) > 3) & ~tissue.covered(keep_out, spots)
    spots, is_round = spots[keep], is_round[keep]
    inner = np.concatenate([np.empty((0, 3)), *(gland.nuclei + np.append(at, 0.0) for at, gland in glands)])
    return (
        np.concatenate([spots, inner[:, :2]]),
        np.concatenate([np.where(is_round, LYMPHOCYTE, FIBROBLAST), np.full(len(inner), EPITHELIAL)]),
        np.concatenate([look.fibre_angle + rng.normal(0, 0.35, len(spots)), inner[:, 2]]),
    )


def _strokes(rng: Generator, size: Points, options: SyntheticOptions) -> list[Stroke]:
    """Pen marks and bubbles, in µm."""
    strokes = []
    if rng.random() < options.pen:
        share = np.linspace(-0.5, 0.5, 40)[:, None]
        angle = rng.uniform(0, 2 * np.pi)
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        bend = np.sin(share * rng.uniform(3, 8)) * rng.uniform(0.02, 0.1)
        line = rng.uniform(0.1, 0.9, 2) * size + size.max() * (rng.uniform(0.4, 0.9) * share * along + bend * across)
        strokes.append(Stroke(line, float(rng.uniform(60, 120)), _PENS[int(rng.integers(len(_PENS)))]))
    if rng.random() < options.bubbles:
        for _ in range(int(rng.integers(1, 5))):
            radius = float(rng.uniform(0.03, 0.12)) * float(size.min())
            ring = outline(rng, radius, 0.02, 90) + rng.uniform(0, 1, 2) * size
            strokes += [
                Stroke(ring, 12, (0.45, 0.45, 0.47), closed=True),
                Stroke(ring, 36, (0.88, 0.88, 0.88), closed=True),
            ]
    return strokes


def _jitter(vector: Sequence[float], sigma: float, rng: Generator) -> tuple[float, ...]:
    moved = np.clip(np.asarray(vector) + rng.normal(0, sigma, 3), 0.02, None)
    return tuple(float(value) for value in moved / np.linalg.norm(moved))

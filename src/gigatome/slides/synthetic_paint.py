"""Pixels of a synthetic slide.

Everything is painted as optical density of two stains and becomes colour by the law of Beer and Lambert. Windows are
painted independently and meet without a seam, so that a slide of any size needs little memory.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from gigatome.core.seeding import generator
from gigatome.slides.synthetic_glands import Points
from gigatome.slides.synthetic_scene import Scene, Stroke

_NUCLEI = ((3.9, 2.7), (5.2, 1.3), (2.7, 2.5))  # half axes in µm of each type
_ANGLES = 16  # of the sprites, over half a turn
_VARIANTS = 6
_TEXTURE = 1024  # px, side of the periodic textures


def paint(scene: Scene, top: int, height: int) -> NDArray[np.uint8]:
    """Rows ``top`` … ``top + height`` of the slide, uint8 [height, width, 3].

    Two windows that meet show no seam.
    """
    mpp, look = scene.mpp, scene.look
    soft = 0.5 / mpp
    margin = int(8 * soft) + 4  # painted beyond the window, so that no blur sees its edge
    first, rows = top - margin, height + 2 * margin
    tissue = _filled(scene.pieces, first, rows, scene.width)
    for x, y, radius in scene.fat[np.abs(scene.fat[:, 1] - first - rows / 2) < rows / 2 + 200 / mpp]:
        cv2.circle(tissue, _fixed((x, y - first)), int(radius * 16), 0, -1, cv2.LINE_8, 4)
    epithelium = _soft(_filled(scene.epithelium, first, rows, scene.width), soft)
    stuff = _soft(np.minimum(tissue, 255 - _filled(scene.lumens, first, rows, scene.width)), soft)
    fibres, grain = _textures(scene, first, rows)
    pink = fibres * (look.pink * 0.33) + look.pink
    pink += epithelium * (look.pink * 0.75 * (1 + 0.25 * grain) - pink)
    blue = epithelium * (0.16 * look.nuclear)
    nuclei = _nuclei(scene, first, rows) * (look.nuclear * (1 + 0.12 * grain))
    pink *= 1 - 0.5 * np.minimum(nuclei, 1)
    blue += nuclei
    pink *= stuff
    blue *= stuff
    rgb = np.empty((rows, scene.width, 3), np.float32)
    glass = _glass(scene, first, rows)
    for channel in range(3):
        density = blue * -look.haematoxylin[channel] - pink * look.eosin[channel]
        rgb[..., channel] = cv2.exp(density) * glass[channel]
    for stroke in scene.strokes:
        _lay(rgb, stroke, first, soft)
    return (rgb[margin:-margin] + np.float32(0.5)).astype(np.uint8)


def _filled(polygons: Sequence[Points], first: int, rows: int, width: int) -> NDArray[np.uint8]:
    mask = np.zeros((rows, width), np.uint8)
    for polygon in polygons:
        if polygon[:, 1].max() >= first and polygon[:, 1].min() < first + rows:
            cv2.fillPoly(mask, [np.round((polygon - (0, first)) * 16).astype(np.int32)], 255, cv2.LINE_8, 4)
    return mask


def _soft(mask: NDArray[np.uint8], sigma: float) -> NDArray[np.float32]:
    return cv2.GaussianBlur(mask, (0, 0), sigma).astype(np.float32) * np.float32(1 / 255)


def _fixed(point: Sequence[float]) -> tuple[int, int]:
    return round(point[0] * 16), round(point[1] * 16)


def _textures(scene: Scene, first: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fibres and grain at every pixel, mean 0 and standard deviation 1."""
    fibre_tile, grain_tile = _texture_tiles(scene.seed % 4)
    y, x = np.arange(first, first + rows) * scene.mpp, np.arange(scene.width) * scene.mpp
    phase = generator(scene.seed, "fibres").uniform(0, 2 * np.pi, 4)
    cosine, sine = np.cos(scene.look.fibre_angle), np.sin(scene.look.fibre_angle)
    along = y * sine + 25 * np.sin(y / 90 + phase[0]), x * cosine + 25 * np.sin(x / 110 + phase[1])
    across = y * cosine + 18 * np.sin(y / 70 + phase[2]), 18 * np.sin(x / 60 + phase[3]) - x * sine
    u, v = (np.add.outer(*((part * 2 % _TEXTURE).astype(np.float32) for part in axis)) for axis in (along, across))
    fibres = np.asarray(cv2.remap(fibre_tile, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), np.float32)
    grain = grain_tile[np.ix_(np.arange(first, first + rows) % _TEXTURE, np.arange(scene.width) % _TEXTURE)]
    return fibres, grain


@lru_cache(maxsize=4)
def _texture_tiles(variant: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Periodic fibre and grain textures, float32 [1024, 1024] each, at 0.5 mpp."""
    rng = generator(variant, "textures")
    fy, fx = np.fft.fftfreq(_TEXTURE)[:, None], np.fft.rfftfreq(_TEXTURE)[None, :]
    fibres = np.exp(-((fx * 45) ** 2) - (fy * 6) ** 2) + 6 * np.exp(-((fx * 160) ** 2) - (fy * 110) ** 2)
    grain = np.exp(-((fx**2 + fy**2) * 5**2))
    tiles = []
    for response in (fibres, grain):
        tile = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(_TEXTURE, _TEXTURE))) * response, s=(_TEXTURE, _TEXTURE))
        tile = ((tile - tile.mean()) / tile.std()).clip(-2.2, 2.2).astype(np.float32)
        tile.flags.writeable = False
        tiles.append(tile)
    fibres, grain = tiles
    return fibres, grain


def _nuclei(scene: Scene, first: int, rows: int) -> NDArray[np.float32]:
    """Haematoxylin of the nuclei, about 1 inside one."""
    sprites = _sprites(scene.mpp)
    size = sprites.shape[-1]
    canvas = np.zeros((rows + 2 * size, scene.width + 2 * size), np.float32)
    corner = np.round(scene.nuclei - (size / 2, size / 2 + first)).astype(int) + size
    turns = np.round(scene.nucleus_angles / np.pi * _ANGLES).astype(int) % _ANGLES
    shown = (corner >= 0).all(axis=1) & (corner[:, 1] < rows + size) & (corner[:, 0] < scene.width + size)
    for index in np.flatnonzero(shown).tolist():
        x, y = corner[index]
        window = canvas[y : y + size, x : x + size]
        np.maximum(window, sprites[scene.nucleus_types[index], turns[index], index % _VARIANTS], out=window)
    return canvas[size:-size, size:-size]


@lru_cache(maxsize=4)
def _sprites(mpp: float) -> NDArray[np.float32]:
    """Pictures of nuclei, float32 [types, angles, variants, side, side]; chromatin about 1, darker at the rim."""
    rng = generator(0, "nuclei")
    half = int(np.ceil(7.0 / mpp))
    y, x = np.mgrid[-half : half + 1, -half : half + 1] * mpp
    sprites = np.empty((len(_NUCLEI), _ANGLES, _VARIANTS, *x.shape), np.float32)
    for kind, turn, variant in np.ndindex(sprites.shape[:3]):
        angle = turn * np.pi / _ANGLES
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        a, b = np.array(_NUCLEI[kind]) * rng.uniform(0.85, 1.15, 2)
        wave = 1 + 0.08 * np.sin(3 * np.arctan2(v, u) + rng.uniform(0, 6))
        r = np.hypot(u / a, v / b) * wave
        inside = 1 / (1 + np.exp((r - 1) * min(a, b) / 0.35))
        clumps = cv2.GaussianBlur(rng.normal(size=r.shape), (0, 0), 0.8 / mpp) * (1.4 / mpp)
        rim = 0.25 * np.exp(-(((r - 0.85) / 0.18) ** 2))
        sprites[kind, turn, variant] = inside * (0.85 + rim + 0.16 * clumps).clip(0.3, 1.4)
    sprites.flags.writeable = False
    return sprites


def _glass(scene: Scene, first: int, rows: int) -> list[NDArray[np.float32]]:
    """Light through the empty glass, [rows, width] for each colour, slightly uneven."""
    rng = generator(scene.seed, "glass")
    centre, tint = rng.uniform(0.3, 0.7, 2), 243 + rng.uniform(-3, 3, 3)
    y = (np.arange(first, first + rows) / scene.height - centre[1]) ** 2
    x = (np.arange(scene.width) / scene.width - centre[0]) ** 2
    shade = np.add.outer(1 - 0.04 * y, -0.04 * x).astype(np.float32)
    return [shade * np.float32(value) for value in tint]


def _lay(rgb: NDArray[np.float32], stroke: Stroke, first: int, soft: float) -> None:
    """Darkens ``rgb`` in place where a stroke lies."""
    reach = stroke.width / 2 + 16 * soft
    low = np.maximum(np.floor(stroke.points.min(axis=0) - (0, first) - reach).astype(int), 0)
    high = np.minimum(np.ceil(stroke.points.max(axis=0) - (0, first) + reach).astype(int), rgb.shape[1::-1])
    if (low >= high).any():
        return
    window = rgb[low[1] : high[1], low[0] : high[0]]
    mask = np.zeros(window.shape[:2], np.uint8)
    points = np.round((stroke.points - (0, first) - low) * 16).astype(np.int32)
    cv2.polylines(mask, [points], stroke.closed, 255, max(1, round(stroke.width)), cv2.LINE_8, 4)
    alpha = cv2.GaussianBlur(mask, (0, 0), 2 * soft).astype(np.float32) / 255
    for channel in range(3):
        window[..., channel] *= 1 - alpha * (1 - stroke.light[channel])

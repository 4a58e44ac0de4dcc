"""Glands of the synthetic slides, in two architectures made of the same parts.

Each gland is an outline with an area of epithelium, an area of white and a number of nuclei. In an organised gland the
white is one central lumen and the nuclei stand in a basal row; in a disorderly one they lie scattered through a nest,
and the white is a cleft beside it or many small holes in it. Only the arrangement differs, so that no colour
statistic tells the two apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""Coordinates (x, y), [N, 2]."""


@dataclass(frozen=True)
class Gland:
    """One gland: outlines of epithelium and of white, and its nuclei (x, y, angle), [N, 3]; in µm."""

    epithelium: Points
    white: tuple[Points, ...]
    nuclei: Points


def outline(rng: Generator, radius: float, wobble: float = 0.12, points: int = 40) -> Points:
    """An irregular closed outline about the origin, [points, 2]; ``radius`` is its mean."""
    theta = np.linspace(0, 2 * np.pi, points, endpoint=False)
    r = np.ones(points)
    for k in range(2, points // 5):
        r += wobble * 2 / k**1.5 * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    r = radius * np.clip(r, 0.5, 1.6)
    return np.stack([r * np.cos(theta), r * np.sin(theta)], axis=1)


def area(polygon: Points) -> float:
    """Area of a closed polygon."""
    x, y = polygon.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def make_gland(rng: Generator, radius: float, organised: bool) -> Gland:
    """A gland about the origin, in µm: organised as a ring about one lumen, or with the same parts in disorder."""
    shape = outline(rng, radius)
    distance = np.linalg.norm(shape, axis=1, keepdims=True)
    thickness = min(rng.uniform(0.45, 0.65) * radius, 26.0)
    lumen = shape * (1 - thickness / distance)
    count = max(6, round(float(np.linalg.norm(np.diff(shape, axis=0, append=shape[:1]), axis=1).sum()) / 7.5))
    if organised:
        return Gland(shape, (lumen,), _basal_row(rng, shape, count, depth=6.0))
    if rng.random() < 0.5:
        return _nest_with_cleft(rng, shape, area(lumen), count)
    return _cribriform(rng, shape, area(lumen), count)


def _basal_row(rng: Generator, shape: Points, count: int, depth: float) -> Points:
    """Nuclei along the outline, ``depth`` inside it, pointing to the middle."""
    at = np.sort((np.arange(count) + rng.uniform(-0.25, 0.25, count)) / count % 1) * len(shape)
    low = at.astype(int) % len(shape)
    share = (at % 1)[:, None]
    edge = shape[low] * (1 - share) + shape[(low + 1) % len(shape)] * share
    length = np.linalg.norm(edge, axis=1, keepdims=True)
    middle = edge * (1 - (depth + rng.normal(0, 1.0, (count, 1))) / length)
    return np.column_stack([middle, np.arctan2(edge[:, 1], edge[:, 0]) + rng.normal(0, 0.15, count)])


def _nest_with_cleft(rng: Generator, shape: Points, white: float, count: int) -> Gland:
    """The epithelium as one solid nest; the white as the cleft between it and the stroma."""
    scale = float(np.sqrt(1 - white / area(shape)))
    away = rng.uniform(0, 2 * np.pi)
    shift = 0.8 * (1 - scale) * np.linalg.norm(shape, axis=1).min() * np.array([np.cos(away), np.sin(away)])
    nest = shape * scale + shift
    return Gland(nest, (_ring(shape, nest),), _scatter(rng, nest, np.empty((0, 3)), count))


def _ring(outer: Points, inner: Points) -> Points:
    """The area between two outlines, as one polygon with a seam."""
    return np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])


def _cribriform(rng: Generator, shape: Points, white: float, count: int) -> Gland:
    """The epithelium as a sheet with many small round holes that together are as large as the lumen was."""
    share = rng.lognormal(0, 0.3, max(4, round(white / 130)))
    radii = np.sort(np.sqrt(white * share / share.sum() / np.pi))[::-1]
    candidates = _inside(rng, shape * 0.95, 300)
    holes = np.empty((0, 3))
    for radius in radii:
        space = np.full(len(candidates), np.inf)
        if len(holes):
            space = np.linalg.norm(candidates[:, None] - holes[None, :, :2], axis=2)
            space = (space - holes[None, :, 2]).min(axis=1) - radius
        free = np.flatnonzero(space > 4.0)
        best = free[0] if len(free) else int(space.argmax())
        holes = np.vstack([holes, [*candidates[best], radius]])
    white_parts = tuple(outline(rng, radius, 0.06, 16) + np.array([x, y]) for x, y, radius in holes)
    return Gland(shape, white_parts, _scatter(rng, shape, holes, count))


def _scatter(rng: Generator, shape: Points, holes: Points, count: int) -> Points:
    """``count`` nuclei at random in ``shape``, apart from each other and from the holes."""
    candidates = _inside(rng, shape * 0.94 + 0.06 * shape.mean(axis=0), 12 * count)
    if len(holes):
        away = np.linalg.norm(candidates[:, None] - holes[None, :, :2], axis=2) - holes[None, :, 2]
        candidates = candidates[np.argsort(away.min(axis=1) < 3.0, kind="stable")]
    apart = np.linalg.norm(candidates[:, None] - candidates[None], axis=2)
    for least in (7.0, 6.0, 5.0, 4.0, 0.0):
        taken: list[int] = []
        free = np.ones(len(candidates), bool)
        for index in range(len(candidates)):
            if free[index]:
                taken.append(index)
                free &= apart[index] >= least
                if len(taken) == count:
                    break
        if len(taken) == count:
            break
    return np.column_stack([candidates[taken], rng.uniform(0, np.pi, len(taken))])


def _inside(rng: Generator, shape: Points, count: int) -> Points:
    """About ``count`` points spread evenly at random over a star-shaped outline about its own mean."""
    centre = shape.mean(axis=0)
    low, high = shape.min(axis=0), shape.max(axis=0)
    points = rng.uniform(low, high, (2 * count, 2))
    offset = shape - centre
    angles = np.arctan2(offset[:, 1], offset[:, 0])
    order = np.argsort(angles)
    radius = np.interp(
        np.arctan2(*(points - centre).T[::-1]), angles[order], np.linalg.norm(offset, axis=1)[order], period=2 * np.pi
    )
    return points[np.linalg.norm(points - centre, axis=1) < radius][:count]

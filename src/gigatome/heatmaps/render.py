"""Heat-maps for people: a picture over the slide, and objects for QuPath."""

import json
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gigatome.blob.store import atomic_path
from gigatome.core.errors import ConfigError
from gigatome.core.extras import require
from gigatome.core.geometry import Box
from gigatome.heatmaps.attention import HeatMap
from gigatome.slides.slide import Slide

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "gigatome/heatmaps")


@dataclass(frozen=True)
class OverlayOptions:
    """How a heat-map is drawn.

    Attributes:
        channel: index of a channel; None draws the mean of all.
        alpha: share of the colour in the blend, 0 to 1.
        colormap: name of a colour map of matplotlib.
        limits: values at the two ends of the colours; None takes the 1st and the 99th percentile of the picture, so
            that a few extreme cells do not use up the colours.
        legend: whether a bar below the picture shows the colours and what is at their ends.
    """

    channel: int | None = None
    alpha: float = 0.5
    colormap: str = "coolwarm"
    limits: tuple[float, float] | None = None
    legend: bool = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")


def overlay(image: np.ndarray, box: Box, heat: HeatMap, options: OverlayOptions = OverlayOptions()) -> np.ndarray:
    """Blends a heat-map over a picture of a part of its slide.

    Args:
        image: uint8 [H, W, 3], showing ``box`` at any scale.
        box: the part of the slide that the picture shows, level-0 pixels.
        heat: the map; where it is NaN the picture stays as it is.
        options: how to draw.

    Returns:
        uint8 [H, W, 3], with rows for the legend added below if there is one.

    Raises:
        ConfigError: the map has no such channel, or matplotlib no such colour map.
        MissingExtraError: matplotlib, which has the colours, is not installed.
    """
    heat.check_channel(options.channel)
    height, width = image.shape[:2]
    steps = box.width / width, box.height / height
    values = sample(drawn(heat, options.channel, max(steps)), (box.x, box.y), steps, height, width)
    low, high = options.limits or limits_of(values)
    colours = colours_of(options.colormap)
    blended = blend(image, values, (low, high), colours, options.alpha)
    if not options.legend:
        return blended
    name = "mean" if options.channel is None else heat.channels[options.channel]
    if options.channel is None and len(heat.channels) == 1:
        name = heat.channels[0]
    return np.vstack([blended, _legend(image.shape[1], colours, name, low, high)])


def write_overlay(
    path: str | Path,
    slide: Slide,
    heat: HeatMap,
    options: OverlayOptions = OverlayOptions(),
    *,
    box: Box | None = None,
    max_side: int = 2048,
) -> None:
    """Writes a PNG of a slide with a heat-map over it.

    Args:
        path: ``.png`` to write, whole or not at all.
        slide: the slide of the map.
        heat: the map.
        options: how to draw.
        box: part of the slide to show, level-0 pixels; None shows all of it.
        max_side: longest side of the picture, px.
    """
    if box is None:
        box, image = Box(0, 0, slide.width, slide.height), slide.thumbnail(max_side)
    else:
        image = slide.read(box, mpp=slide.mpp * max(1.0, max(box.width, box.height) / max_side), exact=False)
    picture = Image.fromarray(overlay(image, box, heat, options))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def write_geojson(
    path: str | Path, heat: HeatMap, *, slide: str, cell: float | None = None, origin: tuple[int, int] = (0, 0)
) -> int:
    """Writes a heat-map as objects for QuPath: squares of type ``tile`` with a measurement a channel.

    Channels named ``attention_h0``, ``attention_h1`` … also get their mean, as ``attention``.

    Args:
        path: ``.geojson`` to write, whole or not at all.
        heat: the map.
        slide: name of the slide; with the place of a square it makes the square's id, the same each time.
        cell: side that the squares should about have, level-0 pixels: a whole number of the map's cells, averaged.
            None makes one square of each cell.
        origin: (x, y) that is taken off all coordinates. QuPath shows slides that state bounds, such as MRXS, cropped
            to them, and counts from their corner: give ``(slide.bounds.x, slide.bounds.y)`` for these, unless the
            slide was imported with ``--no-crop``. Other tools count from the corner of the whole slide: (0, 0).

    Returns:
        Number of objects written.
    """
    heat = heat.coarser(max(1, round(cell / heat.cell)) if cell else 1)
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write(f'{{"type":"FeatureCollection","origin":{json.dumps(origin)},"features":[')
        for feature in _features(heat, slide, origin):
            handle.write(",\n" if count else "\n")
            handle.write(json.dumps(feature, separators=(",", ":")))
            count += 1
        handle.write("\n]}\n")
    return count


def _features(heat: HeatMap, slide: str, origin: tuple[int, int]) -> Iterator[dict]:
    names, values = _with_means(heat)
    for row, column in np.argwhere(np.isfinite(heat.values).any(0)).tolist():
        found = zip(names, values[:, row, column].tolist(), strict=True)
        measurements = {name: round(value, 6) for name, value in found if math.isfinite(value)}
        left, top = heat.x - origin[0] + column * heat.cell, heat.y - origin[1] + row * heat.cell
        left, top, right, bottom = (round(edge, 2) for edge in (left, top, left + heat.cell, top + heat.cell))
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMESPACE, f"{slide}/{heat.cell}/{column}/{row}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "tile", "measurements": measurements},
        }


def _with_means(heat: HeatMap) -> tuple[list[str], np.ndarray]:
    """Names and values of all channels, each run of heads after its mean."""
    groups: dict[str, list[int]] = {}
    for index, channel in enumerate(heat.channels):
        stem, _, head = channel.rpartition("_h")
        groups.setdefault(stem if stem and head.isdigit() else channel, []).append(index)
    names, values = [], []
    for stem, members in groups.items():
        if len(members) > 1:
            names.append(stem)
            values.append(heat.values[members].mean(0))
        names += [heat.channels[index] for index in members]
        values += [heat.values[index] for index in members]
    return names, np.stack(values)


def drawn(heat: HeatMap, channel: int | None, step: float) -> HeatMap:
    """The one channel to draw, None for the mean of all, with cells that fit pixels of ``step`` level-0 pixels."""
    single = heat.mean if channel is None else heat.values[channel]
    heat = HeatMap(single[None], ("",), heat.x, heat.y, heat.cell, heat.slide_mpp)
    return heat.coarser(max(1, int(step / heat.cell)))


def sample(
    heat: HeatMap, corner: tuple[float, float], steps: tuple[float, float], height: int, width: int
) -> np.ndarray:
    """First channel at the centres of pixels, float32 [height, width], NaN off the map.

    Args:
        heat: the map.
        corner: (x, y) of the first pixel, level-0 pixels.
        steps: width and height of a pixel, level-0 pixels.
        height: pixels.
        width: pixels.
    """
    columns = np.floor((corner[0] + (np.arange(width) + 0.5) * steps[0] - heat.x) / heat.cell).astype(np.int64)
    rows = np.floor((corner[1] + (np.arange(height) + 0.5) * steps[1] - heat.y) / heat.cell).astype(np.int64)
    inside = np.ix_((rows >= 0) & (rows < heat.values.shape[1]), (columns >= 0) & (columns < heat.values.shape[2]))
    values = np.full((height, width), np.nan, np.float32)
    values[inside] = heat.values[0][rows[inside[0]], columns[inside[1]]]
    return values


def limits_of(values: np.ndarray) -> tuple[float, float]:
    """The 1st and the 99th percentile of the values that are there; 0 and 1 where there is none."""
    present = values[np.isfinite(values)]
    if not len(present):
        return 0.0, 1.0
    low, high = np.percentile(present, (1, 99)).tolist()
    return low, high


def blend(
    image: np.ndarray, values: np.ndarray, limits: tuple[float, float], colours: np.ndarray, alpha: float
) -> np.ndarray:
    """``image``, uint8 [H, W, 3], with the colours of ``values`` [H, W] over it where these are not NaN."""
    present, (low, high) = np.isfinite(values), limits
    scaled = np.clip((values[present] - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    colour = colours[np.rint(scaled * 255).astype(np.uint8)]
    blended = image.copy()
    blended[present] = np.rint(alpha * colour + (1 - alpha) * image[present]).astype(np.uint8)
    return blended


def colours_of(name: str) -> np.ndarray:
    """The 256 colours of a colour map, uint8 [256, 3]."""
    matplotlib = require("matplotlib", "learn", "colour heat-maps")
    if name not in matplotlib.colormaps:
        raise ConfigError(f"matplotlib has no colour map {name}; such as coolwarm, viridis, turbo")
    return np.rint(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


def _legend(width: int, colours: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """A strip [rows, width, 3] with the colours and what is at their ends."""
    scale = max(1, width // 1000)
    strip = Image.new("RGB", (width, 28 * scale), "white")
    draw = ImageDraw.Draw(strip)
    size = 12 * scale
    bar = Image.fromarray(np.tile(colours[np.linspace(0, 255, max(2, width // 3)).astype(np.uint8)], (size, 1, 1)))
    left = (width - bar.width) // 2
    strip.paste(bar, (left, 8 * scale))
    middle = 14 * scale
    draw.text((left - 4 * scale, middle), f"{name}  {low:.3g}", "black", anchor="rm", font_size=size)
    draw.text((left + bar.width + 4 * scale, middle), f"{high:.3g}", "black", anchor="lm", font_size=size)
    return np.asarray(strip)

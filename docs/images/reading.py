"""Draws reading.jpg for docs/reading.md: ``python docs/images/reading.py [SLIDE]``; without a slide, a synthetic one.

The picture in the repository shows CMU-1-Small-Region.svs of OpenSlide's test data (CC0). It takes a slide whose chunks
are JPEG without subsampled colours, in which a coded unit is one block.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gigatome.slides.reader import TiffReader
from gigatome.slides.slide import Slide, open_slide
from gigatome.slides.synthetic import SyntheticOptions, make_slide

OUT = Path(__file__).with_suffix(".jpg")
CHUNK_COLUMN, CHUNK_ROW = 4, 8  # of the first of four chunks
TILE, TILE_X, TILE_Y = 256, 124, 140  # within the four
BLOCK, DETAIL = 8, (17, 32, 9, 6)  # pixels; x, y, width and height of the detail, in blocks of the four
ZOOM, DETAIL_BLOCK = 1.5, 32  # drawn pixels
MARGIN, GUTTER, LINE = 40, 48, 38
CARD, TEXT, FAINT, EDGE, OUTLINE = "#20242c", "#eceff4", "#aab2c0", "#ffffff", "#ffd166"
NEVER, PARSED, DECODED = range(3)


def states(chunk: int) -> np.ndarray:
    """What becomes of each block of the four chunks, as ``decode.c`` has it: int [2n, 2n]."""
    count = chunk // BLOCK
    found = np.full((2 * count, 2 * count), NEVER)
    for row in range(2):
        for column in range(2):
            part = found[row * count :, column * count :][:count, :count]
            left, right = _blocks(TILE_X - column * chunk, chunk)
            top, bottom = _blocks(TILE_Y - row * chunk, chunk)
            part[:bottom] = PARSED
            part[top:bottom, left:right] = DECODED
    return found


def _blocks(start: int, chunk: int) -> tuple[int, int]:
    """First and last (excluded) block of a chunk that the tile touches along one axis."""
    first, end = max(start, 0), min(start + TILE, chunk)
    return first // BLOCK, -(-end // BLOCK)


def overview(pixels: np.ndarray, found: np.ndarray, chunk: int) -> Image.Image:
    """The four chunks with what becomes of their blocks."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None] / 255
    state = np.kron(found, np.ones((BLOCK, BLOCK), int))[..., None]
    parsed = (0.18 + 0.52 * grey) * np.array([120, 170, 215])
    card = np.array([int(CARD[k : k + 2], 16) for k in (1, 3, 5)])
    never = 0.9 * card + 0.1 * 90 * grey
    shown = np.select([state == DECODED, state == PARSED], [pixels, parsed], never)
    side = round(2 * chunk * ZOOM)
    image = Image.fromarray(shown.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image, "RGBA")
    for k in range(0, 2 * chunk, BLOCK):
        for line in ((k, 0, k, 2 * chunk), (0, k, 2 * chunk, k)):
            draw.line([round(value * ZOOM) for value in line], fill=(20, 24, 32, 46), width=1)
    middle = side // 2
    for line in ((middle, 0, middle, side), (0, middle, side, middle)):
        draw.line(line, fill=EDGE, width=3)
    draw.rectangle((0, 0, side - 1, side - 1), outline=EDGE, width=3)
    corner = [round(value * ZOOM) for value in (TILE_X, TILE_Y, TILE_X + TILE, TILE_Y + TILE)]
    draw.rectangle(corner, outline=OUTLINE, width=5)
    x, y, width, height = (round(value * BLOCK * ZOOM) for value in DETAIL)
    draw.rectangle((x, y, x + width, y + height), outline=EDGE, width=3)
    return image


def detail(slide: Slide, x: int, y: int, shrink: int) -> Image.Image:
    """The blocks of the detail as they are decoded at 1/``shrink``."""
    width, height = DETAIL[2:]
    side = BLOCK // shrink
    tile = slide.read_tile(x, y, width * side, slide.mpp * shrink, exact=False)[: height * side]
    size = width * DETAIL_BLOCK, height * DETAIL_BLOCK
    image = Image.fromarray(tile).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image, "RGBA")
    for k in range(DETAIL_BLOCK, size[0], DETAIL_BLOCK):
        draw.line((k, 0, k, size[1]), fill=(255, 255, 255, 150), width=2)
        draw.line((0, k, size[0], k), fill=(255, 255, 255, 150), width=2)
    return image


def figure(slide: Slide) -> Image.Image:
    """The whole picture."""
    chunk = slide.levels[0].chunk_width
    left, top = CHUNK_COLUMN * chunk, CHUNK_ROW * chunk
    found = states(chunk)
    main = overview(slide.read_level(0, left, top, 2 * chunk, 2 * chunk), found, chunk)
    width, height = DETAIL[2] * DETAIL_BLOCK, DETAIL[3] * DETAIL_BLOCK
    right = MARGIN + main.width + GUTTER
    image = Image.new("RGB", (right + 2 * width + 24 + MARGIN, main.height + 2 * MARGIN), CARD)
    image.paste(main, (MARGIN, MARGIN))
    draw, y = ImageDraw.Draw(image), MARGIN - 6
    plain, small = ImageFont.load_default(29), ImageFont.load_default(25)
    draw.text((right, y), f"A tile of {TILE} pixels a side on four chunks of {chunk}", TEXT, plain)
    y += LINE + 18
    total = found.size
    for state, colour, text in (
        (DECODED, "#c64f80", "decoded"),
        (PARSED, "#5b7f9f", "parsed only, to reach the next"),
        (NEVER, "#2b303a", "never looked at"),
    ):
        draw.rounded_rectangle((right, y + 2, right + 28, y + 30), 5, fill=colour, outline=FAINT)
        draw.text((right + 44, y), f"{(found == state).sum() / total:.0%} of the blocks: {text}", TEXT, small)
        y += LINE
    y = image.height - MARGIN - 2 * (height + LINE) - LINE - 8
    draw.text((right, y), "The same blocks, shrunk as they are decoded", TEXT, plain)
    y += LINE + 12
    for number, shrink in enumerate((1, 2, 4, 8)):
        place = right + number % 2 * (width + 24), y + number // 2 * (height + LINE)
        corner = left + DETAIL[0] * BLOCK, top + DETAIL[1] * BLOCK
        image.paste(detail(slide, *corner, shrink), place)
        side = BLOCK // shrink
        text = f"{side} by {side} pixels, {slide.mpp * shrink:.2g} mpp"
        draw.text((place[0], place[1] + height + 2), text, FAINT, small)
    return image


def finest(slide: Slide) -> Slide:
    """The slide without its smaller levels, so that level 0 is shrunk for all of the picture."""
    source = slide.source
    assert source is not None  # noqa: S101 - it is a TIFF
    blob, index = source
    return Slide(slide.uri, TiffReader(blob, slide.name, replace(index, levels=index.levels[:1])), slide.mpp)


def main() -> None:
    """Draws it of the slide that is named, or of a synthetic one."""
    with tempfile.TemporaryDirectory() as scratch:
        path = (
            sys.argv[1]
            if len(sys.argv) > 1
            else make_slide(Path(scratch) / "synthetic.svs", "glandular", 0, SyntheticOptions(3072, 3072))
        )
        with open_slide(path) as slide:
            figure(finest(slide)).save(OUT, quality=84, optimize=True)


if __name__ == "__main__":
    main()

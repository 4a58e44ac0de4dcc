import colorsys

import numpy as np
import pytest

from gigatome.tiles.pixel_filter import HsvFilter, keeps

PINK, GLASS, BLACK, GREEN, BLOOD = (225, 150, 200), (243, 242, 243), (40, 20, 40), (90, 200, 90), (220, 30, 20)


def plain(colour):
    return np.full((64, 64, 3), colour, np.uint8)


@pytest.mark.parametrize(
    ("colour", "kept"), [(PINK, True), (GLASS, False), (BLACK, False), (GREEN, False), (BLOOD, False)]
)
def test_tissue_is_kept_and_other_things_are_not(colour, kept):
    assert keeps(plain(colour), HsvFilter()) is kept


@pytest.mark.parametrize(("pixels", "kept"), [(60, True), (59, False)])
def test_sixty_percent_are_enough(pixels, kept):
    image = np.full((10, 10, 3), GLASS, np.uint8)
    image.reshape(-1, 3)[:pixels] = PINK
    assert keeps(image, HsvFilter()) is kept


def test_counts_as_the_definition_does():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    inside = 0
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = np.array(colorsys.rgb_to_hsv(*pixel)) * (180, 255, 255)
        inside += 90 <= round(hue) <= 180 and round(saturation) >= 8 and round(value) >= 103
    share = inside / 1600
    assert 0.1 < share < 0.9
    assert keeps(image, HsvFilter(share=share - 0.005))
    assert not keeps(image, HsvFilter(share=share + 0.005))


def test_a_part_of_a_larger_image_and_other_limits():
    image = plain(GREEN)[::2, ::2]
    assert keeps(image, HsvFilter(hue=(50, 70)))
    assert keeps(image, HsvFilter(share=0))


@pytest.mark.parametrize("bad", [{"hue": (90, 181)}, {"saturation": (9, 8)}, {"value": (-1, 255)}, {"share": 1.1}])
def test_wrong_limits_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        HsvFilter(**bad)

import cv2
import numpy as np
import pytest

from gigatome.tissue.pixels import SegmentOptions, glass_colour, tissue_pixels

MPP = 8.0


def disk(shape, x, y, radius):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def overlap(found, truth):
    return (found & truth).sum() / max(1, (found | truth).sum())


def test_tissue_is_found_to_a_pixel_at_its_edge(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 120, 110, 70))
    found = tissue_pixels(scene.rgb, MPP)
    assert overlap(found, scene.tissue) > 0.95
    near = cv2.dilate(scene.tissue.astype(np.uint8), np.ones((5, 5))) > 0
    assert not (found & ~near).any()


def test_a_picture_without_glass_is_all_tissue(picture):
    scene = picture()
    scene.add_tissue(np.ones_like(scene.tissue))
    scene.density[:, :160] *= 0.5  # two populations, between which a threshold on a histogram would fall
    assert tissue_pixels(scene.rgb, MPP).all()


def test_bare_glass_has_no_tissue(picture):
    assert not tissue_pixels(picture().rgb, MPP).any()


def test_unscanned_white_and_black_are_no_tissue(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 100, 100, 50))
    rgb = scene.rgb
    rgb[:, 200:], rgb[200:] = 255, 0
    found = tissue_pixels(rgb, MPP)
    assert not found[:, 200:].any()
    assert not found[204:].any()
    assert overlap(found, scene.tissue) > 0.95


def test_a_small_biopsy_on_a_large_slide_is_found(picture):
    scene = picture(600, 800)
    scene.add_tissue(disk(scene.tissue.shape, 400, 300, 14))  # 0.1 % of the picture
    assert overlap(tissue_pixels(scene.rgb, MPP), scene.tissue) > 0.8  # one pixel all round is 14 %


def test_pale_tissue_is_found(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 160, 120, 80), strength=0.2)
    assert overlap(tissue_pixels(scene.rgb, MPP), scene.tissue) > 0.95


def test_fat_stays_in_one_piece_with_the_tissue_it_hangs_on(picture):
    scene = picture()
    shape = scene.tissue.shape
    scene.add_tissue(disk(shape, 80, 120, 60)).add_fat(disk(shape, 200, 120, 75) & ~disk(shape, 80, 120, 60))
    found = tissue_pixels(scene.rgb, MPP)
    assert overlap(found, scene.tissue) > 0.9
    assert cv2.connectedComponents(found.astype(np.uint8))[0] == 2


def test_a_hole_larger_than_the_limit_stays_and_a_smaller_one_is_filled(picture):
    scene = picture()
    shape = scene.tissue.shape
    large, small = disk(shape, 100, 120, 20), disk(shape, 180, 120, 7)
    scene.add_tissue(disk(shape, 140, 120, 100) & ~large & ~small)
    found = tissue_pixels(scene.rgb, MPP)
    assert not found[120, 100]
    assert found[120, 180]
    assert tissue_pixels(scene.rgb, MPP, SegmentOptions(min_hole=200_000))[120, 100]


def test_small_fragments_are_dropped(picture):
    scene = picture()
    shape = scene.tissue.shape
    scene.add_tissue(disk(shape, 100, 120, 50) | disk(shape, 250, 60, 6))
    found = tissue_pixels(scene.rgb, MPP)
    assert found[120, 100]
    assert not found[60, 250]
    assert tissue_pixels(scene.rgb, MPP, SegmentOptions(min_area=1000, gap=8))[60, 250]


@pytest.mark.parametrize(
    "ink",
    [(1.1, 0.5, 0.08), (0.9, 0.25, 0.5), (0.9, 0.9, 0.85), (0.05, 0.8, 0.75)],
    ids=["blue", "green", "black", "red"],
)
def test_pen_is_no_tissue_on_glass_nor_on_tissue(picture, ink):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 110, 120, 75))
    pen = scene.add_line([(20, 200), (120, 110), (300, 60)], 12, ink)
    found = tissue_pixels(scene.rgb, MPP)
    assert (found & pen).sum() < 0.05 * pen.sum()
    assert overlap(found, scene.tissue & ~pen) > 0.85


def test_bubbles_dust_and_cover_slip_edges_are_no_tissue(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 90, 120, 60))
    grey = np.full(3, 0.25)
    scene.add_line([(250 + 35 * np.cos(a), 60 + 35 * np.sin(a)) for a in np.linspace(0, 6.2, 40)], 3, grey, closed=True)
    scene.add_line([(170, 0), (172, 239)], 3, grey)
    scene.add_line([(0, 10), (319, 14)], 4, 2 * grey)
    scene.add_line([(230, 200), (236, 203)], 7, grey)
    found = tissue_pixels(scene.rgb, MPP)
    assert overlap(found, scene.tissue) > 0.95
    assert not found[:, 165:].any()


def test_blood_inside_tissue_is_not_taken_for_red_ink(picture):
    scene = picture()
    shape = scene.tissue.shape
    scene.add_tissue(disk(shape, 160, 120, 100))
    lake = disk(shape, 160, 120, 30)
    scene.density[lake] = [0.09, 0.65, 0.50]
    assert tissue_pixels(scene.rgb, MPP)[lake].all()


def test_uneven_and_tinted_glass_is_no_tissue(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 160, 120, 70))
    shade = 1 - 0.08 * np.linspace(0, 1, 320)[None, :, None]
    tint = np.array([1.0, 0.96, 0.99])
    rgb = np.clip(scene.rgb * shade * tint, 0, 255).astype(np.uint8)
    assert overlap(tissue_pixels(rgb, MPP), scene.tissue) > 0.93


@pytest.mark.parametrize(("mpp", "tolerance"), [(4.0, 0.08), (16.0, 0.08), (29.0, 0.15)])
def test_sizes_are_physical(picture, mpp, tolerance):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 160, 120, 80))
    factor = MPP / mpp
    rgb = cv2.resize(scene.rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    assert tissue_pixels(rgb, mpp).mean() == pytest.approx(scene.tissue.mean(), rel=tolerance)


def test_glass_is_seen_beside_unscanned_white(picture):
    scene = picture()
    scene.add_tissue(disk(scene.tissue.shape, 90, 120, 60))
    rgb = scene.rgb
    rgb[:, 200:] = 255
    assert glass_colour(rgb) == pytest.approx([243, 241, 243], abs=1.5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (7, 5)])
def test_tiny_pictures_do_not_fail(shape):
    assert tissue_pixels(np.full((*shape, 3), 240, np.uint8), MPP).shape == shape


@pytest.mark.parametrize("bad", [{"mpp": 0}, {"stain": 0.01, "faint": 0.02}, {"faint": 0}, {"min_area": -1}])
def test_wrong_options_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        SegmentOptions(**bad)

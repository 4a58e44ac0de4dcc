"""Synthetic slides: what they promise of their files, their classes and their cohorts."""

import tracemalloc

import cv2
import numpy as np
import pytest
import tifffile

from gigatome.core.errors import ConfigError
from gigatome.core.seeding import generator
from gigatome.slides.slide import open_slide
from gigatome.slides.synthetic import KINDS, Look, SyntheticOptions, make_cohort, make_slide
from gigatome.slides.synthetic_glands import area, make_gland
from gigatome.slides.synthetic_paint import paint
from gigatome.slides.synthetic_scene import lay_out

SMALL = SyntheticOptions(width=1000, height=700, pen=0, bubbles=0, fat=0)


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "a.svs", "glandular", 3, SMALL)


def test_same_arguments_give_the_same_bytes(slide_file, tmp_path):
    again = make_slide(tmp_path / "deep" / "b.svs", "glandular", 3, SMALL)
    other = make_slide(tmp_path / "c.svs", "glandular", 4, SMALL)
    assert again.read_bytes() == slide_file.read_bytes()
    assert other.read_bytes() != slide_file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.svs", "deep"]  # and no temporary file


def test_our_reader_knows_it_as_aperio(slide_file):
    with open_slide(slide_file) as slide:
        assert (slide.vendor, slide.reader, slide.mpp) == ("aperio", "tiff", 0.5)
        assert [(level.width, level.height) for level in slide.levels] == [(1000, 700), (250, 175), (62, 43)]
        assert slide.levels[0].chunk_width == 240
        assert slide.properties["aperio.AppMag"] == "20"


def test_openslide_reads_the_same_pixels(slide_file):
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(slide_file) as reference, open_slide(slide_file) as slide:
        assert reference.properties["openslide.vendor"] == "aperio"
        assert float(reference.properties["openslide.mpp-x"]) == 0.5
        assert list(reference.associated_images) == ["thumbnail"]
        expected = np.asarray(reference.read_region((300, 200), 0, (400, 400)))[..., :3]
        np.testing.assert_array_equal(slide.read_level(0, 300, 200, 400, 400), expected)


def test_the_resolution_decides_the_size_of_things(tmp_path):
    coarse = SyntheticOptions(width=500, height=350, mpp=1.0, pen=0, bubbles=0, fat=0)
    with open_slide(make_slide(tmp_path / "x.svs", "solid", 5, coarse)) as slide:
        assert slide.mpp == 1.0
        at_one = slide.read_level(0, 0, 0, 500, 350)
    with open_slide(make_slide(tmp_path / "y.svs", "solid", 5, SMALL)) as slide:
        at_half = cv2.resize(slide.read_level(0, 0, 0, 1000, 700), (500, 350), interpolation=cv2.INTER_AREA)
    assert np.abs(at_one.astype(int) - at_half).mean() < 8  # the same scene, not pixel for pixel


@pytest.mark.parametrize("kind", KINDS)
def test_windows_meet_without_a_seam(kind):
    options = SyntheticOptions(width=800, height=640, pen=1, bubbles=1, fat=1)
    scene = lay_out(kind, 1, options, Look.draw(generator(1)))
    parts = [paint(scene, 0, 250), paint(scene, 250, 33), paint(scene, 283, 357)]
    np.testing.assert_array_equal(np.concatenate(parts), paint(scene, 0, 640))


@pytest.mark.parametrize("seed", range(12))
def test_a_gland_has_the_same_parts_in_order_and_in_disorder(seed):
    ring = make_gland(generator(seed), 40.0, organised=True)
    heap = make_gland(generator(seed), 40.0, organised=False)
    assert len(ring.nuclei) == len(heap.nuclei)
    tiny = 1e-3  # holes are slightly wavy circles
    assert sum(map(area, heap.white)) == pytest.approx(sum(map(area, ring.white)), rel=0.15 + tiny)
    radius = np.linalg.norm(ring.nuclei[:, :2], axis=1)
    assert radius.std() < np.linalg.norm(heap.nuclei[:, :2] - heap.nuclei[:, :2].mean(axis=0), axis=1).std()


def test_the_classes_differ_in_architecture_and_not_in_colour():
    """Slides of both kinds from one seed share everything but the inside of their glands."""
    options = SyntheticOptions(width=1200, height=1000, purity=1.0, pen=0, bubbles=0)
    for seed in range(3):
        look = Look.draw(generator(seed))
        colours, images = [], []
        for kind in KINDS:
            scene = lay_out(kind, seed, options, look)
            image = paint(scene, 0, scene.height)
            mask = np.zeros(image.shape[:2], np.uint8)
            for piece in scene.pieces:
                cv2.fillPoly(mask, [np.round(piece).astype(np.int32)], 1)
            pixels = image[mask > 0].astype(float)
            histogram = np.concatenate([np.histogram(channel, 16, (0, 256))[0] / len(pixels) for channel in pixels.T])
            colours.append((len(scene.nuclei), pixels.mean(axis=0), pixels.std(axis=0), histogram))
            images.append(image.astype(int))
        (nuclei, mean, deviation, histogram), other = colours
        assert nuclei == other[0]
        assert np.abs(mean - other[1]).max() < 1  # grey levels; between patients they differ by ten and more
        assert np.abs(deviation - other[2]).max() < 1.5
        assert np.abs(histogram - other[3]).sum() / 6 < 0.05
        assert (np.abs(images[0] - images[1]).max(axis=2) > 20).mean() > 0.05


def test_purity_mixes_the_architectures():
    def rings(kind: str, purity: float) -> int:
        options = SyntheticOptions(width=3000, height=2500, purity=purity, fat=0)
        scene = lay_out(kind, 0, options, Look.draw(generator(0)))
        return sum(len(outline) == 40 for outline in scene.lumens) / len(scene.epithelium)  # a lumen is one outline

    assert rings("glandular", 1.0) == 1
    assert rings("solid", 1.0) == 0
    assert 0.6 < rings("glandular", 0.8) < 0.95
    assert 0.35 < rings("solid", 0.5) < 0.65


def test_artefacts_come_when_asked_for():
    plain = lay_out("solid", 2, SyntheticOptions(pen=0, bubbles=0, fat=0), Look.draw(generator(2)))
    full = lay_out("solid", 2, SyntheticOptions(pen=1, bubbles=1, fat=1), Look.draw(generator(2)))
    assert not plain.strokes
    assert not len(plain.fat)
    assert len(full.strokes) >= 3
    assert len(full.fat) > 5
    assert Look.draw(generator(0), pale=True).pink < Look.draw(generator(0)).pink


def test_cohort(tmp_path):
    stages = []
    cohort = make_cohort(
        tmp_path,
        patients=5,
        slides_per_patient=(1, 2),
        options=SMALL,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    subtype = cohort.column("subtype")
    by_patient = {}
    for slide in cohort:
        by_patient.setdefault(slide.patient, set()).add(subtype[slide.name])
    assert len(by_patient) == 5
    assert all(len(kinds) == 1 for kinds in by_patient.values())
    assert sorted(kind for kinds in by_patient.values() for kind in kinds) == ["glandular"] * 3 + ["solid"] * 2
    assert stages[-1] == ("slides", len(cohort), len(cohort))
    with cohort.slides[0].open() as slide:
        assert slide.mpp == 0.5


def test_a_stopped_cohort_goes_on(tmp_path):
    def make(seed: int = 0):
        return [
            slide.uri for slide in make_cohort(tmp_path, patients=3, slides_per_patient=1, options=SMALL, seed=seed)
        ]

    files = [tmp_path / "slides" / f"P00{number}-1.svs" for number in (1, 2, 3)]
    assert make() == [str(file) for file in files]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    files[0].unlink()
    files[1].write_bytes(before[1][1][:-5000])
    make()
    after = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert [data for _, data in after] == [data for _, data in before]
    assert after[2][0] == before[2][0]  # untouched
    make(seed=1)
    assert files[2].read_bytes() != before[2][1]


@pytest.mark.parametrize(
    "wrong",
    [{"width": 100}, {"purity": 0.4}, {"purity": 1.1}, {"chunk": 100}, {"mpp": 0.0}, {"pen": 1.5}, {"quality": 0}],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "width" not in wrong and "mpp" not in wrong else "small"):
        SyntheticOptions(**wrong)


def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match="mucinous"):
        make_slide(tmp_path / "a.svs", "mucinous", 0, SMALL)
    with pytest.raises(ConfigError, match="at least one"):
        make_cohort(tmp_path, patients=0)
    with pytest.raises(ConfigError, match="2 to 1"):
        make_cohort(tmp_path, slides_per_patient=(2, 1))
    assert list(tmp_path.iterdir()) == []


def test_the_tiff_is_what_scanners_write(slide_file):
    with tifffile.TiffFile(slide_file) as tiff:
        first = tiff.pages[0]
        assert first.photometric == tifffile.PHOTOMETRIC.YCBCR
        assert first.tags["YCbCrSubSampling"].value == (2, 2)
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True]


@pytest.mark.slow
def test_a_large_slide_needs_little_memory(tmp_path):
    options = SyntheticOptions(width=9000, height=6000)
    tracemalloc.start()
    path = make_slide(tmp_path / "large.svs", "solid", 0, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9000 * 6000 * 6  # the slide in float32 takes twice that, and painting it at once many times
    with open_slide(path) as slide:
        assert slide.read_level(0, 4500, 3000, 512, 512).std() > 5

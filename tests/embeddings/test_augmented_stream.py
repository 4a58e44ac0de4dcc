"""Batches of slides are what their draws say, wherever the embeddings lie."""

import resource
import sys
from itertools import islice, pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gigatome.core.errors import StoreError
from gigatome.embeddings.augmented_files import AugmentedFiles, pack_augmented
from gigatome.embeddings.augmented_stream import AugmentedStream, AugmentedStreamOptions, draw_epoch

sys.path.insert(0, str(Path(__file__).parent))
from made_augmented import made_bag, made_store

MAPPED = AugmentedStreamOptions(tiles=3, resident="mapped")
DEVICE = AugmentedStreamOptions(tiles=3, resident="device")


@pytest.fixture(scope="module")
def bags():
    """Slides of several sizes, one of them scanned at another resolution."""
    bags = [made_bag(number, draws=2 + number % 2, tiles=2 + number) for number in range(7)]
    return [*bags, made_bag(7, mpp=0.5)]


@pytest.fixture(scope="module")
def store(bags, tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("job"), bags)


def stream(store, options=MAPPED, **more):
    return AugmentedStream(store, options, **{"batch_size": 3, "seed": 5} | more)


def batches(made, count, start=0):
    with made:
        return list(islice(made.batches(start), count))


def images(made, count, start=0):
    return np.stack([np.asarray(batch.images) for batch in batches(made, count, start)])


def test_a_view_is_of_one_draw_of_its_slide_with_the_places_of_its_tiles(store, bags):
    found = batches(stream(store), 12)
    draws = set()
    for batch in found:
        assert (batch.images.shape, batch.images.dtype) == ((3, 2, 3, 6), np.float32)
        for slide, views in zip(batch.slides, batch.images, strict=True):
            bag = bags[slide]
            rows = np.concatenate([bag.embeddings, bag.cells], -1).astype(np.float32)
            for number, view in enumerate(views):
                where = [(tile == rows).all(-1) for tile in view]
                (draw,) = {int(np.argwhere(found)[0, 0]) for found in where}
                draws.add((int(slide), number, draw))
    assert len(draws) > 25  # of 2 views of each of 20 draws, all but a few in so many batches


def test_batches_are_the_same_from_files_from_one_file_and_on_the_device(store, tmp_path):
    first = images(stream(store), 5)
    packed = tmp_path / "cohort.h5"
    files = pack_augmented(store, packed)
    assert (files.names, files.kind.encoder, files.kind.weights) == (tuple(store.names()), "tiny", "abc")
    assert files.digest() == AugmentedFiles(store).digest()
    for source, options in ((packed, MAPPED), (store, DEVICE), (packed, DEVICE), (store, AugmentedStreamOptions(3))):
        np.testing.assert_array_equal(images(stream(source, options), 5), first)
    assert isinstance(batches(stream(store, DEVICE), 1)[0].images, torch.Tensor)
    assert stream(packed).digest() == stream(store).digest()


@pytest.mark.parametrize("options", [MAPPED, DEVICE])
def test_a_batch_depends_on_seed_and_number_only(store, options):
    all_ = images(stream(store, options), 6)
    np.testing.assert_array_equal(images(stream(store, options), 2, start=4), all_[4:])
    more = AugmentedStreamOptions(3, resident=options.resident, threads=5, prefetch=1)
    np.testing.assert_array_equal(images(stream(store, more), 6), all_)
    assert (images(stream(store, options, seed=6), 6) != all_).any()


def test_ranks_get_their_parts(store):
    whole = images(stream(store, batch_size=4), 4)
    parts = [images(stream(store, batch_size=4, rank=rank, world_size=2), 4) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_an_epoch_has_each_slide_once_at_most_and_no_batch_has_one_twice(store):
    slides = [batch.slides for batch in batches(stream(store), 20)]  # 8 slides: 2 batches of 3 an epoch
    orders = [np.concatenate(pair) for pair in zip(slides[::2], slides[1::2], strict=True)]
    assert all(len(set(order)) == 6 for order in orders)
    assert any((one != other).any() for one, other in pairwise(orders))
    assert set(np.concatenate(orders)) == set(range(8))


def test_tiles_without_replacement_differ_and_are_all_alike():
    bounds, draws, tiles = np.array([0, 24, 30]), np.array([4, 1, 2]), np.array([6, 6, 5])
    options = AugmentedStreamOptions(4, replacement=False)
    counts = np.zeros(40, int)
    for epoch in range(1500):
        drawn = draw_epoch(0, epoch, bounds, draws, tiles, options)
        assert (np.diff(np.sort(drawn.rows, -1), axis=-1) > 0).all()
        np.add.at(counts, drawn.rows, 1)
    own = counts[24:30] / 1500  # two views of 4 of 6 tiles
    np.testing.assert_allclose(own, 8 / 6, rtol=0.05)
    np.testing.assert_allclose(counts[:24] / 1500, 8 / 24, rtol=0.15)
    np.testing.assert_allclose(counts[30:] / 1500, 8 / 10, rtol=0.05)


def test_slides_of_few_tiles(store, caplog):
    assert len(batches(stream(store, AugmentedStreamOptions(9, resident="mapped")), 1)[0].slides) == 3
    without = stream(store, AugmentedStreamOptions(5, replacement=False), batch_size=2)
    assert without.names == ("s03", "s04", "s05", "s06", "s07")
    assert [failure.slide for failure in without.failures] == ["s00", "s01", "s02"]
    assert without.failures[0].message == "draws of 2 tiles, and a view is of 5 different ones"
    assert {int(slide) for batch in batches(without, 6) for slide in batch.slides} == set(range(5))
    assert "s00: draws of 2 tiles" in caplog.text


@pytest.mark.parametrize(("frame", "side"), [("authors_training", 224), ("authors_inference", 896)])
def test_the_authors_frames(store, frame, side):
    options = AugmentedStreamOptions(3, resident="mapped", frame=frame)
    (batch,) = batches(stream(store, options), 1)
    tile = batches(stream(store), 1)[0].images
    sides = np.where(batch.slides == 7, 512, 1024)[:, None, None, None]  # level-0 pixels
    np.testing.assert_allclose(batch.images[..., -2:], tile[..., -2:] * sides / side, rtol=1e-6)
    np.testing.assert_array_equal(batch.images[..., :-2], tile[..., :-2])


def test_damaged_files_are_left_out_by_name(bags, tmp_path):
    store = made_store(tmp_path, bags)
    store.path("s01").write_bytes(store.path("s01").read_bytes()[:1500])
    with h5py.File(store.path("s02"), "r+") as file:
        del file["coords"]
    with h5py.File(store.path("s03"), "r+") as file:
        values = file["features"][:]
        attrs = dict(file["features"].attrs)
        del file["features"]
        file.create_dataset("features", data=values, compression="gzip").attrs.update(attrs)
    found = stream(store)
    assert [failure.slide for failure in found.failures] == ["s01", "s02", "s03"]
    assert all("delete it and embed the slide again" in failure.message for failure in found.failures)
    assert "do not lie in one piece" in found.failures[2].message
    assert found.names == ("s00", "s04", "s05", "s06", "s07")
    assert len(batches(found, 3)) == 3
    with pytest.raises(StoreError, match=r"is not written, as s01 cannot be read"):
        pack_augmented(store, tmp_path / "no.h5")
    assert not (tmp_path / "no.h5").exists()


@pytest.mark.parametrize("options", [MAPPED, DEVICE])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_name_their_slide(tmp_path, options, value):
    bad = made_bag(1)
    bad.embeddings[...] = value
    store = made_store(tmp_path, [made_bag(0), bad, made_bag(2)])
    with pytest.raises(StoreError, match="s01: embeddings are not finite; embed the slide again"):
        batches(stream(store, options), 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoder": "other"}, r"differ in their encoder \(s00 tiny, s01 other\)"),
        ({"weights": "def"}, r"differ in their weights \(s00 abc, s01 def\)"),
        ({"sharing": "each"}, "differ in their sharing"),
        ({"dim": 5}, r"differ in their dim \(s00 4, s01 5\)"),
    ],
)
def test_slides_of_different_kinds_are_refused(tmp_path, other, message):
    store = made_store(tmp_path, [made_bag(0), made_bag(1, **other)])
    with pytest.raises(StoreError, match=message):
        stream(store)


def test_what_cannot_be_streamed_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="8 slides can be used, and a batch is of 9 different ones"):
        stream(store, batch_size=9)
    with pytest.raises(StoreError, match=r"augmentations are shared, and slides\.sharing asks for each"):
        stream(store, AugmentedStreamOptions(sharing="each"))
    with pytest.raises(ValueError, match="must be a multiple of world_size"):
        stream(store, world_size=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        AugmentedStreamOptions(tiles=0)
    (tmp_path / "other.h5").write_bytes(store.path("s00").read_bytes())
    with pytest.raises(StoreError, match="it is no packed file of augmented embeddings"):
        AugmentedFiles(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(StoreError, match=r"text\.h5: cannot be used"):
        AugmentedFiles(tmp_path / "text.h5")


@pytest.mark.parametrize("options", [MAPPED, DEVICE])
def test_a_file_that_changes_is_noticed(tmp_path, options):
    store = made_store(tmp_path, [made_bag(number) for number in range(3)])
    made = stream(store, options)
    made_store(tmp_path, [made_bag(9, name="s01")])
    with pytest.raises(StoreError, match=r"s01\.h5: has changed since it was opened"):
        batches(made, 1)


def test_embeddings_go_to_a_gpu_that_has_room_for_them(store, monkeypatch, caplog):
    free = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1 << 40))
    needed = len(AugmentedFiles(store)) * (2 * 4 + 8)
    caplog.set_level("INFO", "gigatome")
    for spare, expected in ((4 << 30, True), ((4 << 30) - 1, False)):
        free["cuda:1"] = needed + spare
        assert stream(store, AugmentedStreamOptions(3), device="cuda:1")._resides() is expected
    assert "stay in the files; cuda:1 has 4.3 GB free" in caplog.text


def test_embeddings_that_do_not_fit_are_said_not_to(store, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("out of memory\nmore")

    made = stream(store, DEVICE)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(StoreError, match=r"GB do not fit on cpu; set slides\.resident=mapped \(out of memory\)"):
        batches(made, 1)


def test_many_slides_need_few_descriptors(tmp_path):
    store = made_store(tmp_path, [made_bag(number, draws=1, tiles=2) for number in range(60)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert len(batches(stream(store, batch_size=50), 3)) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_report_says_who_waits(store):
    made = stream(store)
    batches(made, 3)
    report = made.report()
    assert report.slides == 9
    assert report.seconds >= report.waited > 0
    assert "views/s" in report.sentence()
    loaded = stream(store, DEVICE)
    batches(loaded, 3)
    assert loaded.report().loading > 0
    assert "of loading" in loaded.report().sentence()

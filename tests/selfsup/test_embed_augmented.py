"""Embeddings of augmented tiles: against one tile after the other, what files say, what survives, what is refused."""

import json
import logging
import os
from dataclasses import replace

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import torch
from torch import nn

from gigatome.core.errors import ConfigError, StoreError
from gigatome.core.seeding import generator, torch_seed
from gigatome.embeddings.augmented import SHARING, AugmentedStore
from gigatome.embeddings.extract import embed
from gigatome.embeddings.store import WEIGHTS
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name, load_encoder
from gigatome.selfsup.embed_augmented import GRID, OPTIONS, embed_augmented
from gigatome.selfsup.render import render_views
from gigatome.selfsup.tile_augment import TileAugmentOptions
from gigatome.selfsup.views import draw_view
from gigatome.slides.cohort import Cohort
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import read_grid

DRAWS = {"augmentations": 3, "tiles": 8, "tile_size": 64, "mpp": 0.5, "min_tissue": 0.5, "threads": 2}
ULP = 2e-3  # float16, for embeddings of about 1


def stained(rng, width, height):
    grain = cv2.resize(rng.integers(0, 255, (height // 8, width // 8), np.uint8), (width, height))[..., None] / 255
    return (np.array([200, 120, 180]) - grain * np.array([120, 90, 60])).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three slides and their table; all tiles of ``same`` hold the same pixels."""
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    for name, width, height in (("a", 320, 256), ("b", 256, 320), ("same", 256, 256)):
        image = np.full((512, 512, 3), 245, np.uint8)
        tissue = np.tile(stained(rng, 64, 64), (4, 4, 1)) if name == "same" else stained(rng, width, height)
        image[64 : 64 + height, 64 : 64 + width] = tissue
        tifffile.imwrite(folder / f"{name}.tif", image, tile=(128, 128), photometric="rgb", compression="deflate")
    (folder / "cohort.csv").write_text("slide,mpp\n" + "".join(f"{name}.tif,0.5\n" for name in ("a", "b", "same")))
    return folder


@pytest.fixture(scope="module")
def cohort(slides):
    return Cohort.read(slides / "cohort.csv")


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    config = EncoderConfig(image_size=48, patch_size=16, dim=32, depth=1, heads=2, mean=(0.7, 0.6, 0.5))
    return build_encoder(config, seed=0, name="tiny").eval()


@pytest.fixture(scope="module", params=["shared", "each"])
def made(request, cohort, encoder, tmp_path_factory):
    """The embeddings of all slides, with the tiles of a draw treated alike, or each by itself."""
    out = tmp_path_factory.mktemp(request.param)
    return embed_augmented(cohort, encoder=encoder, out=out, augmentation=request.param, **DRAWS)


@pytest.fixture
def reads(monkeypatch):
    """Slide and place of each tile that was read."""
    seen, whole = [], Slide.read_tile

    def read_tile(self, x, y, *args, **kwargs):
        seen.append((self.name, x, y))
        return whole(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Slide, "read_tile", read_tile)
    return seen


class Colour(nn.Module):
    """The mean colour of a tile, with a ``normalise`` that takes 8-bit images alone."""

    dim = 3

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def normalise(self, images):
        assert images.dtype == torch.uint8
        return images.permute(0, 3, 1, 2).float() / 255

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


def stamps(store):
    return {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.h5")}


def assert_alike(store, other, names):
    for name in names:
        one, two = store.read(name), other.read(name)
        np.testing.assert_array_equal(one.coords, two.coords)
        np.testing.assert_allclose(one.embeddings, two.embeddings, atol=ULP, rtol=ULP)


def one_by_one(entry, grid, encoder, kind):
    """Draw by draw and tile by tile: coordinates [3, 8, 2] and embeddings [3, 8, D]."""
    options, coords, embeddings = TileAugmentOptions().views(), [], []
    with entry.open() as slide, torch.inference_mode():
        for k in range(3):
            tiles = generator(0, "augment", entry.name, k, "tiles").permutation(len(grid))[:8]
            chance = torch.Generator().manual_seed(torch_seed(0, "augment", entry.name, k))
            draw = draw_view(options, 0, 1 if kind == "shared" else 8, 64, 64, chance)
            for slot, (x, y) in enumerate(grid.coords[tiles].tolist()):
                image = torch.from_numpy(slide.read_tile(x, y, 64, 0.5))[None]
                row = slice(0, 1) if kind == "shared" else slice(slot, slot + 1)
                values = {key: value[row] for key, value in vars(draw).items() if key != "order"}
                view = render_views(image, [replace(draw, **values)], [48], native=False)[0]
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.config.mean, encoder.config.std))
                coords.append((x, y))
                embeddings.append(encoder((view - mean) / std)[0].numpy())
    return np.reshape(coords, (3, 8, 2)), np.reshape(embeddings, (3, 8, -1))


def test_one_tile_after_the_other_gives_the_same(made, cohort, encoder):
    grid = read_grid(made.tiles.coords("a"))
    assert len(grid) >= 16
    bag = made.read("a")
    coords, embeddings = one_by_one(cohort.slides[0], grid, encoder, bag.encoding[SHARING])
    np.testing.assert_array_equal(bag.coords, coords)
    np.testing.assert_allclose(bag.embeddings, embeddings, atol=ULP, rtol=ULP)


def test_tiles_of_a_draw_share_their_augmentation_or_do_not(made):
    rows = made.read("same").embeddings.astype(np.float32)
    spread = np.ptp(rows, axis=1).max(1)
    assert (spread < ULP).all() if made.folder.parent.parent.name.startswith("shared") else (spread > 0.05).all()
    assert np.abs(rows[0, 0] - rows[1, 0]).max() > 0.05


def test_what_a_file_holds(made, encoder):
    assert made.failures == ()
    assert made.names() == ["a", "b", "same"]
    assert made.folder.name == f"augmented_{encoder_name(encoder)}"
    grid, bag = read_grid(made.tiles.coords("b")), AugmentedStore.open(made.job).read("b")
    with h5py.File(made.path("b")) as file:
        assert set(file) == {"features", "coords"}
        assert (file["features"].dtype, file["features"].shape) == (np.float16, (3, 8, 32))
        assert (file["coords"].dtype, file["coords"].shape) == (np.int64, (3, 8, 2))
        assert file["features"].chunks is None  # in one piece, to be mapped
        assert file["features"].id.get_offset() is not None
    corners = {tuple(corner) for corner in grid.coords.tolist()}
    assert {tuple(corner) for corner in bag.coords.reshape(-1, 2).tolist()} <= corners
    assert all(len({tuple(corner) for corner in draw.tolist()}) == 8 for draw in bag.coords)
    np.testing.assert_array_equal(bag.cells * 64, bag.coords)
    assert bag.encoder == encoder_name(encoder)
    assert bag.encoding[WEIGHTS] == encoder_digest(encoder)
    assert bag.encoding[SHARING] in ("shared", "each")
    said = json.loads(bag.encoding[OPTIONS])
    assert (said["augmentations"], said["tiles"], said["seed"], said["size"]) == (3, 8, 0, 48)
    assert (said["augmentation"], said["drawing"]) == (bag.encoding[SHARING], "distinct")
    assert (bag.attrs["patch_size"], bag.attrs["target_mpp"], bag.attrs["mpp_level0"]) == (64, 0.5, 0.5)
    assert encoder_digest(load_encoder(made.encoder_folder)) == encoder_digest(encoder)


def test_neither_batches_nor_the_other_slides_matter(made, cohort, encoder, tmp_path):
    kind = made.read("a").encoding[SHARING]
    options = {**DRAWS, "encoder": encoder, "augmentation": kind}
    alone = embed_augmented(cohort.select(["b"]), out=tmp_path / "b", batch_size=5, **options)
    assert_alike(made, alone, ["b"])
    turned = replace(cohort, slides=cohort.slides[::-1])
    assert_alike(made, embed_augmented(turned, out=tmp_path / "c", batch_size=24, **options), made.names())


def test_a_tile_is_read_once(cohort, encoder, tmp_path, reads):
    events = []
    many = {**DRAWS, "augmentations": 12, "batch_size": 7}
    store = embed_augmented(cohort, encoder=encoder, out=tmp_path, progress=lambda *e: events.append(e), **many)
    wanted = [(n, *c) for n in store.names() for c in np.unique(store.read(n).coords.reshape(-1, 2), axis=0).tolist()]
    assert sorted(reads) == sorted(wanted)
    assert [event for event in events if event[0] == "embed"][-1] == ("embed", 3 * 96, 3 * 96)
    reads.clear()
    before = stamps(store)
    embed_augmented(cohort, encoder=encoder, out=tmp_path, **many)
    assert reads == []
    assert stamps(store) == before


def test_an_interruption_changes_nothing(made, cohort, encoder, tmp_path):
    options = {**DRAWS, "augmentation": made.read("a").encoding[SHARING], "batch_size": 4}

    def stop(stage, done, total):
        if stage == "embed" and done >= 32:  # one slide has 24
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_augmented(cohort, encoder=encoder, out=tmp_path, progress=stop, **options)
    store = AugmentedStore.open(tmp_path)
    assert store.names() == ["a"]
    assert {path.suffix for path in store.folder.iterdir()} == {".h5", ""}  # no lock, nothing halved
    before = stamps(store)
    assert embed_augmented(cohort, encoder=encoder, out=tmp_path, **options).failures == ()
    assert stamps(store).items() > before.items()
    assert_alike(made, store, ["a", "b", "same"])


def test_more_draws_begin_with_the_same(made, cohort, encoder, tmp_path):
    kind = made.read("a").encoding[SHARING]
    more = embed_augmented(
        cohort.select(["a"]), encoder=encoder, out=tmp_path, augmentation=kind, **{**DRAWS, "augmentations": 5}
    )
    np.testing.assert_array_equal(more.read("a").coords[:3], made.read("a").coords)
    np.testing.assert_allclose(more.read("a").embeddings[:3], made.read("a").embeddings, atol=ULP, rtol=ULP)


def test_a_slide_with_one_tile(cohort, encoder, tmp_path):
    options = {**DRAWS, "tile_size": 320, "min_tissue": 0.4}
    store = embed_augmented(cohort.select(["a"]), encoder=encoder, out=tmp_path, **options)
    assert len(read_grid(store.tiles.coords("a"))) == 1
    bag = store.read("a")
    assert not bag.coords.any()
    assert np.ptp(bag.embeddings.astype(np.float32), axis=1).max() < ULP


def test_other_encoders(cohort, tmp_path):
    colour = embed_augmented(
        cohort.select(["a"]), encoder=Colour(), out=tmp_path, options=TileAugmentOptions(jitter=0, grayscale=0), **DRAWS
    )
    bag = colour.read("a")
    assert bag.embeddings.shape == (3, 8, 3)
    tissue = np.array([200, 120, 180]) / 255
    assert (bag.embeddings <= tissue + 0.25).all()
    assert (bag.embeddings[..., 1] < bag.embeddings[..., 0]).all()  # more red than green: channels keep their places
    assert not colour.encoder_folder.exists()
    resnet = build_encoder(EncoderConfig(model="resnet18.layer3", image_size=32), seed=0).eval()
    store = embed_augmented(cohort.select(["a"]), encoder=resnet, out=tmp_path, **{**DRAWS, "tiles": 2})
    assert store.read("a").embeddings.shape == (3, 2, 256)


# What is there already


@pytest.fixture
def job(cohort, encoder, tmp_path):
    return embed_augmented(cohort.select(["a"]), encoder=encoder, out=tmp_path, name="tiny", **DRAWS)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"augmentation": "each"}, "augmentation shared, not each"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"augmentations": 2}, "augmentations 3, not 2"),
        ({"tiles": 7}, "tiles 8, not 7"),
        ({"options": TileAugmentOptions(blur=0.4, size=32)}, "blur 0.5, not 0.4, size 48, not 32"),
    ],
)
def test_other_augmentations_are_refused_until_told_to_replace_them(cohort, encoder, job, change, difference):
    options = {**DRAWS, "encoder": encoder, "out": job.job, "name": "tiny", **change}
    before = stamps(job)
    with pytest.raises(StoreError) as error:
        embed_augmented(cohort, **options)
    assert str(error.value) == (
        f"{job.folder}: holds embeddings of other augmentations (slide a: {difference}); give this encoder another "
        "name, or pass overwrite to replace them"
    )
    assert stamps(job) == before
    store = embed_augmented(cohort.select(["a"]), overwrite=True, **options)
    assert stamps(store) != before
    beside = embed_augmented(cohort.select(["a"]), **{**DRAWS, "encoder": encoder, "out": job.job, "name": "other"})
    assert beside.folder != store.folder


def test_the_size_that_the_encoder_is_made_for_may_be_stated(cohort, encoder, job):
    before = stamps(job)
    options = {**DRAWS, "encoder": encoder, "out": job.job, "name": "tiny"}
    embed_augmented(cohort.select(["a"]), options=TileAugmentOptions(size=48), **options)
    assert stamps(job) == before


def test_other_weights_of_one_name_are_refused(cohort, job):
    other = build_encoder(EncoderConfig(image_size=48, patch_size=16, dim=32, depth=1, heads=2), seed=1).eval()
    with pytest.raises(StoreError, match="other weights that are named tiny too"):
        embed_augmented(cohort, encoder=other, out=job.job, name="tiny", **DRAWS)
    embed_augmented(cohort, encoder=other, out=job.job, name="tiny", overwrite=True, **DRAWS)
    assert job.read("a").encoding[WEIGHTS] == encoder_digest(other)


def test_another_grid_is_embedded_again(cohort, encoder, job):
    old = job.read("a")
    options = {**DRAWS, "min_tissue": 0.0}
    store = embed_augmented(cohort.select(["a"]), encoder=encoder, out=job.job, name="tiny", **options)
    assert store.read("a").encoding[GRID] != old.encoding[GRID]


@pytest.mark.parametrize("damage", ["cut", "features", "tiles"])
def test_a_damaged_file_is_embedded_again(cohort, encoder, job, damage, caplog):
    path, old = job.path("a"), job.read("a")
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with h5py.File(path, "a") as file:
            del file["features"]
            if damage == "tiles":
                file["features"] = np.zeros((24, 32), np.float32)
    with caplog.at_level(logging.WARNING):
        embed_augmented(cohort.select(["a"]), encoder=encoder, out=job.job, name="tiny", **DRAWS)
    assert "it is embedded again" in caplog.text
    np.testing.assert_array_equal(job.read("a").embeddings, old.embeddings)


def test_plain_embeddings_lie_beside(cohort, encoder, job):
    tiling = {key: DRAWS[key] for key in ("tile_size", "mpp", "min_tissue", "threads")}
    plain = embed(cohort.select(["a"]), encoder=encoder, out=job.job, name="tiny", **tiling)
    before = stamps(job), stamps(plain)
    embed_augmented(cohort.select(["a"]), encoder=encoder, out=job.job, name="tiny", **DRAWS)
    assert (stamps(job), stamps(plain)) == before


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmentations": 0}, "at least 1, not 0 and 8"),
        ({"tiles": 0}, "at least 1, not 3 and 0"),
        ({"augmentation": "some"}, "no augmentation some; there are shared, each"),
        ({"options": TileAugmentOptions(size=50)}, "50 px do not divide into patches of 16 px; change size"),
        ({"seed": -1}, "seed must not be negative"),
        ({"tile_size": 0}, "tile_size"),
        ({"shard": (2, 2)}, "no shard"),
    ],
)
def test_options_that_are_refused(cohort, encoder, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        embed_augmented(cohort, encoder=encoder, out=tmp_path, **{**DRAWS, **change})
    assert not list(tmp_path.iterdir())


def test_slides_that_cannot_be_embedded_are_left_out(slides, encoder, tmp_path):
    white = np.full((256, 256, 3), 250, np.uint8)
    tifffile.imwrite(tmp_path / "white.tif", white, tile=(128, 128), photometric="rgb")
    whole = (slides / "b.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(whole)
    (tmp_path / "a.tif").write_bytes((slides / "a.tif").read_bytes())
    (tmp_path / "cohort.csv").write_text("slide,mpp\nwhite.tif,0.5\nb.tif,0.5\na.tif,0.5\n")
    options = {**DRAWS, "encoder": encoder, "out": tmp_path / "job"}
    embed_augmented(tmp_path / "cohort.csv", **options).path("b").unlink()
    (tmp_path / "b.tif").write_bytes(whole[: len(whole) // 2])
    store = embed_augmented(tmp_path / "cohort.csv", **options)
    assert {(failure.slide, failure.stage) for failure in store.failures} == {("white", "tissue"), ("b", "embed")}
    assert store.names() == ["a"]
    assert (tmp_path / "job" / "failures.csv").read_text().count("\n") == 3


def test_embeddings_that_float16_does_not_hold(cohort, tmp_path):
    store = embed_augmented(cohort.select(["a"]), encoder=Colour(1e6), out=tmp_path, **DRAWS)
    (failure,) = store.failures
    assert failure.slide == "a"
    assert "24 of 24 embeddings are not finite" in failure.message
    assert store.names() == []

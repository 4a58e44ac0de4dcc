"""Extraction of regions: what is written, of which tiles, and what is refused."""

import json

import h5py
import numpy as np
import pytest
import tifffile
import torch
from small_regions import REGIONS_OF, SIDE, TILES_OF, region_vit, vectors_of

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.core.geometry import Box
from gigatome.core.job import Job
from gigatome.embeddings.extract import embed
from gigatome.embeddings.extract_regions import embed_regions
from gigatome.embeddings.regions import REGIONS, TILES, read_regions
from gigatome.embeddings.store import WEIGHTS
from gigatome.encoders.hipt import encode_regions
from gigatome.encoders.region_zoo import RegionCard, region_weights, save_region_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, encoder_name
from gigatome.slides.cohort import Cohort
from gigatome.slides.slide import Slide
from gigatome.tiles.grid import GridOptions, read_grid, tile_cohort
from gigatome.tiles.regions import RegionOptions, make_regions


def test_grids_hold_the_embeddings_of_the_tile_level(job, cohort, encoder, region_encoder):
    tiles = embed(cohort, encoder=encoder, out=job, **TILES_OF)
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, batch_size=10, **REGIONS_OF)
    assert made.failures == ()
    assert made.grids.names() == made.vectors.names() == ["s0", "s1", "s2", "s3"]
    assert made.grids.folder == job / "20x_256px_0px_overlap" / f"features_{encoder_name(encoder)}"
    assert made.vectors.folder.parent == made.grids.folder.parent
    for name in tiles.names():
        expected, found = tiles.read(name), read_regions(made.grids.path(name))
        regions = make_regions(read_grid(tiles.tiles.coords(name)), REGIONS_OF["regions"])
        np.testing.assert_array_equal(found.mask, regions.mask)
        at = {tuple(corner): row for corner, row in zip(expected.coords, expected.embeddings, strict=True)}
        assert found.mask.any(1).all()
        assert not found.mask.all()
        for region, slot in np.argwhere(found.mask):
            corner = tuple(regions.tile_coords[region, slot])
            np.testing.assert_allclose(found.grids[region, slot], at[corner], atol=2e-6, rtol=0)
        assert not found.grids[~found.mask].any()
        np.testing.assert_allclose(made.vectors.read(name).embeddings, vectors_of(region_encoder, found), atol=1e-5)


def test_what_the_files_say(job, cohort, encoder, region_encoder):
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    grids, vectors = read_regions(made.grids.path("s2")), made.vectors.read("s2")
    np.testing.assert_array_equal(grids.coords, vectors.coords)
    assert (grids.grids.shape[1:], vectors.embeddings.shape[1]) == ((16, 32), 24)
    assert grids.encoding[WEIGHTS] == encoder_digest(encoder)
    assert vectors.encoder == made.vectors.encoder
    assert vectors.encoding[WEIGHTS] == region_weights(region_encoder, encoder_digest(encoder))
    assert made.vectors.encoder == f"region-vit-{vectors.encoding[WEIGHTS][:8]}"
    assert vectors.encoding["tile_encoder"] == encoder_name(encoder)
    assert vectors.encoding["tile_encoder_weights"] == encoder_digest(encoder)
    for attrs in (grids.attrs, vectors.attrs):
        assert (attrs["patch_size"], attrs["target_mpp"], attrs["overlap"], attrs[TILES]) == (256, 0.5, 0, SIDE)
        assert (attrs["region_min_tiles"], attrs["region_background"]) == (2, "mask")
    assert grids.attrs[REGIONS] == vectors.attrs[REGIONS]
    assert made.vectors.slide_vectors()[1].shape == (4, 24)
    config = json.loads((made.grids.tiles.path / f"_config_feats_{made.vectors.encoder}.json").read_text())
    assert (config["tiles"], config["background"], config["dim"], config["tile_size"]) == (SIDE, "mask", 24, 64)
    assert {path.suffix for path in made.grids.folder.iterdir()} == {".h5", ""}  # "" is the copy of the encoder


def test_without_a_region_encoder_only_grids_are_written(job, cohort, encoder):
    made = embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    assert made.vectors is None
    assert [path.name for path in made.grids.tiles.path.glob("features_*")] == [made.grids.folder.name]
    assert made.grids.names() == ["s0", "s1", "s2", "s3"]


def test_half_files(job, cohort, encoder, region_encoder):
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, dtype="float16", **REGIONS_OF)
    found = read_regions(made.grids.path("s0"))
    assert found.grids.dtype == np.float16
    with h5py.File(made.vectors.path("s0")) as file:
        assert file["features"].dtype == np.float16
    np.testing.assert_allclose(made.vectors.read("s0").embeddings, vectors_of(region_encoder, found), atol=5e-3)


def region_pixels(slide, x, y, side, mpp):
    pixels = slide.read(Box(x, y, round(side * mpp / slide.mpp), round(side * mpp / slide.mpp)), mpp=mpp)
    return torch.from_numpy(pixels)[None]


def test_a_whole_region_is_what_the_authors_way_makes_of_its_pixels(slides, tmp_path):
    """Image → normalise → ViT256 by tiles → ViT4096, as against the pipeline, which never holds a region's pixels."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(image_size=64, dim=32, depth=2, heads=2, pos_embed="dino"), seed=0).eval()
    upper = region_vit()
    made = embed_regions(
        slides / "cohort.csv", encoder=encoder, out=tmp_path, region_encoder=upper, tile_size=256, min_tissue=0.05,
        regions=RegionOptions(2, 1, "encode"), batch_size=3,
    )  # fmt: skip
    with Cohort.read(slides / "cohort.csv").slides[2].open() as slide:
        image = region_pixels(slide, 0, 0, 512, 0.5)
        tiles = [slide.read_tile(x, y, 256, 0.5) for y in (0, 256) for x in (0, 256)]
    grids, vectors = encode_regions(encoder, upper, encoder.normalise(image))
    found = read_regions(made.grids.path("s2"))
    assert found.mask[0].all()
    assert found.coords[0].tolist() == [0, 0]
    np.testing.assert_allclose(found.grids[0], grids[0].flatten(0, 1), atol=1e-5)
    np.testing.assert_allclose(made.vectors.read("s2").embeddings[0], vectors[0], atol=1e-5)
    with torch.inference_mode():
        rows = [encoder(encoder.normalise(torch.from_numpy(tile)[None]))[0] for tile in tiles]
        vector = upper(torch.stack(rows).T.reshape(1, 32, 2, 2))
    np.testing.assert_allclose(found.grids[0], torch.stack(rows), atol=1e-5)
    np.testing.assert_allclose(made.vectors.read("s2").embeddings[0], vector[0], atol=1e-5)


def test_places_beyond_the_slide_are_never_seen(slides, encoder, region_encoder, tmp_path):
    cohort = Cohort.read(slides / "cohort.csv").select(["s0"])  # 640 px, 10 tiles: 2 in the last column of regions
    options = {**REGIONS_OF, "regions": RegionOptions(SIDE, 1, "encode"), "min_tissue": 0.01}
    made = embed_regions(cohort, encoder=encoder, out=tmp_path / "a", region_encoder=region_encoder, **options)
    found = read_regions(made.grids.path("s0"))
    inside = found.coords[:, None] + np.stack(np.meshgrid(range(SIDE), range(SIDE)), -1).reshape(-1, 2) * 64
    np.testing.assert_array_equal(found.mask, (inside < 640).all(2))
    assert found.grids[found.mask].any(1).all()
    np.testing.assert_allclose(made.vectors.read("s0").embeddings, vectors_of(region_encoder, found), atol=1e-5)
    masked = {**options, "regions": RegionOptions(SIDE, 1)}
    other = embed_regions(cohort, encoder=encoder, out=tmp_path / "b", region_encoder=region_encoder, **masked)
    less = read_regions(other.grids.path("s0"))
    assert 0 < less.mask.sum() < found.mask.sum()
    assert np.abs(other.vectors.read("s0").embeddings - made.vectors.read("s0").embeddings).max() > 1e-3


def blotch(path, side, box, mpp):
    """A slide with one blotch of stained tissue, of a scanner of any resolution; box in px at 0.5 mpp."""
    image = np.full((side, side, 3), 245, np.uint8)
    x, y, width, height = (round(value * 0.5 / mpp) for value in box)
    rows, columns = np.mgrid[: image[y : y + height, x : x + width].shape[0], : image[y:, x : x + width].shape[1]]
    waves = np.sin(rows * mpp / 7) * np.cos(columns * mpp / 9)  # the same tissue, whatever the pixels
    image[y : y + height, x : x + width] = (
        np.array([170, 90, 150]) + waves[..., None] * np.array([30, 40, 20])
    ).astype(np.uint8)
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", compression="deflate")


@pytest.fixture(scope="module")
def scanners(tmp_path_factory):
    """Slides of 40× and 20×, small and tiny ones between them, and one without tissue."""
    folder = tmp_path_factory.mktemp("scanners")
    box = (64, 64, 448, 384)
    blotch(folder / "b20.tif", 640, box, 0.5)
    blotch(folder / "a40.tif", 1280, box, 0.25)
    blotch(folder / "small.tif", 176, (16, 16, 140, 140), 0.5)  # a region has 256 px
    blotch(folder / "tiny.tif", 50, (2, 2, 46, 46), 0.5)  # a tile has 64 px
    tifffile.imwrite(folder / "white.tif", np.full((512, 512, 3), 245, np.uint8), tile=(128, 128), photometric="rgb")
    lines = ["b20.tif,0.5", "small.tif,0.5", "white.tif,0.5", "a40.tif,0.25", "tiny.tif,0.5"]
    (folder / "cohort.csv").write_text("\n".join(["slide,mpp", *lines]))
    return folder


@pytest.fixture(scope="module")
def mixed(scanners, encoder, region_encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed")
    table = Cohort.read(scanners / "cohort.csv")
    return embed_regions(table, encoder=encoder, out=out, region_encoder=region_encoder, batch_size=7, **REGIONS_OF)


def test_regions_are_as_large_whatever_the_scanner(mixed):
    near, far = (read_regions(mixed.grids.path(name)) for name in ("a40", "b20"))
    np.testing.assert_array_equal(near.coords, 2 * far.coords)
    np.testing.assert_array_equal(near.mask, far.mask)
    assert (near.attrs["patch_size_level0"], far.attrs["patch_size_level0"]) == (512, 256)
    assert near.attrs["patch_size"] == far.attrs["patch_size"] == 256
    gap = np.abs(near.grids - far.grids)[near.mask]
    assert gap.mean() < 0.1 * np.abs(far.grids[far.mask]).mean()  # the same tissue through other pixels


def test_slides_smaller_than_a_region_or_a_tile(mixed):
    small, tiny = (read_regions(mixed.grids.path(name)) for name in ("small", "tiny"))
    for bag in (small, tiny):
        assert bag.coords.tolist() == [[0, 0]]
        assert mixed.vectors.read(bag.name).embeddings.shape == (1, 24)
    assert not small.mask.reshape(SIDE, SIDE)[3].any()
    assert 4 <= small.mask.sum() <= 9
    assert tiny.mask.sum() == 1


def test_a_slide_without_tissue_is_a_failure_and_the_others_go_on(mixed):
    assert mixed.grids.names() == mixed.vectors.names() == ["a40", "b20", "small", "tiny"]
    (failure,) = mixed.failures
    assert (failure.slide, failure.error) == ("white", "NoTissueError")
    assert "white," in (mixed.grids.job / "failures.csv").read_text()


def test_a_slide_that_cannot_be_read_fails_alone(job, cohort, encoder, region_encoder, monkeypatch):
    whole = Slide.read_tile

    def read_tile(self, *args, **kwargs):
        if self.name == "s1":
            raise ZeroDivisionError("the decoder divides by the width of nothing")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Slide, "read_tile", read_tile)
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, **REGIONS_OF)
    assert made.grids.names() == made.vectors.names() == ["s0", "s2", "s3"]
    assert [(failure.slide, failure.stage) for failure in made.failures] == [("s1", "embed")]


def test_region_embeddings_that_are_not_finite_fail_their_slide(job, cohort, encoder):
    upper = region_vit()
    with torch.no_grad():
        upper.norm.bias[0] = float("nan")
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=upper, **REGIONS_OF)
    assert len(made.vectors) == 0
    assert len(made.grids) == len(made.failures) == 4
    assert "embeddings are not finite" in made.failures[0].message


def test_shards_share_the_work(job, cohort, encoder, region_encoder):
    parts = [
        embed_regions(cohort, encoder=encoder, out=job, region_encoder=region_encoder, shard=(i, 3), **REGIONS_OF)
        for i in range(3)
    ]
    assert parts[0].vectors == parts[2].vectors
    assert parts[2].vectors.names() == parts[2].grids.names() == ["s0", "s1", "s2", "s3"]


def test_a_region_encoder_from_its_folder(job, cohort, encoder, region_encoder, tmp_path):
    card = RegionCard(
        "upper", region_encoder.config, "", "", encoder_name(encoder), encoder_digest(encoder), 64, 0.5, SIDE
    )
    save_region_encoder(region_encoder, tmp_path / "upper", card)
    made = embed_regions(cohort, encoder=encoder, out=job, region_encoder=tmp_path / "upper", **REGIONS_OF)
    assert made.vectors.encoder.startswith("upper-")


def test_a_region_encoder_for_other_regions_is_said(job, cohort, encoder, region_encoder, tmp_path, caplog):
    save_region_encoder(region_encoder, tmp_path / "upper", RegionCard("upper", region_encoder.config))
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=tmp_path / "upper", **REGIONS_OF)
    assert "upper: was trained on regions of side 16 × 256 px at 0.5 mpp; these are of 4 × 64 px" in caplog.text


def test_a_region_encoder_for_another_tile_encoder_is_refused(cohort, encoder, region_encoder, tmp_path):
    card = RegionCard("upper", region_encoder.config, tile_encoder="other", tile_weights="0123456789abcdef")
    save_region_encoder(region_encoder, tmp_path / "upper", card)
    with pytest.raises(ConfigError, match=r"upper was trained on those by other \(weights 0123456789abcdef\)"):
        embed_regions(cohort, encoder=encoder, out=tmp_path / "job", region_encoder=tmp_path / "upper", **REGIONS_OF)
    with pytest.raises(ConfigError, match=r"embeddings of 32 numbers by tiny-.*takes 384"):
        embed_regions(cohort, encoder=encoder, out=tmp_path / "job", region_encoder=region_vit(0, 384), **REGIONS_OF)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size and threads must be at least 1"),
        ({"tile_size": 0}, ConfigError, "tile_size"),
        ({"tile_size": 60}, ConfigError, "do not divide into patches of 16"),
        ({"shard": (2, 2)}, ConfigError, "there is no shard 2 of 2"),
        ({"region_name": "a/b"}, ConfigError, "an encoder's name holds"),
        ({"name": "same", "region_name": "same"}, ConfigError, "cannot both be named same"),
        ({"region_encoder": "nowhere"}, StoreError, "no such region encoder"),
    ],
)
def test_options_that_do_not_do(cohort, encoder, region_encoder, tmp_path, options, error, message):
    given = {"region_encoder": region_encoder, **REGIONS_OF, **options}
    with pytest.raises(error, match=message):
        embed_regions(cohort, encoder=encoder, out=tmp_path / "job", **given)
    assert not (tmp_path / "job").exists()


def test_the_encoder_of_tiles_is_no_region_encoder(job, cohort, encoder):
    made = embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    with pytest.raises(RunError, match="is the encoder of tiles, not of regions"):
        embed_regions(cohort, encoder=encoder, out=job, region_encoder=made.grids.encoder_folder, **REGIONS_OF)


def test_tiles_of_another_tool_that_lie_on_no_grid_fail_their_slide(job, cohort, encoder):
    patches = job / "20x_64px_0px_overlap" / "patches" / "s1_patches.h5"
    with h5py.File(patches, "r+") as file:
        file["coords"][0] += 21
        del file["coords"].attrs["tissue_digest"]
    assert tile_cohort(cohort, Job(job), options=GridOptions(64, 0.5, 0, 0.5))[1] == []
    made = embed_regions(cohort, encoder=encoder, out=job, **REGIONS_OF)
    assert made.grids.names() == ["s0", "s2", "s3"]
    assert [(failure.slide, failure.stage) for failure in made.failures] == [("s1", "tiles")]
    assert "remove their file" in made.failures[0].message


def test_the_encoders_are_left_as_they_were(job, cohort, encoder):
    upper = region_vit().train()
    embed_regions(cohort, encoder=encoder, out=job, region_encoder=upper, **REGIONS_OF)
    assert upper.training
    assert not any(parameter.is_inference() for parameter in upper.parameters())

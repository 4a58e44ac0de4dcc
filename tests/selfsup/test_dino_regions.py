"""DINO on regions: views of grids, exact resume, what is exported, and that it learns."""

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError, RunError
from gigatome.embeddings.region_stream import RegionStream
from gigatome.encoders.on_tiles import tile_encoder_of
from gigatome.encoders.region_vit import RegionVitConfig
from gigatome.encoders.region_zoo import RegionCard, open_region_encoder
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.encoders.zoo import encoder_digest, save_encoder
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.dinov2 import Dinov2, Dinov2Options
from gigatome.selfsup.grid_views import GridViewOptions, embed_grids
from gigatome.selfsup.levels import RegionLevel
from gigatome.selfsup.moco import Moco, MocoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.checkpoint import latest_checkpoint
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "embeddings"))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from made_regions import make_store
from tiny_run import ENCODER as TILE_ENCODER
from tiny_run import TinyStream

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RegionVitConfig(input_dim=8, dim=24, depth=2, heads=2, grid=5)
VIEWS = GridViewOptions(global_size=5, local_size=3, local_views=2)
DINO = DinoOptions(views=VIEWS, out_dim=32, head_hidden_dim=24, head_bottleneck_dim=12, drop_path=0.2)
FIT = FitOptions(steps=6, epoch_images=12, batch_size=4, lr=0.05, warmup_steps=2, save_every=2, log_every=1, keep=9)
CLOCK = Clock(step=2, steps=10, epoch_steps=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), (5, 3, 4), absent=0.2)


@pytest.fixture
def grids(store):
    return torch.from_numpy(next(RegionStream(store, batch_size=4).batches()).images)


def make(options=DINO, seed=3):
    return Dino(CONFIG, options, seed=seed, name="tiny")


def views(dino, grids, seed=0):
    torch.manual_seed(seed)
    return dino.views(grids, torch.Generator().manual_seed(seed), CLOCK)


def train(store, out, options=FIT, **arguments):
    dino = make()
    with RegionStream(store, batch_size=options.batch_size) as stream:
        result = fit(dino, stream, options, out, identity="tiny", **arguments)
    return dino, result


def test_student_and_teacher_begin_alike_and_from_the_seed():
    before = torch.get_rng_state()
    one, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    key = "encoder.blocks.0.attn.qkv.weight"
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, one.teacher.state_dict()[name])
        assert torch.equal(value, again.student.state_dict()[name])
    assert not torch.equal(one.student.state_dict()[key], other.student.state_dict()[key])


def test_the_student_sees_the_tiles_that_are_there(grids):
    """A view's logits are those of the region encoder with the mask of the grid before dropout."""
    dino, plain = make().eval(), make(replace(DINO, views=replace(VIEWS, dropout=0.0)))
    dropped, whole = views(dino, grids), views(plain, grids)
    with torch.no_grad():
        logits = dino.student(dropped)
        for view, source, ours in zip(dropped, whole, logits, strict=True):
            present = (source != 0).any(1)
            assert not present.all()
            expected = dino.student.head(dino.student.encoder(view.float(), present))
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            unmasked = dino.student.head(dino.student.encoder(view.float()))
            assert not torch.allclose(ours, unmasked, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(store, tmp_path):
    whole, result = train(store, tmp_path / "whole")
    assert result.finished
    stopped, resumed = tmp_path / "stopped", tmp_path / "resumed"
    train(store, stopped)
    last = latest_checkpoint(stopped / "checkpoints")
    for path in (stopped / "checkpoints").iterdir():
        if path != stopped / "checkpoints" / last.path.name and "2" in path.name:
            (resumed / "checkpoints").mkdir(parents=True)
            path.rename(resumed / "checkpoints" / path.name)
    again, _ = train(store, resumed, resume=True)
    assert json.loads((resumed / "metrics.jsonl").read_text().splitlines()[0])["step"] == 2  # the checkpoint's
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_bfloat16_and_parts_of_a_batch(store, tmp_path):
    _, result = train(store, tmp_path, replace(FIT, precision="bf16", grad_accumulation=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.finished
    assert all(line["skipped"] == 0 and np.isfinite(line["loss"]) and line["tflops"] >= 0 for line in lines)


def test_it_learns_to_tell_regions_apart(tmp_path):
    """The student comes to predict the teacher, and not because the teacher says the same of all regions."""
    store = make_store(tmp_path / "store", (8,), dtype="float32")
    options = replace(
        DINO, views=replace(VIEWS, dropout=0.0), drop_path=0.0, teacher_momentum=0.9, head_batch_norm=True
    )
    dino = make(options)
    rates = {"lr": 4e-3, "lr_scaling": "none", "warmup_steps": 3}
    run = FitOptions(steps=40, batch_size=8, epoch_images=80, log_every=10, **rates)
    with RegionStream(store, batch_size=8) as stream:
        fit(dino, stream, run, tmp_path / "run")
        whole = torch.from_numpy(next(stream.batches()).images).movedim(-1, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < 0.4 * lines[0]["kl"]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    with torch.no_grad():
        answers = dino.teacher([whole])[0]
    assert len((answers - dino.center).argmax(-1).unique()) >= 3


def test_export_writes_the_teacher_and_the_tile_encoder(grids, tmp_path):
    tile = build_encoder(EncoderConfig(image_size=32, patch_size=8, dim=8, depth=1, heads=2), seed=0, name="tile")
    save_encoder(tile, tmp_path / "tile")
    card = RegionCard("tiny", CONFIG, tile_encoder="tile", tile_weights=encoder_digest(tile), tile_size=128, mpp=1.0)
    dino = Dino(RegionLevel(card, tmp_path / "tile"), DINO, seed=1).eval()
    with torch.no_grad():
        for parameter in dino.teacher.parameters():
            parameter.mul_(1.1)
    dino.export(tmp_path / "encoder")
    encoder, found = open_region_encoder(tmp_path / "encoder")
    assert found == replace(card, source="gigatome, DINO")
    whole = grids.movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(embed_grids(encoder, whole), embed_grids(dino.teacher.encoder, whole))
        assert not torch.equal(embed_grids(encoder, whole), embed_grids(dino.student.encoder, whole))
    assert encoder_digest(tile_encoder_of(tmp_path / "encoder")) == card.tile_weights
    Dino(RegionLevel(card), DINO).export(tmp_path / "alone")
    assert tile_encoder_of(tmp_path / "alone") is None


def test_what_does_not_fit_is_refused(store, grids):
    tiles = next(TinyStream().batches()).images
    generator = torch.Generator()
    with pytest.raises(RunError, match=r"learns from regions, float \[B, ≥ 5, ≥ 5, 8\], .* uint8 \[4, 40, 40, 3\]"):
        make().views(torch.from_numpy(tiles), generator, CLOCK)
    with pytest.raises(RunError, match=r"stream gives float16 \[4, 4, 6, 8\]"):
        make().views(grids[:, :4], generator, CLOCK)
    small = ViewOptions(global_size=32, local_size=16)
    for method in (
        Dino(TILE_ENCODER, DinoOptions(views=small, out_dim=8)),
        Dinov2(TILE_ENCODER, Dinov2Options(views=small, out_dim=8)),
        Moco(TILE_ENCODER, MocoOptions(views=replace(small, local_views=0), queue=8)),
    ):
        with pytest.raises(RunError, match=r"learns from tiles, uint8 .* gives float16 \[4, 6, 6, 8\]"):
            method.views(grids, generator, CLOCK)
    with pytest.raises(ConfigError, match="views of regions are made as GridViewOptions say, not ViewOptions"):
        Dino(CONFIG, DinoOptions(views=small))
    with pytest.raises(ConfigError, match="views of tiles are made as ViewOptions say, not GridViewOptions"):
        Dino(TILE_ENCODER, DINO)
    with pytest.raises(ConfigError, match=r"views\.global_size 17 is larger than a region of 16 × 16 tiles"):
        make(replace(DINO, views=replace(VIEWS, global_size=17)))


def test_probe_regions_leave_the_stream_as_it_was(store):
    """Batches beyond the run's last are drawn without moving those of the run."""
    stream = RegionStream(store, batch_size=4)
    first = next(stream.batches()).regions
    list(islice(stream.batches(90), 3))
    assert np.array_equal(next(stream.batches()).regions, first)

"""DINO on regions of pixels, with a LongViT."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.longvit import LongVitConfig
from gigatome.encoders.longvit_zoo import LongVitCard, open_longvit
from gigatome.selfsup.dino import Dino
from gigatome.selfsup.grid_views import GridViewOptions
from gigatome.selfsup.levels import PixelLevel
from gigatome.selfsup.views import multi_crop
from gigatome.training.loop import fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from tiny_run import DINO, FIT, TinyStream

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LongVitConfig(
    image_size=32, patch_size=8, dim=24, depth=2, heads=4, ffn_dim=48, grid=4, segments=(4, 16), ratios=(1, 2),
    pos_embed="dino",
)  # fmt: skip
CLOCK = Clock(step=2, steps=10, epoch_steps=2)


def make(checkpointing="none", options=DINO):
    return Dino(PixelLevel(LongVitCard("tiny", CONFIG, mpp=(0.5,)), checkpointing), options, seed=3)


def train(out, options=FIT, checkpointing="none", **arguments):
    dino = make(checkpointing)
    result = fit(dino, TinyStream(), options, out, identity="tiny", **arguments)
    assert result.finished
    return dino


def images():
    return torch.from_numpy(next(iter(TinyStream().batches())).images)


def assert_same(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_student_and_teacher_begin_alike_and_from_the_seed():
    before = torch.get_rng_state()
    one, other = make(), Dino(CONFIG, DINO, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, one.teacher.state_dict()[name])
    assert_same(one, Dino(CONFIG, DINO, seed=3))
    assert not torch.equal(one.student.encoder.pos_embed, other.student.encoder.pos_embed)


def test_views_are_normalised_crops_that_the_longvit_sees():
    dino = make().eval()
    views = dino.views(images(), torch.Generator().manual_seed(0), CLOCK)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    plain = multi_crop(images(), DINO.views, torch.Generator().manual_seed(0), mean, std)
    assert [view.shape[-1] for view in views] == [32, 32, 16, 16]
    assert all(map(torch.equal, views, plain))
    with torch.no_grad():
        logits = dino.student(views)
        for view, ours in zip(views, logits, strict=True):
            torch.testing.assert_close(ours, dino.student.head(dino.student.encoder(view)))


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", replace(FIT, keep=9))
    resumed = tmp_path / "resumed" / "checkpoints"
    resumed.mkdir(parents=True)
    first = min((tmp_path / "stopped" / "checkpoints").iterdir())
    first.rename(resumed / first.name)
    again = train(tmp_path / "resumed", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 8]  # that of the checkpoint is made up
    assert_same(whole, again)


def test_bfloat16_and_parts_of_a_batch(tmp_path):
    train(tmp_path, replace(FIT, precision="bf16", grad_accumulation=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["skipped"] == 0 and np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("checkpointing", ["selective", "block"])
def test_checkpointing_changes_nothing_but_memory(tmp_path, checkpointing):
    steps = replace(FIT, steps=3)
    plain, kept_less = train(tmp_path / "none", steps), train(tmp_path / "less", steps, checkpointing)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(kept_less.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_it_learns(tmp_path):
    """The student comes to predict the teacher, and not because the teacher says the same of all regions."""
    options = replace(DINO, drop_path=0.0, teacher_momentum=0.9, head_batch_norm=True)
    dino = make(options=options)
    run = replace(FIT, steps=40, epoch_images=40, lr=4e-3, lr_scaling="none", warmup_steps=3, log_every=20)
    fit(dino, TinyStream(), run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < 0.6 * lines[0]["kl"]
    with torch.no_grad():
        vectors = dino.teacher.encoder(images()[:, :32, :32].contiguous())
    assert vectors.std(0).max() > 1e-2


def test_export_writes_the_teacher(tmp_path):
    dino = make().eval()
    with torch.no_grad():
        for parameter in dino.teacher.parameters():
            parameter.mul_(1.1)
    dino.export(tmp_path)
    encoder, card = open_longvit(tmp_path)
    assert card == LongVitCard("tiny", CONFIG, "gigatome, DINO", mpp=(0.5,))
    with torch.no_grad():
        assert torch.equal(encoder(images()), dino.teacher.encoder(images()))
        assert not torch.equal(encoder(images()), dino.student.encoder(images()))


def test_what_does_not_fit_is_refused():
    for size in ({"global_size": 36}, {"local_size": 12}):
        with pytest.raises(ConfigError, match=r"views of \d+ px do not divide into patches of 8 px; change views"):
            make(options=replace(DINO, views=replace(DINO.views, **size)))
    with pytest.raises(ConfigError, match="views of tiles are made as ViewOptions say, not GridViewOptions"):
        make(options=replace(DINO, views=GridViewOptions()))
    with pytest.raises(RunError, match=r"learns from tiles, uint8 .* gives float32 \[4, 6, 6, 8\]"):
        make().views(torch.zeros(4, 6, 6, 8), torch.Generator(), CLOCK)

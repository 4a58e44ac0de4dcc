"""Watching an encoder while it learns."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from gigatome.core.errors import EvaluationError
from gigatome.core.seeding import generator
from gigatome.encoders.vit import EncoderConfig, build_encoder
from gigatome.evaluation.collapse import CollapseLimits
from gigatome.evaluation.unsupervised import embedding_std, odcorr, rankme
from gigatome.recipes.watch import Watch, WatchOptions
from gigatome.selfsup.dino import Dino, DinoOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.loop import FitOptions, fit

ENCODER = EncoderConfig(image_size=16, patch_size=8, dim=16, depth=1, heads=2)
VIEWS = ViewOptions(global_size=16, local_size=8, local_views=1)
DINO = DinoOptions(views=VIEWS, out_dim=24, head_hidden_dim=16, head_bottleneck_dim=8, drop_path=0.2)
FIGURES = ("rankme", "odcorr", "std", "unit_std")


class Stream:
    """Noise of a seed, 20 × 20 px; a rank gets its consecutive part of each batch of 4."""

    def __init__(self, rank=0, world=1):
        self.rank, self.share, self.asked = rank, 4 // world, []

    def batches(self, start_step=0):
        self.asked.append(start_step)
        step = start_step
        while True:
            images = generator(1, "stream", step).integers(0, 256, (4, 20, 20, 3), np.uint8)
            yield SimpleNamespace(images=images[self.rank * self.share :][: self.share])
            step += 1

    def state(self):
        return {}

    def restore(self, state):
        pass


@pytest.fixture
def encoder():
    return build_encoder(ENCODER, seed=0).train()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def labelled(tmp_path):
    """Bright and dark tiles, of which any encoder can tell which is which."""
    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "labelled" / ("bright" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 60, (20, 20, 3)) + 190 * (number % 2)
        cv2.imwrite(str(folder / f"{number}.png"), image.astype(np.uint8))
    return str(tmp_path / "labelled")


def test_figures_are_those_of_tiles_beyond_the_run(encoder, tmp_path):
    stream = Stream()
    watch = Watch(encoder, stream, WatchOptions(tiles=10, batch_size=3), tmp_path, steps=5)
    assert stream.asked == [5]
    tiles = np.concatenate([generator(1, "stream", k).integers(0, 256, (4, 20, 20, 3), np.uint8) for k in (5, 6, 7)])
    middle = torch.from_numpy(tiles[:10, 2:18, 2:18].copy())
    with torch.no_grad():
        z = encoder.eval()(encoder.normalise(middle)).numpy()
    encoder.train()
    found = watch(1)
    expected = (rankme(z), odcorr(z), embedding_std(z), embedding_std(z, unit=True))
    assert [found[name] for name in FIGURES] == pytest.approx(expected, rel=1e-5)
    assert found == watch(2)
    assert stream.asked == [5]


def test_labelled_tiles_are_told_apart(encoder, labelled, tmp_path):
    found = Watch(encoder, Stream(), WatchOptions(tiles=0, labelled=labelled, neighbours=3), tmp_path, steps=5)(1)
    assert found == {"knn": 1.0, "linear": 1.0}


def test_the_encoder_is_left_as_it_was(encoder, tmp_path):
    encoder.vit.norm.eval()
    modes = [module.training for module in encoder.modules()]
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    Watch(encoder, Stream(), WatchOptions(tiles=4), tmp_path, steps=5)(1)
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not any(parameter.is_inference() for parameter in encoder.parameters())


def train(out, watched, steps=4, **arguments):
    method, stream = Dino(ENCODER, DINO, seed=1), Stream()
    options = FitOptions(steps=steps, batch_size=4, lr=0.01, save_every=2, log_every=1, evaluate_every=2)
    hook = Watch(method.teacher.encoder, stream, WatchOptions(tiles=8), out, steps=steps) if watched else None
    fit(method, stream, options, out, evaluate=hook, **arguments)
    return method.state_dict()


def test_a_run_learns_the_same_when_it_is_watched(tmp_path):
    watched, alone = train(tmp_path / "a", True), train(tmp_path / "b", False)
    assert all(torch.equal(watched[key], alone[key]) for key in alone)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert ["rankme" in line for line in lines] == [False, True, False, True]
    assert all(np.isfinite(lines[1][name]) for name in FIGURES)


def test_a_collapse_is_told(encoder, tmp_path, caplog):
    with torch.no_grad():
        encoder.vit.norm.weight.mul_(1e-6)  # what is left is the norm's bias
        encoder.vit.norm.bias.copy_(torch.linspace(-1, 1, 16))
    out = tmp_path / "run"
    out.mkdir()
    options = WatchOptions(tiles=8, limits=CollapseLimits(repeats=2))
    with caplog.at_level(logging.WARNING, logger="gigatome"):
        first = Watch(encoder, Stream(), options, out, steps=20)(10)
        assert "alarm" not in first
        (out / "metrics.jsonl").write_text(json.dumps({"step": 10, **first}) + "\n")
        again = Watch(encoder, Stream(), options, out, steps=20)(15)  # the run was resumed in between
    assert "All tiles get nearly the same embedding" in again["alarm"]
    assert again["alarm"] in caplog.text
    assert "step 15" in caplog.text


def test_embeddings_without_figures_do_not_end_the_run(encoder, labelled, tmp_path):
    with torch.no_grad():
        encoder.vit.norm.bias.fill_(torch.nan)
    found = Watch(encoder, Stream(), WatchOptions(tiles=8, labelled=labelled), tmp_path, steps=2)(1)
    assert [found[name] for name in (*FIGURES, "knn", "linear")] == [None] * 6
    assert "zero or not finite" in found["alarm"]


def test_sinks_are_made_and_ended(encoder, tmp_path):
    pytest.importorskip("tensorboard")
    with Watch(encoder, Stream(), WatchOptions(tiles=0, tensorboard=True), tmp_path, steps=2) as watch:
        watch.sinks[0].begin(0)
        watch.sinks[0].write({"step": 1, "loss": 2.0})
    assert list((tmp_path / "tensorboard").iterdir())


def test_labelled_tiles_that_are_missing_end_the_run_before_it_starts(encoder, tmp_path):
    with pytest.raises(EvaluationError, match="there is no such folder"):
        Watch(encoder, Stream(), WatchOptions(labelled=str(tmp_path / "nowhere")), tmp_path, steps=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tiles": 1}, "at least 2"), ({"tiles": -1}, "at least 2"), ({"batch_size": 0}, "at least 1")],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        WatchOptions(**options)


@pytest.mark.slow
def test_two_processes_find_what_one_does(encoder, labelled, tmp_path):
    options = WatchOptions(tiles=8, labelled=labelled, labelled_limit=13)
    alone = Watch(encoder, Stream(), options, tmp_path, steps=3)(1)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), labelled, str(tmp_path)],
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    found = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert found[0] == pytest.approx(alone, rel=1e-4)
    assert found[1] == pytest.approx(alone, rel=1e-4)


def _one_of_two(rank: int, labelled: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = WatchOptions(tiles=8, labelled=labelled, labelled_limit=13)
    watch = Watch(build_encoder(ENCODER, seed=0), Stream(rank, 2), options, folder, steps=3)
    print(json.dumps(watch(1)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _one_of_two(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

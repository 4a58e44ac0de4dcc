"""SimCLR learns from slides, and from tiles, and its encoder is kept."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.embeddings.augmented_stream import AugmentedStream, AugmentedStreamOptions
from gigatome.encoders.giga import GigaConfig
from gigatome.encoders.slide_zoo import SlideCard, open_slide_encoder
from gigatome.encoders.zoo import load_encoder
from gigatome.selfsup.contrastive import ntxent
from gigatome.selfsup.levels import SlideLevel
from gigatome.selfsup.simclr import Simclr, SimclrOptions
from gigatome.selfsup.views import ViewOptions
from gigatome.training.loop import FitOptions, fit
from gigatome.training.schedules import Clock

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1] / "embeddings"))
from made_augmented import made_bag, made_store
from tiny_run import ENCODER, TinyStream, digest

CLOCK = Clock(step=2, steps=10, epoch_steps=2)
CONFIGS = {
    "sparse_conv": GigaConfig(input_dim=4),
    "mlp": GigaConfig(pooling="mlp", input_dim=4, dim=16),
    "transformer": GigaConfig(pooling="transformer", input_dim=4, dim=16, heads=2),
}
OPTIONS = SimclrOptions(projector=(16, 8), temperature=0.2)
FIT = FitOptions(
    steps=6, epoch_images=8, batch_size=4, lr=0.01, lr_scaling="none", optimizer="adam", weight_decay=0.0,
    weight_decay_end=0.0, clip=None, save_every=2, log_every=1,
)  # fmt: skip


def make(config: str = "mlp", options: SimclrOptions = OPTIONS, seed: int = 3) -> Simclr:
    return Simclr(SlideLevel(SlideCard("tiny", CONFIGS[config], tiles=5)), options, seed=seed)


def images(slides: int = 8) -> torch.Tensor:
    """Slides that differ; the tiles of the two views of one are alike."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(slides, 1, 1, 4, generator=generator) + 0.3 * torch.randn(slides, 2, 5, 4, generator=generator)
    return torch.cat([values, torch.randint(30, (slides, 2, 5, 2), generator=generator).float()], -1)


def views(part: slice = slice(None)) -> list[torch.Tensor]:
    made = make().views(images(), torch.Generator().manual_seed(0), CLOCK)
    return [view[part] for view in made]


def results(part: slice) -> dict[str, torch.Tensor]:
    """What a process computes of its part of the batch."""
    found = {}
    for name in CONFIGS:
        simclr = make(name)
        loss, facts = simclr.loss(views(part), CLOCK)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in simclr.parameters()])
        found |= {f"{name}.loss": loss.detach(), f"{name}.grad": gradients, f"{name}.accuracy": facts["accuracy"]}
        buffers = {key: value for key, value in simclr.state_dict().items() if "running" in key}
        found |= {f"{name}.state.{key}": value for key, value in buffers.items()}
    return found


def run(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Weights after two steps on made slides; those of ``mlp`` do not depend on how the maps are turned."""
    slides = made_store(folder / f"job {world_size} {rank}", [made_bag(number) for number in range(8)])
    options = AugmentedStreamOptions(tiles=5)
    made = AugmentedStream(slides, options, batch_size=4, rank=rank, world_size=world_size)
    rates = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "save_every": 1}  # Adam makes much of little gradients
    simclr = make()
    fit(simclr, made, replace(FIT, **rates), folder / f"run {world_size}")
    return {f"run.{key}": value for key, value in simclr.state_dict().items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    children = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_get_what_one_gets_from_the_whole_batch(ranks):
    """Even where their maps have other numbers of cells, which share the statistics of batch norms."""
    whole = results(slice(None))
    for key, expected in whole.items():
        found = (ranks[0][key] + ranks[1][key]) / 2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * max(1e-2, float(expected.abs().max())))
        if not key.endswith("grad"):
            torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=1e-5, atol=1e-6)


def test_a_run_of_two_processes_ends_as_that_of_one(ranks, tmp_path):
    for key, expected in run(tmp_path).items():
        torch.testing.assert_close(ranks[0][key], expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(ranks[0][key], ranks[1][key])


def test_local_statistics_are_those_of_a_process(ranks):
    assert not torch.allclose(ranks[0]["local"], ranks[1]["local"], atol=1e-4)


def test_the_loss_is_nt_xent_of_the_projections():
    simclr = make().eval()
    loss, facts = simclr.loss(views(), CLOCK)
    first, second = simclr.student(views()).chunk(2)
    torch.testing.assert_close(loss, ntxent(first, second, 0.2))
    similar = torch.cosine_similarity(first[:, None], torch.cat([first, second])[None], dim=-1)
    nearest = similar.masked_fill(torch.eye(8, 16, dtype=torch.bool), -2).argmax(1) == torch.arange(8, 16)
    assert 0 <= float(facts["accuracy"]) <= 1
    back = torch.cosine_similarity(second[:, None], torch.cat([second, first])[None], dim=-1)
    nearest_back = back.masked_fill(torch.eye(8, 16, dtype=torch.bool), -2).argmax(1) == torch.arange(8, 16)
    assert float(facts["accuracy"]) == pytest.approx(float(torch.cat([nearest, nearest_back]).float().mean()))


def test_the_projector_is_the_authors():
    simclr = Simclr(SlideLevel(SlideCard("paper", GigaConfig())))
    kinds = [type(module).__name__ for module in simclr.student.projector]
    assert kinds == ["Linear", "ReLU", "SharedBatchNorm", "Linear", "ReLU", "SharedBatchNorm", "Linear"]
    assert sum(p.numel() for p in simclr.student.projector.parameters()) == 658_688
    assert sum(p.numel() for p in simclr.student.encoder.parameters()) == 8_393_728
    assert simclr.options.temperature == 0.05


def test_a_collapse_shows():
    simclr = make()
    _, facts = simclr.loss(views(), CLOCK)
    assert facts["spread"] > 0.3
    last = next(module for module in reversed(simclr.student.projector) if isinstance(module, nn.Linear))
    nn.init.zeros_(last.weight)
    _, facts = simclr.loss(views(), CLOCK)
    assert facts["spread"] < 1e-3


@pytest.fixture
def slides(tmp_path):
    return made_store(tmp_path / "job", [made_bag(number) for number in range(8)])


def stream(slides, resident="mapped"):
    return AugmentedStream(slides, AugmentedStreamOptions(tiles=5, resident=resident), batch_size=4, seed=1)


@pytest.mark.parametrize("resident", ["mapped", "device"])
def test_a_run_that_is_stopped_ends_as_one_that_is_not(slides, tmp_path, resident):
    whole, stopped, parts = make(), make(), make()
    fit(whole, stream(slides, "device"), FIT, tmp_path / "whole", identity="tiny")

    def stop(stage, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stopped, stream(slides, resident), FIT, tmp_path / "parts", identity="tiny", progress=stop)
    fit(parts, stream(slides, resident), FIT, tmp_path / "parts", identity="tiny", resume=True)
    assert digest(parts.state_dict()) == digest(whole.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"accuracy", "spread"} < lines[0].keys()


def test_what_is_exported_embeds_as_what_was_trained(slides, tmp_path):
    simclr = make("sparse_conv")
    fit(simclr, stream(slides), replace(FIT, steps=2), tmp_path / "run", identity="tiny")
    encoder, card = open_slide_encoder(tmp_path / "run")
    assert (card.source, card.tiles, card.config) == ("gigatome, SimCLR", 5, CONFIGS["sparse_conv"])
    view = views()[0]
    own = simclr.level.embed(simclr.student.encoder.eval(), view)
    assert torch.equal(simclr.level.embed(encoder, view), own)
    assert own.shape == (8, 512)


def test_the_loss_falls(slides, tmp_path):
    options = replace(FIT, steps=60, batch_size=8, log_every=10, save_every=60)
    made = AugmentedStream(slides, AugmentedStreamOptions(tiles=6), batch_size=8)
    fit(make(), made, options, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]


def test_tiles():
    two = ViewOptions(global_size=32, local_views=0)
    simclr = Simclr(ENCODER, replace(OPTIONS, views=two), name="tiny", mpp=(0.5,))
    batch = torch.from_numpy(next(TinyStream().batches()).images)
    loss, _ = simclr.loss(simclr.views(batch, torch.Generator().manual_seed(0), CLOCK), CLOCK)
    loss.backward()
    assert all(p.grad is not None for p in simclr.student.projector.parameters())


def test_a_tile_encoder_is_kept(tmp_path):
    simclr = Simclr(ENCODER, replace(OPTIONS, views=ViewOptions(global_size=32, local_views=0)), name="tiny")
    simclr.export(tmp_path / "encoder")
    assert load_encoder(tmp_path / "encoder").dim == ENCODER.dim


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="views of slides are made as SlideViewOptions say, not ViewOptions"):
        make(options=replace(OPTIONS, views=ViewOptions(local_views=0)))
    with pytest.raises(ConfigError, match="views of tiles are made as ViewOptions say"):
        Simclr(ENCODER, OPTIONS)
    with pytest.raises(RunError, match=r"float32 \[B, 2, T, 4 \+ 2\], and its stream gives uint8 \[4, 40, 40, 3\]"):
        make().views(torch.zeros(4, 40, 40, 3, dtype=torch.uint8), torch.Generator(), CLOCK)
    with pytest.raises(ConfigError, match="make it 2 or more"):
        make().loss(views(slice(1)), CLOCK)
    with pytest.raises(ValueError, match="temperature must be positive"):
        SimclrOptions(temperature=0)
    with pytest.raises(ValueError, match="projector needs at least one width"):
        SimclrOptions(projector=())
    with pytest.raises(ValueError, match="local_views must be 0"):
        SimclrOptions(views=ViewOptions())


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    part = slice(number * 4, number * 4 + 4)
    found = results(part)
    local = make(options=replace(OPTIONS, batch_norm="local"))
    local.loss(views(part), CLOCK)
    found["local"] = torch.cat([value.flatten() for key, value in local.state_dict().items() if "running_mean" in key])
    torch.save(found | run(folder, number, 2), folder / f"{number}.pt")
    dist.destroy_process_group()

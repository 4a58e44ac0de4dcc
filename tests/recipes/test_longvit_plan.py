"""What a step of LongViT takes in fine-tuning, how long a step takes, and what is said when memory lacks."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.longvit import LongVit
from gigatome.recipes import longvit_plan
from gigatome.recipes.finetune_schema import load_finetune
from gigatome.recipes.longvit_plan import (
    finetune_advice,
    finetune_text,
    plan_finetune,
    plan_step,
    plan_text,
    step_advice,
)
from gigatome.recipes.schema import load_recipe
from gigatome.training.memory import explained_memory

CPU = torch.device("cpu")
LARGE = "longvit/table3_brca_32768"
SMALL = [
    "images.image_size=48", "encoder.patch_size=4", "encoder.grid=5", "encoder.dim=24", "encoder.depth=2",
    "encoder.heads=4", "encoder.ffn_dim=48", "encoder.segments=[8, 40, 144]", "encoder.ratios=[1, 2, 4]",
    "fit.precision=fp32", "fit.device=cpu", "fit.batch_size=8", "at_once=2",
]  # fmt: skip


def recipe(*changes, name=LARGE):
    return load_finetune(name, ["weights=null", "fit.device=cpu", *changes])


@pytest.fixture
def rate(monkeypatch):
    """A device of 2 TFLOP/s."""
    monkeypatch.setattr(longvit_plan, "measured_flops", lambda device, precision: 2e12)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_arithmetic_and_weights_of_fine_tuning_are_what_is_counted(checkpointing):
    made = recipe(*SMALL, f"checkpointing={checkpointing}")
    plan = plan_finetune(made, 1)
    model = LongVit(made.encoder, checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 48, 48, 3, dtype=torch.uint8)).sum().backward()
    assert plan.parts == 4
    assert plan.flops == 4 * counter.get_total_flops()
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "fc_norm" not in name)
    assert plan.encoder.parameter_bytes + plan.encoder.optimizer_bytes + plan.patch_bytes == 16 * weights
    assert plan.pixel_bytes * plan.parts == 8 * 48 * 48 * 3
    assert plan.host_memory == 2 * 8 * 48 * 48 * 3


def test_processes_share_slides_and_the_batch():
    one, shared = plan_finetune(recipe(*SMALL), 1), plan_finetune(recipe(*SMALL, "processes=2"), 4)
    assert (shared.sequences, shared.parts, shared.encoder.batch) == (2, 2, 2)
    assert shared.encoder.tokens_per_rank * 2 == shared.encoder.tokens == 144
    assert shared.flops == pytest.approx(one.flops / 4, rel=0.03)
    assert shared.host_memory * 4 == one.host_memory
    assert shared.pixel_bytes * 2 == one.pixel_bytes
    weights = (one.patch_bytes + one.encoder.parameter_bytes + one.encoder.optimizer_bytes) // 4  # 16 bytes, 4 of each
    gradients = 2 * 3 * weights // 4
    keys = shared.communication_bytes - gradients
    assert 0 < keys < shared.parts * shared.encoder.communication_bytes
    assert one.communication_bytes == 0
    uneven = plan_finetune(recipe(*SMALL, "processes=5"), 5)
    assert uneven.encoder.tokens_per_rank == 3 * 12  # whole rows of patches


def test_what_cannot_be_planned():
    with pytest.raises(ConfigError, match=r"table3_brca_32768: 3 processes are no multiple of the 2 of a slide"):
        plan_finetune(recipe("processes=2"), 3)
    with pytest.raises(ConfigError, match="12 rows or tokens cannot be shared by 16 processes"):
        plan_finetune(recipe(*SMALL, "processes=16"), 16)
    with pytest.raises(ConfigError, match=r"fit\.batch_size 8 must be a multiple of 3 slides side by side"):
        plan_finetune(recipe(*SMALL), 3)


def test_a_plan_of_fine_tuning_in_words(rate):
    made = recipe("processes=2", "checkpointing=selective", "fit.batch_size=8")
    plan, lines = plan_finetune(made, 8), finetune_text(made, 8).splitlines()
    assert lines[0] == "batch of 8 slides of 32,768 px: 4 × 2 processes, 2 × 1 slides in each"
    assert lines[1] == "1 at a time:"
    assert lines[2] == "tokens       1,048,576 × 1, 524,288 on each of 2 processes"
    assert lines[3] == 'computed in  bf16, checkpointing "selective"'
    assert lines[-2].startswith("in all, with patches and pixels: 4")
    assert f"{plan.flops / 1e12:,.4g} TFLOP" in lines[-1]
    assert f"{plan.flops / 2e12:,.3g} s at least: at 2 TFLOP/s, which cpu reaches here" in lines[-1]
    assert finetune_text(made, 1).startswith("batch of 8 slides of 32,768 px: 1 × 2 processes")


def test_a_device_that_is_not_here_is_not_measured():
    made = recipe("fit.device=cuda") if not torch.cuda.is_available() else recipe("fit.device=mps")
    assert finetune_text(made, 8).endswith("here to say how long that takes")


def test_what_makes_fine_tuning_fit(rate):
    made = recipe("checkpointing=none", "fit.batch_size=8", "processes=1", "at_once=1")
    assert finetune_text(made, 8, "400GB").endswith("fits into 400 GB")
    for memory, change in (
        ("100GB", "processes=1 --set at_once=1 --set checkpointing=selective"),
        ("30GB", "processes=2 --set at_once=1 --set checkpointing=block"),
        ("9GB", "processes=16 --set at_once=1 --set checkpointing=block, and start 16 processes"),
    ):
        said = finetune_text(made, 8, memory).splitlines()[-1]
        assert said.startswith(f"does not fit into {memory[:-2]} GB; ")
        assert said.endswith(f" would do: --set {change}")
        sets = [part.split(",")[0] for part in said.split("--set ")[1:]]
        fits = plan_finetune(recipe("fit.batch_size=16", *map(str.strip, sets)), 16)  # as many slides in each
        assert fits.memory <= float(memory[:-2]) * 1e9
    two = recipe("checkpointing=none", "at_once=2", "fit.batch_size=16")
    assert "--set at_once=1 --set checkpointing=selective" in finetune_text(two, 8, "100GB")


def test_what_nothing_makes_fit(rate):
    with pytest.raises(ConfigError, match=r"pixels, and weights for patches and positions, take 3\.25 GB of 3 GB"):
        finetune_text(recipe("fit.batch_size=8"), 1, "3GB")
    with pytest.raises(ConfigError, match=r"1,048,576 tokens do not fit into .* on any of up to 64 processes"):
        finetune_text(recipe("fit.batch_size=8"), 8, "3.5GB")


def test_lack_of_memory_is_answered_by_a_plan_that_is_smaller(monkeypatch):
    """Fine-tuning, and pretraining, of which another part of the batch fits."""
    monkeypatch.setattr(longvit_plan, "total_memory", lambda device: 80 * 10**9)
    made = recipe("checkpointing=selective", "fit.batch_size=1", "at_once=1")
    needed = plan_finetune(made, 1).memory
    with pytest.raises(RunError) as caught, explained_memory(lambda: finetune_advice(made, CPU)):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    said = str(caught.value)
    assert said.startswith("out of memory (CUDA out of memory); a step takes about 80.2 GB in each")
    assert "and cpu has 80 GB; 44 GB would do: " in said
    assert said.endswith("--set processes=1 --set at_once=1 --set checkpointing=block")
    assert plan_finetune(replace(made, checkpointing="block"), 1).memory < 0.75 * needed

    pixels = load_recipe("longvit/pretrain_1024", ["fit.grad_accumulation=4"])
    said = step_advice(pixels, 4, CPU)
    plan = plan_step(pixels, 16)
    assert said.startswith(f"{plan.images} images at a time take about ")
    assert f"and cpu has 80 GB; {plan.images} images at a time with checkpointing " in said
    assert "make processes × fit.grad_accumulation 16, and --set checkpointing=" in said


def test_a_step_of_pretraining_says_how_long_it_takes(rate):
    made = load_recipe("longvit/pretrain_1024", ["fit.grad_accumulation=4", "fit.device=cpu"])
    plan = plan_step(made, 64)
    views = plan.views["global"], plan.views["local"]
    teacher = views[0].forward_flops
    assert plan.flops == teacher + sum(view.forward_flops + view.backward_flops for view in views)
    said = plan_text(made, 16)
    assert f"a step in each process: {4 * plan.flops / 1e12:,.4g} TFLOP" in said
    assert f"{4 * plan.flops / 2e12:,.3g} s at least" in said
    assert "TFLOP, 0 B received, " in plan_text(made, 1)
    head = 384 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536
    learnt = views[0].optimizer_bytes // 12 + head
    assert f"TFLOP, {2 * 15 * 4 * learnt / 16 / 1e6:.3g} MB received, " in said

import weakref
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gigatome.core.errors import ConfigError
from gigatome.encoders import dilated, longnet
from gigatome.encoders.dilated import DilatedOptions
from gigatome.encoders.dilated_kernels import pytorch_kernel_for
from gigatome.encoders.longnet import LongNetConfig, LongNetEncoder
from gigatome.encoders.longnet_plan import Plan, memory_advice, parse_memory, plan_longnet, plan_table, suggest
from gigatome.encoders.longvit import LongVitConfig

SMALL = LongNetConfig(dim=32, depth=2, ffn_dim=96, attention=DilatedOptions((64, 256), (1, 2), heads=4))
ODD = LongNetConfig(
    dim=24, depth=2, ffn_dim=40, attention=DilatedOptions((50, 300), (1, 7), heads=6, padding="masked"),
    normalize_output=True,
)  # fmt: skip
LONGVIT = LongVitConfig(image_size=32768).encoder()
TOKENS = 2**20
MODES = ("none", "selective", "block")


class Live(TorchDispatchMode):
    """Bytes of all tensors that exist, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def step(config, tokens, batch, checkpointing, precision="fp32"):
    """An encoder's forward pass, and then its backward pass."""
    made = LongNetEncoder(config, checkpointing=checkpointing).train()
    x = torch.randn(batch, tokens, config.dim, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = made(x)
    yield
    out.backward(torch.ones_like(out))


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize(("config", "tokens"), [(SMALL, 512), (ODD, 411)])
@pytest.mark.parametrize("hidden", [2**25, 2 * 96 * 100])
def test_arithmetic_is_what_is_counted(monkeypatch, checkpointing, config, tokens, hidden):
    monkeypatch.setattr(longnet, "_HIDDEN", hidden)
    plan = plan_longnet(config, tokens, batch=2, checkpointing=checkpointing)
    counted = []
    with FlopCounterMode(display=False) as counter:
        passes = step(config, tokens, 2, checkpointing)
        for _ in passes:
            counted.append(counter.get_total_flops())
        counted.append(counter.get_total_flops() - counted[0])
    assert [plan.forward_flops, plan.backward_flops] == counted


def test_a_gradient_that_holds_merge_weights_takes_attention_once_more():
    compat = replace(SMALL, attention=DilatedOptions.compat((64, 256), (1, 2), 4))
    with FlopCounterMode(display=False) as counter:
        for _ in step(compat, 512, 1, "none"):
            pass
    plan = plan_longnet(compat, 512, checkpointing="none")
    assert plan.forward_flops + plan.backward_flops == counter.get_total_flops()


@pytest.mark.parametrize(("precision", "checkpointing"), [*product(("fp32", "bf16"), MODES)])
@pytest.mark.parametrize("hidden", [2**25, 2 * 96 * 200])
def test_memory_is_about_what_is_measured(monkeypatch, precision, checkpointing, hidden):
    """Tensors alive at the peak of a step, without weights and the optimiser; within a third.

    Our own kernel takes less than PyTorch's, as it copies nothing.
    """
    monkeypatch.setattr(longnet, "_HIDDEN", hidden)
    monkeypatch.setattr(dilated, "kernel_for", pytorch_kernel_for)
    config = replace(SMALL, depth=4)
    with Live() as live:
        for _ in step(config, 2048, 2, checkpointing, precision):
            pass
    plan = plan_longnet(config, 2048, batch=2, precision=precision, checkpointing=checkpointing)
    weights = plan.parameter_bytes + plan.optimizer_bytes // 3  # no moments here
    assert live.peak / 1.05 < plan.activation_bytes + weights < 1.35 * live.peak


def test_longvit_at_a_million_tokens():
    """Figures by hand: a query of LongViT sees 12,288 keys of all branches together."""
    plan = plan_longnet(LONGVIT, TOKENS, checkpointing="block")
    attention = 12 * 4 * 384 * TOKENS * 12288
    linear = 12 * 2 * TOKENS * (4 * 384**2 + 2 * 384 * 1536)
    assert plan.forward_flops == attention + linear
    assert 35e9 < plan.memory < 45e9
    assert plan.communication_bytes == 0
    eight = plan_longnet(LONGVIT, TOKENS, ranks=8, checkpointing="selective")
    assert eight.tokens_per_rank == TOKENS // 8
    assert eight.forward_flops * 8 == plan.forward_flops
    keys = TOKENS // 8 // 8 + 7 * TOKENS // 8 // 16  # of one other process at ratio 8, of seven at ratio 16
    weights = 2 * 7 * eight.parameter_bytes * 4 // 6 // 8
    assert eight.communication_bytes == 12 * 3 * keys * 384 * 2 * 2 + weights


def test_parameters_are_the_encoders():
    for config in (SMALL, ODD):
        count = sum(parameter.numel() for parameter in LongNetEncoder(config).parameters())
        plan = plan_longnet(config, 64, precision="fp32")
        assert (plan.parameter_bytes, plan.optimizer_bytes) == (4 * count, 12 * count)


def test_uneven_shares_are_planned_by_the_largest():
    one, three = plan_longnet(ODD, 411), plan_longnet(ODD, 411, ranks=3)
    assert three.tokens_per_rank == 137
    assert one.forward_flops / 3 <= three.forward_flops < one.forward_flops / 2.5


def test_suggestions_take_the_fewest_processes_and_then_the_least_arithmetic():
    plans = [suggest(LONGVIT, TOKENS, max_memory=int(gigabytes * 10**9)) for gigabytes in (300, 100, 70, 35, 20.5, 10)]
    assert [(plan.ranks, plan.checkpointing) for plan in plans] == [
        (1, "none"), (1, "selective"), (1, "block"), (2, "block"), (4, "selective"), (8, "block")
    ]  # fmt: skip
    for smaller, larger in pairwise(reversed(plans)):
        assert smaller.memory < larger.memory
    for plan, gigabytes in zip(plans, (300, 100, 70, 35, 20.5, 10), strict=True):
        assert plan.memory <= gigabytes * 10**9


def test_what_does_not_fit_says_what_would():
    message = r"take about 76.* GB on each of 1 processes.* 20 GB; the plan that fits: 4 processes .*\"block\", 11.* GB"
    with pytest.raises(ConfigError, match=message):
        plan_longnet(LONGVIT, TOKENS, max_memory=20 * 10**9)
    with pytest.raises(ConfigError, match=r"do not fit into 1 GB on any of up to 2 processes; they take .* with 2"):
        suggest(LONGVIT, TOKENS, max_memory=10**9, most_ranks=2)
    assert "do not fit into 1 MB on any" in memory_advice(LONGVIT, plan_longnet(LONGVIT, TOKENS), 10**6)
    assert plan_longnet(LONGVIT, TOKENS, max_memory=10**11).memory <= 10**11


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GB", 40 * 10**9), (" 37.5 GiB ", 75 * 2**29), ("512mib", 2**29), ("1e9", 10**9), ("3 TB", 3 * 10**12)],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "40 GBs", "-3GB", "0GB", "forty"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="is no amount of memory; write one such as 40GB"):
        parse_memory(text)


def test_a_table():
    plan = Plan(
        2**20, 8, 1, "bf16", "block", 2**17, 35 * 10**12, 122 * 10**12, 128 * 10**6, 256 * 10**6, 6 * 10**9, 999
    )
    assert plan_table(plan, 600e12).splitlines() == [
        "tokens       1,048,576 × 1, 131,072 on each of 8 processes",
        'computed in  bf16, checkpointing "block"',
        "arithmetic   35 TFLOP forward, 122 backward",
        "memory       6.38 GB: 128 MB parameters, 256 MB gradients and optimiser, 6 GB activations",
        "received     999 B a step",
        "time         0.262 s a step at 600 TFLOP/s",
    ]
    assert "time" not in plan_table(plan)
    assert plan.seconds(157e12, 999) == pytest.approx(2)


def test_bad_numbers():
    with pytest.raises(ConfigError, match="tokens 0, ranks 1 and batch 1 must be positive"):
        plan_longnet(SMALL, 0)
    with pytest.raises(ConfigError, match="3 rows or tokens cannot be shared by 4 processes"):
        plan_longnet(SMALL, 3, ranks=4)
    with pytest.raises(ConfigError, match="most_ranks 0 must be positive"):
        suggest(SMALL, 64, max_memory=10**9, most_ranks=0)

"""Sequences that several processes share; what the processes do is in ``sequence_ranks.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatome.distributed import SequenceGroup, sequence_group, sum_over_sequence
from gigatome.encoders.dilated import DilatedOptions, dilated_attention, whole_parts
from gigatome.encoders.dilated_kernels import CPU_FLASH, CUDA_EFFICIENT, CUDA_FLASH, PRODUCTS
from gigatome.encoders.dilated_parallel import Share, cut_segments, shared_dilated_attention


def launch(*names: str) -> dict:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("sequence_ranks.py")), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told() -> dict:
    return launch("two", "four", "mesh", "killed")


@pytest.mark.parametrize("processes", ["two", "four"])
def test_attention_is_that_of_one_process(told, processes):
    """Output, and gradients of queries, keys and values."""
    limits = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2}
    for rank in told[processes]:
        assert len(rank["attention"]) == 2 * 12 + 2
        for case, error in rank["attention"].items():
            assert error < limits[case.split()[-1]], case


@pytest.mark.parametrize("processes", ["two", "four"])
def test_an_encoder_is_that_of_one_process(told, processes):
    """Tokens, and gradients of tokens and parameters, with stochastic depth."""
    for rank in told[processes]:
        assert set(rank["encoder"]) == {"none", "selective", "block"}
        assert max(rank["encoder"].values()) < 1e-10


@pytest.mark.parametrize(("processes", "share"), [("two", 2), ("four", 4), ("mesh", 2)])
def test_the_mean_of_gradients_is_that_of_one_process(told, processes, share):
    """Of images of 9 rows; the mesh is 2 sequences × 2 parts, against one process with both batches."""
    for rank in told[processes]:
        for found in rank["vit"].values():
            losses = found["losses"]
            for first in range(0, len(losses), share):
                assert len(set(losses[first : first + share])) == 1
            assert sum(losses) / len(losses) == pytest.approx(found["loss"], rel=1e-12)
            assert found["mean"] < 1e-10
            assert found["ddp"] < 1e-10
    assert len(set(told["mesh"][0]["vit"]["pretrain size"]["losses"])) == 2


def test_only_processes_that_share_a_segment_exchange_what_heads_see(told):
    """128 tokens each: segments of 256 hold 2 processes and of 512 all; 2 × 4 heads × 8 numbers of 4 bytes."""
    token = 2 * 4 * 8 * 4
    fetched = 2 * token * (128 // 2 + 3 * 128 // 4)  # keys and values of every 2nd token and of every 4th
    for rank in told["four"]:
        assert rank["traffic"]["forward"] == fetched
        assert rank["traffic"]["all"] == 3 * fetched  # once more for the gradient, and gradients
        assert rank["traffic"]["kept"] == 2 * 128 * 4 * (4 * 8 + 1) * 4


def test_what_does_not_fit_is_refused(told):
    for number, rank in enumerate(told["four"]):
        refused = rank["refused"]
        assert refused["tokens"] == f"process {number} of 4 holds 4 of 16 tokens, but was given 3"
        assert "queries of 3 heads" in refused["heads"]
        assert "images are 4 px high, but this process's rows range(" in refused["rows"]
        assert "1 rows or tokens cannot be shared by 4 processes" in refused["few"]
        assert refused["group"] == "sequences of 3 parts need a multiple of 3 processes, not 4"


def test_a_process_that_is_killed_is_named_by_all_others(told):
    answers = [rank and rank["killed"] for rank in told["killed"]]
    assert answers[2] is None
    for number in (0, 1, 3):
        assert answers[number]["said"].startswith("process 2 of 4 does not answer any more; the run stops")
        assert answers[number]["step"] == 1
        assert answers[number]["seconds"] < 15


def test_a_process_that_is_late_is_waited_for(told):
    assert [rank["late"] for rank in told["four"]] == [10] * 4


@pytest.mark.slow
def test_a_process_that_stalls_or_kept_the_others_together_is_named_too():
    found = launch("killed first", "stalled")
    for name, gone in (("killed first", 0), ("stalled", 1)):
        said = [rank and rank[name.split()[0]]["said"] for rank in found[name]]
        for number in set(range(4)) - {gone}:
            assert said[number].startswith(f"process {gone} of 4 does not answer any more")


@st.composite
def shared(draw):
    branches = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3))
    segments, ratios = zip(*branches, strict=True)
    offsets = draw(st.sampled_from(("torchscale", "paper")))
    size = draw(st.integers(1, 5))
    return DilatedOptions(segments, ratios, draw(st.integers(1, 6)), offsets), size, draw(st.integers(size, 60))


@settings(max_examples=100, deadline=None)
@given(shared())
def test_queries_meet_the_same_keys_however_the_sequence_is_shared(case):
    """Each process's queries, marked in the places of their heads, with how many keys they see."""
    options, size, tokens = case
    met = []
    for count in (1, size):
        seen = torch.zeros(len(options.segments), 1, tokens, options.heads, 1)
        for rank in range(count):
            share = Share(SequenceGroup(count, rank), tokens)
            own = seen[:, :, share.own.start : share.own.stop]
            cut = iter(cut_segments(options, share.bounds, rank))
            for branch, (segment, ratio) in enumerate(zip(options.segments, options.ratios, strict=True)):
                alone = DilatedOptions((segment,), (ratio,), options.heads, options.offsets)
                is_cut = any(bound % min(segment, tokens) for bound in share.bounds[:-1])
                parts = [part for piece in (next(cut) if is_cut else ()) for part in piece.parts if part.tokens]
                for part in (*whole_parts(alone, tokens, share.own), *parts):
                    part.view(own[branch]).add_(sum(part.seen))
        met.append(seen)
    assert torch.equal(*met)


def test_parts_are_as_equal_as_they_can_be():
    shares = [Share(SequenceGroup(4, rank), 10, unit=3) for rank in range(4)]
    assert [share.own for share in shares] == [range(6), range(6, 15), range(15, 21), range(21, 30)]
    assert shares[0].bounds == (0, 6, 15, 21, 30)
    assert shares[0].tokens == 30


def test_one_process_shares_with_nobody():
    group = sequence_group(1)
    assert group == SequenceGroup(1, 0, 1, 0, None)
    q, k, v = torch.randn(3, 1, 12, 2, 4)
    options = DilatedOptions((4, 8), (1, 2), heads=2)
    found = shared_dilated_attention(q, k, v, options, Share(group, 12))
    assert torch.equal(found, dilated_attention(q, k, v, options))
    assert sum_over_sequence(q, group) is q


@pytest.mark.parametrize("kernel", [CPU_FLASH, PRODUCTS])
def test_kernels_take_more_keys_than_queries(kernel):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 11, 11))
    cotangent = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    wanted = torch.autograd.grad(weights @ v, (q, k, v), cotangent)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v)
        torch.testing.assert_close(out, weights @ v)
        for found, want in zip(kernel.backward(cotangent, q, k, v, out, lse), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("kernel", "dtype"), [(CUDA_FLASH, torch.bfloat16), (CUDA_EFFICIENT, torch.float32)])
def test_cuda_kernels_take_more_keys_than_queries(kernel, dtype):
    """On tensors without memory, which need no device."""
    q, k, v = (torch.empty(2, 3, n, 24, device="meta", dtype=dtype) for n in (5, 11, 11))
    out, lse = kernel.forward(q, k, v)
    assert (out.shape, lse.shape) == (q.shape, (2, 3, 5))
    for found, like in zip(kernel.backward(out, q, k, v, out, lse), (q, k, v), strict=True):
        assert found.shape == like.shape

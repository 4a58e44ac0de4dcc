"""Processes over gloo that share sequences; each scenario returns what it found, which is printed as JSON.

Run as a script in a process of its own, in which nothing but imports has happened before anything is forked.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gigatome import distributed
from gigatome.core.errors import ConfigError, RunError
from gigatome.distributed import SequenceGroup, mean_over_ranks, rank, sequence_group, sum_over_sequence
from gigatome.encoders import dilated_parallel
from gigatome.encoders.dilated import DilatedOptions, dilated_attention
from gigatome.encoders.dilated_parallel import Share, shared_dilated_attention
from gigatome.encoders.longnet import LongNetConfig, LongNetEncoder
from gigatome.encoders.longvit import LongVit, LongVitConfig

CASES = {  # options, tokens, batch
    "aligned": (DilatedOptions((8, 32, 64), (1, 2, 4), heads=4), 64, 2),
    "paper": (DilatedOptions((8, 32, 64), (1, 2, 4), heads=6, offsets="paper"), 64, 2),
    "two of four": (DilatedOptions((16, 32), (2, 4), heads=4), 64, 1),
    "all of four": (DilatedOptions((64,), (8,), heads=8), 64, 1),
    "local": (DilatedOptions((4, 16), (1, 2), heads=2), 64, 2),
    "longer than the sequence": (DilatedOptions((16, 4096), (1, 4), heads=4), 64, 1),
    "an end that fills no segment": (DilatedOptions((8, 32, 64), (1, 2, 4), heads=4), 59, 2),
    "segments that match nothing": (DilatedOptions((5, 13, 29), (1, 3, 7), heads=5), 61, 2),
    "paper, matching nothing": (DilatedOptions((5, 13, 29), (1, 3, 7), heads=5, offsets="paper"), 61, 1),
    "ratio above what a process holds": (DilatedOptions((7, 11), (2, 9), heads=10), 11, 2),
    "torchscale": (DilatedOptions.compat((8, 32, 64), (1, 2, 4), 4), 59, 2),
    "one token each": (DilatedOptions((2, 4), (1, 3), heads=3), 4, 1),
}  # fmt: skip


def errors(found, expected) -> float:
    """The largest, relative to the largest number of each; those that are 0 but for rounding count by the others."""
    least = 1e-4 * max(float(b.detach().abs().max()) for b in expected)
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).abs().max()) / max(least, float(b.abs().max())) for a, b in pairs)


def attention(group: SequenceGroup) -> Any:
    """Errors of output and gradients by case and type, and the numbers sent by this process."""
    worst = {}
    for name, (options, tokens, batch) in CASES.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16)[: 3 if name in ("aligned", "torchscale") else 2]:
            random = torch.Generator().manual_seed(0)
            whole = [
                torch.randn(batch, tokens, options.heads, 8, generator=random, dtype=torch.float64).to(dtype)
                for _ in range(4)
            ]
            share = Share(group, tokens)
            mine = slice(share.own.start, share.own.stop)
            expected, found = [], []
            for results, attend, take in (
                (expected, dilated_attention, slice(None)),
                (found, lambda *x, share=share: shared_dilated_attention(*x, share), mine),
            ):
                q, k, v = (x[:, take].clone().requires_grad_() for x in whole[:3])
                out = attend(q, k, v, options)
                results += [out, *torch.autograd.grad(out, (q, k, v), whole[3][:, take])]
            worst[f"{name} {str(dtype)[6:]}"] = errors(found, [x[:, mine] for x in expected])
    return worst


def traffic(group: SequenceGroup) -> Any:
    """Bytes that this process receives in attention forward and backward, and what is kept for the gradient."""
    options, received, kept = DilatedOptions((64, 256, 512), (1, 2, 4), heads=4), [], []

    class Counting(distributed.Exchange):
        def __init__(self, sent, sizes, group):
            received.append(sum(sizes) * sent[0].element_size())
            super().__init__(sent, sizes, group)

    dilated_parallel.Exchange = Counting
    share = Share(group, 512)
    q, k, v = (torch.randn(2, len(share.own), 4, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        out = shared_dilated_attention(q, k, v, options, share)
    forward = sum(received)
    out.sum().backward()
    dilated_parallel.Exchange = distributed.Exchange
    return {"forward": forward, "all": sum(received), "kept": sum(kept)}


ATTENTION = DilatedOptions((8, 24, 64), (1, 2, 4), heads=4)


def disturbed(made: torch.nn.Module) -> torch.nn.Module:
    """With parameters that are far from their initial values, and always the same."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(float("norm" in name or "_ln" in name), 0.3, generator=random)
    return made.double()


def encoder(group: SequenceGroup) -> Any:
    """Errors of tokens, and of gradients of tokens and parameters, by checkpointing; stochastic depth is on."""
    config = LongNetConfig(16, 2, 24, ATTENTION, normalize_output=True)
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(2, 61, 16, generator=random, dtype=torch.float64) for _ in range(2))
    share, worst = Share(group, 61), {}
    mine = slice(share.own.start, share.own.stop)
    for checkpointing in ("none", "selective", "block"):
        results = []
        for take, own in ((slice(None), None), (mine, share)):
            made = disturbed(LongNetEncoder(config, drop_path=0.5, checkpointing=checkpointing)).train()
            torch.manual_seed(3)
            tokens = x[:, take].clone().requires_grad_()
            out = made(tokens, own)
            (out * weights[:, take]).sum().backward()
            grads = [parameter.grad for parameter in made.parameters()]
            if own:
                grads = [sum_over_sequence(grad, group) for grad in grads]
            results.append([*(y if own else y[:, mine] for y in (out, tokens.grad)), *grads])
        worst[checkpointing] = errors(results[1], results[0])
    return worst


SMALL = {"patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "ffn_dim": 20, "grid": 4}


def vit(group: SequenceGroup) -> Any:
    """Losses of all processes and errors of embeddings and gradients, of as many images as there are sequences.

    The gradients' mean is taken by hand, and by PyTorch's DistributedDataParallel.
    """
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2 * group.sequences, 36, 28, 3), generator=random, dtype=torch.uint8)
    target = torch.randn(2 * group.sequences, 12, generator=random, dtype=torch.float64)
    share, told = Share(group, 9), {}
    batch = slice(2 * group.sequence, 2 * group.sequence + 2)
    pixels = images[batch, 4 * share.own.start : 4 * share.own.stop]
    for norm, pos_embed in (("pretrain", "size"), ("finetune", "dino")):
        config = LongVitConfig(segments=(4, 20, 63), ratios=(1, 2, 3), norm=norm, pos_embed=pos_embed, **SMALL)
        one, many = (disturbed(LongVit(config, checkpointing="selective")) for _ in range(2))
        expected = (one(images) - target).square().mean()
        expected.backward()
        wanted = [parameter.grad for parameter in one.parameters()]
        embedding = many(pixels, share)
        loss = (embedding - target[batch]).square().mean()
        loss.backward()
        means = [mean_over_ranks(parameter.grad) for parameter in many.parameters()]
        losses = [torch.zeros_like(loss) for _ in range(dist.get_world_size())]
        dist.all_gather(losses, loss.detach())
        many.zero_grad()
        parallel = DistributedDataParallel(many)
        (parallel(pixels, share) - target[batch]).square().mean().backward()
        told[f"{norm} {pos_embed}"] = {
            "losses": [float(x) for x in losses],
            "loss": float(expected),
            "mean": errors(means, wanted),
            "ddp": errors([parameter.grad for parameter in many.parameters()], wanted),
        }
    return told


def refused(group: SequenceGroup) -> Any:
    """Messages of what does not fit."""
    options, share = DilatedOptions((8,), (1,), heads=2), Share(group, 16)
    made = LongVit(LongVitConfig(segments=(4, 20, 63), ratios=(1, 2, 3), **SMALL))
    attempts = {
        "tokens": lambda: shared_dilated_attention(*(torch.zeros(1, 3, 2, 4) for _ in range(3)), options, share),
        "heads": lambda: shared_dilated_attention(*(torch.zeros(1, 8, 3, 4) for _ in range(3)), options, share),
        "rows": lambda: made(torch.zeros(1, 4, 8, 3, dtype=torch.uint8), share),
        "few": lambda: Share(group, 1),
        "group": lambda: sequence_group(3),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ConfigError as error:
            messages[name] = str(error)
    return messages


def late(group: SequenceGroup) -> Any:
    """A sum that one process comes late to, while the others look whether all are well."""
    distributed._LOOK = timedelta(seconds=0.1)
    time.sleep(0.5 * (group.rank == 1))
    total = sum_over_sequence(torch.tensor([1.0 + group.rank]), group)
    distributed._LOOK = timedelta(seconds=1)
    return total.item()


def killed(number: int) -> Callable[[SequenceGroup], Any]:
    """A process dies between two passes of training; what the others say, and how long after."""

    def scenario(group: SequenceGroup) -> Any:
        distributed._LOOK, distributed._ROLL_CALL = timedelta(seconds=0.2), timedelta(seconds=2)
        config = LongNetConfig(16, 1, 24, ATTENTION)
        made, share = disturbed(LongNetEncoder(config, checkpointing="block")), Share(group, 64)
        x, start = torch.zeros(1, len(share.own), 16, dtype=torch.float64), time.monotonic()
        try:
            for step in range(3):
                loss = sum_over_sequence(made(x, share).sum(), group)
                start = time.monotonic()
                if step == 1 and rank() == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                loss.backward()
        except RunError as error:
            return {"said": str(error), "seconds": time.monotonic() - start, "step": step}
        return {"said": "nothing"}

    return scenario


def stalled(group: SequenceGroup) -> Any:
    """A process does not come: what the others say."""
    distributed._LOOK, distributed._ROLL_CALL = timedelta(seconds=0.2), timedelta(seconds=2)
    if group.rank == 1:
        time.sleep(5)
        return {"said": "nothing"}
    try:
        sum_over_sequence(torch.ones(1), group)
    except RunError as error:
        return {"said": str(error)}
    return {"said": "all came"}


def together(size: int, sequence: int, scenarios: dict[str, Callable[[SequenceGroup], Any]], seconds: float) -> Any:
    """What each of ``size`` processes finds, by scenario; None of a process that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children = [os.pipe() for _ in range(size)], []
    for number in range(size):
        child = os.fork()
        if child == 0:
            try:
                client = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
                limit = timedelta(seconds=60)
                dist.init_process_group("gloo", store=client, rank=number, world_size=size, timeout=limit)
                group = sequence_group(sequence, timeout=timedelta(seconds=seconds))
                answer = {name: scenario(group) for name, scenario in scenarios.items()}
                os.write(pipes[number][1], json.dumps(answer).encode())
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children.append(child)
    # as torchrun keeps it; its thread looks names up, and a process forked meanwhile would wait for that lock for ever
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    answers = []
    for child, (read, write) in zip(children, pipes, strict=True):
        os.close(write)
        with os.fdopen(read) as handle:
            answers.append(json.loads(handle.read() or "null"))
        os.waitpid(child, 0)
    with nullcontext(store):
        return answers


EXACT = {"attention": attention, "encoder": encoder, "vit": vit, "refused": refused, "late": late}
LAUNCHES = {
    "two": (2, 2, EXACT, 60),
    "four": (4, 4, {**EXACT, "traffic": traffic}, 60),
    "mesh": (4, 2, {"vit": vit}, 60),
    "killed": (4, 4, {"killed": killed(2)}, 20),
    "killed first": (4, 4, {"killed": killed(0)}, 20),
    "stalled": (4, 4, {"stalled": stalled}, 3),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: together(*LAUNCHES[name]) for name in sys.argv[1:]}))

"""What a training step of a LongNet encoder takes, before it is started: arithmetic, memory, traffic and time.

Arithmetic and traffic are counted from the parts that attention is made of, and are exact. A branch with segments of w
tokens and ratio r takes 4 × tokens × w / r² × dim operations forward, and 2.5 times that backward. Memory is that of
the tensors at the peak, estimated to about a third from what PyTorch keeps of each layer; allocators may hold more.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal, final

from gigatome.core.errors import ConfigError
from gigatome.distributed import SequenceGroup
from gigatome.encoders import dilated, longnet
from gigatome.encoders.dilated import Part, whole_parts
from gigatome.encoders.dilated_parallel import Share, cut_segments
from gigatome.encoders.longnet import Checkpointing, LongNetConfig

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block")  # from the least arithmetic to the most

Precision = Literal["fp32", "bf16"]


@final
@dataclass(frozen=True)
class Plan:
    """A training step of the processes that share a sequence; numbers are of the process that has most.

    Attributes:
        tokens: of a sequence.
        ranks: processes that share it.
        batch: sequences that each of them works on at once.
        precision: of products; weights are float32.
        checkpointing: as of :class:`~gigatome.encoders.longnet.LongNetEncoder`.
        tokens_per_rank: of a sequence that a process holds.
        forward_flops: operations, of which a multiplication and an addition are two.
        backward_flops: likewise, with what is computed again.
        parameter_bytes: weights, and their copies in bfloat16.
        optimizer_bytes: gradients and AdamW's two moments, in float32.
        activation_bytes: at the peak, which is in the backward pass.
        communication_bytes: that a process receives: keys, values and their gradients, and parameters' gradients.
    """

    tokens: int
    ranks: int
    batch: int
    precision: Precision
    checkpointing: Checkpointing
    tokens_per_rank: int
    forward_flops: int
    backward_flops: int
    parameter_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    communication_bytes: int

    @property
    def memory(self) -> int:
        """Bytes on the device of a process; what CUDA itself takes is not among them."""
        return self.parameter_bytes + self.optimizer_bytes + self.activation_bytes

    def seconds(self, flops_per_s: float, bytes_per_s: float = float("inf")) -> float:
        """Of a step, at so many operations and received bytes a second, one after the other."""
        return (self.forward_flops + self.backward_flops) / flops_per_s + self.communication_bytes / bytes_per_s


def plan_longnet(
    config: LongNetConfig,
    tokens: int,
    *,
    ranks: int = 1,
    precision: Precision = "bf16",
    checkpointing: Checkpointing = "selective",
    batch: int = 1,
    unit: int = 1,
    max_memory: int | None = None,
) -> Plan:
    """What a training step takes.

    Activations are, in bytes for each token of a process, with D = dim, F = ffn_dim, H = heads, e = 4 or 2 for float32
    or bfloat16, the attention's layers a = 32 D or 28 D + 4 H + 16, and the feed-forward layer's f = 4 D + 12 F or
    2 D + 10 F + 16:

    - kept of all blocks but the last: 4 D with ``"block"``, 4 D + 4 e D + 4 H with ``"selective"``, a + f with
      ``"none"``;
    - in the last block the larger of a + f + 8 D + 4 F, when the gradient passes the feed-forward layer, and
      a + 16 D + 2 e D, or 6 D more in bfloat16, with eight float32 copies of the tokens that a kernel sees at once,
      when it passes attention;
    - other processes' keys and values, twice.

    A feed-forward layer that works on some tokens at a time keeps nothing, and has f and 4 F for these alone.

    Args:
        config: of the encoder.
        tokens: of a sequence.
        ranks: processes that share a sequence.
        precision: of products.
        checkpointing: what is kept for the gradient.
        batch: sequences that each process works on at once.
        unit: tokens that one process holds together, such as a row of patches.
        max_memory: bytes that a process may take; None is any number.

    Raises:
        ConfigError: fewer tokens than processes, or more than ``max_memory``; the message says which plan fits.
    """
    if min(tokens, ranks, batch) < 1:
        raise ConfigError(f"tokens {tokens}, ranks {ranks} and batch {batch} must be positive")
    shares = [Share(SequenceGroup(ranks, rank), tokens // unit, unit) for rank in range(ranks)]
    own = max(len(share.own) for share in shares)
    d, e = config.dim // config.attention.heads, 2 if precision == "bf16" else 4
    counts = [_counts(config, share) for share in shares]
    attention = 4 * d * batch * max(count.pairs for count in counts)
    fetched = 2 * d * e * batch * max(count.fetched for count in counts)
    returned = 2 * d * e * batch * max(count.returned for count in counts)
    parameters = _parameters(config)
    forward, backward = _flops(config, own, batch, attention, checkpointing)
    fetches = 3 if checkpointing == "block" else 2
    plan = Plan(
        tokens=tokens, ranks=ranks, batch=batch, precision=precision, checkpointing=checkpointing, tokens_per_rank=own,
        forward_flops=forward, backward_flops=backward,
        parameter_bytes=(4 if precision == "fp32" else 6) * parameters, optimizer_bytes=12 * parameters,
        activation_bytes=_activations(config, own, batch, e, checkpointing) + 2 * fetched,
        communication_bytes=config.depth * (fetches * fetched + returned) + gradient_traffic(parameters, ranks),
    )  # fmt: skip
    if max_memory is not None and plan.memory > max_memory:
        raise ConfigError(memory_advice(config, plan, max_memory))
    return plan


def gradient_traffic(parameters: int, processes: int) -> int:
    """Bytes that a process receives when gradients are averaged over all, in a ring."""
    return 2 * (processes - 1) * 4 * parameters // processes


def suggest(
    config: LongNetConfig,
    tokens: int,
    *,
    max_memory: int,
    precision: Precision = "bf16",
    batch: int = 1,
    unit: int = 1,
    least_ranks: int = 1,
    most_ranks: int = 64,
) -> Plan:
    """The plan of the fewest processes, and then of the least arithmetic, that fits.

    Args:
        config: of the encoder.
        tokens: of a sequence.
        max_memory: bytes that a process may take.
        precision: of products.
        batch: sequences that each process works on at once.
        unit: tokens that one process holds together.
        least_ranks: processes of a sequence to begin with; their number is doubled.
        most_ranks: processes that there are.

    Raises:
        ConfigError: none fits; the message says what the smallest takes.
    """
    most = min(most_ranks, tokens // unit)
    counts = [least_ranks << power for power in range(most_ranks.bit_length()) if least_ranks << power <= most]
    if not counts:
        raise ConfigError(f"tokens {tokens} and most_ranks {most_ranks} must be positive")
    least = None
    for ranks, checkpointing in product(counts, _CHECKPOINTING):
        plan = plan_longnet(
            config, tokens, ranks=ranks, precision=precision, checkpointing=checkpointing, batch=batch, unit=unit
        )
        if plan.memory <= max_memory:
            return plan
        least = plan if least is None or plan.memory < least.memory else least
    assert least is not None  # noqa: S101 - there is one count at least
    raise ConfigError(
        f"{tokens:,} tokens do not fit into {size_text(max_memory)} on any of up to {most_ranks} processes; they take "
        f'{size_text(least.memory)} with {least.ranks} processes and checkpointing "{least.checkpointing}"'
    )


def memory_advice(config: LongNetConfig, plan: Plan, max_memory: int) -> str:
    """What to say when a plan does not fit, or has run out of memory: what it takes, and the plan that fits."""
    said = f"{plan.tokens:,} tokens take about {size_text(plan.memory)} on each of {plan.ranks} processes"
    try:
        fits = suggest(config, plan.tokens, max_memory=max_memory, precision=plan.precision, batch=plan.batch)
    except ConfigError as error:
        return f"{said}, and there are {size_text(max_memory)}; {error}"
    return (
        f"{said}, and there are {size_text(max_memory)}; the plan that fits: {fits.ranks} processes for a sequence and "
        f'checkpointing "{fits.checkpointing}", {size_text(fits.memory)} on each'
    )


def parse_memory(text: str) -> int:
    """Bytes, of a text such as ``"40GB"``, ``"512 MiB"`` or ``"1e9"``.

    Raises:
        ConfigError: the text is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise ConfigError(f"{text!r} is no amount of memory; write one such as 40GB or 37.5GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def size_text(count: float) -> str:
    """Bytes in words."""
    unit = next((unit for unit in ("tb", "gb", "mb", "kb") if count >= _UNITS[unit]), "b")
    return f"{count / _UNITS[unit]:.3g} {unit.upper().replace('K', 'k')}"


def plan_table(plan: Plan, flops_per_s: float | None = None) -> str:
    """A plan in words, one line for each thing; with a time if the speed of a process is given."""
    held = f"{plan.tokens_per_rank:,} on each of {plan.ranks} processes" if plan.ranks > 1 else "on one process"
    lines = {
        "tokens": f"{plan.tokens:,} × {plan.batch}, {held}",
        "computed in": f'{plan.precision}, checkpointing "{plan.checkpointing}"',
        "arithmetic": f"{plan.forward_flops / 1e12:,.4g} TFLOP forward, {plan.backward_flops / 1e12:,.4g} backward",
        "memory": f"{size_text(plan.memory)}: {size_text(plan.parameter_bytes)} parameters, "
        f"{size_text(plan.optimizer_bytes)} gradients and optimiser, {size_text(plan.activation_bytes)} activations",
        "received": f"{size_text(plan.communication_bytes)} a step",
    }
    if flops_per_s is not None:
        lines["time"] = f"{plan.seconds(flops_per_s):,.3g} s a step at {flops_per_s / 1e12:,.4g} TFLOP/s"
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


@dataclass(frozen=True)
class _Counts:
    """Of one process, sequence and layer, in all heads.

    Attributes:
        pairs: queries × keys that they see.
        fetched: keys of others.
        returned: gradients of its own keys that others send.
    """

    pairs: int
    fetched: int
    returned: int


def _counts(config: LongNetConfig, share: Share) -> _Counts:
    branches = cut_segments(config.attention, share.bounds, share.group.rank)
    cut = [(part, len(segment.holders)) for own in branches for segment in own for part in segment.parts]
    parts: Iterable[Part] = chain(whole_parts(config.attention, share.tokens, share.own), (part for part, _ in cut))
    return _Counts(
        sum(part.segments * part.groups * part.members * part.tokens * sum(part.seen) for part in parts),
        sum(part.groups * part.members * (sum(part.seen) - part.tokens) for part, _ in cut),
        sum(part.groups * part.members * part.tokens * (holders - 1) for part, holders in cut),
    )


def _parameters(config: LongNetConfig) -> int:
    dim, ffn = config.dim, config.ffn_dim
    block = 4 * (dim * dim + dim) + 2 * dim * ffn + ffn + dim + 2 * (3 * dim + ffn)
    return config.depth * block + 2 * dim * config.normalize_output


def _flops(
    config: LongNetConfig, own: int, batch: int, attention: int, checkpointing: Checkpointing
) -> tuple[int, int]:
    """Forward and backward; the last product of what is computed again is left out, as nothing needs its result."""
    linear, ffn = 2 * own * batch * config.dim**2, 2 * own * batch * config.dim * config.ffn_dim
    forward = 4 * linear + 2 * ffn + attention
    detached = attention if config.attention.merge == "detached" else 0
    again = {"none": 0, "selective": 3 * linear, "block": 4 * linear + attention}[checkpointing]
    chunk = longnet.tokens_at_once(batch, config.ffn_dim)
    if chunk < own:
        again += ffn
        if checkpointing != "none":  # all chunks but the last once more for the block, besides each for its gradient
            again += 2 * ffn * (own - ((own - 1) % chunk + 1)) // own
    elif checkpointing != "none":
        again += ffn
    backward = 2 * (4 * linear + 2 * ffn) + 5 * attention // 2 + detached + again
    return config.depth * forward, config.depth * backward


def _activations(config: LongNetConfig, own: int, batch: int, e: int, checkpointing: Checkpointing) -> int:
    """At the peak; see :func:`plan_longnet`."""
    dim, ffn, heads = config.dim, config.ffn_dim, config.attention.heads
    at_once = min(own, longnet.tokens_at_once(batch, ffn))
    attention = own * ((32 if e == 4 else 28) * dim + 4 * heads + 16)
    feed_forward = 4 * dim + 12 * ffn + 16 if e == 4 else 2 * dim + 10 * ffn + 16
    kept = {
        "none": attention + (own * feed_forward if at_once == own else 0),
        "selective": own * (4 * dim + 4 * e * dim + 4 * heads),
        "block": own * 4 * dim,
    }[checkpointing]
    in_feed_forward = own * 8 * dim + at_once * (feed_forward + 4 * ffn)
    copies = 8 * 4 * dim * min(own, dilated.tokens_at_once(heads))
    in_attention = own * (16 * dim + 2 * e * dim + (6 * dim if e == 2 else 0)) + copies
    return batch * ((config.depth - 1) * kept + attention + max(in_feed_forward, in_attention))

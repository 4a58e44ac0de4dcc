"""Whether dilated attention sees what is far apart: ``python -m benchmarks.longvit_works [--write]``; prints JSON.

A sequence of background tokens with noise has two motifs, rows of tokens that are moved in one direction. The first is
of kind A or B and the second of kind a or b, at least a quarter of the sequence apart, in either order. The label says
whether the kinds match, A with a or B with b. All four pairs are equally likely, so that one motif alone says nothing.

The arms are the same LongNet encoder with equally many parameters, steps and sequences; only the segments of its
attention differ. *Dilated attention* has branches up to the whole sequence, *local windows* only the shortest of them,
and *mean pooling* has segments of one token, which makes it an MLP for each token. The logit is an affine function of
the mean of the tokens that leave. As no window holds both motifs, it is f(first) + g(second) + noise in the last two
arms; and of the four pairs, the logits of those that match and of those that do not have the same sum then. So no f and
g have a lower expected loss than a constant, ln 2, however long they are trained. (A head that is no affine function of
the mean could count kinds.)

Sequences are made anew for each step and for the test; each seed has other motifs, sequences and initial weights.
Figures are AUROC on the test sequences, mean ± standard deviation over seeds.

What was tuned, on the dilated arm and seeds 0 and 1 alone, and then given to all arms: length and strength of a motif
(16, 32 and 64 tokens; that it begins at a multiple of its length), noise and background, the learning rate (3e-3 and
1e-2), a batch norm before the last layer, which is affine in the test, and the initial weights. The encoder's own are
small for so narrow a network; with Xavier's, nothing was learnt in 150 to 250 steps, and with those of queries and keys
three times as large all is learnt in 100.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor, nn

from benchmarks.output import add_write, listed, row, write_result
from gigatome.core.seeding import torch_seed
from gigatome.encoders.dilated import DilatedOptions
from gigatome.encoders.longnet import LongNetConfig, LongNetEncoder
from gigatome.evaluation.metrics import auroc
from gigatome.tiles.bench_result import machine

DIM, DEPTH, HEADS, FFN_DIM = 32, 2, 2, 64
WINDOW, MIDDLE = 64, 512  # tokens of the shorter branches' segments
RATIOS = (1, 4, 16)
NOISE, STRENGTH = 0.25, 8.0  # deviation of a token in each dimension; by how much a motif moves it
SHARPNESS = 3.0  # times Xavier's initial weights of queries and keys
WARMUP, COOLDOWN = 0.1, 0.3  # shares of the steps


@dataclass(frozen=True)
class Outcome:
    """One arm, trained from one seed: AUROC on the test's sequences, mean loss of the last tenth, seconds."""

    arm: str
    seed: int
    auroc: float
    loss: float
    parameters: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Task:
    """Makes sequences.

    Attributes:
        tokens: of a sequence.
        motif: tokens of a motif; it begins at a multiple of that.
        background: float32 [DIM], the mean of a token.
        directions: float32 [2, 2, DIM], of the first motif's kinds and of the second's; orthonormal.
        generator: what sequences are drawn from.
    """

    tokens: int
    motif: int
    background: Tensor
    directions: Tensor
    generator: torch.Generator

    @classmethod
    def of_seed(cls, seed: int, options: argparse.Namespace) -> "Task":
        """Another one for each seed."""
        generator = torch.Generator().manual_seed(torch_seed(seed, "motifs"))
        background = torch.randn(DIM, generator=generator)
        orthonormal = torch.linalg.qr(torch.randn(DIM, 4, generator=generator))[0]
        return cls(options.tokens, options.motif, background, orthonormal.T.unflatten(0, (2, 2)), generator)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Sequences float32 [count, tokens, DIM] and whether their motifs match, float32 [count]."""
        kinds = torch.randint(2, (count, 2), generator=self.generator)
        places, least = self.tokens // self.motif, -(-self.tokens // (4 * self.motif))
        apart = torch.randint(least, places, (count,), generator=self.generator)
        first = (torch.rand(count, generator=self.generator) * (places - apart)).long()
        swapped = torch.rand(count, 1, generator=self.generator) < 0.5
        pair = torch.stack([first, first + apart], 1)
        starts = self.motif * torch.where(swapped, pair.flip(1), pair)
        x = self.background + NOISE * torch.randn(count, self.tokens, DIM, generator=self.generator)
        sequence = torch.arange(count)[:, None]
        for which in range(2):
            moved = STRENGTH * self.directions[which, kinds[:, which]]
            x[sequence, starts[:, which, None] + torch.arange(self.motif)] += moved[:, None]
        return x, (kinds[:, 0] == kinds[:, 1]).float()


class Classifier(nn.Module):
    """A logit for each sequence.

    Args:
        segments: of the attention's branches.
        ratios: likewise.
    """

    def __init__(self, segments: tuple[int, ...], ratios: tuple[int, ...]):
        super().__init__()
        config = LongNetConfig(DIM, DEPTH, FFN_DIM, DilatedOptions(segments, ratios, HEADS), normalize_output=True)
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), LongNetEncoder(config))
        self.head = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 1))
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, SHARPNESS if name.endswith(("q_proj", "k_proj")) else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B] of sequences [B, N, DIM]."""
        return self.head(self.encoder(x).mean(1)).squeeze(1)


def arms(tokens: int) -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Segments and ratios of each arm."""
    return {
        "dilated attention": ((WINDOW, MIDDLE, tokens), RATIOS),
        "local windows": ((WINDOW,), (1,)),
        "mean pooling": ((1,), (1,)),
    }


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    """Trains and tests every arm from every seed."""
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, branches in arms(options.tokens).items():
            torch.manual_seed(torch_seed(seed, "weights"))
            model, task, start = Classifier(*branches), Task.of_seed(seed, options), time.perf_counter()
            loss = learn(model, task, options)
            score = test(model, task, options)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            yield Outcome(arm, seed, score, loss, parameters, time.perf_counter() - start)


def learn(model: Classifier, task: Task, options: argparse.Namespace) -> float:
    """Trains; the mean loss of the last tenth of the steps."""
    optimizer, found = torch.optim.AdamW(model.parameters(), options.lr, (0.9, 0.98), weight_decay=0.0), []
    for step in range(options.steps):
        done = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (done + 1 / options.steps) / WARMUP, (1 - done) / COOLDOWN)
        x, y = task.batch(options.batch_size)
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return statistics.mean(found[-max(1, options.steps // 10) :])


@torch.inference_mode()
def test(model: Classifier, task: Task, options: argparse.Namespace) -> float:
    """AUROC on sequences that were not learnt from."""
    model.eval()
    parts = [task.batch(options.batch_size) for _ in range(-(-options.test // options.batch_size))]
    scores = torch.cat([model(x) for x, _ in parts])
    return auroc(torch.cat([y for _, y in parts]).long().numpy(), scores.numpy())


def summary(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each arm: mean and deviation over seeds."""
    rows = []
    for arm in dict.fromkeys(item.arm for item in found):
        members = [item for item in found if item.arm == arm]
        values = [item.auroc for item in members]
        rows.append(
            {
                "arm": arm,
                "seeds": len(members),
                "auroc": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "loss": statistics.mean(item.loss for item in members),
                "parameters": members[0].parameters,
                "minutes": statistics.mean(item.seconds for item in members) / 60,
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Whether dilated attention sees what is far apart",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "Whether two rare motifs, far apart in a sequence, match: AUROC on new sequences, mean ± standard deviation",
        "over seeds; the loss of a constant is 0.693. What the sequences are: `benchmarks/longvit_works.py`.",
        "",
        row(["arm", "seeds", "AUROC", "loss at the end", "parameters", "min"]),
        row(["---"] * 6),
    ]
    for line in rows:
        score = f"{line['auroc']:.3f}" + ("" if line["sd"] is None else f" ± {line['sd']:.3f}")
        cells = [line["arm"], str(line["seeds"]), score, f"{line['loss']:.3f}", f"{line['parameters']:,}"]
        lines.append(row([*cells, f"{line['minutes']:.1f}"]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    made.add_argument("--motif", type=int, default=32, help="tokens of a motif")
    made.add_argument("--steps", type=int, default=120)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--test", type=int, default=512, help="sequences of the test")
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is found, as plain values."""
    if options.tokens // 4 - options.motif < WINDOW:
        raise SystemExit(f"--tokens {options.tokens}: a window of {WINDOW} tokens must not hold two motifs; use more")
    found = list(outcomes(options))
    keys = ("tokens", "motif", "steps", "batch_size", "lr", "test")
    conditions = {
        **machine(), "torch": torch.__version__, "dim": DIM, "blocks": DEPTH, "heads": HEADS,
        **{key.replace("_", " "): getattr(options, key) for key in keys},
    }  # fmt: skip
    rows = summary(found)
    if options.write:
        text = markdown(rows, "python -m benchmarks.longvit_works", conditions)
        write_result(options.write, "longvit-works", text, conditions)
    return {"conditions": conditions, "found": [asdict(item) for item in found], "summary": rows}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

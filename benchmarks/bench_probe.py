"""Linear probes, gigatome's and scikit-learn's: ``python -m benchmarks.bench_probe [--write]``; prints JSON.

CPU-seconds, of all threads, of cross-validation: standardising, fitting and predicting each fold. scikit-learn as it
comes (``StandardScaler`` and ``LogisticRegression``), both in turn in each round, medians. *off by*: the largest
difference of a probability, on one fold, from the optimum, which is scikit-learn's at a tolerance of 1e-10. The
embeddings are random, with the falling spectrum that embeddings have.

*whole* is Giga-SSL's BRCA job by ``gigatome.evaluate``, all that follows the imports: reading a Parquet of 1,041 × 512,
a table of labels and ten published splits, ten fits, and scores with their intervals. The paper states 1.25
CPU-seconds for it. The first round counts too, as a user has no other.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.output import add_write, listed, row, write_result
from gigatome.embeddings.slide_store import SlideStore
from gigatome.evaluation.probes import PROBES, LinearProbe, fit_predict
from gigatome.evaluation.protocol import evaluate
from gigatome.tiles.bench_result import machine


@dataclass(frozen=True)
class Case:
    """What is learnt: ``samples`` embeddings of width ``dim`` in ``folds`` folds."""

    name: str
    probe: str
    samples: int
    dim: int
    classes: int
    folds: int


@dataclass(frozen=True)
class Cost:
    """CPU-seconds of one case, medians, and how far each is from the optimum; NaN where that was not found."""

    case: Case
    gigatome: float
    sklearn: float
    times: float
    gigatome_off: float
    sklearn_off: float


CASES = (
    Case("slides", "linear", 1041, 512, 2, 10),
    Case("slides, Giga-SSL's head", "giga", 1041, 512, 2, 10),
    Case("slides, 5 classes", "linear", 1041, 512, 5, 10),
    Case("tiles", "linear", 20_000, 384, 2, 2),
)

WHOLE = "whole"


def embeddings(case: Case) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings and labels that they say something of."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(case.dim, case.dim)) * np.arange(1, case.dim + 1) ** -0.7
    hidden = rng.normal(size=(case.samples, case.dim))
    x = hidden @ mix.T
    if case.probe == "giga":
        x /= np.linalg.norm(x, axis=1, keepdims=True)  # as they were published
    value = hidden[:, 0] + 0.5 * hidden[:, 1] + rng.normal(size=case.samples)
    return x.astype(np.float32), np.digitize(value, np.quantile(value, np.arange(1, case.classes) / case.classes))


def plain(
    probe: LinearProbe,
    x: NDArray[np.floating],
    y: NDArray[np.int64],
    x_test: NDArray[np.floating],
    tolerance: float = 1e-4,
    steps: int = 1000,
) -> NDArray[np.float64]:
    """scikit-learn's."""
    x, x_test = x.astype(np.float64), x_test.astype(np.float64)
    if probe.scale:
        scaler = StandardScaler().fit(x)
        x, x_test = (np.asarray(scaler.transform(part)) for part in (x, x_test))
    weight = "balanced" if probe.balanced else None
    model = LogisticRegression(C=probe.C, class_weight=weight, max_iter=steps, tol=tolerance)
    return model.fit(x, y).predict_proba(x_test)


def measure(case: Case, rounds: int, exact: bool) -> Cost:
    """One case."""
    probe = PROBES[case.probe]
    assert isinstance(probe, LinearProbe)
    x, y = embeddings(case)
    fold = np.arange(case.samples) % case.folds
    seconds: dict[str, list[float]] = {"gigatome": [], "sklearn": []}
    last: dict[str, NDArray[np.float64]] = {}
    for number in range(rounds + 1):
        for name in seconds:
            start = time.process_time()
            for k in range(case.folds):
                part = x[fold != k], y[fold != k], x[fold == k]
                last[name] = fit_predict(probe, *part, case.classes) if name == "gigatome" else plain(probe, *part)
            if number:  # the first round is to warm up
                seconds[name].append(time.process_time() - start)
    off = dict.fromkeys(seconds, float("nan"))
    if exact:
        k = case.folds - 1
        best = plain(probe, x[fold != k], y[fold != k], x[fold == k], 1e-10, 100_000)
        off = {name: float(np.abs(found - best).max()) for name, found in last.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["gigatome"], seconds["sklearn"], strict=True))
    ours, theirs = (round(statistics.median(values), 3) for values in seconds.values())
    return Cost(case, ours, theirs, round(ratio, 1), off["gigatome"], off["sklearn"])


def write_brca(folder: Path, slides: int = 1041, positive: int = 210) -> None:
    """Made files as Giga-SSL's users have them: ``all.parquet``, ``brca.csv``, ``splits/split_{0..9}.csv``."""
    x, y = embeddings(Case("", "giga", slides, 512, 2, 10))
    y &= np.random.default_rng(0).random(slides) < 2 * positive / slides
    barcodes = (f"TCGA-{i // 1000:02}-{i % 1000:04}-01Z-00-DX1" for i in range(slides))
    names = [f"{barcode}.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291" for barcode in barcodes]
    SlideStore(folder, "giga", "", tuple(names), x).write_table(folder / "all.parquet")
    rows = (f"{name},{label}\n" for name, label in zip(names, y, strict=True))
    (folder / "brca.csv").write_text("ID,label\n" + "".join(rows))
    (folder / "splits").mkdir()
    for k in range(10):
        order = np.random.default_rng(k).permutation(slides).tolist()
        test, train = order[: slides // 10], order[slides // 10 :]
        lines = (f"{i},{names[t]},{names[test[i]] if i < len(test) else ''}\n" for i, t in enumerate(train))
        (folder / "splits" / f"split_{k}.csv").write_text(",train,test\n" + "".join(lines))


def measure_whole(rounds: int) -> list[float]:
    """CPU-seconds of each round of the BRCA job."""
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_brca(folder)
        for _ in range(rounds):
            start = time.process_time()
            evaluate(folder / "all.parquet", folder / "brca.csv", target="label", head="giga", folds=folder / "splits")
            seconds.append(round(time.process_time() - start, 3))
    return seconds


def markdown(results: Sequence[Cost], whole: Sequence[float], command: str, conditions: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Linear probes",
        "",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}. {listed(conditions)}.",
        "",
        "CPU-seconds of all folds, medians of interleaved rounds, and how far a probability is off the optimum.",
        "",
        row(["what", "samples × width", "classes", "folds", "scikit-learn", "gigatome", "×", "off by", "gigatome's"]),
        f"|{'---|' * 9}",
    ]
    for item in results:
        case = item.case
        lines.append(
            row(
                [
                    case.name,
                    f"{case.samples:,} × {case.dim}",
                    str(case.classes),
                    str(case.folds),
                    f"{item.sklearn:.2f}",
                    f"{item.gigatome:.2f}",
                    f"{item.times:.1f}",
                    f"{item.sklearn_off:.1e}",
                    f"{item.gigatome_off:.1e}",
                ]
            )
        )
    if whole:
        lines += ["", f"BRCA from files to scores (the paper: 1.25 CPU-seconds): {', '.join(map(str, whole))}."]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--cases", nargs="+", choices=[case.name for case in CASES] + [WHOLE], help="all by default")
    made.add_argument("--no-exact", action="store_true", help="do not look for the optimum, which takes longest")
    add_write(made)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, as plain values."""
    warnings.filterwarnings("ignore", module="sklearn")
    conditions = {**machine(), "scikit-learn": sklearn.__version__}
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    whole = measure_whole(options.rounds) if not options.cases or WHOLE in options.cases else []
    results = [measure(case, options.rounds, not options.no_exact) for case in cases]
    if options.write:
        command = f"python -m benchmarks.bench_probe --rounds {options.rounds}"
        write_result(options.write, "probe", markdown(results, whole, command, conditions), conditions)
    return {"conditions": conditions, "results": [asdict(item) for item in results], WHOLE: whole}


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))

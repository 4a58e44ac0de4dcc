"""Studies made up of drawn predictions, with signal of a known strength."""

import dataclasses

import numpy as np

from gigatome.evaluation import metrics
from gigatome.evaluation.comparison import Comparison
from gigatome.evaluation.result import EvaluationResult, FoldScore, Predictions, score
from gigatome.evaluation.study import Arm, AttendedTile, FewShot, Study
from gigatome.evaluation.survival_result import SurvivalFold, SurvivalPredictions, SurvivalResult, SurvivalScores

NAN = float("nan")


def class_result(strength, *, classes=("IDC", "ILC"), n=300, folds=10, seed=0, **changes):
    """Predictions of ``n`` patients, some with two slides, with signal of the given strength."""
    truth = np.random.default_rng(7)
    patient = np.sort(np.r_[np.arange(n), truth.choice(n, n // 5, replace=False)])
    weights = np.array([2.5, *[1.0] * (len(classes) - 1)])
    y = truth.choice(len(classes), n, p=weights / weights.sum())[patient]
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(y), len(classes))) + strength * np.eye(len(classes))[y]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = tuple(f"TCGA-{k:04}" for k in patient)
    fold = patient % folds
    scores = []
    for k in range(folds):
        inside = fold == k
        values = metrics.auroc(y[inside], p[inside]), metrics.balanced_accuracy(y[inside], p[inside])
        scores.append(FoldScore(k, int((~inside).sum()), int(inside.sum()), *values))
    result = EvaluationResult(
        target="subtype",
        head="abmil",
        options={"hidden": 384, "gated": True, "dropout": 0.25},
        encoder="vits16",
        level="slide",
        classes=tuple(classes),
        n_slides=len(y),
        n_patients=n,
        scores=score(y, p, names, seed=0, resamples=200),
        by_slide={},
        folds=tuple(scores),
        predictions=Predictions(
            tuple(f"{name}-DX{i}" for i, name in enumerate(names)), names, np.full(len(y), -1), fold, y, p
        ),
        seed=0,
        split=f"{folds} stratified folds of patients, seed 0",
        split_hash="3f7a9c0d2b1e4f56",
        unlabelled=3,
        without_embeddings=(),
    )
    return dataclasses.replace(result, **changes)


def survival_result(strength, *, n=260, folds=5, seed=0):
    rng = np.random.default_rng(7)
    hazard = rng.normal(size=n)
    event_at, leave_at = rng.exponential(60 * np.exp(-strength * hazard)), rng.exponential(70, n)
    time, event = np.minimum(event_at, leave_at) + 0.1, event_at <= leave_at
    risk = hazard + 0.3 * np.random.default_rng(seed).normal(size=n)
    fold = np.arange(n) % folds
    names = tuple(f"TCGA-{k:04}" for k in range(n))
    return SurvivalResult(
        target="survival_months, event if censorship = 0",
        unit="months",
        head="abmil",
        options={"alpha": 0.0, "bins": 4},
        encoder="vits16",
        level="patient",
        n_slides=n + 40,
        n_patients=n,
        scores=SurvivalScores(
            n,
            int(event.sum()),
            0.683,
            (0.62, 0.74),
            0.671,
            (0.61, 0.73),
            (12.0, 36.0, 60.0),
            (0.71, 0.69, NAN),
            2e-5,
            hazard_ratio=1.9,
            hazard_ratio_ci=(1.4, 2.6),
        ),
        folds=tuple(SurvivalFold(k, n * 4 // 5, n // 5, 20, 0.66 + 0.02 * k) for k in range(folds)),
        predictions=SurvivalPredictions(names, names, fold, time, event, risk, risk > 0, *[np.zeros((n, 0))] * 2),
        seed=0,
        split="5 stratified folds of patients, seed 0",
        split_hash="aa01",
        excluded={"no time": 2},
    )


def tissue(seed, side=128):
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (232, 190, 215), np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for _ in range(40):
        y, x, r = rng.integers(0, side), rng.integers(0, side), rng.integers(3, 8)
        image[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = (110, 60, 140)
    return image


def class_study(**changes):
    arms = (
        Arm("ABMIL on vits16", class_result(2.2, seed=1), reported=0.874, reported_sd=0.06, source="HIPT, Table 1"),
        Arm("CLAM-SB on vits16", class_result(2.0, seed=2), reported=0.858, reported_sd=0.067, source="HIPT, Table 1"),
        Arm("Mean pooling, linear", class_result(1.4, seed=3)),
        Arm("ABMIL, permuted labels", class_result(0.0, seed=4), null=True),
    )
    pairs = ((0, 1, 0.021, 0.21), (0, 2, 0.071, 0.004), (0, 3, 0.40, 0.0002))
    comparisons = tuple(
        Comparison(arms[a].label, arms[b].label, "auroc", "bootstrap", v, (v - 0.045, v + 0.04), p, min(1, 3 * p))
        for a, b, v, p in pairs
    )
    rng = np.random.default_rng(0)
    few = tuple(
        FewShot(arm.label, n, tuple(0.5 + level * (1 - n**-0.4) + 0.03 * rng.normal(size=5)), per_class=True)
        for arm, level in zip(arms[:3], (0.45, 0.42, 0.33), strict=True)
        for n in (1, 2, 4, 8, 16, 32)
    )
    tiles = tuple(
        AttendedTile(f"TCGA-{k // 4:04}", 1024 * k, 2048, 0.02 / (k + 1), top, tissue(k), "ILC, predicted ILC")
        for top in (True, False)
        for k in range(12)
    )
    study = Study(
        title="subtype on brca.csv",
        arms=arms,
        comparisons=comparisons,
        few_shot=few,
        tiles=tiles,
        settings={
            "splits": {"kind": "kfold", "folds": 10, "group": "patient", "seed": 0},
            "fit": {"epochs": 20, "lr": 2e-4, "clip": None, "sampling": "balanced"},
            "embeddings": {"encoder": "vits16", "mpp": 0.5, "tile_size": 256},
        },
        excluded={"no label": ("TCGA-9001", "TCGA-9002"), "no embeddings": tuple(f"TCGA-8{k:03}" for k in range(60))},
        command="gigatome evaluate emb/vits16 --labels brca.csv --target subtype --head abmil --folds 10",
    )
    return dataclasses.replace(study, **changes)


def survival_study(**changes):
    arms = (Arm("ABMIL on vits16", survival_result(0.8, seed=1)), Arm("Cox on mean", survival_result(0.8, seed=9)))
    return dataclasses.replace(Study(title="survival on brca.csv", arms=arms), **changes)

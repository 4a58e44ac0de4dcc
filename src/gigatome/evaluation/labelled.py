"""Tiles as picture files with a label each, and how well embeddings tell their classes apart."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigatome.core.errors import EvaluationError
from gigatome.core.seeding import generator
from gigatome.evaluation.metrics import balanced_accuracy
from gigatome.evaluation.probes import Knn, LinearProbe, fit_predict
from gigatome.evaluation.splits import Fold, patient_folds

_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"))
_SPLITS = ("train", "test", "val")


@dataclass(frozen=True, eq=False)
class LabelledTiles:
    """Pictures, their classes, and which of them the classifiers learn from and are tested on.

    Attributes:
        paths: of the pictures, N.
        labels: int64 [N], 0 … C − 1.
        classes: names of the C classes, sorted.
        folds: indices of the pictures to learn from and of those to test, as often as there are folds; no picture is
            tested twice.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]

    def images(self, size: int, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Pictures ``start`` to ``stop``, uint8 [n, size, size, 3] RGB: the shorter side is scaled, the middle kept.

        Raises:
            EvaluationError: one cannot be read.
        """
        paths = self.paths[start:stop]
        images = np.empty((len(paths), size, size, 3), np.uint8)
        for index, path in enumerate(paths):
            images[index] = _read(path, size)
        return images

    def accuracy(self, embeddings: ArrayLike, *, neighbours: int = 20) -> dict[str, float]:
        """Balanced accuracy of the tested pictures, ``knn`` (cosine) and ``linear`` (logistic regression).

        Args:
            embeddings: [N, D], of the pictures in their order.
            neighbours: of kNN; no more than there are pictures to learn from.

        Raises:
            EvaluationError: some embeddings are not finite.
        """
        x = np.asarray(embeddings, np.float64)
        if not np.isfinite(x).all():
            raise EvaluationError("some embeddings are not finite")
        fewest = min(len(train) for train, _ in self.folds)
        tested = np.concatenate([test for _, test in self.folds])
        found: dict[str, float] = {}
        for name, probe in (("knn", Knn(min(neighbours, fewest))), ("linear", LinearProbe())):
            p = [
                fit_predict(probe, x[train], self.labels[train], x[test], len(self.classes))
                for train, test in self.folds
            ]
            found[name] = balanced_accuracy(self.labels[tested], np.concatenate(p))
        return found


def read_labelled(source: str | Path, *, limit: int | None = None, seed: int = 0) -> LabelledTiles:
    """Finds labelled pictures.

    Without a split of their own they are tested in four folds, or fewer if a class has fewer groups. Name the slide, or
    better the patient, of each picture in a CSV's column ``group``: pictures of one group stay on one side. Without it,
    tiles of one slide are on both, and the accuracy is too high; good enough to watch a run, not to report.

    Args:
        source: a folder of ``CLASS/*.png`` (or jpg, tif, bmp, webp), or of ``train/CLASS`` and ``test/CLASS`` (or
            ``val/CLASS``); or a CSV with columns ``path`` (relative to the CSV), ``label``, and, if wanted, ``split``
            (train, test, val) and ``group``. Where there are both test and val, val is left out.
        limit: take at most about so many pictures, drawn at random, of each class and part its share.
        seed: of the drawing and the split.

    Raises:
        EvaluationError: nothing is found there, there are fewer than two classes, or a class lacks pictures to learn
            from or to test.
    """
    source = Path(source)
    if not source.exists():
        raise EvaluationError(f"{source}: there is no such folder or CSV of labelled tiles")
    rows = sorted(_in_folder(source) if source.is_dir() else _in_csv(source))
    classes = tuple(sorted({row.label for row in rows}))
    if len(classes) < 2:
        raise EvaluationError(
            f"{source}: holds {len(rows)} pictures of {len(classes)} classes, and at least two are needed; "
            "expected is CLASS/*.png, train/CLASS/*.png and test/CLASS/*.png, or a CSV with columns path and label"
        )
    given = {row.split for row in rows} - {""}
    parts = ("train", "test" if "test" in given else "val")
    rows = _thinned([row for row in rows if not given or row.split in parts], limit, seed)
    labels = np.array([classes.index(row.label) for row in rows], np.int64)
    if given:
        train, test = (np.flatnonzero([row.split == part for row in rows]) for part in parts)
        folds = ((train, test),)
    else:
        folds = _folds(rows, source, seed)
    for part, indices in (("learn from", folds[0][0]), ("test", np.concatenate([test for _, test in folds]))):
        missing = np.setdiff1d(np.arange(len(classes)), labels[indices])
        if len(missing):
            raise EvaluationError(f"{source}: class {classes[missing[0]]} has no picture to {part}")
    return LabelledTiles(tuple(row.path for row in rows), labels, classes, folds)


@dataclass(frozen=True, order=True)
class _Row:
    path: Path
    label: str
    split: str = ""
    group: str = ""


def _in_folder(folder: Path) -> Iterator[_Row]:
    splits = [name for name in _SPLITS if (folder / name).is_dir()]
    for split in splits if len(splits) > 1 else [""]:
        for path in (folder / split).glob("*/**/*"):
            kind = path.relative_to(folder / split).parts[0]
            if path.suffix.lower() in _SUFFIXES and not kind.startswith("."):
                yield _Row(path, kind, split)


def _in_csv(table: Path) -> Iterator[_Row]:
    with table.open(newline="", encoding="utf-8-sig") as handle:
        for number, row in enumerate(csv.DictReader(handle), start=2):
            split = (row.get("split") or "").strip()
            if not row.get("path") or not row.get("label"):
                raise EvaluationError(f"{table}: line {number} lacks a path or a label; these columns are needed")
            if split not in ("", *_SPLITS):
                raise EvaluationError(f"{table}: line {number}: split is {split}, and must be train, test or val")
            yield _Row(table.parent / row["path"], row["label"].strip(), split, (row.get("group") or "").strip())


def _thinned(rows: Sequence[_Row], limit: int | None, seed: int) -> list[_Row]:
    """About ``limit`` of the rows, of each class and part its share and at least two."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    sizes = Counter((row.label, row.split) for row in rows)
    room = {key: max(2, round(limit * size / len(rows))) for key, size in sizes.items()}
    kept: list[_Row] = []
    for index in generator(seed, "labelled", "limit").permutation(len(rows)).tolist():
        key = rows[index].label, rows[index].split
        if room[key]:
            room[key] -= 1
            kept.append(rows[index])
    return sorted(kept)


def _folds(rows: Sequence[_Row], source: Path, seed: int) -> tuple[Fold, ...]:
    groups = [row.group or str(row.path) for row in rows]
    labels = [row.label for row in rows]
    fewest = min(len({g for g, label in zip(groups, labels, strict=True) if label == kind}) for kind in set(labels))
    try:
        return tuple(patient_folds(groups, labels, max(2, min(4, fewest)), seed))
    except EvaluationError as error:
        raise EvaluationError(f"{source}: cannot be split; {str(error).replace('patients', 'groups')}") from error


def _read(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    if image is None:
        raise EvaluationError(f"{path}: is no picture that can be read")
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = max(size, round(width * scale)), max(size, round(height * scale))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return cv2.cvtColor(image[top : top + size, left : left + size], cv2.COLOR_BGR2RGB)  # pyright: ignore[reportReturnType]

"""Folders and tables of labelled tiles, and the accuracy of embeddings on them."""

import csv

import cv2
import numpy as np
import pytest

from gigatome.core.errors import EvaluationError
from gigatome.evaluation.labelled import read_labelled


def write(path, value=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((size, size, 3), value, np.uint8)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def table(path, rows):
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 pictures, as grey as their numbers."""
    for number in range(24):
        write(tmp_path / "tiles" / ("tumour" if number % 2 else "normal") / "deeper" / f"{number}.png", number)
    (tmp_path / "tiles" / "normal" / "notes.txt").write_text("no picture")
    write(tmp_path / "tiles" / ".trash" / "a.png")
    return tmp_path / "tiles"


def test_a_folder_a_class(folder):
    tiles = read_labelled(folder)
    assert tiles.classes == ("normal", "tumour")
    assert sorted(tiles.labels.tolist()) == [0] * 12 + [1] * 12
    assert len(tiles.folds) == 4
    assert sorted(np.concatenate([test for _, test in tiles.folds])) == list(range(24))
    for train, test in tiles.folds:
        assert sorted([*train, *test]) == list(range(24))
        assert np.bincount(tiles.labels[test]).tolist() == [3, 3]
    numbers = [int(path.stem) for path in tiles.paths]
    assert [number % 2 for number in numbers] == tiles.labels.tolist()
    assert tiles.images(8)[:, 4, 4, 0].tolist() == numbers
    assert tiles.images(8, 22, 30).shape == (2, 8, 8, 3)


def test_the_split_depends_on_the_seed_alone(folder, tmp_path):
    first, again, other = (read_labelled(folder, seed=seed).folds[0][1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    folder.rename(tmp_path / "elsewhere")
    assert read_labelled(tmp_path / "elsewhere").folds[0][1].tolist() == first


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_a_folder_with_its_own_split(tmp_path, parts):
    for part in parts:
        for kind in "ab":
            for number in range(3):
                write(tmp_path / part / kind / f"{number}.jpg")
    tiles = read_labelled(tmp_path)
    assert tiles.classes == ("a", "b")
    names = [path.parts[-3] for path in tiles.paths]
    ((train, test),) = tiles.folds
    assert {names[i] for i in train} == {"train"}
    assert {names[i] for i in test} == {parts[-1]}
    assert len(names) == 12  # val is left out where there is a test


def test_a_table_with_groups_keeps_each_on_one_side(tmp_path):
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2], "group": f"slide{n % 8}"} for n in range(40)]
    tiles = read_labelled(table(tmp_path / "tiles.csv", rows))
    slides = [int(path.stem) % 8 for path in tiles.paths]
    for train, test in tiles.folds:
        assert not {slides[i] for i in train} & {slides[i] for i in test}
        assert len(test) == 10
    assert tiles.paths[0].parent == tmp_path


def test_a_table_with_a_split(tmp_path):
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2], "split": ("train", "test")[n >= 6]} for n in range(10)]
    tiles = read_labelled(table(tmp_path / "tiles.csv", rows))
    ((_, test),) = tiles.folds
    assert sorted(int(tiles.paths[i].stem) for i in test) == [6, 7, 8, 9]


def test_a_limit_takes_each_class_its_share(tmp_path):
    rows = [{"path": f"{n}.png", "label": "a" if n < 300 else "b"} for n in range(400)]
    path = table(tmp_path / "tiles.csv", rows)
    tiles = read_labelled(path, limit=40)
    assert np.bincount(tiles.labels).tolist() == [30, 10]
    assert tiles.paths == read_labelled(path, limit=40).paths != read_labelled(path, limit=40, seed=1).paths
    assert len(read_labelled(path, limit=400).paths) == 400


def test_other_shapes_are_scaled_and_cropped(tmp_path):
    image = np.zeros((30, 60, 3), np.uint8)
    image[:, 15:45, 0] = 200  # the middle square is red
    for number in (0, 2):
        cv2.imwrite(str(tmp_path / f"{number}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        write(tmp_path / f"{number + 1}.png", 77, size=5)
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2]} for n in range(4)]
    tiles = read_labelled(table(tmp_path / "tiles.csv", rows))
    red, grey = (tiles.images(10)[tiles.labels == label][0] for label in (0, 1))
    assert red.shape == grey.shape == (10, 10, 3)
    assert (red == [200, 0, 0]).all()
    assert (grey == 77).all()


def test_accuracy_is_that_of_the_test_part_alone(tmp_path):
    """Embeddings that know the class, but the other way round in the test part."""
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2], "split": ("train", "test")[n >= 20]} for n in range(30)]
    tiles = read_labelled(table(tmp_path / "tiles.csv", rows))
    numbers = np.array([int(path.stem) for path in tiles.paths])
    known = np.eye(4)[tiles.labels ^ (numbers >= 20)] + np.random.default_rng(0).normal(0, 0.1, (30, 4))
    assert tiles.accuracy(known, neighbours=3) == {"knn": 0.0, "linear": 0.0}


def test_accuracy_of_embeddings_that_know_and_that_do_not(folder):
    tiles = read_labelled(folder)
    rng = np.random.default_rng(0)
    known = rng.normal(size=(24, 6)) + 8 * np.eye(6)[tiles.labels]
    assert tiles.accuracy(known, neighbours=3) == {"knn": 1.0, "linear": 1.0}
    said_nothing = tiles.accuracy(rng.normal(size=(24, 6)), neighbours=3)
    assert all(0.2 < value < 0.8 for value in said_nothing.values())
    assert set(tiles.accuracy(known, neighbours=500)) == {"knn", "linear"}  # no more neighbours than there are
    with pytest.raises(EvaluationError, match="not finite"):
        tiles.accuracy(known * np.nan)


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(EvaluationError, match="there is no such folder or CSV"):
        read_labelled(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds 0 pictures of 0 classes"):
        read_labelled(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="line 2 lacks a path or a label"):
        read_labelled(table(tmp_path / "a.csv", [{"path": "a.png", "class": "x"}]))
    with pytest.raises(EvaluationError, match="line 2: split is dev"):
        read_labelled(table(tmp_path / "b.csv", [{"path": "a.png", "label": "x", "split": "dev"}]))
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2], "split": "train" if n else "test"} for n in range(4)]
    with pytest.raises(EvaluationError, match="class b has no picture to test"):
        read_labelled(table(tmp_path / "c.csv", rows))
    rows = [{"path": f"{n}.png", "label": "ab"[n == 3]} for n in range(4)]
    with pytest.raises(EvaluationError, match="cannot be split"):
        read_labelled(table(tmp_path / "d.csv", rows))
    (tmp_path / "0.png").write_bytes(b"no picture")
    rows = [{"path": f"{n}.png", "label": "ab"[n % 2]} for n in range(4)]
    with pytest.raises(EvaluationError, match="is no picture that can be read"):
        read_labelled(table(tmp_path / "e.csv", rows)).images(8)

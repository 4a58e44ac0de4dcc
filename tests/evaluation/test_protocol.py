"""The whole evaluation on embeddings made up for it: what it finds, what it must not find, and what it refuses."""

import csv
import json
import math

import numpy as np
import pytest

from gigatome.core.errors import CohortError, EvaluationError, StoreError
from gigatome.core.job import Job
from gigatome.embeddings.store import Bag, EmbeddingStore, write_bag
from gigatome.evaluation import protocol
from gigatome.evaluation.probes import Knn
from gigatome.evaluation.result import compare
from gigatome.slides.cohort import Cohort, CohortSlide

DIM = 6


def evaluate(*args, folds=5, **options):
    return protocol.evaluate(*args, folds=folds, **options)


def make_store(folder, vectors, *, tiles=4, spread=0.5, seed=0, encoder="enc"):
    """A store with ``tiles`` tiles of each slide, scattered about its vector and with that very mean."""
    directory = Job(folder).tiles(256, 0.5)
    for k, (name, vector) in enumerate(vectors.items()):
        noise = np.random.default_rng([seed, k]).normal(size=(tiles, len(vector)), scale=spread)
        embeddings = (vector + noise - (noise.mean(0) if tiles else 0)).astype(np.float32)
        coords = np.stack([np.arange(tiles), np.zeros(tiles)], 1).astype(np.int64)
        write_bag(directory.features(encoder) / f"{name}.h5", Bag(name, encoder, coords, embeddings))
    return EmbeddingStore(folder, directory, encoder)


def make_cohort(patients, labels, column="subtype"):
    return Cohort(
        tuple(
            CohortSlide(f"{i:03}.svs", f"{i:03}", patient, None, {column: label})
            for i, (patient, label) in enumerate(zip(patients, labels, strict=True))
        ),
        "test cohort",
    )


def two_classes(folder, *, shift, patients=40, slides=2, seed=0, encoder="enc", **options):
    """Patients of two classes, whose vectors differ by ``shift`` along one direction."""
    rng = np.random.default_rng(seed)
    names = [f"p{i:02}" for i in range(patients) for _ in range(slides)]
    labels = ["ab"[i % 2] for i in range(patients) for _ in range(slides)]
    own = rng.normal(size=(patients, DIM))
    x = np.repeat(own, slides, 0) + 0.3 * rng.normal(size=(len(names), DIM))
    x[:, 0] += shift * (np.array(labels) == "b")
    cohort = make_cohort(names, labels)
    store = make_store(folder, dict(zip((s.name for s in cohort), x, strict=True)), encoder=encoder, **options)
    return store, cohort


@pytest.mark.parametrize("head", ["linear", "knn", "giga", "hipt", Knn(k=7)])
def test_a_difference_that_is_there_is_found(tmp_path, head):
    store, cohort = two_classes(tmp_path, shift=5)
    seen = []
    result = evaluate(store, cohort, target="subtype", head=head, progress=lambda *event: seen.append(event))
    assert result.auroc > 0.9
    assert result.auroc_ci[0] > 0.8
    assert result.auroc_ci[0] <= result.auroc <= result.auroc_ci[1]
    assert result.balanced_accuracy > 0.8
    assert result.balanced_accuracy_ci[0] <= result.balanced_accuracy <= result.balanced_accuracy_ci[1]
    assert (result.n_slides, result.n_patients, result.classes) == (80, 40, ("a", "b"))
    assert [fold.fold for fold in result.folds] == [0, 1, 2, 3, 4]
    assert all(fold.n_train + fold.n_test == 80 for fold in result.folds)
    mean, deviation = result.fold_auroc
    aurocs = [fold.auroc for fold in result.folds]
    assert (mean, deviation) == (pytest.approx(np.mean(aurocs)), pytest.approx(np.std(aurocs, ddof=1)))
    assert seen == [("evaluate", k + 1, 5) for k in range(5)]


def test_nothing_is_found_in_nothing(tmp_path):
    """Labels drawn by lot, two encoders of noise: no AUROC but one half, and no encoder better than the other."""
    first, cohort = two_classes(tmp_path, shift=0, slides=1, encoder="first")
    second, _ = two_classes(tmp_path, shift=0, slides=1, encoder="second", seed=1)
    patients, draws, aurocs, covered, different = [slide.patient for slide in cohort], 40, [], 0, 0
    for seed in range(draws):
        lot = np.random.default_rng(seed).permutation(np.arange(40) % 2)
        drawn = make_cohort(patients, ["ab"[lot[int(patient[1:])]] for patient in patients])
        a, b = (evaluate(store, drawn, target="subtype", seed=seed, resamples=300) for store in (first, second))
        aurocs += [a.auroc, b.auroc]
        covered += a.auroc_ci[0] <= 0.5 <= a.auroc_ci[1]
        different += compare(a, b, resamples=300).p < 0.05
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.05)
    assert covered >= 0.85 * draws
    assert different <= 0.1 * draws


@pytest.mark.parametrize(("level", "head"), [("slide", "knn"), ("slide", "linear"), ("tile", "knn")])
def test_a_patient_known_from_other_slides_is_no_help(tmp_path, level, head):
    """Slides of a patient are copies, and labels are drawn by lot: a leak would score near 1."""
    rng = np.random.default_rng(0)
    own, lot = rng.normal(size=(40, DIM)) * 10, rng.permutation(np.arange(40) % 2)
    patients = [f"p{i}" for i in range(40) for _ in range(3)]
    cohort = make_cohort(patients, ["ab"[lot[i]] for i in range(40) for _ in range(3)])
    vectors = {slide.name: own[i // 3] for i, slide in enumerate(cohort)}
    store = make_store(tmp_path, vectors, tiles=2, spread=0.01)
    result = evaluate(store, cohort, target="subtype", head=head, level=level, resamples=200)
    assert 0.3 < result.auroc < 0.7
    leaking = make_cohort([slide.name for slide in cohort], [slide.labels["subtype"] for slide in cohort])
    assert evaluate(store, leaking, target="subtype", head=Knn(2), level=level, resamples=200).auroc > 0.85


def test_several_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = ["2", "10", "1"] * 12
    cohort = make_cohort([f"p{i}" for i in range(36)], labels)
    place = {"1": 0, "2": 1, "10": 2}
    vectors = {s.name: rng.normal(size=DIM) + 4 * np.eye(DIM)[place[s.labels["subtype"]]] for s in cohort}
    result = evaluate(make_store(tmp_path, vectors), cohort, target="subtype", folds=4)
    assert result.classes == ("1", "2", "10")
    assert result.auroc > 0.9
    assert result.predictions.probabilities.shape == (36, 3)


def test_predictions_are_by_classifiers_that_have_not_seen_the_patient(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5)
    result = evaluate(store, cohort, target="subtype")
    rows = result.predictions
    assert sorted(rows.slides) == [slide.name for slide in cohort]
    of = {slide.name: slide.patient for slide in cohort}
    assert all(of[slide] == patient for slide, patient in zip(rows.slides, rows.patients, strict=True))
    folds = {}
    for patient, fold in zip(rows.patients, rows.folds, strict=True):
        assert folds.setdefault(patient, fold) == fold
    np.testing.assert_allclose(rows.probabilities.sum(1), 1)


def test_results_depend_on_the_seed_alone(tmp_path):
    store, cohort = two_classes(tmp_path, shift=1)
    first, again = (evaluate(store, cohort, target="subtype", seed=1) for _ in range(2))
    assert first.to_dict() == again.to_dict()
    other = evaluate(store, cohort, target="subtype", seed=2)
    assert other.split_hash != first.split_hash


def test_leave_one_patient_out(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    result = evaluate(store, cohort, target="subtype", folds="patient")
    assert len(result.folds) == 12
    assert result.split == "leave one patient out"
    assert result.auroc > 0.9
    assert all(math.isnan(value) for value in result.fold_auroc)  # one patient has one class
    assert result.to_dict()["fold_auroc"] == {"mean": None, "sd": None}


def write_split(path, names, patients, train, test):
    """A split in Patho-Bench's form."""
    side = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
    rows = [f"{patients[i]}\t{name}\t{side.get(i, '')}" for i, name in enumerate(names)]
    path.write_text("\n".join(["case_id\tslide_id\tfold_0", *rows]))


def test_folds_from_a_table(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    names, patients = [s.name for s in cohort], [s.patient for s in cohort]
    test = np.flatnonzero([p in ("p00", "p01", "p02", "p03") for p in patients])
    train = np.flatnonzero([p > "p05" for p in patients])  # p04 and p05 are in neither
    write_split(tmp_path / "folds.tsv", names, patients, train, test)
    result = evaluate(store, cohort, target="subtype", folds=tmp_path / "folds.tsv")
    assert (result.n_slides, result.n_patients, len(result.folds)) == (8, 4, 1)
    assert result.split == "1 split of folds.tsv"


def test_folds_from_a_table_must_allow_learning(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    names, patients = [s.name for s in cohort], [s.patient for s in cohort]
    labels = [s.labels["subtype"] for s in cohort]
    train, test = (np.flatnonzero([label == kind for label in labels]) for kind in "ab")
    write_split(tmp_path / "folds.tsv", names, patients, train, test)
    with pytest.raises(EvaluationError, match="fold 0 leaves no b to learn from"):
        evaluate(store, cohort, target="subtype", folds=tmp_path / "folds.tsv")
    write_split(tmp_path / "few.tsv", names, patients, np.r_[4, 6:24], np.array([0, 1, 5]))
    with pytest.raises(EvaluationError, match="p02"):
        evaluate(store, cohort, target="subtype", folds=tmp_path / "few.tsv")
    write_split(tmp_path / "few.tsv", names, patients, np.arange(8, 24), np.array([0, 1, 4, 5]))
    with pytest.raises(EvaluationError, match="all folds together have no b to test"):
        evaluate(store, cohort, target="subtype", folds=tmp_path / "few.tsv")


def test_tiles_as_samples(tmp_path):
    """Six classes of a few slides each, one slide a patient, as in the developers' six organs."""
    rng = np.random.default_rng(0)
    cohort = make_cohort([f"p{i}" for i in range(14)], [f"organ{i % 6}" for i in range(14)], "organ")
    vectors = {s.name: rng.normal(size=16) + 2 * np.eye(16)[i % 6] for i, s in enumerate(cohort)}
    store = make_store(tmp_path, vectors, tiles=30, spread=2)
    options = {"target": "organ", "level": "tile", "folds": "patient", "tiles_per_slide": 20}
    result = evaluate(store, cohort, **options, resamples=300)
    assert result.scores.n == 14 * 20
    assert (result.n_slides, result.level) == (14, "tile")
    assert set(result.by_slide) == {"mean", "majority"}
    assert all(scores.n == 14 for scores in result.by_slide.values())
    assert result.by_slide["mean"].accuracy >= result.scores.accuracy > 1 / 6
    rows = result.predictions
    for name in set(rows.slides):
        tiles = rows.tiles[[slide == name for slide in rows.slides]]
        assert len(set(tiles.tolist())) == 20
        assert tiles.max() < 30
    again = evaluate(store, cohort, **options, resamples=300)
    np.testing.assert_array_equal(again.predictions.tiles, rows.tiles)
    assert evaluate(store, cohort, **options, seed=1, resamples=10).predictions.tiles.tolist() != rows.tiles.tolist()
    assert evaluate(store, cohort, **{**options, "tiles_per_slide": None}, resamples=10).scores.n == 14 * 30


def test_slide_scores_of_tiles_are_mean_and_majority(tmp_path):
    store, cohort = two_classes(tmp_path, shift=2, patients=10, slides=1, tiles=5, spread=3)
    result = evaluate(store, cohort, target="subtype", level="tile", resamples=10)
    rows, right = result.predictions, {"mean": 0, "majority": 0}
    for name in set(rows.slides):
        mine = np.array([slide == name for slide in rows.slides])
        p, y = rows.probabilities[mine], rows.y[mine][0]
        right["mean"] += p.mean(0).argmax() == y
        right["majority"] += np.bincount(p.argmax(1), minlength=2).argmax() == y
    assert {how: scores.accuracy * 10 for how, scores in result.by_slide.items()} == pytest.approx(right)


def test_slides_without_label_or_embeddings_are_counted_and_left_out(tmp_path, caplog):
    store, cohort = two_classes(tmp_path, shift=5)
    slides = [
        *cohort.slides[:70],
        *(CohortSlide(s.uri, s.name, s.patient, None, {"subtype": ""}) for s in cohort.slides[70:]),
        CohortSlide("new.svs", "new", "p90", None, {"subtype": "a"}),
        CohortSlide("empty.svs", "empty", "p91", None, {"subtype": "a"}),
        CohortSlide("nan.svs", "nan", "p92", None, {"subtype": "c"}),
    ]
    coords = np.zeros((1, 2), np.int64)
    write_bag(store.path("empty"), Bag("empty", "enc", coords[:0], np.zeros((0, DIM), np.float32)))
    write_bag(store.path("nan"), Bag("nan", "enc", coords, np.full((1, DIM), np.nan, np.float32)))
    for level in ("slide", "tile"):
        result = evaluate(store, Cohort(tuple(slides), "cohort"), target="subtype", level=level, resamples=10)
        assert result.n_slides == 70
        assert result.unlabelled == 10
        assert result.without_embeddings == ("empty", "nan", "new")
        assert result.classes == ("a", "b")
        for told in ("no tiles: empty", "embeddings that are not finite: nan", "no embeddings: new"):
            assert f"cohort: 1 are left out, {told}" in caplog.text


def test_labels_from_a_table_that_does_not_know_where_the_slides_lie(tmp_path):
    """As `gigatome evaluate STORE --labels CSV` meets it: TRIDENT's and CLAM's tables name slides alone."""
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    lines = ["case_id,slide_id,label", *(f"{s.patient},{s.name},{s.labels['subtype']}" for s in cohort)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    result = evaluate(store, tmp_path / "labels.csv", target="label")
    assert (result.n_slides, result.n_patients) == (24, 12)
    by_patient = ["patient,outcome", *(f"p{i:02},{'ab'[i % 2]}" for i in range(12))]
    (tmp_path / "cohort.csv").write_text(
        "\n".join(["slide,patient", *(f"slides/{s.name}.svs,{s.patient}" for s in cohort)])
    )
    (tmp_path / "outcome.csv").write_text("\n".join(by_patient))
    joined = Cohort.read(tmp_path / "cohort.csv", labels=tmp_path / "outcome.csv")
    assert evaluate(store, joined, target="outcome").split_hash == result.split_hash
    with pytest.raises(CohortError):
        evaluate(store, tmp_path / "none.csv", target="label")


def test_store_from_a_folder(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    assert evaluate(tmp_path, cohort, target="subtype").encoder == store.encoder
    with pytest.raises(StoreError, match="holds no tile embeddings"):
        evaluate(tmp_path / "none", cohort, target="subtype")


def test_a_label_column_that_does_not_exist(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    with pytest.raises(CohortError, match="subtipe"):
        evaluate(store, cohort, target="subtipe")


def test_a_class_with_one_patient(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    labels = ["rare" if s.patient == "p03" else s.labels["subtype"] for s in cohort]
    rare = make_cohort([s.patient for s in cohort], labels)
    for folds in (3, "patient"):
        with pytest.raises(EvaluationError, match="class rare is in one patient only"):
            evaluate(store, rare, target="subtype", folds=folds)


def test_fewer_patients_than_folds(tmp_path):
    store, cohort = two_classes(tmp_path, shift=5, patients=8)
    with pytest.raises(EvaluationError, match="use 4 folds"):
        evaluate(store, cohort, target="subtype", folds=5)


def test_no_slide_in_common(tmp_path):
    store, _ = two_classes(tmp_path, shift=5, patients=8)
    strangers = Cohort(tuple(CohortSlide(f"{n}.svs", n, n, None, {"subtype": n}) for n in "xyz"), "others")
    with pytest.raises(EvaluationError, match=r"3: no embeddings.* are the names the same\?"):
        evaluate(store, strangers, target="subtype")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "abmill"}, "there is no head abmill"),
        ({"level": "region"}, "there is no level region"),
        ({"level": "tile", "tiles_per_slide": 0}, "tiles_per_slide must be at least 1"),
        ({"folds": 1}, "at least 2 folds"),
        ({"folds": "nowhere.tsv"}, "cannot be read"),
    ],
)
def test_options_that_do_not_do(tmp_path, options, message):
    store, cohort = two_classes(tmp_path, shift=5, patients=12)
    with pytest.raises(EvaluationError, match=message):
        evaluate(store, cohort, target="subtype", **options)


def test_saved_as_json_and_csv(tmp_path):
    store, cohort = two_classes(tmp_path / "job", shift=5, patients=12)
    result = evaluate(store, cohort, target="subtype", folds=3)
    result.save(tmp_path / "out" / "result.json")
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved["scores"]["auroc"] == result.auroc
    assert saved["options"] == {"C": 1.0, "scale": True, "balanced": False, "max_iter": 1000}
    assert saved["split_hash"] == result.split_hash
    rows = list(csv.DictReader((tmp_path / "out" / "result.csv").open()))
    assert list(rows[0]) == ["slide", "patient", "fold", "subtype", "predicted", "p_a", "p_b"]
    right = np.mean([row["predicted"] == row["subtype"] for row in rows])
    assert right == pytest.approx(result.scores.accuracy)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["result.csv", "result.json"]
    tiles = evaluate(store, cohort, target="subtype", folds=3, level="tile", resamples=10)
    tiles.save(tmp_path / "tiles.json")
    assert (tmp_path / "tiles.csv").read_text().startswith("slide,tile,patient,fold,subtype,predicted,p_a,p_b\n")


def test_an_encoder_that_is_better_is_said_to_be(tmp_path):
    good, cohort = two_classes(tmp_path, shift=2.5, encoder="good")
    poor, _ = two_classes(tmp_path, shift=0, encoder="poor")
    results = [evaluate(store, cohort, target="subtype") for store in (good, poor)]
    difference = compare(*results)
    assert difference.value == pytest.approx(results[0].auroc - results[1].auroc)
    assert difference.ci[0] > 0
    assert difference.p < 0.01
    assert compare(*results, metric="balanced_accuracy").value > 0
    backwards = compare(*results[::-1])
    assert backwards.ci[1] < 0
    assert compare(results[0], results[0]).p == 1.0


def test_results_on_other_slides_are_not_compared(tmp_path):
    store, cohort = two_classes(tmp_path, shift=2)
    first = evaluate(store, cohort, target="subtype")
    for other in (
        evaluate(store, cohort, target="subtype", seed=1),
        evaluate(store, cohort, target="subtype", level="tile", resamples=10),
        evaluate(store, cohort.select([s.name for s in cohort.slides[:60]]), target="subtype"),
    ):
        with pytest.raises(EvaluationError, match="are not on the same slides, labels and folds"):
            compare(first, other)

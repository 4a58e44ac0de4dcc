"""The task of far motifs is what it says, only dilated attention can solve it, and both scripts run."""

import pytest

from gigatome.slides.synthetic import SyntheticOptions, make_cohort

torch = pytest.importorskip("torch")

from benchmarks import longvit_works as works  # noqa: E402 - needs torch
from benchmarks import real_longvit as real  # noqa: E402 - likewise

TOKENS, MOTIF = 512, 32


@pytest.fixture(scope="module")
def task():
    return works.Task.of_seed(0, works.parser().parse_args(["--tokens", str(TOKENS), "--motif", str(MOTIF)]))


@pytest.fixture(scope="module")
def found(task):
    """Sequences, labels, and of each sequence and direction the tokens that are moved in it."""
    x, y = task.batch(400)
    moved = (x - task.background) @ task.directions.flatten(0, 1).T > works.STRENGTH / 2
    return x, y, moved


def test_each_sequence_has_one_motif_of_each_two_and_the_label_says_whether_they_match(found):
    x, y, moved = found
    assert x.shape == (400, TOKENS, works.DIM)
    assert torch.equal(moved[..., :2].sum((1, 2)), torch.full((400,), MOTIF))
    assert torch.equal(moved[..., 2:].sum((1, 2)), torch.full((400,), MOTIF))
    there = moved.any(1)
    assert torch.equal(y.bool(), (there[:, 0] & there[:, 2]) | (there[:, 1] & there[:, 3]))


def test_motifs_are_rows_of_tokens_too_far_apart_for_a_window(found):
    _, _, moved = found
    for sequence in moved:
        first, second = (sequence[:, at].any(1).nonzero().flatten() for at in (slice(0, 2), slice(2, 4)))
        assert first.max() - first.min() == second.max() - second.min() == MOTIF - 1
        assert abs(int(first.min() - second.min())) >= TOKENS // 4
        assert not set((first // works.WINDOW).tolist()) & set((second // works.WINDOW).tolist())


def test_one_motif_says_nothing_of_the_label(found):
    _, y, moved = found
    there = moved.any(1)
    for kind in range(4):
        shares = [there[y == label, kind].float().mean() for label in (0, 1)]
        assert abs(shares[0] - 0.5) < 0.12  # of about 200
        assert abs(shares[1] - 0.5) < 0.12


@pytest.mark.parametrize(
    ("arm", "joined"), [("dilated attention", True), ("local windows", False), ("mean pooling", False)]
)
def test_only_dilated_attention_can_join_two_motifs(task, arm, joined):
    """A sum of a function of each motif has no interaction; with one at most in a window, two arms are such a sum."""
    torch.manual_seed(1)
    model = works.Classifier(*works.arms(TOKENS)[arm]).double().eval()
    background = task.background + works.NOISE * torch.randn(TOKENS, works.DIM)
    logits = torch.empty(2, 2, dtype=torch.float64)
    for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x = background.clone()
        x[:MOTIF] += works.STRENGTH * task.directions[0, first]
        x[-MOTIF:] += works.STRENGTH * task.directions[1, second]
        logits[first, second] = model(x[None].double()).detach()
    interaction = float(abs(logits[0, 0] + logits[1, 1] - logits[0, 1] - logits[1, 0]))
    assert logits.std() > 1e-4
    assert interaction > 1e-6 if joined else interaction < 1e-12


def test_longvit_works(tmp_path):
    size = ("--tokens", TOKENS, "--motif", MOTIF, "--steps", 2, "--batch-size", 4, "--test", 32, "--seeds", 2)
    out = works.run(works.parser().parse_args([*map(str, size), "--write", str(tmp_path)]))
    assert [item["arm"] for item in out["summary"]] == list(works.arms(TOKENS))
    assert len({item["parameters"] for item in out["summary"]}) == 1
    (written,) = tmp_path.glob("longvit-works_*_??????.md")
    assert "| local windows | 2 | " in written.read_text(encoding="utf-8")


def test_a_window_that_could_hold_both_motifs_is_refused():
    with pytest.raises(SystemExit, match="must not hold two motifs"):
        works.run(works.parser().parse_args(["--tokens", "256"]))


def test_real_longvit(tmp_path, monkeypatch, capsys):
    options = SyntheticOptions(width=1024, height=1024, mpp=0.5, pen=0, bubbles=0, fat=0, pale=0)
    make_cohort(tmp_path, patients=4, slides_per_patient=1, options=options)
    size = ("--size", 64, "--patch-size", 8, "--dim", 32, "--depth", 1, "--heads", 4, "--mpp", 1, "--local-views", 2)
    length = ("--steps", 2, "--batch-size", 4, "--seeds", 1, "--untrained-seeds", 2, "--regions-per-slide", 16)
    places = ("--target", "subtype", "--runs", tmp_path / "runs", "--write", tmp_path / "out")
    arguments = map(str, (tmp_path / "cohort.csv", *size, *length, *places))
    monkeypatch.setattr("sys.argv", ["real_longvit", *arguments])
    real.main()
    printed = capsys.readouterr().out
    assert printed.count('"arm": "untrained", "seed"') == 2
    (written,) = (tmp_path / "out").glob("longvit-tissue_*_??????.md")
    text = written.read_text(encoding="utf-8")
    assert "| untrained | 2 | " in text
    assert "| LongViT, DINO | 1 | " in text
    assert " from the first five steps to the last, without " in text

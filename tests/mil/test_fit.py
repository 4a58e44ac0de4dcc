"""The loop: it learns, counts every bag alike however it is packed, and survives steps that are not finite."""

from typing import final

import numpy as np
import pytest
import torch
from torch import nn

from gigatome.core.errors import ConfigError, EvaluationError, RunError
from gigatome.mil.fit import BagFitOptions, fit_bags, predict_bags
from gigatome.mil.losses import cox, cross_entropy, risk, survival_nll
from gigatome.mil.model import BagModel, BagOutput, Targets
from gigatome.mil.packs import balanced, packs
from gigatome.mil.source import ArrayBags

DIM = 6
ALL = np.arange(40)
PLAIN = BagFitOptions(epochs=3, lr=1e-2)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@final
class TinyAbmil(BagModel):
    """Attention over the instances, a bag at a time."""

    def __init__(self, outputs=2, dropout=0.0):
        super().__init__()
        self.hidden, self.score, self.head = nn.Linear(DIM, 8), nn.Linear(8, 1, bias=False), nn.Linear(8, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, bags):
        hidden = self.dropout(self.hidden(bags.x).relu())
        weights = torch.cat([part.softmax(0) for part in self.score(hidden).split(bags.sizes.tolist())])
        pooled = torch.stack([part.sum(0) for part in (weights * hidden).split(bags.sizes.tolist())])
        return BagOutput(self.head(pooled), weights)


def tiny(outputs=2, dropout=0.0, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return TinyAbmil(outputs, dropout)


@pytest.fixture(scope="module")
def data():
    """40 bags of 3 to 20 instances; in bags of class 1 half of them are shifted."""
    random = np.random.default_rng(0)
    y = random.permutation(np.arange(40) % 2)
    bags = [random.normal(size=(random.integers(3, 21), DIM)).astype(np.float32) for _ in y]
    for bag, label in zip(bags, y, strict=True):
        bag[: -(-len(bag) // 2), 0] += 5 * label
    return ArrayBags(bags, [f"slide-{i}" for i in range(40)]), Targets(torch.from_numpy(y))


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(data, options=PLAIN, **arguments):
    model = tiny(dropout=arguments.pop("dropout", 0.0))
    fit = fit_bags(model, *data, cross_entropy(), options, **{"train": ALL, "seed": 1, **arguments})
    return model, fit


def test_learns_what_generalises(data):
    source, targets = data
    model, fit = trained(data, BagFitOptions(epochs=15, lr=1e-2), train=ALL[:28])
    assert [epoch.epoch for epoch in fit.history] == list(range(1, 16))
    assert fit.best_epoch == 15
    assert fit.history[-1].loss < 0.3 * fit.history[0].loss
    assert not model.training
    logits = predict_bags(model, source, ALL[28:]).logits
    assert logits.shape == (12, 2)
    assert logits.dtype == np.float64
    assert (logits.argmax(1) == targets.y[28:].numpy()).mean() >= 10 / 12


def test_the_same_seed_gives_the_same_weights(data):
    before = torch.get_rng_state()
    first, again, other = (weights_of(trained(data, seed=seed, dropout=0.3)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("split", [{"max_instances": 25}, {"max_instances": 1}, {"batch_bags": 4, "accumulate": 2}])
def test_packing_does_not_change_the_gradient(data, split):
    whole, fit = trained(data, BagFitOptions(epochs=3, lr=1e-2, batch_bags=8))
    cut, same = trained(data, BagFitOptions(**{"epochs": 3, "lr": 1e-2, "batch_bags": 8, **split}))
    torch.testing.assert_close(weights_of(cut), weights_of(whole), atol=1e-5, rtol=1e-5)
    assert same.history[-1].loss == pytest.approx(fit.history[-1].loss, abs=1e-5)
    one = weights_of(trained(data, BagFitOptions(epochs=3, lr=1e-2, batch_bags=1))[0])
    assert not torch.allclose(one, weights_of(whole), atol=1e-3)


def test_a_step_is_adams_on_the_mean_over_bags(data):
    source, targets = data
    model, reference = tiny(), tiny()
    options = BagFitOptions(epochs=1, lr=1e-2, weight_decay=0.0, batch_bags=8, max_instances=30)
    fit_bags(model, source, targets, cross_entropy(), options, train=ALL[:8], seed=0)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    loss = sum(
        nn.functional.cross_entropy(reference(source.batch(ALL[i : i + 1])).logits, targets.y[i : i + 1])
        for i in range(8)
    )
    (loss / 8).backward()
    optimizer.step()
    torch.testing.assert_close(weights_of(model), weights_of(reference), atol=1e-5, rtol=1e-4)


def test_packs_keep_order_and_limits():
    sizes = np.array([5, 5, 9, 30, 1, 1, 1, 1])
    cut = packs(np.array([3, 0, 1, 2, 4, 5, 6, 7]), sizes, bags=3, instances=12)
    assert [pack.tolist() for pack in cut] == [[3], [0, 1], [2, 4, 5], [6, 7]]
    assert packs(np.zeros(0, np.int64), sizes, 3, 12) == []


def test_prediction_is_of_each_bag_alone(data):
    source, _ = data
    model = tiny(dropout=0.5)
    indices = np.array([7, 3, 30, 3])
    options = BagFitOptions(max_instances=24)
    predicted = predict_bags(model, source, indices, options, attention=True)
    assert model.training
    model.eval()
    for row, bag in enumerate(indices):
        alone = model(source.batch(np.array([bag])))
        np.testing.assert_allclose(predicted.logits[row], alone.logits[0].detach(), atol=1e-6)
        np.testing.assert_allclose(predicted.attention[row], alone.attention.detach(), atol=1e-6)
        assert predicted.attention[row].shape == (source.sizes[bag], 1)
        assert predicted.attention[row].sum() == pytest.approx(1, abs=1e-5)
    assert predict_bags(model, source, indices, options).attention is None
    assert len(predict_bags(model, source, []).logits) == 0


@pytest.mark.parametrize(
    ("losses", "best", "epochs"), [([0.7, 0.0, 0.9, 0.8, 0.5], 2, 4), ([np.nan, 0.7, 0.6, 0.8, 0.9, 0.5], 3, 5)]
)
def test_the_lowest_validation_loss_may_be_nothing(data, monkeypatch, losses, best, epochs):
    given = iter(losses)
    monkeypatch.setattr("gigatome.mil.fit._Training.val_loss", lambda *_: next(given))
    options = BagFitOptions(epochs=len(losses), patience=2, select="best")
    fit = fit_bags(tiny(), *data, cross_entropy(), options, train=ALL[:30], val=ALL[30:], seed=0)
    assert (fit.best_epoch, len(fit.history)) == (best, epochs)


def test_comparing_losses_say_when_there_is_nothing_to_compare(data, caplog):
    source, targets = data
    lives = Targets(targets.y, torch.arange(1.0, 41.0), torch.ones(40, dtype=torch.bool))
    options = BagFitOptions(epochs=1, batch_bags=8, max_instances=2)
    with pytest.raises(ConfigError, match="raise max_instances"):
        fit_bags(tiny(1), source, lives, cox(), options, train=ALL, seed=0)
    fit_bags(tiny(1), source, lives, cox(), BagFitOptions(epochs=2, batch_bags=8, max_instances=40), train=ALL, seed=0)
    assert caplog.text.count("compared within a part only") == 1


def test_best_epoch_and_patience(data):
    source, targets = data
    # labels of the validation bags are wrong, so that its loss rises as the training goes on
    flipped = Targets(torch.cat([targets.y[:28], 1 - targets.y[28:]]))
    options = BagFitOptions(epochs=30, lr=1e-2, patience=2, select="best")
    model = tiny()
    fit = fit_bags(model, source, flipped, cross_entropy(), options, train=ALL[:28], val=ALL[28:], seed=1)
    losses = [epoch.val_loss for epoch in fit.history]
    assert fit.best_epoch == np.argmin(losses) + 1
    assert len(losses) == fit.best_epoch + 2 < 30
    logits = torch.from_numpy(predict_bags(model, source, ALL[28:]).logits)
    assert nn.functional.cross_entropy(logits, flipped.y[28:]).item() == pytest.approx(min(losses), abs=1e-6)
    last = fit_bags(
        tiny(), source, flipped, cross_entropy(), BagFitOptions(epochs=4), train=ALL[:28], val=ALL[28:], seed=1
    )
    assert last.best_epoch == 4
    assert all(epoch.val_loss is not None for epoch in last.history)


def test_balanced_draws_each_kind_as_often():
    y = torch.tensor([0] * 90 + [1] * 10)
    event = torch.arange(100) < 45
    train, random = np.arange(100), np.random.default_rng(0)
    drawn = np.concatenate([balanced(train, Targets(y), random) for _ in range(40)])
    assert len(drawn) == 4000
    assert np.mean(drawn >= 90) == pytest.approx(0.5, abs=0.04)
    drawn = np.concatenate([balanced(train, Targets(y, y.float(), event), random) for _ in range(40)])
    shares = [np.mean(drawn < 45), np.mean((drawn >= 45) & (drawn < 90)), np.mean(drawn >= 90)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    assert set(balanced(np.array([95, 3]), Targets(y), random)) <= {95, 3}


def test_balanced_sampling_is_used(data):
    source, _ = data
    targets = Targets((torch.arange(40) < 4).long())
    shuffled, _ = trained((source, targets), BagFitOptions(epochs=8, lr=3e-3))
    even, _ = trained((source, targets), BagFitOptions(epochs=8, lr=3e-3, sampling="balanced"))
    share = [np.mean(np.diff(predict_bags(model, source, ALL).logits)[:, 0] > 0).item() for model in (shuffled, even)]
    assert share[0] < 0.2
    assert share[1] > share[0] + 0.1


def test_instances_are_drawn_anew_in_training_only(data):
    source, targets = data
    seen = []

    class Watched(BagModel):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(DIM, 2)

        def forward(self, bags):
            seen.append((self.training, bags.x.clone(), bags.sizes.tolist()))
            sums = torch.zeros(len(bags), DIM).index_add_(0, bags.bag, bags.x)
            return BagOutput(self.head(sums))

    big = int(source.sizes.argmax())
    model = Watched()
    options = BagFitOptions(epochs=3, instances=5)
    fit_bags(model, source, targets, cross_entropy(), options, train=np.array([big]), seed=0)
    predict_bags(model, source, [big], options)
    assert [sizes for _, _, sizes in seen] == [[5], [5], [5], [source.sizes[big]]]
    whole = {tuple(row) for row in seen[-1][1].tolist()}
    draws = [frozenset(tuple(row) for row in x.tolist()) for training, x, _ in seen if training]
    assert all(len(draw) == 5 and draw <= whole for draw in draws)
    assert len(set(draws)) == 3


def rates(options, epochs=4):
    model = tiny()
    bags = ArrayBags([np.ones((2, DIM))] * 5)
    targets = Targets(torch.tensor([0, 1, 0, 1, 0]))
    fit = fit_bags(model, bags, targets, cross_entropy(), options, train=np.arange(5), seed=0)
    return [epoch.lr for epoch in fit.history]


def test_schedules():
    assert rates(BagFitOptions(epochs=4, lr=0.1)) == [0.1] * 4
    assert rates(BagFitOptions(epochs=4, lr=0.1, warmup=2)) == pytest.approx([0.05, 0.1, 0.1, 0.1])
    falling = rates(BagFitOptions(epochs=4, lr=0.1, schedule="cosine"))
    # the last of 5 steps of each epoch, of 20
    assert falling == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 20)) for step in (4, 9, 14, 19)])


@final
class Spoilt(BagModel):
    """Its loss is NaN for bags that hold a value above 100."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(DIM, 2)

    def forward(self, bags):
        sums = torch.zeros(len(bags), DIM).index_add_(0, bags.bag, bags.x)
        return BagOutput(self.head(sums) / (sums.amax(1, keepdim=True) < 100))


def spoilt_bags(count):
    bags = [np.full((2, DIM), 1000.0 if i < count else 1.0) for i in range(8)]
    return ArrayBags(bags, [f"slide-{i}" for i in range(8)]), Targets(torch.arange(8) % 2)


def test_a_step_that_is_not_finite_is_passed_over():
    model, clean = Spoilt(), Spoilt()
    clean.load_state_dict(model.state_dict())
    source, targets = spoilt_bags(1)
    fit = fit_bags(model, source, targets, cross_entropy(), PLAIN, train=np.arange(8), seed=0)
    assert [epoch.skipped for epoch in fit.history] == [1, 1, 1]
    assert all(np.isfinite(epoch.loss) for epoch in fit.history)
    assert torch.isfinite(weights_of(model)).all()
    assert not torch.equal(weights_of(model), weights_of(clean))
    with pytest.raises(RunError, match="not finite for slide-0"):
        predict_bags(model, source, np.arange(8))


def test_three_such_steps_end_the_training_and_name_the_bags():
    source, targets = spoilt_bags(8)
    model = Spoilt()
    before = weights_of(model)
    with pytest.raises(RunError, match=r"epoch 1: .*3 steps in a row, of slide-\d, slide-\d, slide-\d \(lr 0.01, fp32"):
        fit_bags(model, source, targets, cross_entropy(), PLAIN, train=np.arange(8), seed=0)
    assert torch.equal(weights_of(model), before)


def test_bf16_learns_the_same(data):
    source, targets = data
    options = BagFitOptions(epochs=15, lr=1e-2, precision="bf16")
    model, _ = trained(data, options, train=ALL[:28])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    logits = predict_bags(model, source, ALL[28:], options).logits
    assert (logits.argmax(1) == targets.y[28:].numpy()).mean() >= 10 / 12


@pytest.mark.parametrize("outputs", [1, 4])
def test_survival_losses_rank_patients(data, outputs):
    source, targets = data
    random = np.random.default_rng(3)
    time = torch.from_numpy(random.exponential(1.0, 40) * np.where(targets.y.numpy() > 0, 0.1, 1.0) + 0.01)
    event = torch.from_numpy(random.random(40) < 0.8)
    y = torch.bucketize(time, time.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)))
    survival = Targets(y, time, event)
    criterion, options = (cox(), 40) if outputs == 1 else (survival_nll(), 4)
    model = tiny(outputs)
    fit = fit_bags(
        model,
        source,
        survival,
        criterion,
        BagFitOptions(epochs=60 if outputs == 1 else 20, lr=2e-2, batch_bags=options),
        train=ALL,
        seed=0,
    )
    assert fit.history[-1].loss < fit.history[0].loss
    risks = risk(torch.from_numpy(predict_bags(model, source, ALL).logits)).numpy()
    assert risks[targets.y == 1].mean() > risks[targets.y == 0].mean() + 0.5


def test_refusals(data):
    source, targets = data
    for options, message in [
        (BagFitOptions(patience=2), "validation bags"),
        (BagFitOptions(select="best"), "validation bags"),
        (BagFitOptions(device="cuda:99"), "device cuda:99"),
    ]:
        with pytest.raises(ConfigError, match=message):
            trained(data, options)
    with pytest.raises(ConfigError, match="batch_bags"):
        fit_bags(tiny(1), source, targets, cox(), PLAIN, train=ALL, seed=0)
    with pytest.raises(EvaluationError, match="no training bag"):
        trained(data, train=ALL[:0])
    with pytest.raises(EvaluationError, match=r"2 bags are in both .*: slide-3, slide-4"):
        trained(data, train=ALL[:5], val=ALL[3:9])
    with pytest.raises(EvaluationError, match="40 bags and targets of 39"):
        fit_bags(tiny(), source, targets[torch.arange(39)], cross_entropy(), PLAIN, train=ALL, seed=0)
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"instances": 0}, {"warmup": 20}, {"clip": 0.0}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="must be"):
            BagFitOptions(**wrong)

"""What must hold of every model of bags."""

import itertools
from dataclasses import replace

import torch

from gigatome.mil import abmil, segments
from gigatome.mil.model import BagBatch


def make_bags(sizes=(5, 1, 40, 2, 17), dim=12, clusters=0, seed=0, dtype=torch.float32) -> BagBatch:
    """Bags of the given sizes of normal numbers, with clusters at random if any."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), dim, generator=random, dtype=dtype)
    return BagBatch(
        x,
        torch.tensor([0, *itertools.accumulate(sizes)]),
        clusters=torch.randint(clusters, (len(x),), generator=random) if clusters else None,
    )


def one_by_one(bags: BagBatch) -> list[BagBatch]:
    """Each bag as a batch of its own."""
    return [
        BagBatch(
            bags.x[start:end],
            torch.tensor([0, end - start]),
            clusters=None if bags.clusters is None else bags.clusters[start:end],
        )
        for start, end in itertools.pairwise(bags.bounds.tolist())
    ]


def seeded(make, seed=0):
    """The model that ``make`` makes, with weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def as_on_accelerator(monkeypatch):
    """Takes the path of a device whose bounds the host does not know."""
    monkeypatch.setattr(segments, "_spans", lambda bags: None)
    monkeypatch.setattr(abmil, "can_pool", lambda layers, x: False)


def check_model(model, bags: BagBatch, monkeypatch, *, idle=()):
    """Batches, attention, order, gradients, precision.

    Args:
        model: in evaluation mode.
        bags: its input, of several bags, one of them of one instance.
        monkeypatch: pytest's.
        idle: names of parameters without a gradient.
    """
    check_batch(model, bags)
    check_order(model, bags)
    gradients = check_gradients(model, bags, idle)
    with monkeypatch.context() as patch:
        as_on_accelerator(patch)
        check_batch(model, bags)
        for name, gradient in check_gradients(model, bags, idle).items():
            torch.testing.assert_close(gradient, gradients[name], atol=1e-4, rtol=1e-4, msg=name)
    check_bfloat16(model, bags)


def check_batch(model, bags):
    assert 1 in bags.sizes
    assert len(bags) > 2
    with torch.no_grad():
        output = model(bags)
        alone = [model(bag) for bag in one_by_one(bags)]
    torch.testing.assert_close(output.logits, torch.cat([each.logits for each in alone]), atol=1e-5, rtol=1e-5)
    assert output.logits.dtype == torch.float32
    assert len(torch.unique(output.logits, dim=0)) == len(bags)  # the bags do tell
    if output.attention is None:
        return
    assert output.attention.shape[0] == len(bags.x)
    torch.testing.assert_close(output.attention, torch.cat([each.attention for each in alone]), atol=1e-5, rtol=1e-5)
    sums = torch.zeros(len(bags), output.attention.shape[1]).index_add(0, bags.bag, output.attention)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (output.attention >= 0).all()


@torch.no_grad()
def check_order(model, bags):
    """The order of a bag's instances does not matter, and attention follows them."""
    random = torch.Generator().manual_seed(1)
    order = torch.cat(
        [start + torch.randperm(end - start, generator=random) for start, end in itertools.pairwise(bags.bounds)]
    )
    clusters = None if bags.clusters is None else bags.clusters[order]
    first, second = model(bags), model(replace(bags, x=bags.x[order], clusters=clusters))
    torch.testing.assert_close(second.logits, first.logits, atol=1e-5, rtol=1e-5)
    if first.attention is not None:
        torch.testing.assert_close(second.attention, first.attention[order], atol=1e-5, rtol=1e-5)


def check_gradients(model, bags, idle):
    model.zero_grad()
    output = model(bags)
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(2))
    (output.logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert without == {name for name in gradients if any(name.startswith(start) for start in idle)}
    return {name: gradient for name, gradient in gradients.items() if name not in without}


def check_bfloat16(model, bags):
    with torch.no_grad():
        exact = model(bags)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = model(bags)
    assert coarse.logits.dtype == torch.float32
    torch.testing.assert_close(coarse.logits, exact.logits, atol=0.05, rtol=0.05)
    if coarse.attention is not None:
        sums = torch.zeros(len(bags), coarse.attention.shape[1]).index_add(0, bags.bag, coarse.attention.float())
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)


def check_long(model, clusters=0):
    """A bag of 100,000 instances next to one of one: anything quadratic would need 40 GB."""
    bags = make_bags((100_000, 1), dim=8, clusters=clusters)
    output = model(bags)
    output.logits.sum().backward()
    assert output.logits.isfinite().all()


def check_keys(model, expected: dict[str, tuple[int, ...]]):
    """The authors' keys and shapes, neither more nor fewer."""
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected

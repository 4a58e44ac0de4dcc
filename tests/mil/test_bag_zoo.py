"""Every model by its name: what it takes, how it is described, and whose weights it loads."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.mil.clam import ClamOptions
from gigatome.mil.model import BagBatch
from gigatome.mil.zoo import (
    MODELS,
    authors_state,
    bag_model,
    build,
    graph_of,
    load_authors,
    model_options,
    model_spec,
)

DIM = 16


def bags(model, dim=DIM, instances=(5, 9, 1)):
    random = torch.Generator().manual_seed(0)
    total, ends = sum(instances), torch.tensor([0, *np.cumsum(instances)])
    edges = torch.stack([torch.arange(total), torch.arange(total)])
    return BagBatch(
        torch.randn(total, dim, generator=random),
        ends,
        torch.randint(0, 9000, (total, 2), generator=random),
        torch.randint(0, 10, (total,), generator=random),
        edges,
    )


PLAIN = [name for name in MODELS if not name.startswith("hipt") and name != "mcat"]


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_model_by_name(name):
    small = {"hidden": 64} if name == "transmil" else {}
    model = bag_model(name, DIM, 3, small, seed=1).eval()
    batch = bags(model)
    with torch.no_grad():
        logits = model(batch).logits
    assert logits.shape == (3, 3)
    again = build(model_spec(name, DIM, 3, small), seed=2).eval()
    with torch.no_grad():
        assert not torch.equal(again(batch).logits, logits)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(batch).logits, logits)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_options_exist(name):
    options, model = MODELS[name].load()
    assert isinstance(model_options(name), options)
    assert issubclass(model, torch.nn.Module)
    json.dumps(dict(model_spec(name, 384, 2).options))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mcat", {"omic_sizes": [3, 4], "hidden": 32}),
        ("abmil", {"hidden": 24, "late_fusion": {"omic_sizes": [3, 4], "hidden": 16}}),
    ],
)
def test_models_with_omics(name, overrides):
    model = bag_model(name, DIM, 4, overrides, seed=1).eval()
    assert model.needs == {"omics"}
    batch = replace(bags(model), omics=(torch.ones(3, 3), torch.arange(12.0).view(3, 4)))
    again = build(model_spec(name, DIM, 4, overrides), seed=2).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = model(batch).logits
        torch.testing.assert_close(again(batch).logits, logits)
    assert logits.shape == (3, 4)
    with pytest.raises(ConfigError, match="late_fusion: unknown key omics"):
        model_spec("abmil", DIM, 4, {"late_fusion": {"omics": 3}})


def test_seeds_decide_the_weights_and_leave_the_callers_generator():
    before = torch.get_rng_state()
    first, again, other = (
        torch.cat([p.detach().flatten() for p in bag_model("abmil", DIM, 2, seed=seed).parameters()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_options_and_variants():
    assert model_options("abmil").gated is False
    assert model_options("abmil_gated").gated is True
    assert model_options("clam_mb").multi_branch is True
    assert model_options("abmil_gated", {"hidden": 64}).hidden == 64
    hipt = model_options("clam_mb", {"variant": "hipt", "dropout": 0.5})
    assert hipt == replace(ClamOptions.hipt(), multi_branch=True, dropout=0.5)
    assert hipt != replace(ClamOptions(), multi_branch=True, dropout=0.5)
    assert bag_model("abmil", DIM, 2, {"hidden": 64}).feature_extractor_part2[0].out_features == 64


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("abmill", {}, "no slide-level model abmill; there are mean, max"),
        ("abmil", {"hiden": 3}, "unknown key hiden; did you mean hidden"),
        ("abmil", {"hidden": "many"}, "hidden"),
        ("abmil", {"variant": "hipt"}, "no variant hipt; there are mcat"),
        ("varmil", {"variant": "hipt"}, "it has none"),
    ],
)
def test_wrong_names_and_options(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        model_spec(name, DIM, 2, overrides)


def test_wrong_sizes():
    with pytest.raises(ConfigError, match="at least 1"):
        model_spec("abmil", 0, 2)


def test_graphs_are_as_the_options_say():
    graph = graph_of(model_options("patch_gcn", {"neighbours": 4}))
    assert (graph.on, graph.k) == ("coords", 4)
    assert graph_of(model_options("deep_graph_conv")).on == "embeddings"
    assert graph_of(model_options("abmil")) is None


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("legacy", [True, False])
def test_authors_weights(tmp_path, wrap, legacy):
    theirs = bag_model("clam_sb", DIM, 2, seed=5)
    state = {
        f"model.{key.replace('attention_net.', 'attention_net.module.')}": v for key, v in theirs.state_dict().items()
    }
    assert any(".module." in key for key in state)
    torch.save(wrap({**state}), tmp_path / "s.pt", _use_new_zipfile_serialization=not legacy)
    ours = bag_model("clam_sb", DIM, 2, seed=6)
    load_authors(tmp_path / "s.pt", ours)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_labels_of_clams_instance_loss_are_passed_over(tmp_path):
    theirs = bag_model("clam_sb", DIM, 2)
    torch.save({**theirs.state_dict(), "instance_loss_fn.labels": torch.arange(2)}, tmp_path / "s.pt")
    load_authors(tmp_path / "s.pt", bag_model("clam_sb", DIM, 2))
    save_file(dict(theirs.state_dict()), tmp_path / "s.safetensors")
    assert authors_state(tmp_path / "s.safetensors").keys() == theirs.state_dict().keys()


@dataclass
class Harmful:
    value: int = 0


def test_authors_files_that_are_refused(tmp_path):
    model = bag_model("abmil", DIM, 2)
    torch.save({"x": Harmful()}, tmp_path / "code.pt")
    with pytest.raises(StoreError, match="cannot be read as weights"):
        load_authors(tmp_path / "code.pt", model)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read as weights"):
        load_authors(tmp_path / "text.pt", model)
    with pytest.raises(StoreError, match="no such file"):
        load_authors(tmp_path / "none.pt", model)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(RunError, match="holds no weights"):
        load_authors(tmp_path / "empty.pt", model)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(RunError, match="but a list"):
        load_authors(tmp_path / "list.pt", model)
    torch.save(bag_model("abmil", DIM + 1, 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RunError, match="of another shape"):
        load_authors(tmp_path / "other.pt", model)

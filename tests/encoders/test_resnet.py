from dataclasses import replace

import pytest
import timm
import torch

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.resnet import ResNetEncoder, build_resnet, cut_resnet, restore_resnet
from gigatome.encoders.vit import EncoderConfig, TileEncoder, build_encoder
from gigatome.encoders.zoo import load_encoder, save_encoder

CONFIG = EncoderConfig(model="resnet18")
SMALL = EncoderConfig(model="test_resnet")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))


def test_it_computes_what_timm_computes(images):
    encoder = build_encoder(CONFIG, seed=1).eval()
    reference = timm.create_model("resnet18", num_classes=0).eval()
    reference.load_state_dict(encoder.vit.state_dict())
    assert isinstance(encoder, ResNetEncoder)
    assert isinstance(encoder, TileEncoder)
    assert (encoder.dim, encoder.name) == (512, "resnet18")
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), reference(images))


def test_torchvisions_weights_give_torchvisions_embeddings(tmp_path, images):
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet18().eval()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    encoder = build_encoder(replace(CONFIG, weights=str(tmp_path / "resnet18.pth")), seed=1).eval()
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), reference(images))


def test_layer_3_is_the_spatial_mean_of_what_the_whole_network_has_there(images):
    whole = build_resnet(CONFIG, seed=1).eval()
    cut = build_encoder(replace(CONFIG, model="resnet18.layer3"), seed=1).eval()
    cut.vit.load_state_dict({k: v for k, v in whole.vit.state_dict().items() if not k.startswith("layer4")})
    seen = []
    whole.vit.get_submodule("layer3").register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        whole(images)
        embeddings = cut(images)
    assert (cut.dim, embeddings.shape) == (256, (2, 256))
    torch.testing.assert_close(embeddings, seen[0].mean((2, 3)))
    copied = cut_resnet(whole, 3)
    assert copied.config.model == "resnet18.layer3"
    with torch.no_grad():
        assert torch.equal(copied(images), embeddings)


@pytest.mark.parametrize(("model", "dim"), [("resnet50.layer3", 1024), ("test_resnet.layer2", 48), ("resnet50", 2048)])
def test_dim_is_that_of_the_last_layer(model, dim):
    with torch.device("meta"):
        assert build_resnet(EncoderConfig(model=model), seed=0).dim == dim


def test_weights_come_from_the_seed_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, again, other = (build_resnet(SMALL, seed).vit.get_parameter("conv1.0.weight") for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("names", [("encoder_q", "encoder_k", "fc"), ("base_encoder", "momentum_encoder", "fc")])
@pytest.mark.parametrize("model", ["test_resnet", "test_resnet.layer3"])
def test_the_query_encoder_of_an_authors_checkpoint_is_loaded(tmp_path, images, names, model):
    query, key, head = names
    encoder, other = (build_resnet(SMALL, seed).eval() for seed in (1, 2))
    state = {f"module.{query}.{name}": value for name, value in encoder.vit.state_dict().items()}
    state |= {f"module.{key}.{name}": value for name, value in other.vit.state_dict().items()}
    state |= {f"module.{query}.{head}.0.weight": torch.zeros(3), "module.queue": torch.zeros(2, 3)}
    torch.save({"epoch": 200, "arch": "resnet", "state_dict": state}, tmp_path / "moco.pth.tar")
    loaded = build_encoder(replace(SMALL, model=model, weights=str(tmp_path / "moco.pth.tar")), seed=3).eval()
    expected = encoder if model == "test_resnet" else cut_resnet(encoder, 3)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected(images))


def test_a_saved_encoder_comes_back(tmp_path, images):
    encoder = build_resnet(replace(SMALL, model="test_resnet.layer3", mean=(0.1, 0.2, 0.3)), seed=1, name="mine").eval()
    card = save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    assert (card.name, card.dim, again.config) == ("mine", 192, encoder.config)
    with torch.no_grad():
        assert torch.equal(again(images), encoder(images))


def test_weights_of_another_network_are_refused(tmp_path):
    state = build_resnet(SMALL, 0).vit.state_dict()
    torch.save(state, tmp_path / "small.pth")
    with pytest.raises(RunError, match=r"small\.pth: the weights do not fit the model; .* missing"):
        build_resnet(replace(CONFIG, weights=str(tmp_path / "small.pth")), 0)
    with pytest.raises(RunError, match=r"made here: .* 1 missing: bn1\.weight"):
        restore_resnet(SMALL, {k: v for k, v in state.items() if k != "bn1.weight"}, source="made here", name="x")


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "hook": print}, tmp_path / "evil.pth")
    with pytest.raises(StoreError, match="cannot be read as weights"):
        build_resnet(replace(SMALL, weights=str(tmp_path / "evil.pth")), 0)


def test_what_only_transformers_have_is_refused():
    with pytest.raises(ConfigError, match="leave out dim, heads"):
        build_resnet(replace(SMALL, dim=32, heads=2), 0)
    encoder = build_resnet(SMALL, 0)
    for call in (encoder.attention, encoder.forward_tokens):
        with pytest.raises(ConfigError, match="choose a vision transformer"):
            call(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="no attention heads"):
        _ = encoder.heads


@pytest.mark.parametrize("model", ["test_vit", "resnet_misspelt", "resnet18.layer5"])
def test_what_is_no_resnet_is_refused(model):
    with pytest.raises(ConfigError):
        build_resnet(EncoderConfig(model=model), 0)


def test_a_network_that_is_cut_cannot_be_cut_later():
    with pytest.raises(ConfigError, match="has layers 1 to 2, not 3"):
        cut_resnet(build_resnet(replace(SMALL, model="test_resnet.layer2"), 0), 3)

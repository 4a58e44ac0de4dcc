import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders import longvit
from gigatome.encoders.longvit import LongVit, LongVitConfig, load_longvit, segments_for
from gigatome.encoders.weights import resize_grid

SIZES = {"patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "ffn_dim": 20, "grid": 4}
SMALL = LongVitConfig(segments=(4, 8), ratios=(1, 2), **SIZES)
FINE = LongVitConfig(segments=(4, 8), ratios=(1, 2), norm="finetune", **SIZES)


def model(config=SMALL, seed=0):
    """With parameters that are far from their initial values."""
    torch.manual_seed(seed)
    made = LongVit(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def pixels(height=20, width=28, batch=2):
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, height, width, 3), generator=random, dtype=torch.uint8)


def normalised(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def entering(made, images):
    """The tokens that enter the first block, at once: a convolution and an interpolated grid."""
    patches = made.patch_embed["proj"](images)
    grid = made.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    return (patches + F.interpolate(grid, size=patches.shape[2:], mode="bicubic")).flatten(2).mT


@pytest.mark.parametrize("most", [2**22, 2 * 28 * 4 * 2, 1])
def test_pixels_are_embedded_in_parts(monkeypatch, most):
    monkeypatch.setattr(longvit, "_PIXELS", most)
    made, rows = model(), []
    made.patch_embed["proj"].register_forward_hook(lambda _module, inputs, _out: rows.append(inputs[0].shape[2]))
    images = normalised(pixels())
    expected = made.norm(made.encoder(entering(made, images)))
    rows.clear()
    torch.testing.assert_close(made.forward_tokens(pixels()), expected)
    assert rows == {2**22: [20], 2 * 28 * 4 * 2: [8, 8, 4], 1: [4] * 5}[most]
    torch.testing.assert_close(made.forward_tokens(images), expected)
    torch.testing.assert_close(made(pixels()), expected.mean(1))


def test_gradients_reach_what_embeds_the_pixels(monkeypatch):
    monkeypatch.setattr(longvit, "_PIXELS", 300)
    made = model()
    parameters = made.patch_embed["proj"].weight, made.patch_embed["proj"].bias, made.pos_embed
    cotangent = torch.randn(2, 35, 12)
    wanted = torch.autograd.grad(made.encoder(entering(made, normalised(pixels()))), parameters, cotangent)
    found = torch.autograd.grad(made.encoder(made._embed(pixels())), parameters, cotangent)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-4)


def test_what_pixels_leave_behind_is_their_bytes():
    made, kept = model(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        made._embed(pixels(400, 400))
    assert not any(x.is_floating_point() and x.numel() >= 2 * 400 * 400 * 3 for x in kept)


def test_two_norms():
    pretrained, fine = model(), model(FINE)
    shared = {key: value for key, value in pretrained.state_dict().items() if not key.startswith("norm.")}
    fine.load_state_dict(shared, strict=False)
    torch.testing.assert_close(pretrained.norm(fine.forward_tokens(pixels())), pretrained.forward_tokens(pixels()))
    torch.testing.assert_close(fine(pixels()), fine.fc_norm(fine.forward_tokens(pixels()).mean(1)))
    assert (pretrained.norm.eps, fine.fc_norm.eps) == (1e-6, 1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (4, 40), (60, 8)])
def test_any_size(height, width):
    made = model()
    assert made(pixels(height, width)).shape == (2, 12)
    assert made.forward_tokens(pixels(height, width)).shape == (2, height * width // 16, 12)


def test_bfloat16():
    made = model()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(pixels())
    torch.testing.assert_close(found.float(), made(pixels()), rtol=0.1, atol=0.1)


def test_positions_as_in_pretraining():
    made = model(LongVitConfig(segments=(4, 8), ratios=(1, 2), pos_embed="dino", **SIZES))
    grid = made.pos_embed.detach().unflatten(1, (4, 4))
    for height, width in ((20, 28), (16, 32), (8, 8)):
        patches = made.patch_embed["proj"](normalised(pixels(height, width))).permute(0, 2, 3, 1)
        expected = patches + resize_grid(grid, height // 4, width // 4, how="dino")
        torch.testing.assert_close(made._embed(pixels(height, width)), expected.flatten(1, 2))
    patches = made.patch_embed["proj"](normalised(pixels(16, 16))).flatten(2).mT
    torch.testing.assert_close(made._embed(pixels(16, 16)), patches + made.pos_embed)


def test_sizes_that_are_no_patches():
    with pytest.raises(ConfigError, match="18 × 28 px do not divide into patches of 4 px"):
        model()(pixels(18, 28))
    with pytest.raises(ValueError, match=r"uint8 \[2, 3, 20, 28\]"):
        model()(pixels().permute(0, 3, 1, 2))


def test_bad_configurations():
    with pytest.raises(ConfigError, match="as many ratios as segments"):
        LongVitConfig(segments=(4, 8))
    with pytest.raises(ConfigError, match="not 384 of 5"):
        LongVitConfig(heads=5)
    with pytest.raises(ConfigError, match="std must be positive"):
        LongVitConfig(std=(0.2, 0.0, 0.2))
    with pytest.raises(ConfigError, match="patch_size 0"):
        LongVitConfig(patch_size=0)


@pytest.mark.parametrize(
    ("side", "last"), [(512, 1024), (1024, 1024), (1025, 16384), (8192, 65536), (32768, 1048576), (65536, 1048576)]
)
def test_segments_by_size(side, last):
    assert segments_for(side)[-1] == last
    assert LongVitConfig(image_size=side).encoder().attention.segments == segments_for(side)


def test_the_default_is_longvit_s():
    with torch.device("meta"):
        made = LongVit(LongVitConfig())
    layers = sum(parameter.numel() for parameter in made.encoder.parameters())
    assert layers == 12 * (4 * 384 * 385 + 2 * 384 * 1536 + 1536 + 384 + 2 * (3 * 384 + 1536))
    assert layers == pytest.approx(21.34e6, abs=5e3)
    assert made.pos_embed.shape == (1, 1024, 384)
    attention = made.config.encoder().attention
    assert (attention.segments, attention.ratios) == ((64, 128, 256, 512, 1024), (1, 2, 4, 8, 16))


def published(made):
    """As the authors' file has it."""
    teacher = {f"backbone.{key}": value for key, value in made.state_dict().items()}
    return {"teacher": teacher | {"head.mlp.0.weight": torch.zeros(4, 4)}, "epoch": 1}


def test_published_weights():
    made = model()
    before = torch.get_rng_state()
    loaded = load_longvit(published(made), SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert torch.equal(loaded(pixels()), made(pixels()))
    assert loaded.pos_embed.data_ptr() != made.pos_embed.data_ptr()


def test_published_weights_for_fine_tuning():
    made = model()
    loaded = load_longvit(published(made), FINE)
    mean = made.encoder(made._embed(pixels())).mean(1)
    torch.testing.assert_close(loaded(pixels()), F.layer_norm(mean, (12,), eps=1e-5))


def test_fine_tuned_weights(tmp_path):
    made = model(FINE)
    torch.save({"model": made.state_dict() | {"head.weight": torch.zeros(2, 12)}}, tmp_path / "fine.pth")
    loaded = load_longvit(tmp_path / "fine.pth", FINE)
    assert torch.equal(loaded(pixels()), made(pixels()))


def test_positions_of_another_grid():
    made = model()
    finer = LongVitConfig(segments=(4, 8), ratios=(1, 2), **(SIZES | {"grid": 7}))
    loaded = load_longvit(published(made), finer)
    grid = made.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(loaded.pos_embed.detach(), F.interpolate(grid, size=7, mode="bicubic").flatten(2).mT)
    torch.testing.assert_close(loaded(pixels(28, 28)), made(pixels(28, 28)))


def test_weights_of_another_model_are_refused(tmp_path):
    state = model().state_dict()
    state["encoder.layers.0.ffn.fc9.weight"] = state.pop("encoder.layers.0.ffn.fc1.weight")
    with pytest.raises(RunError, match=r"1 missing: encoder\.layers\.0\.ffn\.fc1\.weight; 1 unexpected: .*fc9"):
        load_longvit(state, SMALL)
    with pytest.raises(RunError, match=r"of another shape: pos_embed \(\[1, 17, 12\] in the file"):
        load_longvit(model().state_dict() | {"pos_embed": torch.zeros(1, 17, 12)}, SMALL)
    with pytest.raises(RunError, match=r"missing: norm\.bias, norm\.weight"):
        load_longvit(model(FINE).state_dict(), SMALL)
    with pytest.raises(StoreError, match="no such file"):
        load_longvit(tmp_path / "none.pth")

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gigatome.core.errors import ConfigError, RunError
from gigatome.encoders.hipt import VIT4096, encode_regions, load_vit4096
from gigatome.encoders.region_vit import RegionVit, RegionVitConfig
from gigatome.encoders.vit import EncoderConfig, build_encoder, unfuse_attention

SMALL = RegionVitConfig(input_dim=10, dim=12, depth=2, heads=3, grid=4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = RegionVit(SMALL).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def grids(rows, columns, batch=2):
    return torch.randn(batch, 10, rows, columns, generator=torch.Generator().manual_seed(1))


def test_blocks_are_timms(encoder):
    """The same weights in timm's transformer, with the projection in the place of its patches."""
    vit = VisionTransformer(
        img_size=4, patch_size=1, in_chans=10, num_classes=0, embed_dim=12, depth=2, num_heads=3, class_token=True
    ).eval()
    state = {key: value for key, value in encoder.state_dict().items() if not key.startswith("phi.")}
    missing, unexpected = vit.load_state_dict(state, strict=False)
    assert set(missing) == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not unexpected
    x = grids(4, 4)
    vit.patch_embed = nn.Identity()
    tokens = encoder.phi(x.flatten(2).mT)
    expected = vit.forward_features(tokens)
    torch.testing.assert_close(encoder(x), expected[:, 0])
    torch.testing.assert_close(encoder.forward_tokens(x)[1], expected[:, 1:])


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 5), (3, 7), (1, 1), (2, 9)])
def test_any_grid(encoder, rows, columns):
    x = grids(rows, columns)
    assert encoder(x).shape == (2, 12)
    assert encoder.forward_tokens(x)[1].shape == (2, rows * columns, 12)
    attention = encoder.attention(x)
    assert attention.shape == (2, 3, rows, columns)
    assert (attention.sum((2, 3)) < 1).all()


def test_rows_are_not_columns(encoder):
    x = grids(3, 5)
    assert not torch.allclose(encoder(x), encoder(x.mT), atol=1e-4)


def test_positions_are_interpolated_with_gradients(encoder):
    encoder(grids(6, 3)).sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 0


def test_tiles_that_are_not_there_change_nothing(encoder):
    x = grids(4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(encoder(x, mask), encoder(x))
    mask[0, 2:] = False
    other = x.clone()
    other[0, :, 2:] = 7
    torch.testing.assert_close(encoder(other, mask), encoder(x, mask))
    assert not torch.allclose(encoder(x, mask)[0], encoder(x)[0], atol=1e-3)
    torch.testing.assert_close(encoder(x, mask)[1], encoder(x)[1])
    attention = encoder.attention(x, mask)
    assert (attention[0, :, 2:] == 0).all()
    assert (attention[0, :, :2] > 0).all()
    assert encoder(x, torch.zeros_like(mask)).isfinite().all()  # nothing there: the class token sees itself


def test_attention_is_the_one_that_is_used(encoder):
    """The last block's output of the class token, made again from the weights."""
    x = grids(4, 4)
    entered = []
    encoder.blocks[-1].attn.register_forward_hook(lambda _module, inputs, out: entered.append((inputs[0], out)))
    encoder(x)
    normed, out = entered[0]
    attn = encoder.blocks[-1].attn
    value = attn.qkv(normed).unflatten(2, (3, 3, 4))[:, :, 2]
    weights = encoder.attention(x).flatten(2)
    weights = torch.cat([1 - weights.sum(2, keepdim=True), weights], 2)
    again = attn.proj(torch.einsum("bhn,bnhd->bhd", weights, value).flatten(1))
    torch.testing.assert_close(again, out[:, 0])


def test_grids_of_other_embeddings_are_refused(encoder):
    with pytest.raises(ValueError, match=r"\[B, 10, rows, columns\]"):
        encoder(torch.zeros(2, 11, 4, 4))


def test_the_default_is_the_released_model():
    encoder = RegionVit(VIT4096)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 2_781_504
    assert len(encoder.state_dict()) == 78


def test_drop_path_grows_and_acts_in_training_only():
    torch.manual_seed(0)
    encoder = RegionVit(RegionVitConfig(input_dim=10, dim=12, depth=3, heads=3, grid=4), drop_path=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in encoder.blocks] == pytest.approx([0, 0.2, 0.4])
    x = grids(4, 4, batch=32)
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))


def test_weights_of_another_model_are_refused(encoder):
    with pytest.raises(RunError, match="do not fit the model"):
        load_vit4096(dict(encoder.state_dict()))


def test_loading_draws_no_random_numbers_and_copies():
    weights = RegionVit(VIT4096).state_dict()
    before = torch.get_rng_state()
    loaded = load_vit4096({"teacher": {f"module.backbone.{key}": value for key, value in weights.items()}})
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert torch.equal(loaded.pos_embed, weights["pos_embed"])
    assert loaded.pos_embed.data_ptr() != weights["pos_embed"].data_ptr()


def test_regions_are_encoded_from_whole_tiles_in_the_middle(encoder):
    tiles = build_encoder(
        EncoderConfig("vit_tiny_patch16_224", image_size=64, patch_size=64, dim=10, depth=1, heads=2), seed=0
    ).eval()
    images = torch.randn(2, 3, 600, 800, generator=torch.Generator().manual_seed(0))
    grid, regions = encode_regions(tiles, encoder, images, batch_size=5)
    assert grid.shape == (2, 2, 3, 10)
    with torch.inference_mode():
        one = tiles(images[1:, :, 44 + 256 : 44 + 512, 16 + 512 : 16 + 768])
        torch.testing.assert_close(grid[1, 1, 2], one[0])
        torch.testing.assert_close(regions, encoder(grid.permute(0, 3, 1, 2)))


def test_regions_smaller_than_a_tile_are_refused(encoder):
    with pytest.raises(ConfigError, match="200 × 800"):
        encode_regions(None, encoder, torch.zeros(1, 3, 200, 800))


def test_attention_by_products_is_the_fused_one(encoder):
    grids, mask = torch.randn(3, 10, 4, 4), torch.rand(3, 4, 4) < 0.6
    fused = encoder(grids), encoder(grids, mask)
    unfuse_attention(encoder)
    assert not any(getattr(module, "fused_attn", False) for module in encoder.modules())
    torch.testing.assert_close((encoder(grids), encoder(grids, mask)), fused)

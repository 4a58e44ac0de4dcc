import numpy as np
import pytest
import torch
from torch import nn

from gigatome import config
from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders.vit import EncoderConfig, build_encoder

TINY = EncoderConfig(model="vit_tiny_patch16_224", image_size=64, patch_size=8, dim=32, depth=2, heads=2)
VARIANTS = {
    "plain": TINY,
    "registers, LayerScale, no embedding of the class": EncoderConfig(
        "vit_small_patch14_reg4_dinov2", image_size=70, dim=32, depth=2, heads=2
    ),
    "SwiGLU": EncoderConfig("vit_giant_patch14_reg4_dinov2", image_size=70, dim=32, depth=2, heads=2),
    "what DINOv2 adds, to a plain model": EncoderConfig(
        **{**vars(TINY), "registers": 3, "ffn": "swiglu", "layer_scale": 1e-5}
    ),
    "norm before the blocks": EncoderConfig("vit_base_patch16_clip_224", image_size=64, dim=32, depth=2, heads=2),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def encoder(request):
    return build_encoder(request.param, seed=0).eval()


@pytest.fixture(scope="module", params=[(5, 5), (4, 4), (3, 7)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def images(request, encoder):
    height, width = (side * encoder.patch_size for side in request.param)
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, height, width), np.float32))


def test_tokens_are_timms(encoder, images):
    with torch.inference_mode():
        expected = encoder.vit.forward_features(images)
        embeddings = encoder(images)
        classes, patches = encoder.forward_tokens(images)
    torch.testing.assert_close(embeddings, expected[:, 0])
    torch.testing.assert_close(classes, expected[:, 0])
    torch.testing.assert_close(patches, expected[:, encoder.vit.num_prefix_tokens :])
    assert embeddings.shape == (2, encoder.dim)


def test_attention_is_the_one_that_is_used(encoder, images):
    used = []
    attn = encoder.vit.blocks[-1].attn
    attn.fused_attn = False
    hook = attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: used.append(output))
    with torch.inference_mode():
        encoder.vit.forward_features(images)
        attention = encoder.attention(images)
    hook.remove()
    rows, columns = images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size
    assert attention.shape == (2, attn.num_heads, rows, columns)
    torch.testing.assert_close(attention.flatten(2), used[0][:, :, 0, encoder.vit.num_prefix_tokens :])
    assert (attention.sum((2, 3)) < 1).all()  # the class token attends to itself too


def test_attention_sees_norms_of_queries_and_keys():
    encoder = build_encoder(TINY, seed=0).eval()
    attn = encoder.vit.blocks[-1].attn
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = encoder.attention(images)
        attn.q_norm, attn.k_norm = nn.LayerNorm(attn.head_dim), nn.LayerNorm(attn.head_dim)
        attn.fused_attn = False
        used = []
        attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: used.append(output))
        encoder(images)
        after = encoder.attention(images)
    torch.testing.assert_close(after.flatten(2), used[0][:, :, 0, 1:])
    assert not torch.allclose(before, after)


def test_attention_of_other_blocks_is_refused():
    encoder = build_encoder(
        EncoderConfig("vit_small_patch16_18x2_224", image_size=32, dim=32, depth=2, heads=2), seed=0
    )
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    with pytest.raises(ConfigError, match="attention maps need plain attention blocks"):
        encoder.attention(torch.zeros(1, 3, 32, 32))


def test_seed_decides_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (build_encoder(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["vit.pos_embed"], other["vit.pos_embed"])


def test_drop_path_acts_in_training_only():
    encoder = build_encoder(TINY, seed=0, drop_path=0.9)
    images = torch.rand(8, 3, 64, 64)
    assert encoder.training
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))
    assert encoder.state_dict().keys() == build_encoder(TINY, seed=0).state_dict().keys()


@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
def test_normalise(layout):
    encoder = build_encoder(EncoderConfig(**{**vars(TINY), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}), seed=0)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), np.uint8)
    expected = ((images / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(images)
    actual = encoder.normalise(tensor if layout == "BHWC" else tensor.permute(0, 3, 1, 2))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("images", [torch.zeros(1, 8, 8, 3), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_normalise_refuses_what_is_no_batch_of_images(images):
    with pytest.raises(ValueError, match="need uint8 images"):
        build_encoder(TINY, seed=0).normalise(images)


def cubic(distance, a):
    """The cubic convolution kernel."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    return np.where(d <= 1, near, np.where(d < 2, a * (d**3 - 5 * d**2 + 8 * d - 4), 0))


@pytest.mark.parametrize(
    ("pos_embed", "step", "a"), [("timm", 14 / 16, -0.5), ("dino", 14 / 16.1, -0.75)], ids=["timm", "dino"]
)
def test_position_embeddings_are_sampled_where_the_convention_says(pos_embed, step, a):
    encoder = build_encoder(EncoderConfig(**{**vars(TINY), "image_size": 112, "pos_embed": pos_embed}), seed=0)
    row = np.random.default_rng(0).standard_normal(14).astype(np.float32)
    with torch.no_grad():
        encoder.vit.pos_embed[0, 1:, 0] = torch.from_numpy(row).repeat(14, 1).flatten()
        columns = encoder._position(16, 16)[0, 1:, 0].view(16, 16).numpy()
        assert torch.equal(encoder._position(14, 14), encoder.vit.pos_embed)
    places = (np.arange(16) + 0.5) * step - 0.5
    weights = cubic(places[:, None] - np.arange(14), a)
    expected = (weights / weights.sum(1, keepdims=True)) @ row
    inner = slice(2, -2)  # near the border the two conventions differ again
    np.testing.assert_allclose(columns[8, inner], expected[inner], atol=1e-5)


def test_dino_interpolates_also_to_as_many_patches_in_another_shape():
    encoder = build_encoder(EncoderConfig(**{**vars(TINY), "image_size": 32, "pos_embed": "dino"}), seed=0)
    assert encoder(torch.zeros(1, 3, 16, 64)).shape == (1, 32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("resnetv2_50", "cannot make resnetv2_50 as a class-token encoder"),
        ("vit_base_patch16_siglip_224", "needs the class token"),
        ("deit_tiny_distilled_patch16_224", "not a plain vision transformer"),
        ("vit_tiny_r_s16_p8_224", "not a plain vision transformer"),
        ("eva02_tiny_patch14_224", "not a plain vision transformer"),
    ],
)
def test_models_that_do_not_suit(model, message):
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_encoder(EncoderConfig(model=model), seed=0)


def test_sizes_that_do_not_suit():
    with pytest.raises(ConfigError, match="divisible"):
        build_encoder(EncoderConfig(**{**vars(TINY), "heads": 5}), seed=0)
    with pytest.raises(ConfigError, match=r"60 × 64 px do not divide into patches of 8 px; .* such as 64"):
        build_encoder(TINY, seed=0)(torch.zeros(1, 3, 60, 64))


def test_weights_to_start_from(tmp_path):
    trained = build_encoder(TINY, seed=1)
    torch.save({key: value.half() for key, value in trained.vit.state_dict().items()}, tmp_path / "w.pth")
    start = EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "w.pth")})
    started = build_encoder(start, seed=2, drop_path=0.1)
    assert started.vit.norm.weight.dtype == torch.float32
    assert started.vit.pos_embed.requires_grad
    torch.testing.assert_close(started.vit.pos_embed, trained.vit.pos_embed.half().float())
    with pytest.raises(RunError, match=r"24 missing: vit|missing: blocks\.2"):
        build_encoder(EncoderConfig(**{**vars(start), "depth": 3}), seed=0)
    with pytest.raises(StoreError, match="no such file"):
        build_encoder(EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "none.pth")}), seed=0)


def test_published_weights_without_a_network(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(StoreError, match=r"not in the cache and cannot be fetched .* give the file as weights"):
        build_encoder(EncoderConfig(pretrained=True), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "a.pth", "pretrained": True}, "weights and pretrained exclude each other"),
        ({"std": [0.5, 0.5, 0]}, "std must be positive"),
        ({"pos_embed": "dinov2"}, "pos_embed"),
        ({"registers": -1}, "registers and layer_scale must not be negative"),
        ({"ffn": "gelu"}, "ffn"),
    ],
)
def test_configuration_that_makes_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        config.parse(EncoderConfig, values)


def test_registers_ffn_and_layer_scale_override_the_models_own():
    giant = EncoderConfig("vit_giant_patch14_reg4_dinov2", image_size=28, dim=32, depth=1, heads=2)
    own = build_encoder(giant, seed=0).vit
    plain = EncoderConfig(**{**vars(giant), "registers": 0, "ffn": "mlp", "layer_scale": 0.0})
    vit = build_encoder(plain, seed=0).vit
    assert (own.num_prefix_tokens, vit.num_prefix_tokens) == (5, 1)
    assert vit.blocks[0].mlp.fc1.out_features == 128
    assert type(vit.blocks[0].mlp.act) is nn.GELU
    assert own.state_dict().keys() - vit.state_dict().keys() == {
        "reg_token",
        "blocks.0.ls1.gamma",
        "blocks.0.ls2.gamma",
    }


@pytest.mark.parametrize("dim", [1024, 1536])  # DINOv2's ViT-L and ViT-g
def test_swiglu_is_dinov2s(dim):
    with torch.device("meta"):
        config = EncoderConfig("vit_small_patch14_dinov2", 28, dim=dim, depth=1, heads=16, ffn="swiglu")
        mlp = build_encoder(config, seed=0).vit.blocks[0].mlp
    width = {1024: 2736, 1536: 4096}[dim]
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (2 * width, width)
    assert type(mlp.act) is nn.SiLU
    gate_and_value = mlp.fc1.to_empty(device="cpu")
    nn.init.normal_(gate_and_value.weight, std=0.1)
    nn.init.zeros_(gate_and_value.bias)
    x = torch.randn(1, dim)
    gate, value = gate_and_value(x).chunk(2, -1)
    seen = []
    mlp.fc2.to_empty(device="cpu").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    mlp(x)
    torch.testing.assert_close(seen[0], nn.functional.silu(gate) * value)


def test_masked_patches_are_not_seen():
    encoder = build_encoder(EncoderConfig(**{**vars(TINY), "registers": 2}), seed=0, mask_token=True).eval()
    nn.init.normal_(encoder.mask_token)
    masks = torch.zeros(2, 64, dtype=torch.bool)
    masks[0, 9], masks[1, :8] = True, True
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[0, :, 8:16, 8:16] = 0  # patch 9 is the second of the second row
    changed[1, :, :8] = 0
    with torch.inference_mode():
        before, after = encoder.forward_tokens(images, masks), encoder.forward_tokens(changed, masks)
        seen, unmasked = encoder.forward_tokens(changed), encoder.forward_tokens(images, torch.zeros_like(masks))
        plain = encoder.forward_tokens(images)
        hidden = encoder.forward_tokens(images, torch.ones_like(masks))[1]
    assert hidden.std(1).min() > 1e-3  # they keep their places
    assert torch.equal(hidden[0], hidden[1])
    assert before[0].shape == (2, 32)
    assert before[1].shape == (2, 64, 32)
    for part in (0, 1):
        assert torch.equal(before[part], after[part])
        assert torch.equal(unmasked[part], plain[part])
        assert not torch.allclose(before[part], seen[part])


def test_a_mask_token_is_no_part_of_the_transformer():
    encoder = build_encoder(TINY, seed=0, mask_token=True)
    assert encoder.vit.state_dict().keys() == build_encoder(TINY, seed=0).vit.state_dict().keys()
    assert encoder.state_dict().keys() - build_encoder(TINY, seed=0).state_dict().keys() == {"mask_token"}
    with pytest.raises(ValueError, match="no mask token"):
        build_encoder(TINY, seed=0).forward_tokens(torch.zeros(1, 3, 64, 64), torch.ones(1, 64, dtype=torch.bool))


def test_stochastic_depth_grows_or_is_uniform():
    def rates(**options):
        blocks = build_encoder(EncoderConfig(**{**vars(TINY), "depth": 3}), seed=0, **options).vit.blocks
        return [[getattr(path, "drop_prob", 0.0) for path in (b.drop_path1, b.drop_path2)] for b in blocks]

    assert rates(drop_path=0.4) == pytest.approx(np.array([[0.0] * 2, [0.2] * 2, [0.4] * 2]))
    assert rates(drop_path=0.4, uniform_drop_path=True) == [[0.4] * 2] * 3
    assert rates(uniform_drop_path=True) == [[0.0] * 2] * 3

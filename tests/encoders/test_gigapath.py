"""Prov-GigaPath's slide encoder is what its description says, in each of its variants."""

from dataclasses import replace
from math import cos, exp, sin

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.core.errors import ConfigError, RunError, StoreError
from gigatome.encoders import gigapath
from gigatome.encoders.gigapath import (
    GigapathConfig,
    GigapathEncoder,
    build_gigapath,
    gigapath_segments,
    grid_places,
    load_gigapath,
)

SMALL = GigapathConfig(
    input_dim=6, dim=16, depth=3, heads=4, ffn_dim=24, grid=20, segments=(8, 11, 30), ratios=(1, 4, 3)
)


def model(config=SMALL, **more):
    """With parameters that are far from their initial values."""
    made = build_gigapath(config, seed=0, **more).double().eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.2)
    return made


def slides(tiles=37, batch=2):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(batch, tiles, 6, generator=random, dtype=torch.float64)
    return x, torch.randint(20, (batch, tiles, 2), generator=random)


def position(column, row, dim, grid):
    """Of one tile, as the authors' table has it at the index column × grid + row."""
    index = column * grid + row
    halves = []
    for place in (index % grid, index // grid):
        angles = [place / 10_000 ** (number / (dim / 4)) for number in range(dim // 4)]
        halves += [*map(sin, angles), *map(cos, angles)]
    return halves


def seen(config, tokens):
    """How many times each head shows each key to each query [heads, N, N], and how many keys of padding [heads, N]."""
    keys = torch.zeros(config.heads, tokens, tokens, dtype=torch.float64)
    padding = torch.zeros(config.heads, tokens, dtype=torch.float64)
    for segment, ratio in zip(config.segments, config.ratios, strict=True):
        segment = min(segment, tokens)
        for head in range(config.heads):
            offset = head // -(-config.heads // ratio)
            for start in range(0, tokens, segment):
                places = range(start + offset, start + -(-segment // ratio) * ratio, ratio)
                real = [place for place in places if place < min(start + segment, tokens)]
                for query in real:
                    keys[head, query, real] += 1
                    padding[head, query] += len(places) - len(real)
    return keys, padding if config.padding == "torchscale" else torch.zeros_like(padding)


def attention(q, k, v, config):
    """Dense, of [B, N, heads, d]: a key that is seen c times has log c added to its score."""
    keys, padding = seen(config, q.shape[1])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[3] ** 0.5 + keys.log()
    scores = torch.cat([scores, padding.log()[None, :, :, None].expand(len(q), -1, -1, -1)], -1)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., :-1], v)


def states(encoder, x, places):
    """The tokens before the first block and after each, and those after the encoder's norm, as described."""
    config, state = encoder.config, encoder.state_dict()

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    where = [[position(*place, config.dim, config.grid) for place in slide] for slide in places.tolist()]
    x = linear("patch_embed.proj", x) + torch.tensor(where, dtype=torch.float64)
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], 1)
    found = [x]
    for layer in (f"encoder.layers.{number}" for number in range(config.depth)):
        y = norm(f"{layer}.self_attn_layer_norm", x)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", y).unflatten(2, (config.heads, -1)) for part in "qkv")
        y = norm(f"{layer}.self_attn.inner_attn_ln", attention(q, k, v, config).flatten(2))
        x = x + linear(f"{layer}.self_attn.out_proj", y)
        y = F.gelu(linear(f"{layer}.ffn.fc1", norm(f"{layer}.final_layer_norm", x)))
        x = x + linear(f"{layer}.ffn.fc2", norm(f"{layer}.ffn.ffn_layernorm", y))
        found.append(x)
    return found, norm("encoder.layer_norm", x)


def pooled(encoder, tokens):
    tokens = tokens[:, 0] if encoder.config.pooling == "cls" else tokens[:, 1:].mean(1)
    return F.layer_norm(tokens, tokens.shape[-1:], encoder.norm.weight, encoder.norm.bias, 1e-6)


@pytest.mark.parametrize("padding", ["masked", "torchscale"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_embedding_is_what_it_is_described_as(pooling, padding):
    config = replace(SMALL, pooling=pooling, padding=padding)
    encoder = model(config)
    blocks, out = states(encoder, *slides())
    expected = torch.stack([pooled(encoder, tokens) for tokens in blocks])
    torch.testing.assert_close(encoder.all_layers(*slides()), expected)
    torch.testing.assert_close(encoder(*slides()), pooled(encoder, out))
    single = model(config).float()(slides()[0].float(), slides()[1])
    torch.testing.assert_close(single.double(), pooled(encoder, out), rtol=1e-5, atol=1e-5)
    for layer, wanted in ((None, expected[3]), (0, expected[0]), (2, expected[2])):
        torch.testing.assert_close(model(replace(config, final="encoder_states", layer=layer))(*slides()), wanted)
    assert (expected[3] - pooled(encoder, out)).abs().max() > 0.01


def test_padding_is_felt():
    masked, padded = (model(replace(SMALL, padding=padding))(*slides()) for padding in ("masked", "torchscale"))
    assert (masked - padded).abs().max() > 1e-3


def test_places_and_the_order_of_tiles_are_felt():
    x, places = slides()
    encoder, there = model(), model()(x, places)
    assert (encoder(x, places.flip(2)) - there).abs().max() > 1e-3
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    assert (encoder(x[:, order], places[:, order]) - there).abs().max() > 1e-4


def test_positions_of_the_published_size():
    table = gigapath._waves(1000, 384)
    for column, row in ((0, 0), (3, 999), (999, 3), (512, 77)):
        expected = torch.tensor(position(column, row, 768, 1000), dtype=torch.float64)
        torch.testing.assert_close(torch.cat([table[row], table[column]]), expected, rtol=0, atol=1e-12)


def test_tiles_enter_in_parts(monkeypatch):
    expected, sizes, encoder = model()(*slides()), [], model()
    monkeypatch.setattr(gigapath, "_TILES", 10)
    encoder.patch_embed["proj"].register_forward_hook(lambda _layer, _inputs, out: sizes.append(out.shape[1]))
    torch.testing.assert_close(encoder(*slides()), expected)
    assert sizes == [10, 10, 10, 7]


@pytest.mark.parametrize("tiles", [1, 7, 11, 100])
def test_any_number_of_tiles(tiles):
    encoder = model()
    out = states(encoder, *slides(tiles))[1]
    torch.testing.assert_close(encoder(*slides(tiles)), pooled(encoder, out))


def test_segments_are_the_authors():
    assert gigapath_segments(262_144, 256) == (1024, 5792, 32768, 185363, 1048576)
    assert gigapath_segments(250_000, 256) == (1024, 4870, 23170, 110217, 524288)
    assert GigapathConfig().encoder().attention.segments[3] == 185363


def test_keys_and_sizes_are_the_authors():
    with torch.device("meta"):
        made = GigapathEncoder(GigapathConfig())
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    assert shapes["cls_token"] == (1, 1, 768)
    assert shapes["patch_embed.proj.weight"] == (768, 1536)
    outside = {key for key in shapes if not key.startswith("encoder.layers.")}
    assert outside == {
        "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
        "encoder.layer_norm.weight", "encoder.layer_norm.bias",
    }  # fmt: skip
    block = 4 * 768 * 769 + 2 * 768 * 3072 + 3072 + 768 + 2 * (3 * 768 + 3072)
    assert sum(parameter.numel() for parameter in made.encoder.parameters()) == 12 * block + 2 * 768
    assert not list(made.buffers())


def test_places_come_from_level_0_pixels():
    side = 256 * 0.5 / 0.2527
    places = np.stack(np.meshgrid(np.arange(0, 1000, 37), np.arange(0, 1000, 41)), -1).reshape(-1, 2)
    assert np.array_equal(grid_places(np.rint(places * side).astype(np.int64), side), places)
    assert np.array_equal(grid_places((places * side).astype(np.int64), side), places)
    shifted = np.array([[300, 0], [510, 512], [1030, 1533]])  # a grid that begins elsewhere: places are cut
    assert grid_places(shifted, 512).tolist() == [[0, 0], [0, 1], [2, 2]]


def test_what_is_no_slide():
    encoder, (x, places) = model(), slides()
    with pytest.raises(ConfigError, match=r"run from 0 to 20, but Prov-GigaPath's grid from 0 to 19; .*larger tiles"):
        encoder(x, places.index_fill(1, torch.tensor(3), 20))
    with pytest.raises(ConfigError, match="run from -1 to"):
        encoder(x, places.index_fill(1, torch.tensor(3), -1))
    for wrong in ((x[..., :5], places), (x[:, :0], places[:, :0]), (x[0], places[0]), (x.long(), places)):
        with pytest.raises(ValueError, match=r"need float embeddings \[B, N, 6\]"):
            encoder(*wrong)
    for wrong in (places[:, 1:], places.double(), places[0]):
        with pytest.raises(ValueError, match=r"need int64 places \[2, 37, 2\]"):
            encoder(x, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 6, "heads": 1}, "dim 6 a multiple of 4"),
        ({"dim": 20, "heads": 16}, "not 20 of 16"),
        ({"grid": 0}, "grid 0"),
        ({"segments": (4, 8)}, "as many ratios as segments"),
        ({"slide_size": 100}, "100 px holds no tile"),
        ({"layer": 3}, 'needs final "encoder_states"'),
        ({"layer": 13, "final": "encoder_states"}, "at most the depth, 12"),
    ],
)
def test_bad_configurations(wrong, message):
    with pytest.raises(ConfigError, match=message):
        GigapathConfig(**wrong)


def test_bfloat16():
    x, places = slides()
    with torch.autocast("cpu", torch.bfloat16):
        found = model().float()(x.float(), places)
    torch.testing.assert_close(found.double(), model()(x, places), rtol=0.1, atol=0.1)


def test_dropout_where_the_authors_have_it():
    encoder = model(dropout=0.5)
    plain, x = model(), torch.randn(2, 50, 16, dtype=torch.float64)
    torch.testing.assert_close(encoder(*slides()), plain(*slides()))
    encoder.train()
    entering, expected = encoder._enter(*slides()), plain._enter(*slides())
    layers = [(entering, expected)]
    for name in ("self_attn.out_proj", "ffn.fc2"):
        inner = x if name != "ffn.fc2" else F.pad(x, (0, 8))
        layers.append((encoder.encoder.layers[2].get_submodule(name)(inner),
                       plain.encoder.layers[2].get_submodule(name)(inner)))  # fmt: skip
    for dropped, whole in layers:
        kept = dropped != 0
        assert 0.4 < kept.double().mean() < 0.6
        torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert torch.equal(encoder.encoder.layers[0].ffn.fc1(x), plain.encoder.layers[0].ffn.fc1(x))


@pytest.mark.parametrize("checkpointing", ["selective", "block"])
def test_what_training_saves_changes_no_gradient(checkpointing):
    found = []
    for mode in ("none", checkpointing):
        encoder = model(dropout=0.25, drop_path=0.4, checkpointing=mode).train()
        torch.manual_seed(3)
        encoder(*slides()).square().sum().backward()
        found.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_random_weights():
    before = torch.get_rng_state()
    one, other = build_gigapath(SMALL, 1), build_gigapath(SMALL, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(one.cls_token, build_gigapath(SMALL, 2).cls_token)
    weight = one.encoder.layers[0].ffn.fc1.weight  # uniform to ± sqrt(6 / (16 + 24))
    assert 0.9 < weight.abs().max() / (6 / 40) ** 0.5 <= 1
    assert one.training


def test_published_weights(tmp_path):
    made = model(replace(SMALL, heads=16)).float()
    torch.save({"model": made.state_dict(), "epoch": 3}, tmp_path / "slide_encoder.pth")
    loaded = load_gigapath(tmp_path / "slide_encoder.pth")
    wanted = GigapathConfig(input_dim=6, dim=16, depth=3, heads=16, ffn_dim=24)
    assert loaded.config == wanted
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in made.state_dict().items())
    assert state["cls_token"].data_ptr() != made.cls_token.data_ptr()
    x, places = slides()
    same = load_gigapath({"model": made.state_dict()}, made.config)
    assert torch.equal(same(x.float(), places), made(x.float(), places))
    dropping = load_gigapath(made.state_dict(), made.config, dropout=0.5).train()
    assert not torch.equal(dropping(x.float(), places), made(x.float(), places))


def test_weights_of_another_model_are_refused(tmp_path):
    state = model().state_dict()
    state["encoder.layers.0.ffn.fc9.weight"] = state.pop("encoder.layers.0.ffn.fc1.weight")
    with pytest.raises(RunError, match=r"1 missing: encoder\.layers\.0\.ffn\.fc1\.weight; 1 unexpected: .*fc9"):
        load_gigapath(state, SMALL)
    with pytest.raises(RunError, match=r"of another shape: .*patch_embed\.proj\.weight \(\[16, 6\] in the file"):
        load_gigapath(model().state_dict(), replace(SMALL, input_dim=7))
    with pytest.raises(RunError, match=r"no weights of Prov-GigaPath's .*, as patch_embed\.proj\.weight is missing"):
        load_gigapath({"conv1.weight": torch.zeros(3, 3)})
    tiles = {"patch_embed.proj.weight": torch.zeros(8, 3, 16, 16), "blocks.0.mlp.fc1.bias": torch.zeros(32)}
    with pytest.raises(RunError, match=r"as patch_embed\.proj\.weight has shape \[8, 3, 16, 16\], not one of 2 axes"):
        load_gigapath(tiles)
    with pytest.raises(RunError, match=r"as encoder\.layers\.0\.ffn\.fc1\.bias is missing; give its slide_encoder"):
        load_gigapath({"patch_embed.proj.weight": torch.zeros(16, 6)})
    with pytest.raises(StoreError, match="no such file"):
        load_gigapath(tmp_path / "none.pth")


def test_padding_counts_in_the_reference():
    """Its own arithmetic: alone in its segment, the third token shares the softmax with a key of padding."""
    config = replace(SMALL, heads=1, segments=(2,), ratios=(1,))
    keys, padding = seen(config, 3)
    assert keys.tolist() == [[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    assert padding.tolist() == [[0.0, 0.0, 1.0]]
    ones = torch.ones(1, 3, 1, 4, dtype=torch.float64)
    assert attention(ones, ones, ones, config)[0, :, 0, 0].tolist() == pytest.approx([1, 1, 1 / (1 + exp(-2))])

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know

from gigatome.core.errors import ConfigError
from gigatome.encoders import longnet
from gigatome.encoders.dilated import DilatedOptions, dilated_attention
from gigatome.encoders.longnet import LongNetConfig, LongNetEncoder

ATTENTION = DilatedOptions((8, 16), (1, 2), heads=4)
SMALL = LongNetConfig(dim=16, depth=2, ffn_dim=24, attention=ATTENTION, normalize_output=True)


def encoder(config=SMALL, **more):
    """With parameters that are far from their initial values."""
    torch.manual_seed(0)
    made = LongNetEncoder(config, **more).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def tokens(count=37, batch=2):
    return torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(state, x, depth=2):
    """The encoder as its description says, of a state dict."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for layer in (f"layers.{number}" for number in range(depth)):
        y = norm(f"{layer}.self_attn_layer_norm", x)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", y).unflatten(2, (4, 4)) for part in "qkv")
        y = norm(f"{layer}.self_attn.inner_attn_ln", dilated_attention(q, k, v, ATTENTION).flatten(2))
        x = x + linear(f"{layer}.self_attn.out_proj", y)
        y = F.gelu(linear(f"{layer}.ffn.fc1", norm(f"{layer}.final_layer_norm", x)))
        x = x + linear(f"{layer}.ffn.fc2", norm(f"{layer}.ffn.ffn_layernorm", y))
    return norm("layer_norm", x)


def test_blocks_are_what_they_are_described_as():
    made = encoder()
    torch.testing.assert_close(made(tokens()), written_out(made.state_dict(), tokens()))


def gradients(made, x):
    torch.manual_seed(2)
    out = made(x)
    out.square().sum().backward()
    return out, [parameter.grad for parameter in made.parameters()]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("hidden", [2**25, 24 * 2 * 10])
def test_saving_memory_changes_no_value(monkeypatch, checkpointing, hidden):
    expected, wanted = gradients(encoder(drop_path=0.5).train(), tokens())
    monkeypatch.setattr(longnet, "_HIDDEN", hidden)
    found, got = gradients(encoder(drop_path=0.5, checkpointing=checkpointing).train(), tokens())
    torch.testing.assert_close(found, expected)
    for gradient, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_checkpointing_keeps_less():
    def kept(checkpointing):
        sizes = []
        made = encoder(checkpointing=checkpointing).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            made(tokens(count=200))
        return sum(sizes)

    everything, some, least = (kept(mode) for mode in ("none", "selective", "block"))
    assert everything > 1.5 * some
    assert some > 1.5 * least


def test_the_wide_middle_is_never_whole(monkeypatch):
    monkeypatch.setattr(longnet, "_HIDDEN", 24 * 2 * 10)
    made, seen = encoder(checkpointing="block").train(), []
    made.layers[0].ffn.fc1.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[1]))
    made(tokens()).sum().backward()
    assert max(seen) == 10
    assert seen[:4] == [10, 10, 10, 7]


def test_bfloat16():
    made = encoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(tokens().float())
    torch.testing.assert_close(found.double(), encoder()(tokens()), rtol=0.1, atol=0.1)


def test_keys_are_torchscales():
    keys = LongNetEncoder(SMALL).state_dict().keys()
    layers = {key.split(".", 2)[2].rpartition(".")[0] for key in keys if key.startswith("layers.1.")}
    attention = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln")}
    assert layers == attention | {
        "self_attn_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm", "final_layer_norm"
    }  # fmt: skip
    assert {key for key in keys if not key.startswith("layers.")} == {"layer_norm.weight", "layer_norm.bias"}
    plain = LongNetConfig(dim=16, depth=2, ffn_dim=24, attention=ATTENTION)
    assert not any(key.startswith("layer_norm") for key in LongNetEncoder(plain).state_dict())


def test_initial_weights():
    torch.manual_seed(0)
    made = LongNetEncoder(LongNetConfig(dim=64, depth=1, ffn_dim=128, attention=ATTENTION))
    weights = made.layers[0].ffn.fc1.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert (made.layers[0].self_attn.out_proj.bias == 0).all()


def test_drop_path_grows_and_acts_in_training_only():
    made = encoder(LongNetConfig(16, 3, 24, ATTENTION), drop_path=0.4)
    assert [getattr(layer.drop_path, "drop_prob", 0.0) for layer in made.layers] == pytest.approx([0, 0.2, 0.4])
    x = tokens(batch=16)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def test_bad_sizes():
    with pytest.raises(ConfigError, match="not 18 of 4"):
        LongNetConfig(18, 1, 24, ATTENTION)
    with pytest.raises(ConfigError, match="depth 0"):
        LongNetConfig(16, 0, 24, ATTENTION)

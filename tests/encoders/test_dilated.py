import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gigatome.core.errors import ConfigError
from gigatome.encoders import dilated
from gigatome.encoders.dilated import DilatedAttention, DilatedOptions, dilated_attention
from gigatome.encoders.dilated_kernels import (
    CPU_FLASH,
    CUDA_EFFICIENT,
    CUDA_FLASH,
    PRODUCTS,
    kernel_for,
    pytorch_kernel_for,
)

MIXED = DilatedOptions((4, 8, 16), (1, 2, 4), heads=6)
NEVER = -1e9  # a score whose weight is 0 and whose gradient is no NaN


def tensors(batch, tokens, heads, dim, dtype=torch.float64, seed=0):
    """Queries, keys, values and a cotangent."""
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, tokens, heads, dim, generator=random, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype).requires_grad_(number < 3) for number, x in enumerate(made)]


def dense(q, k, v, options):
    """The same by scores between all tokens, a mask for each branch and head, and the definition of the offsets."""
    tokens, heads, dim = q.shape[1:]
    place = torch.arange(tokens)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * dim**-0.5
    outs, lses = [], []
    for segment, ratio in zip(options.segments, options.ratios, strict=True):
        segment = min(segment, tokens)
        per_group = -(-heads // ratio)
        offsets = [j // per_group if options.offsets == "torchscale" else j % ratio for j in range(heads)]
        seen = torch.stack([place % segment % ratio == offset for offset in offsets])
        both = seen[:, :, None] & seen[:, None] & (place // segment == place[:, None] // segment)
        lse = scores.masked_fill(~both, NEVER).logsumexp(-1)
        if options.padding == "torchscale":
            absent = -(-segment // ratio) - both.sum(-1)
            lse = torch.logaddexp(lse, absent.to(lse).log())
        lse = lse.masked_fill(~seen, NEVER)
        weights = (scores - lse[..., None]).masked_fill(~both, NEVER).exp()
        outs.append(torch.einsum("bhij,bjhd->bihd", weights, v))
        lses.append(lse)
    lse = torch.stack(lses)
    lse = lse.detach() if options.merge == "detached" else lse
    return (torch.stack(outs) * lse.softmax(0).transpose(2, 3)[..., None]).sum(0)


def compare(q, k, v, cotangent, options, **tolerance):
    expected = dense(q, k, v, options)
    found = dilated_attention(q, k, v, options)
    torch.testing.assert_close(found, expected, **tolerance)
    wanted = torch.autograd.grad(expected, (q, k, v), cotangent)
    for gradient, want in zip(torch.autograd.grad(found, (q, k, v), cotangent), wanted, strict=True):
        torch.testing.assert_close(gradient, want, **tolerance)


@st.composite
def any_options(draw):
    branches = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 7)), min_size=1, max_size=3))
    segments, ratios = zip(*branches, strict=True)
    return DilatedOptions(
        segments,
        ratios,
        heads=draw(st.integers(1, 6)),
        offsets=draw(st.sampled_from(("torchscale", "paper"))),
        padding=draw(st.sampled_from(("masked", "torchscale"))),
        merge=draw(st.sampled_from(("gradient", "detached"))),
    )


@settings(max_examples=120, deadline=None)
@given(any_options(), st.integers(1, 45), st.integers(1, 2))
@example(DilatedOptions((8,), (1,), heads=2), 1, 1)  # one token
@example(DilatedOptions((64, 128), (1, 4), heads=2), 7, 2)  # shorter than every segment
@example(DilatedOptions((8, 32), (1, 16), heads=3), 32, 1)  # fewer heads than offsets
@example(DilatedOptions((8, 15), (1, 4), heads=6), 45, 1)  # heads and segments that are no multiple of the ratio
@example(DilatedOptions((8, 16), (1, 4), heads=4, padding="torchscale", merge="detached"), 37, 2)
def test_is_exact(options, tokens, batch):
    compare(*tensors(batch, tokens, options.heads, 4), options, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("merge", ["gradient", "detached"])
def test_is_exact_when_cut_in_parts(monkeypatch, merge):
    options = DilatedOptions((4, 8), (1, 2), heads=4, merge=merge)
    monkeypatch.setattr(dilated, "_ROWS", 64)
    assert len(list(dilated.whole_parts(options, 50, range(50)))) == 3 + 1 + 3 + 1
    compare(*tensors(2, 50, 4, 4), options, rtol=1e-11, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    q, k, v, _ = tensors(1, 7, 6, 1)
    assert torch.autograd.gradcheck(lambda *x: dilated_attention(*x, MIXED), (q, k, v))


def test_detached_shares_change_the_gradient_and_not_the_output():
    q, k, v, cotangent = tensors(1, 32, 6, 4)
    outs = [
        dilated_attention(q, k, v, DilatedOptions(MIXED.segments, MIXED.ratios, heads=6, merge=merge))
        for merge in ("gradient", "detached")
    ]
    assert torch.equal(*outs)
    exact, held = (torch.autograd.grad(out, k, cotangent)[0] for out in outs)
    assert (exact - held).norm() > 0.01 * exact.norm()


def test_tokens_that_no_branch_shows_are_zero():
    options = DilatedOptions((8,), (2,), heads=2, offsets="paper")
    q, k, v, cotangent = tensors(1, 16, 2, 4)
    out = dilated_attention(q, k, v, options)
    assert (out[:, 1::2, 0] == 0).all()
    assert (out[:, 0::2, 1] == 0).all()
    assert (out[:, 0::2, 0] != 0).all()
    assert (torch.autograd.grad(out, q, cotangent)[0][:, 1::2, 0] == 0).all()


def test_no_tokens():
    assert dilated_attention(*(torch.zeros(2, 0, 6, 4) for _ in range(3)), MIXED).shape == (2, 0, 6, 4)


def test_compat_is_what_torchscale_does():
    options = DilatedOptions.compat((8, 16), (1, 2), heads=2)
    assert (options.offsets, options.padding, options.merge) == ("torchscale", "torchscale", "detached")
    default = DilatedOptions((8, 16), (1, 2), heads=2)
    assert (default.offsets, default.padding, default.merge) == ("torchscale", "masked", "gradient")


def test_padding_takes_a_share_only_where_there_is_any():
    q, k, v, _ = tensors(1, 40, 2, 4)
    masked, padded = (
        dilated_attention(q, k, v, DilatedOptions((16,), (1,), heads=2, padding=padding))
        for padding in ("masked", "torchscale")
    )
    torch.testing.assert_close(masked[:, :32], padded[:, :32])
    assert not torch.allclose(masked[:, 32:], padded[:, 32:])
    whole = torch.cat([k, k.new_zeros(1, 8, 2, 4)], 1)[:, 32:], torch.cat([v, v.new_zeros(1, 8, 2, 4)], 1)[:, 32:]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q[:, 32:], *whole))
    ).transpose(1, 2)
    torch.testing.assert_close(padded[:, 32:], expected)


@pytest.mark.parametrize("merge", ["gradient", "detached"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_lower_precision(dtype, tolerance, merge):
    options = DilatedOptions((16, 64), (1, 4), heads=4, merge=merge)
    q, k, v, cotangent = tensors(2, 100, 4, 8, dtype)
    expected = dense(q.double(), k.double(), v.double(), options)
    found = dilated_attention(q, k, v, options)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, (q, k, v), cotangent.double())
    for gradient, want in zip(torch.autograd.grad(found, (q, k, v), cotangent), wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, want, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("scores", [6, 50])  # a row at a time, and several heads
def test_products_take_the_place_of_a_missing_kernel(monkeypatch, scores):
    monkeypatch.setattr(dilated, "kernel_for", lambda _q: PRODUCTS)
    monkeypatch.setattr("gigatome.encoders.dilated_kernels._SCORES", scores)
    compare(*tensors(2, 37, 6, 4), MIXED, rtol=1e-11, atol=1e-12)
    q, k, v, _ = tensors(2, 37, 6, 4, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = dilated_attention(q, k, v, MIXED)
    assert found.dtype == torch.bfloat16
    expected = dense(q.double(), k.double(), v.double(), MIXED)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_kernels():
    assert pytorch_kernel_for(torch.zeros(1)) is CPU_FLASH
    assert kernel_for(torch.zeros(1)) is CPU_FLASH
    assert kernel_for(torch.zeros(24, dtype=torch.float64)) is CPU_FLASH
    assert kernel_for(torch.zeros(24, device="meta")) is PRODUCTS


@pytest.mark.parametrize(("kernel", "dtype"), [(CUDA_FLASH, torch.bfloat16), (CUDA_EFFICIENT, torch.float32)])
@pytest.mark.parametrize("merge", ["gradient", "detached"])
def test_cuda_kernels_take_what_they_are_given(monkeypatch, kernel, dtype, merge):
    """On tensors without memory, which need no device: signatures, shapes and types."""
    options = DilatedOptions((16, 64), (1, 4), heads=4, merge=merge)
    monkeypatch.setattr(dilated, "kernel_for", lambda _q: kernel)
    q, k, v = (torch.empty(2, 100, 4, 24, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    out = dilated_attention(q, k, v, options)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    for gradient in torch.autograd.grad(out, (q, k, v), torch.empty_like(out)):
        assert (gradient.shape, gradient.dtype) == (q.shape, dtype)


def test_strided_inputs_are_the_same():
    """Queries, keys and values that lie in one tensor, as a joint projection leaves them."""
    joint = torch.stack([x.detach() for x in tensors(2, 30, 6, 4)[:3]], 2)
    strided = [x.requires_grad_() for x in joint.unbind(2)]
    expected = dilated_attention(*(x.detach().contiguous() for x in strided), MIXED)
    torch.testing.assert_close(dilated_attention(*strided, MIXED), expected)


def test_what_is_kept_for_the_gradient_grows_linearly():
    options = DilatedOptions((64, 256, 1024), (1, 4, 16), heads=4)

    def kept(tokens):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            dilated_attention(*tensors(1, tokens, 4, 8, torch.float32)[:3], options)
        return sum(sizes)

    assert kept(512) == 512 * 4 * (4 * 8 + 1) * 4  # q, k, v, the output and a log-sum-exp
    assert kept(2048) == 4 * kept(512)


def test_module_is_the_projections_around_it():
    torch.manual_seed(0)
    module = DilatedAttention(24, MIXED).double()
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    out = dense(*(getattr(module, f"{name}_proj")(x).unflatten(2, (6, 4)) for name in "qkv"), MIXED).flatten(2)
    torch.testing.assert_close(module(x), module.out_proj(module.inner_attn_ln(out)))
    plain = DilatedAttention(24, MIXED, inner_norm=False).double()
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if "inner" not in key})
    torch.testing.assert_close(plain(x), plain.out_proj(out))


def test_keys_beyond_the_end_have_weight_one():
    zero = torch.zeros(1, 6, 1, 1)
    value = torch.tensor([0.0, 0, 0, 0, 1, 1]).view(1, 6, 1, 1)
    out = dilated_attention(zero, zero, value, DilatedOptions((4,), (1,), heads=1, padding="torchscale"))
    assert out.flatten().tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((64, 128), (1,), 4), "as many ratios as segments"),
        (((), (), 4), "one at least"),
        (((64, 0), (1, 2), 4), "must be positive"),
        (((64,), (-1,), 4), "must be positive"),
        (((64,), (1,), 0), "must be positive"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DilatedOptions(*arguments)


def test_heads_that_do_not_fit():
    with pytest.raises(ConfigError, match="not 20 of 6"):
        DilatedAttention(20, MIXED)
    with pytest.raises(ConfigError, match="queries of 4 heads"):
        dilated_attention(*(torch.zeros(1, 8, 4, 4) for _ in range(3)), MIXED)

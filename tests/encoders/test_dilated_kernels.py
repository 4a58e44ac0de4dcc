import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gigatome.core.native import NATIVE
from gigatome.encoders import dilated, dilated_kernels
from gigatome.encoders.dilated import DilatedOptions, dilated_attention
from gigatome.encoders.dilated_kernels import CPU_FLASH, CPU_NATIVE, PRODUCTS, Gradients, kernel_for

needs_native = pytest.mark.skipif(not getattr(NATIVE, "ATTENTION_LANES", 0), reason="our own kernel is not there")
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def tensors(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) for _ in range(4)]


@needs_native
@pytest.mark.parametrize("dim", [8, 24, 40, 48, 64, 128])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (31, 129), (515, 40), (64, 64), (130, 515)])
def test_our_kernel_is_exact(dim, n, m):
    q, _, _, grad = tensors(2, 3, n, dim)
    _, k, v, _ = tensors(2, 3, m, dim, seed=1)
    want, want_lse = PRODUCTS.forward(q.double(), k.double(), v.double())
    out, lse = CPU_NATIVE.forward(q, k, v)
    torch.testing.assert_close(out.double(), want, **CLOSE)
    torch.testing.assert_close(lse.double(), want_lse, **CLOSE)
    wanted = PRODUCTS.backward(grad.double(), q.double(), k.double(), v.double(), want, want_lse)
    for found, gradient in zip(CPU_NATIVE.backward(grad, q, k, v, out, lse), wanted, strict=True):
        torch.testing.assert_close(found.double(), gradient, **CLOSE)


@needs_native
def test_our_kernel_is_as_exact_as_that_of_pytorch():
    q, k, v, grad = tensors(1, 2, 1024, 24)
    want, want_lse = CPU_FLASH.forward(q.double(), k.double(), v.double())
    wanted = CPU_FLASH.backward(grad.double(), q.double(), k.double(), v.double(), want, want_lse)
    errors = []
    for kernel in (CPU_NATIVE, CPU_FLASH):
        out, lse = kernel.forward(q, k, v)
        found = (out, lse, *kernel.backward(grad, q, k, v, out, lse))
        pairs = zip(found, (want, want_lse, *wanted), strict=True)
        errors.append([((x - y).norm() / y.norm()).item() for x, y in pairs])
    for own, other in zip(*errors, strict=True):
        assert own < max(2 * other, 3e-7)


@needs_native
def test_scores_far_apart_and_far_from_zero():
    q, k, v, grad = tensors(1, 2, 100, 24)
    for shift in (-40.0, 0.0, 60.0):
        far = torch.cat([20 * q, torch.full((1, 2, 100, 8), 32**0.5)], -1)
        keys = torch.cat([k, torch.full((1, 2, 100, 8), shift / 8)], -1)
        values, own_grad = (torch.cat([x, x[..., :8]], -1) for x in (v, grad))
        exact = [x.double() for x in (far, keys, values)]
        want, want_lse = PRODUCTS.forward(*exact)
        out, lse = CPU_NATIVE.forward(far, keys, values)
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
        wanted = PRODUCTS.backward(own_grad.double(), *exact, want, want_lse)
        for found, gradient in zip(CPU_NATIVE.backward(own_grad, far, keys, values, out, lse), wanted, strict=True):
            torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_no_number_is_not_lost(place):
    made = dict(zip("qkv", tensors(1, 1, 40, 8)[:3], strict=True))
    made[place][0, 0, 7, 3] = float("nan")
    out, lse = CPU_NATIVE.forward(**made)
    assert out[0, 0, 7].isnan().any()
    assert out[0, 0, 8].isnan().any() == (place != "q")
    dq, *_ = CPU_NATIVE.backward(torch.ones_like(out), **made, out=out, lse=lse)
    assert dq[0, 0, 7].isnan().any()


@needs_native
def test_keys_in_turn_are_keys_together():
    q, k, v, grad = tensors(2, 3, 4, 5, 37, 24)
    out, lse = torch.zeros(q.shape), torch.full((*q.shape[:-1], 1), float("-inf"))
    for keys in (slice(0, 20), slice(20, 21), slice(21, 37)):
        CPU_NATIVE.in_place.attend(q, k[..., keys, :], v[..., keys, :], out, lse, 0)
    batches = [x.flatten(0, 3)[None] for x in (q, k, v)]
    want, want_lse = CPU_NATIVE.forward(*batches)
    torch.testing.assert_close(out.flatten(0, 3)[None], want, **CLOSE)
    torch.testing.assert_close(lse.flatten(0, 3)[None, ..., 0], want_lse, **CLOSE)
    totals = Gradients(*(torch.zeros(x.shape) for x in (q, k, v)))
    for keys in (slice(0, 20), slice(20, 37)):
        own = Gradients(totals.q, totals.k[..., keys, :], totals.v[..., keys, :])
        CPU_NATIVE.in_place.add_gradients(grad, q, k[..., keys, :], v[..., keys, :], out, lse, *own)
    wanted = CPU_NATIVE.backward(grad.flatten(0, 3)[None], *batches, want, want_lse)
    for total, gradient in zip(totals, wanted, strict=True):
        torch.testing.assert_close(total.flatten(0, 3)[None], gradient, **CLOSE)


@needs_native
@pytest.mark.parametrize("merge", ["gradient", "detached"])
@pytest.mark.parametrize("padding", ["masked", "torchscale"])
@pytest.mark.parametrize("offsets", ["torchscale", "paper"])
def test_dilated_attention_is_the_same_on_both(monkeypatch, offsets, padding, merge):
    options = DilatedOptions((64, 150, 700), (1, 3, 4), 6, offsets=offsets, padding=padding, merge=merge)
    joint = torch.randn(2, 611, 3, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for kernel in (CPU_NATIVE, PRODUCTS):
        monkeypatch.setattr(dilated, "kernel_for", lambda _q, kernel=kernel: kernel)
        out = dilated_attention(*joint.unbind(2), options)
        found.append((out, torch.autograd.grad(out.square().sum(), joint)[0]))
    for own, want in zip(*found, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-5)


@needs_native
def test_threads_change_nothing(monkeypatch):
    q, k, v, grad = tensors(2, 8, 600, 24)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out, lse = CPU_NATIVE.forward(q, k, v)
        found.append((out, lse, *CPU_NATIVE.backward(grad, q, k, v, out, lse)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_native
def test_operations_are_counted_like_those_of_pytorch():
    q, _, _, grad = tensors(2, 3, 50, 24)
    _, k, v, _ = tensors(2, 3, 70, 24, seed=1)
    counted = []
    for kernel in (CPU_NATIVE, CPU_FLASH):
        with FlopCounterMode(display=False) as counter:
            out, lse = kernel.forward(q, k, v)
        counted.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            kernel.backward(grad, q, k, v, out, lse)
        counted.append(counter.get_total_flops())
    assert counted[:2] == counted[2:] == [4 * 6 * 50 * 70 * 24, 10 * 6 * 50 * 70 * 24]


@needs_native
def test_no_sequences_and_tensors_without_numbers():
    """The latter are what ``torch.compile`` looks at."""
    options = DilatedOptions((64, 150), (1, 2), 4)
    with FakeTensorMode():
        fake = torch.zeros(2, 200, 3, 4, 8, requires_grad=True)
        dilated_attention(*fake.unbind(2), options).sum().backward()
    assert fake.grad.shape == fake.shape
    empty = torch.zeros(0, 200, 3, 4, 8, requires_grad=True)
    dilated_attention(*empty.unbind(2), options).sum().backward()
    assert empty.grad.shape == empty.shape


@needs_native
def test_our_kernel_is_chosen_where_it_is_faster(monkeypatch):
    assert kernel_for(torch.zeros(24)) is CPU_NATIVE
    assert kernel_for(torch.zeros(20)) is CPU_FLASH
    assert kernel_for(torch.zeros(64)) is CPU_FLASH
    assert kernel_for(torch.zeros(24, dtype=torch.bfloat16)) is CPU_FLASH
    monkeypatch.setattr(dilated_kernels, "NATIVE", None)
    assert kernel_for(torch.zeros(24)) is CPU_FLASH


@needs_native
def test_arrays_that_do_not_fit_are_refused():
    q, k, v, _ = (x[:, None, None] for x in tensors(1, 2, 10, 8))
    out, lse = torch.zeros(q.shape), torch.zeros(*q.shape[:-1], 1)
    good = [x.numpy() for x in (q, k, v, out, lse)]
    NATIVE.attend(*good, 0, 1)
    for number, bad in [
        (0, good[0][..., :7]),
        (0, good[0][..., 0]),
        (0, good[0][..., ::-1]),
        (1, good[1][:, :, :, :1]),
        (1, good[1][..., :0, :]),
        (2, good[2][..., :9, :]),
        (2, good[2].astype("float64")),
        (3, good[3].view("int32")),
        (4, good[3]),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            NATIVE.attend(*good[:number], bad, *good[number + 1 :], 0, 1)
    good[3].setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        NATIVE.attend(*good, 0, 1)

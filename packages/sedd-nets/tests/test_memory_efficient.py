"""The functions that keep little for the backward pass, against the plain formulas that a compiler is given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_nets.attention import Rotary
from sedd_nets.fast.memory_efficient import add_gated, gelu_linear, modulated_norm, rotated
from sedd_nets.functional import rotate
from torch.autograd import gradcheck, gradgradcheck

B, L, D = 2, 3, 4


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def turned(qkv):
    cos, sin = Rotary(D)(L)
    return torch.stack(rotated(qkv, cos.double(), sin.double()), dim=2)


CASES: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "norm": (modulated_norm, [(B, L, D), (B, 1, D), (B, 1, D)]),
    "norm, noise a position": (modulated_norm, [(B, L, D), (B, L, D), (B, L, D)]),
    "gelu": (gelu_linear, [(B, L, D), (5, D), (5,)]),
    "gelu, rows": (gelu_linear, [(L, D), (5, D), (5,)]),
    "gate": (lambda h, branch, gate: add_gated(h, branch, gate, 0.0), [(B, L, D), (B, L, D), (B, 1, D)]),
    "gate, noise a position": (lambda h, branch, gate: add_gated(h, branch, gate, 0.0), [(B, L, D)] * 3),
    "rotary": (turned, [(B, L, 3, 2, D)]),
}


@pytest.fixture(params=CASES)
def case(request):
    function, shapes = CASES[request.param]
    return function, [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def test_equals_the_plain_formula(case, monkeypatch):
    function, given = case
    out = function(*given)
    weight = drawn(*out.shape, seed=9).detach()
    gradients = torch.autograd.grad(out, given, weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = function(*given)
    plain_gradients = torch.autograd.grad(plain, given, weight)
    assert "Function" not in type(plain.grad_fn).__mro__[1].__name__
    for ours, theirs in zip((out, *gradients), (plain, *plain_gradients), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_first_and_second_derivatives(case):
    function, given = case
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_derivatives_through_dropout():
    def with_the_same_choices(h, branch, gate):
        torch.manual_seed(0)
        return add_gated(h, branch, gate, 0.4)

    given = [drawn(B, L, D), drawn(B, L, D, seed=1), drawn(B, 1, D, seed=2)]
    assert gradcheck(with_the_same_choices, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_turned_as_floats_are(dtype):
    """To half a unit in the last place of numbers below 8, 2^-6 in bfloat16; values pass unchanged."""
    qkv, (cos, sin) = drawn(B, 7, 3, 2, D).detach().to(dtype), Rotary(D)(7)
    q, k, v = rotated(qkv, cos, sin)
    assert (q.dtype, k.dtype) == (dtype, dtype)
    u, w = qkv[:, :, :2].double().chunk(2, -1)
    angle = torch.arange(7, dtype=torch.float64)[:, None] * 10_000 ** -(torch.arange(0, D, 2) / D)
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    exact = torch.cat([u * c - w * s, w * c + u * s], -1)
    bound: dict[str, Any] = {"atol": 2**-6 if dtype == torch.bfloat16 else 2e-6, "rtol": 0}
    torch.testing.assert_close(torch.stack([q, k], 2).double(), exact, **bound)
    assert torch.equal(v, qkv[:, :, 2])
    plain = rotate(qkv, cos, sin)
    torch.testing.assert_close(plain[:, :, :2].double(), exact, **bound)
    assert plain.dtype == dtype
    assert torch.equal(plain[:, :, 2], qkv[:, :, 2])


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(monkeypatch, gated, dtype, host):
    """200 000 elements: the share's standard error is 0.0007; 5 of them are passed once in 2 million runs.

    On the host the choices are a hash's, elsewhere the device's generator's.
    """
    monkeypatch.setattr("sedd_nets.fast.memory_efficient.on_host", lambda _tensor: host)
    h, gate = torch.zeros(1, 200, 1000), torch.full((1, 1, 1000), 2.0) if gated else None
    out = add_gated(h, torch.ones(1, 200, 1000, dtype=dtype), gate, 0.1)
    assert out.dtype == torch.float32
    assert (out == 0).double().mean().item() == pytest.approx(0.1, abs=5 * 0.0007)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, (2 if gated else 1) / 0.9), atol=0, rtol=4e-3)


def test_a_frozen_weight_gets_no_gradient():
    a, weight, bias = drawn(L, D), drawn(5, D, seed=1).detach(), drawn(5, seed=2)
    gelu_linear(a, weight, bias).sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(gelu_linear(a, weight.clone().requires_grad_(), bias).sum(), a)[0]
    assert torch.equal(a.grad, expected)


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 14), (0.1, 14.5)])
def test_what_a_block_keeps(make_sedd, dropout, most):
    """In units of the residual stream: qkv 3, the MLP 4, and the inputs of 2 norms, 3 linear maps and 2 gates.

    Dropout's choices take a quarter of a unit each. What does not grow with the length (modulations) or the width
    (attention's normalisers) adds 0.2 units here.
    """
    net = make_sedd(width=128, depth=2, heads=2, length=128, dropout=dropout).train()
    x, sigma = torch.zeros(1, 128, dtype=torch.int64), torch.ones(1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept, held = {}, []

    def hold(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for blocks in (net.blocks, net.blocks[:1]):
        net.blocks = blocks
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            out = net.hidden(x, sigma)  # alive until all is counted, so that no storage is reused
        held.append(sum(size for place, size in kept.items() if place not in parameters))
        del out
    assert held[0] - held[1] <= (most + 0.2) * x.numel() * net.width * 4

"""Attention as plain products: the contract of `sdpa`, whatever the parts it works in."""

import sys

import pytest
import torch
from sedd_nets import Documents, plain_products, sdpa
from torch.autograd import gradcheck


def projection(length=70, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, length, 3, 3, 16, generator=generator, dtype=torch.float64) * scale).to(dtype)


def by_definition(qkv):
    q, k, v = qkv.double().transpose(1, 3).unbind(2)
    return (torch.softmax(q @ k.mT / 4, dim=-1) @ v).transpose(1, 2)


@pytest.fixture(params=[1 << 21, 2 * 70**2, 70**2, 70 * 16, 1], ids=["all", "heads", "head", "rows", "row"])
def parts(request, monkeypatch):
    """Six heads in all: four at a time would leave two over, and so on down to a query at a time."""
    monkeypatch.setattr(sys.modules["sedd_nets.plain_products"], "SCORES", request.param)


def test_values_and_gradients_are_the_definitions(parts):
    qkv = projection().requires_grad_()
    weight = torch.randn(2, 70, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, plain = plain_products(qkv, None), by_definition(qkv)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain, atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(a, qkv, weight)[0] for a in (out, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_derivatives():
    assert gradcheck(lambda qkv: plain_products(qkv, None), projection(5).requires_grad_())


@pytest.mark.parametrize(("scale", "within"), [(1.0, 2e-2), (2.0, 6e-2)])
def test_bfloat16(scale, within):
    """The contract of all kernels for queries and keys of order one; scores of 20, rounded, cost what is documented."""
    qkv = projection(300, torch.bfloat16)
    qkv[:, :, :2] *= scale
    qkv.requires_grad_()
    out = plain_products(qkv, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_definition(qkv), atol=within, rtol=0)
    torch.testing.assert_close(out, sdpa(qkv, None), atol=within, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (ours,) = torch.autograd.grad(out, qkv, weight)
    (exact,) = torch.autograd.grad(by_definition(qkv), qkv, weight.double())
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact.double()).norm() < within * exact.double().norm()


def test_documents():
    qkv, documents = projection(70), Documents(torch.tensor([[0] * 30 + [1] * 40, [0] * 60 + [-1] * 10]))
    torch.testing.assert_close(plain_products(qkv, documents), sdpa(qkv, documents), atol=1e-12, rtol=0)


def test_a_network_attends_by_it(make_sedd, wide):
    net = make_sedd().double()
    expected = net(*wide)
    net.attention = plain_products
    torch.testing.assert_close(net(*wide), expected, atol=1e-12, rtol=0)


def test_it_is_the_same_under_autocast():
    qkv = projection(70, torch.bfloat16)
    plain = plain_products(qkv, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain_products(qkv, None), plain)

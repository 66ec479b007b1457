"""The widened product is the plain one, with its gradients; where it is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sedd_nets.fast.aligned import ALIGNED, aligned_linear, suits


@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("biased", [True, False])
def test_same_product_and_gradients(outputs, biased):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 8), (outputs, 8), *([(outputs,)] if biased else []))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    bias = given[2] if biased else None
    ours, plain = aligned_linear(given[0], given[1], bias), F.linear(given[0], given[1], bias)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    assert ours.stride(-2) % ALIGNED == 0
    slope = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(ours, given, slope), torch.autograd.grad(plain, given, slope), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_in_the_dtype_of_autocast():
    a, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = aligned_linear(a, weight, bias), F.linear(a, weight, bias)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, atol=2**-6, rtol=0)
    assert aligned_linear(a, weight, bias).dtype == torch.float32


def test_taken_on_cuda_in_half_precision_for_odd_sizes():
    def asked(kind, dtype, outputs):
        a: Any = SimpleNamespace(device=torch.device(kind), dtype=dtype)
        return suits(a, outputs)

    assert not asked("cuda", torch.bfloat16, 50_258)
    assert not asked("cuda", torch.float16, 50_252)
    assert asked("cuda", torch.bfloat16, 50_264)
    assert asked("cuda", torch.float32, 50_258)
    assert asked("cpu", torch.bfloat16, 50_258)

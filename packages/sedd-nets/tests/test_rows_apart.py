"""Rows as the head makes them and a shift for each: the log-score, and no copy of it in another precision."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from sedd_nets import BD3LM, MDLM, RADD, SEDD, UDLM
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

families = importlib.import_module("sedd_nets.families")
N = 301
SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "length": 8, "dropout": 0.0}
NETWORKS: dict[str, Any] = {
    "SEDD": lambda: SEDD(N, **SIZES, scale_by_sigma=True),
    "SEDD, not scaled": lambda: SEDD(N, **SIZES, scale_by_sigma=False),
    "RADD": lambda: RADD(N, **SIZES),
    "MDLM, the mask in the middle": lambda: MDLM(N, **SIZES, mask_id=7),
    "BD3LM": lambda: BD3LM(N, **SIZES, block_size=8),
    "UDLM": lambda: UDLM(N, **SIZES),
}


def network(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    nn.init.normal_(net.output_layer.linear.weight, std=0.3)
    return net


def inputs(net):
    x = torch.randint(N, (3, 8), generator=torch.Generator().manual_seed(0))
    x[:, ::2] = getattr(net, "mask_id", N - 1)
    return x, torch.tensor([0.1, 0.7, 3.0], dtype=net.output_layer.linear.weight.dtype)


def joined(rows, shift, x):
    return (rows.to(shift.dtype) + shift[..., None]).scatter(-1, x[..., None], 0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_and_shift_are_the_log_score(name):
    net = network(name).double()
    x, sigma = inputs(net)
    positions = torch.tensor([0, 3, 4, 9, 22])
    for at, states in ((None, x), (positions, x.flatten()[positions])):
        expected = net(x, sigma, positions=at)
        rows, shift = net(x, sigma, positions=at, apart=True)
        assert shift.shape == states.shape
        torch.testing.assert_close(joined(rows, shift, states), expected, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor of N columns in float32 or more holds that is made inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        rows = isinstance(out, torch.Tensor) and out.shape[-1:] == (N,) and not operation.is_view
        if rows and out.dtype in (torch.float32, torch.float64):
            self.count = max(self.count, out.numel())
        return out


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "UDLM"])
def test_under_autocast_rows_stay_as_they_are_made(name, monkeypatch):
    """In bfloat16, from which the float32 log-score is made, too: the two agree as float32 does."""
    monkeypatch.setattr(families, "ROWS_AT_A_TIME", 2)
    net = network(name)
    x, sigma = inputs(net)
    positions = torch.arange(24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Largest() as plain:
            expected = net(x, sigma, positions=positions)
        with Largest() as apart:
            rows, shift = net(x, sigma, positions=positions, apart=True)
    assert (expected.dtype, rows.dtype, shift.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    found, masked = joined(rows, shift, x.flatten()), torch.ones(24, N, dtype=torch.bool)
    if hasattr(net, "mask_id"):
        masked[:, net.mask_id] = False  # where it is no position's own state, any finite number will do
    torch.testing.assert_close(found[masked], expected[masked], rtol=0, atol=2e-6)
    assert found.isfinite().all()
    assert plain.count >= 24 * N
    assert apart.count < 24 * N / 2

"""Laws of noise schedules: sigma(t), its derivative and its inverse."""

from __future__ import annotations

import math
from typing import Any

import torch

from sedd_graphs.testing._support import (
    assert_close,
    assert_refused,
    assert_single_precision,
    law,
)

__all__ = [
    "dsigma_is_the_derivative",
    "sigma_increases",
    "inverse_returns_to_the_time",
    "schedules_agree_in_single_precision",
    "schedules_keep_shapes",
    "bad_times_are_refused",
]


@law
def dsigma_is_the_derivative(noise: Any) -> None:
    """Dsigma is the automatic derivative of sigma."""
    t = torch.linspace(0, 1, 102)[1:].requires_grad_()
    sigma, dsigma = noise(t)
    (slope,) = torch.autograd.grad(sigma.sum(), t)
    error = ((dsigma - slope).abs() / slope.abs().clamp(min=1e-9)).max()
    assert error < 1e-9, f"dsigma is off by up to {float(error.detach()):.2e} of the derivative of sigma"


@law
def sigma_increases(noise: Any) -> None:
    """Sigma is not negative, grows with t, and dsigma is not negative."""
    sigma, dsigma = (part.detach() for part in noise(torch.linspace(0, 1, 1002)[1:]))
    assert (sigma > 0).all(), f"sigma must be positive after t = 0, found {float(sigma.min())}"
    assert (sigma.diff() > 0).all(), "sigma must increase with t"
    assert (dsigma >= 0).all(), f"dsigma must not be negative, found {float(dsigma.min())}"


@law
def inverse_returns_to_the_time(noise: Any) -> None:
    """inverse(sigma(t)) = t, and noise that is never reached is refused."""
    t = torch.linspace(0, 1, 101)
    with torch.no_grad():
        sigma = noise(t)[0]
        assert_close(noise.inverse(sigma), t, 1e-8, "inverse(sigma(t))")
    for wrong in (sigma[-1:] * 1.1, sigma[:1] - 0.1, sigma[:1] * math.nan):
        assert_refused(noise.inverse, wrong, "sigma")


@law
def schedules_agree_in_single_precision(noise: Any) -> None:
    """float32 sigma and dsigma are within 1e-5 of float64, relative to each value."""
    t = torch.cat([torch.logspace(-5, -1, 50), torch.linspace(0.1, 1, 451)]).float()
    for name, single, double in zip(("sigma", "dsigma"), noise(t), noise(t.double()), strict=True):
        assert_single_precision(single.detach(), double.detach(), name)


@law
def schedules_keep_shapes(noise: Any) -> None:
    """Sigma and dsigma have t's shape and dtype."""
    for shape in [(), (3,), (3, 4), (0,)]:
        for dtype in (torch.float32, torch.float64):
            for part in noise(torch.full(shape, 0.5, dtype=dtype)):
                assert part.shape == shape, f"expected t's shape {shape}, got {tuple(part.shape)}"
                assert part.dtype == dtype, f"expected t's dtype {dtype}, got {part.dtype}"


@law
def bad_times_are_refused(noise: Any) -> None:
    """T outside [0, 1], NaN, or of integers: an error that names it."""
    for wrong in (torch.tensor([0.5, -0.1]), torch.tensor([1.1]), torch.tensor(math.nan), torch.tensor([0, 1])):
        assert_refused(noise, wrong, "t")

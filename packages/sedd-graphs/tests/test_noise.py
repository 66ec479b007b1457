"""Schedules: derivative, inverse, ends and errors."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Geometric, LogLinear

SCHEDULES = [LogLinear(), LogLinear(eps=0.1), Geometric(), Geometric(sigma_min=1e-5, sigma_max=50)]


@pytest.fixture(params=SCHEDULES, ids=repr)
def noise(request):
    return request.param


def test_dsigma_is_the_derivative_of_sigma(noise):
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    sigma, dsigma = noise(t)
    (derivative,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(dsigma, derivative, rtol=1e-10, atol=0)


def test_inverse_returns_to_the_time(noise):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(noise.inverse(noise(t)[0]), t, rtol=0, atol=1e-12)


def test_float32_agrees_with_float64(noise):
    t = torch.linspace(0, 1, 1001)
    for single, double in zip(noise(t), noise(t.double()), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=0)


def test_shapes_follow_t(noise):
    for shape in [(), (3,), (3, 4), (0,)]:
        sigma, dsigma = noise(torch.full(shape, 0.5))
        assert sigma.shape == dsigma.shape == torch.Size(shape)


def test_the_log_linear_mask_probability_is_linear():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma, _ = LogLinear(eps=1e-3)(t)
    torch.testing.assert_close(1 - (-sigma).exp(), (1 - 1e-3) * t)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_times_outside_the_unit_interval_are_refused(noise, t):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\] everywhere, found"):
        noise(torch.tensor([0.5, t]))


def test_integer_times_are_refused(noise):
    with pytest.raises(TypeError, match="t must be a floating-point tensor"):
        noise(torch.tensor([0, 1]))


def test_noise_that_is_never_reached_is_refused(noise):
    with pytest.raises(ValueError, match=r"sigma must lie between .* found 1000"):
        noise.inverse(torch.tensor([1.0, 1000.0]))


def test_impossible_parameters_are_refused():
    with pytest.raises(ValueError, match=r"eps must lie strictly between 0 and 1, got 0.0"):
        LogLinear(eps=0.0)
    with pytest.raises(ValueError, match=r"sigma_max must lie strictly between 2.0 and inf, got 1.0"):
        Geometric(sigma_min=2.0, sigma_max=1.0)

from __future__ import annotations

import pytest
import torch
from sedd_objectives import monte_carlo


def test_mean_and_error_are_those_of_the_draws(generator):
    draws = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 2 + 1e6
    stream = iter(draws.float())
    found = monte_carlo(lambda: next(stream), 50)
    kept = draws.float().double()
    torch.testing.assert_close(found.value, kept.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.standard_error, kept.std(0) / 50**0.5, rtol=1e-9, atol=0)


def test_keeps_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    assert not monte_carlo(lambda: weight * 1, 2).value.requires_grad


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_draws must be at least 2, to estimate an error, got 1"):
        monte_carlo(lambda: torch.zeros(2), 1)
    shapes = iter([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"draws must have one shape, got \(2,\) and then \(3,\)"):
        monte_carlo(lambda: next(shapes), 2)

"""Times are uniform one by one, spread together, and leave less variance the better they are spread."""

from __future__ import annotations

import pytest
import torch
from sedd_objectives import low_discrepancy_times, stratified_times, uniform_times

SAMPLERS = [uniform_times, stratified_times, low_discrepancy_times]


def draws(sampler, size, runs=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([sampler(size, generator=generator, t_min=0.1) for _ in range(runs)])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_single_time_is_uniform(sampler):
    """Kolmogorov-Smirnov at 4000 draws: 1.95 / sqrt(n) is exceeded once in a thousand."""
    t = draws(sampler, 4)
    assert ((t >= 0.1) & (t < 1)).all()
    for b in range(4):
        ordered = (t[:, b].sort().values - 0.1) / 0.9
        distance = (ordered - torch.arange(len(ordered)) / len(ordered)).abs().max()
        assert distance < 1.95 / len(ordered) ** 0.5 + 1 / len(ordered)


@pytest.mark.parametrize("sampler", [stratified_times, low_discrepancy_times])
def test_one_time_in_each_stratum(sampler):
    t = draws(sampler, 8, runs=200).sort(-1).values
    if sampler is low_discrepancy_times:
        torch.testing.assert_close(t.diff(dim=-1), torch.full((200, 7), 0.9 / 8), rtol=0, atol=1e-6)
    else:
        assert torch.equal(((t - 0.1) / 0.9 * 8).floor().clamp(0, 7), torch.arange(8.0).expand(200, -1))


def test_the_variance_that_is_left():
    """Of a batch mean of f(t) = t^2, against what theory leaves; 4000 means know it to 2.2 %, 10 % are allowed."""
    batch, width = 16, 0.9
    mean_square = (1 - 0.1**3) / (3 * width)  # E t^2, and E t^4 below
    expected = {
        uniform_times: ((1 - 0.1**5) / (5 * width) - mean_square**2) / batch,
        stratified_times: 4 * mean_square * (width / batch) ** 2 / 12 / batch,  # E f'^2 times a stratum's variance
        low_discrepancy_times: (1 - 0.1**2) ** 2 / (12 * batch**2),  # the jump from f(1) to f(t_min) that wraps around
    }
    for sampler, variance in expected.items():
        left = float((draws(sampler, batch) ** 2).mean(-1).var())
        assert left == pytest.approx(variance, rel=0.1), sampler.__name__


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_input(sampler):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sampler(0)
    with pytest.raises(ValueError, match=r"t_min must lie in \[0, 1\), got 1.0"):
        sampler(4, t_min=1.0)

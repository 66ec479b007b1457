"""Schedules: what is special about each; what holds for all is in the laws."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from sedd_graphs import Cosine, Geometric, Learned, Linear, LogLinear, MaskProbability, Polynomial, testing
from sedd_graphs.testing import NOISE_LAWS


def learned(start, knots=5):
    noise = Learned(start, knots=knots)
    with torch.no_grad():
        noise.log_density.copy_(torch.randn(knots + 1, generator=torch.Generator().manual_seed(0)))
    return noise


SCHEDULES = [
    LogLinear(),
    LogLinear(eps=0.1),
    Cosine(),
    Polynomial(),
    Polynomial(power=0.5),
    Polynomial(power=3, eps=1e-5),
    Geometric(),
    Geometric(sigma_min=1e-5, sigma_max=50),
    Linear(),
    Linear(sigma_max=3, sigma_min=1e-4),
    MaskProbability(lambda t: 0.9 * t * t * (3 - 2 * t)),
    Learned(LogLinear()),
    learned(LogLinear()),
    learned(Geometric()),
    learned(Cosine(), knots=1),
]


@pytest.mark.parametrize("law", NOISE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
def test_law(noise, law):
    law(noise)


def test_the_log_linear_mask_probability_is_linear():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(1 - (-LogLinear(eps=1e-3).sigma(t)).exp(), (1 - 1e-3) * t)


def test_a_given_mask_probability_is_kept():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    noise = MaskProbability(lambda t: 0.9 * (math.pi / 2 * t).sin())
    torch.testing.assert_close(1 - (-noise.sigma(t)).exp(), 0.9 * (math.pi / 2 * t).sin())


def test_power_one_is_log_linear():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(Polynomial(power=1)(t), LogLinear()(t))


def test_a_learned_schedule_starts_as_the_given_one_and_keeps_its_ends():
    t = torch.linspace(0, 1, 101)
    torch.testing.assert_close(Learned(Geometric())(t), Geometric()(t))
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(learned(Geometric())(ends)[0], Geometric()(ends)[0])


def test_a_learned_schedule_learns():
    """Fitted to another schedule's pace, it finds it."""
    noise, target = Learned(LogLinear(), knots=8), Polynomial(power=2)
    optimizer = torch.optim.Adam(noise.parameters(), lr=0.05)
    t = torch.linspace(0.05, 1, 64)
    for _ in range(200):
        loss = (noise.sigma(t).log() - target.sigma(t).log()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.detach() < 0.02
    assert (LogLinear().sigma(t).log() - target.sigma(t).log()).square().mean() > 0.5


@pytest.mark.parametrize("noise", SCHEDULES[:8], ids=repr)
def test_the_inverse_takes_rounding_at_the_ends(noise):
    low, high = noise.sigma(torch.tensor([0.0, 1.0]))
    assert float(noise.inverse(high * (1 + 5e-6))) == pytest.approx(1, abs=1e-6)
    assert float(noise.inverse(low - 5e-6 * high)) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("kind", [LogLinear, partial(Polynomial, 0.5)])
def test_the_inverse_is_a_time(kind):
    """Also where rounding would take the time of the last noise above 1: at which eps differs among processors."""
    last = {noise: noise.sigma(torch.tensor(1.0)) for noise in (kind(eps=i / 1000) for i in range(1, 1000))}
    above = [noise for noise, sigma in last.items() if noise.time(sigma) > 1]
    assert above
    assert all(noise.inverse(last[noise]) == 1 for noise in above)


class Slow(LogLinear):
    """A derivative that is too small."""

    def dsigma(self, t):
        return 0.9 * super().dsigma(t)


class Fast(LogLinear):
    """A derivative that is too large."""

    def dsigma(self, t):
        return 1.1 * super().dsigma(t)


class Late(LogLinear):
    """An inverse that comes too late."""

    def time(self, sigma):
        return super().time(sigma).sqrt()


class Early(LogLinear):
    """Some of the noise is there before the beginning."""

    def sigma(self, t):
        return super().sigma(t) - 2e-3


class Resting(LogLinear):
    """Noise that is the same for a while."""

    def sigma(self, t):
        return super().sigma(torch.where((t > 0.4) & (t < 0.5), 0.4, t))


class Sinking(LogLinear):
    """A derivative of the other sign."""

    def dsigma(self, t):
        return -super().dsigma(t)


class Endless(LogLinear):
    """Times for every noise."""

    def inverse(self, sigma):
        return self.time(sigma.nan_to_num()).clamp(0, 1)


class Rough(LogLinear):
    """Noise that is off by 2e-5 in float32."""

    def sigma(self, t):
        return super().sigma(t) * (1 + 2e-5 * (t.dtype == torch.float32))


class Flat(LogLinear):
    """Noise without axes."""

    def sigma(self, t):
        return super().sigma(t).flatten()


class Wide(LogLinear):
    """Noise in float64."""

    def dsigma(self, t):
        return super().dsigma(t).double()


class Timeless(LogLinear):
    """Any time will do."""

    def __call__(self, t):
        return super().__call__(t.double().nan_to_num().clamp(0, 1))


class Falling(LogLinear):
    """Noise that goes away."""

    def sigma(self, t):
        return super().sigma(1 - t)


@pytest.mark.parametrize(
    ("noise", "broken"),
    [
        (Slow(), "dsigma_is_the_derivative"),
        (Fast(), "dsigma_is_the_derivative"),
        (Late(), "inverse_returns_to_the_time"),
        (Falling(), "sigma_increases"),
        (Early(), "sigma_increases"),
        (Resting(), "sigma_increases"),
        (Sinking(), "sigma_increases"),
        (Endless(), "inverse_returns_to_the_time"),
        (Rough(), "schedules_agree_in_single_precision"),
        (Flat(), "schedules_keep_shapes"),
        (Wide(), "schedules_keep_shapes"),
        (Timeless(), "bad_times_are_refused"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_laws_find_what_is_wrong(noise, broken):
    with pytest.raises(AssertionError):
        getattr(testing, broken)(noise)


def test_half_precision_times_are_raised():
    sigma, dsigma = LogLinear()(torch.tensor([0.5], dtype=torch.bfloat16))
    assert sigma.dtype == dsigma.dtype == torch.float32


def test_integer_times_are_refused():
    with pytest.raises(TypeError, match=r"t must be a floating-point tensor, .* got a torch.int64 tensor"):
        LogLinear()(torch.tensor([0, 1]))


def test_impossible_parameters_are_refused():
    with pytest.raises(ValueError, match=r"eps must lie strictly between 0 and 1, got 0.0"):
        LogLinear(eps=0.0)
    with pytest.raises(ValueError, match=r"sigma_max must lie strictly between 2.0 and inf, got 1.0"):
        Geometric(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"power must lie strictly between 0 and inf, got -1.0"):
        Polynomial(power=-1)
    with pytest.raises(ValueError, match=r"mask must map times elementwise to probabilities .* values from 0.0 to 1.0"):
        MaskProbability(lambda t: t)
    with pytest.raises(ValueError, match=r"mask must not decrease, but falls at t = 0.5"):
        MaskProbability(lambda t: 0.9 * (1 - (2 * t - 1) ** 2))
    with pytest.raises(ValueError, match="knots must be at least 1, got 0"):
        Learned(LogLinear(), knots=0)


def test_a_mask_probability_may_rest():
    noise = MaskProbability(lambda t: t.clamp(max=0.5))
    torch.testing.assert_close(noise.sigma(torch.tensor([0.25, 0.5, 1.0])), -torch.tensor([0.75, 0.5, 0.5]).log())
    assert noise(torch.tensor([0.75]))[1] == 0
    with pytest.raises(ValueError, match=r"falls at t = 0\.75"):  # and not where it rests
        MaskProbability(lambda t: t.clamp(max=0.5) - (t - 0.75).clamp(min=0))
    with pytest.raises(ValueError, match=r"mask must map times elementwise .*, got shape \(\)"):
        MaskProbability(lambda t: 0.5 * t.mean())
    with pytest.raises(ValueError, match=r"got values from -0\.1 to 0\.4"):
        MaskProbability(lambda t: 0.5 * t - 0.1)


def test_bisection_ends_at_the_last_digit():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    noise = MaskProbability(lambda t: 0.9 * t)
    torch.testing.assert_close(noise.time(noise.sigma(t)), t, rtol=0, atol=1e-15)


@pytest.mark.parametrize("noise", [Linear(2.0, 1.0), Learned(Linear(2.0, 1.0))], ids=repr)
def test_noise_beyond_rounding_is_refused(noise):
    for wrong in (2 + 3e-5, 1 - 3e-5):  # 1e-5 of the most is put down to rounding
        with pytest.raises(ValueError, match=r"between 1 and 2, which this schedule spans, found"):
            noise.inverse(torch.tensor(wrong))
    assert [noise.inverse(torch.tensor(level)).detach().item() for level in (1 - 1e-5, 2 + 1e-5)] == [0, 1]


def test_what_schedules_are_unless_told_otherwise():
    assert [repr(make()) for make in (LogLinear, Cosine, Polynomial, Geometric, Linear)] == [
        *("LogLinear(eps=0.001)", "Cosine(eps=0.001)", "Polynomial(power=2.0, eps=0.001)"),
        *("Geometric(sigma_min=0.0001, sigma_max=20.0)", "Linear(sigma_max=7.0, sigma_min=0.0)"),
    ]
    assert repr(Learned(LogLinear())) == "Learned(LogLinear(eps=0.001), knots=16)"
    assert Learned(LogLinear()).log_density.shape == (17,)

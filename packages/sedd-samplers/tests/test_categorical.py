from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from sedd_samplers import draw_categorical


def midpoints(count):
    """Evenly spread numbers in [0, 1): what is drawn with them is the distribution itself, to 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("num_states", [1, 2, 3, 5, 16, 17, 31, 1000])
def test_shares_of_the_unit_interval_are_the_probabilities(num_states):
    probs = torch.rand(num_states, generator=torch.Generator().manual_seed(0)) ** 4
    probs[::3] = 0 if num_states > 1 else 1
    count = 200_000
    drawn = draw_categorical(probs.expand(count, -1), midpoints(count))
    share = torch.bincount(drawn, minlength=num_states).double() / count
    torch.testing.assert_close(share, probs.double() / probs.double().sum(), rtol=0, atol=2 / count)


def test_chi_square():
    """A false alarm once in 10,000 seeds."""
    probs = torch.softmax(2 * torch.randn(50, generator=torch.Generator().manual_seed(1)), 0)
    count = 400_000
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = draw_categorical(probs.expand(count, -1), uniform)
    observed = torch.bincount(drawn, minlength=50).double().numpy()
    expected = probs.double().numpy()
    assert stats.chisquare(observed, expected / expected.sum() * count).pvalue > 1e-4


def first_uniform(probs, reached):
    """The smallest u whose draw is at least `reached`, by bisection: the draw rises with u."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        drawn = draw_categorical(probs[None], torch.tensor([middle], dtype=torch.float64))
        low, high = (low, middle) if drawn >= reached else (middle, high)
    return high


@pytest.mark.parametrize("rare", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("place", [0, 20_000, 50_256])
def test_rare_states_are_drawn_at_their_rate(rare, place):
    """The set of uniforms that lead to a state of probability 1e-12 in 50257 has that measure, within 1 %."""
    probs = torch.rand(50_257, generator=torch.Generator().manual_seed(3)) + 0.5
    probs /= probs.sum()
    probs[place] = rare
    start = 0.0 if place == 0 else first_uniform(probs, place)
    end = 1.0 if place == 50_256 else first_uniform(probs, place + 1)
    assert math.isclose(end - start, rare / float(probs.double().sum()), rel_tol=0.01)


def test_ten_to_the_eight_draws_by_enumeration_of_their_uniforms():
    """Every uniform k / 1e8 in the part of [0, 1) that can lead to the rare state: 1e8 stratified draws in all."""
    probs = torch.full((1024,), 1 / 1023)
    probs[700] = 5e-8
    start = float(probs[:700].double().sum() / probs.double().sum())
    k = torch.arange(int((start - 1e-6) * 1e8), int((start + 1e-6) * 1e8))
    drawn = draw_categorical(probs.expand(len(k), -1), k.double() / 1e8)
    assert 4 <= int((drawn == 700).sum()) <= 6
    assert set(drawn.tolist()) <= {699, 700, 701}


def test_zero_is_never_drawn_not_even_at_the_ends():
    probs = torch.zeros(4, 100)
    probs[0, 50] = 1
    probs[1, [0, 99]] = 1e-30
    probs[2, 98] = 3
    probs[3, [10, 20, 30]] = torch.tensor([1e30, 1e-30, 1e30])
    for u in (0.0, 0.5, 1 - 2**-53):
        drawn = draw_categorical(probs, torch.full((4,), u, dtype=torch.float64))
        assert (probs.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize(
    ("entry", "told"), [(0.0, "sums to 0.0"), (math.nan, "sums to nan"), (math.inf, "sums to inf")]
)
def test_a_row_without_a_distribution_is_named(entry, told):
    probs = torch.ones(3, 7)
    probs[2] = entry
    with pytest.raises(ValueError, match=f"row 2.* {told}"):
        draw_categorical(probs, torch.zeros(3, dtype=torch.float64))

"""Every random number of a run is a function of seed, step and sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_train import randomness
from sedd_train.objectives import D3PM, ScoreEntropy


def test_times_are_stratified_over_all_ranks():
    one = randomness.times(0, 7, range(12), 12)
    parts = [randomness.times(0, 7, randomness.sample_numbers(12, 3, j), 12) for j in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(), one)
    strata = ((one - 1e-3) / (1 - 1e-3) * 12).floor()
    assert strata.tolist() == list(range(12))
    assert not torch.equal(one, randomness.times(0, 8, range(12), 12))


@pytest.mark.parametrize("t_min", [1e-3, 0.25])
def test_times_reach_from_t_min_to_1_and_no_further(t_min):
    """Over 200 steps of 512: each stratum is 1 / 512 wide, and its offset comes as close to both ends as 1 in 200."""
    times = torch.stack([randomness.times(0, step, range(512), 512, t_min) for step in range(200)])
    assert times.dtype == torch.float32
    assert (times >= t_min).all()
    assert (times <= 1).all()
    width = (1 - t_min) / 512
    assert times.min() < t_min + 0.05 * width
    assert times.max() > 1 - 0.05 * width
    assert float(times.double().mean()) == pytest.approx((1 + t_min) / 2, abs=0.1 * width)


def test_noise_depends_on_the_sample_and_not_on_its_batch():
    graph = Absorbing(9)
    x0 = torch.randint(9, (6, 40), generator=torch.Generator().manual_seed(0))
    sigma, _ = LogLinear()(torch.full((6,), 0.5))
    whole = randomness.noised(graph, x0, sigma, seed=0, step=3, samples=range(6))
    odd = randomness.noised(graph, x0[1::2], sigma[1::2], seed=0, step=3, samples=[1, 3, 5])
    assert torch.equal(whole[1::2], odd)
    assert not torch.equal(whole[0] == 9, whole[1] == 9)  # and each has its own
    assert not torch.equal(whole, randomness.noised(graph, x0, sigma, seed=0, step=4, samples=range(6)))


def test_dropout_is_a_step_s_a_sample_s_and_a_run_s_own():
    seeds = [tuple(randomness.dropout_seeds(seed, step, range(4)).tolist()) for seed in (0, 1) for step in (0, 1, 2)]
    assert len({number for row in seeds for number in row}) == 24
    assert tuple(randomness.dropout_seeds(0, 1, [2, 0]).tolist()) == (seeds[1][2], seeds[1][0])


def test_streams_for_different_ends_do_not_meet():
    purposes = [randomness.TIMES, randomness.NOISE, randomness.DROPOUT, randomness.EVALUATION]
    purposes += [randomness.SAMPLING, randomness.LEVELS]
    keys = list(itertools.product((0, 1), purposes, range(3)))
    assert len({randomness.generator(*key).initial_seed() for key in keys}) == len(keys)


def test_the_numbers_of_a_seed_are_those_of_every_machine():
    """Of numpy's SeedSequence, which promises to stay as it is."""
    assert randomness.derived_seed(0, 1, 2, 3) == 12927410244083705794
    assert randomness.dropout_seeds(0, 5, [3]).tolist() == [6616508813424347774]
    assert randomness.times(3, 4, [0, 5], 8).tolist() == pytest.approx([0.0876031, 0.7119781], abs=1e-6)


class Asked:
    """A graph that notes at which total noise it was asked to sample."""

    def __init__(self, graph):
        self.graph, self.sigmas = graph, []

    def sample(self, x0, sigma, /, *, generator=None):
        self.sigmas.append(sigma)
        return self.graph.sample(x0, sigma, generator=generator)


def test_score_entropy_s_noise_is_that_of_its_times():
    graph, noise, t = Asked(Uniform(7)), LogLinear(), torch.tensor([0.2, 0.9])
    xt, times = ScoreEntropy(graph, noise).noised(torch.zeros(2, 5, dtype=torch.int64), t, 0, 0, range(2))
    assert torch.equal(times, t)
    assert xt.shape == (2, 5)
    torch.testing.assert_close(torch.cat(graph.sigmas), noise(t)[0])


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_d3pm_s_times_are_multiples_of_its_step(num_steps):
    """The first that is not before t, 1 at most; and the noise is that of this time, not of t."""
    graph, noise = Asked(Absorbing(7)), LogLinear()
    t = torch.tensor([1e-6, 0.3, 0.5, 0.77, 1.0])
    _, times = D3PM(graph, noise, num_steps).noised(torch.zeros(5, 3, dtype=torch.int64), t, 0, 0, range(5))
    number = times.double() * num_steps
    torch.testing.assert_close(number, number.round(), rtol=0, atol=1e-4)
    assert number.round().tolist() == (t.double() * num_steps - 1e-4).ceil().clamp(1, num_steps).tolist()
    torch.testing.assert_close(torch.cat(graph.sigmas), noise(times)[0])

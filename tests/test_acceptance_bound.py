"""The acceptance test of graphs, schedules, losses and bound together: an enumerable problem with its exact score.

There E_data[bound] = H(data) + KL(p_1 || prior), for every graph and every schedule.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from sedd_graphs import Absorbing, Dense, Geometric, Hybrid, LogLinear, Uniform
from sedd_objectives import likelihood_bound

TOKENS, LENGTH, T_MIN = 4, 2, 1e-4


def dense_graph():
    """A generator without symmetry, its rates within a factor of three of each other."""
    generator = torch.Generator().manual_seed(1)
    rates = 0.5 + torch.rand(TOKENS, TOKENS, generator=generator, dtype=torch.float64).fill_diagonal_(-0.5)
    rates /= rates.sum(0).mean()
    return Dense(rates - torch.diag(rates.sum(0)))


GRAPHS = {
    "absorbing": Absorbing(TOKENS),
    "mask in the middle": Absorbing(TOKENS, mask_id=2),
    "uniform": Uniform(TOKENS),
    "hybrid": Hybrid(TOKENS, uniform_rate=0.4, mask_rate=0.7),
    "dense": dense_graph(),
}


class Exact:
    """A random distribution over sequences of tokens, and its marginals and log-score under a graph, in float64."""

    def __init__(self, graph):
        self.graph, self.states = graph, torch.arange(graph.num_states)
        self.tokens = self.states[self.states != (-1 if graph.mask_id is None else graph.mask_id)]
        generator = torch.Generator().manual_seed(0)
        self.probability = torch.zeros((graph.num_states,) * LENGTH, dtype=torch.float64)
        weights = torch.rand((TOKENS,) * LENGTH, generator=generator, dtype=torch.float64) ** 3
        self.probability[torch.meshgrid(*[self.tokens] * LENGTH, indexing="ij")] = weights / weights.sum()

    def marginal(self, sigma, p=None):
        """p_sigma over all states at sigma (B,), one axis a position after the batch's: exp(sigma Q) along each."""
        p = (self.probability if p is None else p).expand(len(sigma), *self.probability.shape)
        for axis in range(1, LENGTH + 1):
            p = self.graph.propagate(p.movedim(axis, -1), sigma).movedim(-1, axis)
        return p

    def log_score(self, x, sigma):
        log_p = self.marginal(sigma.double()).log()
        batch, (first, second) = torch.arange(len(x)), x.T
        at_x = log_p[batch, first, second][:, None, None]
        return torch.stack([log_p[batch, :, second], log_p[batch, first]], 1) - at_x

    def sample(self, count, generator):
        drawn = torch.multinomial(self.probability.flatten(), count, replacement=True, generator=generator)
        return torch.stack(torch.unravel_index(drawn, self.probability.shape), -1)

    def entropy(self):
        return float(-torch.special.xlogy(self.probability, self.probability).sum())

    def kl_to_prior(self, sigma):
        uniform = torch.zeros_like(self.probability)
        for tokens in itertools.product(self.tokens.tolist(), repeat=LENGTH):
            uniform[tokens] = TOKENS**-LENGTH
        p, prior = self.marginal(sigma[None]), self.marginal(sigma[None], uniform)
        return float(torch.where(p > 0, p * (p / prior).log(), 0).sum())


@pytest.mark.parametrize("noise", [LogLinear(), Geometric()], ids=["log-linear", "geometric"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_bound_is_entropy_plus_kl_to_the_prior(graph, noise):
    """Within 4 standard errors of 900 sequences: a false alarm in 16,000 runs a case."""
    exact = Exact(graph)
    generator = torch.Generator().manual_seed(2)
    x0 = exact.sample(900, generator)
    bound = likelihood_bound(exact.log_score, graph, noise, x0, num_times=8, generator=generator, t_min=T_MIN)
    want = exact.entropy() + exact.kl_to_prior(noise(torch.ones((), dtype=torch.float64))[0])
    error = float(bound.value.std()) / len(x0) ** 0.5
    assert abs(float(bound.value.mean()) - want) < 4 * error
    assert error < 0.1 * want  # else the comparison says little

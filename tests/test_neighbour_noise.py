"""Noise on nearest neighbours meets the implicit score entropy: a loss by snapshots, exact on 64 states."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Neighbours
from sedd_objectives import enumerated_implicit_score_entropy_loss, implicit_score_entropy_loss

STATES = 64
SIGMA = torch.tensor(0.8, dtype=torch.float64)


@pytest.fixture(scope="module")
def graph():
    points = torch.randn(STATES, 6, generator=torch.Generator().manual_seed(0))
    index = torch.cdist(points, points).fill_diagonal_(torch.inf).topk(5, largest=False).indices
    return Neighbours(index, between=0.2)


@pytest.fixture(scope="module")
def law(graph):
    """p_sigma of random data, (N,)."""
    data = torch.rand(STATES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    return graph.propagate(data / data.sum(), SIGMA)


def score_of(log_score):
    """A score model of one position: log_score (N, N), its row the state."""
    return lambda x, sigma: log_score[x]


def expected_loss(graph, law, log_score):
    """The mean over all x of eq. 6, with every neighbour."""
    x = torch.arange(STATES)[:, None]
    each = enumerated_implicit_score_entropy_loss(score_of(log_score), graph, x, SIGMA.expand(STATES))
    return (law * each).sum()


def test_the_loss_is_the_score_entropy_but_for_its_constant(graph, law):
    Q = graph.rates_into(torch.arange(STATES)).dense().double().fill_diagonal_(0)
    ratio = law / law[:, None]
    noise = torch.randn(STATES, STATES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for log_score in (ratio.log(), ratio.log() + 0.5 * noise):
        entropy = (law[:, None] * Q * (log_score.exp() - ratio * log_score)).sum()
        torch.testing.assert_close(expected_loss(graph, law, log_score), entropy, rtol=1e-6, atol=0)  # Q in float32


def test_the_exact_score_is_the_minimum(graph, law):
    log_score = (law / law[:, None]).log().requires_grad_()
    (slope,) = torch.autograd.grad(expected_loss(graph, law, log_score), log_score)
    assert slope.abs().max() < 1e-7


def test_snapshots_estimate_it(graph, law):
    """Drawn data, drawn x_t, one drawn neighbour: within 4 standard errors, a false alarm in 16,000 runs."""
    random, count = torch.Generator().manual_seed(3), 40_000
    start = graph.propagate(law, -SIGMA).clamp(min=0)  # the data again
    x0 = torch.multinomial(start, count, replacement=True, generator=random)[:, None]
    x = graph.sample(x0, SIGMA, generator=random)
    log_score = 0.7 * (law / law[:, None]).log()
    each = implicit_score_entropy_loss(score_of(log_score), graph, x, SIGMA.expand(count), generator=random)
    assert abs(each.mean() - expected_loss(graph, law, log_score)) < 4 * each.std() / count**0.5

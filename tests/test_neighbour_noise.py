"""Noise on nearest neighbours meets losses and a bound by snapshots, exact on 64 states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_graphs import Linear, Neighbours
from sedd_objectives import (
    enumerated_implicit_score_entropy_loss,
    implicit_score_entropy_loss,
    snapshot_bound,
    snapshot_loss,
)
from sedd_objectives.snapshots import log_decoder_of_one_jump

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


# The clean tokens' model by snapshots


def posterior_of(graph, data):
    """Log p(x0 | x) at SIGMA, (N of x, N of x0)."""
    kernel = graph.transition_from(torch.arange(STATES), SIGMA).value  # (x0, x)
    return (kernel.T * data).log().log_softmax(-1)


def fixed(t):
    return SIGMA.expand(t.shape), torch.ones_like(t)


@pytest.fixture(scope="module")
def data(graph, law):
    return graph.propagate(law, -SIGMA).clamp(min=0)


def test_the_posterior_is_the_minimum_of_the_snapshot_loss_which_is_no_bound(graph, law, data):
    """Enumerated over x0 and x_t: its slope is 0 at the posterior, its value the entropy of x0 given x_t."""
    kernel = graph.transition_from(torch.arange(STATES), SIGMA).value
    x0, x = torch.cartesian_prod(torch.arange(STATES), torch.arange(STATES)).T[..., None]
    weight = (data[:, None] * kernel).flatten()
    kept = weight > 0
    table = posterior_of(graph, data).requires_grad_()
    t = torch.full((int(kept.sum()),), 0.5, dtype=torch.float64)
    loss = snapshot_loss(lambda x, sigma: table[x], graph, fixed, x0[kept], t, xt=x[kept])
    mean = (weight[kept] * loss).sum()
    (slope,) = torch.autograd.grad(mean, table)
    assert slope.abs().max() < 1e-10
    left = -(law[:, None] * table.exp() * table).sum()
    torch.testing.assert_close(mean, left)
    assert mean < -(data * data.log()).sum() - 0.5  # so far below the entropy


def test_the_snapshot_loss_estimates_it(graph, data):
    """Drawn x0 and x_t: within 4 standard errors, a false alarm in 16,000 runs."""
    random, count = torch.Generator().manual_seed(4), 20_000
    x0 = torch.multinomial(data, count, replacement=True, generator=random)[:, None]
    wrong = 0.7 * posterior_of(graph, data)
    each = snapshot_loss(lambda x, sigma: wrong[x], graph, fixed, x0, generator=random)
    kernel = graph.transition_from(torch.arange(STATES), SIGMA).value
    want = -(data[:, None] * kernel * wrong.log_softmax(-1).T).sum()
    assert abs(each.mean() - want) < 4 * each.std() / count**0.5


@pytest.mark.parametrize("off", [0.0, 0.4])
def test_the_snapshot_bound_is_the_bound_and_the_entropy_at_its_beginning(graph, data, off):
    """Against every term enumerated and integrated over 200 levels of noise; a wrong score's bound is higher.

    The draws deviate least under noise that grows linearly: far from the data eq. 6 deviates as much as near them.
    """
    noise, t_min, random = Linear(sigma_min=1e-4, sigma_max=5.0), 1e-4, torch.Generator().manual_seed(5)
    states, count = torch.arange(STATES), 3000
    wrong = off * torch.randn(STATES, STATES, dtype=torch.float64, generator=random)
    Q = graph.rates_into(states).dense().double()

    modes, vectors = torch.linalg.eig(Q)
    parts = torch.linalg.solve(vectors, data.to(vectors.dtype))

    def law_at(sigma):
        return (((sigma[:, None] * modes).exp() * parts) @ vectors.T).real

    def score(x, sigma):
        p = law_at(sigma.double()).log()
        return (p - p.gather(-1, x))[:, None] + wrong[x]

    x0 = torch.multinomial(data, count, replacement=True, generator=random)[:, None]
    found = snapshot_bound(score, graph, noise, x0, num_times=32, generator=random, t_min=t_min)

    first, last = noise(torch.tensor([t_min, 1.0], dtype=torch.float64))[0]
    step = (last / first).log() / 200
    sigma = first * (step * (torch.arange(200, dtype=torch.float64) + 0.5)).exp()
    diffusion = torch.zeros((), dtype=torch.float64)
    jumps = Q.clone().fill_diagonal_(0)
    for level, p in zip(sigma, law_at(sigma), strict=True):
        ratio = p / p[:, None]
        log_score = ratio.log() + wrong
        excess = log_score.exp() - ratio * log_score + ratio * (ratio.log() - 1)
        divergence = (p[:, None] * jumps * excess).sum()  # of the score from the true one
        kernel = graph.transition_from(states, level).value  # (x0, x)
        known = kernel[:, None] / kernel[:, :, None]  # (x0, x, y)
        exact = ratio - known * ratio.log() + known * (known.log() - 1)
        diffusion += step * level * (divergence + (data[:, None, None] * kernel[..., None] * jumps * exact).sum())
    begun, ended = (graph.transition_from(states, level).value for level in (first, last))
    prior = graph.prior(last).dense()
    divergence = (data[:, None] * ended * (ended / prior).log()).sum()
    entropy = -(data[:, None] * torch.xlogy(begun, begun)).sum()
    pairs = torch.cartesian_prod(states, states)
    rows = score(pairs[:, 1:], first.expand(len(pairs)))[:, 0]
    told = log_decoder_of_one_jump(rows, graph, pairs[:, 1], pairs[:, 0], first.expand(len(pairs)))
    told = -(data[:, None] * begun * told.reshape(STATES, STATES)).sum()
    want = float(diffusion + divergence + entropy + told)
    error = float(found.value.std()) / count**0.5
    assert abs(float(found.value.mean()) - want) < 4 * error
    assert error < 0.06 * want
    stated = float(found.standard_error.square().mean().sqrt())
    assert stated < float(found.value.std())  # which has that of the data besides
    least = float(-(data * data.log()).sum())
    assert least < want < least + 0.1 + 10 * off


def test_the_decoder_of_one_jump_is_a_distribution(graph):
    states, generator = torch.arange(STATES), torch.Generator().manual_seed(6)
    rows = 3 * torch.randn(1, STATES, generator=generator, dtype=torch.float64).expand(STATES, -1)
    for level in (1e-6, 0.3, 50.0):
        sigma = torch.full((STATES,), level, dtype=torch.float64)
        told = log_decoder_of_one_jump(rows, graph, torch.full_like(states, 7), states, sigma)
        torch.testing.assert_close(told.exp().sum(), torch.ones((), dtype=torch.float64))


def test_a_vocabulary_is_bounded_by_snapshots():
    """50,257 tokens with 64 neighbours each on a ring of jumps, all equally likely: log N a token, and the two ends.

    The exact score is 1. Jumps into and out of a state come at one rate, so that the diffusion term is 0 in every draw.
    """
    num_states = 50_257
    offset = torch.randperm(num_states - 1, generator=torch.Generator().manual_seed(0))[:64] + 1
    graph = Neighbours((torch.arange(num_states)[:, None] + offset) % num_states, between=0.1)
    random = torch.Generator().manual_seed(1)
    x0, noise = torch.randint(num_states, (2, 5), generator=random), Linear(sigma_min=1e-4, sigma_max=5.0)
    given = torch.tensor([True, False, False, False, False]).expand(2, 5)
    how: dict[str, Any] = {"num_times": 2, "num_reconstructions": 2, "t_min": 1e-4, "given": given}
    found = snapshot_bound(lambda x, s: torch.zeros(2, 5, num_states), graph, noise, x0, generator=random, **how)
    torch.testing.assert_close(found.diffusion, torch.zeros(2).double(), rtol=0, atol=1e-3)  # rates come in float32
    torch.testing.assert_close(found.prior, torch.full((2,), 4 * math.log(num_states)).double())
    assert 0 < found.reconstruction.mean() < 0.01

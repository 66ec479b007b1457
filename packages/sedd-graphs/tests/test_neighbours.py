"""Noise on nearest neighbours: the laws on 64 states, draws at a vocabulary's size, and what is no graph."""

from __future__ import annotations

import pytest
import torch
from sedd_graphs import Neighbours
from sedd_graphs.testing import GRAPH_LAWS
from sedd_graphs.testing._support import assert_frequencies


def nearest(num_states, k, seed=0):
    """Of points in space, with hubs that are neighbours of many and points that are of none."""
    points = torch.randn(num_states, 8, generator=torch.Generator().manual_seed(seed))
    return torch.cdist(points, points).fill_diagonal_(torch.inf).topk(k, largest=False).indices


def some_rates(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1


SMALL = Neighbours(nearest(64, 4), between=0.2)
UNEVEN = Neighbours(nearest(9, 3), some_rates((9, 3)), between=0.05)
ALL = Neighbours(torch.tensor([[1, 2], [0, 2], [0, 1]]), between=1.0)  # rows name every state


@pytest.mark.parametrize("law", GRAPH_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("graph", [SMALL, UNEVEN, ALL], ids=repr)
def test_law(graph, law):
    law(graph)


def test_the_generator_is_that_of_its_neighbours():
    index, rates = nearest(9, 3), some_rates((9, 3)).double()
    Q = torch.full((9, 9), 0.05 / 9, dtype=torch.float64)
    for x in range(9):
        for y, rate in zip(index[x].tolist(), rates[x].tolist(), strict=True):
            Q[y, x] += rate
    Q.fill_diagonal_(0)
    Q -= Q.sum(0).diag()
    states = torch.arange(9)
    torch.testing.assert_close(UNEVEN.rates_out_of(states).dense().T.double(), Q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(UNEVEN.rates_into(states).dense().double(), Q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(SMALL.rates_out_of(states).sum(), torch.zeros(9), rtol=0, atol=1e-6)


def test_a_vocabulary_is_noised_exactly():
    """50,257 states with 64 neighbours each: frequencies of the way moved, the same for all on a ring of jumps."""
    num_states, count = 50_257, 20_000
    offset = torch.randperm(num_states - 1, generator=torch.Generator().manual_seed(0))[:64] + 1
    graph = Neighbours((torch.arange(num_states)[:, None] + offset) % num_states, between=0.1)
    x0 = torch.randint(num_states, (count,), generator=torch.Generator().manual_seed(1))
    for sigma in (torch.tensor(0.05), torch.tensor(1.0)):
        moved = (graph.sample(x0, sigma, generator=torch.Generator().manual_seed(2)) - x0) % num_states
        p = graph.transition_from(torch.tensor(0), sigma).value.double()
        assert_frequencies(moved, p, f"ways moved at {float(sigma)}")
    row = graph.rates_into(x0[:100])
    assert row.index.shape == (100, 65)
    assert (graph.sample_prior((5,)) >= 0).all()


def test_draws_under_vmap_have_the_same_law():
    """Where the number of jumps cannot be read, as many rounds are made as there can be jumps."""
    graph = Neighbours(nearest(9, 3), some_rates((9, 3)), between=1.0)
    x0, sigma = torch.full((20, 1000), 3), torch.tensor(0.7)
    torch.manual_seed(0)
    drawn = torch.func.vmap(lambda x: graph.sample(x, sigma), randomness="different")(x0)
    assert_frequencies(
        drawn.flatten(), graph.transition_from(torch.tensor(3), sigma).value.double(), "draws under vmap"
    )


def test_endless_noise_draws_the_limit():
    graph = Neighbours(nearest(9, 3), some_rates((9, 3)), between=1.0)
    endless = torch.tensor(torch.inf)
    drawn = graph.sample(torch.full((20_000,), 3), endless, generator=torch.Generator().manual_seed(0))
    assert_frequencies(drawn, graph.prior(endless).dense().double(), "draws without end")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Neighbours(torch.ones(4, 2)), TypeError, "index must be an int64 tensor of states"),
        (lambda: Neighbours(torch.ones(4).long()), ValueError, r"index must be \(N, k\), .* got \(4,\)"),
        (
            lambda: Neighbours(torch.tensor([[1], [2]])),
            ValueError,
            "index must hold states 0 to 1 .*, found 2",
        ),
        (lambda: Neighbours(torch.tensor([[1], [1]])), ValueError, "its own neighbour, but does for state 1"),
        (lambda: Neighbours(torch.tensor([[1, 1], [0, 0]])), ValueError, "a neighbour twice, but does for state 0"),
        (
            lambda: Neighbours(torch.tensor([[1, 2], [2, 2], [0, 1]])),
            ValueError,
            "a neighbour twice, but does for state 1",
        ),
        (lambda: Neighbours(torch.tensor([[1], [0]]), between=0.0), ValueError, "between must be above 0, got 0.0"),
        (
            lambda: Neighbours(torch.tensor([[1], [0]]), torch.tensor([[1.0], [-1.0]])),
            ValueError,
            "rates must be finite and at least 0, found -1.0",
        ),
        (
            lambda: Neighbours(torch.tensor([[1], [0]]), torch.ones(2)),
            ValueError,
            r"rates must have the shape of index, \(2, 1\), got \(2,\)",
        ),
        (
            lambda: Neighbours(torch.tensor([[1], [0]]), torch.ones(2, 1).long()),
            TypeError,
            "rates must be a floating-point tensor, got a torch.int64 tensor",
        ),
    ],
)
def test_what_is_no_graph_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_slopes_are_those_of_the_generator():
    """d exp(sigma Q) / dsigma = Q exp(sigma Q) = exp(sigma Q) Q, of rows, columns and products; Q is not symmetric."""
    states, weight = torch.arange(9), torch.rand(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    Q = UNEVEN.rates_into(states).dense().double()
    sigma = torch.full((9,), 0.7, dtype=torch.float64, requires_grad=True)
    slope = Q @ torch.matrix_exp(0.7 * Q)
    for found, expected in [
        (UNEVEN.transition_from(states, sigma).dense() * weight, slope.T),
        (UNEVEN.transition_into(states, sigma).dense() * weight, slope),
        (UNEVEN.propagate(torch.eye(9, dtype=torch.float64), sigma) * weight, slope.T),
    ]:
        (gradient,) = torch.autograd.grad(found.sum(), sigma)
        torch.testing.assert_close(gradient, (weight * expected).sum(-1), rtol=1e-5, atol=1e-6)  # Q came in float32


def test_a_slow_leak_is_waited_for():
    """Two pairs that mix fast, and a way from one to the other at 1 / 50 of that rate: the limit to its last digits."""
    index = torch.tensor([[1, 2], [0, 2], [3, 0], [2, 0]])
    rates = torch.tensor([[1.0, 0.02], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    graph = Neighbours(index, rates, between=0.01)
    Q = torch.full((4, 4), 0.01 / 4, dtype=torch.float64)
    for x in range(4):
        Q[index[x], x] += rates[x]
    Q.fill_diagonal_(0)
    Q -= Q.sum(0).diag()
    expected = torch.linalg.solve(Q + 1, torch.ones(4, dtype=torch.float64))  # J p = 1 where p sums to 1, and Q p = 0
    found = graph.prior(torch.tensor(torch.inf, dtype=torch.float64)).dense()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for row in (graph.transition_from(torch.tensor(2), torch.tensor(1e5)), graph.prior(torch.tensor(1e5))):
        torch.testing.assert_close(row.dense().double(), expected, rtol=1e-6, atol=0)
    into = graph.transition_into(torch.tensor(2), torch.tensor(1e5)).dense()
    torch.testing.assert_close(into.double(), expected[2].expand(4), rtol=1e-6, atol=0)


def test_neighbours_come_at_equal_rates_unless_told_otherwise():
    graph = Neighbours(torch.tensor([[1, 2], [0, 2], [0, 3], [0, 1]]))
    assert repr(graph) == "Neighbours(4 states with 2 each, between=0.1)"
    expected = torch.tensor([-1 - 0.1 * 3 / 4, 0.5 + 0.1 / 4, 0.5 + 0.1 / 4, 0.1 / 4])
    torch.testing.assert_close(graph.rates_out_of(torch.tensor(0)).dense(), expected)


def test_rates_are_taken_as_numbers():
    rates = some_rates((9, 3)).requires_grad_()
    assert not Neighbours(nearest(9, 3), rates).transition_from(torch.tensor(0), torch.tensor(0.5)).value.requires_grad
    with pytest.raises(ValueError, match="rates must be finite and at least 0, found inf"):
        Neighbours(nearest(9, 3), torch.full((9, 3), torch.inf))

"""Concrete score matching, score entropy, implicit and denoising score entropy on a problem that can be enumerated.

The score is a table with one free number for each sequence, position and state, so that expectations, gradients and
minimisers are exact: no sampling, float64 throughout.
"""

from __future__ import annotations

import pytest
import torch
from sedd_objectives import (
    concrete_score_matching,
    denoising_score_entropy,
    denoising_score_entropy_without_constant,
    enumerated_implicit_score_entropy_loss,
    score_entropy,
)

pytestmark = pytest.mark.usefixtures("float64_rates")
SIGMA = torch.tensor(0.7, dtype=torch.float64)
KINDS = ["uniform", "absorbing", "hybrid", "dense", "dense absorbing"]


class Problem:
    """Random sequences of two tokens out of three, noised; each method is an exact expectation, given the table."""

    def __init__(self, graph, enumerated):
        self.graph, self.data = graph, enumerated(graph, length=2)
        self.x = self.data.states
        self.probability = self.data.marginal(SIGMA)
        self.log_ratio = self.data.log_ratios(self.x, SIGMA.expand(len(self.x)))
        self.rates = graph.rates_into(self.x)
        self.joint = self.data.kernel(SIGMA) * self.data.probability
        self.state, self.clean = (self.joint > 0).nonzero(as_tuple=True)

    def table(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.log_ratio.shape, generator=generator, dtype=torch.float64).requires_grad_()

    def expect(self, loss):
        return (self.probability * loss).sum()

    def expect_pairs(self, loss):
        return (self.joint[self.state, self.clean] * loss).sum()

    def pairs(self):
        return self.x[self.state], self.data.sequences[self.clean], SIGMA.expand(len(self.state))

    def concrete(self, table):
        return self.expect(concrete_score_matching(table, self.log_ratio.exp(), self.rates, self.x).sum(-1))

    def denoising_concrete(self, table):
        x, x0, sigma = self.pairs()
        loss = concrete_score_matching(table[self.state], self.graph.ratio(x, x0, sigma), self.graph.rates_into(x), x)
        return self.expect_pairs(loss.sum(-1))

    def explicit(self, table):
        return self.expect(score_entropy(table, self.log_ratio.exp(), self.rates, self.x).sum(-1))

    def implicit(self, table):
        loss = enumerated_implicit_score_entropy_loss(self.score(table), self.graph, self.x, SIGMA)
        return self.expect(loss)

    def denoising(self, table):
        x, x0, sigma = self.pairs()
        loss = denoising_score_entropy_without_constant(table[self.state], self.graph, x, x0, sigma)
        return self.expect_pairs(loss.sum(-1))

    def denoising_with_constant(self, table):
        x, x0, sigma = self.pairs()
        return self.expect_pairs(denoising_score_entropy(table[self.state], self.graph, x, x0, sigma).sum(-1))

    def constant(self):
        """The expected K of the true ratios: what separates (5) from (6)."""
        weight = torch.stack([self.rates_dense(i) for i in range(2)], 1)
        k = self.log_ratio.exp() * (self.log_ratio - 1)
        return self.expect(torch.where(weight > 0, weight * k, 0).sum((-1, -2)))

    def rates_dense(self, i):
        q = self.graph.matrix() if callable(self.graph.matrix) else self.graph.matrix
        return q[self.x[:, i]].clamp_min(0)

    def score(self, table):
        return lambda x, sigma: table[self.data.number(x)]

    def counts(self):
        """Entries of the table on which a loss can depend."""
        return torch.stack([self.rates_dense(i) for i in range(2)], 1) > 0


@pytest.fixture(params=KINDS)
def problem(request, make_graphs, enumerated):
    return Problem(make_graphs(3)[request.param], enumerated)


def gradient(loss, table):
    (slope,) = torch.autograd.grad(loss(table), table)
    return slope


def test_explicit_implicit_and_denoising_score_entropy_have_one_gradient_and_differ_by_the_constant(problem):
    for seed in range(3):
        table = problem.table(seed)
        want = gradient(problem.explicit, table)
        assert want.abs().max() > 0.01
        for loss in (problem.implicit, problem.denoising, problem.denoising_with_constant):
            torch.testing.assert_close(gradient(loss, table), want, rtol=1e-10, atol=1e-12)
        value = problem.explicit(table) - problem.constant()
        torch.testing.assert_close(problem.implicit(table), value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(problem.denoising(table), value, rtol=1e-10, atol=1e-10)


def test_concrete_score_matching_has_one_gradient_against_the_ratios_of_marginals_and_of_transitions(problem):
    table = problem.table(0)
    want = gradient(problem.concrete, table)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(gradient(problem.denoising_concrete, table), want, rtol=1e-10, atol=1e-12)


def test_the_true_ratios_are_stationary_for_all_and_any_change_of_them_costs(problem):
    losses = (problem.concrete, problem.explicit, problem.implicit, problem.denoising)
    best = problem.log_ratio.nan_to_num().clone().requires_grad_()
    for loss in losses:
        least = loss(best)
        assert gradient(loss, best).abs().max() < 1e-12
        for seed in range(3):
            for size in (1e-3, 0.1, 2.0):
                assert loss((best + size * problem.table(seed)).detach()) > least


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_descent_from_anywhere_finds_the_same_minimiser(kind, make_graphs, enumerated):
    problem = Problem(make_graphs(3)[kind], enumerated)
    counts = problem.counts()
    for loss in (problem.concrete, problem.explicit, problem.implicit, problem.denoising):
        table = problem.table(7).detach().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [table], max_iter=200, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(loss=loss, table=table, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(table)
            value.backward()
            return value

        optimizer.step(closure)
        torch.testing.assert_close(table[counts], problem.log_ratio[counts], rtol=0, atol=1e-4)

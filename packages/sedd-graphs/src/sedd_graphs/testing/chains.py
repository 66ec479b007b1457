"""Laws of what is computed: the generator, its exponential, ratios, posteriors and priors, against matrix exponentials.

dp/dsigma = Q p (1),   p(. | x0) = exp(sigma Q)[., x0] (14)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sedd_graphs.testing._support import (
    SIGMAS,
    assert_close,
    dense,
    exponential,
    generator_of,
    law,
    reference_error,
    states_of,
    tokens_of,
    uniform_tokens,
)

__all__ = [
    "rates_form_a_generator",
    "transitions_are_the_exponential",
    "transitions_are_probabilities",
    "transitions_compose",
    "transitions_follow_kolmogorov",
    "ratios_are_quotients_of_transitions",
    "propagate_is_the_exponential",
    "prior_is_the_image_of_uniform_tokens",
    "prior_is_the_limit",
    "prior_kl_is_the_divergence",
    "posterior_is_bayes_rule",
    "tweedie_is_bayes_rule",
    "detailed_balance_carries_over",
]


@law
def rates_form_a_generator(graph: Any) -> None:
    """Columns of Q sum to 0, rates are not negative, and rows and columns are those of one matrix."""
    Q = generator_of(graph)
    scale = float(Q.abs().max())
    assert_close(Q.sum(0), torch.zeros(len(Q)), 1e-12 * scale, "the columns of Q must sum to 0")
    assert (Q - Q.diag().diag()).min() >= 0, "rates must not be negative off the diagonal of Q"
    assert_close(
        dense(graph.rates_into(states_of(graph)), graph), Q, 1e-12 * scale, "rates_into(x) must be the rows of Q"
    )


@law
def transitions_are_the_exponential(graph: Any) -> None:
    """transition_from and transition_into are the columns and rows of exp(sigma Q)."""
    Q, x = generator_of(graph), states_of(graph)
    for s in SIGMAS:
        P, level = exponential(Q, s), torch.tensor(s)
        assert_close(
            dense(graph.transition_from(x, level), graph).T, P, reference_error(s), f"transition_from at sigma = {s}"
        )
        assert_close(
            dense(graph.transition_into(x, level), graph), P, reference_error(s), f"transition_into at sigma = {s}"
        )


@law
def transitions_are_probabilities(graph: Any) -> None:
    """Not negative, and the columns of exp(sigma Q) sum to 1."""
    x = states_of(graph)
    for s in SIGMAS:
        p = dense(graph.transition_from(x, torch.tensor(s)), graph)
        assert (p >= 0).all(), f"a probability of transition_from is negative at sigma = {s}: {float(p.min())}"
        assert_close(p.sum(-1), torch.ones(len(x)), 1e-12, f"the sum of transition_from at sigma = {s}")


@law
def transitions_compose(graph: Any) -> None:
    """exp((a + b) Q) = exp(a Q) exp(b Q)."""
    x = states_of(graph)

    def matrix(s: float) -> Tensor:
        return dense(graph.transition_into(x, torch.tensor(s)), graph)

    for a, b in [(1e-4, 0.3), (0.25, 0.25), (0.5, 2.5), (3.0, 10.0)]:
        assert_close(matrix(a) @ matrix(b), matrix(a + b), 1e-10, f"exp({a} Q) exp({b} Q) against exp({a + b} Q)")


@law
def transitions_follow_kolmogorov(graph: Any) -> None:
    """D exp(sigma Q) / dsigma = Q exp(sigma Q) by automatic differentiation: a learnt schedule needs it."""
    Q, x = generator_of(graph), states_of(graph)
    for s in (1e-3, 0.2, 1.5):
        level = torch.full((len(Q),), s, requires_grad=True)
        p = dense(graph.transition_from(x, level), graph)
        assert p.requires_grad, "transition_from must be differentiable in sigma"
        slope = torch.stack([torch.autograd.grad(p_y.sum(), level, retain_graph=True)[0] for p_y in p.T])
        assert_close(
            slope, Q @ exponential(Q, s), 1e-9 * max(1.0, float(Q.abs().max())), f"the derivative at sigma = {s}"
        )


@law
def ratios_are_quotients_of_transitions(graph: Any) -> None:
    """ratio(x, x0, sigma) is p(. | x0) / p(x | x0), wherever x0 can have become x."""
    Q = generator_of(graph)
    x, x0 = torch.cartesian_prod(states_of(graph), states_of(graph)).T
    for s in SIGMAS[1:]:
        P = exponential(Q, s)
        likely = P[x, x0] > 1e4 * reference_error(s)
        row = dense(graph.ratio(x[likely], x0[likely], torch.tensor(s)), graph)
        expected, at_x = P[:, x0[likely]].T, P[x, x0][likely, None]
        error = (row * at_x - expected).abs() - reference_error(s) * (2 + row)
        assert (error <= 0).all(), f"ratio at sigma = {s} is off by up to {float(error.max()):.2e} times p(x | x0)"


@law
def propagate_is_the_exponential(graph: Any) -> None:
    """propagate(v, sigma) is exp(sigma Q) v, at either sign of sigma."""
    Q = generator_of(graph)
    fastest = float(-Q.diagonal().min()) or 1.0
    v = torch.randn(2, 3, len(Q), generator=torch.Generator().manual_seed(0))
    for s in (*SIGMAS, *(-s / max(1.0, fastest) for s in SIGMAS[1:-2])):
        expected = v @ exponential(Q, s).T
        tolerance = 1e-9 * float(expected.abs().max())
        assert_close(graph.propagate(v, torch.full((2,), s)), expected, tolerance, f"propagate at sigma = {s}")
    levels = torch.tensor([0.3, -0.1 / fastest])  # one level a sequence
    expected = torch.stack([row @ torch.matrix_exp(s * Q).T for row, s in zip(v, levels, strict=True)])
    assert_close(graph.propagate(v, levels), expected, 1e-9, "propagate at two levels at once")


@law
def prior_is_the_image_of_uniform_tokens(graph: Any) -> None:
    """prior(sigma) is exp(sigma Q) applied to uniform tokens."""
    Q = generator_of(graph)
    for s in SIGMAS:
        p = dense(graph.prior(torch.tensor([s, s])), graph)
        assert_close(
            p, (exponential(Q, s) @ uniform_tokens(graph)).expand(2, -1), reference_error(s), f"prior at sigma = {s}"
        )


@law
def prior_is_the_limit(graph: Any) -> None:
    """prior(inf) is where uniform tokens end: no longer moved by Q."""
    Q = generator_of(graph)
    p = dense(graph.prior(torch.tensor(math.inf)), graph)
    assert p.isfinite().all(), "prior(inf) must be finite"
    assert_close(p.sum(), torch.ones(()), 1e-10, "the sum of prior(inf)")
    assert_close(Q @ p, torch.zeros(len(Q)), 1e-10 * float(Q.abs().max()), "Q prior(inf)")
    P = torch.matrix_exp(Q)
    for _ in range(20):
        P = P @ P
    assert_close(p, P @ uniform_tokens(graph), 1e-6, "prior(inf) against exp(2^20 Q)")


@law
def prior_kl_is_the_divergence(graph: Any) -> None:
    """prior_kl(x0, sigma) is KL(p(. | x0) || prior(sigma)), not negative."""
    x0 = tokens_of(graph)
    for s in (1e-3, 0.3, 2.0, 20.0):
        level = torch.tensor(s)
        p, q = dense(graph.transition_from(x0, level), graph), dense(graph.prior(level), graph)
        expected = torch.xlogy(p, torch.where(p > 0, p / q, 1)).sum(-1)
        found = graph.prior_kl(x0, level)
        assert_close(found, expected, 1e-10, f"prior_kl at sigma = {s}")
        assert (found >= 0).all(), f"prior_kl is negative at sigma = {s}: {float(found.min())}"


@law
def posterior_is_bayes_rule(graph: Any) -> None:
    """posterior(x, x0, s, t) is p(x_t | x_s) p(x_s | x0) / p(x_t | x0), wherever x0 can have become x."""
    Q = generator_of(graph)
    x, x0 = torch.cartesian_prod(states_of(graph), states_of(graph)).T
    for s, t in [(0.1, 0.4), (0.5, 0.6), (1.0, 5.0), (0.3, 0.3), (0.0, 0.7)]:
        joint = exponential(Q, t - s)[x] * exponential(Q, s)[:, x0].T
        likely = joint.sum(-1) > 1e-5
        row = dense(graph.posterior(x[likely], x0[likely], torch.tensor(s), torch.tensor(t)), graph)
        expected = joint[likely] / joint[likely].sum(-1, keepdim=True)
        assert_close(row, expected, 1e-4 * reference_error(1.0) / 1e-9, f"posterior at sigma = {s} of {t}")


@law
def tweedie_is_bayes_rule(graph: Any) -> None:
    """(exp(-d Q) s)_y exp(d Q)[x, y], with the exact score s of x, is the chance that x was y (19)."""
    Q = generator_of(graph)
    weights = torch.rand(len(Q), generator=torch.Generator().manual_seed(0)) + 0.1
    data = weights * (uniform_tokens(graph) > 0)
    data = data / data.sum()
    early, late = exponential(Q, 0.5) @ data, exponential(Q, 0.55) @ data
    x, d = states_of(graph)[late > 1e-6], torch.tensor(0.05)
    score = late / late[x][:, None]
    found = graph.propagate(score, -d) * dense(graph.transition_into(x, d), graph)
    expected = exponential(Q, 0.05)[x] * early / late[x][:, None]
    growth = math.exp(min(0.05 * float(-Q.diagonal().min()) * 2, 50.0))
    assert_close(found, expected, 1e-10 * growth / float(late[x].min()), "Tweedie's step against Bayes' rule")


@law
def detailed_balance_carries_over(graph: Any) -> None:
    """Where Q is reversible with respect to the limit, so is exp(sigma Q)."""
    Q, limit = generator_of(graph), dense(graph.prior(torch.tensor(math.inf)), graph)
    flow = Q * limit
    if (flow - flow.T).abs().max() > 1e-10 * float(Q.abs().max()):
        return
    for s in SIGMAS[1:]:
        flow = dense(graph.transition_into(states_of(graph), torch.tensor(s)), graph) * limit
        assert_close(flow, flow.T, 1e-10, f"the probability flow at sigma = {s} against its reverse")

"""Laws of a bound on -log p(x0)."""

from __future__ import annotations

import torch

from ..interfaces import LikelihoodGraph, Noise
from ._enumerated import BoundFunction, Problem, assert_near

__all__ = [
    "bound_of_the_exact_score_is_the_entropy",
    "bound_is_not_below_its_terms",
    "standard_error_is_the_spread",
]

DRAWS = 1000


def bound_of_the_exact_score_is_the_entropy(bound: BoundFunction, graph: LikelihoodGraph, noise: Noise) -> None:
    """Of single tokens: the entropy plus KL(p_1 || prior), whatever t_min is, for then the posterior is the decoder.

    The prior is that of the graph's `prior_kl`: E KL(p(.|x0) || prior) = I(x0; x_1) + KL(p_1 || prior).
    """
    problem = Problem(graph, length=1)
    sigma = noise(torch.ones(1, dtype=torch.float64))[0][0]
    of_end = problem.transition(sigma)[:, problem.sequences[:, 0]] * problem.probability
    p = problem.marginal(sigma)
    known = torch.where(of_end > 0, of_end * (of_end / (p[:, None] * problem.probability)).log(), 0).nansum()
    expected = problem.entropy() + problem.prior(noise) - float(known)
    found = bound(problem.score(), graph, noise, problem.draw(DRAWS), generator=problem.generator)
    assert_near(found.value, expected, "the bound of the exact score")


def bound_is_not_below_its_terms(
    bound: BoundFunction, graph: LikelihoodGraph, noise: Noise, *, t_min: float = 1e-3
) -> None:
    """For wrong scores it is no less than the integral over [t_min, 1] and the prior's term, nor than the entropy."""
    problem = Problem(graph, length=2)
    for wrong in (0.4, 1.0):
        score = problem.score(wrong)
        found = bound(score, graph, noise, problem.draw(DRAWS), generator=problem.generator).value
        terms = problem.integral(score, noise, t_min) + problem.prior(noise)
        least = max(terms, problem.entropy())
        assert_near(found, least, f"the bound of a score off by {wrong} times a random one", least=True)


def standard_error_is_the_spread(bound: BoundFunction, graph: LikelihoodGraph, noise: Noise) -> None:
    """The mean squared standard error is the variance of the value over repeats of one sequence, within a half."""
    problem = Problem(graph, length=2)
    x0 = problem.sequences[:1].expand(DRAWS, -1)
    found = bound(problem.score(0.3), graph, noise, x0, generator=problem.generator)
    stated, spread = float(found.standard_error.double().square().mean()), float(found.value.double().var())
    assert spread / 2 <= stated <= spread * 2, (
        f"the mean squared standard error must be the value's variance over repeats, {spread:.4g}, got {stated:.4g}"
    )

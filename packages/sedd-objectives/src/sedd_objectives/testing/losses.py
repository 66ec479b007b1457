"""Laws of a loss that is the integrand of the diffusion loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interfaces import LikelihoodGraph, Noise
from ._enumerated import ERRORS, Loss, Problem, assert_near

__all__ = ["loss_is_the_enumerated_integrand", "loss_is_least_at_the_true_score"]

DRAWS = 2000


def loss_is_the_enumerated_integrand(loss: Loss, graph: LikelihoodGraph, noise: Noise) -> None:
    """At three times, for a wrong score and the exact one, its mean is dsigma E sum DSE, in nats a sequence."""
    problem = Problem(graph, length=2)
    x0 = problem.sequences[1]
    for wrong in (1.0, 0.0):
        score = problem.score(wrong)
        for time in (0.15, 0.5, 0.9):
            t = torch.full((DRAWS,), time, dtype=torch.float64)
            found = loss(score, graph, noise, x0.expand(DRAWS, -1), t, generator=problem.generator)
            assert found.shape == (DRAWS,), f"a loss must be (B,), one value a sequence, got {tuple(found.shape)}"
            sigma, dsigma = noise(t[:1])
            expected = float(dsigma) * problem.integrand(score, x0, sigma[0])
            assert_near(found, expected, f"the loss's mean at t = {time}, its score off by {wrong} times a random one,")


def loss_is_least_at_the_true_score(loss: Loss, graph: LikelihoodGraph, noise: Noise) -> None:
    """A step either way from the exact log-score, by a random function of the state or a constant, raises its mean."""
    problem = Problem(graph, length=2)
    x0, t = problem.draw(DRAWS), torch.rand(DRAWS, generator=problem.generator, dtype=torch.float64) * 0.9 + 0.05

    def at(wrong: float, shift: float) -> Tensor:
        score, draws = problem.score(wrong), torch.Generator().manual_seed(1)  # one noise: differences are known well

        def shifted(x: Tensor, sigma: Tensor) -> Tensor:
            moved: Tensor = score(x, sigma) + shift
            return moved

        return loss(shifted, graph, noise, x0, t, generator=draws).double()

    exact = at(0.0, 0.0)
    for name, wrong, shift in (("a random function of the state", 1.0, 0.0), ("a constant", 0.0, 1.0)):
        for step in (0.5, -0.5):
            rise = at(step * wrong, step * shift) - exact
            mean, error = float(rise.mean()), float(rise.std()) / DRAWS**0.5
            assert mean > ERRORS * error, (
                f"the loss must rise where the log-score is off by {step} times {name}, and changes by "
                f"{mean:.4f} +- {error:.4f}"
            )
        slope = (at(1e-3 * wrong, 1e-3 * shift) - at(-1e-3 * wrong, -1e-3 * shift)) / 2e-3
        assert_near(slope, 0.0, f"the loss's slope at the exact score, by {name},", size=float(exact.mean()))

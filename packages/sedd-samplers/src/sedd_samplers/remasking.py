"""Remasking: the absorbing reverse process in which tokens can be taken back.

Wang et al., *Remasking discrete diffusion models with inference-time scaling* (ReMDM, 2025). With lambda the mask
probability and alpha = 1 - lambda, a step from t to s remasks every token with a probability r, and unmasks every mask
with so much more that each position's law stays what it was (their equation 5):

    a token:   mask with r
    a mask:    token y with p(x0 = y | x_t) (alpha_s - (1 - r) alpha_t) / lambda_t
               mask with (lambda_s - r alpha_t) / lambda_t

    0 <= r <= min(1, lambda_s / alpha_t)

At r = 0 this is Tweedie's step. How r depends on the step is a schedule, a callable (sigma_t, sigma_s, r_max) -> r:

    capped(eta)      min(r_max, eta)                          section 4.1
    rescaled(eta)    eta r_max                                section 4.1
    at_rate(gamma)   min(r_max, gamma (sigma_t - sigma_s))    the forward process at gamma times its rate, and as much
                                                              more of the reverse: a predictor-corrector in one step

One position by itself keeps its exact law under any of them, at any number of steps. Several positions that move in the
same step do not see each other. Under `at_rate` the number of moves does not grow with the number of steps and the law
converges to the true one, at first order; under the two others tokens are taken back at every step, however short, and
what is left of the error does not vanish. With a model that is itself in error that can be a good bargain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import absorption_rate, clean_posterior, mask_probability
from .reverse import Reverse

__all__ = ["Remasking", "RemaskSchedule", "capped", "rescaled", "at_rate"]

RemaskSchedule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sigma_t (B,), sigma_s (B,), r_max (B,)) -> r (B,) in [0, r_max]."""


@dataclass(frozen=True)
class Remasking:
    """ReMDM for absorbing graphs, with one evaluation of the score a step.

    Args:
        schedule: the probability with which a step remasks a token.

    Raises:
        ValueError: when called, for a graph that is not absorbing, and where the schedule leaves [0, r_max].
    """

    schedule: RemaskSchedule

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        graph = reverse.graph
        rate = absorption_rate(graph, x.device, "Remasking")
        assert graph.mask_id is not None
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]
        lambda_t, lambda_s = mask_probability(sigma_t, rate), mask_probability(sigma_s, rate)
        alpha_t = 1 - lambda_t
        r_max = (lambda_s / alpha_t).clamp(max=1)
        r = self.schedule(sigma_t, sigma_s, r_max)
        if not ((r >= 0) & (r <= r_max)).all():
            raise ValueError(
                f"the remasking schedule must stay within [0, r_max], got {r.tolist()} of {r_max.tolist()}"
            )
        stay = (lambda_s - r * alpha_t) / lambda_t

        def unmask(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            clean = clean_posterior(log_score, x, graph, sigma_t[sequence])
            kept = stay[sequence].to(clean.dtype)
            clean.mul_(1 - kept[:, None])
            clean[:, graph.mask_id] = kept
            return clean

        tokens = (x != graph.mask_id) & ~reverse.frozen
        return reverse.flip(reverse.redraw(x, sigma_t, reverse.movable(x), unmask), tokens, graph.mask_id, r)


def capped(eta: float) -> RemaskSchedule:
    """R = min(r_max, eta) with eta in [0, 1]."""
    _check("eta", eta, most=1)
    return lambda sigma_t, sigma_s, r_max: r_max.clamp(max=eta)


def rescaled(eta: float) -> RemaskSchedule:
    """R = eta r_max with eta in [0, 1]."""
    _check("eta", eta, most=1)
    return lambda sigma_t, sigma_s, r_max: eta * r_max


def at_rate(gamma: float) -> RemaskSchedule:
    """R = min(r_max, gamma (sigma_t - sigma_s)) with gamma >= 0."""
    _check("gamma", gamma, most=float("inf"))
    return lambda sigma_t, sigma_s, r_max: torch.minimum(r_max, gamma * (sigma_t - sigma_s))


def _check(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most or value == float("inf"):
        raise ValueError(f"{name} must be finite and lie in [0, {most:g}], got {value!r}")

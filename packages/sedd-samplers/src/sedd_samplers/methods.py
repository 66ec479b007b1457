"""Methods that step on a time grid with one evaluation of the score a step: the kernels, applied to every position.

A method is any callable `(reverse, x, t, s) -> x`: it moves the states x (B, L) from the times t (B,) to the earlier
times s (B,). How it gets there is its own affair, so that exact methods, which choose their times at random, fit the
same loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .kernels import euler_probs, tau_leaping_probs, tweedie_probs
from .reverse import Reverse

__all__ = ["Method", "Euler", "TauLeaping", "Tweedie"]


class Method(Protocol):
    """One step of a sampler, from times t down to times s."""

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor, /) -> Tensor:
        """New states (B, L) int64 at times s (B,), from x (B, L) at times t (B,), both float64; x is left alone."""


@dataclass(frozen=True)
class Euler:
    """Every position jumps by itself with the probabilities of equation 17; first order in the step."""

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, dsigma = reverse.noise(t)
        dose = (t - s) * dsigma

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return euler_probs(log_score, x, reverse.graph, dose[sequence])

        return reverse.redraw(x, sigma, reverse.movable(x), kernel)


@dataclass(frozen=True)
class TauLeaping:
    """Every position jumps with the reverse rates of the step's beginning; first order in the step.

    Campbell et al., *A continuous time framework for discrete denoising models* (2022), with states that are labels
    rather than counts: of several jumps in one step the last decides.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, dsigma = reverse.noise(t)
        dose = (t - s) * dsigma
        return reverse.redraw(
            x,
            sigma,
            reverse.movable(x),
            lambda log_score, x, b, _: tau_leaping_probs(log_score, x, reverse.graph, dose[b]),
        )


@dataclass(frozen=True)
class Tweedie:
    """Every position is drawn from its own exact reverse marginal, equation 19; first order in the step.

    What is left of the step error is that positions which move in the same step do not see each other.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, _ = reverse.noise(t)
        dose = sigma - reverse.noise(s)[0]

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return tweedie_probs(log_score, x, reverse.graph, dose[sequence])

        return reverse.redraw(x, sigma, reverse.movable(x), kernel)

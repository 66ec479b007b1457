"""Ancestral sampling as D3PM does it: the posterior of a step, averaged over the model's posterior of clean tokens.

Austin et al., *Structured denoising diffusion models in discrete state-spaces* (2021), equation 4, at the noise levels
sigma_s < sigma_t of a step, D = sigma_t - sigma_s:

    p(x_s | x_t) = sum_{x0} p(x0 | x_t) q(x_s | x_t, x0)
    q(x_s | x_t, x0) = exp(D Q)[x_t, x_s] exp(sigma_s Q)[x_s, x0] / exp(sigma_t Q)[x_t, x0]

Tweedie's theorem gives p(x0 | x_t) = (exp(-sigma_t Q) s)_x0 exp(sigma_t Q)[x_t, x0]. Put in, the sum over x0 collapses:

    p(x_s | x_t) = exp(D Q)[x_t, x_s] (exp(sigma_s Q) exp(-sigma_t Q) s)_{x_s} = exp(D Q)[x_t, x_s] (exp(-D Q) s)_{x_s}

which is the Tweedie step (19). The two part only where the score is not that of any distribution: here p(x0 | x_t) is
first made a distribution over tokens, so that what is drawn from is one too. For the absorbing graph that means: a mask
stays with its true probability lambda_s / lambda_t, however much the model's posterior sums to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interfaces import Graph, Row
from .masking import clean_posterior
from .reverse import Reverse

__all__ = ["Ancestral", "ancestral_probs"]


@dataclass(frozen=True)
class Ancestral:
    """Every position is drawn from the averaged posterior; first order in the step, like Tweedie."""

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return ancestral_probs(log_score, x, reverse.graph, sigma_s[sequence], sigma_t[sequence])

        return reverse.redraw(x, sigma_t, reverse.movable(x), kernel)


def ancestral_probs(log_score: Tensor, x: Tensor, graph: Graph, sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """sum_{x0} p(x0 | x_t = x) q(x_s | x_t = x, x0).

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        sigma_s: (M,) the total noise after the step.
        sigma_t: (M,) the total noise before it, at least sigma_s.

    Returns:
        (M, N), each row summing to 1; negative by no more than rounding.
    """
    clean = clean_posterior(log_score, x, graph, sigma_t)
    sigma_s, sigma_t = sigma_s.to(clean.dtype), sigma_t.to(clean.dtype)
    reach = _dense(graph.transition_into(x, sigma_t), clean)
    earlier = graph.propagate(torch.where(reach > 0, clean / reach, 0.0), sigma_s)
    return earlier.mul_(_dense(graph.transition_into(x, sigma_t - sigma_s), clean))


def _dense(row: Row, like: Tensor) -> Tensor:
    return row.base.to(like.dtype)[:, None].expand_as(like).scatter(1, row.index, row.value.to(like.dtype))

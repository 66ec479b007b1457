"""The first-hitting sampler: the absorbing reverse process without discretisation, one position at a time.

Zheng et al., *Masked diffusion models are secretly time-agnostic masked models and exploit inaccurate categorical
sampling* (2024), proposition 4.1. With K masked positions at mask probability lambda, each of them comes to light at a
time of its own, whatever the model says: its mask probability then is uniform on [0, lambda]. The next one is the
largest of K uniforms,

    lambda' = lambda u^(1/K),      u ~ U(0, 1],

its position any of the K with equal chances, and its token has the model's posterior given everything that is in the
open. The time of the event follows from lambda(sigma) = 1 - exp(-sigma).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import absorption_rate, clean_posterior, mask_probability
from .reverse import Kernel, Reverse

__all__ = ["FirstHitting"]


@dataclass(frozen=True)
class FirstHitting:
    """Exact for absorbing graphs, on any grid; as many evaluations of the score as positions come to light.

    The sequences of a batch have their own times and their own numbers of events; each event is one call of the model
    for all sequences that have one left. A posterior that does not sum to 1 is normalised.

    Raises:
        ValueError: when called, for a graph that is not absorbing.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """All events between t and s; see `Method`."""
        rate = absorption_rate(reverse.graph, x.device, "FirstHitting")
        now, end = (mask_probability(reverse.noise(time)[0], rate) for time in (t, s))
        while True:
            masked = reverse.movable(x)
            count = masked.sum(1)
            row = ((count > 0) & (now > end)).nonzero()[:, 0]
            if not len(row):
                return x
            u = 1 - reverse.uniforms(row, torch.zeros_like(row))
            now = now.index_put((row,), now[row] * u ** (1 / count[row]))
            row = row[now[row] > end[row]]
            rank = (reverse.uniforms(row, torch.zeros_like(row)) * count[row]).long()
            where = torch.zeros_like(masked)
            where[row] = masked[row] & (masked[row].cumsum(1) == rank[:, None] + 1)
            sigma = -torch.log1p(-now) / rate
            x = reverse.redraw(x, sigma, where, _unmask(reverse, sigma))


def _unmask(reverse: Reverse, sigma: Tensor) -> Kernel:
    return lambda log_score, x, sequence, _: clean_posterior(log_score, x, reverse.graph, sigma[sequence])

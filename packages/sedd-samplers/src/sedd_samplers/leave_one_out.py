"""The law of each position's clean token given the *other* positions: what a score knows, and what makes one.

    pi(x0) = (exp(-sigma Q) s)_x0        p(x0 | x_t) = pi(x0) exp(sigma Q)[x_t, x0], normalised (18)
    s      = exp(sigma Q) pi             shifted to s_x = 1

The same with the noise D of a step in the place of sigma, and the law of the state that noise earlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fast import exp_but_at, log, spread
from .interfaces import Graph

__all__ = ["concrete_score", "leave_one_out", "without_own", "score_of", "carry"]


def concrete_score(log_score: Tensor, x: Tensor) -> Tensor:
    """S = exp(log_score), a new tensor (M, N); the entry at x carries no information and its true value is 1."""
    return exp_but_at(log_score, x)


def leave_one_out(log_score: Tensor, x: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """The first factor of equation 18: pi = exp(-sigma Q) s, the law of each position's x0 given the other positions.

        p(x0 = c | x_t) = pi(c) p(x | c) / sum over c' of pi(c') p(x | c')

    pi does not know the position's own state x. Arguments as for `tweedie_posterior`.

    Returns:
        (M, N), each row summing to 1, 0 at the mask and at states that cannot have become x.
    """
    sigma = sigma.to(log_score.dtype)
    pi = graph.propagate(concrete_score(log_score, x), -sigma).clamp_(min=0)
    if graph.mask_id is not None:
        pi[:, graph.mask_id] = 0
    pi = torch.where(spread(graph.transition_into(x, sigma), pi) > 0, pi, 0.0)
    return pi.div_(pi.sum(-1, keepdim=True))


def without_own(probs: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """The law (M, N) of a state a noise D earlier without what x itself says of it: p(. | x) / p(x | .), unnormalised.

    States that cannot have become x get 0, and so do those whose likelihood is so small that sums of inverses are no
    numbers (1e-301, and 1e-31 in single precision). The opposite of `leave_one_out` times its likelihood.
    """
    reach = spread(graph.transition_into(x, delta_sigma.to(probs.dtype)), probs)
    can = reach > 1e7 * torch.finfo(reach.dtype).tiny
    return torch.where(can, probs / torch.where(can, reach, 1.0), 0.0)  # no gradient of 0 / 0


def score_of(pi: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """The log-score of a leave-one-out law: log exp(D Q) pi, shifted to 0 at x; (M, N)."""
    s = carry(pi, graph, delta_sigma).clamp_min(0)
    at_x = s.gather(1, x[:, None])  # 1, had every row the sum 1 over the states that can have become x
    can = at_x > 0
    return log(torch.where(can, s / torch.where(can, at_x, 1.0), torch.nan))


def carry(weights: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """exp(sigma Q) v for v >= 0 (M, N), every entry precise relative to itself, however far v spreads.

    `propagate` is precise relative to its largest entry. Where a likelihood of 1e-60 has been divided by, that is not
    enough: under a graph whose rows name all their states the sum is taken over rows, every term positive.
    """
    sigma = sigma.to(weights.dtype)
    states = torch.arange(weights.shape[-1], device=weights.device)
    if graph.transition_into(states[:1], sigma[:1]).index.shape[-1] < len(states):
        return graph.propagate(weights, sigma)
    out = torch.empty_like(weights)
    levels, level = torch.unique(sigma, return_inverse=True)
    for k in range(len(levels)):
        step = spread(graph.transition_into(states, levels[k].expand(len(states))), weights.new_empty(2 * states.shape))
        out[level == k] = weights[level == k] @ step.T
    return out

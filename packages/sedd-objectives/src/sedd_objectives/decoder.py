"""The decoder of the bound's last term: a distribution over the clean token of one position, from the score at t_min.

Any distribution makes a bound. Tweedie's is the posterior if the score is exact,

    p(c | x) proportional to ( exp(-sigma Q) s )_c exp(sigma Q)[x, c],                                   (eq. 18)

but it takes the noise off the score, and on a graph that has smoothed it, such as a walk along many ordered states,
that turns rounding into most of the result. Then some of its entries come out negative, as no posterior's are. A second
one inverts nothing: it takes the score itself, the noised distribution given the other positions, for the clean one,

    p(c | x) proportional to s_c exp(sigma Q)[x, c],

which is blurred where the noise at t_min is more than a few states wide, and exact under absorption. The decoder is the
mixture of Tweedie's, without its negative entries, and the second one with a share of twice the negative part of the
first one's absolute sum: 0 where nothing went wrong, all of it where Tweedie's is noise. A share of 1e-6 is spread
evenly over the tokens, so that no token is impossible. What is mixed and how depends on x alone and not on the clean
token: it is a distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interfaces import PosteriorGraph

__all__ = ["EVEN_SHARE", "log_decoder"]

EVEN_SHARE = 1e-6
"""Probability that the decoder gives away evenly: costs 1e-6 nats a token at most, and bounds the loss of any token."""


def log_decoder(log_score: Tensor, graph: PosteriorGraph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Log p(x0 | x) of the decoder.

    Args:
        log_score: (m, N) float; the entry at x is ignored.
        graph: the forward process.
        x: (m,) int64, the noised states.
        x0: (m,) int64, the clean tokens.
        sigma: (m,) total noise.

    Returns:
        (m,) nats, differentiable by log_score.
    """
    log_score = log_score.scatter(-1, x[:, None], 0)
    score = (log_score - log_score.detach().amax(-1, keepdim=True)).exp()  # neither depends on the score's scale
    into = graph.transition_into(x, sigma)
    likelihood = into.base[:, None].expand(score.shape).scatter(-1, into.index, into.value).to(score.dtype)
    tokens = graph.num_states
    if graph.mask_id is not None:
        likelihood = likelihood.index_fill(-1, torch.tensor([graph.mask_id], device=x.device), 0)
        tokens -= 1
    tweedie = graph.propagate(score, -sigma) * likelihood
    doubt = _share(tweedie.clamp_max(0).sum(-1).neg(), tweedie.abs().sum(-1)).mul(2).clamp_max(1)
    first, second = (
        _share(p.gather(-1, x0[:, None])[:, 0], p.sum(-1)) for p in (tweedie.clamp_min(0), score * likelihood)
    )
    nothing = (score * likelihood).sum(-1) == 0
    mixed = (1 - doubt) * first + doubt * torch.where(nothing, 1 / tokens, second)
    return torch.log((1 - EVEN_SHARE) * mixed + EVEN_SHARE / tokens)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Part of total; all of it where there is nothing, so that a Tweedie of nothing is doubted altogether."""
    return torch.where(total == 0, 1, part / torch.where(total == 0, 1, total))

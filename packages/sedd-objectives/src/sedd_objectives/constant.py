"""Denoising score entropy as the paper prints it, without the constant K.

    sum_{y != x} Q[x, y] ( s_y - r_y log s_y ),   r_y = p(y|x0) / p(x|x0)                        (eq. 7)

The constant sum_{y != x} Q[x, y] K(r_y), K(a) = a (log a - 1), does not depend on the score: with it the loss is 0 at
its minimum for a given x0, without it its expectation is that of the implicit score entropy (eq. 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_sigma, check_states, expand_leading
from .denoising import denoising_score_entropy, spread
from .interfaces import Graph
from .jumps import can_move, merge

__all__ = ["denoising_score_entropy_without_constant", "score_entropy_constant"]


def denoising_score_entropy_without_constant(
    log_score: Tensor, graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor
) -> Tensor:
    """Eq. 7 as printed, per unit of total noise: `denoising_score_entropy` less `score_entropy_constant`.

    Arguments and errors are those of `denoising_score_entropy`, and so is the gradient.

    Returns:
        (...) nats a position, of either sign.
    """
    loss = denoising_score_entropy(log_score, graph, x, x0, sigma)
    return loss - score_entropy_constant(graph, x, x0, sigma).to(loss.dtype)


def score_entropy_constant(graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """sum_{y != x} Q[x, y] K(r_y), r_y = p(y|x0) / p(x|x0): what eq. 7 leaves out, per unit of total noise.

    Args:
        graph: the forward process.
        x: (...) int64, the noised states.
        x0: (...) int64, the clean states.
        sigma: total noise, of a shape that is a leading part of x's.

    Returns:
        (...) nats a position, float32 or float64 if the graph's ratios are; 0 where no jump leads into x.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, or an x that cannot have come from x0.
    """
    check_states("x", x, graph.num_states)
    check_states("x0", x0, graph.num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma = expand_leading("sigma", sigma, x)
    live = can_move(graph.rates_into(x), x, graph.num_states)
    x, x0, sigma = x[live], x0[live], sigma[live]
    with torch.autocast(x.device.type, enabled=False):
        ratio = graph.ratio(x, x0, sigma)
        dtype = torch.float64 if ratio.value.dtype == torch.float64 else torch.float32
        jumps = merge(graph.rates_into(x), ratio, x, dtype)
        distinct = 1 + (jumps.index[:, 1:] != jumps.index[:, :-1]).sum(-1)
        base = jumps.base_weight * (graph.num_states - distinct) * _k(jumps.base_ratio)
        constant = base + torch.where(jumps.weight > 0, jumps.weight * _k(jumps.ratio), 0).sum(-1)
    if not bool(constant.isfinite().all()):
        count = int((~constant.isfinite()).sum())
        raise ValueError(f"x cannot have come from its x0 at this sigma, or sigma is 0, at {count} positions")
    return spread(constant, live)


def _k(ratio: Tensor) -> Tensor:
    return torch.xlogy(ratio, ratio) - ratio

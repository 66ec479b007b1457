"""Score entropy and concrete score matching: two losses that a positive score minimises at the true ratios.

    SE(x)  = sum_{y != x} w_y ( s_y - r_y log s_y + K(r_y) ),   K(r) = r (log r - 1)             (eq. 5)
    CSM(x) = 1/2 sum_{y != x} w_y ( s_y - r_y )^2                                                (eq. 4)

Score entropy is the w-weighted Bregman divergence of -log between the scores s_y = exp(log_score_y) and the ratios r_y:
0 exactly where s = r and positive elsewhere. It is not symmetric in the two. Values are nats as soon as w are rates of
a unit of total noise. Concrete score matching, which score entropy replaces, has the same minimum but no barrier at
s = 0: its gradient by log s is w s (s - r), which vanishes where a score is far too small. With p(y|x0) / p(x|x0) in
the place of p(y) / p(x) the expectation of either changes by a constant.

`plain_score_entropy` and `plain_concrete_score_matching` are the equations as they stand, to be read first, and what
every faster way is tested against. `score_entropy` and `concrete_score_matching` are the same numbers for all
vocabularies and precisions: rows instead of dense vectors, a chunk at a time, accurate where s is near r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fast
from .checks import arithmetic_dtype, check_not_nan, check_states
from .interfaces import Row
from .jumps import DenseRow, Jumps, merge

__all__ = [
    "plain_score_entropy",
    "plain_concrete_score_matching",
    "constant",
    "score_entropy",
    "concrete_score_matching",
]


def plain_score_entropy(log_score: Tensor, ratio: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Eq. 5 as printed, (...), of dense log_score, ratio >= 0 and weight (..., N) at the states x (...) int64."""
    terms = weight * (log_score.exp() - ratio * log_score + constant(ratio))
    return terms.scatter(-1, x[..., None], 0).sum(-1)


def plain_concrete_score_matching(log_score: Tensor, ratio: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Eq. 4, weighted, (...), of dense log_score, ratio >= 0 and weight (..., N) at the states x (...) int64."""
    terms = weight * (log_score.exp() - ratio) ** 2 / 2
    return terms.scatter(-1, x[..., None], 0).sum(-1)


def constant(ratio: Tensor) -> Tensor:
    """K(r) = r (log r - 1), elementwise, and K(0) = 0: what makes score entropy 0 at its minimum."""
    positive = torch.where(ratio > 0, ratio, 1)  # filled twice, for the slope is infinite at 0
    return torch.where(ratio > 0, positive * (positive.log() - 1), 0)


def score_entropy(log_score: Tensor, ratio: Row | Tensor, weight: Row | Tensor, x: Tensor) -> Tensor:
    """sum_{y != x} w_y ( s_y - r_y log s_y + K(r_y) ), eq. 5, for every position.

    Args:
        log_score: (..., N) float, log s(x)_y. The entry at y = x is ignored. bfloat16 and half are computed in float32.
        ratio: r >= 0, a `Row` of batch shape (...) or all values (..., N).
        weight: w >= 0 but at x, where it is ignored; a `Row` or all values (..., N).
        x: (...) int64, the state of each position.

    Returns:
        (...) float32, or float64 if log_score or ratio is: the sum of each position, >= 0.

    Raises:
        ValueError: shapes that do not fit, states out of range, or a sum that is not a number.
    """
    with torch.autocast(log_score.device.type, enabled=False):
        jumps = _jumps(log_score, ratio, weight, x)
        loss = fast.sum_over_jumps(log_score.reshape(-1, log_score.shape[-1]), None, jumps)
    check_not_nan(loss, log_score)
    return loss.reshape(x.shape)


def concrete_score_matching(log_score: Tensor, ratio: Row | Tensor, weight: Row | Tensor, x: Tensor) -> Tensor:
    """1/2 sum_{y != x} w_y (s_y - r_y)^2, eq. 4, for every position. The paper's has w = 1.

    Args:
        log_score: (..., N) float, log s(x)_y. The entry at y = x is ignored. bfloat16 and half are computed in float32.
        ratio: r >= 0, a `Row` of batch shape (...) or all values (..., N).
        weight: w >= 0 but at x, where it is ignored; a `Row` or all values (..., N).
        x: (...) int64, the state of each position.

    Returns:
        (...) float32, or float64 if log_score or ratio is: the sum of each position, >= 0. It has no unit of
        information: squared ratios times w.

    Raises:
        ValueError: shapes that do not fit, states out of range, or a sum that is not a number.
    """
    with torch.autocast(log_score.device.type, enabled=False):
        jumps = _jumps(log_score, ratio, weight, x)
        loss = fast.squares_over_jumps(log_score.reshape(-1, log_score.shape[-1]), jumps)
    check_not_nan(loss, log_score)
    return loss.reshape(x.shape)


def _jumps(log_score: Tensor, ratio: Row | Tensor, weight: Row | Tensor, x: Tensor) -> Jumps:
    """The ratios and weights that `score_entropy` takes, checked against log_score (..., N), as one set of jumps."""
    num_states = log_score.shape[-1]
    check_states("x", x, num_states, log_score.shape[:-1])
    rows = []
    for name, row in (("ratio", ratio), ("weight", weight)):
        if isinstance(row, Tensor):
            if row.shape != log_score.shape:
                raise ValueError(f"{name} must have log_score's shape {tuple(log_score.shape)}, got {tuple(row.shape)}")
            row = DenseRow.of(row)
        if row.base.shape != x.shape:
            raise ValueError(f"{name} must be rows of x's shape {tuple(x.shape)}, got rows of {tuple(row.base.shape)}")
        rows.append(DenseRow(row.base.flatten(), row.index.flatten(0, -2), row.value.flatten(0, -2)))
    return merge(rows[1], rows[0], x.flatten(), arithmetic_dtype(log_score, rows[0].value), num_states)

"""Concrete score matching: the squared distance between scores and ratios, which score entropy replaces.

    CSM(x) = 1/2 sum_{y != x} w_y ( s_y - r_y )^2                                                (eq. 4)

It has the minimum of score entropy, at s = r, but no barrier at s = 0, and its gradient by log s is w s (s - r): it
vanishes where a score is far too small. With the ratios p(y|x0) / p(x|x0) in the place of p(y) / p(x) its expectation
changes by a constant, as that of score entropy does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import sum_dtype
from .interfaces import Row
from .rowwise import each_row
from .score_entropy import check_not_nan, jumps_between

__all__ = ["concrete_score_matching"]


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
        jumps = jumps_between(log_score, ratio, weight, x)
    rows = log_score.reshape(-1, log_score.shape[-1])
    loss = each_row(_half_squares, rows, None, *jumps.fields(), dtype=jumps.weight.dtype)
    check_not_nan(loss, log_score)
    return loss.reshape(x.shape)


def _half_squares(
    log_score: Tensor, base_weight: Tensor, base_ratio: Tensor, index: Tensor, weight: Tensor, ratio: Tensor
) -> Tensor:
    """The weighted sum over each row of (m, N), given the fields of its `Jumps`."""
    # What must not count is replaced beforehand: an overflowed score, or NaN at x, times 0 is no number.
    idle, base_idle = weight == 0, base_weight == 0
    listed = _excess(log_score.gather(-1, index).masked_fill(idle, 0), ratio.masked_fill(idle, 0))
    unlisted = log_score.scatter(-1, index, 0).masked_fill(base_idle[:, None], 0)
    base = _excess(unlisted, base_ratio.masked_fill(base_idle, 0)[:, None]).square().scatter(-1, index, 0)
    return (base_weight * base.sum(-1) + (weight * listed.square()).sum(-1)) / 2


def _excess(log_score: Tensor, ratio: Tensor) -> Tensor:
    """S - r, without cancelling: r (e^d - 1) with d = log s - log r where s is not much larger than r > 0."""
    wide = sum_dtype(ratio.device)
    positive = ratio > 0
    distance = (log_score.to(wide) - torch.where(positive, ratio, 1).to(wide).log()).to(log_score.dtype)
    near = positive & (distance < 1)
    far = log_score.masked_fill(near, 0).exp() - ratio
    return torch.where(near, ratio * distance.clamp_max(1).expm1(), far)

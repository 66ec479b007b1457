"""The Bregman divergence of -log between a score s and a ratio r, summed over the jumps into a state.

    D(s, r) = s - r log s + K(r),   K(r) = r (log r - 1)                     (eq. 5)
            = r phi(d),             phi(d) = e^d - 1 - d,  d = log s - log r

The first form cancels: near the optimum its three terms are of the size of r, their sum of the size of r d^2 / 2. The
second cannot be negative and is evaluated here so that it keeps its relative accuracy for every d: by its series for
small d, by s - r - r d where e^d may overflow although s does not. For r = 0 the divergence is s.

A row of the vocabulary is summed as `base` part plus exceptional states. The base part takes a few passes over the N
scores and no copy of weights or ratios; the exceptional states are zeroed in it rather than subtracted from it, since a
difference of two large sums would lose what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import sum_dtype
from ..jumps import Jumps

__all__ = ["Divergence", "divergence", "row_divergence", "jump_gradients", "with_gradients", "half_squares"]

_NEAR = 0.5  # |d| below which the series replaces e^d - 1 - d; the latter loses a factor 5 there, more below
_FAR = 80.0  # d above which e^d may overflow
_IN_CACHE = 1 << 18  # scores at a time on a CPU: a dozen passes over 1 MiB cost less than one over main memory


class Divergence(NamedTuple):
    """D(s, r) elementwise, with its derivatives."""

    value: Tensor
    """D(s, r), in the broadcast shape of the arguments."""
    slope: Tensor
    """dD / dlog s = s - r."""
    distance: Tensor
    """d = log s - log r; dD / dr = -d. Where r = 0 it is log s and means nothing."""


def _half_square_series(d: Tensor) -> Tensor:
    """phi(d) = d^2/2 (1 + d/3 (1 + d/4 (1 + ...))) for |d| < 1/2, to the precision of d's dtype."""
    last = 15 if d.dtype == torch.float64 else 8
    one = d.new_ones(())
    total = 1 + d / last
    for k in range(last - 1, 2, -1):
        total = torch.addcmul(one, total, d, value=1 / k)
    return total.mul_(d).mul_(d).mul_(0.5)


def divergence(log_score: Tensor, ratio: Tensor, *, out: Tensor | None = None) -> Divergence:
    """The Bregman divergence of s = exp(log_score) from the ratio, elementwise in broadcast shapes. Not differentiable.

    Args:
        log_score: log s, float; -inf is allowed.
        ratio: r >= 0, of a shape that broadcasts against log_score's; its dtype may be wider.
        out: room of log_score's shape that may be used for the result: fresh memory costs more than the exponential.
    """
    positive = ratio > 0
    if not bool(positive.any()):
        score = torch.exp(log_score, out=out)
        return Divergence(score, score, log_score)
    # log r in two parts: one rounding of it is up to 1e-6 in float32, more than d itself near the optimum.
    exact = torch.where(positive, ratio, 1).to(sum_dtype(ratio.device)).log()
    log_ratio, ratio = exact.to(log_score.dtype), ratio.to(log_score.dtype)
    d = (log_score - log_ratio).sub_((exact - log_ratio).to(log_score.dtype))
    growth = d.expm1()
    slope, value = growth * ratio, _excess(d, growth).mul_(ratio)
    if not bool(positive.all()) or bool(d.amax() >= _FAR):
        score = log_score.exp()
        slope = torch.where(positive & (d < _FAR), slope, score - ratio)
        value = torch.where(positive, torch.where(d < _FAR, value, slope - ratio * d), score)
    return Divergence(value, slope, d)


def _excess(d: Tensor, growth: Tensor) -> Tensor:
    """phi(d) = e^d - 1 - d, given e^d - 1: from the series at d clamped to |d| <= 1/2, plus the difference beyond.

    The difference is exactly 0 within, where clamping changes nothing. Selecting one of two formulas would cost more
    than the exponential does.
    """
    ends = d.new_tensor([-_NEAR, _NEAR])
    low, high = ends.expm1().tolist()
    near = d.clamp(-_NEAR, _NEAR)
    beyond = (growth - growth.clamp(low, high)).sub_(d).add_(near)
    return beyond.add_(_half_square_series(near))


def row_divergence(
    log_score: Tensor, jumps: Jumps, *, scale: Tensor | None = None, slope: Tensor | None = None
) -> Tensor:
    """sum_y w_y D(s_y, r_y) over each row, and its gradient with respect to the row's log-score.

    Args:
        log_score: (m, N) float.
        jumps: the weights and ratios of the m rows.
        scale: (m,) factor of each row in the gradient, 1 if None.
        slope: (m, N), where to write scale times the gradient, of log_score's dtype; not worked out if None.

    Returns:
        (m,) sums.
    """
    total = torch.empty_like(log_score[:, 0])
    factor = jumps.base_weight if scale is None else jumps.base_weight * scale
    if bool((jumps.base_weight > 0).any()):
        for part in _blocks(log_score, log_score.shape[-1]):
            out = None if slope is None else slope[part]
            total[part] = _sum_of_base(log_score[part], jumps.at(part), factor[part], out)
    else:
        total.zero_()
        if slope is not None:
            slope.zero_()
    for part in _blocks(log_score, jumps.index.shape[-1]):
        index, weight = jumps.index[part], jumps.weight[part]
        listed = divergence(log_score[part].gather(-1, index), jumps.ratio[part])
        total[part] += _weighted(weight, listed.value).sum(-1)
        if slope is not None:
            by_score = _weighted(weight, listed.slope)
            if scale is not None:
                by_score *= scale[part, None]
            # Repeated states have weight 0: clear first and add, so that the one that counts is not overwritten.
            slope[part].scatter_(-1, index, 0).scatter_add_(-1, index, by_score)
    return total


def _blocks(log_score: Tensor, width: int) -> list[slice]:
    """Blocks of rows, of which `width` numbers each are worked on at a time."""
    size = max(1, _IN_CACHE // max(1, width)) if log_score.device.type == "cpu" else max(1, len(log_score))
    return [slice(start, start + size) for start in range(0, len(log_score), size)]


def _sum_of_base(log_score: Tensor, jumps: Jumps, factor: Tensor, slope: Tensor | None) -> Tensor:
    """The part of the rows' sums that bears the base's weight, (m,); its gradient is written to `slope`, if given."""
    base = divergence(log_score, jumps.base_ratio[:, None], out=slope)
    total = _weighted(jumps.base_weight, base.value.scatter_(-1, jumps.index, 0).sum(-1))
    if slope is not None:
        torch.mul(base.slope, factor[:, None], out=slope)
        if not bool((jumps.base_weight > 0).all()):  # 0 times an overflowed score is no number
            slope.masked_fill_((jumps.base_weight == 0)[:, None], 0)
    return total


def jump_gradients(log_score: Tensor, jumps: Jumps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of the rows' sums by base_weight, base_ratio (m,), weight and ratio (m, K).

    Needed when the noise schedule is learnt. By r = 0 the derivative is set to 0: such zeros are the graph's structure.
    """
    at_index = divergence(log_score.gather(-1, jumps.index), jumps.ratio)
    base = divergence(log_score, jumps.base_ratio[:, None])
    base_distance = base.distance.scatter(-1, jumps.index, 0).sum(-1)
    base_value = base.value.scatter_(-1, jumps.index, 0).sum(-1)
    by_base_ratio = torch.where(jumps.base_ratio > 0, _weighted(jumps.base_weight, -base_distance), 0)
    by_ratio = torch.where(jumps.ratio > 0, _weighted(jumps.weight, -at_index.distance), 0)
    return base_value, by_base_ratio, at_index.value, by_ratio


def with_gradients(rows: Tensor, jumps: Jumps, scale: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Those fields of the jumps that require a gradient, and the rows' sums' derivatives by them, times scale (m,)."""
    fields = (jumps.base_weight, jumps.base_ratio, jumps.weight, jumps.ratio)
    if not any(field.requires_grad for field in fields):
        return [], []
    with torch.no_grad():
        slopes = jump_gradients(rows, jumps)
        pairs = [
            (field, (slope * scale.reshape(-1, *[1] * (slope.ndim - 1))).to(field.dtype))
            for field, slope in zip(fields, slopes, strict=True)
            if field.requires_grad
        ]
    return [field for field, _ in pairs], [slope for _, slope in pairs]


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Weight * value, and 0 where the weight is 0 even if the value has overflowed."""
    return torch.where(weight > 0, weight * value, 0)


def half_squares(
    log_score: Tensor, base_weight: Tensor, base_ratio: Tensor, index: Tensor, weight: Tensor, ratio: Tensor
) -> Tensor:
    """The weighted sum over each row of (m, N), given the fields of its `Jumps`."""
    # What must not count is replaced beforehand: an overflowed score, or NaN at x, times 0 is no number.
    idle, base_idle = weight == 0, base_weight == 0
    listed = _difference(log_score.gather(-1, index).masked_fill(idle, 0), ratio.masked_fill(idle, 0))
    unlisted = log_score.scatter(-1, index, 0).masked_fill(base_idle[:, None], 0)
    base = _difference(unlisted, base_ratio.masked_fill(base_idle, 0)[:, None]).square().scatter(-1, index, 0)
    return (base_weight * base.sum(-1) + (weight * listed.square()).sum(-1)) / 2


def _difference(log_score: Tensor, ratio: Tensor) -> Tensor:
    """S - r, without cancelling: r (e^d - 1) with d = log s - log r where s is near r > 0.

    Elsewhere the difference itself, of which autograd has the slope s; that of e^d - 1 it takes from its value, plus 1.
    """
    wide = sum_dtype(ratio.device)
    positive = ratio > 0
    distance = (log_score.to(wide) - torch.where(positive, ratio, 1).to(wide).log()).to(log_score.dtype)
    near = positive & (distance.abs() < 1)
    far = log_score.masked_fill(near, 0).exp() - ratio
    return torch.where(near, ratio * distance.clamp(-1, 1).expm1(), far)

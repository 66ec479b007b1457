"""Exact draws from a categorical distribution: the inverse of its cumulative sum at one uniform number.

    F(y) = sum_{z <= y} p(z),     draw = min { y : F(y) > u F(N - 1) },     u ~ U[0, 1)

The usual race, argmax_y p(y) / E_y with exponential E_y in float32, cannot resolve probabilities below about 6e-8: it
draws rare states too seldom, which is a lower temperature, and it takes N random numbers a draw. Here a draw takes one
float64 uniform, and every probability is met to a relative error of about 1e-7, however small it is.

A float64 cumulative sum over all N states would be dear. The sum has two levels instead: the masses of sqrt(N) blocks,
inverted in float64, then the states of the one block that was hit, in float64 again. The large array is read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_categorical", "draw_shared"]


def draw_categorical(probs: Tensor, uniform: Tensor) -> Tensor:
    """One state a row; a state of probability zero is never drawn.

    Args:
        probs: (M, N) float, non-negative; rows need not sum to 1. Not modified.
        uniform: (M,) float64 in [0, 1): the only source of randomness.

    Returns:
        (M,) int64.

    Raises:
        ValueError: if a row's sum is not finite and positive; names the first such row.
    """
    num_states = probs.shape[-1]
    width = 2 ** math.ceil(math.log2(num_states) / 2)
    full = num_states // width
    mass = probs[:, : full * width].reshape(-1, full, width).sum(-1)  # a view
    if full * width < num_states:
        mass = torch.cat([mass, probs[:, full * width :].sum(-1, keepdim=True)], 1)
    mass = mass.double()
    total = mass.sum(-1)
    bad = ~((total > 0) & total.isfinite())
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row} of the probabilities sums to {float(total[row])}; expected a finite, positive sum: "
            "no state to draw is left (0) or an entry is NaN or infinite"
        )
    block, uniform = _invert(mass, uniform)
    state = block[:, None] * width + torch.arange(width, device=probs.device)
    inside = probs.gather(1, state.clamp(max=num_states - 1)).double() * (state < num_states)
    within, _ = _invert(inside, uniform)
    drawn: Tensor = block * width + within
    return drawn


def draw_shared(law: Tensor, uniform: Tensor) -> Tensor:
    """Draws (M,) int64 from one distribution, law (N,) float64, with one uniform (M,) each."""
    cumulative = law.cumsum(0)
    target = (uniform * cumulative[-1]).clamp(max=float(torch.nextafter(cumulative[-1], cumulative.new_zeros(()))))
    drawn: Tensor = torch.searchsorted(cumulative, target, right=True)
    return drawn


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index whose share of [0, 1) holds `uniform` (M,), and where in that share it lies, again in [0, 1)."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # the first cumulative sum *above* the target ends in an index of positive weight
    index = torch.searchsorted(cumulative, target[:, None], right=True)
    above = cumulative.gather(1, index)[:, 0]
    below = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)[:, 0]
    return index[:, 0], (target - below) / (above - below)

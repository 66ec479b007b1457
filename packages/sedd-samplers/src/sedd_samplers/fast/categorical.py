"""Draws in one pass over the probabilities: the cumulative sum on two levels.

A float64 cumulative sum over all N states would be dear. The sum has two levels instead: the masses of sqrt(N) blocks,
inverted in float64, then the states of the one block that was hit, in float64 again. The large array is read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_by_blocks"]


def draw_by_blocks(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of each row's cumulative sum at one uniform number.

        state = min { y : F(y) > u F(N - 1) },     F(y) = sum_{z <= y} probs_z

    Args:
        probs: (M, N) float, non-negative.
        uniform: (M,) float64 in [0, 1), or float32 on a device without float64.

    Returns:
        (M,) int64, which means nothing where the sum is not finite and positive; and the sums F(N - 1), (M,) float64.
    """
    num_states = probs.shape[-1]
    width = 2 ** math.ceil(math.log2(num_states) / 2)
    full = num_states // width
    mass = probs[:, : full * width].reshape(-1, full, width).sum(-1)  # a view
    if full * width < num_states:
        mass = torch.cat([mass, probs[:, full * width :].sum(-1, keepdim=True)], 1)
    mass = mass.to(uniform.dtype)
    total = mass.sum(-1)
    block, uniform = _invert(mass, uniform)
    state = block[:, None] * width + torch.arange(width, device=probs.device)
    inside = probs.gather(1, state.clamp(max=num_states - 1)).to(uniform.dtype) * (state < num_states)
    within, _ = _invert(inside, uniform)
    return block * width + within, total


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index whose share of [0, 1) holds `uniform` (M,), and where in that share it lies, again in [0, 1)."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # the first cumulative sum *above* the target ends in an index of positive weight
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=weights.shape[-1] - 1)
    above = cumulative.gather(1, index)[:, 0]
    below = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)[:, 0]
    return index[:, 0], (target - below) / (above - below)

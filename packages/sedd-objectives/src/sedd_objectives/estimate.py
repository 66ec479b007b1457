"""Means of independent draws, each with its Monte Carlo standard error.

Every loss here whose value depends on drawn times, noise, neighbours or orders is an unbiased estimate of an
expectation: drawing it again and averaging tells the expectation, and how well it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import sum_dtype

__all__ = ["Estimate", "monte_carlo"]


@dataclass(frozen=True)
class Estimate:
    """A mean over independent draws; both fields have the draws' shape and unit, float64 where the device has it."""

    value: Tensor
    """The mean."""
    standard_error: Tensor
    """The standard deviation of the mean, estimated without bias in its square from the draws' spread."""

    def __repr__(self) -> str:
        error = float(self.standard_error.square().sum().sqrt()) / max(1, self.value.numel())
        return f"Estimate({tuple(self.value.shape)}: {float(self.value.mean()):.4g} +- {error:.2g} on average)"


@torch.no_grad()
def monte_carlo(draw: Callable[[], Tensor], num_draws: int) -> Estimate:
    """The mean of independent draws and its standard error.

    Args:
        draw: makes one draw, such as `lambda: any_order_loss(model, graph, x0, generator=generator)`, (B,) nats a
            sequence. Where one call's entries share strata of times, each entry alone is still an independent draw.
        num_draws: how many; at least 2.

    Returns:
        The estimate, of a draw's shape: one value and error a sequence when a draw is (B,).

    Raises:
        ValueError: fewer than 2 draws, or draws of different shapes.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, to estimate an error, got {num_draws}")
    first = draw()
    wide = sum_dtype(first.device)
    mean, squares = first.to(wide), torch.zeros_like(first, dtype=wide)
    for count in range(2, num_draws + 1):  # Welford's sums: no difference of large squares
        value = draw()
        if value.shape != mean.shape:
            raise ValueError(f"draws must have one shape, got {tuple(mean.shape)} and then {tuple(value.shape)}")
        away = value.to(wide) - mean
        mean = mean + away / count
        squares = squares + away * (value - mean)
    return Estimate(mean, (squares / (num_draws - 1) / num_draws).sqrt())

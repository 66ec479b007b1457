"""Time grids 1 = t_0 > t_1 > ... > t_n = t_min: n steps, the first from 1, the last to t_min.

The final denoise, from t_min to 0, comes on top. A grid is a tensor, so that `times=` takes these, `adaptive_times` and
anybody's own alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .interfaces import Noise
from .masking import mask_probability

__all__ = ["uniform_times", "level_times", "check_times"]


def uniform_times(steps: int, t_min: float = 1e-5) -> Tensor:
    """`steps` steps of equal length from 1 to t_min: (steps + 1,) float64."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min!r}")
    return torch.linspace(1, t_min, steps + 1, dtype=torch.float64)


def level_times(
    noise: Noise, steps: int, level: Callable[[Tensor], Tensor] = mask_probability, t_min: float = 1e-5
) -> Tensor:
    """`steps` steps that are equally long in a function of the noise level, whatever the schedule.

    Two schedules of the same graph differ only in the time they take; a grid by level is the same states of the process
    for both.

    Args:
        noise: the schedule.
        steps: how many.
        level: rising with sigma: `mask_probability` (1 - exp(-sigma)), `torch.log`, `torch.sqrt`, or the identity for
            equal steps in sigma.
        t_min: the time at which the last step ends.

    Returns:
        (steps + 1,) float64.

    Raises:
        ValueError: if the level is not finite at 1 or at t_min, or the grid does not fall strictly.
    """
    ends = uniform_times(steps, t_min)[[0, -1]]
    high, low = level(noise(ends)[0]).double()
    if not (high.isfinite() and low.isfinite() and low < high):
        raise ValueError(
            f"the level must be finite and rise with sigma; it is {float(low):.6g} at t = {t_min:.6g} and "
            f"{float(high):.6g} at t = 1"
        )
    wanted = torch.linspace(float(high), float(low), steps + 1, dtype=torch.float64)[1:-1]
    above, below = ends[0].expand_as(wanted), ends[1].expand_as(wanted)
    for _ in range(60):  # bisection: the schedule need not know its inverse
        middle = (above + below) / 2
        too_high = level(noise(middle)[0]) > wanted
        above, below = torch.where(too_high, middle, above), torch.where(too_high, below, middle)
    return check_times(torch.cat([ends[:1], (above + below) / 2, ends[1:]]))


def check_times(times: Tensor) -> Tensor:
    """A caller's own grid as float64, or ValueError: (n + 1,), n >= 1, falling, within [0, 1]."""
    times = torch.as_tensor(times).double()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must have the shape (steps + 1,) with at least one step, got {tuple(times.shape)}")
    if not ((times[1:] < times[:-1]).all() and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"times must fall strictly and lie in [0, 1], got {times.tolist()}")
    return times

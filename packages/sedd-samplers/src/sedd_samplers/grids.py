"""Time grids 1 = t_0 > t_1 > ... > t_n = t_min: n steps, the first from 1, the last to t_min.

The final denoise, from t_min to 0, comes on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uniform_times", "check_times"]


def uniform_times(steps: int, t_min: float = 1e-5) -> Tensor:
    """`steps` steps of equal length from 1 to t_min: (steps + 1,) float64."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min!r}")
    return torch.linspace(1, t_min, steps + 1, dtype=torch.float64)


def check_times(times: Tensor) -> Tensor:
    """A caller's own grid as float64, or ValueError: (n + 1,), n >= 1, falling, within [0, 1]."""
    times = torch.as_tensor(times).double()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must have the shape (steps + 1,) with at least one step, got {tuple(times.shape)}")
    if not ((times[1:] < times[:-1]).all() and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"times must fall strictly and lie in [0, 1], got {times.tolist()}")
    return times

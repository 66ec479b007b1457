"""Times at which the diffusion loss is sampled.

The loss is an integral over t in [t_min, 1], so any sampler whose draws are marginally uniform on that interval gives
an unbiased estimate; they differ in the variance that a batch's mean keeps.

- independent: t_b ~ U.
- stratified: one independent draw in each of B equal strata, the strata in random order.
- low-discrepancy: one draw for all, shifted by b / B (Kingma et al. 2021): strata with a common offset.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["uniform_times", "stratified_times", "low_discrepancy_times"]


def uniform_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent times (batch_size,) in [t_min, 1)."""
    _check(batch_size, t_min)
    return _onto_interval(torch.rand(batch_size, generator=generator, device=device), t_min)


def stratified_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """One time in each of batch_size equal parts of [t_min, 1), in random order, (batch_size,).

    The order is shuffled so that the time of a sequence does not depend on its place in the batch: every single time is
    uniform.
    """
    _check(batch_size, t_min)
    strata = torch.randperm(batch_size, generator=generator, device=device)
    offset = torch.rand(batch_size, generator=generator, device=device)
    return _onto_interval((strata + offset) / batch_size, t_min)


def low_discrepancy_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times b / batch_size + u (mod 1) with one common u ~ U[0, 1), put onto [t_min, 1); (batch_size,)."""
    _check(batch_size, t_min)
    common = torch.rand((), generator=generator, device=device)
    grid = torch.arange(batch_size, device=device) / batch_size
    return _onto_interval((grid + common) % 1, t_min)


def _onto_interval(unit: Tensor, t_min: float) -> Tensor:
    """[0, 1) onto [t_min, 1): below 1 even after rounding, where some schedules are infinite."""
    return (t_min + (1 - t_min) * unit).clamp_max(1 - torch.finfo(unit.dtype).eps / 2)


def _check(batch_size: int, t_min: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min}")

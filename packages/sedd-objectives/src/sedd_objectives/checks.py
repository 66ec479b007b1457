"""Validation of what callers hand in: every error names the argument, its value and what was expected.

Values are read where that makes nobody wait. On CUDA the device checks them itself (`torch._assert_async`): nothing is
read back, and a wrong one ends in a device-side assertion with the same sentence, but for the value found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "check_states",
    "check_sigma",
    "check_weight",
    "check_given",
    "check_evaluations",
    "check_not_nan",
    "require",
    "reading_waits",
    "expand_leading",
    "arithmetic_dtype",
    "sum_dtype",
]


def check_states(name: str, states: Tensor, num_states: int, shape: torch.Size | None = None) -> None:
    """Raise unless `states` is an integer tensor with values in [0, num_states) and, if given, of that shape."""
    if states.is_floating_point() or states.is_complex() or states.dtype == torch.bool:
        raise ValueError(f"{name} holds states and must be an integer tensor, got dtype {states.dtype}")
    if shape is not None and states.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(states.shape)}")
    if states.numel():
        low, high = states.aminmax()
        expected = f"{name} must lie in [0, {num_states}) (the graph's num_states)"
        require((low >= 0) & (high < num_states), expected, lambda: f"got values in [{int(low)}, {int(high)}]")


def check_sigma(name: str, sigma: Tensor) -> None:
    """Raise unless the total noise is a floating tensor without negative or NaN entries."""
    if not sigma.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor, got dtype {sigma.dtype}")
    expected = f"{name} is a total noise and must be >= 0 everywhere"
    require((sigma >= 0).all(), expected, lambda: f"got a minimum of {float(sigma.min())}")


def check_weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weights spread over x's shape, (...) float; raises where they are negative or leave no position at all."""
    weight = expand_leading("weight", weight if weight.is_floating_point() else weight.to(torch.float32), x)
    expected = "weight must be >= 0 everywhere"
    require((weight >= 0).all(), expected, lambda: f"got a minimum of {float(weight.min())}")
    expected = "weight is 0 at every position: nothing is left to average over"
    require(weight.any(), expected, lambda: "drop such batches")
    return weight


def check_given(given: Tensor, x: Tensor) -> Tensor:
    """`given` itself, (B, L) bool; raises unless it is of x's shape and leaves a position to count."""
    if given.dtype != torch.bool or given.shape != x.shape:
        raise ValueError(
            f"given must be a bool mask of x0's shape {tuple(x.shape)}, got {given.dtype} of shape {tuple(given.shape)}"
        )
    expected = "given is true at every position: nothing is left to count"
    require((~given).any(), expected, lambda: "drop such batches")
    return given


def check_evaluations(
    num_times: int, num_reconstructions: int, t_min: float | None = None, small_noise_share: float = 0.0
) -> None:
    """Raise unless the numbers of an estimate make sense: of its draws, of the end of its times, of their spread."""
    if num_times < 2 or num_times % 2:
        raise ValueError(f"num_times must be even and at least 2, got {num_times}: two of them share a stratum")
    if num_reconstructions < 2:
        raise ValueError(f"num_reconstructions must be at least 2, to estimate an error, got {num_reconstructions}")
    if t_min is not None and not 0 < t_min < 1:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min}")
    if not 0 <= small_noise_share < 1:
        raise ValueError(f"small_noise_share must lie in [0, 1), got {small_noise_share}")


def reading_waits(device: torch.device) -> bool:
    """Whether to read a value of this device is to wait until it has done all it was asked to."""
    return device.type == "cuda"


def require(right: Tensor, expected: str, found: Callable[[], str]) -> None:
    """Raise a ValueError that says what was expected and found unless `right`, () bool."""
    if reading_waits(right.device):
        torch._assert_async(right, expected)
    elif not bool(right):
        raise ValueError(f"{expected}, {found()}")


def expand_leading(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value`, whose shape must be a leading part of x's, as a view of x's shape.

    A value a sequence (B,) or a position (B, L) for x of shape (B, L), or one value () for all. Anything else, such
    as (B, 1), raises: it would broadcast over the wrong axis as soon as B = L.
    """
    if value.shape != x.shape[: value.ndim]:
        leading = " or ".join(str(tuple(x.shape[:n])) for n in range(x.ndim + 1))
        raise ValueError(f"{name} must have a shape that is a leading part of x's, {leading}, got {tuple(value.shape)}")
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)).expand(x.shape)


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is: the precision of everything after the network's head."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for the sums of an evaluation; float32 on the one backend that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_not_nan(loss: Tensor, log_score: Tensor) -> None:
    """Raise if a loss is NaN: sought in the reduced loss, for a pass over all scores costs as much as the loss."""
    if bool(loss.isnan().any()):
        at_fault = "log_score is NaN at a state that counts"
        if not bool(log_score.isnan().any()):
            at_fault = "log_score has no NaN, so some x cannot have come from its x0 at this sigma"
        raise ValueError(f"the loss is NaN at {int(loss.isnan().sum())} of {loss.numel()} positions: {at_fault}")

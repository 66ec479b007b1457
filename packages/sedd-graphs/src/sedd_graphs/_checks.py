"""What every public method asks of its arguments, the errors it answers with, and the arithmetic they share.

Shapes: states `x` are (...) int64; a noise level `sigma` has a shape that is a leading part of theirs, so that (B,)
is one level a sequence and (B, L) one a position. Values are read back (one reduction a call) except while compiling.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_states", "check_integer", "check_rate", "spread", "widen", "times", "describe"]


def check_states(name: str, x: Tensor, num_states: int) -> None:
    """Raise unless x holds int64 states of 0 .. num_states - 1."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor of states, got {describe(x)}")
    if x.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= num_states:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} must hold states 0 to {num_states - 1} of the graph, found {wrong}")


def check_integer(name: str, value: int, *, least: int, most: int | None = None) -> int:
    """The value as an int; raise unless least <= value <= most."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    value = int(value)
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_rate(name: str, value: float) -> float:
    """The value as a float; raise unless it is finite and not negative."""
    value = float(value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite rate of at least 0, got {value}")
    return value


def spread(
    sigma: Tensor, shape: torch.Size | None = None, *, name: str = "sigma", of: str = "x", signed: bool = False
) -> Tensor:
    """Sigma with axes of size 1 appended, so that it broadcasts over `shape`, or its own; float32 at least.

    Raises:
        TypeError: sigma is no floating-point tensor.
        ValueError: its shape is no leading part of `shape`; a level is NaN, or negative and not `signed`.
    """
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, such as torch.tensor(0.5), got {describe(sigma)}")
    if shape is None:
        shape = sigma.shape
    if sigma.shape != shape[: sigma.dim()]:
        raise ValueError(
            f"{name} must have a shape that is a leading part of {of}'s {tuple(shape)}, one level a sequence or one a "
            f"position; got {tuple(sigma.shape)}"
        )
    if not torch.compiler.is_compiling():
        wrong = sigma.isnan() if signed else ~(sigma >= 0)
        if wrong.any():
            expected = "a number" if signed else "at least 0"
            raise ValueError(f"{name} must be {expected} everywhere, found {float(sigma[wrong].flatten()[0])}")
    if sigma.dtype in (torch.float16, torch.bfloat16):
        sigma = sigma.float()
    return sigma.reshape(sigma.shape + (1,) * (len(shape) - sigma.dim()))


def widen(values: Tensor) -> Tensor:
    """The values in float64, where the device has it (Apple's has not)."""
    return values.float() if values.device.type == "mps" else values.double()


def times(rate: float, sigma: Tensor) -> Tensor:
    """Rate * sigma, which is 0 at rate 0 even for infinite sigma."""
    return rate * sigma if rate else torch.zeros_like(sigma)


def describe(value: object) -> str:
    """What was found in place of a tensor of the right kind."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"

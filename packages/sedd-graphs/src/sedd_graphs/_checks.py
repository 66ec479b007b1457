"""What every public method asks of its arguments, the errors it answers with, and the arithmetic they share.

Shapes: states `x` are (...) int64; a noise level `sigma` has a shape that is a leading part of theirs, so that (B,)
is one level a sequence and (B, L) one a position.

Values are checked where that makes nobody wait: on the CPU they are read, and the error names the one found; on CUDA
the device itself checks them (`torch._assert_async`), nothing is read back, and a wrong value ends in a device-side
assertion with the same sentence but for the value. Where there are no values (torch.compile, vmap, meta and fake
tensors) they are not checked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "check_states",
    "check_integer",
    "check_rate",
    "check_values",
    "readable",
    "spread",
    "distinct",
    "widen",
    "at_least_float32",
    "rate_dtype",
    "times",
    "describe",
]


def check_states(name: str, x: Tensor, num_states: int) -> None:
    """Raise unless x holds int64 states of 0 .. num_states - 1."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor of states, got {describe(x)}")
    check_values((x >= 0) & (x < num_states), f"{name} must hold states 0 to {num_states - 1} of the graph", x)


def check_values(right: Tensor, expected: str, *found: Tensor, say: Callable[..., str] | None = None) -> None:
    """Raise a ValueError that says what was expected, and what was found at the first place that is not right.

    Args:
        right: (...) bool.
        expected: the sentence.
        found: tensors that broadcast to (...), whose numbers there are told.
        say: the sentence with the numbers in it; the one above and ", found " and the first of them unless given.
    """
    if right.numel() == 0 or torch.compiler.is_compiling():
        return
    if right.device.type == "cuda":
        torch._assert_async(right.all(), expected)
        return
    try:
        wrong = not right.all()
    except RuntimeError:  # there are no values to read, but shapes alone
        return
    if wrong:
        numbers = [values.expand(right.shape)[~right].flatten()[0].item() for values in found]
        raise ValueError(say(*numbers) if say else f"{expected}, found {numbers[0]}")


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
    if signed:
        check_values(~sigma.isnan(), f"{name} must be a number everywhere", sigma)
    else:
        check_values(sigma >= 0, f"{name} must be at least 0 everywhere", sigma)
    sigma = at_least_float32(sigma)
    return sigma.reshape(sigma.shape + (1,) * (len(shape) - sigma.dim()))


def readable(values: Tensor) -> bool:
    """Whether there are values and reading them makes nobody wait: on the CPU, and under no transform."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        bool((values != values).any())
    except RuntimeError:  # there are shapes alone
        return False
    return True


def distinct(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (S,) and the number of the one that each of `levels` (...) is, (...).

    Every level once, where values can be read without waiting; else all of them, as they come.
    """
    if readable(levels):
        found, which = torch.unique(levels, return_inverse=True)
        return found, which
    return levels.flatten(), torch.arange(levels.numel(), device=levels.device).reshape(levels.shape)


def at_least_float32(values: Tensor) -> Tensor:
    """The values, those of half precision in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def rate_dtype() -> torch.dtype:
    """The dtype of rates: torch's default one, and float32 where that has half precision."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def widen(values: Tensor) -> Tensor:
    """The values in float64, where the device has it (Apple's has not)."""
    return values.float() if values.device.type == "mps" else values.double()


def times(rate: float, sigma: Tensor) -> Tensor:
    """Rate * sigma, which is 0 at rate 0 even for infinite sigma."""
    return rate * sigma if rate else torch.zeros_like(sigma)


def describe(value: object) -> str:
    """What was found in place of a tensor of the right kind."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"

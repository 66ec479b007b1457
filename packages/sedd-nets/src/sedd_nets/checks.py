"""What goes into a network, checked where it enters: tokens, noise levels, lengths.

A wrong argument is reported by its name and value before any arithmetic; checks on values (not shapes) never stop a
GPU's queue and vanish under `torch.compile`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "check_sizes",
    "check_states",
    "check_tokens",
    "log_expm1",
    "on_host",
    "over_last_axis",
]


def on_host(a: Tensor) -> bool:
    """Whether its values can be read without waiting for a device that computes them."""
    return a.device.type == "cpu"


def at_least_float32(a: Tensor) -> Tensor:
    """`a` itself when it is float32 or float64, else `a` in float32."""
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def log_expm1(sigma: Tensor) -> Tensor:
    """log(e^sigma - 1), without overflow for large and without cancellation for small sigma."""
    return sigma + torch.log(-torch.expm1(-sigma))


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size that is no positive integer, by its name."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size!r}")


def check_states(x: Tensor, longest: int, length: int) -> None:
    """Raise unless x is a (B, L) int64 tensor whose longest text has 1 to `length` tokens.

    Raises:
        TypeError: x is not int64.
        ValueError: x has another number of axes, or the text is too long for the network.
    """
    if x.dtype != torch.int64:
        raise TypeError(f"x holds token ids and must be int64; got {x.dtype}. Use x.long()")
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, L); got {tuple(x.shape)}. A single sequence is x[None]")
    if not 1 <= longest <= length:
        raise ValueError(
            f"a sequence of {longest} tokens; this network takes 1 to {length}. "
            "Shorten it, or build the network with a larger `length`"
        )


def check_tokens(x: Tensor, num_states: int) -> None:
    """Raise unless 0 <= x < num_states everywhere.

    On the CPU this reads the two extremes. On an accelerator it is an assertion in the device's own queue, because
    reading a value back would stop the queue at every forward. Traced code leaves it to the embedding's own check.

    Raises:
        IndexError: a token is out of range (CPU); on an accelerator the device's assertion fails.
    """
    if torch.compiler.is_compiling() or x.is_meta or x.numel() == 0:
        return
    if not on_host(x):
        torch._assert_async(((x >= 0) & (x < num_states)).all(), f"a token is outside 0..{num_states - 1}")
        return
    low, high = (int(extreme) for extreme in torch.aminmax(x))
    if low < 0 or high >= num_states:
        raise IndexError(
            f"token {low if low < 0 else high} is outside 0..{num_states - 1}: this network knows {num_states} states. "
            "Do the tokenizer, the mask state and the checkpoint belong together?"
        )


def over_last_axis(sigma: Tensor, x: Tensor) -> Tensor:
    """`sigma`, one noise level for each leading part of x, shaped (..., 1) to broadcast over the states of each x.

    Args:
        sigma: float, its shape a leading part of x's: (), (B,) or (B, L) for x (B, L), (m,) for x (m,).
        x: (...) states.

    Returns:
        sigma in float32 (float64 stays) with x.ndim + 1 axes, those it lacked of size 1.

    Raises:
        ValueError: the shape is no leading part of x's.
        TypeError: sigma is not floating point.
    """
    if not sigma.is_floating_point():
        raise TypeError(f"sigma is the total noise and must be floating point; got {sigma.dtype}")
    if sigma.shape != x.shape[: sigma.ndim]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} and x {tuple(x.shape)}: sigma's must be a leading part of x's, "
            "one noise level a sequence, (B,), or one a position, (B, L). Squeeze axes of size 1"
        )
    return at_least_float32(sigma).reshape(*sigma.shape, *(1,) * (x.ndim + 1 - sigma.ndim))

"""Rotary positions: queries and keys are turned by an angle proportional to their position (Su et al., 2021).

The two halves (a, b) of a head's vector at position l become (a cos - b sin, b cos + a sin) with the angles
l base^(-2i/d), i < d/2, so that the product of a query and a key depends on the distance between them only. That is
also why documents packed into one row need no positions of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rotary", "rotate"]


class Rotary(nn.Module):
    """The angles' cosines and sines; `inv_freq` (d/2,) is a buffer because the published files hold it."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # A network cast to bfloat16 keeps these in float32: position 257 times a rounded frequency is another angle.
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not exact.is_meta:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (length, d/2) float32."""
        cos, sin = _turns(self.inv_freq, length)
        return cos, sin


@torch.library.custom_op("sedd_nets::turns", mutates_args=())
def _turns(inv_freq: Tensor, length: int) -> list[Tensor]:
    """The cosines and sines of all angles; closed to compilers, which would work them out again at each use."""
    angle = torch.outer(torch.arange(length, device=inv_freq.device, dtype=torch.float32), inv_freq)
    return [angle.cos(), angle.sin()]


@_turns.register_fake
def _(inv_freq: Tensor, length: int) -> list[Tensor]:
    return [inv_freq.new_empty(length, inv_freq.shape[0]) for _ in range(2)]


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the queries and keys of a packed projection; the values stay.

    Args:
        qkv: (B, L, 3, H, d).
        cos: (L, d/2) float32, from `Rotary`.
        sin: the same.

    Returns:
        (B, L, 3, H, d) in qkv's dtype; the arithmetic is float32.
    """
    if torch.compiler.is_compiling():  # a compiler makes one pass of the formula by itself
        return _turned(qkv, cos, sin)
    out: Tensor = _Rotate.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Autograd on the plain formula would add up six gradients where turning back by the same angles is enough."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy, then turned in place: half the passes over memory of concatenating its parts."""
    out = qkv.to(torch.promote_types(qkv.dtype, cos.dtype), copy=True)
    half = qkv.shape[-1] // 2
    a, b = out[:, :, :2, :, :half], out[:, :, :2, :, half:]
    cos, sin = cos[:, None, None], sin[:, None, None]
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    return out.to(qkv.dtype)

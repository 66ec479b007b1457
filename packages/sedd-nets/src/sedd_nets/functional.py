"""The formulas of a block in plain tensors; `sedd_nets.fast.memory_efficient` computes the same and keeps less.

A compiler is given these, for it fuses them and decides by itself what to keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_gated", "gelu_linear", "modulated_norm", "rotate"]

EPS = 1e-5


def modulated_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """norm(h) gain + shift, with norm(h) = (h - mean) / sqrt(variance + 1e-5) over the last axis.

    Args:
        h: (B, L, D).
        gain: (B, 1, D) or (B, L, D) in h's dtype.
        shift: the same.

    Returns:
        (B, L, D) in h's dtype.
    """
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=EPS), gain)


def gelu_linear(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(gelu(a)), GELU in its tanh form: (..., in), (out, in) and (out,) of one dtype to (..., out)."""
    return F.linear(F.gelu(a, approximate="tanh"), weight, bias)


def add_gated(h: Tensor, branch: Tensor, gate: Tensor | None, kept: Tensor | None, probability: float) -> Tensor:
    """H + gate dropout(branch).

    Args:
        h: (B, L, D).
        branch: (B, L, D).
        gate: (B, 1, D) or (B, L, D), or None for 1.
        kept: (B, L, D) bool or uint8, what dropout keeps; None: everything.
        probability: of an element to be dropped; the others are divided by the rest.

    Returns:
        (B, L, D) in h's dtype.
    """
    branch = (branch if kept is None else branch * kept).to(h.dtype)
    if gate is None:
        return torch.add(h, branch, alpha=1 / (1 - probability))
    return torch.addcmul(h, gate.to(h.dtype) / (1 - probability), branch)


def rotate(a: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries and keys by angles proportional to their positions (Su et al., 2021).

    The two halves (u, v) of a head's vector at position l become (u cos - v sin, v cos + u sin) with the angles
    l base^(-2i/d), i < d/2, so that the product of a query and a key depends on the distance between them only. That is
    also why documents packed into one row need no positions of their own.

    Args:
        a: (..., d).
        cos: float32 of a shape that spreads over a's, (cos, cos) of both halves; see `sedd_nets.attention.Rotary`.
        sin: the same, (-sin, sin).

    Returns:
        (..., d) in a's dtype; the arithmetic is float32.
    """
    swapped = a.reshape(*a.shape[:-1], 2, -1).flip(-2).flatten(-2)
    return (a * cos + swapped * sin).to(a.dtype)

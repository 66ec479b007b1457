"""The last linear map of a vocabulary whose size suits no GPU: the same product, on faster kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["aligned_linear", "suits"]

ALIGNED = 64
"""Columns of the product come in this number: 128 bytes of a half-precision row."""


def suits(a: Tensor, num_outputs: int) -> bool:
    """Whether `F.linear` finds a fast kernel: not in half precision on CUDA, where rows are no multiple of 16 bytes."""
    return a.device.type != "cuda" or num_outputs % 8 == 0 or _dtype(a).itemsize > 2


def aligned_linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(a), with rows of zeros under the weight up to a multiple of 64: (..., in), (out, in) to (..., out).

    Returns:
        The first `out` columns of the wider product, a view, in autocast's dtype or a's own.
    """
    out = F.linear(a.to(_dtype(a)), _widened(weight, _dtype(a)), None if bias is None else _widened(bias, _dtype(a)))
    return out[..., : len(weight)]


def _widened(value: Tensor, dtype: torch.dtype) -> Tensor:
    wide = value.new_zeros(-(-len(value) // ALIGNED) * ALIGNED, *value.shape[1:], dtype=dtype)
    wide[: len(value)] = value
    return wide


def _dtype(a: Tensor) -> torch.dtype:
    kind = a.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype

"""Attention over the whole sequence, softmax(q k' / sqrt d) v, as a plain function that a network is given."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Attention", "sdpa"]


class Attention(Protocol):
    """Any callable that attends; `net.attention` holds the one in use."""

    def __call__(self, qkv: Tensor, /) -> Tensor:
        """Packed queries, keys and values (B, L, 3, H, d) to the heads' outputs (B, L, H, d)."""


def sdpa(qkv: Tensor) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, which picks the fastest kernel that the device has.

    Args:
        qkv: (B, L, 3, H, d), in the layout that the projection left: the kernels take strided heads, so nothing is
            copied.

    Returns:
        (B, L, H, d).
    """
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

"""Attention over the whole sequence, softmax(q k' / sqrt d) v: three kernels, one contract.

`net.attention` holds a callable; the default, `sdpa`, runs everywhere. The others are chosen by assigning them,
`net.attention = FlexAttention()`, and give the same numbers: to 1e-5 in float32, to 2e-2 in bfloat16, relative to
values of order one. Positions that belong to no document get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sedd_nets.documents import Documents

__all__ = ["Attention", "FlashAttention", "FlexAttention", "sdpa"]


class Attention(Protocol):
    """Any callable that attends."""

    def __call__(self, qkv: Tensor, documents: Documents | None, /) -> Tensor:
        """Packed queries, keys and values (B, L, 3, H, d) to the heads' outputs (B, L, H, d)."""


def sdpa(qkv: Tensor, documents: Documents | None, *, causal: bool = False) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, which picks the fastest kernel that the device has.

    Documents are attended one by one, so each costs the square of its own length: best for few long documents.

    Args:
        qkv: (B, L, 3, H, d), in the layout that the projection left: the kernels take strided heads, so nothing is
            copied.
        documents: where attention stays within; None: the whole row.
        causal: whether a position sees none behind it, as in a left-to-right model.

    Returns:
        (B, L, H, d).
    """
    if documents is None:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    flat = qkv.flatten(0, 1)
    out, end = [], 0
    for start, stop in documents.spans:
        if start > end:
            out.append(flat.new_zeros(start - end, *flat.shape[-2:]))
        out.append(sdpa(flat[None, start:stop], None, causal=causal)[0])
        end = stop
    if end < len(flat):
        out.append(flat.new_zeros(len(flat) - end, *flat.shape[-2:]))
    return torch.cat(out).view(*qkv.shape[:2], *flat.shape[-2:])


class FlexAttention:
    """PyTorch's FlexAttention, compiled: documents cost only the 128 x 128 blocks they touch.

    Needs what `torch.compile` needs (a C++ compiler on a CPU, Triton on a GPU); on a CPU it has no backward.
    """

    def __init__(self) -> None:
        self.attend: Callable[..., Any] = torch.compile(flex_attention)

    def __call__(self, qkv: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, 3, H, d) to (B, L, H, d)."""
        q, k, v = qkv.transpose(1, 3).unbind(2)
        out: Tensor = self.attend(q, k, v, block_mask=None if documents is None else documents.block_mask)
        return out.transpose(1, 2)


class FlashAttention:
    """The flash-attn package's variable-length kernel, for GPUs, in half precision.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
        except ImportError as error:
            raise ImportError(
                "flash-attn is not installed. `pip install sedd-nets[flash-attn]` builds it (for NVIDIA GPUs, with the "
                "CUDA toolkit); the default, sedd_nets.sdpa, gives the same numbers without it"
            ) from error
        self.packed: Callable[..., Tensor] = flash_attn_qkvpacked_func
        self.varlen: Callable[..., Tensor] = flash_attn_varlen_qkvpacked_func

    def __call__(self, qkv: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, 3, H, d) to (B, L, H, d).

        Raises:
            TypeError: qkv is not in half precision.
        """
        if qkv.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"flash-attn computes in bfloat16 or float16 and was given {qkv.dtype}: run the network under "
                'torch.autocast("cuda", dtype=torch.bfloat16), or use sedd_nets.sdpa'
            )
        if documents is None:
            return self.packed(qkv)
        flat = qkv.flatten(0, 1)
        tokens = flat if documents.kept is None else flat[documents.kept]
        out = self.varlen(tokens, documents.cu_seqlens, documents.longest)
        if documents.kept is not None:
            out = flat.new_zeros(len(flat), *flat.shape[-2:]).index_copy(0, documents.kept, out)
        return out.view(*qkv.shape[:2], *flat.shape[-2:])

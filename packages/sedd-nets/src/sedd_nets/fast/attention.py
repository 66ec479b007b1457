"""Attention by other kernels than the default's, with the same numbers: see `sedd_nets.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sedd_nets.documents import Documents

__all__ = ["FlashAttention", "FlexAttention"]


class FlexAttention:
    """PyTorch's FlexAttention, compiled: documents cost only the 128 x 128 blocks they touch.

    Needs what `torch.compile` needs (a C++ compiler on a CPU, Triton on a GPU); on a CPU it has no backward.
    """

    def __init__(self) -> None:
        self.attend: Callable[..., Any] = torch.compile(flex_attention)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, H, d) each, and so is the output."""
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        out: Tensor = self.attend(q, k, v, block_mask=None if documents is None else documents.block_mask)
        return out.transpose(1, 2)


class FlashAttention:
    """The flash-attn package's variable-length kernel, for GPUs, in half precision.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            raise ImportError(
                "flash-attn is not installed. `pip install sedd-nets[flash-attn]` builds it (for NVIDIA GPUs, with the "
                "CUDA toolkit); the default, sedd_nets.sdpa, gives the same numbers without it"
            ) from error
        self.rows: Callable[..., Tensor] = flash_attn_func
        self.varlen: Callable[..., Tensor] = flash_attn_varlen_func

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, H, d) each, and so is the output.

        Raises:
            TypeError: q is not in half precision.
        """
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"flash-attn computes in bfloat16 or float16 and was given {q.dtype}: run the network under "
                'torch.autocast("cuda", dtype=torch.bfloat16), or use sedd_nets.sdpa'
            )
        if documents is None:
            return self.rows(q, k, v)
        kept, ends, longest = documents.kept, documents.cu_seqlens, documents.longest
        flat = [a.flatten(0, 1) if kept is None else a.flatten(0, 1)[kept] for a in (q, k, v)]
        out = self.varlen(*flat, ends, ends, longest, longest)
        if kept is not None:
            out = v.new_zeros(v.shape).flatten(0, 1).index_copy(0, kept, out)
        return out.view(v.shape)

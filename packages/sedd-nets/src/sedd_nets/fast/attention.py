"""Attention by other kernels than the default's, with the same numbers: see `sedd_nets.attention`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sedd_nets.attention import Attention, sdpa
from sedd_nets.documents import Documents

__all__ = ["FlashAttention", "FlexAttention", "attention_named"]


class FlexAttention:
    """PyTorch's FlexAttention, compiled: documents cost only the 128 x 128 blocks they touch.

    Needs what `torch.compile` needs (a C++ compiler on a CPU, Triton on a GPU); on a CPU it has no backward.
    """

    def __init__(self) -> None:
        self.attend: Callable[..., Any] = torch.compile(flex_attention)

    def prepare(self, documents: Documents) -> None:
        """Find the blocks outside of compiled code."""
        _ = documents.block_mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, H, d) each, and so is the output."""
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        out: Tensor = self.attend(q, k, v, block_mask=None if documents is None else documents.block_mask)
        return out.transpose(1, 2)


class FlashAttention:
    """The flash-attn packages' kernels for GPUs, in half precision; documents cost no more than their lengths.

    Args:
        version: 2, the package flash-attn (Ampere and later), or 4, flash-attn-4 (Hopper and Blackwell).

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such version.
    """

    def __init__(self, version: int = 2) -> None:
        if version not in (2, 4):
            raise ValueError(f"FlashAttention(version={version!r}): 2 is flash-attn, 4 is flash-attn-4")
        module, package = ("flash_attn", "flash-attn") if version == 2 else ("flash_attn.cute", "flash-attn-4")
        try:
            kernels = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{package} is not installed ({error}). `pip install sedd-nets[{package}]` brings it, for NVIDIA GPUs; "
                "the default, sedd_nets.sdpa, gives the same numbers without it"
            ) from error
        self.rows: Callable[..., Any] = kernels.flash_attn_func
        self.varlen: Callable[..., Any] = kernels.flash_attn_varlen_func

    def prepare(self, documents: Documents) -> None:
        """Count the lengths outside of compiled code."""
        _ = documents.kept, documents.cu_seqlens, documents.longest

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
            return _output(self.rows(q, k, v))
        kept, ends, longest = documents.kept, documents.cu_seqlens, documents.longest
        flat = [a.flatten(0, 1) if kept is None else a.flatten(0, 1)[kept] for a in (q, k, v)]
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = _output(self.varlen(*flat, **lengths))
        if kept is not None:
            out = v.new_zeros(v.shape).flatten(0, 1).index_copy(0, kept, out)
        return out.view(v.shape)


def attention_named(name: str) -> Attention:
    """The attention that a recipe names: "sdpa", "flex", "flash" (flash-attn 2) or "flash-4".

    Raises:
        ValueError: there is none of that name.
        ImportError: its package is not installed.
    """
    makers: dict[str, Callable[[], Attention]] = {
        "sdpa": lambda: sdpa,
        "flex": FlexAttention,
        "flash": FlashAttention,
        "flash-4": lambda: FlashAttention(version=4),
    }
    if name not in makers:
        raise ValueError(f"there is no attention {name!r}: one of {', '.join(makers)}")
    return makers[name]()


def _output(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What flash-attn-4 gives may be followed by the normalisers."""
    return given[0] if isinstance(given, tuple) else given

"""Attention over the whole sequence, softmax(q k' / sqrt d) v, and the rotary angles that tell it of positions.

`net.attention` holds a callable; the default, `sdpa`, runs everywhere. The others (`sedd_nets.fast.attention`) are
chosen by assigning them, `net.attention = FlexAttention()`, and give the same numbers: to 1e-5 in float32, to 2e-2 in
bfloat16, relative to values of order one. Positions that belong to no document get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_nets.checks import on_host
from sedd_nets.documents import Documents

__all__ = ["Attention", "Rotary", "ScaledDotProduct", "sdpa"]


class Rotary(nn.Module):
    """The angles' cosines and sines, as `sedd_nets.functional.rotate` takes them for a packed projection.

    `inv_freq` (d/2,) is a buffer because the published files hold it.
    """

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
        """(cos, sin), each (length, 3, 1, d) float32: for queries, for keys, and for values, which nothing turns."""
        cos, sin = _turns(self.inv_freq, length)
        return cos, sin


@torch.library.custom_op("sedd_nets::turns", mutates_args=())
def _turns(inv_freq: Tensor, length: int) -> list[Tensor]:
    """The cosines and sines of all angles; closed to compilers, which would work them out again at each use."""
    angle = torch.outer(torch.arange(length, device=inv_freq.device, dtype=torch.float32), inv_freq)
    cos, sin = angle.cos(), angle.sin()
    both, signed = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return [
        torch.stack([both, both, torch.ones_like(both)], 1)[:, :, None],
        torch.stack([signed, signed, torch.zeros_like(signed)], 1)[:, :, None],
    ]


@_turns.register_fake
def _(inv_freq: Tensor, length: int) -> list[Tensor]:
    return [inv_freq.new_empty(length, 3, 1, 2 * inv_freq.shape[0]) for _ in range(2)]


class Attention(Protocol):
    """Any callable that attends. One that has `prepare(documents)` is told of them once, before the blocks run."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, /) -> Tensor:
        """Queries, keys and values, each (B, L, H, d) of any strides, to the heads' outputs (B, L, H, d)."""


class ScaledDotProduct:
    """PyTorch's `scaled_dot_product_attention`, which picks the fastest kernel that the device has.

    On a CPU documents are attended one by one, so each costs the square of its own length. Elsewhere, where a call
    costs more than its arithmetic, there is one for all of them, with a mask.

    Args:
        causal: whether a position sees none behind it, as in a left-to-right model.
    """

    def __init__(self, *, causal: bool = False) -> None:
        self.causal = causal

    def prepare(self, documents: Documents) -> None:
        """Make the mask outside of compiled code."""
        if not on_host(documents.ids):
            _ = documents.mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, H, d) each, and so is the output; the kernels take strided heads, so nothing is copied."""
        if documents is None:
            return self.rows(q, k, v)
        if not on_host(v):
            return self.masked(q, k, v, documents)
        flat_q, flat_k, flat_v = (a.flatten(0, 1)[None] for a in (q, k, v))
        out, end = [], 0
        for start, stop in documents.spans:
            out.append(v.new_zeros(start - end, *v.shape[-2:]))  # padding
            of_document = slice(start, stop)
            out.append(self.rows(flat_q[:, of_document], flat_k[:, of_document], flat_v[:, of_document])[0])
            end = stop
        out.append(v.new_zeros(flat_v.shape[1] - end, *v.shape[-2:]))
        return torch.cat(out).view(v.shape)

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every row one text."""
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """All documents in one call, at the cost of whole rows."""
        mask = documents.mask[:, None]
        if self.causal:
            mask = mask.tril()
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return torch.where(documents.inside[..., None, None], out, 0)


sdpa = ScaledDotProduct()

"""Attention as plain products over a few heads at a time: faster in bfloat16 on some CPUs.

PyTorch's fused kernel for CPUs takes as long in bfloat16 as in float32 on a processor with AVX-512's bfloat16 products
but without AMX: its small blocks do not reach them. Whole products of a head do, and the scores of a few heads stay in
the cache. The price: scores are rounded to the inputs' dtype, which the fused kernel keeps in float32. In bfloat16 a
score of 20 is then off by up to 0.06, and its probability by as many parts of one. That is why nobody gets this kernel
without asking for it.

The backward pass keeps q, k and v, and works the probabilities P out again. With the outputs o = P v and their
gradient g,

    dv = P' g,   dS = P * (g v' - sum(g v' * P)),   dq = dS k / sqrt d,   dk = dS' q / sqrt d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sedd_nets.attention import one_by_one
from sedd_nets.documents import Documents

__all__ = ["plain_products"]

SCORES = 1 << 21
"""Scores at a time, 4 MiB."""


def plain_products(qkv: Tensor, documents: Documents | None) -> Tensor:
    """softmax(q k' / sqrt d) v of every document and head, as products of whole matrices. Not for compiled code.

    Args:
        qkv: (B, L, 3, H, d).
        documents: where attention stays within; None: the whole row.

    Returns:
        (B, L, H, d).
    """
    if documents is not None:
        return one_by_one(plain_products, qkv, documents)
    with torch.autocast(qkv.device.type, enabled=False):
        out: Tensor = _Attend.apply(qkv)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        q, k, v = _by_head(qkv)
        out = torch.empty_like(q)
        for part, rows in _parts(*q.shape[:2]):
            torch.bmm(_probabilities(q, k, part, rows), v[part], out=out[part, rows])
        return _by_position(out, len(qkv))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        q, k, v = _by_head(qkv)
        g = grad.transpose(1, 2).flatten(0, 1)
        by_q, by_k, by_v = slopes = torch.zeros(3, *q.shape, dtype=q.dtype)
        for part, rows in _parts(*q.shape[:2]):
            p, g_rows = _probabilities(q, k, part, rows), g[part, rows]
            by_v[part].baddbmm_(p.mT, g_rows)
            by_p = torch.bmm(g_rows, v[part].mT)
            by_s = torch.ops.aten._softmax_backward_data(by_p, p, -1, p.dtype)
            torch.bmm(by_s, k[part], out=by_q[part, rows])
            by_k[part].baddbmm_(by_s.mT, q[part, rows])
        slopes[0] *= 1 / math.sqrt(q.shape[-1])  # k's comes with q, which is scaled already
        return slopes.view(3, len(qkv), -1, *q.shape[1:]).permute(1, 3, 0, 2, 4)


def _by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q / sqrt d, k, v), each (B H, L, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
    return q * (1 / math.sqrt(q.shape[-1])), k, v


def _by_position(a: Tensor, batch: int) -> Tensor:
    """(B H, L, d) to (B, L, H, d), laid out in that order."""
    return a.view(batch, -1, *a.shape[1:]).transpose(1, 2).contiguous()


def _probabilities(q: Tensor, k: Tensor, part: slice, rows: slice) -> Tensor:
    return torch.bmm(q[part, rows], k[part].mT).softmax(-1)


def _parts(heads: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut (heads, queries) so that the scores of a part number about `SCORES`."""
    step = max(1, SCORES // length**2)
    block = length if step > 1 else max(1, min(length, SCORES // length))
    for head in range(0, heads, step):
        for row in range(0, length, block):
            yield slice(head, head + step), slice(row, row + block)

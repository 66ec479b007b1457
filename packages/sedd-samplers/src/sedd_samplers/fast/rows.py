"""Arithmetic on rows over N states without spreading a structured row, and in pieces that a cache keeps.

times_row       a dense array times a row that is constant but at a few states
convert_rows    a function of rows, applied to pieces of a model's answer
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..interfaces import Row

__all__ = ["times_row", "spread", "convert_rows", "rows_at_a_time", "widened"]


def times_row(dense: Tensor, row: Row) -> Tensor:
    """Dense (M, N) times a row, entry by entry, in place: only its few states are looked up."""
    special = dense.gather(1, row.index).mul_(row.value.to(dense.dtype))
    return dense.mul_(row.base.to(dense.dtype)[:, None]).scatter_(1, row.index, special)


def spread(row: Row, like: Tensor) -> Tensor:
    """A row as a dense array (M, N) of the dtype of `like` (M, N)."""
    return row.base.to(like.dtype)[:, None].expand_as(like).scatter(1, row.index, row.value.to(like.dtype))


def convert_rows(answer: Tensor, pick: Tensor | None, convert: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Rows (M, N) made from a model's answer in pieces: one new tensor and one piece's temporaries.

    Args:
        answer: (R, N), not modified.
        pick: which rows of it to take, as `Asked` returns it.
        convert: (rows (m, N) float32 or float64, the slice of 0..M that they are) -> (m, N).
    """
    count = len(answer) if pick is None else len(pick)
    dtype = torch.promote_types(answer.dtype, torch.float32)
    out = torch.empty(count, answer.shape[-1], dtype=dtype, device=answer.device)
    size = rows_at_a_time(answer.shape[-1], answer.device)
    with torch.autocast(answer.device.type, enabled=False):
        for i in range(0, count, size):
            part = slice(i, i + size)
            out[part] = convert(widened(answer[part] if pick is None else answer[pick[part]]), part)
    return out


def rows_at_a_time(num_states: int, device: torch.device) -> int:
    """How many rows of N numbers a piece holds: 4 MB, which a CPU's cache keeps, or 256 MB, which fill a GPU."""
    return max(1, (2**20 if device.type == "cpu" else 2**26) // num_states)


def widened(rows: Tensor) -> Tensor:
    """The same in float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))

"""Arithmetic on rows over N states without spreading a row that is constant but at a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interfaces import Row

__all__ = ["times_row", "spread", "exp_but_at", "log"]


def times_row(dense: Tensor, row: Row) -> Tensor:
    """Dense (M, N) times a row, entry by entry, in place where no gradient is recorded: few states are looked up."""
    if dense.requires_grad:
        return dense * spread(row, dense)
    special = dense.gather(1, row.index).mul_(row.value.to(dense.dtype))
    return dense.mul_(row.base.to(dense.dtype)[:, None]).scatter_(1, row.index, special)


def spread(row: Row, like: Tensor) -> Tensor:
    """A row as a dense array (M, N) of the dtype of `like` (M, N)."""
    return row.base.to(like.dtype)[:, None].expand_as(like).scatter(1, row.index, row.value.to(like.dtype))


def exp_but_at(values: Tensor, x: Tensor) -> Tensor:
    """The exponentials (M, N), a new tensor, and 1 at x (M,), whatever stands there: one pass where no gradient is."""
    if values.requires_grad:
        return values.scatter(1, x[:, None], 0.0).exp()  # so that infinity at x has no gradient
    return values.exp().scatter_(1, x[:, None], 1.0)


def log(values: Tensor) -> Tensor:
    """The logarithm; of 0 it is -inf without a gradient, instead of NaN. In place where no gradient is recorded."""
    if not values.requires_grad:
        return values.log_()
    positive = values > 0
    return torch.where(
        positive, torch.where(positive, values, 1.0).log(), torch.where(values == 0, -torch.inf, torch.nan)
    )

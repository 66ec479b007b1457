"""A number for each row of the vocabulary, worked out one chunk of rows at a time, forward and backward.

A row has N entries, and autograd would keep every intermediate of that size. Here the formula is an ordinary
differentiable function of a chunk of rows; the backward pass evaluates it again rather than keep anything, so that no
more than one chunk's intermediates exist at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .score_entropy import CHUNK_ELEMENTS

__all__ = ["RowFunction", "each_row"]

RowFunction = Callable[..., Tensor]
"""(rows (m, N), *fields (m, ...)) -> (m,), differentiable by autograd, each row's value of its own fields alone."""


def each_row(
    function: RowFunction, rows: Tensor, positions: Tensor | None, *fields: Tensor, dtype: torch.dtype
) -> Tensor:
    """function(rows[positions], *fields), (M,), chunk by chunk. Differentiable once, by rows and float fields.

    Args:
        function: the formula; must not capture tensors that require a gradient.
        rows: (R, N) float; chunks of it are given to the function in `dtype`.
        positions: (M,) int64, which of the rows; all of them in order if None.
        fields: (M, ...) further arguments of the function, one entry a row.
        dtype: of the arithmetic and the result. Autocast is off.
    """
    value: Tensor = _EachRow.apply(function, dtype, rows, positions, *fields)  # type: ignore[no-untyped-call]
    return value


class _EachRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: RowFunction,
        dtype: torch.dtype,
        rows: Tensor,
        positions: Tensor | None,
        *fields: Tensor,
    ) -> Tensor:
        ctx.function, ctx.dtype = function, dtype
        ctx.save_for_backward(rows, positions, *fields)
        count = len(rows) if positions is None else len(positions)
        value = rows.new_empty(count, dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _chunks(rows, count):
                chunk = rows[part] if positions is None else rows[positions[part]]
                value[part] = function(chunk.to(dtype), *(field[part] for field in fields)).to(dtype)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, positions, *fields = ctx.saved_tensors
        inputs = [rows, *fields]
        wanted = [i for i, needed in enumerate((ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])) if needed]
        found: list[Tensor | None] = [torch.zeros_like(t) if i in wanted else None for i, t in enumerate(inputs)]
        with torch.autocast(rows.device.type, enabled=False):
            for part in _chunks(rows, len(grad)):
                chunk = rows[part] if positions is None else rows[positions[part]]
                arguments = [chunk.detach(), *(field[part].detach() for field in fields)]
                for i in wanted:
                    arguments[i].requires_grad_()
                with torch.enable_grad():
                    value = ctx.function(arguments[0].to(ctx.dtype), *arguments[1:]).to(ctx.dtype)
                slopes = torch.autograd.grad(value, [arguments[i] for i in wanted], grad[part], allow_unused=True)
                for i, slope in zip(wanted, slopes, strict=True):
                    target = found[i]
                    if slope is not None and target is not None:
                        target[part if i or positions is None else positions[part]] = slope
        return None, None, found[0], None, *found[1:]


def _chunks(rows: Tensor, count: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, rows.shape[-1]))
    return [slice(start, start + size) for start in range(0, count, size)]

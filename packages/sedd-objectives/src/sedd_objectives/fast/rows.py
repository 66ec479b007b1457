"""A number for each row of the vocabulary, worked out one chunk of rows at a time, forward and backward.

A row has N entries, and autograd would keep every intermediate of that size. Here a formula sees a chunk of rows; the
backward pass evaluates it again rather than keep anything, so that no more than one chunk's intermediates exist at any
time. `each_row` does so for any differentiable formula, `score_entropy_rows` for score entropy, whose slopes are known
in closed form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..jumps import Jumps
from .divergence import half_squares, row_divergence, with_gradients

__all__ = [
    "JumpsAt",
    "RowFunction",
    "chunks_of",
    "each_row",
    "equal_parts",
    "squares_over_jumps",
    "score_entropy_rows",
    "sum_over_jumps",
]

CHUNK_ELEMENTS = 1 << 22
"""Log-scores worked on at a time, 16 MiB of float32: several chunks' temporaries stay small next to any network."""

JumpsAt = Callable[..., Jumps]
"""(part, *inputs) -> the jumps of the rows `part`, a slice; the inputs hold one entry for each of these rows."""

RowFunction = Callable[..., Tensor]
"""(rows (m, N), *fields (m, ...)) -> (m,), differentiable by autograd, each row's value of its own fields alone."""


def sum_over_jumps(log_score: Tensor, positions: Tensor | None, jumps: Jumps) -> Tensor:
    """Score entropy (M,) of the rows `positions` (M,) of log_score (R, N), or of all rows if None. Differentiable."""
    dtype = jumps.weight.dtype
    return score_entropy_rows(log_score, positions, lambda _, *fields: Jumps(*fields), *jumps.fields(), dtype=dtype)


def score_entropy_rows(
    log_score: Tensor, positions: Tensor | None, jumps_at: JumpsAt, *inputs: Tensor, dtype: torch.dtype
) -> Tensor:
    """`sum_over_jumps` for jumps that are made a chunk of rows at a time, forward and again backward.

    Args:
        log_score: (R, N) float.
        positions: (M,) int64, which rows of log_score; all of them in order if None.
        jumps_at: (part, *inputs[part]) -> the jumps of the rows `part`, a slice of 0 .. M - 1.
        inputs: (M, ...) what the jumps depend on and a gradient may be asked for.
        dtype: of the arithmetic, that of the jumps' weights.

    Returns:
        (M,) of that dtype, differentiable once by log_score and by the inputs.
    """
    loss: Tensor = _SumOverChunks.apply(log_score, positions, jumps_at, dtype, *inputs)  # type: ignore[no-untyped-call]
    return loss


def squares_over_jumps(log_score: Tensor, jumps: Jumps) -> Tensor:
    """Half the weighted squares of score less ratio, summed over each row of log_score (M, N); (M,). Differentiable."""
    return each_row(half_squares, log_score, None, *jumps.fields(), dtype=jumps.weight.dtype)


def each_row(
    function: RowFunction,
    rows: Tensor,
    positions: Tensor | None,
    *fields: Tensor,
    dtype: torch.dtype,
    width: int | None = None,
) -> Tensor:
    """function(rows[positions], *fields), (M,), chunk by chunk. Differentiable once, by rows and float fields.

    Args:
        function: the formula; must not capture tensors that require a gradient.
        rows: (R, N) float; chunks of it are given to the function in `dtype`.
        positions: (M,) int64, which of the rows; all of them in order if None.
        fields: (M, ...) further arguments of the function, one entry a row.
        dtype: of the arithmetic and the result. Autocast is off.
        width: how many numbers the function makes of a row; N unless given.
    """
    how = function, dtype, width or rows.shape[-1]
    value: Tensor = _EachRow.apply(*how, rows, positions, *fields)  # type: ignore[no-untyped-call]
    return value


def chunks_of(num_rows: int, num_states: int) -> list[slice]:
    """The rows 0 .. num_rows - 1 in slices of at most CHUNK_ELEMENTS entries."""
    size = max(1, CHUNK_ELEMENTS // max(1, num_states))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def equal_parts(count: int, size: int, *, at_least: int = 1) -> list[slice]:
    """`count` rows in as few equal parts as hold no more than `size`, then empty ones up to `at_least` in all."""
    filled = max(1, math.ceil(count / size))
    ends = [min(i, filled) * count // filled for i in range(max(filled, at_least) + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _rows(log_score: Tensor, positions: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    rows = log_score[part] if positions is None else log_score[positions[part]]
    return rows.to(dtype)


class _SumOverChunks(torch.autograd.Function):
    """Row sums of the divergence; backward works the gradient out again, chunk by chunk, rather than keep it.

    The gradient of the loss has the shape of the log-score, and autograd would keep several more tensors of that shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_score: Tensor,
        positions: Tensor | None,
        jumps_at: JumpsAt,
        dtype: torch.dtype,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.jumps_at = jumps_at
        ctx.save_for_backward(log_score, positions, *inputs)
        loss = log_score.new_empty(len(log_score if positions is None else positions), dtype=dtype)
        with torch.autocast(log_score.device.type, enabled=False):
            for part in chunks_of(len(loss), log_score.shape[-1]):
                jumps = jumps_at(part, *(value[part] for value in inputs))
                loss[part] = row_divergence(_rows(log_score, positions, part, dtype), jumps)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_score, positions, *inputs = ctx.saved_tensors
        by_score = None
        if ctx.needs_input_grad[0]:
            by_score = torch.empty_like(log_score) if positions is None else torch.zeros_like(log_score)
        wanted = ctx.needs_input_grad[4:]
        by_inputs = [torch.zeros_like(value) if want else None for value, want in zip(inputs, wanted, strict=True)]
        with torch.autocast(log_score.device.type, enabled=False):
            for part in chunks_of(len(grad), log_score.shape[-1]):
                rows = _rows(log_score, positions, part, grad.dtype)
                leaves = [value[part].detach() for value in inputs]
                with torch.set_grad_enabled(any(wanted)):
                    for leaf, want in zip(leaves, wanted, strict=True):
                        leaf.requires_grad_(want)
                    jumps = ctx.jumps_at(part, *leaves)
                if by_score is not None:
                    by_row = torch.empty_like(rows)
                    row_divergence(rows, jumps.detach(), scale=grad[part], slope=by_row)
                    by_score[part if positions is None else positions[part]] = by_row.to(by_score.dtype)
                if any(wanted):
                    outputs, slopes = with_gradients(rows, jumps, grad[part])
                    asked = [leaf for leaf in leaves if leaf.requires_grad]
                    found = iter(torch.autograd.grad(outputs, asked, slopes, allow_unused=True))
                    for total in by_inputs:
                        slope = None if total is None else next(found)
                        if total is not None and slope is not None:
                            total[part] = slope
        return by_score, None, None, None, *by_inputs


class _EachRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: RowFunction,
        dtype: torch.dtype,
        width: int,
        rows: Tensor,
        positions: Tensor | None,
        *fields: Tensor,
    ) -> Tensor:
        ctx.function, ctx.dtype, ctx.width = function, dtype, width
        ctx.save_for_backward(rows, positions, *fields)
        count = len(rows) if positions is None else len(positions)
        value = rows.new_empty(count, dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part in chunks_of(count, width):
                chunk = _rows(rows, positions, part, dtype)
                value[part] = function(chunk, *(field[part] for field in fields)).to(dtype)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, positions, *fields = ctx.saved_tensors
        inputs = [rows, *fields]
        wanted = [i for i, needed in enumerate((ctx.needs_input_grad[3], *ctx.needs_input_grad[5:])) if needed]
        found: list[Tensor | None] = [torch.zeros_like(t) if i in wanted else None for i, t in enumerate(inputs)]
        with torch.autocast(rows.device.type, enabled=False):
            for part in chunks_of(len(grad), ctx.width):
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
        return None, None, None, found[0], None, *found[1:]

"""Score entropy: the loss that a positive score minimises at the true ratios.

    SE(x) = sum_{y != x} w_y ( s_y - r_y log s_y + K(r_y) ),   K(a) = a (log a - 1)              (eq. 5)

It is the w-weighted Bregman divergence of -log between the scores s_y = exp(log_score_y) and the ratios r_y: 0 exactly
where s = r and positive elsewhere. It is not symmetric in the two. Values are nats as soon as w are rates of a unit
of total noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bregman import jump_gradients, row_divergence
from .checks import arithmetic_dtype, check_states
from .interfaces import Row
from .jumps import DenseRow, Jumps, merge

__all__ = [
    "JumpsAt",
    "score_entropy",
    "jumps_between",
    "sum_over_jumps",
    "sum_over_chunks",
    "with_gradients",
    "check_not_nan",
]

CHUNK_ELEMENTS = 1 << 22
"""Log-scores worked on at a time, 16 MiB of float32: several chunks' temporaries stay small next to any network."""

JumpsAt = Callable[..., Jumps]
"""(part, *inputs) -> the jumps of the rows `part`, a slice; the inputs hold one entry for each of these rows."""


def score_entropy(log_score: Tensor, ratio: Row | Tensor, weight: Row | Tensor, x: Tensor) -> Tensor:
    """sum_{y != x} w_y ( s_y - r_y log s_y + K(r_y) ), eq. 5, for every position.

    Args:
        log_score: (..., N) float, log s(x)_y. The entry at y = x is ignored. bfloat16 and half are computed in float32.
        ratio: r >= 0, a `Row` of batch shape (...) or all values (..., N).
        weight: w >= 0 but at x, where it is ignored; a `Row` or all values (..., N).
        x: (...) int64, the state of each position.

    Returns:
        (...) float32, or float64 if log_score or ratio is: the sum of each position, >= 0.

    Raises:
        ValueError: shapes that do not fit, states out of range, or a sum that is not a number.
    """
    with torch.autocast(log_score.device.type, enabled=False):
        jumps = jumps_between(log_score, ratio, weight, x)
        loss = sum_over_jumps(log_score.reshape(-1, log_score.shape[-1]), None, jumps)
    check_not_nan(loss, log_score)
    return loss.reshape(x.shape)


def jumps_between(log_score: Tensor, ratio: Row | Tensor, weight: Row | Tensor, x: Tensor) -> Jumps:
    """The ratios and weights that `score_entropy` takes, checked against log_score (..., N), as one set of jumps."""
    num_states = log_score.shape[-1]
    check_states("x", x, num_states, log_score.shape[:-1])
    rows = []
    for name, row in (("ratio", ratio), ("weight", weight)):
        if isinstance(row, Tensor):
            if row.shape != log_score.shape:
                raise ValueError(f"{name} must have log_score's shape {tuple(log_score.shape)}, got {tuple(row.shape)}")
            row = DenseRow.of(row)
        if row.base.shape != x.shape:
            raise ValueError(f"{name} must be rows of x's shape {tuple(x.shape)}, got rows of {tuple(row.base.shape)}")
        rows.append(DenseRow(row.base.flatten(), row.index.flatten(0, -2), row.value.flatten(0, -2)))
    return merge(rows[1], rows[0], x.flatten(), arithmetic_dtype(log_score, rows[0].value), num_states)


def sum_over_jumps(log_score: Tensor, positions: Tensor | None, jumps: Jumps) -> Tensor:
    """Score entropy (M,) of the rows `positions` (M,) of log_score (R, N), or of all rows if None. Differentiable."""
    dtype = jumps.weight.dtype
    return sum_over_chunks(log_score, positions, lambda _, *fields: Jumps(*fields), *jumps.fields(), dtype=dtype)


def sum_over_chunks(
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


def with_gradients(rows: Tensor, jumps: Jumps, scale: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Those fields of the jumps that require a gradient, and the rows' sums' derivatives by them, times scale (m,)."""
    fields = (jumps.base_weight, jumps.base_ratio, jumps.weight, jumps.ratio)
    if not any(field.requires_grad for field in fields):
        return [], []
    with torch.no_grad():
        slopes = jump_gradients(rows, jumps)
        pairs = [
            (field, (slope * scale.reshape(-1, *[1] * (slope.ndim - 1))).to(field.dtype))
            for field, slope in zip(fields, slopes, strict=True)
            if field.requires_grad
        ]
    return [field for field, _ in pairs], [slope for _, slope in pairs]


def check_not_nan(loss: Tensor, log_score: Tensor) -> None:
    """Raise if a loss is NaN: sought in the reduced loss, for a pass over all scores costs as much as the loss."""
    if bool(loss.isnan().any()):
        at_fault = "log_score is NaN at a state that counts"
        if not bool(log_score.isnan().any()):
            at_fault = "log_score has no NaN, so some x cannot have come from its x0 at this sigma"
        raise ValueError(f"the loss is NaN at {int(loss.isnan().sum())} of {loss.numel()} positions: {at_fault}")


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
            for part in _chunks(log_score, len(loss)):
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
            for part in _chunks(log_score, len(grad)):
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


def _chunks(log_score: Tensor, num_rows: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, log_score.shape[-1]))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _rows(log_score: Tensor, positions: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    rows = log_score[part] if positions is None else log_score[positions[part]]
    return rows.to(dtype)

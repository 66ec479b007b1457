"""Score entropy: the loss that a positive score minimises at the true ratios.

    SE(x) = sum_{y != x} w_y ( s_y - r_y log s_y + K(r_y) ),   K(a) = a (log a - 1)              (eq. 5)

It is the w-weighted Bregman divergence of -log between the scores s_y = exp(log_score_y) and the ratios r_y: 0 exactly
where s = r and positive elsewhere. It is not symmetric in the two. Values are nats as soon as w are rates of a unit
of total noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bregman import jump_gradients, row_divergence
from .checks import arithmetic_dtype, check_states
from .interfaces import Row
from .jumps import DenseRow, Jumps, merge

__all__ = ["score_entropy", "jumps_between", "sum_over_jumps", "check_not_nan"]

CHUNK_ELEMENTS = 1 << 22
"""Log-scores worked on at a time, 16 MiB of float32: several chunks' temporaries stay small next to any network."""


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
    return merge(rows[1], rows[0], x.flatten(), arithmetic_dtype(log_score, rows[0].value))


def sum_over_jumps(log_score: Tensor, positions: Tensor | None, jumps: Jumps) -> Tensor:
    """Score entropy (M,) of the rows `positions` (M,) of log_score (R, N), or of all rows if None. Differentiable."""
    loss: Tensor = _SumOverJumps.apply(log_score, positions, *jumps.fields())  # type: ignore[no-untyped-call]
    return loss


def check_not_nan(loss: Tensor, log_score: Tensor) -> None:
    """Raise if a loss is NaN: sought in the reduced loss, for a pass over all scores costs as much as the loss."""
    if bool(loss.isnan().any()):
        at_fault = "log_score is NaN at a state that counts"
        if not bool(log_score.isnan().any()):
            at_fault = "log_score has no NaN, so some x cannot have come from its x0 at this sigma"
        raise ValueError(f"the loss is NaN at {int(loss.isnan().sum())} of {loss.numel()} positions: {at_fault}")


class _SumOverJumps(torch.autograd.Function):
    """Row sums of the divergence; backward works the gradient out again, chunk by chunk, rather than keep it.

    The gradient of the loss has the shape of the log-score, and autograd would keep several more tensors of that shape.
    """

    @staticmethod
    def forward(ctx: Any, log_score: Tensor, positions: Tensor | None, *fields: Tensor) -> Tensor:
        jumps = Jumps(*fields)
        ctx.save_for_backward(log_score, positions, *fields)
        loss = jumps.base_weight.new_empty(len(jumps.base_weight))
        for start, stop in _chunks(log_score, len(loss)):
            rows = _rows(log_score, positions, start, stop, loss.dtype)
            loss[start:stop], _ = row_divergence(rows, jumps.rows(start, stop), want_slope=False)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_score, positions, *fields = ctx.saved_tensors
        jumps = Jumps(*fields)
        by_score = None
        if ctx.needs_input_grad[0]:
            by_score = torch.empty_like(log_score) if positions is None else torch.zeros_like(log_score)
        by_jumps: list[Tensor | None] = [None] * len(fields)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        for i in wanted:
            by_jumps[i] = torch.empty_like(fields[i])
        for start, stop in _chunks(log_score, len(grad)):
            rows, chunk = _rows(log_score, positions, start, stop, grad.dtype), jumps.rows(start, stop)
            if by_score is not None:
                _, slope = row_divergence(rows, chunk, scale=grad[start:stop], want_slope=True)
                assert slope is not None
                by_score[slice(start, stop) if positions is None else positions[start:stop]] = slope.to(by_score.dtype)
            if wanted:
                gradients = jump_gradients(rows, chunk)
                by_field = (gradients[0], gradients[1], None, gradients[2], gradients[3])
                for i in wanted:
                    field = by_field[i]
                    assert field is not None
                    factor = grad[start:stop].reshape(-1, *[1] * (field.ndim - 1))
                    by_jumps[i][start:stop] = field * factor  # type: ignore[index]
        return by_score, None, *by_jumps


def _chunks(log_score: Tensor, num_rows: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // max(1, log_score.shape[-1]))
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _rows(log_score: Tensor, positions: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows = log_score[start:stop] if positions is None else log_score[positions[start:stop]]
    return rows.to(dtype)

"""A linear head and score entropy as one operation, forward and backward, a chunk of positions at a time.

    log_score = hidden W^T + bias + shift,   slope = d loss / d log_score,
    d loss / d hidden = slope W,   d loss / d W += slope^T hidden,   d loss / d bias += slope's columns' sums,
    d loss / d shift = slope's rows' sums

A chunk's log-scores and slopes are made in the same room as those of the chunk before. Three matrix products, as many
as the plain way, where working the chunk out again in the backward pass would cost four. The sums over chunks are kept
in float32 whatever the precision of the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import arithmetic_dtype, check_not_nan, sum_dtype
from ..interfaces import LinearHead
from ..jumps import Jumps
from .divergence import row_divergence, with_gradients
from .rows import JumpsAt, equal_parts

__all__ = ["linear_head_and_loss", "check_head", "loss_and_slopes", "product_dtype", "linear", "add_product"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_head_and_loss(
    head: LinearHead,
    jumps_at: JumpsAt,
    size: int,
    refuse_nan: bool,
    hidden: Tensor,
    shift: Tensor,
    sigma: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum of factor * loss, (), and factor * loss, (M,), of the M rows of `hidden`, at most `size` at a time."""
    weight, bias = head.weight, head.bias
    both: tuple[Tensor, Tensor] = _LinearHeadAndLoss.apply(  # type: ignore[no-untyped-call]
        jumps_at, equal_parts(len(hidden), size), refuse_nan, hidden, weight, bias, shift, sigma, factor
    )
    return both


def check_head(head: LinearHead, num_states: int, width: int) -> None:
    """Raise ValueError unless the head's weight is (N, D) and its bias (N,) or None."""
    weight, bias = head.weight, head.bias
    if weight.shape != (num_states, width):
        raise ValueError(f"head.weight must have shape (N, D), {(num_states, width)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (num_states,):
        raise ValueError(f"head.bias must have shape (N,), {(num_states,)}, or be None, got {tuple(bias.shape)}")


class _LinearHeadAndLoss(torch.autograd.Function):
    """(sum of factor * loss, factor * loss (M,)) of the M rows of `hidden`; only the first has a gradient.

    Its gradients are known at the end of the forward pass; backward multiplies them by that of its one number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        jumps_at: JumpsAt,
        parts: list[slice],
        refuse_nan: bool,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor,
        sigma: Tensor,
        factor: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[3:]
        by_hidden, by_weight, by_bias, by_shift, by_sigma, by_factor = wanted
        dtype = product_dtype(hidden)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        vector = None if bias is None else bias.to(dtype)
        loss = torch.empty_like(factor)
        totals = [
            torch.zeros_like(value, dtype=arithmetic_dtype(value)) if want and value is not None else None
            for value, want in zip((hidden, weight, bias, shift, sigma), wanted, strict=False)
        ]
        hidden_slope, weight_slope, bias_slope, shift_slope, sigma_slope = totals
        longest = max(part.stop - part.start for part in parts)
        scores_room = rows.new_empty(longest, len(weight))
        needed = by_hidden or by_weight or by_bias or by_shift
        slopes_room = factor.new_empty(longest, len(weight)) if needed else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                logits = linear(rows[part], matrix, vector, out=scores_room[: part.stop - part.start])
                noise = sigma[part].detach().to(sum_dtype(sigma.device)).requires_grad_(by_sigma)
                with torch.set_grad_enabled(by_sigma):
                    jumps = jumps_at(part, noise)
                room = None if slopes_room is None else slopes_room[: part.stop - part.start]
                log_score, loss[part] = loss_and_slopes(logits, shift[part], jumps.detach(), factor[part], room)
                if refuse_nan:
                    check_not_nan(loss[part], log_score)
                if sigma_slope is not None:
                    sigma_slope[part] = _slope_by_noise(log_score, jumps, factor[part], noise)
                if room is None:
                    continue
                if shift_slope is not None:
                    shift_slope[part] = room.sum(-1)
                if bias_slope is not None:
                    bias_slope += room.sum(0)
                slopes = room.to(dtype)
                if hidden_slope is not None:
                    hidden_slope[part] = slopes @ matrix
                if weight_slope is not None:
                    add_product(weight_slope, slopes.T, rows[part])
        weighted = loss * factor
        ctx.mark_non_differentiable(weighted)
        slopes_of = [
            None if total is None or value is None else total.to(value.dtype)
            for total, value in zip(totals, (hidden, weight, bias, shift, sigma), strict=True)
        ]
        ctx.slopes = [*slopes_of, loss if by_factor else None]
        return weighted.sum(), weighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise RuntimeError("the gradients of fused_denoising_loss have been handed out: it goes backward only once")
        slopes, ctx.slopes = ctx.slopes, None
        return None, None, None, *(None if slope is None else slope.mul_(grad) for slope in slopes)


def loss_and_slopes(
    logits: Tensor, shift: Tensor, jumps: Jumps, factor: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Score entropy of rows, and the slopes of factor * loss by their log-scores.

    Args:
        logits: (m, N), the log-scores less their shift, of the products' dtype; overwritten.
        shift: (m,) of each row, of the arithmetic's dtype.
        jumps: the weights and ratios of the m rows.
        factor: (m,) of each row in the slopes; its dtype is the arithmetic's.
        room: (m, N) of factor's dtype, where the slopes are written; not worked out if None.

    Returns:
        The log-scores (m, N) and the losses (m,), both of factor's dtype.
    """
    log_score = logits.to(factor.dtype).add_(shift[:, None])
    return log_score, row_divergence(log_score, jumps, scale=factor, slope=room)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """That of the matrix products: autocast's where it is on, as it would be for a linear layer."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """Rows W^T + bias, written to `out`."""
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """`total` += one @ other, in total's dtype; on CUDA the product is summed in that dtype, too, if torch can."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    elif one.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        total += torch.mm(one, other, out_dtype=total.dtype)
    else:
        total += one @ other


def _slope_by_noise(log_score: Tensor, jumps: Jumps, factor: Tensor, noise: Tensor) -> Tensor:
    """The slope (m,) of factor * loss by the total noise that the jumps' ratios were made of."""
    outputs, slopes = with_gradients(log_score, jumps, factor)
    if not outputs:
        return torch.zeros_like(noise)
    (slope,) = torch.autograd.grad(outputs, noise, slopes, allow_unused=True)
    return torch.zeros_like(noise) if slope is None else slope

"""A linear head and a loss on a GPU: a product, one kernel over the logits, two products.

For score entropy as `linear_head.py`, of which this is the fast way where triton is: the same loss and gradients. A
chunk's logits are made in one room, in the products' dtype, and become its slopes in the same room
(`triton_kernel.py`), so that nothing of their size exists twice or in float32. The weight's copy in that dtype has a
multiple of 64 rows, the last of them 0: matrix products are several times faster than with a vocabulary of 50,258. Its
gradient is summed in float32. Nothing is read back from the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import arithmetic_dtype, sum_dtype
from .linear_head import add_product, linear, product_dtype
from .rows import JumpsAt, equal_parts

__all__ = ["kernel_head_and_loss", "kernel_serves", "of_score_entropy", "of_cross_entropy", "SlopesOf"]

ALIGNED = 64
"""Rows of the weight's copy come in this number: 128 bytes of bfloat16."""
LEAST_ROWS = 4096
"""Rows at a time, at least: fewer cost a GPU time."""
SlopesOf = Callable[[slice, Tensor, Tensor], Tensor]
"""(rows `part` of all, their logits (m, W), their factor (m,)) -> their losses (m,); the slopes of factor * loss by the
logits, 0 in the columns from N on, are written over these."""

SHARE = 64
"""A chunk's logits take a 64th of the device's memory, if that is more: 1.25 GB of 80."""


def kernel_serves(hidden: Tensor, dtype: torch.dtype, *inputs: Tensor) -> bool:
    """Whether the kernel can be used: on CUDA, with triton, in float32 arithmetic, without gradients by the inputs."""
    learns = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    return hidden.is_cuda and dtype == torch.float32 and not learns and importlib.util.find_spec("triton") is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def kernel_head_and_loss(
    weight: Tensor, bias: Tensor | None, slopes_of: SlopesOf, hidden: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of factor * loss, (), and factor * loss, (M,), of the M rows of `hidden`.

    Args:
        weight: (N, D).
        bias: (N,) or None.
        slopes_of: see `SlopesOf`.
        hidden: (M, D).
        factor: (M,) of each row's loss; its dtype is the losses'.
    """
    parts = equal_parts(len(hidden), rows_at_a_time(hidden.device, len(weight), product_dtype(hidden)))
    both: tuple[Tensor, Tensor] = _KernelHeadAndLoss.apply(  # type: ignore[no-untyped-call]
        slopes_of, parts, hidden, weight, bias, factor
    )
    return both


def of_score_entropy(jumps_at: JumpsAt, shift: Tensor, sigma: Tensor, num_states: int) -> SlopesOf:
    """Score entropy of rows with the shift (M,), of the jumps at the noise sigma (M,)."""
    from .triton_kernel import score_entropy_slopes_

    def slopes_of(part: slice, logits: Tensor, factor: Tensor) -> Tensor:
        jumps = jumps_at(part, sigma[part].to(sum_dtype(sigma.device))).detach()
        dense = jumps.index.shape[-1] == num_states and jumps.index.stride(0) == 0  # one list of all states, by `merge`
        return score_entropy_slopes_(logits, shift[part], jumps, factor, num_states, dense=dense)

    return slopes_of


def of_cross_entropy(x: Tensor, x0: Tensor, num_states: int, *, kernel: bool) -> SlopesOf:
    """-log p(x0), normalised over all states but x, of the states x, x0 (M,)."""
    if kernel:
        from .triton_kernel import cross_entropy_slopes_

        return lambda part, logits, factor: cross_entropy_slopes_(logits, x[part], x0[part], factor, num_states)

    def slopes_of(part: slice, logits: Tensor, factor: Tensor) -> Tensor:
        others = logits[:, :num_states].to(factor.dtype).scatter_(1, x[part, None], -torch.inf)
        log_p = others.log_softmax(-1)
        clean = x0[part, None]
        loss: Tensor = -log_p.gather(1, clean)[:, 0]
        slope = log_p.exp_().scatter_add_(1, clean, log_p.new_full(clean.shape, -1.0)).mul_(factor[:, None])
        logits[:, :num_states] = slope
        return loss

    return slopes_of


def rows_at_a_time(device: torch.device, num_states: int, dtype: torch.dtype) -> int:
    """How many rows of logits a chunk has: set by the card, not by what is free, so that runs repeat themselves."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(LEAST_ROWS, memory // SHARE // (aligned(num_states) * dtype.itemsize))


def aligned(num_states: int) -> int:
    """N, or the next multiple of 64."""
    return -(-num_states // ALIGNED) * ALIGNED


class _KernelHeadAndLoss(torch.autograd.Function):
    """(sum of factor * loss, factor * loss (M,)) of the M rows of `hidden`; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        slopes_of: SlopesOf,
        parts: list[slice],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor,
    ) -> tuple[Tensor, Tensor]:
        by_hidden, by_weight, by_bias, by_factor = ctx.needs_input_grad[2:]
        dtype, num_states = product_dtype(hidden), len(weight)
        rows, matrix = hidden.to(dtype), _padded(weight, dtype)
        vector = None if bias is None else _padded(bias, dtype)
        room = rows.new_empty(max(part.stop - part.start for part in parts), len(matrix))
        loss = torch.empty_like(factor)
        hidden_slope = torch.empty_like(rows) if by_hidden else None
        weight_slope = torch.zeros_like(matrix, dtype=arithmetic_dtype(weight)) if by_weight else None
        bias_slope = None
        if bias is not None and by_bias:
            bias_slope = bias.new_zeros(len(matrix), dtype=arithmetic_dtype(bias))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                slopes = linear(rows[part], matrix, vector, out=room[: part.stop - part.start])
                loss[part] = slopes_of(part, slopes, factor[part])
                if hidden_slope is not None:
                    torch.mm(slopes, matrix, out=hidden_slope[part])
                if weight_slope is not None:
                    add_product(weight_slope, slopes.T, rows[part])
                if bias_slope is not None:
                    bias_slope += slopes.sum(0, dtype=bias_slope.dtype)
        weighted = loss * factor
        ctx.mark_non_differentiable(weighted)
        ctx.slopes = [
            None if hidden_slope is None else hidden_slope.to(hidden.dtype),
            None if weight_slope is None else weight_slope[:num_states].to(weight.dtype),
            None if bias is None or bias_slope is None else bias_slope[:num_states].to(bias.dtype),
            loss if by_factor else None,
        ]
        return weighted.sum(), weighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise RuntimeError("the gradients of this loss have been handed out: it goes backward only once")
        slopes, ctx.slopes = ctx.slopes, None
        return None, None, *tuple(None if slope is None else slope.mul_(grad) for slope in slopes)


def _padded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A head's weight (N, D) or bias (N,) in `dtype`, with zeros up to a multiple of 64."""
    out = value.new_zeros(aligned(len(value)), *value.shape[1:], dtype=dtype)
    out[: len(value)] = value.detach()
    return out

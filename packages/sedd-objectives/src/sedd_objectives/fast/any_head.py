"""Any head and score entropy as one operation: autograd on a chunk of positions at a time.

    log_score = head(hidden),   loss += sum of the weighted score entropy,   slope = d loss / d log_score,

and autograd takes the slope back through the chunk's head at once, to the hidden states and to whatever the head uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import arithmetic_dtype, check_not_nan, sum_dtype
from ..interfaces import Head
from ..jumps import Jumps
from .divergence import row_divergence, with_gradients
from .rows import JumpsAt, equal_parts

__all__ = ["any_head_and_loss"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def any_head_and_loss(
    head: Head,
    jumps_at: JumpsAt,
    num_states: int,
    size: int,
    num_calls: int,
    refuse_nan: bool,
    x: Tensor,
    hidden: Tensor,
    sigma: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum of factor * loss, (), and factor * loss, (M,), of the M rows of `hidden`, at most `size` at a time.

    The head is called `num_calls` times, if need be without rows.
    """
    parameters = _parameters(head, hidden, x, sigma) if torch.is_grad_enabled() else []
    parts = equal_parts(len(x), size, at_least=num_calls)
    both: tuple[Tensor, Tensor] = _AnyHeadAndLoss.apply(  # type: ignore[no-untyped-call]
        head, jumps_at, num_states, parts, refuse_nan, x, hidden, sigma, factor, *parameters
    )
    return both


def _parameters(head: Head, hidden: Tensor, x: Tensor, sigma: Tensor) -> list[Tensor]:
    """The leaves of the autograd graph of a call of the head with no rows, but for its arguments.

    Their order is that of the graph, the same on all ranks: gradients are exchanged in the order in which they arrive.
    """
    with torch.enable_grad():
        nodes = [head(hidden[:0].detach(), x[:0], sigma[:0].detach()).grad_fn]
    seen, leaves = set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return leaves


class _AnyHeadAndLoss(torch.autograd.Function):
    """(sum of factor * loss, factor * loss (M,)) of the M rows of `hidden`; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        jumps_at: JumpsAt,
        num_states: int,
        parts: list[slice],
        refuse_nan: bool,
        x: Tensor,
        hidden: Tensor,
        sigma: Tensor,
        factor: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        by_hidden, by_sigma, by_factor = ctx.needs_input_grad[6:9]
        needed = by_hidden or by_sigma or bool(parameters)
        loss = torch.empty_like(factor)
        hidden_slope, sigma_slope = torch.zeros_like(hidden), torch.zeros_like(sigma)
        sums = [torch.zeros_like(p, dtype=arithmetic_dtype(p)) for p in parameters]
        longest = max(part.stop - part.start for part in parts) if needed else 0
        room = factor.new_empty(longest, num_states)  # for the slopes by log_score, of one chunk after the other
        for part in parts:
            rows, noise = hidden[part].detach().requires_grad_(by_hidden), sigma[part].detach().requires_grad_(by_sigma)
            with torch.set_grad_enabled(needed):
                log_score = head(rows, x[part], noise)
            if log_score.shape != (len(rows), num_states):
                expected = (len(rows), num_states)
                raise ValueError(f"head must return log_score of shape {expected}, got {tuple(log_score.shape)}")
            with torch.autocast(x.device.type, enabled=False):
                with torch.set_grad_enabled(by_sigma):
                    jumps = jumps_at(part, noise.to(sum_dtype(x.device)))
                loss[part], outputs, slopes = _loss_and_slopes(log_score, jumps, factor[part], room[: len(rows)])
                if refuse_nan:
                    check_not_nan(loss[part], log_score)
            if outputs:
                wanted = [(rows, hidden_slope[part]), (noise, sigma_slope[part]), *zip(parameters, sums, strict=True)]
                wanted = [(leaf, total) for leaf, total in wanted if leaf.requires_grad]
                # Retained: what the head uses of tensors made outside, every chunk goes back through.
                leaves = [leaf for leaf, _ in wanted]
                found = torch.autograd.grad(outputs, leaves, slopes, retain_graph=True, allow_unused=True)
                for (_, total), slope in zip(wanted, found, strict=True):
                    if slope is not None:
                        total += slope
                del found
            del log_score, outputs, slopes
        weighted = loss * factor
        ctx.mark_non_differentiable(weighted)
        ctx.slopes = [
            hidden_slope if by_hidden else None,
            sigma_slope if by_sigma else None,
            loss if by_factor else None,
            *(total.to(p.dtype) for p, total in zip(parameters, sums, strict=True)),
        ]
        return weighted.sum(), weighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise RuntimeError("the gradients of fused_denoising_loss have been handed out: it goes backward only once")
        slopes, ctx.slopes = ctx.slopes, None
        return (None,) * 6 + tuple(None if slope is None else slope.mul_(grad) for slope in slopes)


def _loss_and_slopes(
    log_score: Tensor, jumps: Jumps, factor: Tensor, room: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss (m,) of rows; what of log_score and jumps requires a gradient, and the slopes of factor * loss by it.

    The slopes by log_score are written to `room` (m, N), of factor's dtype, if they are wanted.
    """
    values = log_score.detach().to(factor.dtype)
    wanted = log_score.requires_grad
    loss = row_divergence(values, jumps.detach(), scale=factor, slope=room if wanted else None)
    outputs, slopes = with_gradients(values, jumps, factor)
    if wanted:
        outputs, slopes = [log_score, *outputs], [room.to(log_score.dtype), *slopes]
    return loss, outputs, slopes

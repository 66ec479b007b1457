"""The network's head and the diffusion loss as one operation, which never holds the log-scores of a batch.

The head turns D numbers a position into N, and the loss turns them into one. For a vocabulary of 50,000 the log-scores
are the largest tensor of a training step, and their gradient another one. Neither is needed as a whole: the loss is a
sum over positions, so that for a chunk of positions at a time

    log_score = head(hidden),   loss += sum of the weighted score entropy,   slope = d loss / d log_score,

and the slope at once gives the chunk's part of the gradients by `hidden` and by the head's parameters,

    d loss / d hidden = slope W,   d loss / d W += slope^T hidden        for a linear head,

which is all that is kept. The gradients are thus known at the end of the forward pass; the backward pass multiplies
them by the gradient of its one number, the sum of the loss. A linear head costs three matrix products, as many as the
plain way, where working the chunk out again in the backward pass would cost four.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..batch import spread
from ..checks import (
    arithmetic_dtype,
    check_not_nan,
    check_sigma,
    check_states,
    check_weight,
    expand_leading,
    sum_dtype,
)
from ..denoising import denoising_jumps
from ..interfaces import Graph
from ..jumps import Jumps, RatesInto
from .divergence import row_divergence, with_gradients
from .rows import JumpsAt

__all__ = ["FusedLoss", "Head", "fused_denoising_loss"]

CHUNK_ELEMENTS = 1 << 25
"""Log-scores at a time, at most: 128 MiB of float32, and their slopes as much again.

Each chunk reads all of the head's weight and of its gradient: with a quarter of the rows the products take longer.
"""

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (m, D), x (m,), sigma (m,)) -> log_score (m, N), for any m >= 0, each row from its own arguments alone."""


class FusedLoss(NamedTuple):
    """The diffusion loss of a batch."""

    total: Tensor
    """() nats, the sum over sequences: what to differentiate, once."""
    per_sequence: Tensor
    """(B,) nats a sequence, without a gradient."""


def fused_denoising_loss(
    hidden: Tensor,
    head: Head,
    graph: Graph,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    *,
    weight: Tensor | None = None,
    refuse_nan: bool = True,
) -> FusedLoss:
    """`denoising_loss` from the hidden states on: the same number and gradients, one chunk of log-scores at a time.

    Gradients reach hidden, sigma, dsigma, weight and whatever parameters the head uses; these are found by following
    the gradient of one call with no rows. The head is called the same number of times for the same B L and N, however
    many positions can move, the last times without rows: ranks which gather its parameters for every call stay in step.

    Under `torch.compile` this function is a break in the graph; the network before it is compiled as usual. A float16
    head with a scaled loss is not for this function: its gradients are made before the scale is known, and underflow.

    Args:
        hidden: (B, L, D) float, what the head takes, for all positions.
        head: see `Head`; usually a method of the network. It never sees positions that cannot move.
        graph: the forward process.
        x: (B, L) int64, the noised states.
        x0: (B, L) int64, the clean states.
        sigma: (B,) or (B, L) total noise; one a position is handed to the head.
        dsigma: (B,) or (B, L), its derivative by time.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head. Weights (B,) also serve times that were not drawn uniformly.
        refuse_nan: whether to raise where a loss is NaN. False returns it: for a caller that counts such sequences, and
            that cannot raise on one of several ranks while the others go on to their next exchange.

    Returns:
        The sum over the batch and its parts, float32, or float64 if hidden or sigma is.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, a weight that is negative
            somewhere or 0 everywhere, a NaN score unless `refuse_nan` is False.
    """
    if hidden.ndim != 3 or hidden.shape[:-1] != x.shape:
        raise ValueError(f"hidden must have shape (B, L, D) for x of shape (B, L), got {tuple(hidden.shape)}")
    check_states("x", x, graph.num_states)
    check_states("x0", x0, graph.num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma, factor = expand_leading("sigma", sigma, x), expand_leading("dsigma", dsigma, x)
    rates = RatesInto.of(graph, x)
    live = rates.can_move(x, graph.num_states)
    if weight is not None:
        weight = check_weight(weight, x)
        factor, live = factor * weight, live & (weight > 0)
    dtype = arithmetic_dtype(hidden, sigma)
    jumps_at = denoising_jumps(graph, rates, x[live], x0[live], dtype)
    size = max(1, CHUNK_ELEMENTS // graph.num_states)
    parts = _parts(int(live.sum()), size, num_parts=max(1, math.ceil(live.numel() / size)))
    total, loss = _in_chunks(
        *(head, jumps_at, graph.num_states, parts, refuse_nan),
        *(x[live], hidden[live], sigma[live], factor[live].to(dtype)),
    )
    return FusedLoss(total, spread(loss, live).sum(-1))


def _parts(count: int, size: int, *, num_parts: int) -> list[slice]:
    """`count` rows in as few equal parts as hold no more than `size`, then empty ones up to `num_parts` in all."""
    filled = max(1, math.ceil(count / size))
    ends = [min(i, filled) * count // filled for i in range(num_parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_chunks(
    head: Head,
    jumps_at: JumpsAt,
    num_states: int,
    parts: list[slice],
    refuse_nan: bool,
    x: Tensor,
    hidden: Tensor,
    sigma: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """The summed loss and its parts (M,) for the M positions of x; see `_HeadAndLoss`."""
    parameters = _parameters(head, hidden, x, sigma) if torch.is_grad_enabled() else []
    both: tuple[Tensor, Tensor] = _HeadAndLoss.apply(  # type: ignore[no-untyped-call]
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


class _HeadAndLoss(torch.autograd.Function):
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
        in_place = _InPlace({id(p): total for p, total in zip(parameters, sums, strict=True)})
        for part in parts:
            rows, noise = hidden[part].detach().requires_grad_(by_hidden), sigma[part].detach().requires_grad_(by_sigma)
            with torch.set_grad_enabled(needed), in_place:
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
                found = torch.autograd.grad(outputs, [leaf for leaf, _ in wanted], slopes, allow_unused=True)
                for (_, total), slope in zip(wanted, found, strict=True):
                    if slope is not None:
                        total += slope
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
        made_by: Any = log_score.grad_fn
        if isinstance(made_by, _ScatterBackward):
            made_by.grad_is_free = True
        outputs, slopes = [log_score, *outputs], [room.to(log_score.dtype), *slopes]
    return loss, outputs, slopes


class _InPlace(TorchFunctionMode):
    """While active, spares copies of the two largest tensors in the backward pass of a head: its weight and its output.

    F.linear adds the gradients of its weight and bias to the sums kept for them. autograd would make a new tensor of
    each chunk's share and leave it to be added: several passes over the matrix of a vocabulary. And scatter_ of a
    number, if it is what makes the output, clears its entries in the gradient itself. Any other operation is left to
    autograd.
    """

    def __init__(self, sums: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.sums = sums

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            func = self._linear
        elif func is Tensor.scatter_:
            func = self._scatter_
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = input.dtype == weight.dtype and not torch.is_autocast_enabled(input.device.type)
        if not plain or id(weight) not in self.sums or not (bias is None or id(bias) in self.sums):
            return F.linear(input, weight, bias)
        bias_sum = None if bias is None else self.sums[id(bias)]
        out: Tensor = _Linear.apply(input, weight, bias, self.sums[id(weight)], bias_sum)  # type: ignore[no-untyped-call]
        return out

    def _scatter_(self, input: Tensor, dim: int, index: Tensor, value: Tensor | float, **how: Any) -> Tensor:
        if isinstance(value, Tensor) or how or input.is_leaf or input._is_view():
            return input.scatter_(dim, index, value, **how)
        out: Tensor = _Scatter.apply(input, dim, index, value)  # type: ignore[no-untyped-call]
        return out


class _Scatter(torch.autograd.Function):
    """input.scatter_(dim, index, value) of a number; `grad_is_free` once the gradient is known to be no one else's."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
        ctx.mark_dirty(input)
        ctx.save_for_backward(index)
        ctx.dim, ctx.grad_is_free = dim, False
        return input.scatter_(dim, index, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        cleared = grad if ctx.grad_is_free else grad.clone()
        return cleared.scatter_(ctx.dim, index, 0), None, None, None


_ScatterBackward: Any = _Scatter._backward_cls


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, weight_sum: Tensor, bias_sum: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.sums = weight_sum, bias_sum
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        weight_sum, bias_sum = ctx.sums
        rows, slopes = input.reshape(-1, input.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if weight_sum.dtype == slopes.dtype:
            weight_sum.addmm_(slopes.T, rows)
        else:
            weight_sum += slopes.T @ rows
        if bias_sum is not None:
            bias_sum += slopes.sum(0)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None

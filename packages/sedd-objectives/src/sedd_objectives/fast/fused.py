"""The network's head and the diffusion loss as one operation, which never holds the log-scores of a batch.

The head turns D numbers a position into N, and the loss turns them into one. For a vocabulary of 50,000 the log-scores
are the largest tensor of a training step, and their gradient another one. Neither is needed as a whole: the loss is a
sum over positions, so that for a chunk of positions at a time

    log_score = head(hidden),   loss += sum of the weighted score entropy,   slope = d loss / d log_score,

and the slope at once gives the chunk's part of the gradients by the hidden states and by the head's parameters, which
is all that is kept. The gradients are thus known at the end of the forward pass; the backward pass multiplies them by
the gradient of its one number, the sum of the loss.

A linear head is handed over as what it is and costs three products (`linear_head.py`, on a GPU `kernel_head.py`); any
other is called, and differentiated by autograd, chunk by chunk (`any_head.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import check_clean, check_kept, check_possible, check_process
from ..checks import (
    arithmetic_dtype,
    check_not_nan,
    check_sigma,
    check_states,
    expand_leading,
    require,
)
from ..cross_entropy import rate_back
from ..denoising import denoising_jumps
from ..interfaces import Graph, Head, LinearHead
from ..jumps import RatesInto, can_move
from .any_head import any_head_and_loss
from .kernel_head import kernel_head_and_loss, kernel_serves, of_cross_entropy, of_score_entropy
from .linear_head import check_head, linear_head_and_loss

__all__ = ["FusedLoss", "fused_denoising_loss", "fused_cross_entropy_loss"]

CHUNK_ELEMENTS = 1 << 25
"""Log-scores at a time, at most: 128 MiB of float32, and their slopes as much again.

Each chunk reads all of the head's weight and of its gradient: with a quarter of the rows the products take longer.
"""


class FusedLoss(NamedTuple):
    """The diffusion loss of a batch."""

    total: Tensor
    """() nats, the sum over sequences: what to differentiate, once."""
    per_sequence: Tensor
    """(B,) nats a sequence, without a gradient."""


def fused_denoising_loss(
    hidden: Tensor,
    head: Head | LinearHead,
    graph: Graph,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    *,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    positions: Tensor | None = None,
    refuse_nan: bool = True,
) -> FusedLoss:
    """`denoising_loss` from the hidden states on: the same number and gradients, one chunk of log-scores at a time.

    Gradients reach hidden, sigma, dsigma, weight and the head: a `LinearHead`'s weight, bias and shift, or whatever
    parameters another one uses; these are found by following the gradient of one call with no rows. Such a head is
    called the same number of times for the same B L and N, however many positions can move, the last times without
    rows: ranks which gather its parameters for every call stay in step.

    Under `torch.compile` this function is a break in the graph; the network before it is compiled as usual. A float16
    head with a scaled loss is not for this function: its gradients are made before the scale is known, and underflow.

    Args:
        hidden: (B, L, D) float, what the head takes, for all positions.
        head: a `LinearHead`, or any `Head`: usually a method of the network. It never sees positions that cannot move.
        graph: the forward process.
        x: (B, L) int64, the noised states.
        x0: (B, L) int64, the clean states.
        sigma: (B,) or (B, L) total noise; one a position is handed to the head.
        dsigma: (B,) or (B, L), its derivative by time.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head. Weights (B,) also serve times that were not drawn uniformly.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        positions: (M,) int64, in order: the places in x.flatten() that can move and whose loss counts, from a caller
            that knows them, as whoever noised x on the host does. To find them is to wait for a GPU.
        refuse_nan: whether to raise where a loss is NaN. False returns it: for a caller that counts such sequences, and
            that cannot raise on one of several ranks while the others go on to their next exchange.

    Returns:
        The sum over the batch and its parts, float32, or float64 if hidden or sigma is.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, a weight that is negative
            somewhere or 0 everywhere, a NaN score unless `refuse_nan` is False.
    """
    check_process(graph, None)
    if hidden.ndim != 3 or hidden.shape[:-1] != x.shape:
        raise ValueError(f"hidden must have shape (B, L, D) for x of shape (B, L), got {tuple(hidden.shape)}")
    check_states("x", x, graph.num_states)
    check_states("x0", x0, graph.num_states, x.shape)
    weight = check_clean(x0, graph, weight, given)
    check_kept(x, x0, given)
    check_sigma("sigma", sigma)
    sigma, factor = expand_leading("sigma", sigma, x), expand_leading("dsigma", dsigma, x)
    rates = RatesInto.of(graph, x)
    live = rates.can_move(x, graph.num_states)
    check_possible(x, x0, live, weight)
    if weight is not None:
        factor, live = factor * weight, live & (weight > 0)
    dtype = arithmetic_dtype(hidden, sigma)
    positions = _where(live, positions)
    rows, states, clean, levels, factors = (
        value.flatten(0, 1).index_select(0, positions) for value in (hidden, x, x0, sigma, factor.to(dtype))
    )
    jumps_at = denoising_jumps(graph, rates, states, clean, dtype)
    size = max(1, CHUNK_ELEMENTS // graph.num_states)
    if callable(head):
        how = head, jumps_at, graph.num_states, size, math.ceil(live.numel() / size), refuse_nan
        total, loss = any_head_and_loss(*how, states, rows, levels, factors)
    else:
        check_head(head, graph.num_states, hidden.shape[-1])
        shift = _shift(head, x).to(dtype).flatten().index_select(0, positions)
        if kernel_serves(rows, dtype, levels, shift):
            slopes_of = of_score_entropy(jumps_at, shift, levels, graph.num_states)
            total, loss = kernel_head_and_loss(head.weight, head.bias, slopes_of, rows, factors)
            if refuse_nan:
                check_not_nan(loss, rows)
        else:
            total, loss = linear_head_and_loss(head, jumps_at, size, refuse_nan, rows, shift, levels, factors)
    per_position = loss.new_zeros(live.numel()).index_copy(0, positions, loss)
    return FusedLoss(total, per_position.view(live.shape).sum(-1))


def fused_cross_entropy_loss(
    hidden: Tensor,
    head: LinearHead,
    graph: Graph,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    *,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    positions: Tensor | None = None,
    refuse_nan: bool = True,
) -> FusedLoss:
    """`cross_entropy_loss` from the hidden states on: the same number and gradients, one chunk of logits at a time.

    That is the diffusion loss of a network of the clean token, such as RADD and MDLM, under an absorbing process.
    Gradients reach hidden, the head, dsigma and weight; not sigma.

    Args:
        hidden: (B, L, D) float, what the head takes, for all positions.
        head: weight and bias of the logits of the clean state; its shift does not count.
        graph: the forward process, absorbing.
        x: (B, L) int64, the noised states.
        x0: (B, L) int64, the clean states.
        sigma: (B,) or (B, L) total noise.
        dsigma: (B,) or (B, L), its derivative by time.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, as for `fused_denoising_loss`.
        given: (B, L) bool, positions that stay clean and do not count, as there.
        positions: (M,) int64, the places that count, as there.
        refuse_nan: whether to raise where a loss is NaN.

    Returns:
        The sum over the batch and its parts, float32, or float64 if hidden is.

    Raises:
        ValueError: as `fused_denoising_loss`, and for a process that is not absorbing.
    """
    check_process(graph, None)
    if hidden.ndim != 3 or hidden.shape[:-1] != x.shape:
        raise ValueError(f"hidden must have shape (B, L, D) for x of shape (B, L), got {tuple(hidden.shape)}")
    check_states("x", x, graph.num_states)
    check_states("x0", x0, graph.num_states, x.shape)
    weight = check_clean(x0, graph, weight, given)
    check_kept(x, x0, given)
    check_sigma("sigma", sigma)
    check_head(head, graph.num_states, hidden.shape[-1])
    sigma, factor = expand_leading("sigma", sigma, x), expand_leading("dsigma", dsigma, x)
    live = can_move(graph.rates_into(x), x, graph.num_states)
    check_possible(x, x0, live, weight)
    if weight is not None:
        factor, live = factor * weight, live & (weight > 0)
    dtype = arithmetic_dtype(hidden)
    positions = _where(live, positions)
    rows, states, clean, levels, factors = (
        value.flatten(0, 1).index_select(0, positions) for value in (hidden, x, x0, sigma.detach(), factor)
    )
    factors = (factors * rate_back(graph, states, clean, levels)).to(dtype)
    slopes_of = of_cross_entropy(states, clean, graph.num_states, kernel=kernel_serves(rows, dtype))
    total, loss = kernel_head_and_loss(head.weight, head.bias, slopes_of, rows, factors)
    if refuse_nan:
        check_not_nan(loss, rows)
    per_position = loss.new_zeros(live.numel()).index_copy(0, positions, loss)
    return FusedLoss(total, per_position.view(live.shape).sum(-1))


def _where(live: Tensor, positions: Tensor | None) -> Tensor:
    """The places (M,) in live.flatten() where it holds: those given, if they are these, or else found."""
    if positions is None:
        return live.flatten().nonzero()[:, 0]  # the one time that a GPU is waited for
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(f"positions must be (M,) int64, got {positions.dtype} of shape {tuple(positions.shape)}")
    right = live.flatten().index_select(0, positions).all() & (live.sum() == len(positions))
    right = right & (positions.diff() > 0).all()
    require(
        right,
        "positions must be all places of x.flatten() that can move and count, in order",
        lambda: f"got {len(positions)}, and there are {int(live.sum())}",
    )
    return positions


def _shift(head: LinearHead, x: Tensor) -> Tensor:
    """A linear head's shift of each row, of x's shape; 0 where it has none."""
    if head.shift is None:
        return torch.zeros(x.shape, device=x.device)
    return expand_leading("head.shift", head.shift, x)

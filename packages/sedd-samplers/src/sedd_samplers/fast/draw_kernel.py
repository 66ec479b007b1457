"""Draws of the next state from log-scores as they are, on a GPU: two Triton kernels and no tensor of the rows' size.

A step leaves a position where it is or moves it by the law

    p(y) = w_y s_y    for y != x,      p(x) = stay(R),     R = sum_{y != x} w_y s_y,     s_y = exp(log_score_y + shift)

with w constant but at a few listed states: D Q[x, y] for Euler's and tau-leaping's steps on any graph, and for
Tweedie's under one mask e^(D Q[x, y]) - 1. Nothing of size (M, N) is made of it, and the log-scores are read once:

    1. one kernel sums s over blocks of 2048 states, the listed ones left out, in float32;
    2. x itself, the listed states and the blocks, in this order, form a cumulative sum in float64, a few dozen numbers
       a row, in which one float64 uniform number picks an entry, and a place in it;
    3. where a block was picked, a second kernel reads that block again and finds the state at that place, in float64.

So every probability is met to the float32 rounding of a sum of 2048 numbers, however small it is; within a block, to
that of its own exponential. A state of probability 0 is never drawn.

Importing this module takes triton, which comes with torch's CUDA builds. With TRITON_INTERPRET=1 in the environment
before triton's first import the same code runs, slowly, on CPU tensors.
"""

# Triton has no types: what its decorator makes of a function is unknown.
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, disallow-any-unimported=False

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interfaces import Row

__all__ = ["Drawn", "draw_moves"]

BLOCK = 2048
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Drawn(NamedTuple):
    """States and whether they mean anything."""

    state: Tensor
    """(M,) int64; x where the total is none."""
    total: Tensor
    """(M,) float64, the sum of the row's law: a caller must refuse one that is not finite and positive."""


def draw_moves(
    log_score: Tensor,
    x: Tensor,
    weight: Row,
    stay: Callable[[Tensor], Tensor],
    uniform: Tensor,
    *,
    shift: Tensor | None = None,
    pick: Tensor | None = None,
) -> Drawn:
    """One state a row from the law above, exact for the given uniform number.

    Args:
        log_score: (R, N) bfloat16, float16 or float32, last axis contiguous; not modified.
        x: (M,) int64, the states now; their log-score and their weight are ignored.
        weight: M rows of w >= 0, constant but at a few states.
        stay: R (M,) float64 -> the mass of x, (M,) float64 >= 0.
        uniform: (M,) float64 in [0, 1): the only source of randomness.
        shift: (M,) float, what is added to a row's log-scores; None for 0.
        pick: (M,) int64, which rows of log_score; None for all of them, R = M.

    Raises:
        ValueError: a dtype or a layout that the kernels do not take. Nothing is read back from the device: whether a
            row has anything to draw is for the caller to see in `total`.
    """
    if log_score.dtype not in DTYPES:
        raise ValueError(f"the kernels take bfloat16, float16 and float32 log-scores, got {log_score.dtype}")
    if log_score.ndim != 2 or log_score.stride(-1) != 1:
        got = f"{tuple(log_score.shape)} with strides {log_score.stride()}"
        raise ValueError(f"log_score must be (R, N) with contiguous rows, got {got}")
    if not len(x):
        return Drawn(x, torch.empty(0, dtype=torch.float64, device=x.device))
    pick = torch.arange(len(x), device=x.device) if pick is None else pick.contiguous()
    shift = torch.zeros(len(x), device=x.device) if shift is None else shift.float().contiguous()
    listed = torch.cat([x[:, None], weight.index], 1)
    blocks = _sums_of_blocks(log_score, pick, shift, listed)
    score = (log_score[pick[:, None], weight.index].double() + shift.double()[:, None]).exp()
    moves = _weighted(weight.value.double().masked_fill(weight.index == x[:, None], 0), score)
    moves = torch.cat([moves, _weighted(weight.base.double()[:, None], blocks.double())], 1)
    cumulative = torch.cat([stay(moves.sum(-1))[:, None], moves], 1).cumsum(-1)
    entry, place = _find(cumulative, uniform)
    block = (entry - listed.shape[1]).clamp_min(0)
    inside = _states_in_blocks(log_score, pick, shift, listed, block, place)
    state = torch.where(
        entry < listed.shape[1], listed.gather(1, entry.clamp_max(listed.shape[1] - 1)[:, None])[:, 0], inside
    )
    total = cumulative[:, -1]
    return Drawn(torch.where(total.isfinite() & (total > 0), state, x), total)


def _weighted(weight: Tensor, score: Tensor) -> Tensor:
    """Weight * score, and 0 where the weight is 0 even if the score has overflowed."""
    return torch.where(weight > 0, weight * score, 0.0)


def _find(cumulative: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The entry (M,) whose share of the whole holds `uniform` (M,), and where in that share it lies, in [0, 1]."""
    total = cumulative[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # the first cumulative sum *above* the target ends in an entry of positive mass
    entry = torch.searchsorted(cumulative, target[:, None], right=True).clamp_max(cumulative.shape[1] - 1)
    above = cumulative.gather(1, entry)[:, 0]
    below = torch.where(entry > 0, cumulative.gather(1, (entry - 1).clamp_min(0)), 0.0)[:, 0]
    return entry[:, 0], (target - below) / (above - below)


def _sums_of_blocks(log_score: Tensor, pick: Tensor, shift: Tensor, listed: Tensor) -> Tensor:
    """Sums of s over blocks of states, without those at `listed` (M, K): (M, ceil(N / 2048)) float32."""
    num_states = log_score.shape[1]
    out = torch.empty(len(pick), triton.cdiv(num_states, BLOCK), dtype=torch.float32, device=log_score.device)
    sizes = log_score.stride(0), num_states, listed.shape[1]
    _sum_of_block[out.shape](log_score, pick, shift, listed.contiguous(), out, *sizes, BLOCK=BLOCK, num_warps=4)
    return out


def _states_in_blocks(
    log_score: Tensor, pick: Tensor, shift: Tensor, listed: Tensor, block: Tensor, place: Tensor
) -> Tensor:
    """The state (M,) at the place (M,) in [0, 1] of each row's block (M,); -1 where the block is empty."""
    state = torch.empty_like(block)
    sizes = log_score.stride(0), log_score.shape[1], listed.shape[1]
    _state_in_block[(len(block),)](
        log_score, pick, shift, listed.contiguous(), block, place, state, *sizes, BLOCK=BLOCK, num_warps=4
    )
    return state


@triton.jit
def _scores(
    log_score: tl.tensor,
    listed: tl.tensor,
    source: tl.tensor,
    row: tl.tensor,
    shift: tl.tensor,
    column: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
) -> tl.tensor:
    """exp(log_score + shift) of one block of a row, 0 at the listed states and beyond the last."""
    value = tl.load(log_score + source * stride + column, mask=column < num_states, other=float("-inf")).to(tl.float32)
    score = tl.exp(value + shift)
    for k in range(0, count):
        score = tl.where(column == tl.load(listed + row * count + k), 0.0, score)
    return score


@triton.jit
def _sum_of_block(
    log_score: tl.tensor,
    pick: tl.tensor,
    shift: tl.tensor,
    listed: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    source, row_shift = tl.load(pick + row), tl.load(shift + row)
    score = _scores(log_score, listed, source, row, row_shift, column, stride, num_states, count)
    tl.store(out + row * tl.num_programs(1) + block, tl.sum(score))


@triton.jit
def _state_in_block(
    log_score: tl.tensor,
    pick: tl.tensor,
    shift: tl.tensor,
    listed: tl.tensor,
    block: tl.tensor,
    place: tl.tensor,
    state: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(block + row) * BLOCK + tl.arange(0, BLOCK)
    source, row_shift = tl.load(pick + row), tl.load(shift + row)
    score = _scores(log_score, listed, source, row, row_shift, column, stride, num_states, count).to(tl.float64)
    cumulative = tl.cumsum(score)
    target = tl.load(place + row) * tl.sum(score)
    # the partial sums are rounded each on its own: what decides is that the state has a probability at all
    first = tl.min(tl.where((score > 0) & (cumulative > target), column, 1 << 62))
    last = tl.max(tl.where(score > 0, column, -1))
    tl.store(state + row, tl.minimum(first, last))

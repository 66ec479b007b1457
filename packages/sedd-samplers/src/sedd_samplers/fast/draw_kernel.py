"""Draws of the next state from log-scores as they are, on a GPU: two Triton kernels and no tensor of the rows' size.

A step leaves a position where it is or moves it by the law

    p(y) = w_y s_y    for y != x,      p(x) = stay(R),     R = sum_{y != x} w_y s_y,     s_y = exp(log_score_y + shift)

with w constant but at a few listed states: D Q[x, y] for Euler's and tau-leaping's steps on any graph, and for
Tweedie's under one mask e^(D Q[x, y]) - 1. Nothing of size (M, N) is made of it, and the log-scores are read once:

    1. one kernel sums w_y s_y over blocks of 2048 states, x left out, in float32;
    2. a second one forms of the blocks, and of stay(R) in that of x, a cumulative sum in float64, a few dozen numbers a
       row, in which one float64 uniform number picks a block and a place in it; it reads that block again and finds the
       state at that place, in float64.

So every probability is met to the float32 rounding of a sum of 2048 numbers, however small it is; within a block, to
that of its own exponential. A state of probability 0 is never drawn, and the states stand in their order, so that a
number leads to the state that `draw_by_blocks` finds, but where the two round apart.

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
    """(M,) float64, the sum of the row's law."""
    right: Tensor
    """(M,) bool, whether that is finite and positive: a caller must refuse others."""


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
    total = torch.empty(len(x), dtype=torch.float64, device=x.device)
    right = torch.empty(len(x), dtype=torch.bool, device=x.device)
    if not len(x):
        return Drawn(x, total, right)
    shift = torch.zeros(len(x), device=x.device) if shift is None else shift
    law = [shift.float(), x, weight.base.float(), weight.index, weight.value.float()]
    rows = pick if pick is None else pick.contiguous()
    law = [part.contiguous() for part in law]
    sizes = log_score.stride(0), log_score.shape[1], weight.index.shape[-1]
    sums = torch.empty(len(x), triton.cdiv(log_score.shape[1], BLOCK), dtype=torch.float32, device=x.device)
    how = {"BLOCK": BLOCK, "num_warps": 4}
    with torch.cuda.device_of(log_score):  # a kernel is launched on the current device
        _sum_of_block[sums.shape](log_score, rows, *law, sums, *sizes, **how)
    own, state = stay(sums.sum(-1, dtype=torch.float64)), torch.empty_like(law[1])
    with torch.cuda.device_of(log_score):
        blocks = triton.next_power_of_2(sums.shape[1])
        drawn = state, total, right
        _state[(len(x),)](
            *(log_score, rows, *law, sums, own.contiguous(), uniform.contiguous(), *drawn, *sizes, sums.shape[1]),
            BLOCKS=max(2, blocks),
            **how,
        )
    return Drawn(state, total, right)


@triton.jit
def _masses(
    log_score: tl.tensor,
    pick: tl.tensor,
    shift: tl.tensor,
    x: tl.tensor,
    base: tl.tensor,
    index: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """w_y s_y of one block of a row, float32; 0 at x and beyond the last state."""
    there = column < num_states
    place = row if pick is None else tl.load(pick + row)
    logit = tl.load(log_score + place * stride + column, mask=there, other=0.0).to(tl.float32)
    weight = tl.zeros([BLOCK], tl.float32) + tl.load(base + row)
    for k in range(0, count):
        here = column == tl.load(index + row * count + k)
        weight = tl.where(here, tl.load(value + row * count + k), weight)
    weight = tl.where(there & (column != tl.load(x + row)), weight, 0.0)
    # 0 times an overflowed score is no number
    return tl.where(weight > 0, weight * tl.exp(logit + tl.load(shift + row)), 0.0)


@triton.jit
def _sum_of_block(
    log_score: tl.tensor,
    pick: tl.tensor,
    shift: tl.tensor,
    x: tl.tensor,
    base: tl.tensor,
    index: tl.tensor,
    value: tl.tensor,
    sums: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    mass = _masses(log_score, pick, shift, x, base, index, value, row, column, stride, num_states, count, BLOCK)
    tl.store(sums + row * tl.num_programs(1) + block, tl.sum(mass))


@triton.jit
def _state(
    log_score: tl.tensor,
    pick: tl.tensor,
    shift: tl.tensor,
    x: tl.tensor,
    base: tl.tensor,
    index: tl.tensor,
    value: tl.tensor,
    sums: tl.tensor,
    own: tl.tensor,
    uniform: tl.tensor,
    state: tl.tensor,
    total: tl.tensor,
    right: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    count: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    here, staying = tl.load(x + row), tl.load(own + row).to(tl.float64)
    number = tl.arange(0, BLOCKS)
    block_mass = tl.load(sums + row * num_blocks + number, mask=number < num_blocks, other=0.0).to(tl.float64)
    block_mass += tl.where(number == here // BLOCK, staying, 0.0)
    whole = tl.sum(block_mass)
    target = tl.load(uniform + row) * whole
    block = tl.maximum(_reached(block_mass, number, target), 0)
    within = target - tl.sum(tl.where(number < block, block_mass, 0.0))
    share = within / tl.sum(tl.where(number == block, block_mass, 0.0))
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mass = _masses(log_score, pick, shift, x, base, index, value, row, column, stride, num_states, count, BLOCK).to(
        tl.float64
    )
    mass = tl.where(column == here, staying, mass)
    found = _reached(mass, column, share * tl.sum(mass))
    possible = (whole > 0) & (whole < float("inf"))
    tl.store(state + row, tl.where(possible, found, here))
    tl.store(total + row, whole)
    tl.store(right + row, possible)


@triton.jit
def _reached(mass: tl.tensor, name: tl.tensor, target: tl.tensor) -> tl.tensor:
    """The name of the first entry of positive mass whose cumulative sum is above the target, or of the last one."""
    # partial sums are rounded each on its own: what decides is that an entry has a mass at all
    first = tl.min(tl.where((mass > 0) & (tl.cumsum(mass) > target), name, 2147483647))
    return tl.minimum(first, tl.max(tl.where(mass > 0, name, -1)))

"""Score entropy and cross-entropy in one pass over the logits of a chunk, for GPUs: Triton kernels.

Score entropy has no normaliser, so each entry's share of the loss and of the gradient depends on that entry alone,

    log s_y = logit_y + shift,     d_y = log s_y - log r_y
    loss    = sum_y w_y D(s_y, r_y),     d loss / d logit_y = w_y (s_y - r_y)
    D(s, r) = r phi(d),  s - r = r (d + phi(d))    near s = r,  phi(d) = e^d - 1 - d by its series
            = s - r - r d                          elsewhere;  s where r = 0

(eq. 5 as a Bregman divergence, see `divergence.py`). One program a row reads each logit once, adds to the row's float32
sum and writes the slope over the logit: two bytes read and two written an entry in bfloat16. Weights and
ratios are `Jumps`: constants of the row but at listed states, which take the constants' place in the block of columns
that holds them. Nothing is subtracted from a sum.

d needs more than float32: near the optimum it is the difference of two numbers of the size of log r. shift - log r is
worked out in float64, once for each row and listed state, and handed over in two parts, so that d keeps its digits.

A softmax has a normaliser: its kernel reads a row twice, for the maximum and the sum, then for the slope,

    loss = log sum_{y != x} exp(logit_y) - logit_{x0},     d loss / d logit_y = softmax_y - [y = x0].

Importing this module takes triton, which comes with torch's CUDA builds. With TRITON_INTERPRET=1 in the environment
before triton's first import the same code runs, slowly, on CPU tensors.
"""

# Triton has no types: what its decorator makes of a function is unknown.
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, disallow-any-unimported=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jumps import Jumps

__all__ = ["cross_entropy_slopes_", "score_entropy_slopes_"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 2048
"""Columns at a time: 16 bytes of bfloat16 for each of 256 threads, who keep all they need of them in registers."""
NEVER = tl.constexpr(1 << 62)
"""No column: where the list of states ends."""


def score_entropy_slopes_(
    logits: Tensor, shift: Tensor, jumps: Jumps, factor: Tensor, num_states: int, *, dense: bool = False
) -> Tensor:
    """Score entropy of each row, its slopes written over the logits.

    Args:
        logits: (m, W) bfloat16, float16 or float32 with W >= N, last axis contiguous: log s_y = logit_y + shift.
            Overwritten by factor w_y (s_y - r_y), and by 0 in the columns from N on.
        shift: (m,) float, the row's.
        jumps: the weights and ratios of the m rows, `index` ascending in each row, as `merge` leaves it; without a
            gradient. The ratios may be float64.
        factor: (m,) float, of each row's slopes.
        num_states: N.
        dense: whether every row of `index` is 0 .. N - 1, as for a dense graph. It saves time, no more.

    Returns:
        (m,) float32 sums, not multiplied by the factor.

    Raises:
        ValueError: a dtype or a layout that the kernel does not take.
    """
    _check_rows(logits, num_states)
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if not len(logits):
        return loss
    count = jumps.index.shape[-1]
    shift = shift.double()
    scalars = _contiguous(shift.float(), factor.float())
    listed = _contiguous(jumps.weight.float(), *_levels(jumps.ratio, shift[:, None]))
    sizes = logits.stride(0), num_states, logits.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(logits.shape[-1]))
    base = _contiguous(jumps.base_weight.float(), *_levels(jumps.base_ratio, shift))
    room = torch.empty_like(listed[0])
    with torch.cuda.device_of(logits):  # a kernel is launched on the current device
        if dense:
            _dense_score_entropy[(len(logits),)](logits, loss, *scalars, *listed, *sizes, BLOCK=block, num_warps=8)
        else:
            _score_entropy[(len(logits),)](
                *(logits, loss, room, *scalars, *base, *_contiguous(jumps.index), *listed, *sizes, count),
                BLOCK=block,
                LIST=max(2, min(128, triton.next_power_of_2(max(1, count)))),
                num_warps=8,
            )
    return loss


def cross_entropy_slopes_(logits: Tensor, x: Tensor, x0: Tensor, factor: Tensor, num_states: int) -> Tensor:
    """-log p(x0) of each row, normalised over all states but x; its slopes written over the logits.

    Args:
        logits: (m, W) bfloat16, float16 or float32 with W >= N, last axis contiguous. Overwritten by factor times the
            slope, which is 0 at x and in the columns from N on.
        x: (m,) int64, the state that the row is of and that cannot be the clean one.
        x0: (m,) int64, the clean states.
        factor: (m,) float, of each row's slopes.
        num_states: N.

    Returns:
        (m,) float32, not multiplied by the factor.

    Raises:
        ValueError: a dtype or a layout that the kernel does not take.
    """
    _check_rows(logits, num_states)
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if not len(logits):
        return loss
    with torch.cuda.device_of(logits):  # a kernel is launched on the current device
        _cross_entropy[(len(logits),)](
            *(logits, loss, *_contiguous(x, x0, factor.float())),
            *(logits.stride(0), num_states, logits.shape[-1]),
            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[-1])),
            num_warps=8,
        )
    return loss


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _check_rows(logits: Tensor, num_states: int) -> None:
    if logits.dtype not in DTYPES:
        raise ValueError(f"the kernel takes bfloat16, float16 and float32 logits, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[-1] < num_states or logits.stride(-1) != 1:
        got = f"{tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"logits must be (m, W >= N = {num_states}) with contiguous rows, got {got}")


def _levels(ratio: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel needs of ratios: r in float32, 0 below its normal range, and shift - log r in two parts."""
    wide = ratio.double()
    positive = wide >= torch.finfo(torch.float32).tiny
    exact = shift - torch.where(positive, wide, 1.0).log()
    high = exact.float()
    return torch.where(positive, wide, 0.0).float(), high, (exact - high).float()


@triton.jit
def _divergence(logit: tl.tensor, shift: tl.tensor, ratio: tl.tensor, high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """D(s, r) and s - r at log s = logit + shift, with high + low = shift - log r; float32."""
    d = (logit + high) + low
    far = d >= 80  # e^d may overflow although s does not
    # r e^d is more precise than e^(log s), as d is the smaller number; high + low = shift where r = 0
    score = tl.where(far | (ratio == 0), 1.0, ratio) * tl.exp(tl.where(far, logit + shift, d))
    near = (tl.abs(d) < 0.5) & (ratio > 0)
    series = 1 + d * (1.0 / 8)
    series = 1 + d * (1.0 / 7) * series
    series = 1 + d * (1.0 / 6) * series
    series = 1 + d * (1.0 / 5) * series
    series = 1 + d * (1.0 / 4) * series
    series = 1 + d * (1.0 / 3) * series
    phi = 0.5 * d * d * series
    slope = tl.where(near, ratio * (d + phi), score - ratio)
    value = tl.where(near, ratio * phi, slope - tl.where(ratio > 0, ratio * d, 0.0))
    return value, slope


@triton.jit
def _score_entropy(
    logits: tl.tensor,
    loss: tl.tensor,
    room: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    base_weight: tl.tensor,
    base_ratio: tl.tensor,
    base_high: tl.tensor,
    base_low: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    ratio: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_logits, row_list = logits + row * stride, row * count
    row_shift, row_factor = tl.load(shift + row), tl.load(factor + row)
    w0, r0 = tl.load(base_weight + row), tl.load(base_ratio + row)
    high0, low0 = tl.load(base_high + row), tl.load(base_low + row)
    of_listed = tl.zeros([LIST], tl.float32)
    for first in range(0, count, LIST):  # the listed states, before anything is written over their logits
        k = first + tl.arange(0, LIST)
        there = k < count
        state = tl.load(index + row_list + k, mask=there, other=0)
        logit = tl.load(row_logits + state, mask=there, other=0.0).to(tl.float32)
        w = tl.load(weight + row_list + k, mask=there, other=0.0)
        r = tl.load(ratio + row_list + k, mask=there, other=0.0)
        upper = tl.load(high + row_list + k, mask=there, other=0.0)
        value, slope = _divergence(logit, row_shift, r, upper, tl.load(low + row_list + k, mask=there, other=0.0))
        of_listed += tl.where(w > 0, w * value, 0.0)
        tl.store(room + row_list + k, tl.where(w > 0, w * row_factor * slope, 0.0), mask=there)
    tl.debug_barrier()  # `room` is read by other threads than wrote it
    total = tl.zeros([BLOCK], tl.float32)
    k, last, carried = 0, -1, 0.0
    at = tl.load(index + row_list, mask=count > 0, other=NEVER)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there, inside = column < width, column < num_states
        value, slope = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if w0 > 0:
            logit = tl.load(row_logits + column, mask=there, other=0.0).to(tl.float32)
            if r0 > 0:
                value, slope = _divergence(logit, row_shift, tl.zeros([BLOCK], tl.float32) + r0, high0, low0)
            else:
                slope = tl.exp(logit + row_shift)
                value = slope
            value = tl.where(inside, w0 * value, 0.0)
            slope = tl.where(inside, w0 * row_factor * slope, 0.0)
        while at < start + BLOCK:
            # a state that is listed twice has a slope once at most
            carried = tl.load(room + row_list + k) + tl.where(at == last, carried, 0.0)
            here = column == at
            value = tl.where(here, 0.0, value)
            slope = tl.where(here, carried, slope)
            last = at.to(tl.int32)
            k += 1
            at = tl.load(index + row_list + k, mask=k < count, other=NEVER)
        total += value
        tl.store(row_logits + column, slope.to(logits.dtype.element_ty), mask=there)
    tl.store(loss + row, tl.sum(total) + tl.sum(of_listed))


@triton.jit
def _dense_score_entropy(
    logits: tl.tensor,
    loss: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    weight: tl.tensor,
    ratio: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    row_shift, row_factor = tl.load(shift + row), tl.load(factor + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there, inside = column < width, column < num_states
        place = row * num_states + column
        logit = tl.load(row_logits + column, mask=there, other=0.0).to(tl.float32)
        w = tl.load(weight + place, mask=inside, other=0.0)
        r = tl.load(ratio + place, mask=inside, other=0.0)
        upper = tl.load(high + place, mask=inside, other=0.0)
        value, slope = _divergence(logit, row_shift, r, upper, tl.load(low + place, mask=inside, other=0.0))
        total += tl.where(w > 0, w * value, 0.0)
        slope = tl.where(w > 0, w * row_factor * slope, 0.0)
        tl.store(row_logits + column, slope.to(logits.dtype.element_ty), mask=there)
    tl.store(loss + row, tl.sum(total))


@triton.jit
def _cross_entropy(
    logits: tl.tensor,
    loss: tl.tensor,
    x: tl.tensor,
    x0: tl.tensor,
    factor: tl.tensor,
    stride: tl.tensor,
    num_states: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    own, clean, row_factor = tl.load(x + row), tl.load(x0 + row), tl.load(factor + row)
    target = tl.load(row_logits + clean).to(tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_states, BLOCK):
        column = start + tl.arange(0, BLOCK)
        counts = (column < num_states) & (column != own)
        logit = tl.load(row_logits + column, mask=column < width, other=0.0).to(tl.float32)
        logit = tl.where(counts, logit, float("-inf"))
        # each lane has its own maximum; a lane that has seen only -inf must not subtract it from itself
        greater = tl.where(logit > largest, logit, largest)
        origin = tl.where(greater == float("-inf"), 0.0, greater)
        total = total * tl.exp(largest - origin) + tl.exp(logit - origin)
        largest = greater
    peak = tl.max(largest)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(largest - peak)))
    tl.store(loss + row, log_sum - target)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        counts = (column < num_states) & (column != own)
        logit = tl.load(row_logits + column, mask=column < width, other=0.0).to(tl.float32)
        logit = tl.where(counts, logit, float("-inf"))
        slope = tl.exp(logit - log_sum) - tl.where(column == clean, 1.0, 0.0)
        slope = tl.where(counts, row_factor * slope, 0.0)
        tl.store(row_logits + column, slope.to(logits.dtype.element_ty), mask=column < width)

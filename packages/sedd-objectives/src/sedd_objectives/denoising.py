"""Denoising score entropy (DSE) and the diffusion-weighted one (DWDSE), the training loss.

    DSE(x, x0)  = sum_{y != x} Q[x, y] ( s_y - r_y log s_y + K(r_y) ),   r_y = p(y|x0) / p(x|x0)            (eq. 7)
    DWDSE(x0)   = integral over t of dsigma(t) E_{x_t} sum over positions of DSE(x_t, x0)                   (eq. 10)

The sum is `score_entropy.plain_score_entropy` with the weights Q[x, .] and the ratios of the transitions; here it is
`fast.score_entropy_rows`, the same number. The constant K, which (7) leaves out, makes the loss 0 at its minimum for a
given x0 and DWDSE a likelihood bound.
Positions into which no jump leads, such as the unmasked ones of an absorbing process, have loss 0 whatever the score;
they are recognised from the graph's rows and never reach the network's head.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_possible, noised, score_rows, spread
from .checks import (
    arithmetic_dtype,
    check_not_nan,
    check_sigma,
    check_states,
    expand_leading,
    sum_dtype,
)
from .interfaces import Graph, Noise, ScoreModel
from .jumps import Jumps, RatesInto, can_move, merge
from .score_entropy import constant

__all__ = [
    "denoising_score_entropy",
    "denoising_score_entropy_without_constant",
    "score_entropy_constant",
    "denoising_loss",
    "denoising_jumps",
]


def denoising_score_entropy(log_score: Tensor, graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Score entropy against the ratios p(y|x0) / p(x|x0), eq. 7 with the constant K, per unit of total noise.

    Args:
        log_score: (..., N) float; the entry at x is ignored.
        graph: the forward process.
        x: (...) int64, the noised states.
        x0: (...) int64, the clean states.
        sigma: total noise, of a shape that is a leading part of x's.

    Returns:
        (...) nats a position, to be multiplied by dsigma; 0 where no jump leads into x.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, a NaN score, or an x that cannot have
            come from its x0.
    """
    num_states = graph.num_states
    if log_score.shape != (*x.shape, num_states):
        raise ValueError(f"log_score must have shape {(*x.shape, num_states)}, x's and N, got {tuple(log_score.shape)}")
    check_states("x", x, num_states)
    check_states("x0", x0, num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma = expand_leading("sigma", sigma, x)
    rates = RatesInto.of(graph, x)
    live = rates.can_move(x, num_states)
    check_possible(x, x0, live)
    positions = None if bool(live.all()) else live.flatten().nonzero()[:, 0]
    dtype = arithmetic_dtype(log_score, sigma)
    jumps_at = denoising_jumps(graph, rates, x[live], x0[live], dtype)
    rows, levels = log_score.reshape(-1, num_states), sigma[live].to(sum_dtype(x.device))
    loss = fast.score_entropy_rows(rows, positions, jumps_at, levels, dtype=dtype)
    check_not_nan(loss, log_score)
    return spread(loss, live)


def denoising_score_entropy_without_constant(
    log_score: Tensor, graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor
) -> Tensor:
    """Eq. 7 as printed, per unit of total noise: `denoising_score_entropy` less `score_entropy_constant`.

    Arguments and errors are those of `denoising_score_entropy`, and so is the gradient.

    Returns:
        (...) nats a position, of either sign.
    """
    loss = denoising_score_entropy(log_score, graph, x, x0, sigma)
    return loss - score_entropy_constant(graph, x, x0, sigma).to(loss.dtype)


def score_entropy_constant(graph: Graph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """sum_{y != x} Q[x, y] K(r_y), r_y = p(y|x0) / p(x|x0): what eq. 7 leaves out, per unit of total noise.

    Args:
        graph: the forward process.
        x: (...) int64, the noised states.
        x0: (...) int64, the clean states.
        sigma: total noise, of a shape that is a leading part of x's.

    Returns:
        (...) nats a position, float32 or float64 if the graph's ratios are; 0 where no jump leads into x.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, or an x that cannot have come from x0.
    """
    check_states("x", x, graph.num_states)
    check_states("x0", x0, graph.num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma = expand_leading("sigma", sigma, x)
    live = can_move(graph.rates_into(x), x, graph.num_states)
    check_possible(x, x0, live)
    x, x0, sigma = x[live], x0[live], sigma[live]
    with torch.autocast(x.device.type, enabled=False):
        ratio = graph.ratio(x, x0, sigma)
        dtype = torch.float64 if ratio.value.dtype == torch.float64 else torch.float32
        jumps = merge(graph.rates_into(x), ratio, x, dtype)
        distinct = 1 + (jumps.index[:, 1:] != jumps.index[:, :-1]).sum(-1)
        base_ratio, listed = (  # a ratio that does not count may be infinite, and 0 times it no number
            torch.where(weight > 0, ratio, 1)
            for weight, ratio in ((jumps.base_weight, jumps.base_ratio), (jumps.weight, jumps.ratio))
        )
        base = jumps.base_weight * (graph.num_states - distinct) * constant(base_ratio)
        total = base + (jumps.weight * constant(listed)).sum(-1)
    if not bool(total.isfinite().all()):
        count = int((~total.isfinite()).sum())
        raise ValueError(f"x cannot have come from its x0 at this sigma, or sigma is 0, at {count} positions")
    return spread(total, live)


def denoising_loss(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    refuse_nan: bool = True,
) -> Tensor:
    """The integrand at time t of DWDSE, the diffusion loss of eq. 10, summed over positions, in nats a sequence.

    Its mean over t ~ U[t_min, 1] times (1 - t_min) is the integral.

    Args:
        score: the score model; called exactly once, even if no position can move, so that all ranks of a distributed
            run issue the same collective calls. Its `where` is used if it has one.
        graph: the forward process.
        noise: the schedule t -> (sigma, dsigma).
        x0: (B, L) int64, clean sequences.
        t: (B,) float times, or (B, L) for a time per position; stratified over [t_min, 1) if None.
        xt: (B, L) int64, states already noised; drawn from the forward process if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for the times and the noising.
        t_min: the smallest time drawn.
        refuse_nan: whether to raise where a loss is NaN. False returns it, for a caller that counts such sequences.

    Returns:
        (B,) float32, or float64 if the score or t is.

    Raises:
        ValueError: as `denoising_score_entropy`, NaN excepted unless `refuse_nan`; a weight that is negative somewhere
            or 0 everywhere; masks or given positions of x0 that are not clean; an empty batch.
    """
    weight = check_clean(x0, graph, weight, given, noise)
    drawn = xt is None
    xt, sigma, per_position, dsigma = noised(graph, noise, x0, t, xt, given=given, generator=generator, t_min=t_min)
    rates = RatesInto.of(graph, xt)
    live = rates.can_move(xt, graph.num_states)
    if not drawn:
        check_possible(xt, x0, live, weight)
    if weight is not None:
        live = live & (weight > 0)
    log_score, positions = score_rows(score, xt, sigma, live, graph.num_states)
    dtype = arithmetic_dtype(log_score, per_position)
    jumps_at = denoising_jumps(graph, rates, xt[live], x0[live], dtype)
    rows, levels = log_score.reshape(-1, graph.num_states), per_position[live].to(sum_dtype(x0.device))
    loss = fast.score_entropy_rows(rows, positions, jumps_at, levels, dtype=dtype)
    if refuse_nan:
        check_not_nan(loss, log_score)
    factor = dsigma if weight is None else dsigma * weight
    return spread(loss * factor[live].to(loss.dtype), live).sum(-1)


def denoising_jumps(graph: Graph, rates: RatesInto, x: Tensor, x0: Tensor, dtype: torch.dtype) -> fast.JumpsAt:
    """(part, sigma (m,)) -> the jumps into x[part] with the ratios given x0[part], of the positions x, x0 (M,).

    The ratios are as precise as sigma: near the optimum the loss is r d^2 / 2 with d = log s - log r, and what rounds r
    is an error in d itself.
    """

    def jumps_at(part: slice, sigma: Tensor) -> Jumps:
        states = x[part]
        return merge(rates.at(states), graph.ratio(states, x0[part], sigma), states, dtype, graph.num_states)

    return jumps_at

"""Implicit score entropy: the score entropy without any ratio, from samples of p_t alone.

    ISE = E_{x ~ p_t} sum_{y != x} ( Q[x, y] s(x)_y - Q[y, x] log s(y)_x )                       (eq. 6)

y runs over the sequences that differ from x at one position. In the score entropy's E_x Q[x, y] p(y)/p(x) log s(x)_y
the density of x cancels; what is left is an expectation over y, and exchanging the two names gives the second term. So
ISE is the score entropy up to a constant, E ISE = E SE - E sum Q[x, y] K(p(y)/p(x)); likewise for the denoising one.

Positions are exchanged one by one, so that ISE is a sum over them. Where some are given it is summed over the others,
whose p_t is that of the process in which the given ones never move.

The price is the score at the neighbours of x. Enumerated, these are as many as there are jumps out of x; the Monte
Carlo form draws one of them, y with probability Q[y, x] / R where R = sum_{y != x} Q[y, x], and counts it R times.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import fast
from .batch import counted, score_rows, spread
from .checks import (
    arithmetic_dtype,
    check_given,
    check_not_nan,
    check_sigma,
    check_states,
    check_weight,
    expand_leading,
    require,
    sum_dtype,
)
from .interfaces import ImplicitGraph, ScoreModel
from .jumps import DenseRow, can_move, dense, merge

__all__ = ["implicit_score_entropy_loss", "enumerated_implicit_score_entropy_loss", "total_rate_out"]


def implicit_score_entropy_loss(
    score: ScoreModel,
    graph: ImplicitGraph,
    x: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """An unbiased estimate of eq. 6 from one neighbour a sequence, to be multiplied by dsigma.

    Args:
        score: the score model; called exactly twice, at x and at one neighbour of each sequence.
        graph: the forward process.
        x: (B, L) int64, drawn from p_t: noised data.
        sigma: (B,) or (B, L) total noise at which the score is asked, >= 0.
        weight: (B,) or (B, L) factor >= 0 of each position's terms, bool or float; 0 for padding, which then neither
            jumps nor reaches the head.
        given: (B, L) bool, positions that are clean in x, are seen by the model and do not count: the loss is that of
            the others given them.
        generator: for the neighbours.

    Returns:
        (B,) nats a sequence per unit of total noise, of either sign; float32, or float64 if the score is.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, a NaN score, a weight that is negative
            somewhere or 0 everywhere, a given mask.
    """
    factor = _check(graph, x, sigma, weight, given)
    scores = _reverse_rates(score, graph, x, sigma, factor)
    rates = factor * total_rate_out(graph, x)
    total = rates.sum(-1)
    position = _draw(rates, generator)[:, None]
    states = x.gather(-1, position)
    jump_rates = _dense_rates_out(graph, states[:, 0])
    jumped = _draw(jump_rates, generator)[:, None]
    moves = total > 0
    neighbour = x.scatter(-1, position, torch.where(moves[:, None], jumped, states))
    log_score = _log_scores_back(score, neighbour, sigma, position[:, 0], states[:, 0], graph.num_states)
    logs = torch.where(moves, total.to(scores.dtype) * log_score.to(scores.dtype), 0)
    loss = scores - logs
    check_not_nan(loss, log_score)
    return loss


def enumerated_implicit_score_entropy_loss(
    score: ScoreModel,
    graph: ImplicitGraph,
    x: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """Eq. 6 with all neighbours of x, to be multiplied by dsigma: for small state spaces.

    Args:
        score: the score model; called at x and at up to L (N - 1) neighbours of each sequence.
        graph: the forward process.
        x: (B, L) int64, drawn from p_t: noised data.
        sigma: (B,) or (B, L) total noise at which the score is asked, >= 0.
        weight: (B,) or (B, L) factor >= 0 of each position's terms, bool or float.
        given: (B, L) bool, positions that are clean in x, are seen by the model and do not count.
        batch_size: sequences in one call of the score model at the neighbours; at least 1.

    Returns:
        (B,) nats a sequence per unit of total noise, of either sign; float32, or float64 if the score is.

    Raises:
        ValueError: as `implicit_score_entropy_loss`; a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    factor = _check(graph, x, sigma, weight, given)
    loss = _reverse_rates(score, graph, x, sigma, factor)
    rates = factor[..., None] * _dense_rates_out(graph, x)
    sequence, position, jumped = rates.nonzero(as_tuple=True)
    rate = rates[sequence, position, jumped].to(loss.dtype)
    for start in range(0, len(sequence), batch_size):
        part = slice(start, start + batch_size)
        b, i = sequence[part], position[part]
        neighbour = x[b].scatter(-1, i[:, None], jumped[part, None])
        log_score = _log_scores_back(score, neighbour, _of_sequences(sigma, b), i, x[b, i], graph.num_states)
        loss = loss.index_add(0, b, -rate[part] * log_score.to(loss.dtype))
    check_not_nan(loss, loss)
    return loss


def _check(graph: ImplicitGraph, x: Tensor, sigma: Tensor, weight: Tensor | None, given: Tensor | None) -> Tensor:
    """The factor of each position, (B, L), after the checks of the common arguments."""
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, L), got {tuple(x.shape)}")
    check_states("x", x, graph.num_states)
    check_sigma("sigma", sigma)
    expand_leading("sigma", sigma, x)
    weight = None if weight is None else check_weight(weight, x)
    mask_id: int | None = getattr(graph, "mask_id", None)
    if given is not None and mask_id is not None:
        masks = check_given(given, x) & (x == mask_id)
        expected = f"x must be clean where it is given, and hold no mask (mask_id {mask_id}) there"
        require(~masks.any(), expected, lambda: f"got it at {int(masks.sum())} positions")
    factor = counted(weight, None if given is None else check_given(given, x))
    if factor is None:
        return torch.ones(x.shape, dtype=sum_dtype(x.device), device=x.device)
    return factor.to(sum_dtype(x.device))


def _reverse_rates(score: ScoreModel, graph: ImplicitGraph, x: Tensor, sigma: Tensor, factor: Tensor) -> Tensor:
    """Sum over positions of factor sum_{y != x} Q[x, y] s(x)_y, (B,): score entropy (5) against ratios of 0."""
    live = can_move(graph.rates_into(x), x, graph.num_states) & (factor > 0)
    log_score, positions = score_rows(score, x, sigma, live, graph.num_states)
    x = x[live]
    dtype = arithmetic_dtype(log_score)
    zero = torch.zeros((*x.shape, 1), dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        jumps = merge(graph.rates_into(x), DenseRow(zero[:, 0], x[:, None], zero), x, dtype)
        total = fast.sum_over_jumps(log_score.reshape(-1, graph.num_states), positions, jumps)
    check_not_nan(total, log_score)
    total = total * factor[live].to(dtype)
    return spread(total, live).sum(-1)


def total_rate_out(graph: ImplicitGraph, x: Tensor) -> Tensor:
    """sum_{y != x} Q[y, x], (...), summed in float64 where the device has it."""
    row, wide = graph.rates_out_of(x), sum_dtype(x.device)
    own = row.index == x[..., None]
    unlisted = graph.num_states - row.index.shape[-1] - (~own.any(-1)).to(wide)
    return unlisted * row.base.to(wide) + row.value.to(wide).masked_fill(own, 0).sum(-1)


def _dense_rates_out(graph: ImplicitGraph, x: Tensor) -> Tensor:
    """Q[y, x] for all y != x, and 0 for y = x: (..., N), float64 where the device has it."""
    row, wide = graph.rates_out_of(x), sum_dtype(x.device)
    return dense(row, graph.num_states, wide).scatter_(-1, x[..., None], 0)


def _draw(weights: Tensor, generator: Generator | None) -> Tensor:
    """One index a row of the weights (B, n) >= 0, drawn with probability proportional to them; (B,) int64.

    By the inverse of the cumulative sum: never an index of weight 0, unless all are 0.
    """
    cumulative = weights.cumsum(-1)
    u = torch.rand(len(weights), 1, generator=generator, dtype=weights.dtype, device=weights.device)
    total = cumulative[:, -1:]
    target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(weights.shape[-1] - 1)


def _log_scores_back(
    score: ScoreModel, neighbour: Tensor, sigma: Tensor, position: Tensor, state: Tensor, num_states: int
) -> Tensor:
    """Log s(y)_x, (B,), from the neighbours y (B, L) back to the states (B,) that they had at the positions (B,)."""
    where = torch.zeros_like(neighbour, dtype=torch.bool).scatter_(-1, position[:, None], True)
    log_score, positions = score_rows(score, neighbour, sigma, where, num_states)
    rows = log_score if positions is None else log_score.reshape(-1, num_states).index_select(0, positions)
    chosen = rows.gather(-1, state[:, None])[:, 0]
    return chosen.to(arithmetic_dtype(log_score))


def _of_sequences(sigma: Tensor, chosen: Tensor) -> Tensor:
    """The noise of the chosen sequences: rows of sigma, or sigma itself when it is one number for all."""
    return sigma[chosen] if sigma.ndim else sigma

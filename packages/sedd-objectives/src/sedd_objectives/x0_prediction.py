"""The diffusion loss of a model that outputs the clean token, on any graph, in continuous time.

A model's output is a distribution p over clean tokens c at every position. There are two things it may mean, and each
has its score (T = exp(sigma Q), x the noised token of the position):

    posterior       p(c | x_t), told all of x_t                  s_y = sum_c p_c T[y, c] / T[x, c]
    leave-one-out   p(c | the other positions of x_t)            s_y = sum_c T[y, c] p_c / sum_c T[x, c] p_c

The two are one under absorption, where x says nothing of c. Networks of UDLM (Schiff et al. 2024, arXiv 2412.10193),
Duo (Sahoo et al. 2025, arXiv 2506.10892) and GIDD (von Ruette et al. 2025, arXiv 2503.04482) are trained as the second;
D3PM's, and whatever else is asked for p(x0 | x_t), as the first. The loss is the denoising score entropy (eq. 7) of
this score against r_y = T[y, x0] / T[x, x0], its integral the diffusion loss (eq. 10). With Q[x, y] = 1 / N that of the
second is UDLM's, and with rates into x that are one number it is GIDD's; the tests write out both.

Both scores are (T v)_y / (T v)_x for v = p / T[x, .] or p: sums of positive terms. Where only some states are listed as
sources of a jump into x, T v is summed there by the rows T[y, .], each of which the graph gives accurately however
small it is; else by the graph's `propagate`, and s_y is no less than what x0 alone adds to it. Clean tokens that cannot
have become x are left out of p(c | x_t).

A process whose rates change their proportions in time, such as GIDD's, is no exp(sigma Q): `time_varying_loss` takes
one that tells its rates and its transitions at t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from . import fast
from .batch import (
    check_clean,
    check_kept,
    check_possible,
    check_times,
    keep_given,
    logit_rows,
    noised,
    over_tokens,
    spread,
)
from .checks import arithmetic_dtype, check_sigma, check_states, expand_leading, sum_dtype
from .interfaces import Noise, PosteriorGraph, PosteriorModel, Row, TimeVaryingGraph
from .jumps import DenseRow, RatesInto, can_move, dense, merge
from .times import stratified_times

__all__ = [
    "posterior_score_entropy",
    "posterior_loss",
    "leave_one_out_score_entropy",
    "leave_one_out_loss",
    "time_varying_loss",
]

LEAST = 1e-290
"""Likelihood in float64 below which a clean token is taken not to have become x: its inverse is to be a number."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""(logits of the clean token (m, N), T[x, .] (m, N)) -> v (m, N), float64 where the device has it."""


def posterior_score_entropy(logits: Tensor, graph: PosteriorGraph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Denoising score entropy of the score that p(c | x_t) implies, per unit of total noise.

    Args:
        logits: (..., N) float, of the clean token given all of x_t; normalised here over the tokens that can have
            become x. The mask's entry is ignored.
        graph: the forward process.
        x: (...) int64, the noised states.
        x0: (...) int64, the clean states.
        sigma: total noise, of a shape that is a leading part of x's.

    Returns:
        (...) nats a position, >= 0, to be multiplied by dsigma; 0 where no jump leads into x. Infinite where the model
        rules out what happened.

    Raises:
        ValueError: shapes that do not fit, states out of range, negative sigma, NaN logits, or an x that cannot have
            come from its x0.
    """
    return _score_entropy(_by_posterior, logits, graph, x, x0, sigma)


def leave_one_out_score_entropy(logits: Tensor, graph: PosteriorGraph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Denoising score entropy of the score that p(c | the other positions) implies, per unit of total noise.

    Arguments, result and errors are those of `posterior_score_entropy`.
    """
    return _score_entropy(_by_prior, logits, graph, x, x0, sigma)


def posterior_loss(
    model: PosteriorModel,
    graph: PosteriorGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Tensor:
    """The integrand of eq. 10 at t of a model of p(c | x_t), summed over positions, in nats a sequence.

    Equal to `denoising_loss` of the score that it implies; its mean over t ~ U[t_min, 1] times (1 - t_min) is the
    integral. `cross_entropy_loss` is the same under absorption, and needs one logit where this needs a row.

    Args:
        model: the model of the clean tokens; called exactly once. Its `where` is used if it has one.
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

    Returns:
        (B,) float32, or float64 if the logits are.

    Raises:
        ValueError: as `posterior_score_entropy`; a weight that is negative somewhere or 0 everywhere.
    """
    return _loss(_by_posterior, model, graph, noise, x0, t, xt, weight, given, generator, t_min)


def leave_one_out_loss(
    model: PosteriorModel,
    graph: PosteriorGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Tensor:
    """The integrand of eq. 10 at t of a model of p(c | the other positions), in nats a sequence: what UDLM trains.

    Arguments, result and errors are those of `posterior_loss`. The network may see the position's own x_t; at the
    minimum it makes no use of it.
    """
    return _loss(_by_prior, model, graph, noise, x0, t, xt, weight, given, generator, t_min)


def time_varying_loss(
    model: PosteriorModel,
    graph: TimeVaryingGraph,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Tensor:
    """`leave_one_out_loss` for a process whose rates change their proportions in time: what GIDD trains.

    With T the transition from 0 to t and Q the rates at t, s = T p / (T p)_x, r = T[., x0] / T[x, x0].

    Args:
        model: the model of the clean tokens, of (x_t, t): a time and no total noise, of which there are several.
        graph: the forward process.
        x0: (B, L) int64, clean sequences.
        t: (B,) float times; stratified over [t_min, 1) if None.
        xt: (B, L) int64, states already noised; drawn from the forward process if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for the times and the noising.
        t_min: the smallest time drawn.

    Returns:
        (B,) float32, or float64 if the logits are.

    Raises:
        ValueError: shapes that do not fit, states out of range, NaN logits, or an x that cannot have come from its x0;
            a weight that is negative somewhere or 0 everywhere.
    """
    factor = check_clean(x0, graph, weight, given)
    if t is None:
        t = stratified_times(len(x0), generator=generator, t_min=t_min, device=x0.device)
    t = check_times(t, x0)
    per_position = expand_leading("t", t, x0).to(sum_dtype(x0.device))
    if xt is None:
        xt = keep_given(graph.sample(x0, t, generator=generator), x0, given)
    else:
        check_states("xt", xt, graph.num_states, x0.shape)
        check_kept(xt, x0, given)
    live = can_move(graph.rates_into(xt, t), xt, graph.num_states)
    if factor is not None:
        live = live & (factor > 0)
    logits, positions = logit_rows(model, xt, t, live, graph.num_states)

    def divergence(logits: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        dtype = logits.dtype
        clean = torch.nn.functional.one_hot(x0, graph.num_states).to(t.dtype)
        from_clean = graph.propagate(clean, t)
        ratio = DenseRow.of(from_clean / from_clean.gather(-1, x[:, None]))
        moved = graph.propagate(over_tokens(logits.to(t.dtype), graph.mask_id).softmax(-1), t)
        log_score = _log_or_never(moved / moved.gather(-1, x[:, None])).to(dtype)
        return fast.sum_over_jumps(log_score, None, merge(graph.rates_into(x, t), ratio, x, dtype, graph.num_states))

    rows, fields = logits.reshape(-1, graph.num_states), (xt[live], x0[live], per_position[live])
    loss = fast.each_row(divergence, rows, positions, *fields, dtype=arithmetic_dtype(logits))
    _check(loss, rows)
    if factor is not None:
        loss = loss * factor[live].to(loss.dtype)
    return spread(loss, live).sum(-1)


def _score_entropy(weigh: Weigh, logits: Tensor, graph: PosteriorGraph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    num_states = graph.num_states
    if logits.shape != (*x.shape, num_states):
        raise ValueError(f"logits must have shape {(*x.shape, num_states)}, x's and N, got {tuple(logits.shape)}")
    check_states("x", x, num_states)
    check_states("x0", x0, num_states, x.shape)
    check_sigma("sigma", sigma)
    sigma = expand_leading("sigma", sigma, x)
    rates = RatesInto.of(graph, x)
    live = rates.can_move(x, num_states)
    check_possible(x, x0, live)
    positions = None if bool(live.all()) else live.flatten().nonzero()[:, 0]
    return spread(_live_loss(weigh, logits, positions, graph, rates, x[live], x0[live], sigma[live]), live)


def _loss(
    weigh: Weigh,
    model: PosteriorModel,
    graph: PosteriorGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None,
    xt: Tensor | None,
    weight: Tensor | None,
    given: Tensor | None,
    generator: Generator | None,
    t_min: float,
) -> Tensor:
    weight, drawn = check_clean(x0, graph, weight, given, noise), xt is None
    xt, sigma, per_position, dsigma = noised(graph, noise, x0, t, xt, given=given, generator=generator, t_min=t_min)
    rates = RatesInto.of(graph, xt)
    factor, live = dsigma, rates.can_move(xt, graph.num_states)
    if not drawn:
        check_possible(xt, x0, live, weight)
    if weight is not None:
        factor, live = dsigma * weight, live & (weight > 0)
    logits, positions = logit_rows(model, xt, sigma, live, graph.num_states)
    loss = _live_loss(weigh, logits, positions, graph, rates, xt[live], x0[live], per_position[live])
    return spread(loss * factor[live].to(loss.dtype), live).sum(-1)


def _live_loss(
    weigh: Weigh,
    logits: Tensor,
    positions: Tensor | None,
    graph: PosteriorGraph,
    rates: RatesInto,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
) -> Tensor:
    """The loss (M,) at the positions x, x0, sigma (M,), with the logits' rows found at `positions`."""

    def divergence(logits: Tensor, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        into, ratio = rates.at(x), graph.ratio(x, x0, sigma)
        likelihood = dense(graph.transition_into(x, sigma), graph.num_states, sigma.dtype)
        v = weigh(over_tokens(logits.to(sigma.dtype), graph.mask_id), likelihood)
        at_x, of_x0 = likelihood * v, x0[:, None]
        share = at_x.gather(-1, of_x0) / at_x.sum(-1, keepdim=True)  # of x0 in (T v)_x, and s_y >= share r_y
        score = _moved(graph, into, v, sigma) / at_x.sum(-1, keepdim=True)
        score = torch.maximum(score, share * dense(ratio, graph.num_states))
        jumps = merge(into, ratio, x, logits.dtype, graph.num_states)
        return fast.sum_over_jumps(_log_or_never(score).to(logits.dtype), None, jumps)

    rows, sigma = logits.reshape(-1, graph.num_states), sigma.to(sum_dtype(x.device))
    loss = fast.each_row(divergence, rows, positions, x, x0, sigma, dtype=arithmetic_dtype(logits))
    _check(loss, rows)
    return loss


def _by_posterior(logits: Tensor, likelihood: Tensor) -> Tensor:
    """V = p / T[x, .] for p over the tokens that can have become x."""
    possible = likelihood > LEAST
    p = logits.masked_fill(~possible, -torch.inf).softmax(-1)
    return p / torch.where(possible, likelihood, 1)


def _by_prior(logits: Tensor, likelihood: Tensor) -> Tensor:
    """V = p."""
    return logits.softmax(-1)


def _moved(graph: PosteriorGraph, into: Row, v: Tensor, sigma: Tensor) -> Tensor:
    """(T v)_y, (m, N), at the states y from which a jump leads into x; anything elsewhere."""
    listed = into.base == 0
    if bool(listed.all()):
        return _moved_to(graph, into.index, v, sigma)
    if not bool(listed.any()):
        return graph.propagate(v, sigma)
    everywhere = torch.empty_like(v)
    everywhere = everywhere.index_put((listed,), _moved_to(graph, into.index[listed], v[listed], sigma[listed]))
    return everywhere.index_put((~listed,), graph.propagate(v[~listed], sigma[~listed]))


def _moved_to(graph: PosteriorGraph, index: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """(T v)_y at the states y of index (m, K), 1 elsewhere, (m, N): by the rows T[y, .], of terms >= 0 alone."""
    num_states = v.shape[-1]
    if index.shape[-1] < num_states:
        rows = dense(graph.transition_into(index, sigma), num_states, v.dtype)
        return torch.ones_like(v).scatter(-1, index, (rows * v[:, None]).sum(-1))
    levels, which = torch.unique(sigma, return_inverse=True)  # all states: a matrix for each level
    moved, states = torch.ones_like(v), torch.arange(num_states, device=v.device)
    for i in range(len(levels)):
        chosen = (which == i).nonzero()[:, 0]
        matrix = dense(graph.transition_into(states, levels[i].expand(num_states)), num_states, v.dtype)
        moved = moved.index_put((chosen,), v[chosen] @ matrix.mT)
    return moved


def _log_or_never(p: Tensor) -> Tensor:
    """Log p, and -inf where p is 0 or was rounded below it; filled twice, for log's slope is infinite there."""
    never = p <= 0
    return p.masked_fill(never, 1).log().masked_fill(never, -torch.inf)


def _check(loss: Tensor, logits: Tensor) -> None:
    if bool(loss.isnan().any()):
        at_fault = "logits are NaN" if bool(logits.isnan().any()) else "some x cannot have come from its x0"
        raise ValueError(f"the loss is NaN at {int(loss.isnan().sum())} of {len(loss)} positions: {at_fault}")

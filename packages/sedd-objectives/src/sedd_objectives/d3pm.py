"""The bound of D3PM (Austin et al. 2021): the same forward process, looked at in T steps.

With times t_i = i / T, x_i the state at t_i and x_0 the clean sequence,

    -log p(x0) <= KL( p(x_T | x0) || prior ) + sum_{i=1}^T E_{x_i} KL( p(x_{i-1} | x_i, x0) || p_theta(x_{i-1} | x_i) )

summed over positions; the term of i = 1 is -log p_theta(x0 | x_1). The model outputs p_theta(x0 | x_i), and takes a
step back by averaging the true one over it: with sigma = sigma_i and D = sigma_i - sigma_{i-1},

    p_theta(x_{i-1} | x_i = x) = sum_{x0} p(x_{i-1} | x, x0) p_theta(x0 | x)
                               = exp(D Q)[x, .] * exp((sigma - D) Q) ( p_theta / exp(sigma Q)[x, .] )

the second line by Bayes' rule: one propagation instead of N posteriors, for graphs whose transitions are constant but
at a few states. Where they are all different numbers some may be 1e-200, and a propagation, exact relative to its
largest entry, leaves nothing of the others: there the first line is summed, N^2 products a position, all positive.
Clean states that cannot have become x are left out of p_theta, and the rest is normalised. Austin et al. average the
joint probability p(x_{i-1}, x | x0) over p_theta instead of the conditional one, and normalise afterwards: the same
where, as under absorption, p(x|x0) is one number for all x0 that can become x.

Positions step back independently, which costs something that T -> infinity removes: the sum tends to the diffusion loss
(eq. 10) of the score s_y = sum_{x0} p_theta(x0 | x) p(y|x0) / p(x|x0), integrated over [0, 1].

A divergence of neighbouring distributions is evaluated as sum_y q phi(log p - log q), phi(d) = e^d - 1 - d, like the
score entropy: its terms are of the second order in the difference, those of sum_y q log(q / p) of the first.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_kept, check_possible, keep_given, logit_rows, spread
from .bound import Bound
from .checks import arithmetic_dtype, check_evaluations, check_sigma, check_states, expand_leading, sum_dtype
from .interfaces import DiscreteTimeGraph, Noise, PosteriorModel
from .jumps import Jumps, can_move, dense
from .times import stratified_times

__all__ = ["d3pm_loss", "d3pm_bound"]


def d3pm_loss(
    model: PosteriorModel,
    graph: DiscreteTimeGraph,
    noise: Noise,
    x0: Tensor,
    step: Tensor | None = None,
    *,
    num_steps: int,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    refuse_nan: bool = True,
) -> Tensor:
    """T times the i-th divergence of D3PM's sum, in nats a sequence: its mean over i ~ U{1..T} is the sum.

    Args:
        model: the model of the clean tokens; called exactly once. Its `where` is used if it has one. It is given sigma
            in torch's default dtype.
        graph: the forward process.
        noise: the schedule t -> (sigma, dsigma), of which only sigma at t = 1/T, 2/T, ..., 1 is used.
        x0: (B, L) int64, clean sequences.
        step: (B,) int64 i in 1..T; stratified if None.
        num_steps: T, at least 1.
        xt: (B, L) int64, states at step i; drawn from the forward process if None.
        weight: (B,) or (B, L) factor >= 0 of each position's loss, bool or float; 0 for padding, which then never
            reaches the head.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for steps and noise.
        refuse_nan: whether to raise where one is NaN. False returns it, for a caller that counts such sequences.

    Returns:
        (B,) float32, or float64 if the logits are; infinite where the model rules out what happened.

    Raises:
        ValueError: shapes that do not fit, states or steps out of range, a sigma that is negative, a weight that is
            negative somewhere or 0 everywhere; unless `refuse_nan` is False, logits that are NaN or an xt that cannot
            have come from its x0.
    """
    factor = _check(graph, noise, x0, num_steps, weight, given)
    if step is None:
        unit = stratified_times(len(x0), generator=generator, t_min=0.0, device=x0.device)
        step = (unit * num_steps).long() + 1
    return num_steps * _divergence(
        model, graph, noise, x0, step, num_steps, xt, factor, given, generator, refuse_nan=refuse_nan
    )


@torch.no_grad()
def d3pm_bound(
    model: PosteriorModel,
    graph: DiscreteTimeGraph,
    noise: Noise,
    x0: Tensor,
    *,
    num_steps: int,
    num_times: int = 128,
    num_reconstructions: int = 16,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
) -> Bound:
    """Estimate D3PM's bound on -log p(x0) in T steps, and its standard error.

    Steps 2..T are drawn like the times of `likelihood_bound`: two independent ones in each of num_times / 2 strata.
    With num_times = 2 (T - 1) every step is evaluated twice. `reconstruction` is the term of step 1.

    Args:
        model: the model of the clean tokens; called num_times + num_reconstructions times with all of x0.
        graph: the forward process; its prior at t = 1 is the one meant by the bound.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        num_steps: T, at least 1.
        num_times: evaluations of steps 2..T a sequence; even. None are made if T = 1.
        num_reconstructions: evaluations of step 1 a sequence; at least 2.
        weight: (B,) or (B, L) factor >= 0 of each position in all three terms; 0 for padding.
        given: (B, L) bool, positions that stay clean and do not count: the bound is on -log p of the others given them.
        generator: for steps and noise.

    Raises:
        ValueError: as `d3pm_loss`; an odd or too small number of evaluations.
    """
    factor = _check(graph, noise, x0, num_steps, weight, given)
    check_evaluations(num_times, num_reconstructions)
    wide, batch = sum_dtype(x0.device), len(x0)

    def divergence(step: Tensor) -> Tensor:
        return _divergence(model, graph, noise, x0, step, num_steps, None, factor, given, generator, dtype=wide)

    diffusion, variance = x0.new_zeros(batch, dtype=wide), x0.new_zeros(batch, dtype=wide)
    strata = num_times // 2 if num_steps > 1 else 0
    for stratum in range(strata):
        unit = (stratum + torch.rand(2, batch, generator=generator, device=x0.device, dtype=wide)) / strata
        steps = 2 + (unit * (num_steps - 1)).long().clamp_max(num_steps - 2)
        one, other = ((num_steps - 1) * divergence(step) for step in steps)
        diffusion += (one + other) / num_times
        variance += ((one - other) / num_times) ** 2
    first = torch.ones(batch, dtype=torch.int64, device=x0.device)
    draws = torch.stack([divergence(first) for _ in range(num_reconstructions)])
    reconstruction = draws.mean(0)
    variance += draws.var(0) / num_reconstructions
    kl = graph.prior_kl(x0, noise(torch.ones(batch, dtype=wide, device=x0.device))[0]).to(wide)
    prior = (kl if factor is None else kl * factor).sum(-1)
    return Bound(diffusion + prior + reconstruction, variance.sqrt(), diffusion, prior, reconstruction)


def _check(
    graph: DiscreteTimeGraph,
    noise: Noise,
    x0: Tensor,
    num_steps: int,
    weight: Tensor | None,
    given: Tensor | None,
) -> Tensor | None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return check_clean(x0, graph, weight, given, noise)


def _divergence(
    model: PosteriorModel,
    graph: DiscreteTimeGraph,
    noise: Noise,
    x0: Tensor,
    step: Tensor,
    num_steps: int,
    xt: Tensor | None,
    factor: Tensor | None,
    given: Tensor | None,
    generator: Generator | None,
    *,
    dtype: torch.dtype | None = None,
    refuse_nan: bool = True,
) -> Tensor:
    """KL( p(x_{i-1} | x_i, x0) || p_theta(x_{i-1} | x_i) ) at the steps i (B,), summed over positions, (B,)."""
    before, now = _noise_levels(noise, step, num_steps, x0)
    if xt is None:
        xt = keep_given(graph.sample(x0, now, generator=generator), x0, given)
    else:
        check_states("xt", xt, graph.num_states, x0.shape)
        check_kept(xt, x0, given)
    live = can_move(graph.rates_into(xt), xt, graph.num_states)
    check_possible(xt, x0, live, factor)
    if factor is not None:
        live = live & (factor > 0)
    logits, positions = logit_rows(model, xt, now.to(torch.get_default_dtype()), live, graph.num_states)

    def divergence(logits: Tensor, x: Tensor, x0: Tensor, before: Tensor, now: Tensor) -> Tensor:
        log_p = (_log_mixture if full else _log_step_back)(logits, graph, x, before, now)
        q = graph.posterior(x, x0, before, now)
        one, weight = torch.ones_like(log_p[:, 0]), torch.ones(q.index.shape, dtype=log_p.dtype, device=log_p.device)
        base, value = (v.to(log_p.dtype).clamp_min(0) for v in (q.base, q.value))
        return fast.sum_over_jumps(log_p, None, Jumps(one, base, q.index, weight, value))

    rows = logits.reshape(-1, graph.num_states)
    fields = [xt[live], x0[live], *(expand_leading("sigma", level, x0)[live] for level in (before, now))]
    full = graph.transition_into(xt[:1, :1], now[:1]).index.shape[-1] == graph.num_states
    width = graph.num_states ** (2 if full else 1)
    loss = fast.each_row(divergence, rows, positions, *fields, dtype=dtype or arithmetic_dtype(logits), width=width)
    if refuse_nan and bool(loss.isnan().any()):
        at_fault = "logits are NaN" if bool(rows.isnan().any()) else "some xt cannot have come from its x0 at this step"
        raise ValueError(f"the divergence is NaN at {int(loss.isnan().sum())} of {len(loss)} positions: {at_fault}")
    if factor is not None:
        loss = loss * factor[live].to(loss.dtype)
    return spread(loss, live).sum(-1)


def _noise_levels(noise: Noise, step: Tensor, num_steps: int, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Total noise at t_{i-1} and t_i, (B,) each, in float64 where the device has it; 0 before the first step."""
    if step.is_floating_point() or step.shape != x0.shape[:1]:
        raise ValueError(
            f"step must be integers of shape (B,), {tuple(x0.shape[:1])}, got {step.dtype} of shape {tuple(step.shape)}"
        )
    if bool(((step < 1) | (step > num_steps)).any()):
        raise ValueError(f"step must lie in 1..{num_steps} (num_steps), got {step.tolist()}")
    t = torch.stack([step - 1, step]).to(sum_dtype(x0.device)) / num_steps
    now = noise(t[1])[0]
    before = torch.where(step == 1, 0, noise(t[0])[0])
    check_sigma("sigma", now)
    if not bool((before <= now).all()):
        raise ValueError(f"noise must not decrease with t, got sigma {before.tolist()} before {now.tolist()}")
    return before, now


def _log_step_back(logits: Tensor, graph: DiscreteTimeGraph, x: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """Log p_theta(x_{i-1} | x_i = x), (m, N), from logits (m, N) of the clean state, by one propagation."""
    likelihood = dense(graph.transition_into(x, now), graph.num_states, logits.dtype)
    clean, possible = _clean(logits, likelihood, graph)
    over = torch.where(possible, clean / torch.where(possible, likelihood, 1), 0)
    p = graph.propagate(over, before.to(over.dtype)) * dense(
        graph.transition_into(x, now - before), graph.num_states, logits.dtype
    )
    return _log(p)


def _log_mixture(logits: Tensor, graph: DiscreteTimeGraph, x: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """The same by one posterior for each clean state c, p(y | x, c) = exp(D Q)[x, y] exp(before Q)[y, c] / p(x | c).

    No number of it is a difference, and each is as accurate as the rows of the graph's transitions.
    """
    num_states, dtype = graph.num_states, now.dtype
    likelihood = dense(graph.transition_into(x, now), num_states, dtype)
    clean, possible = _clean(logits.to(dtype), likelihood, graph)
    over = torch.where(possible, clean / torch.where(possible, likelihood, 1), 0)
    levels, which = torch.unique(before, return_inverse=True)
    order, every = which.argsort(stable=True), torch.arange(num_states, device=x.device)
    mixed = []
    for level, rows in zip(levels, torch.split(over[order], which.bincount().tolist()), strict=True):
        to_each = dense(graph.transition_into(every, level.expand(num_states)), num_states, dtype)  # (y, c)
        mixed.append(rows @ to_each.mT)
    p = torch.cat(mixed)[order.argsort()] if mixed else over
    return _log(p * dense(graph.transition_into(x, now - before), num_states, dtype)).to(logits.dtype)


def _clean(logits: Tensor, likelihood: Tensor, graph: DiscreteTimeGraph) -> tuple[Tensor, Tensor]:
    """P_theta (m, N) of the clean states, among those that are tokens and can have become x; and which these are."""
    possible = likelihood > torch.finfo(likelihood.dtype).tiny ** (2 / 3)  # of less, parts may underflow
    if graph.mask_id is not None:
        possible[:, graph.mask_id] = False
    return logits.masked_fill(~possible, -torch.inf).softmax(-1), possible


def _log(p: Tensor) -> Tensor:
    impossible = p <= 0  # filled twice, for log's slope is infinite there
    return p.masked_fill(impossible, 1).log().masked_fill(impossible, -torch.inf)

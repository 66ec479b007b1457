"""A loss and a bound by snapshots x_t alone: for processes whose transitions are drawn, but not written down.

On a graph of a vocabulary's nearest neighbours x_t is drawn by uniformization, jump by jump, and a row of Q is short;
a row of exp(sigma Q) has N numbers, and so have ratios and posteriors. What needs none of them:

**The loss**, for a model of the clean tokens, is -log p(x0 | x_t) summed over positions, at a uniform time. Its minimum
is the posterior. It is what GDDS trains (Zekri et al. 2026, arXiv 2603.21342; `nll_per_token` of its code, but for the
copying of positions that have not jumped, which x_t does not show). It is no bound on -log p(x0): told a snapshot (t,
x_t), a model still owes KL( p(x_t | x0) || p(x_t) ) for the snapshot itself. With the exact posterior its mean is the
entropy of x0 given a snapshot, less than that of x0.

**The bound**, for a score model, is that of eq. 9. In its diffusion term the ratios appear in two places. One is the
implicit score entropy (6), which has none. The other is the constant K, and by the master equation (1), with H the
entropy of p_sigma(. | x0) and R(x) the rate of leaving x,

    E_{x_t} sum_{y != x} Q[x, y] K( p(y|x0) / p(x|x0) ) = dH / dsigma - E_{x_t} R(x_t).

Integrated, H(t = 1) cancels against the prior's divergence, and what remains is

    -log p(x0) <= integral over t of dsigma(t) E ( ISE(x_t) - R(x_t) ) - E log prior(x_1) - H(t_min)
                  + E -log p(x0 | x_{t_min}),

of which -H(t_min) <= 0 is left out: so much looser, and still a bound. The decoder needs no transition either, being
that of a single jump, p(c | x) proportional to sigma Q[x, c] s(x)_c for c != x and to 1 for c = x; both are accurate
where few tokens have moved at t_min.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_possible, keep_given, logit_rows, noised, over_tokens, score_rows, spread
from .bound import Bound
from .checks import arithmetic_dtype, check_evaluations, check_not_nan, check_sigma, sum_dtype
from .decoder import EVEN_SHARE
from .implicit import implicit_score_entropy_loss, total_rate_out
from .interfaces import Noise, PosteriorModel, ScoreModel, SnapshotGraph
from .jumps import can_move, dense
from .times import NoiseTimes

__all__ = ["snapshot_loss", "snapshot_bound", "log_decoder_of_one_jump"]


def snapshot_loss(
    model: PosteriorModel,
    graph: SnapshotGraph,
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
    """-log p(x0 | x_t) at time t, summed over positions, in nats a sequence: what GDDS trains. No bound by itself.

    Args:
        model: the model of the clean tokens; called exactly once. Its `where` is used if it has one.
        graph: the forward process; asked for x_t, and for the rates into it.
        noise: the schedule t -> (sigma, dsigma), of which only sigma is used.
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
        (B,) float32, or float64 if the logits are. A position into which no jump leads is still clean: 0.

    Raises:
        ValueError: shapes that do not fit, states out of range, NaN logits, masks or given positions of x0 that are not
            clean, a weight that is negative somewhere or 0 everywhere.
    """
    factor, drawn = check_clean(x0, graph, weight, given, noise), xt is None
    xt, sigma, _, _ = noised(graph, noise, x0, t, xt, given=given, generator=generator, t_min=t_min)
    live = can_move(graph.rates_into(xt), xt, graph.num_states)
    if not drawn:
        check_possible(xt, x0, live, factor)
    if factor is not None:
        live = live & (factor > 0)
    logits, positions = logit_rows(model, xt, sigma, live, graph.num_states)

    def surprise(logits: Tensor, x0: Tensor) -> Tensor:
        logits = over_tokens(logits, graph.mask_id)
        return logits.logsumexp(-1) - logits.gather(-1, x0[:, None])[:, 0]

    rows = logits.reshape(-1, graph.num_states)
    loss = fast.each_row(surprise, rows, positions, x0[live], dtype=arithmetic_dtype(logits))
    if bool(loss.isnan().any()):
        raise ValueError(f"logits are NaN, or all -inf, at {int(loss.isnan().sum())} of {len(loss)} positions")
    full = spread(loss, live)
    return (full if factor is None else full * factor.to(full.dtype)).sum(-1)


@torch.no_grad()
def snapshot_bound(
    score: ScoreModel,
    graph: SnapshotGraph,
    noise: Noise,
    x0: Tensor,
    *,
    num_times: int = 128,
    num_reconstructions: int = 16,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    small_noise_share: float = 0.5,
) -> Bound:
    """Estimate a bound on -log p(x0) from snapshots, without transitions: `likelihood_bound` and the entropy at t_min.

    A draw's deviation is larger than that of `likelihood_bound`, which is the better one wherever a graph's rows of
    exp(sigma Q) can be had: of eq. 6 one neighbour is drawn, and its terms do not cancel.

    Args:
        score: the score model; called 2 num_times + num_reconstructions times with all of x0.
        graph: the forward process; its prior at t = 1 is the one meant by the bound.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        num_times: evaluations of the diffusion term a sequence; even.
        num_reconstructions: evaluations of the two end terms a sequence; at least 2.
        weight: (B,) or (B, L) factor >= 0 of each position in all terms; 0 for padding.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the bound is on -log p of
            the others given them, in the process in which given positions never move.
        generator: for times, noise and neighbours.
        t_min: the lower end of the integral: early, so that one token in a thousand has moved (`max_rate` of a graph of
            sedd-graphs tells).
        small_noise_share: in [0, 1), of the times to be drawn evenly in log(1 - e^-sigma) rather than in t.

    Returns:
        The bound. Its `diffusion` is the integral, of either sign, and its `prior` -log prior(x_1), a draw and no
        divergence: only their sum has a meaning of its own.

    Raises:
        ValueError: shapes that do not fit, states out of range, a NaN score, masks or given positions of x0 that are
            not clean, an odd or too small number of evaluations, t_min not in (0, 1).
    """
    check_evaluations(num_times, num_reconstructions, t_min, small_noise_share)
    factor = check_clean(x0, graph, weight, given, noise)
    dtype, batch = sum_dtype(x0.device), len(x0)
    counted = torch.ones(x0.shape, dtype=dtype, device=x0.device) if factor is None else factor.to(dtype)
    strata, times = num_times // 2, NoiseTimes(noise, small_noise_share, t_min=t_min, device=x0.device)

    def noised_to(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma, dsigma = noise(t)
        check_sigma("sigma", sigma)
        return keep_given(graph.sample(x0, sigma, generator=generator), x0, given), sigma, dsigma.to(dtype)

    diffusion, variance = torch.zeros(2, batch, dtype=dtype, device=x0.device)
    for stratum in range(strata):
        pair = []
        for _ in range(2):
            unit = torch.rand(batch, generator=generator, device=x0.device)
            t, by_density = times.at((stratum + unit) / strata)
            x, sigma, dsigma = noised_to(t)
            implicit = implicit_score_entropy_loss(
                score, graph, x, sigma, weight=weight, given=given, generator=generator
            )
            leaving = (total_rate_out(graph, x) * counted).sum(-1)
            pair.append((1 - t_min) * by_density.to(dtype) * dsigma * (implicit.to(dtype) - leaving))
        diffusion += (pair[0] + pair[1]) / num_times
        variance += ((pair[0] - pair[1]) / num_times) ** 2

    ends = torch.tensor([t_min, 1.0], device=x0.device)[:, None].expand(2, batch)
    prior = dense(graph.prior(noise(ends[1, 0])[0].to(dtype)), graph.num_states).log()
    draws = torch.zeros(2, num_reconstructions, batch, dtype=dtype, device=x0.device)
    for i in range(num_reconstructions):
        last, _, _ = noised_to(ends[1])
        draws[0, i] = -torch.where(counted > 0, prior[last] * counted, 0).sum(-1)
        draws[1, i] = _reconstruction(score, graph, x0, *noised_to(ends[0])[:2], counted)
    variance += draws.var(1).sum(0) / num_reconstructions
    end, reconstruction = draws.mean(1)
    return Bound(diffusion + end + reconstruction, variance.sqrt(), diffusion, end, reconstruction)


def _reconstruction(
    score: ScoreModel, graph: SnapshotGraph, x0: Tensor, xt: Tensor, sigma: Tensor, counted: Tensor
) -> Tensor:
    """-log p(x0 | x_t) of the decoder of one jump, summed over positions, (B,)."""
    live = can_move(graph.rates_into(xt), xt, graph.num_states) & (counted > 0)
    log_score, positions = score_rows(score, xt, sigma, live, graph.num_states)
    levels = sigma.reshape(sigma.shape + (1,) * (xt.ndim - sigma.ndim)).expand(xt.shape)[live].to(counted.dtype)

    def surprise(log_score: Tensor, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return -log_decoder_of_one_jump(log_score, graph, x, x0, sigma)

    rows = log_score.reshape(-1, graph.num_states)
    loss = fast.each_row(surprise, rows, positions, xt[live], x0[live], levels, dtype=counted.dtype)
    check_not_nan(loss, log_score)
    return (spread(loss, live) * counted).sum(-1)


def log_decoder_of_one_jump(log_score: Tensor, graph: SnapshotGraph, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Log p(x0 | x), p(c | x) proportional to sigma Q[x, c] s_c for c != x and to 1 for c = x; a share spread evenly.

    Args:
        log_score: (m, N) float; the entry at x is ignored.
        graph: the forward process.
        x: (m,) int64, the noised states.
        x0: (m,) int64, the clean tokens.
        sigma: (m,) total noise.

    Returns:
        (m,) nats; a distribution over tokens, whatever the score and the noise.
    """
    rates = dense(graph.rates_into(x), graph.num_states, log_score.dtype).clamp_min(0)
    jumped = (rates * sigma[:, None]).log() + log_score
    log_weight = torch.where(rates > 0, jumped, -torch.inf).scatter(-1, x[:, None], 0.0)
    tokens = graph.num_states - (graph.mask_id is not None)
    p = over_tokens(log_weight, graph.mask_id).softmax(-1).gather(-1, x0[:, None])[:, 0]
    return torch.log((1 - EVEN_SHARE) * p + EVEN_SHARE / tokens)

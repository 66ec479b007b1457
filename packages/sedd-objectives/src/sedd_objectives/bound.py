"""An upper bound on the negative log-likelihood of a sequence, with all of its terms.

    -log p(x0) <=  integral over t in [t_min, 1] of the diffusion loss        (eq. 10)
                 + KL( p_{1|0}(. | x0) || prior )                             (eq. 9)
                 + E_{x ~ p(. | x0), t = t_min} [ -log p(x0 | x) ]

Leaving out the last two gives a number, not a bound: the integral starts at t_min > 0, and the process has not reached
its prior at t = 1. The decoder p(x0 | x) may be any distribution over tokens, one for each position, so that the bound
holds for any score; see `decoder.py` for this one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_possible, noised, score_rows, spread
from .checks import check_evaluations, check_not_nan, sum_dtype
from .decoder import log_decoder
from .denoising import denoising_loss
from .interfaces import LikelihoodGraph, Noise, ScoreModel
from .jumps import RatesInto, value_at
from .times import NoiseTimes

__all__ = ["Bound", "likelihood_bound", "reconstruction_loss"]

EVEN_IN_NOISE = 0.5
"""The `small_noise_share` that the draws are compared with."""
RARE, ENOUGH = 8.0, 500
"""The ratio of variances from which a warning is due, and the number of draws that can tell it."""
LATE, EARLY = 0.5, 0.05
"""The share of tokens moved before t_min from which a warning is due, and that of the t_min then named."""


@dataclass(frozen=True)
class Bound:
    """A bound on -log p(x0) in nats a sequence; every field is (B,), float64 where the device has it."""

    value: Tensor
    """The bound's estimate, diffusion + prior + reconstruction."""
    standard_error: Tensor
    """Monte Carlo standard error of `value`, over times and noise."""
    diffusion: Tensor
    """The integral of the diffusion loss over [t_min, 1]."""
    prior: Tensor
    """KL between the noised data at t = 1 and the prior; exact."""
    reconstruction: Tensor
    """Expected -log-probability of the clean tokens given those at t_min."""

    def __repr__(self) -> str:
        parts = (f"{name} {float(getattr(self, name).mean()):.2f}" for name in ("diffusion", "prior", "reconstruction"))
        error = float(self.standard_error.square().sum().sqrt()) / max(1, len(self.value))
        mean = f"{float(self.value.mean()):.2f} +- {error:.2f} nats on average"
        return f"Bound({len(self.value)} sequences: {mean}, {', '.join(parts)})"


@torch.no_grad()
def likelihood_bound(
    score: ScoreModel,
    graph: LikelihoodGraph,
    noise: Noise,
    x0: Tensor,
    *,
    num_times: int = 128,
    num_reconstructions: int = 16,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    small_noise_share: float = 0.0,
) -> Bound:
    """Estimate the bound on -log p(x0) and its standard error.

    The times are stratified, two independent ones in each of num_times / 2 strata: the two give an unbiased estimate of
    the variance that is left within the strata, where independent times would overstate it and one a stratum hide it.

    Args:
        score: the score model; called num_times + num_reconstructions times with all of x0.
        graph: the forward process; its prior at t = 1 is the one meant by the bound.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        num_times: evaluations of the diffusion loss a sequence; even.
        num_reconstructions: evaluations of the reconstruction term a sequence; at least 2.
        weight: (B,) or (B, L) factor >= 0 of each position in all three terms; 0 for padding.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the bound is on -log p of
            the others given them, in the process in which given positions never move.
        generator: for times and noise.
        t_min: the lower end of the integral, where the reconstruction term takes over.
        small_noise_share: in [0, 1), of the times to be drawn evenly in log(1 - e^-sigma) rather than in t. At small
            noise a jump of a uniform-like process is rare and dear, so that the mean of the bound is skewed, and its
            error understated: 0.5 mends that. Under an absorbing process take 0 unless times are many.

    Warns:
        UserWarning: most of the variance comes from rare large losses at small noise, which `small_noise_share` would
            spare; or most tokens have moved before t_min, and an earlier one would change that.

    Raises:
        ValueError: as `denoising_loss`; an odd or too small number of evaluations.
    """
    check_evaluations(num_times, num_reconstructions, t_min, small_noise_share)
    factor = check_clean(x0, graph, weight, given, noise)
    dtype, batch = sum_dtype(x0.device), len(x0)
    how: dict[str, Any] = {"weight": weight, "given": given, "generator": generator}
    strata, times = num_times // 2, NoiseTimes(noise, small_noise_share, t_min=t_min, device=x0.device)
    by_noise = NoiseTimes(noise, EVEN_IN_NOISE, t_min=t_min, device=x0.device)
    diffusion, variance, otherwise = torch.zeros(3, batch, dtype=dtype, device=x0.device)
    for stratum in range(strata):
        pair, at = [], []
        for _ in range(2):
            offset = torch.rand(batch, generator=generator, device=x0.device)
            t, by_density = times.at((stratum + offset) / strata)
            loss = denoising_loss(score, graph, noise, x0, t, **how)
            pair.append(by_density.to(dtype) * loss.to(dtype))
            at.append(t)
        diffusion += (1 - t_min) * (pair[0] + pair[1]) / num_times
        square = ((1 - t_min) * (pair[0] - pair[1]) / num_times) ** 2
        variance += square
        otherwise += square / by_noise.density(torch.where(pair[0] > pair[1], at[0], at[1]))
    if small_noise_share == 0 and batch * num_times >= ENOUGH:
        _warn_of_rare_losses(variance.sum() / otherwise.sum())
    _warn_of_a_late_start(graph, noise, x0, factor, t_min)

    lowest = torch.full((batch,), t_min, device=x0.device)
    draws = torch.stack(
        [reconstruction_loss(score, graph, noise, x0, lowest, **how) for _ in range(num_reconstructions)]
    )
    reconstruction = draws.mean(0)
    variance += draws.var(0) / num_reconstructions

    kl = graph.prior_kl(x0, noise(torch.ones(batch, device=x0.device))[0]).to(dtype)
    prior = (kl if factor is None else kl * factor).sum(-1)
    return Bound(diffusion + prior + reconstruction, variance.sqrt(), diffusion, prior, reconstruction)


def _warn_of_rare_losses(ratio: Tensor) -> None:
    """Warn where times even in the noise would have left a small part of the variance, as told by the draws made."""
    if bool(ratio > RARE):
        warnings.warn(
            f"small_noise_share=0: times even in t leave about {float(ratio):.0f} times the variance that times even "
            "in the noise would, most of it in rare large losses at small noise, of which a standard error from few "
            f"times knows too little; take small_noise_share={EVEN_IN_NOISE}, or a schedule that spends more time at "
            "small noise, such as a geometric one",
            stacklevel=4,  # of this, the bound, and torch.no_grad
        )


def _warn_of_a_late_start(
    graph: LikelihoodGraph, noise: Noise, x0: Tensor, factor: Tensor | None, t_min: float
) -> None:
    """Warn where most tokens have moved before t_min, if a smaller one would change that, and name it."""
    tokens, count = torch.unique(x0 if factor is None else x0[factor > 0], return_counts=True)
    leaving = -value_at(graph.rates_into(tokens), tokens[:, None])[:, 0].to(sum_dtype(x0.device))
    rate = (leaving * count).sum() / count.sum()
    earlier = torch.tensor(t_min, dtype=leaving.dtype, device=x0.device) * 10.0 ** -torch.arange(10.0, device=x0.device)
    moved = -torch.expm1(-rate * noise(earlier)[0].to(leaving.dtype))
    right = (moved < EARLY).nonzero()
    if bool(moved[0] > LATE) and len(right):
        warnings.warn(
            f"t_min={t_min:g}: by then {float(moved[0]):.0%} of the tokens have moved already, and what is lost of "
            f"them has to be told by the reconstruction term alone; take t_min={float(earlier[int(right[0])]):.0e}",
            stacklevel=4,
        )


def reconstruction_loss(
    score: ScoreModel,
    graph: LikelihoodGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor,
    *,
    xt: Tensor | None = None,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """-log p(x0 | x_t), summed over positions, of the decoder from t to clean tokens (eq. 18). Differentiable.

    Args:
        score: the score model; called once.
        graph: the forward process.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        t: (B,) float times.
        xt: (B, L) int64, states at t; drawn from the forward process if None.
        weight: (B,) or (B, L) factor >= 0 of each position.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count: the loss is that of the
            others given them.
        generator: for the noising.

    Returns:
        (B,) nats a sequence, float64 where the device has it. A position into which no jump leads is still clean: 0.

    Raises:
        ValueError: as `denoising_loss`.
    """
    factor = check_clean(x0, graph, weight, given, noise)
    drawn = xt is None
    xt, sigma, per_position, _ = noised(graph, noise, x0, t, xt, given=given, generator=generator, t_min=0)
    live = RatesInto.of(graph, xt).can_move(xt, graph.num_states)
    if not drawn:
        check_possible(xt, x0, live, factor)
    if factor is not None:
        live = live & (factor > 0)
    log_score, positions = score_rows(score, xt, sigma, live, graph.num_states)
    dtype, rows = sum_dtype(x0.device), log_score.reshape(-1, graph.num_states)

    def surprise(log_score: Tensor, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return -log_decoder(log_score, graph, x, x0, sigma)

    fields = xt[live], x0[live], per_position[live].to(dtype)
    loss = fast.each_row(surprise, rows, positions, *fields, dtype=dtype)
    check_not_nan(loss, log_score)
    full = spread(loss, live)
    return (full if factor is None else full * factor).sum(-1)

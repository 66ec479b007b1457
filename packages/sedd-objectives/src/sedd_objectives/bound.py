"""An upper bound on the negative log-likelihood of a sequence, with all of its terms.

    -log p(x0) <=  integral over t in [t_min, 1] of the diffusion loss        (eq. 10)
                 + KL( p_{1|0}(. | x0) || prior )                             (eq. 9)
                 + E_{x ~ p(. | x0), t = t_min} [ -log p(x0 | x) ]

Leaving out the last two gives a number, not a bound: the integral starts at t_min > 0, and the process has not reached
its prior at t = 1. The decoder p(x0 | x) may be any distribution over tokens, one for each position, so that the bound
holds for any score; see `decoder.py` for this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from . import fast
from .batch import check_clean, check_possible, noised, score_rows, spread
from .checks import check_not_nan, sum_dtype
from .decoder import log_decoder
from .denoising import denoising_loss
from .interfaces import LikelihoodGraph, Noise, ScoreModel
from .jumps import RatesInto
from .times import NoiseTimes

__all__ = ["Bound", "likelihood_bound", "reconstruction_loss"]


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

    Raises:
        ValueError: as `denoising_loss`; an odd or too small number of evaluations.
    """
    if num_times < 2 or num_times % 2:
        raise ValueError(f"num_times must be even and at least 2, got {num_times}: two times share a stratum")
    if num_reconstructions < 2:
        raise ValueError(f"num_reconstructions must be at least 2, to estimate an error, got {num_reconstructions}")
    if not 0 < t_min < 1:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min}")
    if not 0 <= small_noise_share < 1:
        raise ValueError(f"small_noise_share must lie in [0, 1), got {small_noise_share}")
    factor = check_clean(x0, graph, weight, given)
    dtype, batch = sum_dtype(x0.device), len(x0)
    how: dict[str, Any] = {"weight": weight, "given": given, "generator": generator}
    strata, times = num_times // 2, NoiseTimes(noise, small_noise_share, t_min=t_min, device=x0.device)
    diffusion, variance = x0.new_zeros(batch, dtype=dtype), x0.new_zeros(batch, dtype=dtype)
    for stratum in range(strata):
        pair = []
        for _ in range(2):
            offset = torch.rand(batch, generator=generator, device=x0.device)
            t, by_density = times.at((stratum + offset) / strata)
            loss = denoising_loss(score, graph, noise, x0, t, **how)
            pair.append(by_density.to(dtype) * loss.to(dtype))
        diffusion += (1 - t_min) * (pair[0] + pair[1]) / num_times
        variance += ((1 - t_min) * (pair[0] - pair[1]) / num_times) ** 2

    lowest = torch.full((batch,), t_min, device=x0.device)
    draws = torch.stack(
        [reconstruction_loss(score, graph, noise, x0, lowest, **how) for _ in range(num_reconstructions)]
    )
    reconstruction = draws.mean(0)
    variance += draws.var(0) / num_reconstructions

    kl = graph.prior_kl(x0, noise(torch.ones(batch, device=x0.device))[0]).to(dtype)
    prior = (kl if factor is None else kl * factor).sum(-1)
    return Bound(diffusion + prior + reconstruction, variance.sqrt(), diffusion, prior, reconstruction)


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
    factor = check_clean(x0, graph, weight, given)
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

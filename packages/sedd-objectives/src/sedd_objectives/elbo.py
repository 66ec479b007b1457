"""All of eq. 9 as a loss: one draw of the bound on -log p(x0), through which gradients flow.

    (1 - t_min) dsigma(t) sum DSE(x_t, x0) - log p(x0 | x_{t_min}) + KL( p_{1|0}(. | x0) || prior ),    t ~ U[t_min, 1]

`denoising_loss` leaves out the last two, which tell the network little and change no optimum of its score; a schedule
or a process with parameters moves all three, and cannot be trained on the first one alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from .batch import check_clean
from .bound import reconstruction_loss
from .denoising import denoising_loss
from .interfaces import LikelihoodGraph, Noise, ScoreModel

__all__ = ["elbo_loss"]


def elbo_loss(
    score: ScoreModel,
    graph: LikelihoodGraph,
    noise: Noise,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Tensor:
    """An unbiased estimate of the bound of `likelihood_bound`, in nats a sequence. Differentiable.

    A gradient by the schedule flows through sigma and dsigma, but not through the draw of x_t: to learn a schedule take
    the gradient of the second moment.

    Args:
        score: the score model; called twice.
        graph: the forward process; its prior at t = 1 is the one meant by the bound.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        t: (B,) float times in [t_min, 1); stratified if None.
        weight: (B,) or (B, L) factor >= 0 of each position in all three terms; 0 for padding.
        given: (B, L) bool, positions that stay clean, are seen by the model and do not count.
        generator: for times and noise.
        t_min: the lower end of the integral, where the reconstruction term takes over.

    Returns:
        (B,), float64 where the device has it.

    Raises:
        ValueError: as `denoising_loss`; t_min not in (0, 1).
    """
    if not 0 < t_min < 1:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min}")
    how: dict[str, Any] = {"weight": weight, "given": given, "generator": generator}
    diffusion = denoising_loss(score, graph, noise, x0, t, t_min=t_min, **how)
    ends = torch.tensor([t_min, 1.0], device=x0.device)[:, None].expand(2, len(x0))
    reconstruction = reconstruction_loss(score, graph, noise, x0, ends[0], **how)
    prior = graph.prior_kl(x0, noise(ends[1])[0]).to(reconstruction.dtype)
    factor = check_clean(x0, graph, weight, given)
    if factor is not None:
        prior = prior * factor
    return (1 - t_min) * diffusion.to(reconstruction.dtype) + reconstruction + prior.sum(-1)

"""What a reported likelihood bound is made of, and what the usual mistakes would make of it.

    print(audit_bound(model, graph, noise, tokens, claimed=78.2))

The same times and noise serve the bound and every mistake, so that differences are known better than either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..bound import Bound, reconstruction_loss
from ..checks import sum_dtype
from ..denoising import denoising_loss
from ..interfaces import LikelihoodGraph, Noise, ScoreModel

__all__ = ["Audit", "Mistake", "audit_bound"]

ERRORS = 3.0
"""Standard errors by which a claimed number must lie below the bound to be called none."""


@dataclass(frozen=True)
class Mistake:
    """A usual mistake, and by how much it changes the number."""

    name: str
    change: float
    """Nats a sequence, negative if the number gets smaller."""
    standard_error: float
    """Of the change, over sequences, times and noise."""
    explanation: str


@dataclass(frozen=True)
class Audit:
    """The bound, its terms, what is wrong with it, and what would be."""

    bound: Bound
    problems: tuple[str, ...]
    """Why no number of this model, graph and data is a bound; empty if one is."""
    mistakes: tuple[Mistake, ...]
    claimed: float | None
    """The number to be judged, nats a sequence."""

    @property
    def value(self) -> float:
        """The bound, nats a sequence on average."""
        return float(self.bound.value.mean())

    @property
    def standard_error(self) -> float:
        """Of `value`, over times and noise."""
        return float(self.bound.standard_error.square().sum().sqrt()) / len(self.bound.value)

    @property
    def is_bound(self) -> bool:
        """Whether the claimed number is one, or this audit's if none is claimed: 3 standard errors are allowed."""
        below = 0.0 if self.claimed is None else self.value - self.claimed
        return not self.problems and below <= ERRORS * self.standard_error

    @property
    def likeliest_mistake(self) -> Mistake | None:
        """The one whose number is nearest to a claimed number that is no bound."""
        if self.claimed is None or self.is_bound or not self.mistakes:
            return None
        claimed = self.claimed
        return min(self.mistakes, key=lambda mistake: abs(self.value + mistake.change - claimed))

    def __str__(self) -> str:
        terms = (f"{name} {float(getattr(self.bound, name).mean()):.3f}" for name in ("diffusion", "prior"))
        lines = [
            f"bound {self.value:.3f} +- {self.standard_error:.3f} nats a sequence: {', '.join(terms)}, "
            f"reconstruction {float(self.bound.reconstruction.mean()):.3f}",
            *(f"no bound: {problem}" for problem in self.problems),
        ]
        if self.claimed is not None:
            verdict = "may be a bound" if self.is_bound else "is no bound"
            likely = self.likeliest_mistake
            lines.append(f"claimed {self.claimed:.3f} {verdict}" + (f"; like: {likely.name}" if likely else ""))
        lines += [
            f"{m.name}: {m.change:+.3f} +- {m.standard_error:.3f} nats ({m.explanation})"
            for m in sorted(self.mistakes, key=lambda m: -abs(m.change))
        ]
        return "\n".join(lines)


@torch.no_grad()
def audit_bound(
    score: ScoreModel,
    graph: LikelihoodGraph,
    noise: Noise,
    x0: Tensor,
    *,
    claimed: float | None = None,
    end_id: int | None = None,
    num_times: int = 64,
    generator: Generator | None = None,
    t_min: float = 1e-3,
) -> Audit:
    """Estimate the bound and what the usual mistakes would make of it.

    Args:
        score: the model, any callable (x, sigma) -> log_score.
        graph: the forward process.
        noise: the schedule.
        x0: (B, L) int64, tokens.
        claimed: a number to be judged, nats a sequence on average over these sequences.
        end_id: the token of ends and padding, for the mistake of never noising it.
        num_times: evaluations of each loss a sequence, two in each of num_times / 2 strata; even.
        generator: for times and noise.
        t_min: the lower end of the integral.

    Returns:
        The audit; `print` it. Its problems are reported, not raised.

    Raises:
        ValueError: as `denoising_loss`; an odd or too small num_times.
    """
    if num_times < 2 or num_times % 2:
        raise ValueError(f"num_times must be even and at least 2, got {num_times}: two times share a stratum")
    problems, dtype = [], sum_dtype(x0.device)
    masks = torch.zeros_like(x0, dtype=torch.bool) if graph.mask_id is None else x0 == graph.mask_id
    if bool(masks.any()):
        problems.append(f"the data hold the mask, {graph.mask_id}, at {int(masks.sum())} positions: it is no token")
    ends = torch.zeros_like(masks) if end_id is None else x0 == end_id
    some_ends = bool(ends.any()) and not bool((ends | masks).all())
    counted, rest = (~masks).to(torch.float32), (~(ends | masks)).to(torch.float32)

    def leaked(_: Tensor, sigma: Tensor) -> Tensor:
        told: Tensor = score(x0, sigma)
        return told

    true, cheat, kept = (torch.zeros(num_times, len(x0), dtype=dtype, device=x0.device) for _ in range(3))
    for i in range(num_times):
        unit = (i // 2 + torch.rand(len(x0), generator=generator, device=x0.device)) / (num_times // 2)
        t = (t_min + (1 - t_min) * unit).clamp_max(1 - 1e-6)
        xt = graph.sample(x0, noise(t)[0], generator=generator)
        true[i] = denoising_loss(score, graph, noise, x0, t, xt=xt, weight=counted, refuse_nan=False)
        cheat[i] = denoising_loss(leaked, graph, noise, x0, t, xt=xt, weight=counted, refuse_nan=False)
        if some_ends:
            clean = torch.where(ends, x0, xt)
            kept[i] = denoising_loss(score, graph, noise, x0, t, xt=clean, weight=rest, refuse_nan=False)
    true, cheat, kept = ((1 - t_min) * loss for loss in (true, cheat, kept))
    diffusion, lowest = true.mean(0), torch.full((len(x0),), t_min, device=x0.device)
    draws = torch.full((8, len(x0)), torch.nan, dtype=dtype, device=x0.device)
    if bool(diffusion.isfinite().all()):
        for draw in draws:
            draw[:] = reconstruction_loss(score, graph, noise, x0, lowest, weight=counted, generator=generator)
    reconstruction = draws.mean(0)
    prior = (graph.prior_kl(x0, noise(torch.ones_like(lowest))[0]).to(dtype) * counted).sum(-1)
    variance = (true[::2] - true[1::2]).square().sum(0) / num_times**2 + draws.var(0) / 8
    bound = Bound(diffusion + prior + reconstruction, variance.sqrt(), diffusion, prior, reconstruction)
    if not bool(prior.isfinite().all()):
        problems.append("the prior's term is infinite: the prior rules out what the process can end in")
    if not bool(diffusion.isfinite().all()):
        problems.append("the model's score is NaN, or rules out jumps that happen: the diffusion term is no number")

    cut = "the integral starts at t_min, and what is left of the noise there costs something"
    found = [
        _mistake("no reconstruction", -reconstruction, cut),
        _mistake("no prior", -prior, "the process has not reached its prior at t = 1"),
        _mistake("no end terms", -reconstruction - prior, "what public code reports: the integral from t_min alone"),
        _mistake("mean for integral", diffusion * t_min / (1 - t_min), "the mean over [t_min, 1] not times 1 - t_min"),
        _mistake("noise never seen", cheat.mean(0) - diffusion, "the model is shown the clean tokens"),
    ]
    if some_ends:
        at_ends = diffusion - kept.mean(0)
        found.append(_mistake("ends never noised", -at_ends, "their tokens are given to the model and not counted"))
    return Audit(bound, tuple(problems), tuple(found), claimed)


def _mistake(name: str, change: Tensor, explanation: str) -> Mistake:
    error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else float("nan")
    return Mistake(name, float(change.mean()), error, explanation)

"""Decoding under uniform noise by what the model is sure of: the rest of the canvas is thrown again.

    accept    the k positions of least entropy H of p(x0 | x_t), as many as keep
                  sum_{i <= k} H_i - max_{i <= k} H_i <= b
    rethrow   every other position, from the prior
    finish    with the likeliest tokens, when they are those of the steps before and the mean entropy is small

The left side bounds the mutual information of the tokens accepted together (Ben-Hamu et al., *Accelerated sampling from
masked diffusion models via entropy bounded unmasking*, 2025, arXiv 2505.24857). It is how transformers' DiffusionGemma
writes; tokens that were accepted may be thrown again later. A way of decoding, not of sampling: the samples do not
follow the model's law.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .randomness import draw_categorical
from .reverse import Reverse
from .steps import tweedie_posterior

__all__ = ["EntropyBoundRenoising", "within_bound"]


@dataclass(frozen=True)
class EntropyBoundRenoising:
    """Accepts the surest tokens up to an entropy bound and throws the others again, for graphs that noise tokens.

    The step that ends without noise gives the likeliest tokens, so that it is used with `times` down to 0 and
    `denoise=False`, as `from_hf(model, tokenizer, prompt=ids, own_decoder=True)` says.

    Args:
        bound: b, in nats, positive.
        confident: a sequence is finished where its likeliest tokens are those of the last steps and their entropy is
            below this on average, in nats; None to make all steps.
        stable: of how many steps before.

    Raises:
        ValueError: for a bound out of range; when called, for a graph with a mask.
    """

    bound: float = 0.1
    confident: float | None = 0.005
    stable: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise ValueError(f"bound must be finite and positive, in nats, got {self.bound!r}")
        if self.confident is not None and not 0 < self.confident < float("inf"):
            raise ValueError(f"confident must be finite and positive, in nats, or None, got {self.confident!r}")
        if isinstance(self.stable, bool) or not isinstance(self.stable, int) or self.stable < 0:
            raise ValueError(f"stable must be a number of steps, got {self.stable!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        if reverse.graph.mask_id is not None or not reverse.noises_tokens:
            raise ValueError(
                "EntropyBoundRenoising throws tokens anew, under graphs that noise tokens and have no mask"
            )
        run = reverse.once("renoising", lambda: _Run([], torch.zeros_like(x[:, 0], dtype=torch.bool)))
        sigma, quiet = reverse.noise(t)[0], reverse.noise(s)[0] == 0
        where = reverse.movable(x) & ~run.finished[:, None]
        at = reverse.positions(where)
        if not at.sequences:
            return x
        posteriors = reverse.rows_at(
            x, sigma, at, lambda log_score, x, b, _: tweedie_posterior(log_score, x, reverse.graph, sigma[b]), where
        )
        old, uniform = x.flatten()[at.flat], reverse.uniforms_at(where, at)
        token, likeliest, entropy = torch.empty_like(old), torch.empty_like(old), torch.empty_like(uniform)
        for part in posteriors.parts():
            p = posteriors[part]
            token[part] = draw_categorical(p, uniform[part], old=old[part], wanted=at.wanted_in(part))
            likeliest[part] = p.argmax(1)
            entropy[part] = -torch.xlogy(p, p).sum(1).to(entropy.dtype)
        drawn, best = (torch.where(where, x.flatten().index_put((at.flat,), found).view_as(x), x)
                       for found in (token, likeliest))  # fmt: skip
        everywhere = torch.full((x.numel(),), torch.inf, dtype=entropy.dtype, device=x.device)
        doubt = everywhere.index_put((at.flat,), entropy).view_as(x).masked_fill(~where, torch.inf)
        accepted = within_bound(doubt, self.bound)
        thrown = torch.where(where, reverse.prior(), x)
        written = torch.where(accepted & where, drawn, thrown)
        if self.confident is not None:
            mean = torch.where(where, doubt, 0.0).sum(1) / where.sum(1).clamp(min=1)
            same = [(best == earlier).all(1) for earlier in run.before]
            if len(same) == self.stable:
                run.finished |= torch.stack([where.any(1), mean < self.confident, *same]).all(0)
            run.before = [*run.before, best][-self.stable :] if self.stable else []
        return torch.where((run.finished | quiet)[:, None], torch.where(where, best, x), written)


@dataclass
class _Run:
    """What is kept from step to step: the likeliest tokens (B, L) of the last few, and who is finished (B,)."""

    before: list[Tensor]
    finished: Tensor


def within_bound(entropy: Tensor, bound: float) -> Tensor:
    """The positions of least entropy (B, L), in nats, whose sum but for the largest is within the bound: (B, L) bool.

    Infinite entropies never are.
    """
    rising, order = entropy.sort(1)
    inside = rising.cumsum(1) - rising <= bound  # inf - inf is no number, and within no bound
    return torch.zeros_like(inside).scatter_(1, order, inside)

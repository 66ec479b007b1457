"""Ordered unmasking: the best positions first, as masked language models are decoded.

Chang et al., *MaskGIT: masked generative image transformer* (2022); Nie et al., *Large language diffusion models*
(LLaDA, 2025). A step draws a token for every masked position, ranks the positions, and keeps the tokens of the first
few. How many is read off the grid: at time s, round(F lambda(s)) of a sequence's F free positions are masked, lambda
being the mask probability, so that a log-linear schedule unmasks equally many a step and a cosine schedule MaskGIT's
numbers. The orders are callables (posterior (M, N), drawn token (M,)) -> (M,), the highest first:

    confidence    log p of the drawn token              MaskGIT, LLaDA
    entropy       minus the posterior's entropy         Ye et al., Dream 7B (2025)
    margin        first minus second probability        Kim et al., Train for the worst, plan for the best (2025)
    chance        0: any order                          Hoogeboom et al., Autoregressive diffusion models (2022)

Equal positions come in random order. Ranks are read off the model's own posterior, while `controls` change what tokens
are drawn from: `Ordered(confidence, controls=(top_k(1),))` is greedy decoding. (A score whose posterior has but one
token left would be equally confident everywhere.)

These are heuristics: they choose what is likely, and the samples do not follow the model's distribution. One position a
step, they do for every order that does not look at the drawn token: that is the chain rule of probability, in an order
that depends on what is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .categorical import draw_categorical
from .controls import Control, apply_controls
from .masking import absorption_rate, clean_posterior, mask_probability
from .reverse import Reverse

__all__ = ["Ordered", "Order", "confidence", "entropy", "margin", "chance"]

Order = Callable[[Tensor, Tensor], Tensor]
"""(posterior (M, N), drawn token (M,) int64) -> (M,): the highest first."""


def confidence(posterior: Tensor, token: Tensor) -> Tensor:
    """Log-probability of the drawn token, in nats."""
    return posterior.gather(1, token[:, None]).log()[:, 0]


def entropy(posterior: Tensor, token: Tensor) -> Tensor:
    """Minus the entropy of the posterior, in nats."""
    return torch.xlogy(posterior, posterior).sum(-1)


def margin(posterior: Tensor, token: Tensor) -> Tensor:
    """The highest probability minus the second highest."""
    top = posterior.topk(2).values
    return top[:, 0] - top[:, 1]


def chance(posterior: Tensor, token: Tensor) -> Tensor:
    """The same for all."""
    return torch.zeros_like(posterior[:, 0])


@dataclass(frozen=True)
class Ordered:
    """Unmasks the first positions by some order, for absorbing graphs; one evaluation of the score a step.

    Args:
        order: what ranks the masked positions.
        randomness: how much Gumbel noise, times the mask probability, is added to the rank; MaskGIT's temperature.
        controls: temperature, top-k and the like, applied in this order to what tokens are drawn from, not to what
            ranks them; what a grid leaves to the final denoise is drawn without them.

    Raises:
        ValueError: for a negative randomness; when called, for a graph that is not absorbing.
    """

    order: Order = confidence
    randomness: float = 0.0
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.randomness < float("inf"):
            raise ValueError(f"randomness must be finite and at least 0, got {self.randomness!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        rate = absorption_rate(reverse.graph, x.device, "Ordered")
        sigma = reverse.noise(t)[0]
        masked = reverse.movable(x)
        left = ((~reverse.frozen).sum(1) * mask_probability(reverse.noise(s)[0], rate)).round()
        due = (masked.sum(1) - left).clamp(min=0)
        masked &= (due > 0)[:, None]
        sequence, position = masked.nonzero(as_tuple=True)
        if not len(sequence):
            return x
        posterior = reverse.evaluate(
            x, sigma, masked, lambda log_score, x, b, _: clean_posterior(log_score, x, reverse.graph, sigma[b])
        )
        law = apply_controls(self.controls, posterior, sequence, position) if self.controls else posterior
        token = draw_categorical(law, reverse.uniforms(sequence, position))
        u = reverse.uniforms(sequence, position)
        rank = self.order(posterior, token).double()
        if self.randomness:
            gumbel = -torch.log(-torch.log1p(-u))
            rank += self.randomness * mask_probability(sigma, rate)[sequence] * gumbel
        chosen = _first(masked, rank, u) < due[sequence]
        x = x.clone()
        x[sequence[chosen], position[chosen]] = token[chosen]
        return x


def _first(where: Tensor, rank: Tensor, tie: Tensor) -> Tensor:
    """The place (M,) of each true position of `where` (B, L) in its sequence: highest rank first, then highest tie."""
    keys = [torch.full(where.shape, -torch.inf, dtype=torch.float64, device=where.device) for _ in range(2)]
    for key, value in zip(keys, (tie, rank), strict=True):
        key[where] = value.double().nan_to_num()  # all that are due before any that is not
    by_tie = keys[0].argsort(1, descending=True)
    by_rank = keys[1].gather(1, by_tie).argsort(dim=1, descending=True, stable=True)
    return by_tie.gather(1, by_rank).argsort(1)[where]

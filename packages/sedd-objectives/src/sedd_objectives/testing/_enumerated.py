"""A distribution over pairs of tokens, or over single ones, with all that a law compares with, in float64."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Generator, Tensor

from ..interfaces import Graph, LikelihoodGraph, Noise, ScoreModel
from ..score_entropy import plain_score_entropy

__all__ = ["Loss", "Measured", "BoundFunction", "Problem", "assert_near"]

ERRORS = 4.5
"""Standard errors at which draws differ from what they should be: a false alarm in 150,000 comparisons."""


class Loss(Protocol):
    """The integrand of the diffusion loss at times t, (B,) nats a sequence."""

    def __call__(
        self, score: ScoreModel, graph: Graph, noise: Noise, x0: Tensor, t: Tensor, /, *, generator: Generator | None
    ) -> Tensor:
        """One draw for each sequence x0 (B, L) and time t (B,)."""


class Measured(Protocol):
    """A value and its standard error, (B,) each."""

    @property
    def value(self) -> Tensor:
        """Nats a sequence."""

    @property
    def standard_error(self) -> Tensor:
        """Nats."""


class BoundFunction(Protocol):
    """A bound on -log p(x0) with its standard error."""

    def __call__(
        self, score: ScoreModel, graph: LikelihoodGraph, noise: Noise, x0: Tensor, /, *, generator: Generator | None
    ) -> Measured:
        """Of sequences x0 (B, L)."""


class Problem:
    """A random distribution over sequences of one or two tokens under a graph of a few states."""

    def __init__(self, graph: LikelihoodGraph, length: int) -> None:
        if graph.num_states > 16:
            raise ValueError(f"graph must have 16 states at most, to enumerate pairs of them, got {graph.num_states}")
        self.graph, self.length, self.generator = graph, length, torch.Generator().manual_seed(0)
        tokens = [y for y in range(graph.num_states) if y != graph.mask_id]
        self.sequences = torch.tensor(list(itertools.product(tokens, repeat=length)))
        weights = torch.rand(len(self.sequences), generator=self.generator, dtype=torch.float64) ** 2 + 0.02
        self.probability = weights / weights.sum()
        shape = (graph.num_states,) * length + (length, graph.num_states)
        self.error = torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def draw(self, count: int) -> Tensor:
        """Sequences (count, length)."""
        return self.sequences[torch.multinomial(self.probability, count, replacement=True, generator=self.generator)]

    def entropy(self) -> float:
        """Nats a sequence."""
        return float(-(self.probability * self.probability.log()).sum())

    def transition(self, sigma: Tensor) -> Tensor:
        """exp(sigma Q), (..., N, N), at the levels (...)."""
        states = torch.arange(self.graph.num_states).expand(*sigma.shape, -1)
        row = self.graph.transition_into(states, sigma.double())
        return _dense(row.base, row.index, row.value, self.graph.num_states).double()

    def marginal(self, sigma: Tensor) -> Tensor:
        """p_t over all states, (..., N) or (..., N, N), at the levels (...)."""
        n = self.graph.num_states
        p = torch.zeros((n,) * self.length, dtype=torch.float64)
        p[tuple(self.sequences.T)] = self.probability
        T = self.transition(sigma)
        return T @ p if self.length == 1 else T @ p @ T.mT

    def score(self, wrong: float = 0.0) -> ScoreModel:
        """The exact log-score, plus `wrong` times a random function of the state."""

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            log_p, batch = self.marginal(sigma).log(), torch.arange(len(x))
            if self.length == 1:
                log_ratio = (log_p - log_p[batch, x[:, 0]][:, None])[:, None]
            else:
                here = log_p[batch, x[:, 0], x[:, 1]][:, None]
                log_ratio = torch.stack([log_p[batch, :, x[:, 1]] - here, log_p[batch, x[:, 0], :] - here], 1)
            return log_ratio + wrong * self.error[tuple(x.T)]

        return score

    def integrand(self, score: ScoreModel, x0: Tensor, sigma: Tensor) -> float:
        """E sum over positions of the denoising score entropy, for one sequence x0 (L,) at one level ()."""
        n = self.graph.num_states
        x = torch.tensor(list(itertools.product(range(n), repeat=self.length)))
        from_x0 = self.transition(sigma.double())[:, x0].T
        chance = torch.stack([from_x0[i, x[:, i]] for i in range(self.length)]).prod(0)
        x, chance = x[chance > 0], chance[chance > 0]
        log_score = score(x, sigma.double().expand(len(x))).double()
        rates = self.graph.rates_into(x)
        weight = _dense(rates.base, rates.index, rates.value, n).double()
        ratio = from_x0 / torch.stack([from_x0[i, x[:, i]] for i in range(self.length)], 1)[..., None]
        idle = weight <= 0
        loss = plain_score_entropy(log_score.masked_fill(idle, 0), ratio.masked_fill(idle, 1), weight.clamp_min(0), x)
        return float((chance * loss.sum(-1)).sum())

    def integral(self, score: ScoreModel, noise: Noise, t_min: float) -> float:
        """The diffusion term over [t_min, 1], averaged over the data: by 40 midpoints in log sigma."""
        low, high = noise(torch.tensor([t_min, 1.0], dtype=torch.float64))[0].log().tolist()
        total, width = 0.0, (high - low) / 40
        for i in range(40):
            sigma = torch.tensor(low + (i + 0.5) * width, dtype=torch.float64).exp()
            for x0, p in zip(self.sequences, self.probability, strict=True):
                total += float(p * sigma) * width * self.integrand(score, x0, sigma)
        return total

    def prior(self, noise: Noise) -> float:
        """The divergence of the noised data from the prior at t = 1, averaged over the data."""
        sigma = noise(torch.ones(len(self.sequences), dtype=torch.float64))[0]
        kl = self.graph.prior_kl(self.sequences, sigma).double().sum(-1)
        return float((self.probability * kl).sum())


def assert_near(found: Tensor, expected: float, what: str, *, least: bool = False, size: float | None = None) -> None:
    """The mean of draws (n,) is what it should be, or no less, within their standard errors and 1e-3 of its size."""
    mean, error = float(found.double().mean()), float(found.double().std()) / len(found) ** 0.5
    room = ERRORS * error + 1e-3 * abs(expected if size is None else size)
    off = mean - expected
    relation = "at least " if least else ""
    wrong = off < -room if least else not abs(off) <= room
    assert not wrong, f"{what} must be {relation}{expected:.4f} nats, found {mean:.4f} +- {error:.4f}"


def _dense(base: Tensor, index: Tensor, value: Tensor, num_states: int) -> Tensor:
    return base[..., None].expand(*base.shape, num_states).scatter(-1, index, value)

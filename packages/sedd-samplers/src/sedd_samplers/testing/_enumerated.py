"""A law of pairs of tokens with its exact score, and the exact law of a method's chain, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..interfaces import Graph, Noise, Row
from ..positions import Positions
from ..reverse import Kernel, Moves, Reverse

__all__ = ["ALARM", "Pairs", "check_frequencies", "dense", "law_of_chain", "marginal", "score_of_law"]

ALARM = 1e-5
"""How often a chi-square test fails what is right, once in so many seeds; the seeds are fixed."""


def dense(row: Row, num_states: int) -> Tensor:
    """All values of rows, (..., N) float64."""
    full = row.base.double()[..., None].expand(*row.base.shape, num_states)
    return full.scatter(-1, row.index, row.value.double())


def transitions(graph: Graph, sigma: Tensor) -> Tensor:
    """exp(sigma Q), (R, N, N), at the levels (R,)."""
    N = graph.num_states
    states, level = torch.arange(N).repeat(len(sigma)), sigma.double().repeat_interleave(N)
    return dense(graph.transition_into(states, level), N).view(-1, N, N)


def marginal(p0: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """p_sigma, (R, N, ..., N), of a law p0 (N, ..., N), at the levels (R,)."""
    step = transitions(graph, sigma)
    p = p0.double().expand(len(sigma), *p0.shape)
    for axis in range(1, p0.ndim + 1):
        p = torch.einsum("ryx,r...x->r...y", step, p.movedim(axis, -1)).movedim(-1, axis)
    return p.clamp(min=0)


def score_of_law(p0: Tensor, graph: Graph) -> Any:
    """The exact score (x (B, L), sigma (B,)) -> (B, L, N) of a law of sequences p0 (N, ..., N), nothing at the mask."""
    N, L = p0.shape[0], p0.ndim
    stride = N ** torch.arange(L - 1, -1, -1)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        levels, level = torch.unique(sigma, return_inverse=True)
        p = marginal(p0, graph, levels).flatten(1)
        here = (x * stride).sum(-1)
        there = here[:, None, None] + (torch.arange(N) - x[..., None]) * stride[:, None]
        return p[level[:, None, None], there].log() - p[level, here].log()[:, None, None]

    return score


class Pairs:
    """A random law of pairs of tokens that depend on each other, under a graph of at most 8 states."""

    def __init__(self, graph: Graph) -> None:
        if graph.num_states > 8:
            raise ValueError(f"the graph must have at most 8 states, to enumerate pairs, got {graph.num_states}")
        self.graph, N = graph, graph.num_states
        p = torch.exp(1.2 * torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        if graph.mask_id is not None:
            p[graph.mask_id], p[:, graph.mask_id] = 0, 0
        self.p0 = 0.9 * p / p.sum() + 0.1 * (p > 0) / int((p > 0).sum())
        self.score = score_of_law(self.p0, graph)

    def prior(self) -> Tensor:
        """The law of the states at the start, (N^2,)."""
        row = self.graph.prior(torch.tensor(math.inf, dtype=torch.float64))
        one = dense(row, self.graph.num_states)
        return (one[:, None] * one).flatten()


class Enumerating(Reverse):
    """Runs a method without drawing: keeps the rows of each draw, and moves to the outcomes that it was told."""

    def __init__(self, score: Any, graph: Graph, noise: Noise, x: Tensor, outcomes: list[Tensor]) -> None:
        seeds = torch.zeros(len(x), dtype=torch.int64)
        super().__init__(score, graph, noise, frozen=torch.zeros_like(x, dtype=torch.bool), seeds=seeds)
        self._told, self.draws = list(outcomes), list[Tensor]()

    def redraw(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor,
        kernel: Kernel,
        *,
        moves: Moves | None = None,
        among: Positions | None = None,
    ) -> Tensor:
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        sequence, position = where.nonzero(as_tuple=True)
        log_score = self.score(x, sigma.double())[sequence, position].double()
        p = kernel(log_score, x[sequence, position], sequence, position).clamp(min=0)
        rows[sequence, position] = p / p.sum(-1, keepdim=True)
        return self._drawn_from(rows, x)

    def flip(self, x: Tensor, where: Tensor, state: int, probability: Tensor) -> Tensor:
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        sequence, position = where.nonzero(as_tuple=True)
        chance = probability[sequence] if probability.ndim == 1 else probability[sequence, position]
        rows[sequence, position] *= 1 - chance[:, None]
        rows[sequence, position, state] += chance
        return self._drawn_from(rows, x)

    def _drawn_from(self, rows: Tensor, x: Tensor) -> Tensor:
        self.draws.append(rows)
        return self._told.pop(0) if self._told else x


def law_of_chain(pairs: Pairs, noise: Noise, method: Any, times: Tensor, start: Tensor) -> Tensor:
    """The exact law (N^2,) after stepping through `times` from the law `start`; for one or two draws a step.

    Raises:
        ValueError: the method makes none of its draws, or more than two a step, by `Reverse.redraw` and `flip`.
    """
    N = pairs.graph.num_states
    states = torch.tensor(list(itertools.product(range(N), repeat=2)))
    S, law = len(states), start

    def step(x: Tensor, t: Tensor, s: Tensor, outcomes: list[Tensor]) -> list[Tensor]:
        run = Enumerating(pairs.score, pairs.graph, noise, x, outcomes)
        method(run, x, t.expand(len(x)), s.expand(len(x)))
        return [(rows[:, 0, :, None] * rows[:, 1, None]).flatten(1) for rows in run.draws]  # (R, S) each

    for t, s in itertools.pairwise(times):
        draws = step(states, t, s, [])
        if len(draws) not in (1, 2):
            raise ValueError(
                f"the chain can be enumerated for methods of one or two draws a step by Reverse.redraw, this one makes "
                f"{len(draws)}"
            )
        if len(draws) == 1:
            law = law @ draws[0]
        else:
            first, second = step(states.repeat_interleave(S, 0), t, s, [states.repeat(S, 1)])
            law = law @ torch.einsum("xm,xmy->xy", first.view(S, S, S)[:, 0], second.view(S, S, S))
    return law


def check_frequencies(x: Tensor, law: Tensor, what: str) -> None:
    """AssertionError unless x (R, 2) was drawn from `law` (N^2,), by a chi-square test that is wrong once in 1/ALARM.

    States that are due less than 5 times are counted as one.
    """
    N = round(len(law) ** 0.5)
    count = torch.bincount(x[:, 0] * N + x[:, 1], minlength=N * N).double()
    expected = law.clamp(min=0) / law.clamp(min=0).sum() * len(x)
    never = (expected < 1e-9 * len(x)) & (count > 0)
    assert not never.any(), f"{what}: the state {divmod(int(never.nonzero()[0]), N)} came, which cannot be"
    rare = expected < 5
    count = torch.cat([count[~rare], count[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    count, expected = count[expected > 0], expected[expected > 0]
    statistic = ((count - expected) ** 2 / expected).sum()
    p = float(torch.special.gammaincc(torch.tensor((len(count) - 1) / 2).double(), statistic / 2))
    distance = float((count / len(x) - expected / len(x)).abs().sum()) / 2
    assert p > ALARM, (
        f"{what}: chi-square {float(statistic):.1f} on {len(count) - 1} degrees of freedom, p = {p:.1e}; total "
        f"variation {distance:.4f} from {len(x)} samples"
    )

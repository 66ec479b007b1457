"""Schedulers in the manner of diffusers as samplers, and the law that a sampler of any kind must obey.

A scheduler there has `set_timesteps(steps)`, `timesteps`, and `step(model_output, timestep, sample, generator=)`, whose
answer has `prev_sample`. What its network predicts, and how much noise a timestep is, the caller says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from ..adapters import to_posterior
from ..interfaces import Graph, ScoreModel
from ..precision import limit_law
from ._enumerated import Pairs, check_frequencies

__all__ = ["Sampler", "scheduled", "sampler_reaches_the_law"]


class Sampler(Protocol):
    """Anything that makes samples of a score model."""

    def __call__(self, score: ScoreModel, graph: Graph, shape: tuple[int, int], generator: Generator, /) -> Tensor:
        """(B, L) int64 tokens."""


def scheduled(
    scheduler: Any,
    steps: int,
    *,
    level: Callable[[Tensor], Tensor],
    output: Callable[[Tensor], Tensor] = torch.log,
) -> Sampler:
    """A scheduler as a sampler.

    Args:
        scheduler: see above; its `step` may leave the generator alone.
        steps: how many.
        level: a timestep () -> the total noise sigma () of the states at it.
        output: p(x0 | x_t) (B, L, N) -> what its network would have said; the logarithm by default. Of models that put
            the tokens before the positions: `lambda p: p.log().transpose(1, 2)`.

    Returns:
        (score, graph, shape, generator) -> samples.
    """

    def run(score: ScoreModel, graph: Graph, shape: tuple[int, int], generator: Generator) -> Tensor:
        scheduler.set_timesteps(steps)
        posterior = to_posterior(score, graph)
        x = torch.multinomial(
            limit_law(graph, torch.device("cpu")), shape[0] * shape[1], replacement=True, generator=generator
        ).view(shape)
        for timestep in scheduler.timesteps:
            sigma = level(torch.as_tensor(timestep)).double().expand(len(x))
            said = output(posterior(x, sigma))
            stepped = scheduler.step(said, timestep, x, generator=generator)
            x = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        return x

    return run


def sampler_reaches_the_law(sampler: Sampler, graph: Graph, *, count: int = 4000) -> None:
    """Pairs of tokens that depend on each other have the law of the data, by a chi-square test (see `ALARM`).

    Its resolution: a total variation of about .03 at 4000 samples.
    """
    pairs = Pairs(graph)
    x = sampler(pairs.score, graph, (count, 2), torch.Generator().manual_seed(0))
    assert x.shape == (count, 2), f"expected samples of shape {(count, 2)}, got {tuple(x.shape)}"
    assert x.dtype == torch.int64, f"samples are int64 states, got {x.dtype}"
    assert ((x >= 0) & (x < graph.num_states)).all(), f"a sample holds a state outside 0..{graph.num_states - 1}"
    assert graph.mask_id is None or not (x == graph.mask_id).any(), "a mask is left in a sample"
    check_frequencies(x, pairs.p0.flatten(), "samples, and the law of the data")

"""Laws of what is drawn: samples of x_t and of the prior follow the probabilities that the graph states."""

from __future__ import annotations

import math
from typing import Any

import torch

from sedd_graphs.testing._support import (
    SAMPLES,
    assert_frequencies,
    dense,
    law,
    tokens_of,
)

__all__ = [
    "samples_follow_the_transition",
    "prior_samples_follow_the_limit",
]


@law
def samples_follow_the_transition(graph: Any) -> None:
    """Frequencies of sample(x0, sigma) are transition_from(x0, sigma); a false alarm in 10 million frequencies."""
    for s in (1e-3, 0.5, 20.0):
        for x0 in {0, graph.num_states // 2, graph.num_states - 1}:
            start, generator = torch.full((SAMPLES,), x0), torch.Generator().manual_seed(x0)
            drawn = graph.sample(start, torch.tensor(s), generator=generator)
            again = graph.sample(start, torch.tensor(s), generator=torch.Generator().manual_seed(x0))
            assert torch.equal(drawn, again), "the same generator must give the same sample"
            p = dense(graph.transition_from(start[:1], torch.tensor(s)), graph)[0]
            assert_frequencies(drawn, p, f"sample from x0 = {x0} at sigma = {s}")


@law
def samples_are_independent(graph: Any) -> None:
    """Two positions, and two sequences, of one batch are drawn apart, each at its own noise; sigma (B,) and (B, L).

    Frequencies of pairs against products of probabilities; a false alarm in 10 million frequencies.
    """
    x0 = torch.stack([tokens_of(graph)[0], tokens_of(graph)[-1]]).expand(SAMPLES, 2)
    few, much = torch.tensor([0.2, 1.5]), torch.tensor([1.5, 0.2])
    for levels in (torch.stack([few[:1], much[:1]]), torch.stack([few, much])):  # of every other sequence
        sigma = levels.repeat(SAMPLES // 2, 1)
        sigma = sigma[:, 0] if sigma.shape[1] == 1 else sigma
        drawn = graph.sample(x0, sigma, generator=torch.Generator().manual_seed(0))
        each = levels.expand(2, 2)
        p = dense(graph.transition_from(x0[:2].contiguous(), each), graph)  # of sequences 0 and 1, positions 0 and 1
        pairs = {
            "two positions of the first sequences": (drawn[0::2, 0], drawn[0::2, 1], p[0, 0], p[0, 1]),
            "two positions of the second sequences": (drawn[1::2, 0], drawn[1::2, 1], p[1, 0], p[1, 1]),
            "the first positions of two sequences": (drawn[0::2, 0], drawn[1::2, 0], p[0, 0], p[1, 0]),
        }
        for name, (one, other, p_one, p_other) in pairs.items():
            joint = (p_one[:, None] * p_other).flatten()
            what = f"sigma of shape {tuple(sigma.shape)}, {name}, each of the pairs"
            assert_frequencies(one * graph.num_states + other, joint, what)


@law
def prior_samples_follow_the_limit(graph: Any) -> None:
    """Frequencies of sample_prior are prior(inf), by its generator; a false alarm in 10 million frequencies."""
    drawn = graph.sample_prior((SAMPLES // 100, 100), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (SAMPLES // 100, 100), f"sample_prior must have the shape asked for, got {drawn.shape}"
    again = graph.sample_prior(drawn.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again), "the same generator must give the same sample of the prior"
    limit = dense(graph.prior(torch.tensor(math.inf)), graph)
    pair = (limit[:, None] * limit).flatten()
    assert_frequencies(drawn[:, 0::2].flatten() * graph.num_states + drawn[:, 1::2].flatten(), pair, "pairs of a prior")
    assert_frequencies(drawn.flatten(), dense(graph.prior(torch.tensor(math.inf)), graph), "sample_prior")

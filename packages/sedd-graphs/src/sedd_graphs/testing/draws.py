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
def prior_samples_follow_the_limit(graph: Any) -> None:
    """Frequencies of sample_prior are prior(inf), by its generator; a false alarm in 10 million frequencies."""
    drawn = graph.sample_prior((SAMPLES // 100, 100), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (SAMPLES // 100, 100), f"sample_prior must have the shape asked for, got {drawn.shape}"
    again = graph.sample_prior(drawn.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again), "the same generator must give the same sample of the prior"
    assert_frequencies(drawn.flatten(), dense(graph.prior(torch.tensor(math.inf)), graph), "sample_prior")

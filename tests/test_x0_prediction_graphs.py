"""Losses of models of the clean token on the graphs of sedd-graphs: score entropy of the score that they imply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Clustered, Dense, Hybrid, Masked, Ordinal, Uniform
from sedd_objectives import denoising_score_entropy, leave_one_out_score_entropy, posterior_score_entropy


def _dense() -> Dense:
    rates = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)
    return Dense(rates - torch.diag(rates.sum(0)))


GRAPHS: list[Any] = [
    Uniform(6),
    Absorbing(6, mask_id=2),
    Hybrid(6, uniform_rate=0.5, mask_rate=1.0, mask_id=0),
    Clustered.kimura(3.0),
    Clustered([0, 0, 1, 1, 1, 2], within=1.0, between=0.0),
    Ordinal(9),
    Masked(Ordinal(7), mask_id=3),
    Masked(Clustered.kimura(2.0), rate=0.3),
    _dense(),
    Masked(_dense(), mask_rate=0.2, mask_id=1),
]
LOSSES = [posterior_score_entropy, leave_one_out_score_entropy]


def _implied(logits: torch.Tensor, graph: Any, x: torch.Tensor, sigma: float, by_posterior: bool) -> torch.Tensor:
    """The log-score at one level of noise from the whole matrix exp(sigma Q), whose rows the graph gives in float64."""
    states = torch.arange(graph.num_states)
    T = graph.transition_into(states, torch.full((graph.num_states,), sigma, dtype=torch.float64)).dense()
    if graph.mask_id is not None:
        logits = logits.index_fill(-1, torch.tensor([graph.mask_id]), -torch.inf)
    likelihood = T[x]
    v = logits.masked_fill(likelihood == 0, -torch.inf).softmax(-1) if by_posterior else logits.softmax(-1)
    v = torch.where(likelihood > 0, v / torch.where(likelihood > 0, likelihood, 1), 0) if by_posterior else v
    moved = torch.einsum("yc,...c->...y", T, v)
    score: torch.Tensor = moved / (likelihood * v).sum(-1, keepdim=True)
    return score.log()


@pytest.mark.parametrize("sigma", [1e-9, 1e-3, 0.4, 20.0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_is_the_denoising_score_entropy_of_the_implied_score(graph: Any, loss: Any, sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([y for y in range(graph.num_states) if y != graph.mask_id])
    x0 = tokens[torch.randint(len(tokens), (3, 20), generator=generator)]
    levels = torch.full((3,), sigma, dtype=torch.float64)
    x = graph.sample(x0, levels, generator=generator)
    logits = 2 * torch.randn(3, 20, graph.num_states, generator=generator, dtype=torch.float64)
    score = _implied(logits, graph, x, sigma, loss is posterior_score_entropy)
    want = denoising_score_entropy(score, graph, x, x0, levels)
    torch.testing.assert_close(loss(logits, graph, x, x0, levels), want, rtol=1e-6, atol=1e-9)
    single = loss(logits.float(), graph, x, x0, levels.float())
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sigma", [1e-12, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("graph", [Uniform(50_257), Hybrid(50_257, uniform_rate=0.3, mask_rate=1.0), Ordinal(1024)])
def test_large_vocabularies_in_single_precision(graph: Any, loss: Any, sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(graph.num_states - 1, (1, 4), generator=generator)
    levels = torch.full((1,), sigma)
    x = graph.sample(x0, levels, generator=generator)
    logits = torch.randn(1, 4, graph.num_states, generator=generator, requires_grad=True)
    found = loss(logits, graph, x, x0, levels)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()

"""Graphs and losses under torch.compile: a graph's rows and draws with the plain score entropy in one graph.

The losses read values back, which positions can move for one, and are compiled in parts around that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Dense,
    Hybrid,
    LogLinear,
    Masked,
    Neighbours,
    Ordinal,
    PacedAbsorbing,
    Uniform,
)
from sedd_objectives import denoising_loss, denoising_score_entropy, plain_score_entropy
from torch import Tensor

RATES = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).double().fill_diagonal_(0)
GRAPHS: list[Any] = [  # the first two in the quick session: one of closed forms, one of opaque operations
    Masked(Clustered([0, 0, 1, 1, 2], within=1.0, between=0.3), mask_rate=0.5, mask_id=0),
    Neighbours(torch.tensor([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [4, 0]]), between=0.5),
    Uniform(6),
    Absorbing(5, mask_id=2),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4),
    Ordinal(6),
    Clustered([0, 0, 1, 1, 1, 2], within=1.0, between=0.3),
    PacedAbsorbing(torch.tensor([0.5, 1.0, 3.0, 1.0, 2.0]), mask_id=2),
    Dense(RATES - RATES.sum(0).diag()),
    Masked(Ordinal(5), mask_id=1),
]


TIMES = torch.tensor([0.3, 0.7])


def batch(graph: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x0, sigma and log-scores of two sequences."""
    generator, sigma = torch.Generator().manual_seed(0), LogLinear()(TIMES)[0]
    tokens = torch.tensor([y for y in range(6) if y != graph.mask_id])
    x0 = tokens[torch.randint(len(tokens), (2, 3), generator=generator)]
    x = graph.sample(x0, sigma, generator=generator)
    return x, x0, sigma, torch.randn(2, 3, 6, generator=generator)


def quick(count: int) -> list[Any]:
    """All graphs, all but the first ones in the slow session alone."""
    return [pytest.param(g, marks=() if i < count else pytest.mark.slow) for i, g in enumerate(GRAPHS)]


@pytest.mark.filterwarnings("default")  # the compiler reads every attribute of what it traces, deprecated ones too
@pytest.mark.parametrize("graph", quick(2), ids=repr)
def test_rows_and_draws_with_the_formula_are_one_graph(graph: Any) -> None:
    x, x0, sigma, log_score = batch(graph)

    def whole(x: Tensor, x0: Tensor, sigma: Tensor, log_score: Tensor) -> tuple[Tensor, ...]:
        ratio = graph.ratio(x, x0, sigma).dense()
        weight = graph.rates_into(x).dense().scatter(-1, x[..., None], 0)
        rows = graph.transition_from(x0, sigma).dense(), graph.transition_into(x, sigma).dense()
        return plain_score_entropy(log_score, ratio, weight, x), graph.sample(x0, sigma), *rows

    torch._dynamo.reset()
    loss, drawn, *rows = torch.compile(whole, fullgraph=True, backend="eager")(x, x0, sigma, log_score)
    torch.testing.assert_close(loss, denoising_score_entropy(log_score, graph, x, x0, sigma), rtol=1e-5, atol=1e-6)
    assert drawn.shape == x0.shape
    assert ((drawn >= 0) & (drawn < 6)).all()
    torch.testing.assert_close(rows, [*whole(x, x0, sigma, log_score)[2:]])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("graph", quick(0), ids=repr)
def test_losses_are_compiled_in_parts(graph: Any) -> None:
    x, x0, _, log_score = batch(graph)

    def loss(x0: Tensor, x: Tensor, log_score: Tensor) -> Tensor:
        return denoising_loss(lambda x, sigma: log_score, graph, LogLinear(), x0, TIMES, xt=x)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager")(x0, x, log_score), loss(x0, x, log_score))


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_the_formula_takes_functional_transforms(graph: Any) -> None:
    """Each sequence's own gradient, by torch.func.vmap of torch.func.grad, is the loss's by autograd."""
    x, x0, sigma, log_score = batch(graph)

    def plain(log_score: Tensor, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        weight = graph.rates_into(x).dense().scatter(-1, x[..., None], 0)
        return plain_score_entropy(log_score, graph.ratio(x, x0, sigma).dense(), weight, x).sum()

    found = torch.func.vmap(torch.func.grad(plain))(log_score, x, x0, sigma)
    leaf = log_score.clone().requires_grad_()
    (slope,) = torch.autograd.grad(denoising_score_entropy(leaf, graph, x, x0, sigma).sum(), leaf)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_losses_run_under_inference_mode_and_have_slopes_after_it(graph: Any) -> None:
    """What was computed under it first leaves nothing behind that a gradient would trip over."""
    x, x0, _, log_score = batch(graph)

    def loss(log_score: Tensor) -> Tensor:
        return denoising_loss(lambda x, sigma: log_score, graph, LogLinear(), x0, TIMES, xt=x)

    with torch.inference_mode():
        first = loss(log_score.clone())
    leaf = log_score.requires_grad_()
    again = loss(leaf)
    torch.testing.assert_close(again.detach(), first.clone())
    (slope,) = torch.autograd.grad(again.sum(), leaf)
    assert slope.isfinite().all()

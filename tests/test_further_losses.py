"""The losses beyond the denoising one, on the graphs of sedd-graphs and the networks of sedd-nets.

sedd-objectives tests their mathematics on graphs of its own; here they meet the others' closed forms and conventions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Dense, Geometric, Hybrid, LogLinear, Uniform
from sedd_nets import RADD
from sedd_objectives import (
    any_order_loss,
    cross_entropy_loss,
    d3pm_bound,
    d3pm_loss,
    denoising_loss,
    enumerated_implicit_score_entropy_loss,
    implicit_score_entropy_loss,
    monte_carlo,
)
from torch import Tensor


def _dense() -> Dense:
    rates = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)
    return Dense(rates - torch.diag(rates.sum(0)))


GRAPHS: dict[str, Any] = {
    "absorbing": (lambda: Absorbing(4), LogLinear()),
    "absorbing, mask first": (lambda: Absorbing(4, mask_id=0), LogLinear()),
    "uniform": (lambda: Uniform(4), Geometric()),
    "hybrid": (lambda: Hybrid(4, uniform_rate=0.5, mask_rate=1.0), LogLinear()),
    "dense": (_dense, LogLinear()),
}


@pytest.fixture(params=GRAPHS)
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    make, noise = GRAPHS[request.param]
    graph = make()
    tokens = torch.tensor([state for state in range(graph.num_states) if state != graph.mask_id])
    return graph, noise, tokens[torch.randint(len(tokens), (8, 3), generator=torch.Generator().manual_seed(1))]


def _table(num_states: int) -> Any:
    """A model of the state and its left neighbour, time-free."""
    table = torch.randn(num_states, num_states, num_states, generator=torch.Generator().manual_seed(2))
    return lambda x, sigma: table[x, x.roll(1, -1)]


def test_sampled_implicit_score_entropy_is_the_enumerated_one(parts: tuple[Any, Any, Tensor]) -> None:
    """Within 5 standard errors for each of 8 sequences: a false alarm in 200,000 runs a graph."""
    graph, noise, x0 = parts
    generator = torch.Generator().manual_seed(3)
    sigma = noise(torch.full((8,), 0.5))[0]
    x, score = graph.sample(x0, sigma, generator=generator), _table(graph.num_states)
    exact = enumerated_implicit_score_entropy_loss(score, graph, x, sigma)
    found = monte_carlo(lambda: implicit_score_entropy_loss(score, graph, x, sigma, generator=generator), 100)
    assert ((found.value - exact).abs() < 5 * found.standard_error + 1e-4).all()


@pytest.mark.parametrize("num_steps", [1, 12])
def test_d3pm_bound_is_the_entropy_where_every_step_is_exact(parts: tuple[Any, Any, Tensor], num_steps: int) -> None:
    """Independent uniform tokens, whose p_1 is the prior. Within 4.5 standard errors: a false alarm in 150,000 runs.

    0.01 nats are added for what an absorbing process leaves unmasked at the end, too rarely to be seen in the spread.
    """
    graph, noise, _ = parts
    tokens = torch.tensor([state for state in range(graph.num_states) if state != graph.mask_id])

    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        logits: Tensor = graph.transition_into(x, sigma).dense().log()
        return logits

    generator = torch.Generator().manual_seed(4)
    x0 = tokens[torch.randint(len(tokens), (300, 3), generator=generator)]
    bound = d3pm_bound(
        posterior, graph, noise, x0, num_steps=num_steps, num_times=6, num_reconstructions=2, generator=generator
    )
    error = float(bound.value.std()) / len(x0) ** 0.5
    assert abs(float(bound.value.mean()) - 3 * math.log(len(tokens))) < 4.5 * error + 0.01
    assert error < 0.4
    assert d3pm_loss(posterior, graph, noise, x0, num_steps=num_steps, generator=generator).isfinite().all()


@pytest.mark.parametrize("mask_id", [4, 0])
def test_radd_has_one_loss_as_a_score_model_and_as_a_model_of_clean_tokens(mask_id: int) -> None:
    torch.manual_seed(0)
    graph, noise = Absorbing(4, mask_id=mask_id), LogLinear()
    net = RADD(5, width=16, depth=1, heads=2, length=6, mask_id=mask_id).eval()
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
    tokens = torch.tensor([state for state in range(5) if state != mask_id])
    x0 = tokens[torch.randint(4, (4, 6))]
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    xt = graph.sample(x0, noise(t)[0])
    with torch.no_grad():
        score_entropy = denoising_loss(net, graph, noise, x0, t, xt=xt)
        cross_entropy = cross_entropy_loss(net.log_conditional, graph, noise, x0, t, xt=xt)
        torch.testing.assert_close(score_entropy, cross_entropy, rtol=1e-5, atol=1e-5)
        assert any_order_loss(net.log_conditional, graph, x0).isfinite().all()

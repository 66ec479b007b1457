"""The packages fit together: what one provides has what another declares that it needs.

Statically, mypy checks the assignments below (`nox -s types`). At run time every pair is put through its paces.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import sedd_objectives.interfaces as wanted_by_losses
import sedd_samplers.interfaces as wanted_by_samplers
import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Dense,
    Geometric,
    Hybrid,
    LogLinear,
    Masked,
    Neighbours,
    Ordinal,
    PacedAbsorbing,
    Uniform,
)
from sedd_nets import SEDD
from sedd_objectives import denoising_loss, likelihood_bound, reconstruction_loss
from sedd_samplers import Euler, Tweedie, clamped, infill, sample
from torch import Tensor

# Statically


def graphs_are_what_losses_want(
    absorbing: Absorbing,
    uniform: Uniform,
    masked: Masked,
    dense: Dense,
    ordinal: Ordinal,
    clustered: Clustered,
    paced: PacedAbsorbing,
    neighbours: Neighbours,
) -> list[wanted_by_losses.LikelihoodGraph]:
    return [absorbing, uniform, masked, dense, ordinal, clustered, paced, neighbours]


def graphs_are_what_further_losses_want(
    absorbing: Absorbing, uniform: Uniform, hybrid: Hybrid, dense: Dense
) -> tuple[list[wanted_by_losses.ImplicitGraph], list[wanted_by_losses.DiscreteTimeGraph]]:
    return [absorbing, uniform, hybrid, dense], [absorbing, uniform, hybrid, dense]


def graphs_are_what_samplers_want(
    absorbing: Absorbing,
    uniform: Uniform,
    masked: Masked,
    dense: Dense,
    ordinal: Ordinal,
    clustered: Clustered,
    paced: PacedAbsorbing,
    neighbours: Neighbours,
) -> list[wanted_by_samplers.Graph]:
    return [absorbing, uniform, masked, dense, ordinal, clustered, paced, neighbours]


def schedules_are_what_both_want(
    loglinear: LogLinear, geometric: Geometric
) -> tuple[list[wanted_by_losses.Noise], list[wanted_by_samplers.Noise]]:
    return [loglinear, geometric], [loglinear, geometric]


def networks_are_what_both_want(net: SEDD) -> tuple[wanted_by_losses.ScoreModel, wanted_by_samplers.ScoreModel]:
    # of nn.Module's __call__ a type checker knows nothing, so it is the forward that is asserted
    return net.forward, net.forward


# At run time

Parts = tuple[Any, Any, SEDD]


def _dense() -> Dense:
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(5, 5, dtype=torch.float64, generator=generator)
    rates.fill_diagonal_(0)
    return Dense(rates - torch.diag(rates.sum(0)))


def _dense_with_a_mask() -> Dense:
    """The absorbing graph as a matrix: at little noise no position of a batch can move."""
    Q = -torch.eye(6)
    Q[2] += 1
    return Dense(Q, mask_id=2)


PAIRS: dict[str, Any] = {
    "absorbing": (lambda: Absorbing(5), LogLinear()),
    "absorbing, mask first": (lambda: Absorbing(5, mask_id=0), LogLinear()),
    "uniform": (lambda: Uniform(5), Geometric()),
    "hybrid": (lambda: Hybrid(5, uniform_rate=0.5, mask_rate=1.0), LogLinear()),
    "dense": (_dense, Geometric()),
    "dense with a mask": (_dense_with_a_mask, LogLinear()),
    "ordinal": (lambda: Ordinal(5), LogLinear()),
    "absorbing at paces": (lambda: PacedAbsorbing(torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0]), mask_id=2), LogLinear()),
    "neighbours": (lambda: Neighbours(torch.tensor([[1], [2], [3], [4], [0]]), between=0.5), Geometric()),
    "masked clustered": (lambda: Masked(Clustered([0, 0, 1, 1, 1], within=1.0, between=0.1)), LogLinear()),
}


@pytest.fixture(params=PAIRS, ids=str)
def parts(request: pytest.FixtureRequest) -> Parts:
    make, noise = PAIRS[request.param]
    graph = make()
    torch.manual_seed(0)
    net = SEDD(
        graph.num_states, width=16, depth=1, heads=2, cond_dim=8, length=4, scale_by_sigma="absorb" in request.param
    )
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)  # it starts at zero, where all scores are equal
    return graph, noise, net.eval()


def _tokens(graph: Any, shape: tuple[int, ...]) -> Tensor:
    tokens = [state for state in range(graph.num_states) if state != graph.mask_id]
    chosen = torch.randint(len(tokens), shape, generator=torch.Generator().manual_seed(1))
    return torch.tensor(tokens)[chosen]


def test_protocols_parameters_are_offered_under_their_names(parts: Parts) -> None:
    """Keyword parameters that a consumer declares are there, whatever the class calls its positional ones."""
    graph, _, _ = parts
    for protocol in (wanted_by_losses.LikelihoodGraph, wanted_by_samplers.Graph):
        for name, member in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                keywords = [p.name for p in inspect.signature(member).parameters.values() if p.kind is p.KEYWORD_ONLY]
                assert set(keywords) <= set(inspect.signature(getattr(graph, name)).parameters)


def test_a_network_trains_on_every_graph(parts: Parts) -> None:
    graph, noise, net = parts
    x0 = _tokens(graph, (6, 4))
    losses = []
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    t = torch.linspace(0.1, 0.9, 6)
    xt = graph.sample(x0, noise(t)[0], generator=torch.Generator().manual_seed(2))
    for _ in range(20):
        loss = denoising_loss(net, graph, noise, x0, t, xt=xt)
        assert loss.shape == (6,)
        assert loss.isfinite().all()
        optimizer.zero_grad()
        torch.autograd.backward(loss.mean())
        optimizer.step()
        losses.append(float(loss.mean().detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_rows_on_demand_are_the_rows_of_the_whole(parts: Parts) -> None:
    """A score model that offers `where` and the same one that does not give the same loss and the same sample."""
    graph, noise, net = parts
    x0 = _tokens(graph, (6, 4))

    def without_where(x: Tensor, sigma: Tensor) -> Tensor:
        log_score: Tensor = net(x, sigma)
        return log_score

    def run(score: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            loss = denoising_loss(score, graph, noise, x0, generator=torch.Generator().manual_seed(3))
        return loss, sample(score, graph, noise, shape=(3, 4), steps=8, generator=torch.Generator().manual_seed(4))

    loss, x = run(net)
    loss_without, x_without = run(without_where)
    torch.testing.assert_close(loss, loss_without, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, x_without)


@pytest.mark.parametrize("method", [Euler(), Tweedie()], ids=["euler", "tweedie"])
def test_samples_are_tokens_and_prompts_stay(parts: Parts, method: Any) -> None:
    graph, noise, net = parts
    x = _tokens(graph, (5, 4))
    given = torch.rand(5, 4, generator=torch.Generator().manual_seed(5)) < 0.5
    generator = torch.Generator().manual_seed(6)
    y = infill(net, graph, noise, x=x, given=given, steps=6, method=method, generator=generator, conditioning=clamped)
    assert torch.equal(y[given], x[given])
    assert graph.mask_id not in y.flatten().tolist()
    assert ((y >= 0) & (y < graph.num_states)).all()


def test_the_bound_has_its_three_terms(parts: Parts) -> None:
    graph, noise, net = parts
    x0 = _tokens(graph, (3, 4))
    bound = likelihood_bound(net, graph, noise, x0, num_times=16, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(bound.value, bound.diffusion + bound.prior + bound.reconstruction)
    assert bound.value.isfinite().all()
    assert (bound.standard_error > 0).all()


@pytest.mark.parametrize("graph", [Absorbing(5, mask_id=2), _dense_with_a_mask()], ids=repr)
def test_a_batch_that_cannot_move_costs_nothing(graph: Any) -> None:
    """No mask is left, so that losses ask the graph and the network for the rows of no position."""
    torch.manual_seed(0)
    net = SEDD(6, width=16, depth=1, heads=2, cond_dim=8, length=4, scale_by_sigma=True).eval()
    x0, t = _tokens(graph, (3, 4)), torch.full((3,), 1e-3)
    loss = denoising_loss(net, graph, LogLinear(), x0, t, xt=x0)
    torch.autograd.backward(loss.sum())
    assert (loss == 0).all()
    assert (reconstruction_loss(net, graph, LogLinear(), x0, t, xt=x0) == 0).all()
    given = torch.ones_like(x0, dtype=torch.bool)
    assert torch.equal(infill(net, graph, LogLinear(), x=x0, given=given, steps=2), x0)

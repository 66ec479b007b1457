"""One meaning of `weight` and of `given` in every loss and bound.

weight = 0    the position is noised like the others, its model output does not count
given         the position stays clean, is seen, and its model output does not count
weight        otherwise multiplies the position's part of the result
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import sedd_objectives as objectives
import torch

MASK, SIZE = 3, (400, 4)
X0 = torch.randint(3, SIZE, generator=torch.Generator().manual_seed(0))
ZERO, GIVEN = 0, 1
"""The position whose weight is 0, and the one that is given; the other two count."""


class Row(NamedTuple):
    base: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # the name is the rows', and a tuple has a method of it
    value: torch.Tensor


class Process:
    """The absorbing one as a process of t itself."""

    def __init__(self, graph, noise):
        self.graph, self.noise, self.num_states, self.mask_id = graph, noise, graph.num_states, graph.mask_id

    def sample(self, x0, t, *, generator=None):
        return self.graph.sample(x0, self.noise(t)[0], generator=generator)

    def rates_into(self, x, t):
        row, pace = self.graph.rates_into(x), self.noise(t)[1]
        pace = pace.reshape(pace.shape + (1,) * (x.ndim - pace.ndim)).expand(x.shape)
        return type(row)(row.base * pace, row.index, row.value * pace[..., None])

    def propagate(self, v, t):
        return self.graph.propagate(v, self.noise(t)[0])


class WithPrior:
    """A graph that says its prior, as those of sedd-graphs do."""

    def __init__(self, graph):
        self.graph = graph

    def __getattr__(self, name):
        return getattr(self.graph, name)

    def prior(self, sigma):
        tokens = torch.tensor([1.0, 1, 1, 0], dtype=sigma.dtype) / 3
        value = self.graph.propagate(tokens, sigma)
        return Row(torch.zeros_like(value[..., 0]), torch.arange(4), value)


def fused(call):
    """A loss from the hidden states: x is the caller's, and the hidden states are what the model says."""

    def loss(model, graph, noise, x0, *, generator, given=None, **how):
        sigma, dsigma = noise(torch.full((len(x0),), 0.5))
        x = graph.sample(x0, sigma, generator=generator)
        x = x if given is None else torch.where(given, x0, x)
        found = call(model(x, sigma), graph, x, x0, sigma, dsigma, given=given, **how)
        return found.per_sequence

    return loss


def implicit(call):
    def loss(model, graph, noise, x0, *, generator, given=None, **how):
        sigma, dsigma = noise(torch.full((len(x0),), 0.5))
        x = graph.sample(x0, sigma, generator=generator)
        x = x if given is None else torch.where(given, x0, x)
        how |= {"generator": generator} if call is objectives.implicit_score_entropy_loss else {}
        return dsigma * call(model, graph, x, sigma, given=given, **how)

    return loss


def linear(graph):
    return SimpleNamespace(weight=torch.eye(graph.num_states), bias=None, shift=None)


o = objectives
LATE = torch.full(SIZE[:1], 0.5)
LOSSES: dict[str, Any] = {
    "denoising_loss": o.denoising_loss,
    "likelihood_bound": lambda *args, **how: o.likelihood_bound(*args, num_times=4, num_reconstructions=2, **how).value,
    "masked_likelihood_bound": lambda *args, **how: o.masked_likelihood_bound(*args, num_times=4, **how).value,
    "elbo_loss": o.elbo_loss,
    "reconstruction_loss": lambda m, g, n, x0, **how: o.reconstruction_loss(m, g, n, x0, LATE, **how),
    "snapshot_loss": o.snapshot_loss,
    "snapshot_bound": lambda m, g, n, x0, **how: (
        o.snapshot_bound(m, WithPrior(g), n, x0, num_times=4, num_reconstructions=2, **how).value
    ),
    "cross_entropy_loss": o.cross_entropy_loss,
    "lambda_cross_entropy_loss": lambda m, g, n, x0, **how: o.lambda_cross_entropy_loss(m, g, x0, **how),
    "any_order_loss": lambda m, g, n, x0, **how: o.any_order_loss(m, g, x0, **how),
    "posterior_loss": o.posterior_loss,
    "leave_one_out_loss": o.leave_one_out_loss,
    "time_varying_loss": lambda m, g, n, x0, **how: o.time_varying_loss(m, Process(g, n), x0, **how),
    "d3pm_loss": lambda *args, **how: o.d3pm_loss(*args, num_steps=5, **how),
    "d3pm_bound": lambda *args, **how: o.d3pm_bound(*args, num_steps=5, num_times=4, **how).value,
    "autoregressive_loss": lambda m, g, n, x0, *, generator, **how: o.autoregressive_loss(
        lambda x: m(x, None), x0, start=0, **how
    ),
    "fused_denoising_loss": fused(
        lambda hidden, *args, **how: o.fused_denoising_loss(hidden, lambda h, x, s: h, *args, **how)
    ),
    "fused_cross_entropy_loss": fused(
        lambda hidden, graph, *args, **how: o.fused_cross_entropy_loss(hidden, linear(graph), graph, *args, **how)
    ),
    "implicit_score_entropy_loss": implicit(o.implicit_score_entropy_loss),
    "enumerated_implicit_score_entropy_loss": implicit(o.enumerated_implicit_score_entropy_loss),
}


class Model:
    """Log-scores or logits that know nothing, NaN at some positions; keeps what it has seen."""

    def __init__(self, silent=()):
        self.silent, self.seen = list(silent), []

    def __call__(self, x, sigma):
        self.seen.append(x)
        out = 0.1 * torch.arange(4.0).expand(*x.shape, 4) + 0.3 * torch.arange(x.shape[1])[:, None]
        return out.index_fill(1, torch.tensor(self.silent, dtype=torch.int64), torch.nan)


def test_this_is_all_of_them():
    names = {name for name in objectives.__all__ if name.endswith(("_loss", "_bound"))}
    assert names == set(LOSSES)


@pytest.fixture
def measure(make_graphs, log_linear):
    """measure(name, model, ...) -> (B,), always with the same random numbers."""
    graph = make_graphs(3)["absorbing"]

    def call(name, model, **how):
        x0 = how.pop("x0", X0)
        return LOSSES[name](model, graph, log_linear, x0, generator=torch.Generator().manual_seed(1), **how)

    return call


@pytest.mark.parametrize("name", LOSSES)
def test_weight_0_is_noised_and_given_is_clean_and_neither_counts(name, measure):
    weight, given = torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.bool)
    causal = name == "autoregressive_loss"  # a prefix is given, and nothing is noised
    zero, kept = (ZERO, GIVEN) if not causal else (GIVEN, ZERO)
    weight[:, zero], given[:, kept] = 0, True
    silent = Model([zero, kept])
    found = measure(name, silent, weight=weight, given=given)
    assert found.shape == SIZE[:1]
    assert found.isfinite().all()
    torch.testing.assert_close(found, measure(name, Model(), weight=weight, given=given))
    if causal:
        return
    for x in silent.seen:
        if x.shape == X0.shape:
            assert torch.equal(x[:, kept], X0[:, kept])
    noised = torch.cat([x[:, zero] for x in silent.seen if x.shape == X0.shape])
    assert (noised == MASK).any()


@pytest.mark.parametrize("name", LOSSES)
def test_weights_multiply(name, measure):
    """Twice the weight is twice the number; the parts of the positions add up to the whole."""
    weight = torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) + 0.5
    whole = measure(name, Model(), weight=weight)
    torch.testing.assert_close(measure(name, Model(), weight=2 * weight), 2 * whole, rtol=1e-4, atol=1e-5)
    if name in ("implicit_score_entropy_loss", "snapshot_bound"):  # which neighbour is drawn depends on the weights
        return
    one_hot = torch.eye(SIZE[1])
    parts = sum(measure(name, Model(), weight=weight * one_hot[i]) for i in range(SIZE[1]))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_left_to_count_is_asked_for_by_one_rule(name, measure):
    given = torch.zeros(SIZE, dtype=torch.bool)
    given[:, 0] = True
    with pytest.raises(ValueError, match="every position is given or has a weight of 0"):
        measure(name, Model(), weight=given.float(), given=given)
    with pytest.raises(ValueError, match="given is true at every position"):
        measure(name, Model(), given=torch.ones(SIZE, dtype=torch.bool))
    with pytest.raises(ValueError, match="weight is 0 at every position"):
        measure(name, Model(), weight=torch.zeros(SIZE))
    with pytest.raises(ValueError, match="weight must be >= 0"):
        measure(name, Model(), weight=-torch.ones(SIZE))


RULED_OUT = {
    name: LOSSES[name]
    for name in (
        *("cross_entropy_loss", "lambda_cross_entropy_loss", "any_order_loss", "posterior_loss", "leave_one_out_loss"),
        *("time_varying_loss", "snapshot_loss", "d3pm_loss", "autoregressive_loss", "denoising_loss"),
    )
}


@pytest.mark.parametrize("never", [False, True])
@pytest.mark.parametrize("name", RULED_OUT)
def test_what_a_model_rules_out_and_happens_costs_without_end(name, never, measure):
    """Token 1, in half of the sequences at every position; where it does not occur, to rule it out costs nothing."""
    x0 = X0.clone()
    x0[:200] = x0[:200].clamp_max(0)
    x0[200:] = 2 if never else 1

    def model(x, sigma):
        return Model()(x, sigma).index_fill(-1, torch.tensor([1]), -torch.inf)

    found = measure(name, model, x0=x0)
    assert found[:200].isfinite().all()
    if never:
        assert found.isfinite().all()
        assert (found > 0).any()
        return
    assert found[200:].isinf().double().mean() > 0.5
    assert ((found[200:] == 0) | (found[200:] == torch.inf)).all()


def test_so_it_does_at_a_position(make_graphs):
    logits = torch.zeros(1, 2, 4).index_fill(-1, torch.tensor([1]), -torch.inf)
    x, x0, sigma = torch.tensor([[MASK, MASK]]), torch.tensor([[1, 2]]), torch.ones(1)
    graph = make_graphs(3)["absorbing"]
    for loss in (o.posterior_score_entropy, o.leave_one_out_score_entropy):
        found = loss(logits, graph, x, x0, sigma)
        assert found[0, 0] == torch.inf
        assert float(found[0, 1]) == pytest.approx(float(torch.tensor(2.0).log() / sigma.expm1()), rel=1e-5)

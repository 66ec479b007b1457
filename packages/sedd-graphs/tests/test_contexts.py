"""Graphs and schedules where others have them run: threads, pickles, no gradients, transforms, no values."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Cosine,
    Dense,
    Geometric,
    Hybrid,
    Learned,
    Linear,
    LogLinear,
    Masked,
    MaskProbability,
    Neighbours,
    Ordinal,
    PacedAbsorbing,
    Polynomial,
    Uniform,
)
from sedd_graphs._constants import Constant


def chain(n, *, reversible=False):
    rates = torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.01
    rates = (rates + rates.T if reversible else rates).fill_diagonal_(0)
    return Dense(rates - rates.sum(0).diag())


def smooth_step(t):
    return 0.9 * t * t * (3 - 2 * t)


GRAPHS = [
    Absorbing(5, mask_id=2),
    Uniform(6),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4),
    Masked(Ordinal(5), mask_id=0),
    chain(6),
    chain(6, reversible=True),
    Ordinal(6),
    Clustered([0, 0, 1, 1, 1, 2], within=1.0, between=0.3),
    PacedAbsorbing(torch.tensor([0.5, 1.0, 3.0, 1.0, 2.0]), mask_id=2),
    Neighbours(torch.tensor([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [4, 0]]), between=1.0),
]
SCHEDULES = [
    *(LogLinear(), Cosine(), Polynomial(), Geometric(), Linear(), MaskProbability(smooth_step), Learned(Cosine())),
]
X0 = torch.tensor([[1, 3, 4], [5, 4, 1]])
X = torch.tensor([[1, 3, 4], [5, 4, 1]])
SIGMA = torch.tensor([0.5, 1.5])


@pytest.fixture(params=GRAPHS, ids=lambda graph: type(graph).__name__)
def graph(request):
    return request.param


@pytest.fixture(params=SCHEDULES, ids=lambda noise: type(noise).__name__)
def noise(request):
    return request.param


def everything(graph, x, x0, sigma):
    """All that a graph offers, by its name."""
    row = {
        "rates_into": graph.rates_into(x),
        "rates_out_of": graph.rates_out_of(x),
        "transition_from": graph.transition_from(x0, sigma),
        "transition_into": graph.transition_into(x, sigma),
        "ratio": graph.ratio(x, x0, sigma),
        "posterior": graph.posterior(x, x0, sigma / 2, sigma),
        "prior": graph.prior(sigma),
    }
    v = torch.linspace(0.1, 1, graph.num_states, device=x.device, dtype=sigma.dtype).expand(*x.shape, -1)
    return {name: row.dense() for name, row in row.items()} | {
        "propagate": graph.propagate(v, sigma),
        "backwards": graph.propagate(v, -0.1 * sigma),
        "prior_kl": graph.prior_kl(x0, sigma),
        "sample": graph.sample(x0, sigma),
        "sample_prior": graph.sample_prior(x0.shape, device=x.device),
    }


DRAWS = {"sample", "sample_prior"}


# Threads, pickles and copies


def test_threads_do_not_see_each_other():
    """Four threads, each with a noise of its own, on one graph: every row is that of the thread's own noise."""
    graph = chain(40)
    levels = [torch.tensor(0.1 * (i + 1)) for i in range(4)]
    right = [graph.transition_from(torch.tensor(0), level).value for level in levels]
    wrong = []

    def work(i):
        for _ in range(400):
            if not torch.equal(graph.transition_from(torch.tensor(0), levels[i]).value, right[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_use_does_not_grow_a_graph(graph):
    """A pickle or a copy of a used graph is that of a fresh one, and gives the same."""
    fresh = len(pickle.dumps(copy.deepcopy(graph)))
    before = everything(graph, X, X0, SIGMA)
    assert len(pickle.dumps(graph)) == fresh
    for again in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        for name, values in everything(again, X, X0, SIGMA).items():
            if name not in DRAWS:
                torch.testing.assert_close(values, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_large_chain_stays_small_in_pickles():
    graph = chain(100)
    fresh = len(pickle.dumps(graph))
    graph.sample(torch.zeros(64, dtype=torch.int64), torch.linspace(0.1, 1, 64))
    assert len(pickle.dumps(graph)) == fresh
    buffer = io.BytesIO()
    torch.save(graph, buffer)
    assert len(buffer.getvalue()) < fresh + 4096


# Without gradients, and with them again


def test_inference_mode_leaves_nothing_behind(graph):
    """What was computed under inference_mode first is right, and gradients come later as if it had not been."""
    used, fresh = copy.deepcopy(graph), copy.deepcopy(graph)
    with torch.inference_mode():
        for name, values in everything(used, X, X0, SIGMA).items():
            if name not in DRAWS:
                torch.testing.assert_close(values, everything(fresh, X, X0, SIGMA)[name], equal_nan=True)
    slopes = []
    for each in (used, fresh):
        v = torch.ones(2, 3, graph.num_states, requires_grad=True)
        sigma = SIGMA.clone().requires_grad_()
        total = each.transition_from(X0, sigma).value.square().sum() + each.propagate(v, sigma).square().sum()
        slopes.append(torch.autograd.grad(total, (sigma, v)))
    torch.testing.assert_close(slopes[0], slopes[1])


def test_tables_copied_under_inference_mode_are_ordinary():
    table = Constant(torch.arange(3.0))
    with torch.inference_mode():
        copied = table.on(torch.device("meta"))
    assert not copied.is_inference()
    assert table.on(torch.device("meta")) is copied


def test_pickled_tables_go_to_other_devices_too():
    """A used one carries no copy along, and makes new ones where it arrives."""
    table = Constant(torch.arange(3.0))
    table.on(torch.device("meta"))
    for again in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table), copy.copy(table)):
        assert torch.equal(again.on(torch.device("cpu")), torch.arange(3.0))
        moved = again.on(torch.device("meta"))
        assert (moved.device.type, moved.shape) == ("meta", (3,))
        assert again.on(torch.device("meta")) is moved
        assert moved is not table.on(torch.device("meta"))


def test_schedules_run_under_inference_mode(noise):
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        expected = noise(t)
    with torch.inference_mode():
        torch.testing.assert_close(noise(torch.tensor([0.2, 0.7])), expected)
        torch.testing.assert_close(noise.inverse(noise(t)[0]), t, rtol=1e-4, atol=1e-5)
    again = t.clone().requires_grad_()
    torch.autograd.grad(sum(part.sum() for part in noise(again)), again)


# Gradients


def test_slopes_are_finite_where_nothing_moves(graph):
    """Positions without noise, or with more than there are digits for, have finite slopes with respect to it."""
    for level in (0.0, 1e-12, 30.0, 80.0):
        sigma = torch.tensor([level, 1.0]).requires_grad_()
        x = X0.clone() if level < 1 else graph.sample(X0, sigma.detach(), generator=torch.Generator().manual_seed(0))
        row = graph.ratio(x, X0, sigma)
        into = graph.rates_into(x)
        weighted = torch.where(into.dense() > 0, row.dense() * into.dense(), 0)  # as losses have it
        (slope,) = torch.autograd.grad(weighted.sum(), sigma, retain_graph=True)
        assert slope.isfinite().all(), f"ratio at {level}: {slope}"
        for part in (graph.transition_from(X0, sigma), graph.posterior(x, X0, sigma / 2, sigma)):
            (slope,) = torch.autograd.grad(part.dense().square().sum(), sigma)
            assert slope.isfinite().all(), f"{level}: {slope}"


def test_second_derivatives(graph):
    """d2 exp(sigma Q) / dsigma2 = Q Q exp(sigma Q)."""
    states = torch.arange(graph.num_states)
    Q = graph.rates_into(states).dense().double()
    sigma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(Q), len(Q), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for total, expected in [
        ((graph.transition_from(states, sigma).dense() * weight.T).sum(), weight),
        ((graph.transition_into(states, sigma).dense() * weight).sum(), weight),
        ((graph.propagate(torch.eye(len(Q), dtype=torch.float64), sigma) * weight.T).sum(), weight),
    ]:
        (slope,) = torch.autograd.grad(total, sigma, create_graph=True)
        (second,) = torch.autograd.grad(slope, sigma)
        right = (expected * (Q @ Q @ torch.matrix_exp(0.4 * Q))).sum()
        torch.testing.assert_close(second, right, rtol=1e-6, atol=1e-6)  # Q came in float32


# Transforms


def test_functional_gradients(graph):
    """torch.func.grad and vmap: the gradient of each sequence's own noise, all at once."""

    def total(sigma, x0):
        parts = everything(graph, x0, x0, sigma)
        return sum(parts[name].square().sum() for name in ("transition_from", "ratio", "propagate", "prior_kl"))

    expected = []
    for x0, level in zip(X0, SIGMA, strict=True):
        sigma = level.clone().requires_grad_()
        expected.append(torch.autograd.grad(total(sigma, x0), sigma)[0])
        torch.testing.assert_close(torch.func.grad(total)(level, x0), expected[-1])
    each = torch.func.vmap(torch.func.grad(total), randomness="different")(SIGMA, X0)
    torch.testing.assert_close(each, torch.stack(expected))


def test_schedules_under_functional_transforms(noise):
    t = torch.tensor([0.3, 0.6])
    torch.testing.assert_close(torch.func.vmap(noise)(t), noise(t))
    slope = torch.func.vmap(torch.func.grad(lambda t: noise(t)[0]))(t)
    torch.testing.assert_close(slope, noise(t)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "graph",
    [pytest.param(g, marks=() if i in (0, 4) else pytest.mark.slow) for i, g in enumerate(GRAPHS)],
    ids=lambda graph: type(graph).__name__,
)
def test_whole_graphs_compile(graph):
    """One graph of torch.compile, without a break, in which everything is what it is outside."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, x0, sigma: everything(graph, x, x0, sigma), fullgraph=True, backend="eager")
    found, expected = compiled(X, X0, SIGMA), everything(graph, X, X0, SIGMA)
    for name, values in expected.items():
        if name in DRAWS:
            assert found[name].shape == values.shape
        else:
            torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize("of", ["states", "noise"])
def test_values_are_not_checked_where_there_are_none(graph, of):
    """Shapes alone (meta tensors): any read of a value would be an error, and so nothing makes a device wait."""
    x = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    sigma = torch.ones((2, 3) if of == "states" else (2,), device="meta")
    found = everything(graph, x, x, sigma)
    expected = everything(graph, X, X, SIGMA[:, None].expand(2, 3) if of == "states" else SIGMA)
    assert {name: part.shape for name, part in found.items()} == {name: part.shape for name, part in expected.items()}


def test_schedules_read_nothing_back(noise):
    moved = copy.deepcopy(noise)
    if isinstance(moved, torch.nn.Module):
        moved = moved.to("meta")
    sigma, dsigma = moved(torch.ones(3, device="meta"))
    assert sigma.shape == dsigma.shape == (3,)
    if not isinstance(noise, Learned):
        assert moved.inverse(sigma).shape == (3,)


# Dtypes


@pytest.fixture
def _half_precision():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_half_precision")
def test_rates_and_times_are_never_in_half_precision(graph, noise):
    assert graph.rates_into(X).value.dtype == graph.rates_out_of(X).value.dtype == torch.float32
    half = everything(graph, X, X0, SIGMA.bfloat16())
    assert all(part.dtype in (torch.float32, torch.int64) for part in half.values())
    assert {part.dtype for part in noise(torch.tensor([0.3], dtype=torch.bfloat16))} == {torch.float32}
    fresh = Learned(LogLinear())
    assert fresh.log_density.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_first(graph, dtype):
    """Of noise and vectors that half precision holds exactly everything is what it is of float32."""
    v = torch.eye(graph.num_states)[X]
    for name, call in {
        "transition_from": lambda s: graph.transition_from(X0, s).dense(),
        "transition_into": lambda s: graph.transition_into(X, s).dense(),
        "ratio": lambda s: graph.ratio(X, X0, s).dense(),
        "posterior": lambda s: graph.posterior(X, X0, s / 2, s).dense(),
        "prior": lambda s: graph.prior(s).dense(),
        "prior_kl": lambda s: graph.prior_kl(X0, s),
        "propagate": lambda s: graph.propagate(v.to(s.dtype), s),
    }.items():
        torch.testing.assert_close(call(SIGMA.to(dtype)), call(SIGMA), equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_times_are_raised_first(noise, dtype):
    t = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(noise(t.to(dtype)), noise(t))
    torch.testing.assert_close(noise.inverse(torch.tensor([1.0], dtype=dtype)), noise.inverse(torch.tensor([1.0])))

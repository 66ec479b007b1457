"""Bad input is answered by an error that names the argument, what was found and what was expected.

Schedules' arguments are in test_noise.py, generator matrices in test_dense.py.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from sedd_graphs import Absorbing, Clustered, Dense, Hybrid, LogLinear, Masked, Ordinal, PacedAbsorbing, Uniform
from sedd_graphs._checks import check_states, readable
from torch._subclasses import FakeTensorMode

GRAPHS = [
    Absorbing(5, mask_id=2),
    Uniform(6),
    Hybrid(5, uniform_rate=0.7, mask_rate=0.4),
    Masked(Ordinal(5), mask_id=0),
    Dense(torch.full((6, 6), 1 / 6) - torch.eye(6)),
    Dense(torch.eye(6).roll(1, 0) - torch.eye(6)),
    Ordinal(6),
    Clustered([0, 0, 1, 1, 1, 2], within=1.0, between=0.3),
    PacedAbsorbing(torch.tensor([0.5, 1.0, 3.0, 1.0, 2.0]), mask_id=2),
]
X = torch.ones(2, 3, dtype=torch.int64)
SIGMA = torch.tensor([0.5, 1.0])


@pytest.fixture(params=GRAPHS, ids=repr)
def graph(request):
    return request.param


def raises(error, message):
    return pytest.raises(error, match=re.escape(message))


def methods_of_states(graph):
    """Each argument that is states, with a call that takes it."""
    return [
        ("x", graph.rates_into),
        ("x", graph.rates_out_of),
        ("x", lambda x: graph.transition_from(x, SIGMA)),
        ("x", lambda x: graph.transition_into(x, SIGMA)),
        ("x0", lambda x0: graph.sample(x0, SIGMA)),
        ("x0", lambda x0: graph.prior_kl(x0, SIGMA)),
        ("x", lambda x: graph.ratio(x, X, SIGMA)),
        ("x0", lambda x0: graph.ratio(X, x0, SIGMA)),
        ("x", lambda x: graph.posterior(x, X, SIGMA, SIGMA)),
        ("x0", lambda x0: graph.posterior(X, x0, SIGMA, SIGMA)),
    ]


def methods_of_noise(graph):
    """Each argument that is noise, what its shape must fit, and a call that takes it."""
    return [
        ("sigma", "x", lambda s: graph.transition_from(X, s)),
        ("sigma", "x", lambda s: graph.transition_into(X, s)),
        ("sigma", "x", lambda s: graph.sample(X, s)),
        ("sigma", "x", lambda s: graph.ratio(X, X, s)),
        ("sigma", "x0", lambda s: graph.prior_kl(X, s)),
        ("sigma_s", "x", lambda s: graph.posterior(X, X, s, SIGMA)),
        ("sigma_t", "x", lambda s: graph.posterior(X, X, SIGMA, s)),
        ("sigma", "", graph.prior),
    ]


@pytest.mark.parametrize("wrong", [6, -1])
def test_states_must_be_in_range(graph, wrong):
    states = X.clone()
    states[1, 2] = wrong
    for name, call in methods_of_states(graph):
        with raises(ValueError, f"{name} must hold states 0 to 5 of the graph, found {wrong}"):
            call(states)


@pytest.mark.parametrize(
    ("states", "found"),
    [(X.float(), "a torch.float32 tensor"), (X.int(), "a torch.int32 tensor"), ([1, 2], "list [1, 2]")],
)
def test_states_must_be_int64(graph, states, found):
    for name, call in methods_of_states(graph):
        with raises(TypeError, f"{name} must be an int64 tensor of states, got {found}"):
            call(states)


def test_pairs_of_states_must_have_one_shape(graph):
    for call in (graph.ratio, lambda x, x0, s: graph.posterior(x, x0, s, s)):
        with raises(ValueError, "x and x0 must have the same shape, got (2, 3) and (2, 2)"):
            call(X, X[:, :2], SIGMA)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 2), (2, 3, 1)])
def test_noise_must_fit_the_states(graph, shape):
    for name, states, call in methods_of_noise(graph):
        if states:
            expected = f"{name} must have a shape that is a leading part of {states}'s (2, 3)"
            with pytest.raises(ValueError, match=re.escape(expected) + ".*" + re.escape(f"got {shape}")):
                call(torch.ones(shape))


@pytest.mark.parametrize("wrong", [-0.25, math.nan])
def test_noise_must_not_be_negative(graph, wrong):
    for name, _, call in methods_of_noise(graph):
        with raises(ValueError, f"{name} must be at least 0 everywhere, found {wrong}"):
            call(torch.tensor([1.0, wrong]))


@pytest.mark.parametrize(
    ("noise", "found"), [(torch.ones(2, dtype=torch.int64), "a torch.int64 tensor"), (0.5, "float 0.5")]
)
def test_noise_must_be_floating_point(graph, noise, found):
    for name, _, call in methods_of_noise(graph):
        with raises(TypeError, f"{name} must be a floating-point tensor, such as torch.tensor(0.5), got {found}"):
            call(noise)


def test_time_must_not_run_backwards_in_a_posterior(graph):
    with raises(ValueError, "sigma_t - sigma_s must be at least 0 everywhere, found -0.5"):
        graph.posterior(X, X, SIGMA + 0.5, SIGMA)
    with raises(ValueError, "sigma_s and sigma_t must have the same shape, got () and (2,)"):
        graph.posterior(X, X, torch.tensor(0.1), SIGMA)


def test_vectors_must_be_over_the_states(graph):
    with raises(ValueError, "v must have the graph's 6 states on its last axis, got shape (2, 5)"):
        graph.propagate(torch.ones(2, 5), SIGMA)
    with raises(TypeError, "v must be a floating-point tensor, got a torch.int64 tensor"):
        graph.propagate(torch.ones(2, 6, dtype=torch.int64), SIGMA)
    with raises(TypeError, "v must be a floating-point tensor, got list [1.0]"):
        graph.propagate([1.0], SIGMA)
    with raises(ValueError, "sigma must be a number everywhere, found nan"):
        graph.propagate(torch.ones(2, 6), SIGMA * math.nan)
    with raises(ValueError, "sigma must have a shape that is a leading part of v[..., 0]'s (2, 3)"):
        graph.propagate(torch.ones(2, 3, 6), SIGMA[:, None])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Absorbing(0), ValueError, "vocab_size must be at least 1, got 0"),
        (lambda: Absorbing(2.5), TypeError, "vocab_size must be an integer, got 2.5"),  # type: ignore[arg-type]
        (lambda: Absorbing(5, mask_id=6), ValueError, "mask_id must be between 0 and 5, got 6"),
        (lambda: Absorbing(5, mask_id=-1), ValueError, "mask_id must be between 0 and 5, got -1"),
        (lambda: Uniform(1), ValueError, "vocab_size must be at least 2, got 1"),
        (lambda: Uniform(True), TypeError, "vocab_size must be an integer, got True"),
        (lambda: Ordinal(1), ValueError, "num_states must be at least 2, got 1"),
        (
            lambda: Hybrid(5, uniform_rate=-1.0, mask_rate=1.0),
            ValueError,
            "uniform_rate must be a finite rate of at least 0, got -1.0",
        ),
        (
            lambda: Hybrid(5, uniform_rate=1.0, mask_rate=math.inf),
            ValueError,
            "mask_rate must be a finite rate of at least 0, got inf",
        ),
        (lambda: Masked(Uniform(3), rate=math.nan), ValueError, "rate must be a finite rate of at least 0, got nan"),
        (lambda: Masked(Uniform(3), mask_id=4), ValueError, "mask_id must be between 0 and 3, got 4"),
        (
            lambda: Masked(Absorbing(3)),
            ValueError,
            "tokens must be a graph without a mask, got Absorbing(vocab_size=3, mask_id=3)",
        ),
        (
            lambda: Clustered([0, 1], within=-0.5, between=1.0),
            ValueError,
            "within must be a finite rate of at least 0, got -0.5",
        ),
        (
            lambda: Clustered([0, 1], within=1.0, between=math.nan),
            ValueError,
            "between must be a finite rate of at least 0, got nan",
        ),
        (
            lambda: Clustered([3, 3, 3], within=1.0, between=1.0),
            ValueError,
            "labels must name at least two clusters, got 1; one cluster is the uniform graph",
        ),
        (
            lambda: Clustered([0.5, 1.0], within=1.0, between=1.0),  # type: ignore[list-item]
            ValueError,
            "labels must be one integer a state, got shape (2,) of torch.float32",
        ),
        (
            lambda: Clustered([[0], [1]], within=1.0, between=1.0),  # type: ignore[list-item]
            ValueError,
            "labels must be one integer a state, got shape (2, 1) of torch.int64",
        ),
        (
            lambda: PacedAbsorbing(torch.tensor([1.0, 0.0])),
            ValueError,
            "rates must be finite and above 0, found 0.0",
        ),
        (
            lambda: PacedAbsorbing(torch.ones(2, 2)),
            ValueError,
            "rates must be (V,), one for each token, got shape (2, 2)",
        ),
        (lambda: PacedAbsorbing(torch.ones(2).long()), TypeError, "rates must be a floating-point tensor"),
        (lambda: PacedAbsorbing(torch.ones(2), mask_id=3), ValueError, "mask_id must be between 0 and 2, got 3"),
        (lambda: Clustered.kimura(0.5), ValueError, "kappa must be at least 1 and finite, got 0.5"),
        (lambda: Dense([[0.0]]), TypeError, "Q must be a floating-point tensor, got list [[0.0]]"),  # type: ignore[arg-type]
        (
            lambda: LogLinear()(0.5),  # type: ignore[arg-type]
            TypeError,
            "t must be a floating-point tensor, such as torch.tensor(0.5), got float 0.5",
        ),
        (lambda: LogLinear()(torch.tensor(1.5)), ValueError, "t must lie in [0, 1] everywhere, found 1.5"),
        (
            lambda: LogLinear().inverse(torch.tensor(8.0)),
            ValueError,
            "sigma must lie between 0 and 6.90776, which this schedule spans, found 8.0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_parameters_are_refused(make, error, message):
    with raises(error, message):
        make()


def test_a_single_number_is_no_vector(graph):
    with raises(ValueError, "v must have the graph's 6 states on its last axis, got shape ()"):
        graph.propagate(torch.tensor(1.0), torch.tensor(0.5))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_gpu_checks_values_itself(monkeypatch, wrong):
    """Of a tensor that only says that it lies there: nothing is read, and the device is told what to demand."""
    asked = []
    monkeypatch.setattr(
        torch, "_assert_async", lambda right, told: asked.append((right.shape, right.device.type, told))
    )
    with FakeTensorMode():
        states = torch.zeros(2, 3, dtype=torch.int64, device="cuda") + 9 * wrong
        check_states("x", states, 6)
        assert not readable(states)
    assert asked == [((), "cuda", "x must hold states 0 to 5 of the graph")]


def test_values_are_read_on_the_host_alone():
    assert readable(torch.tensor([1.0, math.nan]))
    assert not readable(torch.ones(2, device="meta"))

"""The laws that every graph and every schedule must obey, to run on your own.

    import pytest
    from sedd_graphs.testing import GRAPH_LAWS

    @pytest.mark.parametrize("law", GRAPH_LAWS, ids=lambda law: law.__name__)
    def test_law(law):
        law(MyGraph(num_states=7))

A law takes the graph and raises an `AssertionError` that says what is wrong. It relies on methods and on the fields
of rows alone, so that a graph need not inherit anything. The graph must be small (up to 64 states): laws build Q from
its rates and compare with `torch.matrix_exp` in float64; `single_precision_agrees_with_double` alone takes any size.
While a law runs, torch's default dtype is float64, in which a graph's rates then come.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "GRAPH_LAWS",
    "NOISE_LAWS",
    "rates_form_a_generator",
    "rows_are_well_formed",
    "transitions_are_the_exponential",
    "transitions_are_probabilities",
    "transitions_compose",
    "transitions_follow_kolmogorov",
    "ratios_are_quotients_of_transitions",
    "propagate_is_the_exponential",
    "samples_follow_the_transition",
    "prior_is_the_image_of_uniform_tokens",
    "prior_is_the_limit",
    "prior_samples_follow_the_limit",
    "prior_kl_is_the_divergence",
    "posterior_is_bayes_rule",
    "tweedie_is_bayes_rule",
    "detailed_balance_carries_over",
    "noise_per_position_is_noise_per_sequence",
    "no_positions_give_no_rows",
    "single_precision_agrees_with_double",
    "bad_input_is_refused",
    "dsigma_is_the_derivative",
    "sigma_increases",
    "inverse_returns_to_the_time",
    "schedules_agree_in_single_precision",
    "schedules_keep_shapes",
    "bad_times_are_refused",
]

_SIGMAS = (0.0, 1e-6, 1e-3, 0.1, 0.29, 0.31, 1.0, 4.0, 20.0)
_SAMPLES = 20_000


class _Row(Protocol):
    @property
    def base(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...


def _law(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check, run with float64 as torch's default dtype."""

    @functools.wraps(check)
    def run(subject: Any) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            check(subject)
        finally:
            torch.set_default_dtype(before)

    return run


@_law
def rates_form_a_generator(graph: Any) -> None:
    """Columns of Q sum to 0, rates are not negative, and rows and columns are those of one matrix."""
    Q = _generator(graph)
    scale = float(Q.abs().max())
    _close(Q.sum(0), torch.zeros(len(Q)), 1e-12 * scale, "the columns of Q must sum to 0")
    assert (Q - Q.diag().diag()).min() >= 0, "rates must not be negative off the diagonal of Q"
    _close(_dense(graph.rates_into(_states(graph)), graph), Q, 1e-12 * scale, "rates_into(x) must be the rows of Q")


@_law
def rows_are_well_formed(graph: Any) -> None:
    """Distinct int64 states in range, one base and K values a row, in sigma's dtype."""
    generator = torch.Generator().manual_seed(0)
    x0 = _tokens(graph)[torch.randint(len(_tokens(graph)), (3, 5), generator=generator)]
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float32)
    x = graph.sample(x0, sigma, generator=generator)
    assert x.shape == x0.shape, f"sample(x0, sigma) must have x0's shape {tuple(x0.shape)}, got {tuple(x.shape)}"
    assert x.dtype == torch.int64, f"samples must be int64, got {x.dtype}"
    rows = {
        "rates_into": graph.rates_into(x),
        "rates_out_of": graph.rates_out_of(x),
        "transition_from": graph.transition_from(x0, sigma),
        "transition_into": graph.transition_into(x, sigma),
        "ratio": graph.ratio(x, x0, sigma),
        "posterior": graph.posterior(x, x0, sigma / 2, sigma),
        "prior": graph.prior(sigma[:, None].expand(3, 5)),
    }
    for name, row in rows.items():
        assert row.base.shape == x0.shape, f"{name}: base must be {tuple(x0.shape)}, got {tuple(row.base.shape)}"
        assert row.index.shape == row.value.shape, f"{name}: index and value must have one shape"
        assert row.index.shape[:-1] == x0.shape, f"{name}: index must be (..., K), got {tuple(row.index.shape)}"
        assert row.index.dtype == torch.int64, f"{name}: index must be int64, got {row.index.dtype}"
        assert (row.index >= 0).all(), f"{name}: negative state"
        assert (row.index < graph.num_states).all(), f"{name}: state out of range"
        assert (row.index.sort(-1).values.diff() > 0).all(), f"{name}: the states of a row must be distinct"
        if row.index.shape[-1] == graph.num_states:
            assert (row.base == 0).all(), f"{name}: a row that names every state must have base 0"
        if not name.startswith("rates"):
            assert row.value.dtype == torch.float32, f"{name}: must come in sigma's dtype, got {row.value.dtype}"
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert graph.ratio(empty, empty, torch.ones(2)).base.shape == (2, 0), "no positions must be no error"


@_law
def transitions_are_the_exponential(graph: Any) -> None:
    """transition_from and transition_into are the columns and rows of exp(sigma Q)."""
    Q, x = _generator(graph), _states(graph)
    for s in _SIGMAS:
        P, level = _exponential(Q, s), torch.tensor(s)
        _close(_dense(graph.transition_from(x, level), graph).T, P, _error(s), f"transition_from at sigma = {s}")
        _close(_dense(graph.transition_into(x, level), graph), P, _error(s), f"transition_into at sigma = {s}")


@_law
def transitions_are_probabilities(graph: Any) -> None:
    """Not negative, and the columns of exp(sigma Q) sum to 1."""
    x = _states(graph)
    for s in _SIGMAS:
        p = _dense(graph.transition_from(x, torch.tensor(s)), graph)
        assert (p >= 0).all(), f"a probability of transition_from is negative at sigma = {s}: {float(p.min())}"
        _close(p.sum(-1), torch.ones(len(x)), 1e-12, f"the sum of transition_from at sigma = {s}")


@_law
def transitions_compose(graph: Any) -> None:
    """exp((a + b) Q) = exp(a Q) exp(b Q)."""
    x = _states(graph)

    def matrix(s: float) -> Tensor:
        return _dense(graph.transition_into(x, torch.tensor(s)), graph)

    for a, b in [(1e-4, 0.3), (0.25, 0.25), (0.5, 2.5), (3.0, 10.0)]:
        _close(matrix(a) @ matrix(b), matrix(a + b), 1e-10, f"exp({a} Q) exp({b} Q) against exp({a + b} Q)")


@_law
def transitions_follow_kolmogorov(graph: Any) -> None:
    """D exp(sigma Q) / dsigma = Q exp(sigma Q) by automatic differentiation: a learnt schedule needs it."""
    Q, x = _generator(graph), _states(graph)
    for s in (1e-3, 0.2, 1.5):
        level = torch.full((len(Q),), s, requires_grad=True)
        p = _dense(graph.transition_from(x, level), graph)
        assert p.requires_grad, "transition_from must be differentiable in sigma"
        slope = torch.stack([torch.autograd.grad(p_y.sum(), level, retain_graph=True)[0] for p_y in p.T])
        _close(slope, Q @ _exponential(Q, s), 1e-9 * max(1.0, float(Q.abs().max())), f"the derivative at sigma = {s}")


@_law
def ratios_are_quotients_of_transitions(graph: Any) -> None:
    """ratio(x, x0, sigma) is p(. | x0) / p(x | x0), wherever x0 can have become x."""
    Q = _generator(graph)
    x, x0 = torch.cartesian_prod(_states(graph), _states(graph)).T
    for s in _SIGMAS[1:]:
        P = _exponential(Q, s)
        likely = P[x, x0] > 1e4 * _error(s)
        row = _dense(graph.ratio(x[likely], x0[likely], torch.tensor(s)), graph)
        expected, at_x = P[:, x0[likely]].T, P[x, x0][likely, None]
        error = (row * at_x - expected).abs() - _error(s) * (2 + row)
        assert (error <= 0).all(), f"ratio at sigma = {s} is off by up to {float(error.max()):.2e} times p(x | x0)"


@_law
def propagate_is_the_exponential(graph: Any) -> None:
    """propagate(v, sigma) is exp(sigma Q) v, at either sign of sigma."""
    Q = _generator(graph)
    fastest = float(-Q.diagonal().min()) or 1.0
    v = torch.randn(2, 3, len(Q), generator=torch.Generator().manual_seed(0))
    for s in (*_SIGMAS, *(-s / max(1.0, fastest) for s in _SIGMAS[1:-2])):
        expected = v @ _exponential(Q, s).T
        tolerance = 1e-9 * float(expected.abs().max())
        _close(graph.propagate(v, torch.full((2,), s)), expected, tolerance, f"propagate at sigma = {s}")
    levels = torch.tensor([0.3, -0.1 / fastest])  # one level a sequence
    expected = torch.stack([row @ torch.matrix_exp(s * Q).T for row, s in zip(v, levels, strict=True)])
    _close(graph.propagate(v, levels), expected, 1e-9, "propagate at two levels at once")


@_law
def samples_follow_the_transition(graph: Any) -> None:
    """Frequencies of sample(x0, sigma) are transition_from(x0, sigma); a false alarm in 10 million frequencies."""
    for s in (1e-3, 0.5, 20.0):
        for x0 in {0, graph.num_states // 2, graph.num_states - 1}:
            start, generator = torch.full((_SAMPLES,), x0), torch.Generator().manual_seed(x0)
            drawn = graph.sample(start, torch.tensor(s), generator=generator)
            again = graph.sample(start, torch.tensor(s), generator=torch.Generator().manual_seed(x0))
            assert torch.equal(drawn, again), "the same generator must give the same sample"
            p = _dense(graph.transition_from(start[:1], torch.tensor(s)), graph)[0]
            _frequencies(drawn, p, f"sample from x0 = {x0} at sigma = {s}")


@_law
def prior_is_the_image_of_uniform_tokens(graph: Any) -> None:
    """prior(sigma) is exp(sigma Q) applied to uniform tokens."""
    Q = _generator(graph)
    for s in _SIGMAS:
        p = _dense(graph.prior(torch.tensor([s, s])), graph)
        _close(p, (_exponential(Q, s) @ _uniform(graph)).expand(2, -1), _error(s), f"prior at sigma = {s}")


@_law
def prior_is_the_limit(graph: Any) -> None:
    """prior(inf) is where uniform tokens end: no longer moved by Q."""
    Q = _generator(graph)
    p = _dense(graph.prior(torch.tensor(math.inf)), graph)
    assert p.isfinite().all(), "prior(inf) must be finite"
    _close(p.sum(), torch.ones(()), 1e-10, "the sum of prior(inf)")
    _close(Q @ p, torch.zeros(len(Q)), 1e-10 * float(Q.abs().max()), "Q prior(inf)")
    P = torch.matrix_exp(Q)
    for _ in range(20):
        P = P @ P
    _close(p, P @ _uniform(graph), 1e-6, "prior(inf) against exp(2^20 Q)")


@_law
def prior_samples_follow_the_limit(graph: Any) -> None:
    """Frequencies of sample_prior are prior(inf); a false alarm in 10 million frequencies."""
    drawn = graph.sample_prior((_SAMPLES // 100, 100), generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (_SAMPLES // 100, 100), f"sample_prior must have the shape asked for, got {drawn.shape}"
    _frequencies(drawn.flatten(), _dense(graph.prior(torch.tensor(math.inf)), graph), "sample_prior")


@_law
def prior_kl_is_the_divergence(graph: Any) -> None:
    """prior_kl(x0, sigma) is KL(p(. | x0) || prior(sigma)), not negative."""
    x0 = _tokens(graph)
    for s in (1e-3, 0.3, 2.0, 20.0):
        level = torch.tensor(s)
        p, q = _dense(graph.transition_from(x0, level), graph), _dense(graph.prior(level), graph)
        expected = torch.xlogy(p, torch.where(p > 0, p / q, 1)).sum(-1)
        found = graph.prior_kl(x0, level)
        _close(found, expected, 1e-10, f"prior_kl at sigma = {s}")
        assert (found >= 0).all(), f"prior_kl is negative at sigma = {s}: {float(found.min())}"


@_law
def posterior_is_bayes_rule(graph: Any) -> None:
    """posterior(x, x0, s, t) is p(x_t | x_s) p(x_s | x0) / p(x_t | x0), wherever x0 can have become x."""
    Q = _generator(graph)
    x, x0 = torch.cartesian_prod(_states(graph), _states(graph)).T
    for s, t in [(0.1, 0.4), (0.5, 0.6), (1.0, 5.0), (0.3, 0.3), (0.0, 0.7)]:
        joint = _exponential(Q, t - s)[x] * _exponential(Q, s)[:, x0].T
        likely = joint.sum(-1) > 1e-5
        row = _dense(graph.posterior(x[likely], x0[likely], torch.tensor(s), torch.tensor(t)), graph)
        expected = joint[likely] / joint[likely].sum(-1, keepdim=True)
        _close(row, expected, 1e-4 * _error(1.0) / 1e-9, f"posterior at sigma = {s} of {t}")


@_law
def tweedie_is_bayes_rule(graph: Any) -> None:
    """(exp(-d Q) s)_y exp(d Q)[x, y], with the exact score s of x, is the chance that x was y (19)."""
    Q = _generator(graph)
    weights = torch.rand(len(Q), generator=torch.Generator().manual_seed(0)) + 0.1
    data = weights * (_uniform(graph) > 0)
    data = data / data.sum()
    early, late = _exponential(Q, 0.5) @ data, _exponential(Q, 0.55) @ data
    x, d = _states(graph)[late > 1e-6], torch.tensor(0.05)
    score = late / late[x][:, None]
    found = graph.propagate(score, -d) * _dense(graph.transition_into(x, d), graph)
    expected = _exponential(Q, 0.05)[x] * early / late[x][:, None]
    growth = math.exp(min(0.05 * float(-Q.diagonal().min()) * 2, 50.0))
    _close(found, expected, 1e-10 * growth / float(late[x].min()), "Tweedie's step against Bayes' rule")


@_law
def detailed_balance_carries_over(graph: Any) -> None:
    """Where Q is reversible with respect to the limit, so is exp(sigma Q)."""
    Q, limit = _generator(graph), _dense(graph.prior(torch.tensor(math.inf)), graph)
    flow = Q * limit
    if (flow - flow.T).abs().max() > 1e-10 * float(Q.abs().max()):
        return
    for s in _SIGMAS[1:]:
        flow = _dense(graph.transition_into(_states(graph), torch.tensor(s)), graph) * limit
        _close(flow, flow.T, 1e-10, f"the probability flow at sigma = {s} against its reverse")


@_law
def noise_per_position_is_noise_per_sequence(graph: Any) -> None:
    """Sigma of shape (B,) and the same levels as (B, L) give the same; so does a 0-dimensional one for all."""
    generator = torch.Generator().manual_seed(0)
    x0 = _tokens(graph)[torch.randint(len(_tokens(graph)), (3, 4), generator=generator)]
    for sigma in (torch.tensor([0.2, 1.0, 3.0]), torch.tensor(0.7)):
        each = sigma.reshape(-1, 1).expand(3, 4)
        x = graph.sample(x0, sigma, generator=generator)
        v = torch.rand(3, 4, graph.num_states, generator=generator)
        for name, a, b in [
            ("transition_from", graph.transition_from(x0, sigma), graph.transition_from(x0, each)),
            ("transition_into", graph.transition_into(x, sigma), graph.transition_into(x, each)),
            ("ratio", graph.ratio(x, x0, sigma), graph.ratio(x, x0, each)),
        ]:
            _close(_dense(a, graph), _dense(b, graph), 1e-12, f"{name} with one level a sequence and one a position")
        _close(graph.propagate(v, sigma), graph.propagate(v, each), 1e-12, "propagate with either")
        _close(graph.prior_kl(x0, sigma), graph.prior_kl(x0, each), 1e-12, "prior_kl with either")


@_law
def no_positions_give_no_rows(graph: Any) -> None:
    """An empty batch, such as the positions of a batch that can still move when none can, gives empty results."""
    n = graph.num_states
    for shape in [(0,), (2, 0), (0, 3)]:
        x, sigma = torch.empty(shape, dtype=torch.int64), torch.ones(shape[:1])
        for name, row in {
            "rates_into": graph.rates_into(x),
            "rates_out_of": graph.rates_out_of(x),
            "transition_from": graph.transition_from(x, sigma),
            "transition_into": graph.transition_into(x, sigma),
            "ratio": graph.ratio(x, x, sigma),
            "posterior": graph.posterior(x, x, sigma / 2, sigma),
            "prior": graph.prior(torch.ones(shape)),
        }.items():
            found = tuple(_dense(row, graph).shape)
            assert found == (*shape, n), f"{name}: expected shape {(*shape, n)}, got {found}"
        for name, values, expected in [
            ("sample", graph.sample(x, sigma), shape),
            ("sample_prior", graph.sample_prior(shape), shape),
            ("prior_kl", graph.prior_kl(x, sigma), shape),
            ("propagate", graph.propagate(torch.ones(*shape, n), sigma), (*shape, n)),
        ]:
            assert values.shape == expected, f"{name}: expected shape {expected}, got {tuple(values.shape)}"


@_law
def single_precision_agrees_with_double(graph: Any) -> None:
    """From sigma = 1e-6 to 50, float32 results are finite and within 1e-5 of float64, relative to each value.

    Values below 1e-37, which float32 cannot hold, are compared absolutely. Takes graphs of any size.
    """
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(math.log10(1e-6), math.log10(50), 33, dtype=torch.float32)
    start = torch.randint(graph.num_states, (len(sigma), 3), generator=generator)
    x0 = torch.where(start == graph.mask_id, (start + 1) % graph.num_states, start) if _masks(graph) else start
    x = graph.sample(x0, sigma, generator=generator)
    x[:, 0] = x0[:, 0]
    for name, call in {
        "transition_from": lambda level: graph.transition_from(x0, level),
        "transition_into": lambda level: graph.transition_into(x, level),
        "ratio": lambda level: graph.ratio(x, x0, level),
        "posterior": lambda level: graph.posterior(x, x0, level / 2, level),
        "prior": graph.prior,
    }.items():
        single, double = call(sigma), call(sigma.double())
        assert torch.equal(single.index, double.index), f"{name} must name the same states in either precision"
        _relative(single.base, double.base, name)
        _relative(single.value, double.value, name)
    _relative(graph.prior_kl(x0, sigma), graph.prior_kl(x0, sigma.double()), "prior_kl")
    v = torch.rand(len(sigma), graph.num_states, generator=generator, dtype=torch.float32)
    _relative(graph.propagate(v, sigma), graph.propagate(v.double(), sigma.double()), "propagate")


@_law
def bad_input_is_refused(graph: Any) -> None:
    """States out of range or not int64, sigma negative, NaN or of a wrong shape: an error that names the argument."""
    n = graph.num_states
    x, sigma = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    v = torch.ones(2, 3, n)
    for wrong, named in [
        (x + n, "x"),
        (x - 1, "x"),
        (x.double(), "x"),
    ]:
        for call in (
            lambda x: graph.rates_into(x),
            lambda x: graph.rates_out_of(x),
            lambda x: graph.transition_from(x, sigma),
            lambda x: graph.transition_into(x, sigma),
            lambda x: graph.ratio(x, torch.zeros(2, 3, dtype=torch.int64), sigma),
            lambda x: graph.ratio(torch.zeros(2, 3, dtype=torch.int64), x, sigma),
            lambda x: graph.sample(x, sigma),
            lambda x: graph.prior_kl(x, sigma),
        ):
            _refused(call, wrong, named)
    for wrong in (-sigma, sigma * math.nan, torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.int64)):
        for call in (
            lambda s: graph.transition_from(x, s),
            lambda s: graph.transition_into(x, s),
            lambda s: graph.ratio(x, x, s),
            lambda s: graph.sample(x, s),
            lambda s: graph.prior_kl(x, s),
        ):
            _refused(call, wrong, "sigma")
    for wrong in (-sigma, sigma * math.nan, torch.ones(2, dtype=torch.int64)):
        _refused(graph.prior, wrong, "sigma")
    for wrong in (sigma * math.nan, torch.ones(3), torch.ones(2, 1)):
        _refused(lambda s: graph.propagate(v, s), wrong, "sigma")
    _refused(lambda v: graph.propagate(v, sigma), torch.ones(2, 3, n + 1), "v")
    _refused(lambda s: graph.posterior(x, x, 2 * s, s), sigma, "sigma_s")
    _refused(lambda x: graph.ratio(x, x[:1], sigma), x, "x0")


GRAPH_LAWS: tuple[Callable[[Any], None], ...] = (
    rates_form_a_generator,
    rows_are_well_formed,
    transitions_are_the_exponential,
    transitions_are_probabilities,
    transitions_compose,
    transitions_follow_kolmogorov,
    ratios_are_quotients_of_transitions,
    propagate_is_the_exponential,
    samples_follow_the_transition,
    prior_is_the_image_of_uniform_tokens,
    prior_is_the_limit,
    prior_samples_follow_the_limit,
    prior_kl_is_the_divergence,
    posterior_is_bayes_rule,
    tweedie_is_bayes_rule,
    detailed_balance_carries_over,
    noise_per_position_is_noise_per_sequence,
    no_positions_give_no_rows,
    single_precision_agrees_with_double,
    bad_input_is_refused,
)
"""All laws of graphs."""


@_law
def dsigma_is_the_derivative(noise: Any) -> None:
    """Dsigma is the automatic derivative of sigma."""
    t = torch.linspace(0, 1, 102)[1:].requires_grad_()
    sigma, dsigma = noise(t)
    (slope,) = torch.autograd.grad(sigma.sum(), t)
    error = ((dsigma - slope).abs() / slope.abs().clamp(min=1e-9)).max()
    assert error < 1e-9, f"dsigma is off by up to {float(error.detach()):.2e} of the derivative of sigma"


@_law
def sigma_increases(noise: Any) -> None:
    """Sigma is not negative, grows with t, and dsigma is not negative."""
    sigma, dsigma = (part.detach() for part in noise(torch.linspace(0, 1, 1002)[1:]))
    assert (sigma > 0).all(), f"sigma must be positive after t = 0, found {float(sigma.min())}"
    assert (sigma.diff() > 0).all(), "sigma must increase with t"
    assert (dsigma >= 0).all(), f"dsigma must not be negative, found {float(dsigma.min())}"


@_law
def inverse_returns_to_the_time(noise: Any) -> None:
    """inverse(sigma(t)) = t, and noise that is never reached is refused."""
    t = torch.linspace(0, 1, 101)
    with torch.no_grad():
        sigma = noise(t)[0]
        _close(noise.inverse(sigma), t, 1e-8, "inverse(sigma(t))")
    for wrong in (sigma[-1:] * 1.1, sigma[:1] - 0.1, sigma[:1] * math.nan):
        _refused(noise.inverse, wrong, "sigma")


@_law
def schedules_agree_in_single_precision(noise: Any) -> None:
    """float32 sigma and dsigma are within 1e-5 of float64, relative to each value."""
    t = torch.cat([torch.logspace(-5, -1, 50), torch.linspace(0.1, 1, 451)]).float()
    for name, single, double in zip(("sigma", "dsigma"), noise(t), noise(t.double()), strict=True):
        _relative(single.detach(), double.detach(), name)


@_law
def schedules_keep_shapes(noise: Any) -> None:
    """Sigma and dsigma have t's shape and dtype."""
    for shape in [(), (3,), (3, 4), (0,)]:
        for dtype in (torch.float32, torch.float64):
            for part in noise(torch.full(shape, 0.5, dtype=dtype)):
                assert part.shape == shape, f"expected t's shape {shape}, got {tuple(part.shape)}"
                assert part.dtype == dtype, f"expected t's dtype {dtype}, got {part.dtype}"


@_law
def bad_times_are_refused(noise: Any) -> None:
    """T outside [0, 1], NaN, or of integers: an error that names it."""
    for wrong in (torch.tensor([0.5, -0.1]), torch.tensor([1.1]), torch.tensor(math.nan), torch.tensor([0, 1])):
        _refused(noise, wrong, "t")


NOISE_LAWS: tuple[Callable[[Any], None], ...] = (
    dsigma_is_the_derivative,
    sigma_increases,
    inverse_returns_to_the_time,
    schedules_agree_in_single_precision,
    schedules_keep_shapes,
    bad_times_are_refused,
)
"""All laws of schedules."""


def _states(graph: Any) -> Tensor:
    assert graph.num_states <= 64, f"this law needs a graph of at most 64 states, got {graph.num_states}"
    return torch.arange(graph.num_states)


def _masks(graph: Any) -> bool:
    return graph.mask_id is not None


def _tokens(graph: Any) -> Tensor:
    states = _states(graph)
    return states[states != graph.mask_id] if _masks(graph) else states


def _uniform(graph: Any) -> Tensor:
    """Uniform over tokens, (N,)."""
    p = torch.zeros(graph.num_states)
    p[_tokens(graph)] = 1 / len(_tokens(graph))
    return p


def _dense(row: _Row, graph: Any) -> Tensor:
    """All values of rows, (..., N), from their fields alone."""
    full = row.base[..., None].expand(*row.base.shape, graph.num_states).clone()
    return full.scatter(-1, row.index, row.value)


def _generator(graph: Any) -> Tensor:
    """Q, (N, N) float64."""
    return _dense(graph.rates_out_of(_states(graph)), graph).T.double()


def _exponential(Q: Tensor, s: float) -> Tensor:
    exponential: Tensor = torch.matrix_exp(s * Q)
    return exponential


def _error(s: float) -> float:
    """What matrix_exp may itself be wrong by, in total, at noise s."""
    return min(1e-8 * s, 1e-9) + 1e-14


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(found.shape)}"
    error = (found - expected).abs().max()
    assert error <= tolerance, f"{what}: off by {float(error):.3e}, more than {tolerance:.1e}"


def _relative(single: Tensor, double: Tensor, what: str) -> None:
    """float32 within 1e-5 of float64, where the latter is a number."""
    assert single.dtype == torch.float32, f"{what} must come in sigma's float32, got {single.dtype}"
    exists = double.isfinite()
    assert single[exists].isfinite().all(), f"{what} is not finite in float32"
    error = ((single.double() - double).abs() - 1e-37)[exists] / double[exists].abs().clamp(min=1e-37)
    worst = float(error.max()) if len(error) else 0.0
    assert worst <= 1e-5, f"{what} in float32 is off by {worst:.2e} of its float64 value"


def _frequencies(drawn: Tensor, p: Tensor, what: str) -> None:
    """Every state's count within 6 standard deviations (and 12 draws, for rare states) of its expectation."""
    count, expected = drawn.bincount(minlength=len(p)), p * len(drawn)
    assert len(count) == len(p), f"{what}: state {int(drawn.max())} is out of range"
    excess = (count - expected).abs() - 6 * (expected * (1 - p)).clamp(min=0).sqrt() - 12 * (p > 0)
    y = int(excess.argmax())
    assert excess[y] <= 1e-6, f"{what}: state {y} came {int(count[y])} times, {float(expected[y]):.1f} were due"


def _refused(call: Callable[[Any], Any], argument: Tensor, name: str) -> None:
    message = None
    try:
        call(argument)
    except (ValueError, TypeError) as error:
        message = str(error)
    assert message is not None, f"{name} = {argument.tolist()} must be refused"
    assert name in message, f"the error must name {name}: {message}"

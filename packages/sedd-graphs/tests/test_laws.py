"""The laws, on every graph here, on graphs that a third party might write, and on wrong ones that they must find."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re

import pytest
import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Dense,
    Graph,
    Hybrid,
    Masked,
    Ordinal,
    PacedAbsorbing,
    Row,
    Uniform,
    testing,
)
from sedd_graphs.testing import GRAPH_LAWS, _support


def generator_matrix(n, seed=0, *, reversible=False, sparse=False):
    random = torch.Generator().manual_seed(seed)
    rates = torch.rand(n, n, dtype=torch.float64, generator=random)
    if sparse:
        rates = rates * (torch.rand(n, n, generator=random) < 0.3) + torch.eye(n).roll(1, 0)
    if reversible:
        stationary = torch.rand(n, 1, dtype=torch.float64, generator=random) + 0.1
        rates = (rates + rates.T) * stationary
    rates.fill_diagonal_(0)
    return rates - rates.sum(0).diag()


class Wheel(Graph):
    """A third party's graph, from the five methods alone: x -> x + 1 on a ring. It never comes to detailed balance."""

    def __init__(self, num_states):
        self.num_states = num_states

    def __repr__(self):
        return f"Wheel({self.num_states})"

    def rates_into(self, x):
        return self._step(x, -1)

    def rates_out_of(self, x):
        return self._step(x, 1)

    def transition_from(self, x, sigma):
        self._check(x)
        if sigma.shape != x.shape[: sigma.dim()] or not sigma.is_floating_point() or not (sigma >= 0).all():
            raise ValueError("sigma must be noise")
        steps = torch.arange(self.num_states) - x[..., None]
        return Row.full(self._poisson(steps, sigma.reshape(sigma.shape + (1,) * (x.dim() + 1 - sigma.dim()))))

    def transition_into(self, x, sigma):
        row = self.transition_from(x, sigma)
        return Row.full(row.value.gather(-1, (2 * x[..., None] - torch.arange(self.num_states)) % self.num_states))

    def propagate(self, v, sigma):
        if v.shape[-1] != self.num_states:
            raise ValueError("v must be over states")
        if sigma.shape != v.shape[:-1][: sigma.dim()] or sigma.isnan().any():
            raise ValueError("sigma must be noise")
        if v.numel() == 0:  # which Fourier transforms do not take
            return v
        level = sigma.double().clamp(max=1e6).reshape(sigma.shape + (1,) * (v.dim() - sigma.dim()))
        frequency = 2 * math.pi * torch.arange(self.num_states, dtype=torch.float64) / self.num_states
        decay = (level * (torch.polar(torch.ones_like(frequency), -frequency) - 1)).exp()
        return torch.fft.ifft(torch.fft.fft(v.double()) * decay).real.to(v.dtype)

    def _check(self, x):
        if x.dtype != torch.int64 or (x.numel() and not 0 <= x.min() <= x.max() < self.num_states):
            raise ValueError("x must be states")

    def _step(self, x, by):
        self._check(x)
        rate = torch.ones_like(x, dtype=torch.get_default_dtype())
        return Row.of(
            torch.zeros_like(rate), ((x + by) % self.num_states, rate), (x, -rate), num_states=self.num_states
        )

    def _poisson(self, steps, level):
        """Poisson probabilities of `steps` modulo N, by summing over 24 laps."""
        n = self.num_states
        count = (steps % n)[..., None] + n * torch.arange(24)
        wide = level.double()[..., None]
        return (torch.xlogy(count, wide) - wide - torch.lgamma(count + 1.0)).exp().sum(-1).to(level.dtype)


GRAPHS = [
    Absorbing(6),
    Absorbing(6, mask_id=2),
    Absorbing(1),
    Uniform(6),
    Uniform(2),
    Hybrid(6, uniform_rate=0.7, mask_rate=0.4, mask_id=3),
    Hybrid(2, uniform_rate=1.0, mask_rate=0.0, mask_id=0),
    Hybrid(6, uniform_rate=0.0, mask_rate=1.0),
    Dense(generator_matrix(6)),
    Dense(generator_matrix(7, reversible=True)),
    Dense(generator_matrix(12, sparse=True)),
    Dense(Absorbing(5, mask_id=1).rates_into(torch.arange(6)).dense().double(), mask_id=1),
    Dense(torch.zeros(3, 3)),
    Ordinal(2),
    Ordinal(3),
    Ordinal(16),
    Clustered.kimura(2.5),
    Clustered([0, 0, 0, 1, 1, 2], within=1.0, between=0.05),
    Clustered([5, 2, 5, 5, 2], within=1.0, between=0.0),
    PacedAbsorbing(torch.tensor([0.5, 1.0, 3.0, 1.0]), mask_id=1),
    PacedAbsorbing(torch.tensor([0.2])),
    Masked(Ordinal(8), mask_rate=0.5, mask_id=4),
    Masked(Clustered.kimura(4.0), rate=0.3, mask_id=0),
    Masked(Dense(generator_matrix(5)), rate=0.3, mask_id=2),
    Wheel(7),
]


@pytest.mark.parametrize("law", GRAPH_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_law(graph, law):
    law(graph)


LARGE = [
    *(Absorbing(n - 1) for n in (2, 257, 50258, 262144)),
    *(Uniform(n) for n in (2, 257, 50257, 262144)),
    *(Hybrid(n - 1, uniform_rate=0.5, mask_rate=1.0, mask_id=n // 2) for n in (3, 257, 50258, 262144)),
    Ordinal(256),
    Ordinal(1000),
    Masked(Ordinal(256)),
    Clustered(torch.arange(50257) // 50, within=1.0, between=0.1),
    Clustered(torch.arange(262144) // 7, within=3.0, between=1e-3),
    Dense(generator_matrix(64)),
    Dense(generator_matrix(100, reversible=True)),
    Dense(generator_matrix(48, sparse=True)),
]


@pytest.mark.parametrize("graph", LARGE, ids=repr)
def test_single_precision_law_at_size(graph):
    testing.single_precision_agrees_with_double(graph)


# The laws can fail: each wrong graph below breaks the ones named.


class Shifted(Uniform):
    """A transition that does not sum to 1."""

    def transition_from(self, x, sigma):
        row = super().transition_from(x, sigma)
        return Row(row.base * 1.01, row.index, row.value, row.num_states)


class Swapped(Absorbing):
    """Rows taken for columns."""

    def rates_into(self, x):
        return super().rates_out_of(x)

    def transition_into(self, x, sigma):
        return super().transition_from(x, sigma)


class Cancelling(Uniform):
    """The textbook ratio, which cancels in float32."""

    def ratio(self, x, x0, sigma):
        row = super().ratio(x, x0, sigma)
        q = 1 - self.num_states / (sigma.expm1() + self.num_states)
        q = q.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim())).expand(x.shape)
        value = torch.where(x == x0, 1, 1 / q)[..., None]
        return Row(torch.where(x == x0, q, 1), row.index, value, row.num_states)


class Forward(Uniform):
    """A product that ignores the sign of sigma."""

    def propagate(self, v, sigma):
        return super().propagate(v, sigma.abs())


class Sluggish(Uniform):
    """Samples that stay too often."""

    def sample(self, x0, sigma, *, generator=None):
        return super().sample(x0, 0.9 * sigma, generator=generator)


class Leaky(Absorbing):
    """A limit that is not the mask alone, and a divergence from it."""

    def prior(self, sigma):
        return super().prior(sigma.clamp(max=3))


class Detached(Uniform):
    """Nothing to learn a schedule from."""

    def transition_from(self, x, sigma):
        return super().transition_from(x, sigma.detach() + 0 * sigma)


class Careless(Uniform):
    """Any sigma will do."""

    def transition_from(self, x, sigma):
        return super().transition_from(x, sigma.abs())


class Double(Uniform):
    """A state named twice."""

    def transition_from(self, x, sigma):
        row = super().transition_from(x, sigma)
        return Row(row.base, row.index.repeat_interleave(2, -1), row.value.repeat_interleave(2, -1), row.num_states)


class Unready(Uniform):
    """Rows of one position at least."""

    def transition_from(self, x, sigma):
        some = x if x.numel() else torch.zeros(1, dtype=torch.int64)
        return super().transition_from(some, sigma if x.numel() else torch.ones(1))


class Forgetful(Hybrid):
    """A posterior that ignores where it started."""

    def posterior(self, x, x0, sigma_s, sigma_t):
        return self.transition_from(x0, sigma_s)


class Singular(Uniform):
    """Samples at the first sequence's noise."""

    def sample(self, x0, sigma, *, generator=None):
        return super().sample(x0, sigma.flatten()[:1].expand(len(x0)), generator=generator)


class Shared(Uniform):
    """Positions that share one random number."""

    def sample(self, x0, sigma, *, generator=None):
        row = self.transition_from(x0, sigma)
        u = torch.rand(len(x0), *(1,) * x0.dim(), generator=generator)
        return row.quantile(u.expand(*x0.shape, 1))[..., 0]


class Repeated(Uniform):
    """Sequences that share their random numbers."""

    def sample(self, x0, sigma, *, generator=None):
        u = torch.rand(*x0.shape[1:], 1, generator=generator)
        return self.transition_from(x0, sigma).quantile(u.expand(*x0.shape, 1))[..., 0]


class Coarse(Uniform):
    """A posterior at the first position's noise."""

    def posterior(self, x, x0, sigma_s, sigma_t):
        if sigma_t.dim() > 1:
            sigma_s, sigma_t = sigma_s[:, 0], sigma_t[:, 0]
        return super().posterior(x, x0, sigma_s, sigma_t)


class Permissive(Uniform):
    """Ratios of what cannot be."""

    def ratio(self, x, x0, sigma):
        return super().ratio(x, x0, torch.where(sigma == 0, 1e-9, sigma))


@pytest.mark.parametrize(
    ("graph", "broken"),
    [
        (Shifted(5), ["transitions_are_the_exponential", "transitions_are_probabilities"]),
        (Swapped(5), ["rates_form_a_generator", "transitions_are_the_exponential", "tweedie_is_bayes_rule"]),
        (Cancelling(50257), ["single_precision_agrees_with_double"]),
        (Forward(5), ["propagate_is_the_exponential", "tweedie_is_bayes_rule"]),
        (Sluggish(5), ["samples_follow_the_transition"]),
        (Leaky(5), ["prior_is_the_limit", "prior_is_the_image_of_uniform_tokens"]),
        (Detached(5), ["transitions_follow_kolmogorov"]),
        (Careless(5), ["bad_input_is_refused"]),
        (Double(5), ["rows_are_well_formed"]),
        (Unready(5), ["no_positions_give_no_rows"]),
        (Singular(5), ["samples_are_independent"]),
        (Shared(5), ["samples_are_independent"]),
        (Repeated(5), ["samples_are_independent"]),
        (Coarse(5), ["every_position_has_its_own_noise"]),
        (Permissive(5), ["bad_input_is_refused"]),
        (Forgetful(5, uniform_rate=1.0, mask_rate=1.0), ["posterior_is_bayes_rule"]),
    ],
    ids=repr,
)
def test_laws_find_what_is_wrong(graph, broken):
    for name in broken:
        with pytest.raises(AssertionError):
            getattr(testing, name)(graph)


def test_laws_restore_the_default_dtype():
    testing.rates_form_a_generator(Uniform(3))
    assert torch.get_default_dtype() == torch.float32


ONE_A_SEQUENCE = ("transition_from", "transition_into", "ratio", "propagate", "prior_kl")
CALLS = (*ONE_A_SEQUENCE, "posterior", "prior")

# Each demand of a law can fail: one method that is wrong in one way, and what the law says of it.


def broken(graph, **methods):
    """The graph with methods `wrong(graph, ...)` in the place of its own; the others do without them."""
    wrong = copy.copy(graph)
    for name in (*CALLS, "sample", "sample_prior"):
        setattr(wrong, name, getattr(graph, name))
    for name, method in methods.items():
        setattr(wrong, name, functools.partial(method, graph))
    return wrong


def moved(row, state, by):
    """The row with `by` (...) added at a state (...) and taken away at the next one."""
    after = (state + 1) % row.num_states
    return row.put(state, row.at(state) + by).put(after, row.at(after) - by)


def at_one_level(name, wrong):
    """The method, wrong wherever `wrong` says so of sigma."""
    return lambda g, *given: getattr(g, name)(*given[:-1], wrong(given[-1]))


def with_states(name, takes):
    """The method of a graph that takes some states for others."""
    return lambda g, x, *given: getattr(g, name)(takes(x), *given)


# What a careless graph may take for states or noise, and what it should have said.
TAKEN_STATES = [
    (lambda x: x.clamp(max=5), "x = [[6, 6, 6], [6, 6, 6]] must be refused"),
    (lambda x: x.clamp(min=0), "x = [[-1, -1, -1], [-1, -1, -1]] must be refused"),
    (lambda x: x.long(), "x = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]] must be refused"),
]
TAKEN_NOISE = [
    (lambda s: s.abs(), "sigma = [-1.0, -1.0] must be refused"),
    (lambda s: s.nan_to_num() if s.is_floating_point() else s, "sigma = [nan, nan] must be refused"),
    (lambda s: s.double(), "sigma = [1, 1] must be refused"),
]
TAKEN_SHAPES = [
    (lambda s: s[:2], "sigma = [1.0, 1.0, 1.0] must be refused"),
    (lambda s: s.flatten(), "sigma = [[1.0], [1.0]] must be refused"),
]
SIX, TWO, MASKED = Uniform(6), Clustered([0, 0, 0, 1, 1, 2], within=1.0, between=0.0), Absorbing(5)


def one_more(tensor):
    return tensor[None]


def of_row(name, change):
    """The method's row with one of its fields changed."""
    field, how = change

    def wrong(g, *given):
        row = getattr(g, name)(*given)
        return dataclasses.replace(row, **{field: how(getattr(row, field))})

    return wrong


DEMANDS = [
    (
        "rates_form_a_generator",
        broken(SIX, rates_out_of=lambda g, x: g.rates_out_of(x).put(x, 0.1 + g.rates_out_of(x).at(x))),
        "columns of Q must sum to 0",
    ),
    (
        "rates_form_a_generator",
        broken(SIX, rates_out_of=lambda g, x: moved(g.rates_out_of(x), x, torch.full(x.shape, 0.5))),
        "rates must not be negative",
    ),
    (
        "transitions_are_probabilities",
        broken(SIX, transition_from=lambda g, x, s: moved(g.transition_from(x, s), x, torch.full(x.shape, 0.5))),
        "is negative at sigma",
    ),
    (
        "transitions_compose",
        broken(SIX, transition_into=lambda g, x, s: g.transition_into(x, s**1.01)),
        "exp(0.0001 Q)",
    ),
    (
        "ratios_are_quotients_of_transitions",
        broken(SIX, ratio=lambda g, *a: g.ratio(*a).map(lambda r: r * 1.001)),
        "ratio",
    ),
    (
        "propagate_is_the_exponential",
        broken(SIX, propagate=lambda g, v, s: g.propagate(v, s[:1].expand(s.shape))),
        "propagate at two levels at once",
    ),
    (
        "prior_is_the_limit",
        broken(SIX, prior=lambda g, s: g.prior(s).map(lambda p: p / 0)),
        "prior(inf) must be finite",
    ),
    ("prior_is_the_limit", broken(SIX, prior=lambda g, s: g.prior(s).map(lambda p: p * 2)), "the sum of prior(inf)"),
    (
        "prior_is_the_limit",
        broken(SIX, prior=lambda g, s: moved(g.prior(s), torch.tensor(0), torch.tensor(1e-3))),
        "Q prior(inf)",
    ),
    (  # stationary, but of one part that the others never reach
        "prior_is_the_limit",
        broken(TWO, prior=lambda g, s: Row.full(torch.tensor([1.0, 1, 1, 0, 0, 0]) / 3)),
        "against exp(2^20 Q)",
    ),
    ("prior_kl_is_the_divergence", broken(SIX, prior_kl=lambda g, *a: g.prior_kl(*a) + 1e-9), "prior_kl at sigma"),
    ("prior_kl_is_the_divergence", broken(SIX, prior_kl=lambda g, *a: g.prior_kl(*a) - 5e-11), "prior_kl is negative"),
    (
        "detailed_balance_carries_over",
        broken(SIX, transition_into=lambda g, x, s: moved(g.transition_into(x, s), x, torch.full(x.shape, 1e-9))),
        "the probability flow",
    ),
    (
        "rows_are_well_formed",
        broken(SIX, sample=lambda g, *a, **k: g.sample(*a, **k).flatten()),
        "must have x0's shape",
    ),
    ("rows_are_well_formed", broken(SIX, sample=lambda g, *a, **k: g.sample(*a, **k).int()), "samples must be int64"),
    *(
        ("rows_are_well_formed", broken(SIX, ratio=of_row("ratio", change)), what)
        for change, what in [
            (("base", one_more), "ratio: base must be (3, 5)"),
            (("value", one_more), "ratio: index and value must have one shape"),
            (("index", lambda y: y - 7), "ratio: negative state"),
            (("index", lambda y: y + 6), "ratio: state out of range"),
            (("index", lambda y: y.int()), "ratio: index must be int64"),
            (("value", lambda r: r.double()), "ratio: must come in sigma's dtype"),
        ]
    ),
    (
        "rows_are_well_formed",
        broken(SIX, prior=lambda g, s: dataclasses.replace(Row.full(g.prior(s).dense()), base=torch.ones_like(s))),
        "prior: a row that names every state must have base 0",
    ),
    *(
        ("noise_per_position_is_noise_per_sequence", broken(SIX, **{name: at_one_level(name, wrong)}), name)
        for name in ONE_A_SEQUENCE
        for wrong in (lambda s: s * (1 + 1e-6 * (s.dim() == 0)), lambda s: s * (1 + 1e-6 * (s.dim() == 1)))
    ),
    *(
        (
            "every_position_has_its_own_noise",
            broken(MASKED, **{name: at_one_level(name, lambda s: s[:, :1].expand(s.shape) if s.dim() == 2 else s)}),
            f"{name} with a level a position",
        )
        for name in (*ONE_A_SEQUENCE, "prior")
    ),
    *(
        (
            "no_positions_give_no_rows",
            broken(SIX, **{name: lambda g, x, *_, name=name: Row.full(torch.ones(2, 6))}),
            name,
        )
        for name in ("rates_into", "rates_out_of", "transition_from", "transition_into", "posterior", "prior")
    ),
    *(
        ("no_positions_give_no_rows", broken(SIX, **{name: lambda g, *_: torch.ones(2)}), name)
        for name in ("sample", "sample_prior", "prior_kl", "propagate")
    ),
    *(
        (
            "single_precision_agrees_with_double",
            broken(SIX, **{name: at_one_level(name, lambda s: s * (1 + 2e-4 * (s.dtype == torch.float32)))}),
            name,
        )
        for name in ("transition_from", "transition_into", "ratio", "prior_kl", "propagate")
    ),
    *(
        ("bad_input_is_refused", broken(SIX, **{name: with_states(name, takes)}), told)
        for name in ("rates_into", "rates_out_of", "transition_from", "transition_into", "ratio", "sample", "prior_kl")
        for takes, told in TAKEN_STATES
    ),
    *(
        ("bad_input_is_refused", broken(SIX, **{name: at_one_level(name, takes)}), told)
        for name in ("transition_from", "transition_into", "ratio", "sample", "prior_kl", "prior")
        for takes, told in (TAKEN_NOISE if name == "prior" else TAKEN_NOISE + TAKEN_SHAPES)
    ),
    *(
        ("bad_input_is_refused", broken(SIX, propagate=at_one_level("propagate", takes)), told)
        for takes, told in TAKEN_SHAPES
    ),
    (
        "bad_input_is_refused",
        broken(SIX, ratio=lambda g, x, x0, s: g.ratio(x, x0.clamp(0, 5).long(), s)),
        "x = [[6, 6, 6], [6, 6, 6]] must be refused",
    ),
    (
        "bad_input_is_refused",
        broken(SIX, ratio=lambda g, x, x0, s: g.ratio(x, x0.expand(x.shape), s)),
        "x0 = [[0, 0, 0], [0, 0, 0]] must be refused",
    ),
    (
        "bad_input_is_refused",
        broken(SIX, ratio=lambda g, x, x0, s: g.ratio(x, x0, s.where(s != 0, 1e-9) if s.is_floating_point() else s)),
        "x0 = [[0, 0, 0], [0, 0, 0]] must be refused",
    ),
    (
        "bad_input_is_refused",
        broken(SIX, propagate=lambda g, v, s: g.propagate(v, s.nan_to_num())),
        "sigma = [nan, nan]",
    ),
    ("bad_input_is_refused", broken(SIX, propagate=lambda g, v, s: g.propagate(v[..., :6], s)), "v = "),
    ("bad_input_is_refused", broken(SIX, posterior=lambda g, x, x0, s, t: g.posterior(x, x0, t, t)), "sigma_s = "),
    (
        "samples_follow_the_transition",
        broken(SIX, sample=lambda g, x0, s, generator: g.sample(x0, s)),
        "the same generator",
    ),
    (
        "prior_samples_follow_the_limit",
        broken(SIX, sample_prior=lambda g, shape, **k: g.sample_prior((math.prod(shape),), **k)),
        "must have the shape asked for",
    ),
    (
        "prior_samples_follow_the_limit",
        broken(SIX, sample_prior=lambda g, shape, **k: g.sample_prior(shape)),
        "the same generator",
    ),
    (
        "prior_samples_follow_the_limit",
        broken(SIX, sample_prior=lambda g, shape, **k: g.sample_prior((*shape[:-1], 1), **k).expand(shape)),
        "pairs of a prior",
    ),
    (
        "prior_samples_follow_the_limit",
        broken(SIX, sample_prior=lambda g, shape, **k: g.sample_prior(shape, **k).clamp(max=4)),
        "pairs of a prior",
    ),
]


@pytest.mark.parametrize(("law", "graph", "told"), DEMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_demand_of_a_law_can_fail(law, graph, told):
    with pytest.raises(AssertionError, match=re.escape(told)):
        getattr(testing, law)(graph)


# What the laws compare with


def counted(*counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_frequencies_are_allowed_six_standard_deviations_and_twelve_draws():
    """Of 10,000 draws at 1/4: 433 times 0.6, and 12; none of what has no probability."""
    p = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64)
    for off in (0, 271, -271):
        _support.assert_frequencies(counted(2500 + off, 7500 - off), p, "draws")
    for off in (273, -273):
        with pytest.raises(AssertionError, match=f"draws: state 0 came {2500 + off} times, 2500.0 were due"):
            _support.assert_frequencies(counted(2500 + off, 7500 - off), p, "draws")
    with pytest.raises(AssertionError, match=r"draws: state 2 came 1 times, 0\.0 were due"):
        _support.assert_frequencies(counted(2500, 7499, 1), p, "draws")
    with pytest.raises(AssertionError, match="draws: state 3 is out of range"):
        _support.assert_frequencies(counted(2500, 7499, 0, 1), p, "draws")


def test_numbers_are_compared_with_their_shapes():
    one = torch.ones(2, dtype=torch.float64)
    _support.assert_close(one, one + 1e-3, 1.01e-3, "it")
    with pytest.raises(AssertionError, match=r"it: off by 1\.000e-03, more than 9\.0e-04"):
        _support.assert_close(one, one + 1e-3, 9e-4, "it")
    with pytest.raises(AssertionError, match=r"it: off by nan"):
        _support.assert_close(one * math.nan, one, 1.0, "it")
    with pytest.raises(AssertionError, match=r"it: expected shape \(2, 1\), got \(2,\)"):
        _support.assert_close(one, one[:, None], 1.0, "it")


def test_precisions_are_compared_relative_to_each_value():
    double = torch.tensor([1.0, 1e-30, 1e-38, math.inf], dtype=torch.float64)
    single = double.float()
    for within in (single * (1 + 9e-6), single * (1 - 9e-6)):
        _support.assert_single_precision(within, double, "it")
    _support.assert_single_precision(single * torch.tensor([1.0, 1.0, 5.0, 1.0]), double, "it")  # below 1e-37
    for k in (0, 1):
        wrong = single.clone()
        wrong[k] *= 1 + 1.2e-5
        with pytest.raises(AssertionError, match="it in float32 is off by"):
            _support.assert_single_precision(wrong, double, "it")
    with pytest.raises(AssertionError, match="it is not finite in float32"):
        _support.assert_single_precision(single / torch.tensor([1.0, 0.0, 1.0, 1.0]), double, "it")
    with pytest.raises(AssertionError, match="it must come in sigma's float32"):
        _support.assert_single_precision(double, double, "it")
    _support.assert_single_precision(single[:0], double[:0], "it")


def test_a_refusal_is_an_error_that_names_its_argument():
    def refuse(error):
        def call(_):
            raise error

        return call

    _support.assert_refused(refuse(ValueError("sigma is wrong")), torch.ones(1), "sigma")
    _support.assert_refused(refuse(TypeError("sigma is wrong")), torch.ones(1), "sigma")
    with pytest.raises(AssertionError, match=r"sigma = \[1\.0\] must be refused"):
        _support.assert_refused(lambda _: None, torch.ones(1), "sigma")
    with pytest.raises(AssertionError, match="the error must name sigma: it is wrong"):
        _support.assert_refused(refuse(ValueError("it is wrong")), torch.ones(1), "sigma")
    with pytest.raises(KeyError):
        _support.assert_refused(refuse(KeyError("sigma")), torch.ones(1), "sigma")


def test_laws_take_small_graphs_alone():
    with pytest.raises(AssertionError, match="this law needs a graph of at most 64 states, got 65"):
        testing.rates_form_a_generator(Uniform(65))
    testing.rates_form_a_generator(Uniform(64))
    assert len(GRAPH_LAWS) == len(set(GRAPH_LAWS)) == 22
    assert {law.__name__ for law in (*GRAPH_LAWS, *testing.NOISE_LAWS)} | {"GRAPH_LAWS", "NOISE_LAWS"} == set(
        testing.__all__
    )

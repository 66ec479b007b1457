"""Random cases against closed forms in float64 that are written down here and nowhere else.

Every structured graph, from 2 to 262,144 states, at noise from 1e-12 to 1e3 in bfloat16, float32 and float64: each
value of every row is finite and within 1e-5 of the right one, relative to itself; values below 1e-37, which float32
cannot hold, absolutely. A case is three pairs of a clean and a noised state, a level of noise for each, in the ratio
and in one other of what a graph offers. The slow session runs 10,000 cases, the quick one their first twentieth.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive
from sedd_graphs import Absorbing, Clustered, Dense, Hybrid, Masked, Ordinal, Uniform

MOST = 262_144
SIZES = [2, 3, 4, 27, 257, 50_258, 151_936, MOST]
EXAMPLES = {  # 10,000 in all
    **{"absorbing": 2_300, "uniform": 2_300, "hybrid": 2_300, "clustered": 1_200, "masked": 900, "ordinal": 500},
    **{"dense": 500},
}
LEAST, GREATEST = 1e-12, 1e3
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
PAIRS = 3
SHAPES = [  # of clusters: states, states a cluster but perhaps in the last, and the two rates
    (2, 1, 1.0, 0.1),
    (4, 2, 5.0, 1e-3),
    (5, 3, 0.3, 1.0),
    (27, 9, 1.0, 0.1),
    (1000, 30, 1.0, 0.0),
    (50_257, 50, 0.3, 1.0),
    (MOST, 7, 5.0, 1e-3),
]


# The references: p(y, x, s) is the probability of x -> y at noise s, elementwise; alike(x) names states (M, C) that
# stand for all, and how many states each of them stands for, (M, C).


def kept(rate, s):
    return (-rate * s).exp()


def lost(rate, s):
    return -(-rate * s).expm1()


@dataclass
class UniformReference:
    num_states: int

    def p(self, y, x, s):
        return lost(1.0, s) / self.num_states + torch.where(y == x, kept(1.0, s), 0)

    def alike(self, x):
        count = torch.ones_like(x)
        return torch.stack([x, (x + 1) % self.num_states], -1), torch.stack([count, self.num_states - count], -1)

    def prior(self, y, s):
        return torch.full_like(s * y, 1 / self.num_states)


@dataclass
class StillReference(UniformReference):
    """Tokens that do not move."""

    def p(self, y, x, s):
        return torch.where(y == x, torch.ones_like(s), 0)


@dataclass
class ClusteredReference(UniformReference):
    size: int
    within: float
    between: float

    def first_and_size(self, x):
        first = x // self.size * self.size
        return first, (self.num_states - first).clamp(max=self.size)

    def p(self, y, x, s):
        own = y // self.size == x // self.size
        near = torch.where(own, kept(self.between, s) * lost(self.within, s) / self.first_and_size(x)[1], 0)
        still = torch.where(y == x, kept(self.between + self.within, s), 0)
        return lost(self.between, s) / self.num_states + near + still

    def alike(self, x):
        first, size = self.first_and_size(x)
        states = [x, first + (x - first + 1) % size, (first + size) % self.num_states]
        return torch.stack(states, -1), torch.stack([torch.ones_like(x), size - 1, self.num_states - size], -1)


@functools.cache
def waves(n):
    """cos(k pi (y + 1/2) / n) and the rates 2 - 2 cos(k pi / n), for 0 < k < n."""
    k = torch.arange(1, n, dtype=torch.float64) * math.pi / n
    return ((torch.arange(n)[:, None] + 0.5) * k).cos(), 2 - 2 * k.cos()


@dataclass
class OrdinalReference(UniformReference):
    """Images of a walk on the endless line, e^-z I_n(z), and their Fourier sum when there would be many."""

    def p(self, y, x, s):
        n = self.num_states
        rate = 1 / (4 * math.sin(math.pi / (2 * n)) ** 2)
        cosine, modes = waves(n)
        late = (1 + 2 * (cosine[y] * cosine[x] * (-rate * s[..., None] * modes).exp()).sum(-1)) / n
        laps = 2 * n * torch.arange(-2, 3)
        y, x, s = (part[..., None] for part in torch.broadcast_tensors(y, x, s))
        orders = torch.cat([y - x + laps, y + x + 1 + laps], -1).abs().double()
        early = torch.from_numpy(ive(orders.numpy(), 2 * rate * s.clamp(max=0.3).numpy())).sum(-1)
        return torch.where(s[..., 0] < 0.3, early, late)

    def alike(self, x):
        states = torch.arange(self.num_states).expand(*x.shape, -1)
        return states, torch.ones_like(states)


@dataclass
class MaskedReference:
    tokens: UniformReference
    rate: float
    mask_rate: float
    mask: int

    def token(self, x):
        return torch.where(x == self.mask, 0, x - (x > self.mask).long())

    def p(self, y, x, s):
        stays = kept(self.mask_rate, s) * self.tokens.p(self.token(y), self.token(x), self.rate * s)
        from_token = torch.where(y == self.mask, lost(self.mask_rate, s), stays)
        return torch.where(x == self.mask, torch.where(y == self.mask, 1.0, 0.0), from_token)

    def alike(self, x):
        states, count = self.tokens.alike(self.token(x))
        mask = torch.full_like(x, self.mask)[..., None]
        states = states + (states >= self.mask).long()
        return torch.cat([states, mask], -1), torch.cat([count, torch.ones_like(mask)], -1)

    def prior(self, y, s):
        spread = kept(self.mask_rate, s) * self.tokens.prior(self.token(y), s)
        return torch.where(y == self.mask, lost(self.mask_rate, s), spread)


# The graphs


sizes = st.one_of(st.integers(2, MOST), st.sampled_from(SIZES))
rates = st.one_of(st.floats(1e-3, 1.5), st.sampled_from([0.0, 1.0]))
places = st.floats(0, 1)  # of the mask, from first to last


@functools.cache
def clustered(n, size, within, between):
    graph = Clustered(torch.arange(n) // size, within=within, between=between)
    return graph, ClusteredReference(n, size, within, between)


@st.composite
def some_clustered(draw):
    return clustered(*draw(st.sampled_from(SHAPES)))


@st.composite
def some_ordinal(draw):
    n = draw(st.integers(2, 48))
    return Ordinal(n), OrdinalReference(n)


@st.composite
def some_dense(draw):
    """A walk among neighbours, as a matrix."""
    n = draw(st.integers(2, 12))
    rate = 1 / (4 * math.sin(math.pi / (2 * n)) ** 2)
    jumps = torch.full((n - 1,), rate, dtype=torch.float64)
    rates = torch.diag(jumps, 1) + torch.diag(jumps, -1)
    return Dense(rates - rates.sum(0).diag()), OrdinalReference(n)


@st.composite
def some_uniform(draw):
    n = draw(sizes)
    return Uniform(n), UniformReference(n)


@st.composite
def some_absorbing(draw):
    tokens = draw(sizes) - 1
    mask = round(draw(places) * tokens)
    return Absorbing(tokens, mask_id=mask), MaskedReference(StillReference(tokens), 1.0, 1.0, mask)


@st.composite
def some_hybrid(draw):
    tokens, rate, mask_rate = max(2, draw(sizes) - 1), draw(rates), draw(rates)
    mask = round(draw(places) * tokens)
    graph = Hybrid(tokens, uniform_rate=rate, mask_rate=mask_rate, mask_id=mask)
    return graph, MaskedReference(UniformReference(tokens), rate, mask_rate, mask)


@st.composite
def some_masked(draw):
    tokens, reference = draw(st.one_of(some_clustered(), some_ordinal()))
    rate, mask_rate = draw(rates), draw(rates)
    mask = round(draw(places) * tokens.num_states)
    graph = Masked(tokens, rate=rate, mask_rate=mask_rate, mask_id=mask)
    return graph, MaskedReference(reference, rate, mask_rate, mask)


KINDS = {
    "absorbing": some_absorbing(),
    "uniform": some_uniform(),
    "hybrid": some_hybrid(),
    "clustered": some_clustered(),
    "ordinal": some_ordinal(),
    "dense": some_dense(),
    "masked": some_masked(),
}


# The comparison


def assert_close(found, expected, what, floor=1e-37):
    too_large = expected > torch.finfo(found.dtype).max
    assert found[~too_large].isfinite().all(), f"{what} is not finite: {found}"
    assert (found[too_large] == torch.inf).all(), f"{what} is {found}, too large for its dtype"
    error = (found.double() - expected).abs() - floor
    wrong = (error > 1e-5 * expected.abs()) & ~too_large
    assert not wrong.any(), f"{what}: {found[wrong]} instead of {expected[wrong]}"


def assert_row(row, expected, candidates, what):
    """Named states have their values; candidates (M, C) that are not named have the base."""
    assert_close(row.value, expected(row.index), what)
    unnamed = (candidates[..., None] != row.index[..., None, :]).all(-1)
    base = row.base[..., None].expand(unnamed.shape)
    assert_close(base[unnamed], expected(candidates)[unnamed], f"{what} (base)")


def pairs(graph, reference, sigma, seed):
    """Clean tokens and noised states (M,): one that stayed, one drawn, and any one, where these can have come."""
    random = torch.Generator().manual_seed(seed)
    x0 = torch.randint(graph.num_states - (graph.mask_id is not None), (PAIRS,), generator=random)
    if graph.mask_id is not None:
        x0 = x0 + (x0 >= graph.mask_id).long()
    drawn = graph.sample(x0, sigma, generator=random)
    x = torch.cat([x0[:1], drawn[1:2], torch.randint(graph.num_states, (PAIRS - 2,), generator=random)])
    possible = reference.p(x, x0, sigma.double()) > 1e-30
    return torch.where(possible, x, drawn), x0, torch.randint(graph.num_states, (PAIRS, 2), generator=random)


OTHERS = ("transition_from", "transition_into", "posterior", "prior", "prior_kl")


@pytest.mark.parametrize("share", [pytest.param(0.05, id="few"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(kind, share):
    level = st.floats(math.log(LEAST), math.log(GREATEST))
    levels = st.lists(level, min_size=PAIRS, max_size=PAIRS)

    @settings(max_examples=round(EXAMPLES[kind] * share), deadline=None, database=None, derandomize=True)
    @given(KINDS[kind], st.sampled_from(OTHERS), levels, places, st.integers(0, 2**31), st.sampled_from(DTYPES))
    def check(both, other, log_sigma, earlier, seed, dtype):
        graph, reference = both
        sigma = torch.tensor(log_sigma, dtype=torch.float64).exp().to(dtype)
        before = sigma * earlier
        s, s0 = sigma.double()[:, None], before.double()[:, None]
        x, x0, others = pairs(graph, reference, sigma, seed)
        a, a0 = x[:, None], x0[:, None]
        candidates = torch.cat([a, a0, torch.full_like(a, graph.mask_id or 0), others], -1)
        p = reference.p
        of_x = p(a, a0, s)

        ratio = graph.ratio(x, x0, sigma)
        assert ratio.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_row(ratio, lambda y: p(y, a0, s) / of_x, candidates, "ratio")
        if other == "transition_from":
            assert_row(graph.transition_from(x, sigma), lambda y: p(y, a, s), candidates, other)
        elif other == "transition_into":
            assert_row(graph.transition_into(x, sigma), lambda y: p(a, y, s), candidates, other)
        elif other == "posterior":
            row = graph.posterior(x, x0, before, sigma)
            assert_row(row, lambda y: p(y, a0, s0) * p(a, y, s - s0) / of_x, candidates, other)
        elif other == "prior":
            assert_row(graph.prior(sigma), lambda y: reference.prior(y, s), candidates, other)
        else:
            y, count = reference.alike(x0)
            q, r = p(y, a0, s), reference.prior(y, s)
            kl = (count * torch.where(q > 0, q * (q / r).log(), 0)).sum(-1)
            assert_close(graph.prior_kl(x0, sigma), kl, other, floor=1e-14)

    check()


@pytest.mark.parametrize("num_states", [2, 5, 64, 1024])
@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.05, 0.29])
def test_ordinal_rows_have_all_their_digits(num_states, sigma):
    """In float64, to 1e-11 of each value, from the likeliest state to those at 1e-250."""
    x = torch.tensor([0, num_states // 3, num_states - 1])
    y = torch.arange(num_states)
    expected = OrdinalReference(num_states).p(y, x[:, None], torch.tensor(sigma, dtype=torch.float64))
    found = Ordinal(num_states).transition_from(x, torch.tensor(sigma, dtype=torch.float64)).value
    kept = expected > 1e-250
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-11, atol=0)


def test_long_ordinal_rows_keep_their_digits():
    """262,144 states in a row: early, when images on the endless line make the sum, and late, when waves do."""
    graph, x0 = Ordinal(MOST), 1000
    rate = 1 / (4 * math.sin(math.pi / (2 * MOST)) ** 2)
    y = x0 + torch.tensor([-1000, -300, -1, 0, 1, 100, 900])
    images = torch.stack([y - x0, y + x0 + 1]).abs().double()
    early = torch.from_numpy(ive(images.numpy(), 2 * rate * float(torch.tensor(1e-6)))).sum(0)
    k = torch.arange(1, 9) * math.pi / MOST
    waves = (k * (y[:, None] + 0.5)).cos() * (k * (x0 + 0.5)).cos() * (-2.0 * rate * 5 * (1 - k.double().cos())).exp()
    late = (1 + 2 * waves.sum(-1)) / MOST
    for sigma, expected in ((1e-6, early), (5.0, late)):
        p = graph.transition_from(torch.tensor(x0), torch.tensor(sigma)).dense()
        assert_close(p[y], expected, f"transition_from at {sigma}")

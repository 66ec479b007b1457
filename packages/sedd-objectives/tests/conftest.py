"""Reference graphs, schedules and exact scores, written for these tests alone: plain, small, any dtype.

`DenseGraph` takes every quantity from matrix_exp. `HybridGraph` has closed forms in structured rows, so that the
handling of base and exceptional states is tested; uniform and absorbing graphs are its ends.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; read when triton is first imported


class Vector(NamedTuple):
    base: Tensor
    index: Tensor  # type: ignore[assignment]  # the name is the rows', and a tuple has a method of it
    value: Tensor

    def dense(self, num_states):
        full = self.base[..., None].expand(*self.base.shape, num_states).clone()
        return full.scatter(-1, self.index, self.value)


def every_state(value):
    return Vector(torch.zeros_like(value[..., 0]), torch.arange(value.shape[-1]).expand(value.shape), value)


def structured(base, *pairs, num_states):
    """`base` but at the given (state, value) pairs, of which the last counts where states coincide."""
    index = torch.stack([state.expand(base.shape) for state, _ in pairs], -1)
    value = torch.stack([v.expand(base.shape) for _, v in pairs], -1)
    for k in reversed(range(len(pairs) - 1)):
        for _ in range(num_states):
            others = torch.cat([index[..., :k], index[..., k + 1 :]], -1)
            clash = (index[..., k, None] == others).any(-1)
            if not clash.any():
                break
            index[..., k] = torch.where(clash, (index[..., k] + 1) % num_states, index[..., k])
            value[..., k] = torch.where(clash, base, value[..., k])
    return Vector(base, index, value)


def spread(sigma, x):
    assert sigma.shape == x.shape[: sigma.ndim]
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)).expand(x.shape)


class DenseGraph:
    def __init__(self, generator_matrix, mask_id=None):
        self.matrix, self.mask_id, self.num_states = generator_matrix.double(), mask_id, len(generator_matrix)

    def exp(self, sigma):
        levels, place = sigma.double().unique(return_inverse=True)
        return torch.matrix_exp(levels[:, None, None] * self.matrix)[place]

    def sample(self, x0, sigma, *, generator=None):
        p = self.transition_from(x0, sigma).value.clamp_min(0)
        return torch.multinomial(p.reshape(-1, self.num_states), 1, generator=generator).reshape(x0.shape)

    def rates_into(self, x):
        return every_state(self.matrix[x])

    def rates_out_of(self, x):
        return every_state(self.matrix.mT[x])

    def transition_from(self, x, sigma):
        columns = self.exp(spread(sigma, x)).mT
        return every_state(columns.gather(-2, x[..., None, None].expand(*x.shape, 1, self.num_states))[..., 0, :])

    def transition_into(self, x, sigma):
        rows = self.exp(spread(sigma, x))
        return every_state(rows.gather(-2, x[..., None, None].expand(*x.shape, 1, self.num_states))[..., 0, :])

    def ratio(self, x, x0, sigma):
        p = self.transition_from(x0, sigma).value
        return every_state((p / p.gather(-1, x[..., None])).to(sigma.dtype))

    def propagate(self, v, sigma):
        return (self.exp(spread(sigma, v[..., 0])) @ v.double()[..., None])[..., 0].to(v.dtype)

    def prior_vector(self, sigma):
        tokens = torch.ones(self.num_states, dtype=torch.float64)
        if self.mask_id is not None:
            tokens[self.mask_id] = 0
        return (self.exp(sigma) @ (tokens / tokens.sum())[:, None])[..., 0]

    def prior_kl(self, x0, sigma):
        p = self.transition_from(x0, sigma).value.clamp_min(0)
        prior = self.prior_vector(spread(sigma, x0))
        return torch.where(p > 0, p * (p / prior).log(), 0).sum(-1)

    def posterior(self, x, x0, sigma_s, sigma_t):
        sigma_s, sigma_t = spread(sigma_s, x), spread(sigma_t, x)
        joint = self.transition_into(x, sigma_t - sigma_s).value * self.transition_from(x0, sigma_s).value
        return every_state((joint / joint.sum(-1, keepdim=True)).to(sigma_t.dtype))


class HybridGraph:
    """Rate a of a jump to a uniformly random token, rate b of a jump to the mask (the last state; none if b = 0)."""

    def __init__(self, vocab_size, a, b):
        self.tokens, self.a, self.b = vocab_size, a, b
        self.mask_id = vocab_size if b else None
        self.num_states = vocab_size + bool(b)

    def matrix(self):
        q = torch.zeros(self.num_states, self.num_states, dtype=torch.float64)
        v = self.tokens
        q[:v, :v] = self.a / v
        q[:v, :v] -= (self.a + self.b) * torch.eye(v, dtype=torch.float64)
        q[v:, :v] = self.b
        return q

    def row(self, base, *pairs):
        return structured(base, *pairs, num_states=self.num_states)

    def mask(self, x):
        return torch.full_like(x, self.tokens)

    def rates_into(self, x, dtype=None):
        one = torch.ones(x.shape, dtype=dtype or torch.get_default_dtype())
        masked = x == self.tokens
        base = torch.where(masked, self.b * one, self.a / self.tokens * one)
        own = torch.where(masked, 0 * one, base - self.a - self.b)
        if not self.b:
            return self.row(base, (x, own))
        return self.row(base, (self.mask(x), 0 * one), (x, own))

    def rates_out_of(self, x):
        one = torch.ones(x.shape, dtype=torch.get_default_dtype())
        masked = x == self.tokens
        base = torch.where(masked, 0 * one, self.a / self.tokens * one)
        own = torch.where(masked, 0 * one, base - self.a - self.b)
        if not self.b:
            return self.row(base, (x, own))
        return self.row(base, (self.mask(x), torch.where(masked, 0 * one, self.b * one)), (x, own))

    def _stay(self, sigma):
        to_any = torch.exp(-self.b * sigma) * -torch.expm1(-self.a * sigma) / self.tokens
        return to_any, torch.exp(-(self.a + self.b) * sigma), -torch.expm1(-self.b * sigma)

    def transition_from(self, x, sigma):
        sigma = spread(sigma, x)
        to_any, stay, mask = self._stay(sigma)
        masked, zero = x == self.tokens, torch.zeros_like(sigma)
        if not self.b:
            return self.row(to_any, (x, to_any + stay))
        own = torch.where(masked, zero + 1, to_any + stay)
        return self.row(
            torch.where(masked, zero, to_any), (self.mask(x), torch.where(masked, zero + 1, mask)), (x, own)
        )

    def transition_into(self, x, sigma):
        sigma = spread(sigma, x)
        to_any, stay, mask = self._stay(sigma)
        masked, zero = x == self.tokens, torch.zeros_like(sigma)
        if not self.b:
            return self.row(to_any, (x, to_any + stay))
        own = torch.where(masked, zero + 1, to_any + stay)
        return self.row(
            torch.where(masked, mask, to_any), (self.mask(x), torch.where(masked, zero + 1, zero)), (x, own)
        )

    def ratio(self, x, x0, sigma):
        if self.a and not self.b:
            s = spread(sigma, x)
            q = torch.expm1(s) / (torch.expm1(s) + self.tokens)
            same = x == x0
            return self.row(torch.where(same, q, 1), (x0, torch.where(same, 1, 1 / q)), (x, torch.ones_like(q)))
        p = self.transition_from(x0, sigma)
        hit = p.index == x[..., None]
        at_x = torch.where(hit.any(-1), (p.value * hit).sum(-1), p.base)
        return Vector(p.base / at_x, p.index, p.value / at_x[..., None])

    def propagate(self, v, sigma):
        sigma = spread(sigma, v[..., 0])[..., None]
        to_any, stay, mask = self._stay(sigma)
        tokens = v[..., : self.tokens]
        total = tokens.sum(-1, keepdim=True)
        return torch.cat([stay * tokens + to_any * total, v[..., self.tokens :] + mask * total], -1)[
            ..., : self.num_states
        ]

    def sample(self, x0, sigma, *, generator=None):
        p = self.transition_from(x0, sigma).dense(self.num_states).double()
        return torch.multinomial(p.reshape(-1, self.num_states), 1, generator=generator).reshape(x0.shape)

    def prior_kl(self, x0, sigma):
        p = self.transition_from(x0, sigma).dense(self.num_states).double()
        uniform = torch.zeros(self.num_states, dtype=torch.float64)
        uniform[: self.tokens] = 1 / self.tokens
        prior = self.propagate(uniform.expand(p.shape), spread(sigma, x0).double())
        return torch.where(p > 0, p * (p / prior).log(), 0).sum(-1)

    def posterior(self, x, x0, sigma_s, sigma_t):
        sigma_s, sigma_t = spread(sigma_s, x), spread(sigma_t, x)
        into = self.transition_into(x, sigma_t - sigma_s)
        joint = into.dense(self.num_states) * self.transition_from(x0, sigma_s).dense(self.num_states)
        return every_state(joint / joint.sum(-1, keepdim=True))


def uniform_graph(vocab_size):
    return HybridGraph(vocab_size, 1.0, 0.0)


def absorbing_graph(vocab_size):
    return HybridGraph(vocab_size, 0.0, 1.0)


def random_dense_graph(num_states, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(num_states, num_states, generator=generator, dtype=torch.float64)
    q[torch.rand(num_states, num_states, generator=generator) < 0.2] = 0
    q.fill_diagonal_(0)
    q /= q.sum(0).mean()
    return DenseGraph(q - torch.diag(q.sum(0)))


class LogLinearNoise:
    def __init__(self, eps=1e-3):
        self.eps = eps

    def __call__(self, t):
        return -torch.log1p(-(1 - self.eps) * t), (1 - self.eps) / (1 - (1 - self.eps) * t)


class GeometricNoise:
    def __init__(self, low=1e-4, high=20.0):
        self.low, self.high = low, high

    def __call__(self, t):
        sigma = self.low ** (1 - t) * self.high**t
        return sigma, sigma * math.log(self.high / self.low)


class Enumerated:
    """A distribution over all sequences of L tokens, and its exact score, posterior and entropy under a graph."""

    def __init__(self, graph, length, seed=0, tokens=None):
        self.graph, self.length = graph, length
        self.tokens = tokens or graph.num_states - (graph.mask_id is not None)
        generator = torch.Generator().manual_seed(seed)
        self.sequences = torch.tensor(list(itertools.product(range(self.tokens), repeat=length)))
        weights = torch.rand(len(self.sequences), generator=generator, dtype=torch.float64) ** 3
        self.probability = weights / weights.sum()
        self.states = torch.tensor(list(itertools.product(range(graph.num_states), repeat=length)))

    def entropy(self):
        return float(-(self.probability * self.probability.log()).sum())

    def sample(self, count, generator):
        return self.sequences[torch.multinomial(self.probability, count, replacement=True, generator=generator)]

    def kernel(self, sigma):
        """p(x | x0) for all states x and clean sequences x0, (S, S0), for one sigma."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        single = torch.arange(self.graph.num_states)
        row = self.graph.transition_from(single, sigma.expand(len(single)))
        p = Vector(*row).dense(self.graph.num_states).double().mT
        return torch.stack([p[self.states[:, i]][:, self.sequences[:, i]] for i in range(self.length)]).prod(0)

    def marginal(self, sigma):
        return self.kernel(sigma) @ self.probability

    def number(self, x):
        """The place of sequences (..., L) in `states`."""
        n = self.graph.num_states
        return sum(x[..., i] * n ** (self.length - 1 - i) for i in range(self.length))

    def neighbours(self, x):
        """All sequences (..., L, N, L) that differ from x at one position."""
        n = self.graph.num_states
        changed = x[..., None, None, :].expand(*x.shape, n, self.length).clone()
        for i in range(self.length):
            changed[..., i, :, i] = torch.arange(n)
        return changed

    def log_ratios(self, x, sigma):
        """log p(y)/p(x) for the neighbours of x (B, L) at sigma (B,), (B, L, N)."""
        n = self.graph.num_states
        row = self.graph.transition_from(torch.arange(n).expand(len(x), n), sigma.double())
        kernel = Vector(*row).dense(n).double()[:, : self.tokens]
        p = self.probability.reshape((self.tokens,) * self.length).expand(len(x), *[-1] * self.length)
        for _ in range(self.length):  # noise the first axis and put it last
            p = torch.einsum("bi...,biy->b...y", p, kernel)
        log_p = p.flatten(1).log()
        at_neighbours = log_p.gather(1, self.number(self.neighbours(x)).flatten(1)).reshape(*x.shape, n)
        return at_neighbours - log_p.gather(1, self.number(x)[:, None])[..., None]

    def score(self, dtype=torch.float64):
        return lambda x, sigma: self.log_ratios(x, sigma).to(dtype)


def _make_graphs(vocab_size):
    return {
        "uniform": uniform_graph(vocab_size),
        "absorbing": absorbing_graph(vocab_size),
        "hybrid": HybridGraph(vocab_size, 0.4, 0.7),
        "dense": random_dense_graph(vocab_size),
        "dense absorbing": DenseGraph(absorbing_graph(vocab_size).matrix(), mask_id=vocab_size),
    }


@pytest.fixture
def float64_rates():
    """Rates in float64: graphs give them in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["uniform", "absorbing", "hybrid", "dense", "dense absorbing"])
def graph(request):
    """One graph after another over a vocabulary of 5 tokens."""
    return _make_graphs(5)[request.param]


@pytest.fixture
def make_graphs():
    return _make_graphs


@pytest.fixture
def hybrid_graph():
    return HybridGraph


@pytest.fixture
def graph_of():
    """The chain of a generator matrix."""
    return DenseGraph


@pytest.fixture
def enumerated():
    return Enumerated


@pytest.fixture
def log_linear():
    return LogLinearNoise()


@pytest.fixture
def geometric():
    return GeometricNoise()


@pytest.fixture
def vector():
    return Vector


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)

"""Reference graphs, schedules and exact scores, small enough to enumerate. They share no code with the package."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from sedd_samplers import Reverse, steps
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; read when triton is first imported


def pytest_configure(config):
    """Chains are followed here from the prior at whatever noise, by scores of no data: their law is known, too."""
    config.addinivalue_line("filterwarnings", r"ignore:at t = .* is left of a token:UserWarning")
    config.addinivalue_line("filterwarnings", r"ignore:at sigma = .* the scores of the tokens at:UserWarning")


class MatrixGraph:
    """A graph given by its generator, every row dense."""

    def __init__(self, Q, mask_id=None):
        self.Q = torch.as_tensor(Q, dtype=torch.float64)
        self.num_states = len(self.Q)
        self.mask_id = mask_id
        self._values, self._vectors = torch.linalg.eig(self.Q)
        self._inverse = torch.linalg.inv(self._vectors)

    def exp(self, sigma):
        """exp(sigma Q), (..., N, N)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return ((self._vectors * torch.exp(sigma[..., None, None] * self._values)) @ self._inverse).real

    def _row(self, dense):
        index = torch.arange(self.num_states).expand(dense.shape)
        return SimpleNamespace(base=torch.zeros(dense.shape[:-1], dtype=dense.dtype), index=index, value=dense)

    def rates_into(self, x):
        return self._row(self.Q[x])

    def rates_out_of(self, x):
        return self._row(self.Q.T[x])

    def transition_into(self, x, sigma):
        levels, level = torch.unique(sigma.expand(x.shape), return_inverse=True)
        return self._row(self.exp(levels)[level, x])

    def propagate(self, v, sigma):
        levels, level = torch.unique(sigma.expand(v.shape[:-1]), return_inverse=True)
        forward = self.exp(levels).to(v.dtype)
        if len(levels) == 1:
            return v @ forward[0].T
        return (forward[level] @ v[..., None])[..., 0]

    def prior(self, sigma):
        tokens = torch.ones(self.num_states, dtype=torch.float64)
        if self.mask_id is not None:
            tokens[self.mask_id] = 0
        return self._row(self.exp(sigma.clamp(max=200.0)) @ (tokens / tokens.sum()))


class StructuredUniform:
    """Uniform in closed form: rows with one exceptional state."""

    mask_id = None

    def __init__(self, vocab_size):
        self.num_states = vocab_size

    @functools.cached_property
    def Q(self):
        """Made when it is asked for: of thousands of states it takes long."""
        return torch.full((self.num_states,) * 2, 1 / self.num_states, dtype=torch.float64) - torch.eye(self.num_states)

    def rates_into(self, x):
        N = self.num_states
        at_x = torch.full((*x.shape, 1), 1 / N - 1)
        return SimpleNamespace(base=torch.full(x.shape, 1 / N), index=x[..., None], value=at_x)

    rates_out_of = rates_into  # Q is symmetric

    def transition_into(self, x, sigma):
        base = (-torch.expm1(-sigma) / self.num_states).expand(x.shape)
        return SimpleNamespace(base=base, index=x[..., None], value=(base + torch.exp(-sigma))[..., None])

    def propagate(self, v, sigma):
        a = torch.exp(-sigma)[..., None]
        return a * v + (-torch.expm1(-sigma)[..., None] / self.num_states) * v.sum(-1, keepdim=True)

    def prior(self, sigma):
        nothing = torch.zeros(*sigma.shape, 0)
        return SimpleNamespace(base=torch.full_like(sigma, 1 / self.num_states), index=nothing.long(), value=nothing)


class StructuredAbsorbing:
    """Absorbing in closed form: rows with two exceptional states, x (or a neighbour of the mask) and the mask."""

    def __init__(self, vocab_size, mask_id=None):
        self.num_states = vocab_size + 1
        self.mask_id = vocab_size if mask_id is None else mask_id

    @functools.cached_property
    def Q(self):
        Q = -torch.eye(self.num_states, dtype=torch.float64)
        Q[self.mask_id] += 1
        return Q

    def _row(self, x, at_tokens, at_x, at_mask):
        masked = x == self.mask_id
        other = 0 if self.mask_id != 0 else 1
        index = torch.stack([torch.where(masked, other, x), torch.full_like(x, self.mask_id)], -1)
        value = torch.stack([torch.where(masked, at_tokens, at_x), at_mask], -1)
        return SimpleNamespace(base=at_tokens, index=index, value=value)

    def rates_into(self, x):
        masked = (x == self.mask_id).float()
        return self._row(x, masked, masked - 1, torch.zeros_like(masked))

    def rates_out_of(self, x):
        moves = (x != self.mask_id).float()
        return self._row(x, torch.zeros_like(moves), -moves, moves)

    def transition_into(self, x, sigma):
        masked = x == self.mask_id
        move, stay = (-torch.expm1(-sigma)).expand(x.shape), torch.exp(-sigma).expand(x.shape)
        return self._row(x, torch.where(masked, move, 0.0), torch.where(masked, move, stay), masked.to(stay.dtype))

    def propagate(self, v, sigma):
        tokens = v.sum(-1) - v[..., self.mask_id]
        out = v * torch.exp(-sigma)[..., None]
        out[..., self.mask_id] = v[..., self.mask_id] - torch.expm1(-sigma) * tokens
        return out

    def prior(self, sigma):
        base = torch.exp(-sigma) / (self.num_states - 1)
        index = torch.full((*sigma.shape, 1), self.mask_id)
        return SimpleNamespace(base=base, index=index, value=-torch.expm1(-sigma)[..., None])


def absorbing_matrix(vocab_size, mask_id=None):
    mask_id = vocab_size if mask_id is None else mask_id
    return MatrixGraph(StructuredAbsorbing(vocab_size, mask_id).Q, mask_id)


def uniform_matrix(vocab_size):
    return MatrixGraph(StructuredUniform(vocab_size).Q)


def hybrid_matrix(vocab_size, uniform_rate=0.4, mask_rate=0.6):
    """Tokens change among themselves and turn into the mask, the last state."""
    Q = torch.zeros(vocab_size + 1, vocab_size + 1, dtype=torch.float64)
    Q[:vocab_size, :vocab_size] = uniform_rate * StructuredUniform(vocab_size).Q - mask_rate * torch.eye(vocab_size)
    Q[vocab_size, :vocab_size] = mask_rate
    return MatrixGraph(Q, vocab_size)


def cycle_matrix(num_states):
    """Neighbours on a ring, faster one way than the other: no detailed balance."""
    Q = torch.zeros(num_states, num_states, dtype=torch.float64)
    for x in range(num_states):
        Q[(x + 1) % num_states, x] += 0.8
        Q[(x - 1) % num_states, x] += 0.3
    return MatrixGraph(Q - torch.diag(Q.sum(0)))


def clustered_matrix(labels=(0, 0, 1, 1), within=3.0, between=1.0):
    """Tokens of one cluster turn into each other faster than into others."""
    labels = torch.tensor(labels)
    Q = torch.where(labels[:, None] == labels, within, between).double() / len(labels)
    Q.fill_diagonal_(0)
    return MatrixGraph(Q - torch.diag(Q.sum(0)))


def ordinal_matrix(num_states):
    """States in a row, each jumping to its neighbours."""
    Q = torch.diag(torch.ones(num_states - 1, dtype=torch.float64), 1)
    Q = Q + Q.T
    return MatrixGraph(Q - torch.diag(Q.sum(0)))


class Geometric:
    def __init__(self, low=1e-4, high=20.0):
        self.low, self.high = low, high

    def __call__(self, t):
        sigma = self.low ** (1 - t) * self.high**t
        return sigma, sigma * math.log(self.high / self.low)


class LogLinear:
    def __init__(self, eps=1e-3):
        self.eps = eps

    def __call__(self, t):
        keep = 1 - self.eps
        return -torch.log1p(-keep * t), keep / (1 - keep * t)


class Linear:
    """sigma = rate t: rates without a singularity, for orders of convergence."""

    def __init__(self, rate=3.0):
        self.rate = rate

    def __call__(self, t):
        return self.rate * t, torch.full_like(t, self.rate)


class ExactScore:
    """The score of a distribution p0 over N^L (zero wherever the mask appears), by enumeration in float64."""

    def __init__(self, p0, Q):
        self.p0 = p0.double()
        self.exact = MatrixGraph(Q)
        self.calls = 0
        self.rows = 0

    def marginal(self, sigma):
        """p_sigma as (R, N, ..., N) for sigma (R,)."""
        transition = self.exact.exp(sigma)
        p = self.p0.expand(len(sigma), *self.p0.shape)
        for axis in range(1, self.p0.ndim + 1):
            p = torch.einsum("ryx,r...x->r...y", transition, p.movedim(axis, -1)).movedim(-1, axis)
        return p.clamp(min=0)

    def __call__(self, x, sigma):
        self.calls += 1
        self.rows += len(x)
        N, L = self.p0.shape[0], self.p0.ndim
        levels, level = torch.unique(sigma, return_inverse=True)
        log_p = self.marginal(levels.double()).reshape(len(levels), -1).log_()
        stride = N ** torch.arange(L - 1, -1, -1)
        here = (x * stride).sum(-1)
        there = here[:, None, None] + (torch.arange(N) - x[..., None]) * stride[:, None]
        return log_p[level[:, None, None], there] - log_p[level, here][:, None, None]


class SpectralScore(ExactScore):
    """The same score, fast where every sequence has its own noise level: p_sigma is a sum of few exponentials."""

    def __init__(self, p0, Q):
        super().__init__(p0, Q)
        N, L = p0.shape[0], p0.ndim
        vectors, inverse = self.exact._vectors, self.exact._inverse
        coefficients = self.p0.to(vectors.dtype)
        for axis in range(L):
            coefficients = (coefficients.movedim(axis, -1) @ inverse.T).movedim(-1, axis)
        terms = coefficients.flatten().diag().reshape(-1, *[N] * L)
        for axis in range(1, L + 1):
            terms = (terms.movedim(axis, -1) @ vectors.T).movedim(-1, axis)
        exponents = self.exact._values[all_states(N, L)].sum(1)
        distinct, group = torch.unique(torch.view_as_real(exponents).round(decimals=9), dim=0, return_inverse=True)
        terms = torch.zeros(len(distinct), N**L, dtype=terms.dtype).index_add_(0, group, terms.reshape(N**L, -1))
        self.real = not distinct[:, 1].any()
        self.exponents = distinct[:, 0] if self.real else torch.view_as_complex(distinct)
        self.terms = terms.real.contiguous() if self.real else terms
        stride = N ** torch.arange(L - 1, -1, -1)
        self.stride = stride
        states = all_states(N, L)
        self.neighbours = (states @ stride)[:, None, None] + (torch.arange(N) - states[..., None]) * stride[:, None]

    def marginal(self, sigma):
        p = torch.exp(sigma.double()[:, None] * self.exponents) @ self.terms
        return p.real.clamp(min=0).reshape(-1, *self.p0.shape)

    def __call__(self, x, sigma):
        self.calls += 1
        self.rows += len(x)
        here = x @ self.stride
        there = self.neighbours[here].flatten(1)
        if len(sigma) and (sigma == sigma[0]).all():
            log_p = self.marginal(sigma[:1]).flatten().log_()
            return (log_p[there] - log_p[here, None]).view(*x.shape, -1)
        p = self.marginal(sigma).flatten(1)
        return (p.gather(1, there).log_() - p.gather(1, here[:, None]).log_()).view(*x.shape, -1)


class ExactRows(ExactScore):
    """The same score, which offers `where`."""

    def __init__(self, p0, Q):
        super().__init__(p0, Q)
        self.asked = []

    def __call__(self, x, sigma, where=None):
        log_score = super().__call__(x, sigma)
        if where is None:
            return log_score
        self.asked.append(int(where.sum()))
        return log_score[where]


class Enumerator(Reverse):
    """Runs methods without drawing: records the rows of each stage and moves to the outcomes it was told."""

    def __init__(self, score, graph, noise, batch_shape, outcomes=()):
        super().__init__(
            score, graph, noise,
            frozen=torch.zeros(batch_shape, dtype=torch.bool), seeds=torch.zeros(batch_shape[0], dtype=torch.int64),
        )  # fmt: skip
        self.outcomes = list(outcomes)
        self.stages = []

    def redraw(self, x, sigma, where, kernel, *, moves=None, among=None):
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        sequence, position = where.nonzero(as_tuple=True)
        log_score = self.score(x, sigma.double())[sequence, position].double()
        probs = kernel(log_score, x[sequence, position], sequence, position).clamp(min=0)
        rows[sequence, position] = probs / probs.sum(-1, keepdim=True)
        return self._stage(rows, x)

    def flip(self, x, where, state, probability):
        rows = torch.nn.functional.one_hot(x, self.graph.num_states).double()
        sequence, position = where.nonzero(as_tuple=True)
        rows[sequence, position] *= 1 - probability[sequence, None]
        rows[sequence, position, state] += probability[sequence]
        return self._stage(rows, x)

    def _stage(self, rows, x):
        self.stages.append(rows)
        return self.outcomes.pop(0) if self.outcomes else x


class Elsewhere(TorchFunctionMode):
    """Makes what is made without a word on its device where nothing can be read; grids live on the host."""

    def __init__(self, *also):
        super().__init__()
        self.made = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand, torch.randn, *also}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **({"device": "meta"} if func in self.made else {}) | (kwargs or {}))


def all_states(num_states, length):
    return torch.tensor(list(itertools.product(range(num_states), repeat=length)))


def joint(rows):
    """Probabilities (R, N^L) of all states, as `all_states` has them, under independent positions of rows (R, L, N)."""
    p = rows[:, 0]
    for i in range(1, rows.shape[1]):
        p = (p[:, :, None] * rows[:, i, None]).flatten(1)
    return p


def law_of_chain(score, graph, noise, method, times, start, *, stages=1, denoise=False):
    """The exact law (N^L,) after stepping through `times` from the law `start`, by enumeration; no sampling.

    Many steps are enumerated at once: what a step does to a state has nothing to do with the law.
    """
    N, L = score.p0.shape[0], score.p0.ndim
    states = all_states(N, L)
    S, p = len(states), start
    x, outcomes = (states, None) if stages == 1 else (states.repeat_interleave(S, 0), states.repeat(S, 1))
    for some in torch.stack([times[:-1], times[1:]], 1).split(max(1, 2**14 // len(x))):
        K = len(some)
        told = [] if outcomes is None else [outcomes.repeat(K, 1)]  # all pairs (x, middle)
        reverse = Enumerator(score, graph, noise, (K * len(x), L), told)
        method(reverse, x.repeat(K, 1), *some.repeat_interleave(len(x), 0).T)
        transition = joint(reverse.stages[0].view(K, S, -1, L, N)[:, :, 0].reshape(K * S, L, N)).view(K, S, S)
        if stages > 1:
            second = joint(reverse.stages[1]).view(K, S, S, S)
            transition = (transition[:, :, None] @ second)[:, :, 0]
        for each in transition:
            p = p @ each
    if denoise:
        reverse = Enumerator(score, graph, noise, states.shape)
        steps.final_denoise(reverse, states, times[-1].expand(len(states)))
        p = p @ joint(reverse.stages[0])
    return p


def chi_square(x, law):
    """p-value that the states x (R, L) were drawn from `law` (N, ..., N). States of probability 0 must not occur."""
    N, L = law.shape[0], law.ndim
    cell = (x * N ** torch.arange(L - 1, -1, -1)).sum(-1)
    count = torch.bincount(cell, minlength=N**L).double()
    expected = law.flatten() / law.sum() * len(x)
    assert count[expected == 0].sum() == 0
    keep = expected > 0
    assert expected[keep].min() > 5
    return stats.chisquare(count[keep].numpy(), expected[keep].numpy()).pvalue


def random_data(vocab_size, length, num_states=None, mask_id=None, *, seed=0, concentration=1.5):
    """A correlated distribution over sequences, zero wherever the mask appears."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.exp(concentration * torch.randn((vocab_size,) * length, generator=generator, dtype=torch.float64))
    p = p / p.sum() * 0.9 + 0.1 / p.numel()
    num_states = num_states or vocab_size
    if num_states == vocab_size:
        return p
    tokens = torch.tensor([y for y in range(num_states) if y != mask_id])
    full = torch.zeros((num_states,) * length, dtype=torch.float64)
    full[torch.meshgrid(*[tokens] * length, indexing="ij")] = p
    return full


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter with half of its work left out: it patches its language at each call inside a kernel.

    Once a launch for each set of modules does, since nothing is undone before the launch ends.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, {}

    def patch_once(function):
        own = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if own not in patched:
            patched[own] = patch(function)
        return patched[own]

    def launch_anew(self, *args, **how):
        patched.clear()
        return launch(self, *args, **how)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(interpreter, "_patch_lang", patch_once)
        patching.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(scope="session")
def ref():
    """Everything above, as one namespace."""
    return SimpleNamespace(**{k: v for k, v in globals().items() if callable(v) and not k.startswith("_")})

"""One law for every fast path: values and gradients are those of the plain equations, for every graph and precision.

A path takes log-scores and gives the loss of each sequence, of which the gradient by the log-scores is taken. A head
gets them as hidden states and multiplies by the identity. A new path joins by a line in `PATHS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from sedd_objectives import (
    concrete_score_matching,
    denoising_loss,
    denoising_score_entropy,
    fused_denoising_loss,
    plain_concrete_score_matching,
    plain_score_entropy,
    score_entropy,
)
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5}
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8}  # of a gradient that comes in that dtype


class Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None


class Case(NamedTuple):
    graph: Any
    x: Tensor
    x0: Tensor
    sigma: Tensor
    factor: Tensor

    def dense(self, row):
        full = row.base[..., None].expand(*self.x.shape, self.graph.num_states).double()
        return full.scatter(-1, row.index, row.value.double())

    def rows(self):
        return self.graph.ratio(self.x, self.x0, self.sigma), self.graph.rates_into(self.x)

    def plain(self, formula, log_score):
        ratio, rates = (self.dense(row) for row in self.rows())
        return formula(log_score, ratio, rates.clamp_min(0), self.x)


class WithWhere:
    def __init__(self, log_score):
        self.log_score = log_score

    def __call__(self, x, sigma, /, where=None):
        return self.log_score[where]


def dense(case, log_score):
    ratio, rates = (case.dense(row).to(case.sigma.dtype) for row in case.rows())
    return (case.factor * score_entropy(log_score, ratio, rates, case.x)).sum(-1)


def rows(case, log_score):
    ratio, rates = case.rows()
    return (case.factor * score_entropy(log_score, ratio, rates, case.x)).sum(-1)


def denoising(case, log_score):
    return (case.factor * denoising_score_entropy(log_score, case.graph, case.x, case.x0, case.sigma)).sum(-1)


def loss(case, log_score):
    def score(x, sigma):
        return log_score

    return denoising_loss(score, case.graph, noise, case.x0, case.sigma, xt=case.x, weight=case.factor)


def loss_where(case, log_score):
    return denoising_loss(WithWhere(log_score), case.graph, noise, case.x0, case.sigma, xt=case.x, weight=case.factor)


def fused(case, log_score, head):
    """Its gradient arrives with the sum; each sequence's loss is checked without one."""
    found = fused_denoising_loss(
        *(log_score, head, case.graph, case.x, case.x0, case.sigma, torch.ones_like(case.sigma)), weight=case.factor
    )
    return found.per_sequence + (found.total - found.total.detach()) / len(case.x)


def linear_head(case, log_score):
    shift = torch.linspace(-2, 2, len(case.x)).to(log_score.dtype)
    identity = torch.eye(case.graph.num_states, dtype=log_score.dtype)
    bias = torch.ones(case.graph.num_states, dtype=log_score.dtype)
    shifted = log_score - 1 - shift[:, None, None]  # exact in none of the precisions: compared at the tolerance of one
    return fused(case, shifted, Head(identity, bias, shift))


def bare_linear_head(case, log_score):
    return fused(case, log_score, Head(torch.eye(case.graph.num_states, dtype=log_score.dtype), None, None))


def any_head(case, log_score):
    return fused(case, log_score, lambda hidden, x, sigma: hidden)


def noise(t):
    return t, torch.ones_like(t)


PATHS = {
    path.__name__: path for path in (dense, rows, denoising, loss, loss_where, linear_head, bare_linear_head, any_head)
}


CASES = [(name, dtype) for name in PATHS for dtype in TOLERANCE]
CASES.remove(("linear_head", torch.bfloat16))  # its shift and bias round; what follows them is bare_linear_head's


@pytest.fixture
def case(graph, generator):
    x0 = torch.randint(5, (4, 6), generator=generator)
    sigma = torch.tensor([1e-3, 0.1, 1.0, 8.0])
    x = graph.sample(x0, sigma, generator=generator)
    x[0, :3] = (x0[0, :3] + 1) % 5 if graph.mask_id is None else graph.mask_id  # rare at this noise, and dear
    factor = torch.rand(4, 6, generator=generator)
    factor[1, 2:4] = 0
    return Case(graph, x, x0, sigma, factor)


@pytest.mark.parametrize("chunk", [1 << 22, 30])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_score_entropy(name, dtype, chunk, case, generator, monkeypatch):
    for module in ("rows", "fused"):
        monkeypatch.setattr(f"sedd_objectives.fast.{module}.CHUNK_ELEMENTS", chunk)
    if dtype == torch.float64:
        case = case._replace(sigma=case.sigma.double(), factor=case.factor.double())
    log_score = torch.randn(4, 6, case.graph.num_states, generator=generator).to(dtype).requires_grad_()
    exact = log_score.detach().double().requires_grad_()
    want = (case.factor * case.plain(plain_score_entropy, exact)).sum(-1)
    found = PATHS[name](case, log_score)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (slope,), (expected,) = torch.autograd.grad(found.sum(), log_score), torch.autograd.grad(want.sum(), exact)
    largest = float(expected.abs().amax())
    torch.testing.assert_close(slope.double(), expected, rtol=ROUNDING[dtype], atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("chunk", [1 << 22, 30])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_concrete_score_matching(dtype, chunk, case, generator, monkeypatch):
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", chunk)
    if dtype == torch.float64:
        case = case._replace(sigma=case.sigma.double())
    log_score = torch.randn(4, 6, case.graph.num_states, generator=generator).to(dtype).requires_grad_()
    exact = log_score.detach().double().requires_grad_()
    want = case.plain(plain_concrete_score_matching, exact)
    ratio, rates = case.rows()
    found = concrete_score_matching(log_score, ratio, rates, case.x)
    torch.testing.assert_close(found.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (slope,), (expected,) = torch.autograd.grad(found.sum(), log_score), torch.autograd.grad(want.sum(), exact)
    largest = float(expected.abs().amax())
    torch.testing.assert_close(slope.double(), expected, rtol=ROUNDING[dtype], atol=TOLERANCE[dtype] * largest)

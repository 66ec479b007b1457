"""Each kernel against its equation, written with dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from sedd_samplers.steps import denoise_probs, euler_probs, tau_leaping_probs, tweedie_probs

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(4, 2),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(5),
}
KERNELS = [euler_probs, tau_leaping_probs, tweedie_probs, denoise_probs]


@pytest.fixture(params=GRAPHS)
def graph(request, ref):
    return GRAPHS[request.param](ref)


@pytest.fixture
def rows():
    """(log_score, x, delta): every state of five as a start, several times."""
    generator = torch.Generator().manual_seed(0)
    log_score = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return log_score, torch.arange(5).repeat(4), 0.3 * torch.rand(20, generator=generator, dtype=torch.float64)


def concrete(log_score, x):
    s = log_score.exp()
    s[torch.arange(len(x)), x] = 1
    return s


def test_euler(graph, rows):
    log_score, x, delta = rows
    expected = delta[:, None] * graph.Q[x] * concrete(log_score, x)
    for i in range(len(x)):
        expected[i, x[i]] = 0
        expected[i, x[i]] = 1 - expected[i].sum()
    torch.testing.assert_close(euler_probs(log_score, x, graph, delta), expected, rtol=1e-6, atol=1e-7)


def test_tau_leaping_is_the_law_of_clocks_with_fixed_rates(graph, rows):
    """The last clock that rings decides: exp of the generator whose every state jumps to y at the same rate."""
    log_score, x, delta = rows
    got = tau_leaping_probs(log_score, x, graph, delta)
    for i in range(len(x)):
        rates = delta[i] * graph.Q[x[i]] * concrete(log_score, x)[i]
        rates[x[i]] = 0
        clocks = rates[:, None].expand(5, 5) - rates.sum() * torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(got[i], torch.linalg.matrix_exp(clocks)[:, x[i]], rtol=1e-6, atol=1e-7)


def test_tweedie(graph, rows):
    log_score, x, delta = rows
    got = tweedie_probs(log_score, x, graph, delta)
    for i in range(len(x)):
        forward = torch.linalg.matrix_exp(delta[i] * graph.Q)
        expected = (torch.linalg.inv(forward) @ concrete(log_score, x)[i]) * forward[x[i]]
        torch.testing.assert_close(got[i], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.sum(-1), torch.ones(20, dtype=torch.float64), rtol=1e-6, atol=0)


def test_denoise_is_tweedie_without_the_mask(graph, rows):
    log_score, x, sigma = rows
    expected = tweedie_probs(log_score, x, graph, sigma)
    if graph.mask_id is not None:
        expected[:, graph.mask_id] = 0
    torch.testing.assert_close(denoise_probs(log_score, x, graph, sigma), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_entry_at_x_carries_no_information(kernel, graph, rows):
    log_score, x, delta = rows
    other = log_score.scatter(1, x[:, None], float("nan"))
    torch.testing.assert_close(kernel(other, x, graph, delta), kernel(log_score, x, graph, delta), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_log_score_is_left_alone_and_its_precision_kept(kernel, graph, rows):
    log_score, x, delta = rows
    for dtype in (torch.float32, torch.float64):
        given = log_score.to(dtype)
        kept = given.clone()
        probs = kernel(given, x, graph, delta)
        assert probs.dtype == dtype
        assert torch.equal(given, kept)
        torch.testing.assert_close(probs.double(), kernel(log_score, x, graph, delta), rtol=1e-4, atol=1e-5)


def test_an_over_normalised_score_makes_staying_negative(ref):
    """Five per cent too much score at a mask: the equation gives less than nothing for staying, and says so."""
    graph, sigma = ref.StructuredAbsorbing(4), torch.tensor([0.5], dtype=torch.float64)
    log_score = (1.05 * torch.full((1, 5), 0.25) / torch.expm1(sigma)).log()
    probs = tweedie_probs(log_score, torch.tensor([4]), graph, sigma)
    assert float(probs[0, 4]) == pytest.approx(-0.05)

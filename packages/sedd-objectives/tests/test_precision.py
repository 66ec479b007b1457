"""float32 against float64, from the smallest noise to the largest and from two states to a quarter of a million.

Both precisions get the same float32 numbers: sigma, log-score, dsigma. What is compared is everything that the package
and a graph's closed forms do with them.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedd_objectives import denoising_loss

CASES = {2: 800, 3: 800, 5: 800, 32: 800, 257: 100, 4096: 24, 50257: 6, 262144: 4}  # a graph: 10,002 of three graphs

RATES = {"uniform": (1.0, 0.0), "absorbing": (0.0, 1.0), "hybrid": (0.4, 0.7)}  # to a random token, to the mask

noise_levels = st.one_of(
    st.floats(math.log(1e-6), math.log(50)).map(math.exp), st.sampled_from([1e-6, 1e-4, 1e-3, 0.1, 1.0, 8.0, 50.0])
)
distances = st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 10.0, 40.0])


def log_score_near(graph, vector, x, x0, sigma, distance, generator):
    """Float32 log-scores at a distance from the log-ratios, random where the ratio is 0, of scores in range."""
    row = graph.ratio(x, x0, sigma.double())
    log_ratio = vector(*row).dense(graph.num_states).log()
    spread = torch.randn(log_ratio.shape, generator=generator)
    return torch.where(log_ratio.isfinite(), log_ratio + distance * spread, 5 * spread).clamp(-60, 60).float()


def check(found, expected):
    """Relative 1e-5, where float32 has its full precision: from its smallest normal number on."""
    assert found.isfinite().all(), found
    error = (found.double() - expected).abs()
    assert (error <= 1e-5 * expected.abs() + 1.2e-38).all(), (found.tolist(), expected.tolist())


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
def test_losses_and_their_gradients(share, size, kind, hybrid_graph, vector):
    """Most cases at the small sizes, where they are cheap; a twentieth of them in every run."""
    graph = hybrid_graph(size, *RATES[kind])

    @settings(max_examples=math.ceil(share * CASES[size]), deadline=None, derandomize=True, database=None)
    @given(sigma=noise_levels, distance=distances, seed=st.integers(0, 2**31))
    def run(sigma, distance, seed):
        generator = torch.Generator().manual_seed(seed)
        sigma = torch.tensor([sigma, 0.7])
        x0 = torch.randint(size, (2, 2), generator=generator)
        jumped = torch.rand(2, 2, generator=generator) < 0.5
        x = x0 if kind == "absorbing" else torch.where(jumped, (x0 + 1) % size, x0)
        if graph.mask_id is not None:
            x = torch.where(torch.rand(2, 2, generator=generator) < 0.6, graph.mask_id, x)
        log_score = log_score_near(graph, vector, x, x0, sigma, distance, generator)
        losses, slopes = [], []
        for dtype in (torch.float32, torch.float64):
            leaf = log_score.to(dtype).requires_grad_()
            loss = denoising_loss(lambda x, s, leaf=leaf: leaf, graph, lambda t: (t, t), x0, sigma.to(dtype), xt=x)
            losses.append(loss.detach())
            slopes += torch.autograd.grad(loss.sum(), leaf)
        assert losses[0].dtype == torch.float32
        check(losses[0], losses[1])
        check(slopes[0].abs().amax(-1), slopes[1].abs().amax(-1))
        assert (slopes[0] - slopes[1]).abs().amax() <= 1e-5 * slopes[1].abs().amax()

    run()

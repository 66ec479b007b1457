"""Single precision: what the arithmetic after the model loses of it, by a reference in float64, at any noise."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_samplers import Ancestral, Tweedie, sample
from sedd_samplers.adapters import from_posterior
from sedd_samplers.steps import ancestral_probs, denoise_probs, tweedie_probs, tweedie_score

STEPS = [
    (sigma, delta) for sigma in (1.0, 5.0, 9.5, 12.0, 20.0) for delta in (0.01, 1.0, 6.0, 12.0, 19.9) if delta <= sigma
]


def uniform(N, sigma, delta):
    """x, the score and the true law of a step back at every state, in closed form: one token under uniform noise."""
    p0 = (2 * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(0)

    def noised(level):
        return math.exp(-level) * p0 - math.expm1(-level) / N

    # log p_t(y) / p_t(x) without forming the ratio, which is all but 1
    signal = N * math.exp(-sigma) / -math.expm1(-sigma) * p0
    log_score = torch.log1p(signal)[None] - torch.log1p(signal)[:, None]
    keep = math.exp(-delta)
    step = keep * torch.eye(N, dtype=torch.float64) + (1 - keep) / N
    return torch.arange(N), log_score, step * noised(sigma - delta)[None] / noised(sigma)[:, None]


def close(got, true):
    """In total variation, once what is negative is cut off and the rest made to sum to 1."""
    got = got.double().clamp(min=0)
    got = got / got.sum(-1, keepdim=True)
    assert float((got - true).abs().sum(-1).max()) / 2 < 2e-6


@pytest.mark.parametrize("N", [5, 300])
@pytest.mark.parametrize(("sigma", "delta"), STEPS)
def test_steps_back_through_uniform_noise_keep_float32_s_precision(ref, N, sigma, delta):
    """Worked in float32 throughout, the longest are wrong by everything, and D3PM's have no state left to draw."""
    graph = ref.StructuredUniform(N)
    x, log_score, true = uniform(N, sigma, delta)
    level = torch.full((N,), sigma, dtype=torch.float64)
    close(tweedie_probs(log_score.float(), x, graph, torch.full_like(level, delta)), true)
    close(ancestral_probs(log_score.float(), x, graph, level - delta, level), true)


@pytest.mark.parametrize("sigma", [1.0, 9.5, 20.0])
def test_the_posterior_comes_back_from_a_float32_score(ref, sigma):
    graph = ref.StructuredUniform(7)
    x, log_score, _ = uniform(7, sigma, sigma)
    level = torch.full((7,), sigma)
    posterior = denoise_probs(log_score, x, graph, level.double())
    close(denoise_probs(log_score.float(), x, graph, level), posterior / posterior.sum(-1, keepdim=True))
    score = tweedie_score(posterior.clamp(min=0).float(), x, graph, level)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), log_score, rtol=2e-5, atol=1e-7 * math.exp(-sigma))


def test_what_is_wrong_in_a_network_s_score_costs_short_steps_little(ref):
    """Scores off by 1e-3 at sigma = 20: D3PM's step goes by way of clean tokens, of which it knows nothing."""
    graph, generator = ref.StructuredUniform(50), torch.Generator().manual_seed(0)
    for delta in (0.1, 1.0):
        x, log_score, true = uniform(50, 20.0, delta)
        wrong = (log_score + 1e-3 * torch.randn(50, 50, generator=generator, dtype=torch.float64)).float()
        level = torch.full((50,), 20.0, dtype=torch.float64)
        for got in (
            tweedie_probs(wrong, x, graph, torch.full_like(level, delta)),
            ancestral_probs(wrong, x, graph, level - delta, level),
        ):
            assert float((got.double() - true).abs().sum(-1).max()) / 2 < 4e-3 * math.exp(delta)


@pytest.mark.parametrize("method", [Tweedie(), Ancestral()])
def test_one_token_from_high_noise_in_a_few_long_steps(ref, method):
    """A float32 posterior, from sigma = 20 in three steps: exact for one position; a false alarm once in 10,000."""

    class Geometric:
        def __call__(self, t):
            sigma = 1e-3 ** (1 - t) * 20.0**t
            return sigma, sigma * math.log(20.0 / 1e-3)

    graph = ref.StructuredUniform(5)
    p0 = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)

    def posterior(x, sigma):
        keep = torch.exp(-sigma.double())[:, None, None]
        same = torch.nn.functional.one_hot(x, 5)
        return (p0 * (keep * same + (1 - keep) / 5)).float()

    x = sample(from_posterior(posterior, graph), graph, Geometric(), shape=(50_000, 1), steps=3, method=method,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(x, p0) > 1e-4

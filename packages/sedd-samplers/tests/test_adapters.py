"""A model of clean tokens as a score model, and back by Tweedie's theorem."""

from __future__ import annotations

import pytest
import torch
from sedd_samplers import denoise_probs, from_posterior

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(4),
    "absorbing, mask amid the tokens": lambda ref: ref.StructuredAbsorbing(4, 2),
    "uniform": lambda ref: ref.StructuredUniform(5),
    "hybrid": lambda ref: ref.hybrid_matrix(4),
    "cycle": lambda ref: ref.cycle_matrix(5),
}


@pytest.fixture(params=GRAPHS)
def graph(request, ref):
    return GRAPHS[request.param](ref)


def _posterior(graph, x, sigma):
    """Any distribution over the clean tokens that can have become x."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(*x.shape, 5, generator=generator, dtype=torch.float64)
    reach = torch.linalg.matrix_exp(sigma[:, None, None] * graph.Q.double())
    p *= reach.gather(1, x[..., None].expand(-1, -1, 5)) > 0
    if graph.mask_id is not None:
        p[..., graph.mask_id] = 0
    return p / p.sum(-1, keepdim=True)


def _states(graph):
    return torch.arange(5).repeat(2, 1), torch.tensor([0.3, 1.7], dtype=torch.float64)


def test_tweedie_leads_back(graph):
    x, sigma = _states(graph)
    p = _posterior(graph, x, sigma)
    log_score = from_posterior(lambda x, sigma: p, graph)(x, sigma)
    back = denoise_probs(log_score.flatten(0, 1), x.flatten(), graph, sigma.repeat_interleave(5))
    torch.testing.assert_close(back.reshape(p.shape), p, rtol=1e-6, atol=1e-7)


def test_the_score_is_the_sum_over_clean_tokens(graph):
    x, sigma = _states(graph)
    p = _posterior(graph, x, sigma)
    s = from_posterior(lambda x, sigma: p, graph)(x, sigma).exp()
    for b in range(2):
        transition = torch.linalg.matrix_exp(sigma[b] * graph.Q.double())
        for i in range(5):
            clean = [x0 for x0 in range(5) if p[b, i, x0] > 0]
            expected = sum(p[b, i, x0] * transition[:, x0] / transition[x[b, i], x0] for x0 in clean)
            torch.testing.assert_close(s[b, i], expected, rtol=1e-6, atol=1e-7)


def test_the_shape_is_asked_for(graph):
    with pytest.raises(ValueError, match=r"the posterior must return shape \(2, 5, 5\), got \(2, 5, 4\)"):
        from_posterior(lambda x, sigma: torch.ones(2, 5, 4), graph)(*_states(graph))

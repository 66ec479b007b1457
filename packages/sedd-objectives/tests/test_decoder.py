"""The decoder is Tweedie's where that is right, and takes no harm where the inverse of the noise is but noise."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_objectives import reconstruction_loss
from sedd_objectives.decoder import EVEN_SHARE, log_decoder

STATES, T = 32, 0.01


def noise(t):
    """At T a walk whose rate is 1 has moved by a variance of 10, and its inverse amplifies by e^20."""
    return 500 * t, torch.full_like(t, 500.0)


@pytest.fixture
def line(graph_of):
    """Ordered states, each going to its neighbours at rate 1."""
    q = torch.zeros(STATES, STATES, dtype=torch.float64)
    q += torch.diag(torch.ones(STATES - 1, dtype=torch.float64), 1) + torch.diag(torch.ones(STATES - 1).double(), -1)
    return graph_of(q - torch.diag(q.sum(0)))


@pytest.fixture
def data():
    p = torch.rand(STATES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    return p / p.sum()


def reconstruction(line, data, dtype):
    """Of the exact score in a precision, with every clean state and noised one; and that of the exact posterior."""
    kernel = line.exp(noise(torch.tensor([T], dtype=torch.float64))[0])[0]
    joint = kernel * data
    log_p = joint.sum(-1).log()
    x, x0 = torch.cartesian_prod(torch.arange(STATES), torch.arange(STATES)).T[..., None]
    score = (log_p - log_p[x]).to(dtype)[:, None]
    t = torch.full((len(x),), T, dtype=torch.float64)
    loss = reconstruction_loss(lambda x, s: score, line, noise, x0, t, xt=x)
    posterior = joint / joint.sum(-1, keepdim=True)
    blurred = kernel * joint.sum(-1)
    blurred = blurred / blurred.sum(-1, keepdim=True)
    return tuple(
        float(v) for v in ((joint.flatten() * loss).sum(), *(-(joint * p.log()).sum() for p in (posterior, blurred)))
    )


def test_where_the_inverse_is_exact_the_decoder_is_the_posterior(line, data):
    found, best, _ = reconstruction(line, data, torch.float64)
    assert found == pytest.approx(best, abs=2e-3)


def test_where_the_inverse_is_noise_the_decoder_blurs_instead(line, data):
    """Tweedie alone would cost several nats more, and the best possible is not far."""
    found, best, blurred = reconstruction(line, data, torch.float32)
    assert best < found < blurred + 0.1
    assert found < best + 0.6


def test_probabilities_of_all_tokens_sum_to_one_whatever_the_doubt(line, generator):
    x, x0 = torch.full((STATES, 1), 7), torch.arange(STATES)[:, None]
    t = torch.full((STATES,), T, dtype=torch.float64)
    for scale in (0.0, 1.0, 30.0):
        score = scale * torch.randn(1, 1, STATES, generator=generator, dtype=torch.float64).expand(STATES, 1, -1)
        loss = reconstruction_loss(lambda x, s, score=score: score, line, noise, x0, t, xt=x)
        assert float(torch.exp(-loss).sum()) == pytest.approx(1, abs=1e-12)


def test_a_gradient_flows_through_it(graph, log_linear, generator):
    x0 = torch.randint(4, (2, 3), generator=generator)
    t = torch.full((2,), 0.3, dtype=torch.float64)
    xt = graph.sample(x0, log_linear(t)[0], generator=generator)
    xt[:, 0] = graph.num_states - 1
    x0[:, 0] = 4
    score = torch.randn(2, 3, graph.num_states, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = lambda s: reconstruction_loss(lambda x, sigma: s, graph, log_linear, x0, t, xt=xt)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (score,), atol=1e-5)
    assert float(torch.autograd.grad(loss(score).sum(), score)[0].abs().max()) > 0.01


def test_the_doubt_is_twice_the_share_of_the_inverse_that_is_below_zero(graph_of):
    graph = graph_of(torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))
    sigma = torch.full((4,), 0.5, dtype=torch.float64)
    x, x0 = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    a = math.exp(-0.5)
    for ratio in (0.05, 0.15, 0.2, 0.9):  # at x = 0, of state 1 to state 0; below (1 - a) / (1 + a) no data have it
        score = torch.tensor([[1.0, ratio], [1.0, ratio], [ratio, 1.0], [ratio, 1.0]], dtype=torch.float64)
        stay, jump = (1 + a) / 2, (1 - a) / 2
        here, there = (stay - jump * ratio) / a * stay, (stay * ratio - jump) / a * jump
        doubt = min(1.0, 2 * max(-there, 0) / (here + abs(there)))
        own = (1 - doubt) * here / (here + max(there, 0)) + doubt * stay / (stay + jump * ratio)
        expected = torch.tensor([own, 1 - own, 1 - own, own], dtype=torch.float64)
        expected = ((1 - EVEN_SHARE) * expected + EVEN_SHARE / 2).log()
        torch.testing.assert_close(log_decoder(score.log(), graph, x, x0, sigma), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [-2000.0, -100.0, 100.0, 2000.0])
def test_scores_of_any_size_make_a_distribution(level, dtype, graph, generator):
    """No power of e overflows. Of a mask under absorption it is the same at every level that has a power; own
    entries do not count.
    """
    tokens = graph.num_states - (graph.mask_id is not None)
    x0, sigma = torch.arange(tokens), torch.full((tokens,), 0.4, dtype=torch.float64)
    log_score = torch.randn(1, graph.num_states, generator=generator, dtype=torch.float64)
    for state in range(graph.num_states):
        x = torch.full((tokens,), state)
        spoilt = (log_score + level).scatter(-1, x[:1, None], torch.nan).expand(tokens, -1).to(dtype)
        found = log_decoder(spoilt, graph, x, x0, sigma)
        assert float(found.exp().sum()) == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 1e-12)
    if getattr(graph, "a", None) == 0 and dtype == torch.float64 and level > -700:
        torch.testing.assert_close(
            found, log_decoder(log_score.expand(tokens, -1), graph, x, x0, sigma).to(found.dtype)
        )

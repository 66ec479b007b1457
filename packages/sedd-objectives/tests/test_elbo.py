"""The full bound as a loss: its three terms, its mean, its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_objectives import denoising_loss, elbo_loss, likelihood_bound, reconstruction_loss


def test_is_the_sum_of_the_three_terms_with_their_gradient(graph, log_linear, generator):
    log_score = torch.randn(graph.num_states, generator=generator, dtype=torch.float64, requires_grad=True)
    x0, t = torch.randint(4, (3, 4), generator=generator), torch.tensor([0.5, 0.7, 0.9])
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5]).expand(3, 4)
    score = lambda x, s: log_score.expand(*x.shape, -1)  # noqa: E731
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    found = elbo_loss(score, graph, log_linear, x0, t, weight=weight, generator=one, t_min=0.3)
    diffusion = denoising_loss(score, graph, log_linear, x0, t, weight=weight, generator=other)
    lowest = torch.full((3,), 0.3)
    reconstruction = reconstruction_loss(score, graph, log_linear, x0, lowest, weight=weight, generator=other)
    prior = graph.prior_kl(x0, log_linear(torch.ones(3))[0]) * weight
    want = 0.7 * diffusion.double() + reconstruction + prior.double().sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss.sum(), log_score, retain_graph=True)[0] for loss in (found, want)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    of_end = torch.autograd.grad(reconstruction.sum(), log_score)[0]
    assert float(of_end.abs().max()) > 1e-3


def test_its_mean_is_the_bound(graph, log_linear, enumerated, generator):
    """4,000 draws each, within 4.5 standard errors: a false alarm in 150,000 runs a graph."""
    data = enumerated(graph, length=1)
    x0 = data.sequences[1:2].expand(4000, -1)
    loss = elbo_loss(data.score(), graph, log_linear, x0, generator=generator, t_min=0.05)
    bound = likelihood_bound(
        *(data.score(), graph, log_linear, x0), num_times=2, num_reconstructions=2, generator=generator, t_min=0.05
    ).value
    error = float(((loss.var() + bound.var()) / 4000) ** 0.5)
    assert abs(float(loss.mean() - bound.mean())) < 4.5 * error


def test_a_process_that_learns_needs_all_terms(make_graphs, generator):
    """The gradient by a schedule's end is that of the prior's mismatch, too: by differences, x_t held fixed."""
    graph, x0 = make_graphs(4)["absorbing"], torch.randint(4, (2, 5), generator=generator)
    graph.prior_kl = lambda x0, sigma: (torch.exp(-sigma) * math.log(4))[:, None].expand(x0.shape)
    end = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(end):
        noise = lambda t: (end * t.double(), end.expand(t.shape))  # noqa: E731
        score = lambda x, s: -torch.expm1(s).log()[:, None, None] - torch.ones(2, 5, 5).double()  # noqa: E731
        draws = torch.Generator().manual_seed(0)
        return elbo_loss(score, graph, noise, x0, torch.full((2,), 0.5), generator=draws, t_min=0.01).sum()

    found = float(torch.autograd.grad(loss(end), end)[0])
    step = 1e-6
    assert found == pytest.approx(float((loss(end + step) - loss(end - step)).detach() / (2 * step)), rel=1e-4)


def test_bad_t_min_is_named(make_graphs, log_linear):
    with pytest.raises(ValueError, match=r"t_min must lie in \(0, 1\), got 0"):
        elbo_loss(lambda x, s: torch.zeros(1), make_graphs(4)["uniform"], log_linear, torch.zeros(1, 1).long(), t_min=0)

"""Losses on graphs whose rows are all different numbers: far states, tiny noise, slopes where ratios vanish."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Dense, Geometric, Graph, LogLinear, Ordinal
from sedd_objectives import (
    Bound,
    d3pm_bound,
    d3pm_loss,
    denoising_score_entropy_without_constant,
    likelihood_bound,
)
from sedd_samplers.adapters import from_posterior


@pytest.mark.parametrize("num_states", [8, 16, pytest.param(256, marks=pytest.mark.slow)])
def test_d3pm_is_finite_on_ordered_states_and_has_finite_slopes(num_states):
    """Steps at noise from 1e-4 to 8, in float32, of a fresh table of logits."""
    torch.manual_seed(0)
    net = torch.nn.Embedding(num_states, num_states)
    x0 = torch.randint(num_states, (64, 8))
    loss = d3pm_loss(lambda x, s: net(x), Ordinal(num_states), Geometric(1e-4, 8.0), x0, num_steps=1000)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize("num_states", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_d3pm_bounds_the_entropy_on_ordered_states(num_states):
    """One position with the exact posterior, drawn from p: the mean is not below the truth by 4 standard errors.

    The truth is the entropy and KL(p_T || prior), the prior being uniform; in one position there is nothing else.
    """
    generator = torch.Generator().manual_seed(0)
    graph, noise = Ordinal(num_states), Geometric(1e-4, 8.0)
    p = torch.rand(num_states, generator=generator, dtype=torch.float64) ** 3
    p = p / p.sum()
    every = torch.arange(num_states)

    def posterior(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        levels, which = sigma.double().unique(return_inverse=True)
        rows = [graph.transition_into(every, level.expand(num_states)).value for level in levels]
        joint = torch.stack(rows)[which][torch.arange(len(x)), x[:, 0]] * p
        return joint.log().clamp_min(-1e4)[:, None]

    x0 = torch.multinomial(p, 200, replacement=True, generator=generator)[:, None]
    how: dict[str, Any] = {"num_steps": 20, "num_times": 8, "num_reconstructions": 2}
    bound = d3pm_bound(posterior, graph, noise, x0, generator=generator, **how)
    assert bound.value.isfinite().all()
    last = graph.transition_into(every, noise(torch.ones((), dtype=torch.float64))[0].expand(num_states)).value @ p
    truth = float(-(p * p.log()).sum() + (last * (last * num_states).log()).sum())
    error = float(bound.value.std()) / 200**0.5
    assert truth - 4 * error < float(bound.value.mean()) < truth + 0.02 * num_states + 4 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-9, 3e-3, 1.0])
@pytest.mark.parametrize("num_states", [32, 1024])
def test_posteriors_become_scores_by_sums_of_positive_terms(num_states, sigma, dtype):
    """s_y = sum_c p_c T[y, c] / T[x, c], whose likelihoods reach from 1 to 1e-280, for the states to which x can jump.

    Of a posterior that names states further than that no score is lost, either.
    """
    graph, x = Ordinal(num_states), torch.tensor([0, 1, num_states // 3, num_states - 1])
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    posterior = torch.rand(len(x), num_states, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    likelihood = graph.transition_into(x, level).dense()
    p = torch.where(likelihood > 1e-280, posterior, 0)
    p = (p / p.sum(-1, keepdim=True)).to(dtype)
    over = p.double() / torch.where(likelihood > 1e-280, likelihood, 1)
    found, whole = (
        from_posterior(lambda x, sigma, q=q: q[:, None], graph)(x[:, None], level.to(dtype))[:, 0]
        for q in (p, (posterior / posterior.sum(-1, keepdim=True)).to(dtype))
    )
    assert not whole.isnan().any()
    for step in (-1, 1):
        y = (x + step).clamp(0, num_states - 1)
        want = (over * graph.transition_into(y, level).dense()).sum(-1).log()
        there = found.gather(-1, y[:, None])[:, 0].double()
        kept = y != x
        torch.testing.assert_close(there[kept], want[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "graph", [Ordinal(6), Dense(torch.tensor([[-1.0, 0.5, 0.0], [1.0, -1.0, 0.0], [0.0, 0.5, 0.0]])), Absorbing(4)]
)
def test_eq_7_without_its_constant_has_a_slope_by_the_noise(graph: Graph):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(2, (5, 4), generator=generator)
    sigma = torch.full((5,), 0.7, dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(5, 4, graph.num_states, generator=generator, dtype=torch.float64)

    def loss(sigma: torch.Tensor) -> torch.Tensor:
        return denoising_score_entropy_without_constant(log_score, graph, x, x0, sigma)

    leaf = sigma.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    quotient = (loss(sigma + 1e-5) - loss(sigma - 1e-5)).sum(-1) / 2e-5
    torch.testing.assert_close(slope, quotient, rtol=1e-4, atol=1e-5)


def test_a_bound_on_fast_states_by_even_times_is_warned_of_with_what_to_do():
    """Ordinal(64) under LogLinear, one position, the exact score: entropy and KL 3.56 nats.

    At even times a sequence's estimate deviates by more than twice what it does with half of them at small noise, and
    its own standard error is too small by more than that. At the t_min that is named nothing is left to warn of.
    """
    graph, noise, generator = Ordinal(64), LogLinear(), torch.Generator().manual_seed(0)
    p = torch.rand(64, generator=generator, dtype=torch.float64) ** 3
    p = p / p.sum()
    x0 = torch.multinomial(p, 250, replacement=True, generator=generator)[:, None]

    def score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noised = graph.propagate(p.expand(len(sigma), -1), sigma.double()).log()[:, None]
        return noised - noised.gather(-1, x[..., None])

    def bound(**how: Any) -> Bound:
        draws = torch.Generator().manual_seed(1)
        return likelihood_bound(score, graph, noise, x0, num_times=16, generator=draws, **how)

    with pytest.warns(UserWarning, match="small_noise_share|t_min") as said:
        plain = bound()
    rare, late = sorted(str(one.message) for one in said)
    assert re.match(
        r"small_noise_share=0: times even in t leave about \d+ times the variance .*; take small_noise_sh", rare
    )
    assert re.match(r"t_min=0.001: by then 5\d% of the tokens have moved already.*; take t_min=1e-05$", late)
    with pytest.warns(UserWarning, match="t_min"):
        spread = bound(small_noise_share=0.5)
    early = bound(small_noise_share=0.5, t_min=1e-5)  # which warns of nothing: that would be an error here
    assert spread.value.std() < plain.value.std() / 2
    assert plain.standard_error.median() < plain.value.std() / 3
    assert early.reconstruction.mean() < 0.1
    assert plain.reconstruction.mean() > 0.5
    last = graph.propagate(p, noise(torch.ones((), dtype=torch.float64))[0])
    truth = float(-(p * p.log()).sum() + (last * (last * 64).log()).sum())
    assert abs(float(early.value.mean()) - truth) < 4 * float(early.value.std()) / 250**0.5 + 0.01

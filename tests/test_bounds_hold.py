"""No bound is below the truth, and none is not finite: random graphs, data, wrong scores and ranges of noise.

One position. Every clean token and every noised one is enumerated and the integral over the noise taken by quadrature,
so that nothing is left to chance: the mean bound over the data is at least their entropy and KL(p_1 || prior), and is
that for the exact score. Noise from 1e-12 to 1e3, scores in single and double precision.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sedd_graphs import Absorbing, Clustered, Dense, Hybrid, Masked, Neighbours, Ordinal, PacedAbsorbing, Uniform
from sedd_objectives import denoising_loss, reconstruction_loss
from torch import Tensor

PANELS, POINTS = 40, 6
rates = st.floats(0.05, 3.0)


def chain(n: int, seed: int) -> Dense:
    """Any jump, at rates over three orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    Q = (torch.rand(n, n, generator=random, dtype=torch.float64) * 7 - 5).exp().fill_diagonal_(0)
    return Dense(Q - Q.sum(0).diag())


@st.composite
def graphs(draw: Any) -> Any:
    n, mask, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2)), draw(st.integers(0, 1000))
    ring = (torch.arange(n + 1)[:, None] + 1) % (n + 1)
    make = [
        lambda: Absorbing(n, mask_id=mask),
        lambda: PacedAbsorbing(torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 3 + 0.1, mask_id=mask),
        lambda: Uniform(n),
        lambda: Hybrid(n, uniform_rate=draw(rates), mask_rate=draw(rates), mask_id=mask),
        lambda: Clustered([0, *range(n)], within=draw(rates), between=draw(rates)),
        lambda: Ordinal(n),
        lambda: Masked(Ordinal(n), rate=draw(rates), mask_rate=draw(rates), mask_id=mask),
        lambda: Neighbours(ring, between=draw(st.floats(0.5, 2.0))),
        lambda: chain(n, seed),
    ]
    return draw(st.sampled_from(make))()


def levels(least: float, most: float) -> tuple[Tensor, Tensor]:
    """Levels of noise and weights d sigma of Gauss-Legendre in log sigma."""
    k = torch.arange(1, POINTS, dtype=torch.float64)
    beside = torch.diag(k / (4 * k * k - 1).sqrt(), 1)
    node, vectors = torch.linalg.eigh(beside + beside.T)
    weight = 2 * vectors[0] ** 2
    edges = torch.linspace(math.log(least), math.log(most), PANELS + 1, dtype=torch.float64)
    half = edges.diff() / 2
    place = ((edges[1:] + edges[:-1]) / 2)[:, None] + half[:, None] * node
    sigma = place.exp()
    return sigma.flatten(), (half[:, None] * weight * sigma).flatten()


@torch.no_grad()
def mean_bound(
    graph: Any, p: Tensor, wrong: Tensor, least: float, most: float, dtype: torch.dtype
) -> tuple[float, float]:
    """The mean bound over the data p (V,) of a score off by `wrong` (N, N), and what it is for the exact score."""
    tokens = torch.tensor([y for y in range(graph.num_states) if y != graph.mask_id])
    data = torch.zeros(graph.num_states, dtype=torch.float64).index_put((tokens,), p)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        noised = graph.propagate(data.expand(len(sigma), -1), sigma.double()).clamp_min(1e-300).log()[:, None]
        told: Tensor = (noised - noised.gather(-1, x[..., None]) + wrong[x]).to(dtype)
        return told

    def pairs(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moved = graph.transition_from(tokens.expand(len(sigma), -1), sigma).dense() * p[:, None]
        which, before, after = (moved > 0).nonzero().T
        return tokens[before][:, None], after[:, None], moved[which, before, after], sigma[which]

    sigma, weight = levels(least, most)
    of_level = dict(zip(sigma.tolist(), weight.tolist(), strict=True))
    x0, x, probability, at = pairs(sigma)
    share = torch.tensor([of_level[level] for level in at.tolist()], dtype=torch.float64) * probability

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:  # its time is the noise itself
        return t, torch.ones_like(t)

    diffusion = (share * denoising_loss(score, graph, noise, x0, at, xt=x).double()).sum()
    ends = torch.tensor([least, most], dtype=torch.float64)
    x0, x, probability, at = pairs(ends[:1])
    told = (probability * reconstruction_loss(score, graph, noise, x0, at, xt=x)).sum()
    prior = (p * graph.prior_kl(tokens, ends[1])).sum()
    last, meant = graph.propagate(data, ends[1]), graph.prior(ends[1]).dense()
    least_of_all = -torch.xlogy(p, p).sum() + torch.where(last > 0, last * (last / meant).log(), 0).sum()
    return float(diffusion + told + prior), float(least_of_all)


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_no_bound_is_below_the_truth(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(
        graphs(), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0, 4.0]), st.floats(-12, -2), st.floats(0, 3),
        st.sampled_from([torch.float32, torch.float64]),
    )  # fmt: skip
    def check(graph: Any, seed: int, off: float, least: float, most: float, dtype: torch.dtype) -> None:
        random, n = torch.Generator().manual_seed(seed), graph.num_states
        p = torch.rand(n - (graph.mask_id is not None), generator=random, dtype=torch.float64) ** 3 + 1e-6
        wrong = off * torch.randn(n, n, generator=random, dtype=torch.float64)
        bound, truth = mean_bound(graph, p / p.sum(), wrong, 10**least, 10**most, dtype)
        assert math.isfinite(bound)
        assert bound > truth - 2e-4 * (1 + truth)
        if off == 0 and least < -4:  # at more noise the decoder, one for all clean tokens, owes something
            assert bound < truth + 0.02 * (1 + truth)

    check()

"""Exact methods against the true distribution: 200,000 samples of three positions, chi-square over all states.

Each test fails a correct method once in 10,000 seeds.
"""

from __future__ import annotations

import math

import pytest
import torch
from sedd_samplers import (
    ConfidenceUnmasking,
    FirstHitting,
    Reverse,
    Uniformization,
    confidence,
    entropy,
    infill,
    random_order,
    sample,
)
from sedd_samplers.randomness import draw_shared

SAMPLES = 200_000
ALARM = 1e-4

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(3),
    "absorbing, mask first": lambda ref: ref.StructuredAbsorbing(3, 0),
    "uniform": lambda ref: ref.StructuredUniform(3),
    "hybrid": lambda ref: ref.hybrid_matrix(3),
    "cycle": lambda ref: ref.cycle_matrix(3),
}


def problem(ref, name):
    graph = GRAPHS[name](ref)
    vocab_size = graph.num_states - (graph.mask_id is not None)
    p0 = ref.random_data(vocab_size, 3, graph.num_states, graph.mask_id)
    return graph, p0, ref.SpectralScore(p0, graph.Q)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def backwards(ref, graph, score, method, high, low, samples=SAMPLES):
    """p-value of the method's states at noise `low`, started at true ones at noise `high`."""
    sigma = torch.tensor([high, low], dtype=torch.float64)
    start, true = score.marginal(sigma)
    cells = draw_shared(start.flatten(), torch.rand(samples, generator=seeded(), dtype=torch.float64))
    x = ref.all_states(graph.num_states, 3)[cells]
    reverse = Reverse(
        score, graph, ref.Linear(1.0), frozen=torch.zeros_like(x, dtype=torch.bool), seeds=torch.arange(samples)
    )
    t, s = sigma[:, None].expand(2, samples)
    return ref.chi_square(method(reverse, x, t, s), true)


@pytest.mark.parametrize("samples", [SAMPLES // 5, pytest.param(SAMPLES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GRAPHS)
def test_uniformization_takes_one_true_law_to_the_next(ref, name, samples):
    graph, _, score = problem(ref, name)
    assert backwards(ref, graph, score, Uniformization(), 0.7, 0.15, samples) > ALARM


def test_first_hitting_takes_one_true_law_to_the_next(ref):
    graph, _, score = problem(ref, "absorbing")
    assert backwards(ref, graph, score, FirstHitting(), 1.0, 0.1) > ALARM


@pytest.mark.parametrize(("name", "steps"), [("absorbing", 7), ("absorbing, mask first", 1)])
def test_first_hitting_draws_from_the_data(ref, name, steps):
    """From the prior to the sample, whatever the grid; a call for each position and none wasted."""
    graph, p0, score = problem(ref, name)
    x = sample(
        score, graph, ref.LogLinear(), shape=(SAMPLES, 3), steps=steps, t_min=0.0, method=FirstHitting(),
        generator=seeded(),
    )  # fmt: skip
    assert ref.chi_square(x, p0) > ALARM
    assert score.rows == 3 * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_uniformization_draws_from_the_data(ref, name):
    """From the prior to the sample; the prior is 3e-4 from the true law at t = 1, too little to be seen."""
    graph, p0, score = problem(ref, name)
    x = sample(
        score, graph, ref.Linear(8.0 if name != "hybrid" else 14.0), shape=(SAMPLES, 3), steps=2, t_min=1e-4,
        method=Uniformization(), generator=seeded(),
    )  # fmt: skip
    assert ref.chi_square(x, p0) > ALARM


def test_first_hitting_infills_exactly(ref):
    """A middle token that is given: the samples have the conditional distribution."""
    graph, p0, score = problem(ref, "absorbing")
    x = torch.tensor([[0, 1, 0]]).expand(SAMPLES, -1)
    given = torch.tensor([[False, True, False]]).expand(SAMPLES, -1)
    out = infill(
        score, graph, ref.LogLinear(), x=x, given=given, steps=3, t_min=0.0, method=FirstHitting(), generator=seeded()
    )
    law = torch.zeros_like(p0)
    law[:, 1] = p0[:, 1]
    assert ref.chi_square(out, law) > ALARM


@pytest.mark.parametrize("samples", [SAMPLES // 5, pytest.param(SAMPLES, marks=pytest.mark.slow)])
def test_uniformization_infills_exactly(ref, samples):
    """The same by the other exact method, down to the noise at which the denoise takes over."""
    graph, p0, score = problem(ref, "absorbing")
    x = torch.tensor([[0, 1, 0]]).expand(samples, -1)
    given = torch.tensor([[False, True, False]]).expand(samples, -1)
    out = infill(
        score, graph, ref.LogLinear(), x=x, given=given, steps=1, t_min=1e-3, method=Uniformization(),
        generator=seeded(),
    )  # fmt: skip
    law = torch.zeros_like(p0)
    law[:, 1] = p0[:, 1]
    assert ref.chi_square(out, law) > ALARM


@pytest.mark.parametrize(("order", "exact"), [(entropy, True), (random_order, True), (confidence, False)])
def test_one_position_at_a_time_is_the_chain_rule_unless_the_token_is_looked_at(ref, order, exact):
    graph, p0, score = problem(ref, "absorbing")
    x = sample(
        score, graph, ref.LogLinear(), shape=(SAMPLES, 3), steps=3, t_min=1e-4, method=ConfidenceUnmasking(order),
        generator=seeded(),
    )  # fmt: skip
    assert score.rows == 3 * SAMPLES
    assert (ref.chi_square(x, p0) > ALARM) == exact


def test_a_rate_above_the_bound_is_told(ref):
    """Rates that rise in the middle of a window, where its ends do not show it."""
    graph = ref.StructuredUniform(3)

    def score(x, sigma):
        peak = 1.5 * torch.exp(-(((sigma - 0.75) / 0.1) ** 2))
        return peak[:, None, None].expand(*x.shape, 3)

    def run(method):
        x = torch.zeros(100, 3, dtype=torch.int64)
        return infill(
            score, graph, ref.Linear(1.0), x=x, given=x > 0, times=torch.tensor([1.0, 0.5]), method=method,
            denoise=False, seeds=range(100),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"sequence \d+ leaves its state at the rate .* above the bound 3\.0.*slack"):
        run(Uniformization())
    run(Uniformization(slack=1.5 * math.exp(1.5)))  # as the error suggests


def test_uniformization_refuses_noise_without_a_bound(ref):
    graph, _, score = problem(ref, "absorbing")
    for noise, t_min in ((ref.LogLinear(), 0.0),):
        with pytest.raises(ValueError, match=r"finite noise levels above 0.*t_min > 0"):
            sample(score, graph, noise, shape=(2, 3), steps=2, t_min=t_min, method=Uniformization())

"""The distribution of what the samplers return, on problems small enough to enumerate."""

from __future__ import annotations

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    Euler,
    PredictorCorrector,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Unmasking,
    at_rate,
    capped,
    rescaled,
    sample,
    uniform_grid,
)

SAMPLES = 50_000
ALARM = 1e-4  # each chi-square test fails a correct sampler once in 10,000 seeds


def problem(ref, name):
    """(graph, p0): three positions, three or four states, tokens that depend on each other."""
    if name == "absorbing":
        graph = ref.StructuredAbsorbing(3)
    elif name == "absorbing, mask first":
        graph = ref.StructuredAbsorbing(3, 0)
    elif name == "uniform":
        graph = ref.StructuredUniform(3)
    elif name == "hybrid":
        graph = ref.hybrid_matrix(3)
    else:
        graph = ref.cycle_matrix(3)
    vocab_size = graph.num_states - (graph.mask_id is not None)
    return graph, ref.random_data(vocab_size, 3, graph.num_states, graph.mask_id)


GRAPHS = ["absorbing", "absorbing, mask first", "uniform", "hybrid", "cycle"]
ONE_STAGE = [Euler(), TauLeaping(), Tweedie()]


def prior_law(ref, score, graph):
    """The law of sample_prior, independent over positions."""
    limit = ref.MatrixGraph(graph.Q).exp(torch.tensor(200.0))[:, 0]
    return torch.einsum("a,b,c->abc", limit, limit, limit).flatten()


@pytest.mark.parametrize("method", ONE_STAGE)
@pytest.mark.parametrize("name", GRAPHS)
def test_samples_follow_the_law_of_the_discrete_chain(ref, name, method):
    """Three steps and the final denoise: prior, grid, kernels, draws and denoise, all at once."""
    graph, p0 = problem(ref, name)
    score, noise = ref.ExactRows(p0, graph.Q), ref.Linear(2.0)
    law = ref.law_of_chain(
        score, graph, noise, method, uniform_grid(3, 0.1), prior_law(ref, score, graph), denoise=True
    ).reshape(p0.shape)
    x = sample(
        score, graph, noise, shape=(SAMPLES, 3), steps=3, t_min=0.1, method=method,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    if graph.mask_id is not None:
        assert not (x == graph.mask_id).any()
    assert ref.chi_square(x, law) > ALARM


@pytest.mark.parametrize(
    ("name", "method", "stages"),
    [
        ("hybrid", Ancestral(), 1),
        ("hybrid", Trapezoidal(0.4), 2),
        ("uniform", Trapezoidal(), 2),
        ("hybrid", PredictorCorrector(), 2),
        ("absorbing", PredictorCorrector(Euler()), 2),
        ("absorbing", Remasking(capped(0.3)), 2),
        ("absorbing, mask first", Remasking(capped(0.3)), 2),
    ],
)
def test_samples_follow_the_law_of_a_chain_of_two_draws_a_step(ref, name, method, stages):
    graph, p0 = problem(ref, name)
    score, noise = ref.ExactScore(p0, graph.Q), ref.Linear(2.0)
    times = uniform_grid(2, 0.2)
    law = ref.law_of_chain(
        score, graph, noise, method, times, prior_law(ref, score, graph), stages=stages, denoise=True
    ).reshape(p0.shape)
    x = sample(score, graph, noise, shape=(SAMPLES, 3), times=times, method=method,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(x, law) > ALARM


FOR_MASKS = [Unmasking(), Remasking(capped(0.3)), Remasking(rescaled(0.5)), Remasking(at_rate(1.0))]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in ("absorbing", "uniform", "hybrid", "cycle")
        for method in (Euler(), Tweedie(), Ancestral())
    ]
    + [("absorbing", method) for method in FOR_MASKS],
)
def test_one_token_is_exact_in_any_number_of_steps(ref, name, method):
    """With a single position the Tweedie step is the true reverse; Euler is not, and the test can tell.

    Of the least of Euler's errors, total variation .027 (hybrid), 100,000 samples have a chi-square of 740.
    """
    graph, _ = problem(ref, name)
    vocab_size = graph.num_states - (graph.mask_id is not None)
    p0 = ref.random_data(vocab_size, 1, graph.num_states, graph.mask_id)
    noise = ref.Linear(12.0 if name != "hybrid" else 24.0)
    x = sample(
        ref.ExactRows(p0, graph.Q), graph, noise, shape=(2 * SAMPLES, 1), steps=4, t_min=0.01, method=method,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    exact = ref.chi_square(x, p0) > ALARM
    assert exact == (method != Euler() or name == "absorbing")

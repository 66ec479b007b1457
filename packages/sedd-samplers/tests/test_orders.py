"""Orders of convergence: the exact law of the discrete chain, by enumeration in float64, against the true law."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    at_rate,
    capped,
    rescaled,
)
from sedd_samplers.multistage import correct, corrector_probs
from sedd_samplers.steps import ancestral_probs, leap, reverse_rates, tweedie_probs

GRAPHS = {
    "absorbing": lambda ref: ref.StructuredAbsorbing(3),
    "uniform": lambda ref: ref.StructuredUniform(3),
    "hybrid": lambda ref: ref.hybrid_matrix(3),
    "cycle": lambda ref: ref.cycle_matrix(3),
}


def problem(ref, name, *, length=3, concentration=1.5):
    graph = GRAPHS[name](ref)
    vocab_size = graph.num_states - (graph.mask_id is not None)
    p0 = ref.random_data(vocab_size, length, graph.num_states, graph.mask_id, concentration=concentration)
    return graph, ref.SpectralScore(p0, graph.Q)


def errors(ref, name, method, counts, *, stages=1, start=1.0, end=0.2, **data):
    """Total variation between the chain's law and the true p_t, started at the true p_t, for several step counts."""
    graph, score = problem(ref, name, **data)
    noise = ref.Linear(1.5)
    begin, true = score.marginal(noise(torch.tensor([start, end]).double())[0]).flatten(1)
    out = []
    for n in counts:
        times = torch.linspace(start, end, n + 1, dtype=torch.float64)
        law = ref.law_of_chain(score, graph, noise, method, times, begin, stages=stages)
        out.append(float((law - true).abs().sum()) / 2)
    return out


def slope(counts, values):
    return -math.log(values[-1] / values[0]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize("method", [Euler(), TauLeaping(), Tweedie(), Ancestral()])
@pytest.mark.parametrize("name", GRAPHS)
def test_first_order(ref, name, method):
    counts = [32, 64, 128]
    assert slope(counts, errors(ref, name, method, counts)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", GRAPHS)
def test_predictor_corrector_is_of_first_order(ref, name):
    counts = [24, 48]
    method = PredictorCorrector(Tweedie(), ratio=0.5)
    assert slope(counts, errors(ref, name, method, counts, stages=2)) == pytest.approx(1, abs=0.15)


def test_remasking_at_a_rate_is_of_first_order(ref):
    counts = [24, 48]
    method = Remasking(at_rate(1.0))
    assert slope(counts, errors(ref, "absorbing", method, counts, stages=2)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("theta", [0.5, 0.4])
@pytest.mark.parametrize("name", GRAPHS)
def test_trapezoidal_is_of_second_order(ref, name, theta):
    """With data so gentle that no rate falls by half when another position moves: the positive part does not bind."""
    counts = [16, 32]
    got = errors(ref, name, Trapezoidal(theta), counts, stages=2, concentration=0.3)
    assert slope(counts, got) == pytest.approx(2, abs=0.15)


@dataclass(frozen=True)
class Subtracting:
    """The trapezoidal step with alpha_2 a(x) subtracted everywhere, whether the position has moved or not."""

    def __call__(self, reverse, x, t, s):
        kept = []

        def rates(time):
            sigma, dsigma = reverse.noise(time)
            return sigma, lambda log_score, x, b: reverse_rates(log_score, x, reverse.graph) * dsigma[b, None]

        def to_star(log_score, x, b, i):
            kept.append(a(log_score, x, b))
            return leap(kept[0] * (t - s)[b, None] / 2, x)

        def from_star(log_score, x_star, b, i):
            deltas = (2 * a_star(log_score, x_star, b) - kept[0]).clamp(min=0) * (t - s)[b, None] / 2
            return leap(deltas.scatter(1, x_star[:, None], 0.0), x_star)

        sigma, a = rates(t)
        x_star = reverse.redraw(x, sigma, reverse.movable(x), to_star)
        sigma, a_star = rates((t + s) / 2)
        return reverse.redraw(x_star, sigma, reverse.movable(x_star), from_star)


@pytest.mark.parametrize("name", ["uniform", "cycle"])
def test_a_label_that_has_moved_must_not_be_extrapolated(ref, name):
    """Why Trapezoidal asks which positions stood still: without that the order is lost, even for one position."""
    counts = [64, 256]
    orders = [slope(counts, errors(ref, name, m, counts, stages=2, length=1)) for m in (Subtracting(), Trapezoidal())]
    assert orders == pytest.approx([1, 2], abs=0.15)


def test_strong_dependence_costs_the_trapezoidal_method_its_order_but_not_its_lead(ref):
    counts = [16, 32, 64]
    second = errors(ref, "absorbing", Trapezoidal(), counts, stages=2)
    first = errors(ref, "absorbing", TauLeaping(), [2 * n for n in counts])  # as many evaluations
    assert 1 < slope(counts, second) < 1.5
    assert all(a < b / 2 for a, b in zip(second, first, strict=True))


def corrected(ref, graph, score, sigma, delta, law, kernel=correct):
    """The law after one corrector step, by enumeration."""
    states = ref.all_states(graph.num_states, score.p0.ndim)
    reverse = ref.Enumerator(score, graph, ref.Linear(1.0), states.shape)
    level = torch.full((len(states),), sigma, dtype=torch.float64)
    kernel(reverse, states, level, torch.full_like(level, delta))
    return law @ ref.joint(reverse.stages[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_a_corrector_leaves_the_true_law_where_it_is(ref, name):
    """But for tau-leaping's own error, of second order in the delta: the rates themselves are stationary."""
    graph, score = problem(ref, name)
    p = score.marginal(torch.tensor([0.6]).double())[0].flatten()
    deltas = [0.02, 0.01, 0.005]
    moved = [float((corrected(ref, graph, score, 0.6, delta, p) - p).abs().sum()) / 2 for delta in deltas]
    assert slope([1 / d for d in deltas], moved) == pytest.approx(2, abs=0.15)
    wrong = [float((corrected(ref, graph, score, 0.7, delta, p) - p).abs().sum()) / 2 for delta in deltas]
    assert slope([1 / d for d in deltas], wrong) == pytest.approx(1, abs=0.15)  # of another noise level, it is not


@pytest.mark.parametrize("name", GRAPHS)
def test_correctors_lead_back_to_the_true_law(ref, name):
    graph, score = problem(ref, name)
    p = score.marginal(torch.tensor([0.6]).double())[0].flatten()
    law = torch.full_like(p, 1 / len(p)) * (p > 0)
    law = law / law.sum()
    before = float((law - p).abs().sum())
    for _ in range(40):
        law = corrected(ref, graph, score, 0.6, 0.05, law)
    assert float((law - p).abs().sum()) < before / 5


@pytest.mark.parametrize("name", GRAPHS)
def test_the_corrector_is_tau_leaping_with_both_rates(ref, name):
    graph = GRAPHS[name](ref)
    N = graph.num_states
    generator = torch.Generator().manual_seed(0)
    log_score = torch.randn(N, N, generator=generator, dtype=torch.float64)
    delta = 0.5 * torch.rand(N, generator=generator, dtype=torch.float64)
    x = torch.arange(N)
    got = corrector_probs(log_score, x, graph, graph.rates_out_of(x), delta)
    for i in range(N):
        rates = delta[i] * (graph.Q[:, i] + graph.Q[i] * log_score[i].exp())
        rates[i] = 0
        clocks = rates[:, None].expand(N, N) - rates.sum() * torch.eye(N, dtype=torch.float64)
        torch.testing.assert_close(got[i], torch.linalg.matrix_exp(clocks)[:, i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", [capped(0.4), rescaled(0.7), at_rate(2.0)])
def test_remasking_keeps_one_position_exact_at_any_number_of_steps(ref, schedule):
    got = errors(ref, "absorbing", Remasking(schedule), [1, 2, 5], stages=2, length=1)
    assert max(got) < 1e-6


def test_remasking_a_fixed_share_of_every_step_does_not_converge(ref):
    got = errors(ref, "absorbing", Remasking(capped(0.3)), [16, 64], stages=2)
    assert got[1] > got[0] / 2


@pytest.mark.parametrize("name", GRAPHS)
def test_ancestral_is_the_sum_over_clean_tokens_and_equals_tweedie(ref, name):
    """Against the definition with dense matrices, and against Tweedie, whose equality the module derives."""
    graph = GRAPHS[name](ref)
    N = graph.num_states
    tokens = [y for y in range(N) if y != graph.mask_id]
    generator = torch.Generator().manual_seed(0)
    forward = {s: torch.linalg.matrix_exp(s * graph.Q) for s in (0.3, 0.4, 0.7)}
    for x in range(N) if name != "absorbing" else [graph.mask_id]:
        prior = torch.zeros(N, dtype=torch.float64)
        prior[tokens] = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
        joint = forward[0.7][x] * prior
        clean = joint / joint.sum()  # p(x0 | x)
        p_t = forward[0.7] @ prior
        expected = torch.zeros(N, dtype=torch.float64)
        for x0 in tokens:
            for y in range(N):
                if forward[0.7][x, x0] > 0:
                    expected[y] += clean[x0] * forward[0.4][x, y] * forward[0.3][y, x0] / forward[0.7][x, x0]
        log_score, at = (p_t / p_t[x]).log()[None], torch.tensor([x])
        sigma_s, sigma_t = torch.tensor([[0.3], [0.7]], dtype=torch.float64)
        got = ancestral_probs(log_score, at, graph, sigma_s, sigma_t)[0]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got, tweedie_probs(log_score, at, graph, sigma_t - sigma_s)[0], rtol=1e-6, atol=1e-7)


def test_ancestral_keeps_the_chance_of_staying_masked_whatever_the_model_says(ref):
    graph, sigma = ref.StructuredAbsorbing(4), torch.tensor([0.5], dtype=torch.float64)
    log_score = (1.5 * torch.tensor([[0.1, 0.2, 0.3, 0.4, 1.0]]) / torch.expm1(sigma)).log()
    probs = ancestral_probs(log_score, torch.tensor([4]), graph, sigma / 2, sigma)[0]
    stay = math.expm1(-0.25) / math.expm1(-0.5)
    assert float(probs[4]) == pytest.approx(stay)
    assert probs[:4].tolist() == pytest.approx([(1 - stay) * p for p in (0.1, 0.2, 0.3, 0.4)])

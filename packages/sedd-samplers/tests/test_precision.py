"""Single precision: what the arithmetic after the model loses of it, by a reference in float64, at any noise."""

from __future__ import annotations

import math

import pytest
import torch
from sedd_samplers import Ancestral, Reverse, Tweedie, sample
from sedd_samplers.adapters import from_posterior
from sedd_samplers.leave_one_out import without_own
from sedd_samplers.precision import check_recoverable, fastest_rate, working_dtype
from sedd_samplers.steps import ancestral_probs, denoise_probs, tweedie_probs

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
    close(tweedie_probs(log_score.float().double(), x, graph, torch.full_like(level, delta)), true)
    close(ancestral_probs(log_score.float().double(), x, graph, level - delta, level), true)


@pytest.mark.parametrize("sigma", [1.0, 9.5, 20.0])
def test_the_posterior_comes_back_from_a_float32_score(ref, sigma):
    graph = ref.StructuredUniform(7)
    x, log_score, _ = uniform(7, sigma, sigma)
    level = torch.full((7,), sigma)
    posterior = denoise_probs(log_score, x, graph, level.double())
    close(denoise_probs(log_score.float().double(), x, graph, level), posterior / posterior.sum(-1, keepdim=True))
    clean = posterior.clamp(min=0).float()
    score = from_posterior(lambda x, sigma: clean[None], graph)(x[None], level[:1])[0]
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


def walk(N, sigma):
    """exp(sigma Q) of a walk on N ordered states, every entry precise relative to itself: all terms are positive."""
    rate = 0.25 / math.sin(math.pi / (2 * N)) ** 2
    stay = torch.eye(N, dtype=torch.float64)
    step = torch.diag(torch.ones(N - 1, dtype=torch.float64), 1)
    Q = rate * (step + step.T)
    Q -= torch.diag(Q.sum(0))
    jump, weight = stay + Q / (2 * rate), math.exp(-2 * rate * sigma)
    out = torch.zeros_like(Q)
    for k in range(400):
        out += weight * stay
        stay, weight = jump @ stay, weight * 2 * rate * sigma / (k + 1)
    return Q, out


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [3e-3, 0.03])
def test_the_score_of_a_posterior_over_far_states_is_the_sum_of_positive_terms(ref, sigma, precision):
    """32 ordered states, of which some can become others only with 1e-40: no term of the sum may be lost."""
    Q, forward = walk(32, sigma)

    class Walk(ref.MatrixGraph):  # type: ignore[misc, name-defined]
        def transition_into(self, x, sigma):
            return self._row(forward[x])

    graph, x = Walk(Q), torch.arange(32)[None]
    p = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1).to(precision)
    got = from_posterior(lambda x, sigma: p, graph)(x, torch.tensor([sigma], dtype=precision))
    expected = torch.stack([
        sum(p[0, i, c].double() * forward[:, c] / forward[i, c] for c in range(32)) for i in range(32)
    ])[None]  # fmt: skip
    error = 1e-6 if precision == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), expected.log(), rtol=error, atol=error)


@pytest.mark.parametrize(("rate", "D"), [(1.0, 2.0), (5.0, 2.0), (0.2, 12.0)])
def test_what_is_worked_in_float64_does_not_depend_on_the_batch(ref, rate, D):
    """By the graph's fastest rate: ordered states, where errors grow by e^(4 D), beside others with less to undo."""
    graph = ref.MatrixGraph(rate * ref.ordinal_matrix(5).Q)
    score = ref.ExactScore(torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]), graph.Q)
    seen = []

    class Looking(Reverse):
        def redraw(self, x, sigma, where, kernel, *, moves=None, among=None):
            def look(log_score, *rest):
                seen.append(log_score.dtype)
                return kernel(log_score, *rest)

            return super().redraw(x, sigma, where, look, among=among)

    reverse = Looking(lambda x, sigma: score(x, sigma.double()).float(), graph, ref.Linear(D),
                      frozen=torch.zeros(2, 1).bool(), seeds=torch.arange(2))  # fmt: skip
    Tweedie()(reverse, torch.zeros(2, 1).long(), torch.tensor([1.0, 0.1]).double(), torch.tensor([0.01, 0.09]).double())
    assert seen == [torch.float64]


@pytest.mark.parametrize(
    ("name", "rate"), [("absorbing", 0.0), ("uniform", 1.0), ("hybrid", 1.0), ("ordinal", 3.618), ("cycle", 1.95)]
)
def test_the_fastest_rate_is_the_largest_eigenvalue_of_what_noises_tokens(ref, name, rate):
    graph = {
        "absorbing": ref.StructuredAbsorbing(4, 2),
        "uniform": ref.StructuredUniform(5),
        "hybrid": ref.hybrid_matrix(4),
        "ordinal": ref.ordinal_matrix(5),
        "cycle": ref.cycle_matrix(5),
    }[name]
    largest = float(torch.linalg.eigvals(graph.Q).abs().max()) if rate else 0.0
    assert fastest_rate(graph) == pytest.approx(largest, rel=0.15)
    assert largest == pytest.approx(rate, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_posterior_is_told_from_a_score_up_to_a_thousandth(dtype):
    """e^(rate sigma) eps <= 1e-3, to the last sigma; where nothing is noised, or nothing asked, at any."""
    limit = math.log(1e-3 / torch.finfo(dtype).eps) / 2.5
    check_recoverable(2.5, torch.tensor([0.1, limit - 1e-6], dtype=torch.float64), dtype)
    with pytest.raises(ValueError, match=f"cannot be told from a {dtype} score at sigma = .* beyond {limit:.3g}"):
        check_recoverable(2.5, torch.tensor([0.1, limit + 1e-6], dtype=torch.float64), dtype)
    check_recoverable(0.0, torch.tensor([1e9]), dtype)
    check_recoverable(2.5, torch.empty(0), dtype)


def test_rows_are_worked_in_float64_where_errors_grow():
    cpu = torch.device("cpu")
    assert (working_dtype(1e-9, cpu), working_dtype(0.0, cpu)) == (torch.float64, torch.float32)
    assert working_dtype(1.0, torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("dtype", "likely", "hardly"), [(torch.float64, 1e-300, 1e-302), (torch.float32, 1e-30, 1e-32)]
)
def test_a_likelihood_whose_inverse_adds_up_to_no_number_is_none(ref, dtype, likely, hardly):
    """And one of 0, whatever a model says of such a state: 0 without a gradient, not 0 / 0."""

    class Rows(ref.MatrixGraph):  # type: ignore[misc, name-defined]
        def transition_into(self, x, sigma):
            return self._row(torch.tensor([[1.0, likely, hardly, 0.0]], dtype=dtype))

    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=dtype, requires_grad=True)
    out = without_own(probs, torch.tensor([0]), Rows(ref.cycle_matrix(4).Q), torch.ones(1, dtype=dtype))
    assert out.tolist()[0] == pytest.approx([0.5, 0.25 / likely, 0.0, 0.0], rel=1e-6)
    assert torch.autograd.grad(out[0, [0, 2, 3]].sum(), probs)[0].tolist() == [[1.0, 0.0, 0.0, 0.0]]

"""With the exact score of an enumerable distribution the bound is its entropy plus the mismatch of the prior."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sedd_objectives import denoising_score_entropy, likelihood_bound, reconstruction_loss

T_MIN = 1e-4


def kl_to_prior(data, graph, sigma):
    """KL(p_1 || prior), the prior being uniformly random tokens after noise sigma."""
    uniform = torch.zeros_like(data.probability) + 1 / len(data.probability)
    p, prior = data.marginal(sigma), data.kernel(sigma) @ uniform
    return float(torch.where(p > 0, p * (p / prior).log(), 0).sum())


def pairs(data):
    """Every (x, x0), with log-score, flattened to a batch."""
    number = torch.cartesian_prod(torch.arange(len(data.states)), torch.arange(len(data.sequences)))
    return data.states[number[:, 0]], data.sequences[number[:, 1]], number[:, 0]


@pytest.mark.parametrize("schedule", ["log_linear", "geometric"])
def test_bound_is_entropy_plus_kl_by_quadrature(graph, schedule, enumerated, request):
    noise = request.getfixturevalue(schedule)
    data = enumerated(graph, length=2, tokens=graph.num_states - (graph.mask_id is not None))
    x, x0, state = pairs(data)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = (float(noise(torch.tensor(t, dtype=torch.float64))[0].log()) for t in (T_MIN, 1.0))
    diffusion = 0.0
    for node, weight in zip(nodes, weights, strict=True):  # over log sigma: the integral does not know the schedule
        sigma = torch.tensor(np.exp(low + (high - low) * (node + 1) / 2))
        joint = data.kernel(sigma) * data.probability
        possible = joint.flatten() > 0
        log_score = data.log_ratios(data.states, sigma.expand(len(data.states)))[state]
        loss = denoising_score_entropy(
            log_score[possible], graph, x[possible], x0[possible], sigma.expand(int(possible.sum()))
        )
        diffusion += weight * (high - low) / 2 * float(sigma * (joint.flatten()[possible] * loss.sum(-1)).sum())

    t_min = torch.tensor(T_MIN, dtype=torch.float64)
    joint = (data.kernel(noise(t_min)[0]) * data.probability).flatten()
    possible = joint > 0
    losses = reconstruction_loss(
        data.score(), graph, noise, x0[possible], t_min.expand(int(possible.sum())), xt=x[possible]
    )
    reconstruction = float((joint[possible] * losses).sum())
    sigma_1 = noise(torch.ones(1, dtype=torch.float64))[0]
    prior = (graph.prior_kl(data.sequences, sigma_1.expand(len(data.sequences))).sum(-1) * data.probability).sum()
    bound = diffusion + reconstruction + float(prior)
    assert bound == pytest.approx(data.entropy() + kl_to_prior(data, graph, float(sigma_1)), abs=1e-3)


def test_bound_is_entropy_plus_kl_by_sampling(graph, log_linear, enumerated, generator):
    """Within 4 standard errors: a false alarm in 16,000 runs a graph."""
    data = enumerated(graph, length=2)
    x0 = data.sample(400, generator)
    bound = likelihood_bound(data.score(), graph, log_linear, x0, num_times=16, generator=generator, t_min=T_MIN)
    want = data.entropy() + kl_to_prior(data, graph, float(log_linear(torch.ones(()))[0]))
    error = float(bound.value.std() / len(x0) ** 0.5)
    assert abs(float(bound.value.mean()) - want) < 4 * error
    torch.testing.assert_close(bound.value, bound.diffusion + bound.prior + bound.reconstruction)
    assert bound.value.dtype == torch.float64


def test_standard_error_is_the_spread_over_seeds(graph, log_linear, enumerated):
    """Mean squared standard error against the variance over 300 seeds; both know it to some 10 %, 40 % are allowed."""
    data = enumerated(graph, length=1)
    x0 = data.sequences[:1].expand(300, -1)
    bound = likelihood_bound(
        data.score(), graph, log_linear, x0, num_times=8, generator=torch.Generator().manual_seed(5)
    )
    ratio = float((bound.standard_error**2).mean() / bound.value.var())
    assert 0.6 < ratio < 1.4


def test_any_score_gives_a_bound(graph, log_linear, enumerated, generator):
    """A wrong score can only raise the mean above the entropy; the true score's bound lies below it."""
    data = enumerated(graph, length=2)
    wrong = torch.randn(graph.num_states, generator=generator, dtype=torch.float64)

    def score(x, sigma):
        return data.log_ratios(x, sigma) + wrong

    x0 = data.sample(200, generator)
    bound = likelihood_bound(score, graph, log_linear, x0, num_times=8, generator=generator, t_min=T_MIN)
    assert float(bound.value.mean()) > data.entropy() + 0.05


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_times_at_small_noise_take_the_skew_out_of_the_bound(kind, make_graphs, log_linear, enumerated):
    """20,000 sequences with 8 times: a mean within 4 standard errors (a false alarm in 16,000), and less of a tail."""
    graph = make_graphs(5)[kind]
    data, found = enumerated(graph, length=1), {}
    for share in (0.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        x0 = data.sample(20_000, generator)
        how: dict[str, Any] = {"num_times": 8, "num_reconstructions": 2, "generator": generator, "t_min": 1e-5}
        found[share] = likelihood_bound(data.score(), graph, log_linear, x0, small_noise_share=share, **how).value
    plain, ours = found[0.0], found[0.5]
    error = ((plain.var() + ours.var()) / 20_000) ** 0.5
    assert abs(plain.mean() - ours.mean()) < 4 * error
    plain_skew, skew = (float(((v - v.mean()) / v.std()).pow(3).mean()) for v in (plain, ours))
    assert skew < 0.5 * plain_skew
    assert ours.var() < plain.var()


def test_reconstruction_normalises_over_tokens(graph, log_linear, generator):
    """Summed over all clean tokens the decoder's probabilities are 1, whatever the score: else it is no bound."""
    tokens = graph.num_states - (graph.mask_id is not None)
    log_score = 3 * torch.randn(1, 1, graph.num_states, generator=generator, dtype=torch.float64)
    x = torch.full((1, 1), graph.num_states - 1)
    t = torch.full((1,), 0.3, dtype=torch.float64)
    total = 0.0
    for y in range(tokens):
        x0 = torch.full((1, 1), y)
        total += float(torch.exp(-reconstruction_loss(lambda x, s: log_score, graph, log_linear, x0, t, xt=x)))
    assert total == pytest.approx(1, abs=1e-12)


def test_padding_leaves_all_three_terms_unchanged(graph, log_linear, enumerated):
    data = enumerated(graph, length=1)

    def padded(x, sigma):
        return data.log_ratios(x[:, :1], sigma).expand(-1, x.shape[1], -1)

    x0 = torch.tensor([[2, 0, 0]]).expand(500, 3)
    weight = torch.tensor([[1, 0, 0]]).expand(500, 3)
    kwargs: dict[str, Any] = {"num_times": 16, "generator": torch.Generator().manual_seed(0), "small_noise_share": 0.5}
    one = likelihood_bound(data.score(), graph, log_linear, x0[:, :1], **kwargs)
    other = likelihood_bound(padded, graph, log_linear, x0, weight=weight, **kwargs)
    assert torch.equal(one.prior, other.prior)
    error = float((one.value.var() + other.value.var()).sqrt() / 500**0.5)
    assert abs(float(one.value.mean() - other.value.mean())) < 4 * error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((2, 3), 9)}, "x0 must lie in"),
        ({"num_times": 7}, "num_times must be even"),
        ({"num_reconstructions": 1}, "num_reconstructions must be at least 2"),
        ({"t_min": 0.0}, "t_min must lie in"),
        ({"small_noise_share": 1.0}, "small_noise_share must lie in"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"score": lambda x, s: torch.full((2, 3, 6), float("nan"))}, "log_score is NaN"),
    ],
)
def test_bad_input_is_named(arguments, message, make_graphs, log_linear):
    graph = make_graphs(5)["absorbing"]
    arguments = {"score": lambda x, s: torch.zeros(2, 3, 6), "x0": torch.zeros(2, 3, dtype=torch.int64)} | arguments
    score, x0 = arguments.pop("score"), arguments.pop("x0")
    with pytest.raises(ValueError, match=message):
        likelihood_bound(score, graph, log_linear, x0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.full((2, 3), 9)}, "x0 must lie in"),
        ({"xt": torch.zeros(2, 2, dtype=torch.int64)}, "xt must have shape"),
        ({"xt": torch.full((2, 3), -1)}, "xt must lie in"),
        ({"t": torch.ones(3)}, r"t must be floating, of shape \(B,\) or \(B, L\)"),
        ({"t": torch.full((2,), -1.0)}, "sigma is a total noise and must be >= 0"),
        ({"weight": torch.zeros(2)}, "weight is 0 at every position"),
        ({"score": lambda x, s: torch.zeros(2, 3, 4)}, "score model must return log_score of shape"),
        ({"score": lambda x, s: torch.full((2, 3, 5), float("nan"))}, "log_score is NaN"),
    ],
)
def test_bad_input_of_the_reconstruction_is_named(change, message, make_graphs, log_linear):
    arguments: dict[str, Any] = {"score": lambda x, s: torch.zeros(2, 3, 5), "x0": torch.zeros(2, 3, dtype=torch.int64)}
    arguments |= {"t": torch.full((2,), 0.1), "xt": None, "weight": None} | change
    score, x0, t = (arguments.pop(name) for name in ("score", "x0", "t"))
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(score, make_graphs(5)["uniform"], log_linear, x0, t, **arguments)


@pytest.fixture
def made_of(monkeypatch, log_linear):
    """(graph, losses, **how) -> the bound of 64 sequences whose loss at the times t is losses(t)."""
    module = importlib.import_module("sedd_objectives.bound")

    def bound(graph, losses, **how):
        monkeypatch.setattr(module, "denoising_loss", lambda s, g, n, x0, t, **_: losses(t))
        monkeypatch.setattr(module, "reconstruction_loss", lambda *_, **__: torch.zeros(64, dtype=torch.float64))
        options: dict[str, Any] = {"num_times": 8, "num_reconstructions": 2} | how
        x0, generator = torch.zeros(64, 2, dtype=torch.int64), torch.Generator().manual_seed(0)
        return likelihood_bound(lambda x, s: None, graph, log_linear, x0, generator=generator, **options)

    return bound


def rare(t):
    """Losses of which nearly all the variance is at small times."""
    return torch.where(t < 0.02, 1 / t, 0)


def even(t):
    return t


def test_rare_losses_at_small_noise_are_warned_of_where_there_are_enough(made_of, make_graphs):
    """512 draws can tell; not where times are drawn by the noise already, nor where the spread is even."""
    graph = make_graphs(5)["uniform"]
    with pytest.warns(UserWarning, match=r"small_noise_share=0: times even in t leave about \d+ times .*share=0.5, or"):
        made_of(graph, rare)
    made_of(graph, rare, num_times=6)  # 384 are too few
    made_of(graph, rare, small_noise_share=0.1)
    made_of(graph, even)


@pytest.mark.parametrize(("ratio", "warned"), [(8.0, False), (8.1, True), (12.4, True)])
def test_the_ratio_of_variances_is_told(ratio, warned, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        importlib.import_module("sedd_objectives.bound")._warn_of_rare_losses(torch.tensor(ratio))
    assert [f"leave about {ratio:.0f} times" in str(told.message) for told in recwarn] == [True] * warned


def test_the_ratio_is_of_the_draws_variances(made_of, make_graphs, monkeypatch):
    """Of squared differences to the same over the other density at the time of the larger loss."""
    module = importlib.import_module("sedd_objectives.bound")
    told: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_warn_of_rare_losses", told.append)
    seen = []

    def losses(t):
        seen.append(t)
        return rare(t) + t

    made_of(make_graphs(5)["uniform"], losses)
    by_noise = module.NoiseTimes(lambda t: (-torch.log1p(-0.999 * t), t), 0.5, t_min=1e-3)
    squares, otherwise = [], []
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        square = (rare(one) + one - rare(other) - other).double().square()
        larger = torch.where(rare(one) + one > rare(other) + other, one, other)
        squares.append(square)
        otherwise.append(square / by_noise.density(larger))
    want = torch.stack(squares).sum() / torch.stack(otherwise).sum()
    assert float(told[0]) == pytest.approx(float(want), rel=1e-6)
    assert float(want) > 8


def test_a_late_start_is_warned_of_and_an_earlier_one_named(made_of, make_graphs):
    """Of uniform jumps at rate 4/5: at t = 0.6 a share 0.52 has moved, at 0.06 0.048."""
    graph = make_graphs(5)["uniform"]
    with pytest.warns(UserWarning, match=r"t_min=0.6: by then 52% of the tokens have moved .*take t_min=6e-02"):
        made_of(graph, even, t_min=0.6)
    made_of(graph, even, t_min=0.55)  # 47 %
    graph.a = 1.2
    with pytest.warns(UserWarning, match=r"t_min=0.58: by then 56% of the tokens .*take t_min=6e-03"):  # 5.8e-2: 5.6 %
        made_of(graph, even, t_min=0.58)


def test_a_late_start_is_that_of_the_tokens_that_count(make_graphs, log_linear, recwarn):
    """Token 0 leaves at rate 2, token 1 at 1/10; what does not count is not asked."""
    warn = importlib.import_module("sedd_objectives.bound")._warn_of_a_late_start
    graph = make_graphs(2)["dense"]
    graph.matrix = torch.tensor([[-2.0, 0.1], [2.0, -0.1]], dtype=torch.float64)
    x0, factor = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0.5, 0, 0, 0.1]])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warn(graph, log_linear, x0, None, 0.6)  # rate 0.575
        assert not recwarn.list
        warn(graph, log_linear, x0, factor, 0.6)  # rate 1.05
        assert "by then 62% of the tokens" in str(recwarn.pop().message)
        warn(graph, lambda t: (torch.full_like(t, 9.0), t), x0, factor, 0.6)  # an earlier one changes nothing
        assert not recwarn.list

"""The laws pass for the losses and bounds here, and catch broken ones; the audit knows the usual mistakes."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from sedd_objectives import (
    Bound,
    denoising_loss,
    denoising_score_entropy,
    elbo_loss,
    likelihood_bound,
    masked_likelihood_bound,
)
from sedd_objectives.testing import (
    BOUND_LAWS,
    LOSS_LAWS,
    Audit,
    Mistake,
    audit_bound,
    bound_is_not_below_its_terms,
    bound_of_the_exact_score_is_the_entropy,
    loss_is_least_at_the_true_score,
    loss_is_the_enumerated_integrand,
    standard_error_is_the_spread,
)
from sedd_objectives.testing._enumerated import Problem, assert_near

TOKENS = 3
KINDS = ["uniform", "absorbing", "hybrid", "dense"]


def bound(score, graph, noise, x0, *, generator, **how):
    options = {"num_times": 8, "num_reconstructions": 4, "small_noise_share": 0.5} | how
    return likelihood_bound(score, graph, noise, x0, generator=generator, **options)


def masked_bound(score, graph, noise, x0, *, generator):
    options: dict[str, Any] = {"num_times": 4, "num_parts": 1, "num_reconstructions": 2}
    return masked_likelihood_bound(score, graph, noise, x0, generator=generator, **options)


@pytest.mark.parametrize("law", LOSS_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_laws_of_losses(kind, law, make_graphs, log_linear):
    law(denoising_loss, make_graphs(TOKENS)[kind], log_linear)


@pytest.mark.parametrize("law", BOUND_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_laws_of_bounds(kind, law, make_graphs, log_linear):
    law(bound, make_graphs(TOKENS)[kind], log_linear)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_law_of_the_exact_score_counts_what_a_short_schedule_leaves_to_be_known(kind, make_graphs):
    """At sigma(1) = 0.8 the end tells of the token, which the bound pays for in the prior's term and not twice."""
    bound_of_the_exact_score_is_the_entropy(bound, make_graphs(TOKENS)[kind], short)

    def half_as_far(score, graph, noise, x0, *, generator):
        return bound(score, graph, lambda t: noise(t / 2), x0, generator=generator)

    with pytest.raises(AssertionError, match="the bound of the exact score"):
        bound_of_the_exact_score_is_the_entropy(half_as_far, make_graphs(TOKENS)[kind], short)


def short(t):
    return 0.8 * t, torch.full_like(t, 0.8)


@pytest.mark.parametrize("law", BOUND_LAWS, ids=lambda law: law.__name__)
def test_laws_of_the_masked_bound(law, make_graphs, log_linear):
    law(masked_bound, make_graphs(TOKENS)["absorbing"], log_linear)


BROKEN_LOSSES = {
    "without dsigma": lambda s, g, n, x0, t, *, generator: denoising_loss(
        s, g, lambda t: (n(t)[0], torch.ones_like(t)), x0, t, generator=generator
    ),
    "a mean over positions": lambda *a, generator: denoising_loss(*a, generator=generator) / 2,
    "noise of another time": lambda s, g, n, x0, t, *, generator: denoising_loss(
        s, g, n, x0, t, xt=g.sample(x0, n(t / 2)[0], generator=generator)
    ),
    "one noise for the batch": lambda s, g, n, x0, t, *, generator: denoising_loss(
        s, g, n, x0, t, xt=g.sample(x0[:1], n(t[:1])[0], generator=generator).expand_as(x0)
    ),
}


@pytest.mark.parametrize("broken", BROKEN_LOSSES)
def test_broken_losses_are_not_the_integrand(broken, make_graphs, log_linear):
    with pytest.raises(AssertionError, match="the loss's mean at t ="):
        loss_is_the_enumerated_integrand(BROKEN_LOSSES[broken], make_graphs(TOKENS)["uniform"], log_linear)


def test_a_loss_of_a_shifted_score_is_not_least_at_the_true_one(make_graphs, log_linear):
    def shifted(score, *rest, generator):
        return denoising_loss(lambda x, s: score(x, s) + 0.3, *rest, generator=generator)

    with pytest.raises(AssertionError, match="the loss"):
        loss_is_least_at_the_true_score(shifted, make_graphs(TOKENS)["uniform"], log_linear)
    with pytest.raises(AssertionError, match="must rise"):
        loss_is_least_at_the_true_score(
            lambda *a, generator: -denoising_loss(*a, generator=generator), make_graphs(TOKENS)["hybrid"], log_linear
        )


def without(*terms, t_min=1e-3):
    def broken(*a, generator):
        found = bound(*a, generator=generator, t_min=t_min)
        return dataclasses.replace(found, value=found.value - sum(getattr(found, term) for term in terms))

    return broken


@pytest.mark.parametrize("terms", [("prior", "reconstruction"), ("reconstruction",), ("diffusion",)])
def test_bounds_without_a_term_are_caught(terms, make_graphs, log_linear):
    broken = without(*terms, t_min=0.05)
    with pytest.raises(AssertionError, match="the bound of the exact score"):
        bound_of_the_exact_score_is_the_entropy(broken, make_graphs(TOKENS)["uniform"], log_linear)


def test_a_bound_that_is_an_integral_from_late_on_is_below_its_terms(make_graphs, log_linear):
    with pytest.raises(AssertionError, match="must be at least"):
        bound_is_not_below_its_terms(without("reconstruction", t_min=0.3), make_graphs(TOKENS)["uniform"], log_linear)


def test_a_standard_error_that_forgets_a_term_is_caught(make_graphs, log_linear):
    def broken(*a, generator):
        found = bound(*a, generator=generator)
        return dataclasses.replace(found, standard_error=found.standard_error / 2)

    with pytest.raises(AssertionError, match="squared standard error"):
        standard_error_is_the_spread(broken, make_graphs(TOKENS)["absorbing"], log_linear)


def test_one_draw_of_the_elbo_is_a_bound(make_graphs, log_linear):
    def drawn(*a, generator):
        loss = elbo_loss(*a, generator=generator)
        return dataclasses.replace(bound(*a, generator=generator, num_times=2), value=loss)

    bound_of_the_exact_score_is_the_entropy(drawn, make_graphs(TOKENS)["absorbing"], log_linear)


@pytest.fixture
def audited(make_graphs, enumerated, log_linear, generator):
    """An exact model of five tokens under absorption, of which the third one ends sequences."""
    data = enumerated(make_graphs(5)["absorbing"], length=2)
    x0 = data.sample(300, generator)

    def audit(score=None, tokens=x0, **how):
        return audit_bound(score or data.score(), data.graph, log_linear, tokens, generator=generator, **how)

    return audit, data


def test_an_audit_tells_terms_and_mistakes(audited, log_linear):
    audit, data = audited
    found = audit(end_id=2, t_min=0.05)
    assert found.is_bound
    assert not found.problems
    assert abs(found.value - data.entropy()) < 0.4  # of 300 sequences
    changes = {mistake.name: mistake.change for mistake in found.mistakes}
    terms = {name: float(getattr(found.bound, name).mean()) for name in ("diffusion", "prior", "reconstruction")}
    assert changes["no reconstruction"] == pytest.approx(-terms["reconstruction"])
    assert changes["no prior"] == pytest.approx(-terms["prior"])
    assert changes["no end terms"] == pytest.approx(-terms["prior"] - terms["reconstruction"])
    assert changes["mean for integral"] == pytest.approx(terms["diffusion"] * 0.05 / 0.95)
    assert changes["ends never noised"] < -0.1
    assert terms["prior"] == pytest.approx(2 * math.log(5) * 1e-3, rel=1e-3)
    shown = str(found)
    assert all(name in shown for name in ("diffusion", "no end terms", "ends never noised", "nats"))


def test_an_audit_of_a_model_that_copies_shows_what_it_would_cost_to_leak(make_graphs, log_linear, generator):
    """A model that repeats what it sees scores nothing unless it is shown the clean tokens."""
    graph = make_graphs(5)["absorbing"]

    def copies(x, sigma):
        sure = torch.nn.functional.one_hot(x, 6).double() * 8
        sure[..., 5] = -torch.inf
        return sure.log_softmax(-1) - torch.log(torch.expm1(sigma))[:, None, None]

    found = audit_bound(copies, graph, log_linear, torch.randint(5, (200, 4)), generator=generator)
    (leak,) = (m for m in found.mistakes if m.name == "noise never seen")
    assert found.value == pytest.approx(4 * math.log(5), rel=0.2)
    assert leak.change == pytest.approx(-found.value, rel=0.2)


def test_an_audit_judges_a_claimed_number(audited):
    audit, _ = audited
    value = audit(t_min=0.3).value
    assert audit(claimed=value + 1, t_min=0.3).is_bound
    short = audit(t_min=0.3)
    ends = next(m.change for m in short.mistakes if m.name == "no end terms")
    found = audit(claimed=short.value + ends, t_min=0.3)
    assert not found.is_bound
    assert found.likeliest_mistake.name in ("no end terms", "no reconstruction")
    assert "is no bound; like: no " in str(found)


def test_an_audit_reports_what_makes_any_number_none(audited, generator):
    audit, data = audited
    x0 = data.sample(20, generator)
    x0[0, 0] = 5
    found = audit(tokens=x0)
    assert not found.is_bound
    assert "the data hold the mask, 5, at 1 positions" in found.problems[0]
    found = audit(score=lambda x, s: torch.full((*x.shape, 6), torch.nan))
    assert not found.is_bound
    assert "NaN" in found.problems[0]
    with pytest.raises(ValueError, match="num_times must be even"):
        audit(num_times=3)


def held(value, error, diffusion=0.0, prior=0.0, reconstruction=0.0):
    return Bound(
        *(
            torch.tensor(part, dtype=torch.float64).expand(2)
            for part in (value, error, diffusion, prior, reconstruction)
        )
    )


MISTAKES = (Mistake("small", -1.0, 0.1, "why"), Mistake("large", -3.0, 0.2, "how"), Mistake("dear", 2.0, 0.3, "what"))


@pytest.mark.parametrize(
    ("claimed", "is_bound", "likeliest"),
    [
        (None, True, None),
        (10.0, True, None),
        (9.71, True, None),
        (9.69, False, "small"),
        (7.5, False, "large"),
        (30, True, None),
    ],
)
def test_a_claim_is_judged_by_three_standard_errors(claimed, is_bound, likeliest):
    """Of two sequences, 0.1 sqrt 2 each, so that their mean is known to 0.1."""
    audit = Audit(held(10.0, 0.1 * math.sqrt(2), 8.0, 0.5, 1.5), (), MISTAKES, claimed)
    assert (audit.value, audit.standard_error) == pytest.approx((10.0, 0.1))
    assert audit.is_bound is is_bound
    found = audit.likeliest_mistake
    assert (found.name if found else None) == likeliest
    assert Audit(audit.bound, ("a problem",), (), claimed).is_bound is False


def test_an_audit_is_printed_with_the_largest_mistake_first():
    shown = str(Audit(held(10.0, 0.1 * math.sqrt(2), 8.0, 0.5, 1.5), ("odd",), MISTAKES, 7.0)).splitlines()
    assert shown == [
        "bound 10.000 +- 0.100 nats a sequence: diffusion 8.000, prior 0.500, reconstruction 1.500",
        "no bound: odd",
        "claimed 7.000 is no bound; like: large",
        "large: -3.000 +- 0.200 nats (how)",
        "dear: +2.000 +- 0.300 nats (what)",
        "small: -1.000 +- 0.100 nats (why)",
    ]
    assert str(Audit(held(10.0, 0.1), (), (), 11.0)).splitlines()[-1] == "claimed 11.000 may be a bound"


def test_an_audit_is_put_together_from_its_draws(make_graphs, log_linear, monkeypatch):
    """Losses 0, 2, 4, 10 at four times, reconstructions 0 or 4: halves of pairs, and the variance of eight draws."""
    module = importlib.import_module("sedd_objectives.testing.audit")
    losses, ends = iter([0.0, 0.0, 2.0, 0.0, 4.0, 0.0, 10.0, 0.0]), iter([0.0, 4.0] * 4)
    weights = []

    def loss(*_, weight, **__):
        weights.append(weight)
        return torch.full((3,), next(losses), dtype=torch.float64)

    monkeypatch.setattr(module, "denoising_loss", loss)
    monkeypatch.setattr(module, "reconstruction_loss", lambda *_, **__: torch.full((3,), next(ends)).double())
    x0 = torch.tensor([[0, 5], [1, 2], [3, 3]])
    found = audit_bound(
        lambda x, s: torch.zeros(3, 2, 6), make_graphs(5)["absorbing"], log_linear, x0, num_times=4, t_min=0.5
    )
    prior = torch.tensor([1.0, 2.0, 2.0]).double() * 1e-3 * math.log(5)  # the mask does not count
    assert found.bound.diffusion.tolist() == [2.0] * 3
    assert found.bound.reconstruction.tolist() == [2.0] * 3
    torch.testing.assert_close(found.bound.prior, prior, rtol=1e-4, atol=0)
    variance = (0.5 * 2 / 4) ** 2 + (0.5 * 6 / 4) ** 2 + 4 * 8 / 7 / 8
    assert found.bound.standard_error.tolist() == pytest.approx([variance**0.5] * 3)
    assert all(torch.equal(w, torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])) for w in weights)
    changes = {m.name: (m.change, m.standard_error) for m in found.mistakes}
    mean, error = float(prior.mean()), float(prior.std()) / 3**0.5
    assert changes["no prior"] == pytest.approx((-mean, error), rel=1e-4)
    assert changes["no reconstruction"] == (-2.0, 0.0)
    assert changes["no end terms"] == pytest.approx((-2 - mean, error), rel=1e-4)
    assert changes["mean for integral"] == (2.0, 0.0)
    assert changes["noise never seen"] == (-2.0, 0.0)
    assert list(changes) == ["no reconstruction", "no prior", "no end terms", "mean for integral", "noise never seen"]


def test_a_law_of_losses_asks_for_one_value_a_sequence(make_graphs, log_linear):
    with pytest.raises(AssertionError, match=r"a loss must be \(B,\), one value a sequence, got \(2000, 1\)"):
        loss_is_the_enumerated_integrand(
            lambda *a, generator: denoising_loss(*a, generator=generator)[:, None],
            make_graphs(TOKENS)["uniform"],
            log_linear,
        )


def test_a_loss_with_a_slope_at_the_true_score_is_caught(make_graphs, log_linear):
    """One that is least a little beside it: steps of a half still rise."""

    def beside(score, *rest, generator):
        return denoising_loss(lambda x, s: score(x, s) + 0.1, *rest, generator=generator)

    with pytest.raises(AssertionError, match="the loss's slope at the exact score, by a constant"):
        loss_is_least_at_the_true_score(beside, make_graphs(TOKENS)["uniform"], log_linear)


def test_a_standard_error_that_is_too_large_is_caught(make_graphs, log_linear):
    def broken(*a, generator):
        found = bound(*a, generator=generator)
        return dataclasses.replace(found, standard_error=found.standard_error * 2)

    with pytest.raises(AssertionError, match="squared standard error"):
        standard_error_is_the_spread(broken, make_graphs(TOKENS)["absorbing"], log_linear)


def test_a_bound_below_the_entropy_is_caught(make_graphs, log_linear):
    def broken(*a, generator):
        found = bound(*a, generator=generator)
        return dataclasses.replace(found, value=found.value * 0.7)

    with pytest.raises(AssertionError, match=r"the bound of a score off by 0\.4 times a random one must be at least"):
        bound_is_not_below_its_terms(broken, make_graphs(TOKENS)["hybrid"], log_linear)


def test_laws_enumerate_small_graphs_alone(make_graphs, log_linear):
    with pytest.raises(ValueError, match="graph must have 16 states at most, to enumerate pairs of them, got 17"):
        loss_is_the_enumerated_integrand(denoising_loss, make_graphs(17)["uniform"], log_linear)


def test_draws_are_compared_with_their_standard_error():
    """Of 100 draws with mean 1 and standard deviation 1: 4.5 times 0.1, and 1e-3 of the size."""
    draws = 1 + torch.cat([torch.ones(50), -torch.ones(50)]).double()
    error = float(draws.std()) / 10
    for off in (4.4 * error, -4.4 * error):
        assert_near(draws, 1 + off, "draws", size=0.0)
    for off in (4.6 * error, -4.6 * error):
        with pytest.raises(AssertionError, match="draws must be"):
            assert_near(draws, 1 + off, "draws", size=0.0)
    assert_near(draws, -100.0, "draws", least=True)
    with pytest.raises(AssertionError, match=r"draws must be at least 1\.5000 nats, found 1\.0000 \+- 0\.1005"):
        assert_near(draws, 1.5, "draws", least=True)
    assert_near(torch.full((4,), 1.0009), 1.0, "draws")
    for wrong in (1.0011, math.nan):
        with pytest.raises(AssertionError, match="draws must be"):
            assert_near(torch.full((4,), wrong), 1.0, "draws")


def test_a_bound_must_not_be_below_the_entropy(make_graphs, log_linear):
    """The integral over later times and the prior's term are less than that, and no bound without a decoder."""

    def undecoded(score, graph, noise, x0, *, generator):
        found = bound(score, graph, noise, x0, generator=generator, t_min=0.5)
        return dataclasses.replace(found, value=found.diffusion + found.prior)

    with pytest.raises(AssertionError, match=r"the bound of a score off by 0\.4 times a random one must be at least"):
        bound_is_not_below_its_terms(undecoded, make_graphs(TOKENS)["uniform"], log_linear, t_min=0.5)


@pytest.mark.parametrize("side", [1, -1])
def test_a_loss_must_rise_on_either_side(side, make_graphs, log_linear):
    """One that takes no notice of scores that are too small, or of those that are too large."""
    graph = make_graphs(TOKENS)["uniform"]
    exact = Problem(graph, length=2).score()

    def one_sided(score, graph, noise, x0, t, *, generator):
        def bent(x, sigma):
            true = exact(x, sigma)
            return true + side * (side * (score(x, sigma) - true)).clamp_min(0)

        return denoising_loss(bent, graph, noise, x0, t, generator=generator)

    with pytest.raises(AssertionError, match=f"must rise where the log-score is off by {-0.5 * side} times a constant"):
        loss_is_least_at_the_true_score(one_sided, graph, log_linear)


@pytest.mark.parametrize("time", [0.15, 0.5, 0.9])
def test_a_loss_is_compared_at_every_time(time, make_graphs, log_linear):
    def wrong_then(score, graph, noise, x0, t, *, generator):
        return denoising_loss(score, graph, noise, x0, t, generator=generator) * (1.5 if float(t[0]) == time else 1)

    with pytest.raises(AssertionError, match=f"mean at t = {time}, its score off by 1"):
        loss_is_the_enumerated_integrand(wrong_then, make_graphs(TOKENS)["uniform"], log_linear)


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "dense"])
def test_what_laws_compare_with_is_what_sequences_enumerate(kind, make_graphs, enumerated, log_linear):
    """Marginals, scores, entropy and integrals of pairs, against this folder's own enumeration."""
    graph = make_graphs(TOKENS)[kind]
    problem, data = Problem(graph, length=2), enumerated(graph, length=2)
    data.probability = problem.probability
    assert torch.equal(problem.sequences, data.sequences)
    assert problem.entropy() == pytest.approx(data.entropy(), rel=1e-12)
    sigma = torch.tensor([0.3, 1.2], dtype=torch.float64)
    for level, marginal in zip(sigma, problem.marginal(sigma), strict=True):
        torch.testing.assert_close(marginal.flatten(), data.marginal(level), rtol=1e-6, atol=1e-12)
    x, level = data.states, sigma[:1].expand(len(data.states))
    want = data.log_ratios(x, level)
    torch.testing.assert_close(problem.score()(x, level), want, rtol=1e-5, atol=1e-6)
    off = problem.score(0.5)(x, level) - problem.score()(x, level)
    torch.testing.assert_close(off, 0.5 * problem.error[tuple(x.T)], rtol=1e-6, atol=1e-9)
    kernel, score = data.kernel(sigma[1]), problem.score(1.0)
    reached = kernel[:, 1] > 0
    loss = denoising_score_entropy(
        *(score(x[reached], sigma[1:].expand(int(reached.sum()))), graph, x[reached]),
        *(data.sequences[1].expand(int(reached.sum()), 2), sigma[1:].expand(int(reached.sum()))),
    )
    expected = float((kernel[reached, 1] * loss.sum(-1)).sum())
    assert problem.integrand(score, data.sequences[1], sigma[1]) == pytest.approx(expected, rel=1e-5)
    levels = log_linear(torch.ones(len(data.sequences), dtype=torch.float64))[0]
    prior = float((graph.prior_kl(data.sequences, levels).sum(-1) * data.probability).sum())
    assert problem.prior(log_linear) == pytest.approx(prior, rel=1e-9)


def test_the_laws_integral_runs_over_log_sigma_and_the_data(make_graphs, log_linear, monkeypatch):
    """Of x0 / sigma it is the mean token times log(sigma(1) / sigma(t_min)), to the last digits; of 1 nearly sigma."""
    problem = Problem(make_graphs(TOKENS)["uniform"], length=1)
    low, high = log_linear(torch.tensor([0.01, 1.0], dtype=torch.float64))[0].tolist()
    monkeypatch.setattr(problem, "integrand", lambda score, x0, sigma: float(x0[0] / sigma))
    mean = float((problem.probability * problem.sequences[:, 0]).sum())
    assert problem.integral(problem.score(), log_linear, 0.01) == pytest.approx(mean * math.log(high / low), rel=1e-6)
    monkeypatch.setattr(problem, "integrand", lambda score, x0, sigma: 1.0)
    assert problem.integral(problem.score(), log_linear, 0.01) == pytest.approx(high - low, rel=2e-3)


def test_an_audit_gives_the_ends_away_where_they_are(make_graphs, log_linear, monkeypatch):
    """What is noised, counted and shown for the mistake at ends; none where there are no ends, or nothing else."""
    module = importlib.import_module("sedd_objectives.testing.audit")
    handed = []

    def loss(score, graph, noise, x0, t, *, xt, weight, refuse_nan):
        handed.append((xt, weight, refuse_nan, t))
        return torch.full((2,), 10.0 if len(handed) % 3 else 4.0, dtype=torch.float64)

    monkeypatch.setattr(module, "denoising_loss", loss)
    monkeypatch.setattr(module, "reconstruction_loss", lambda *_, **__: torch.zeros(2).double())
    graph, x0 = make_graphs(5)["absorbing"], torch.tensor([[0, 2, 5], [1, 3, 2]])
    monkeypatch.setattr(graph, "sample", lambda x0, sigma, *, generator=None: torch.full_like(x0, 5))
    audit = lambda end_id: audit_bound(  # noqa: E731
        lambda x, s: torch.zeros(2, 3, 6), graph, log_linear, x0, num_times=4, end_id=end_id, t_min=0.5
    )
    found = audit(2)
    changes = {m.name: m.change for m in found.mistakes}
    assert changes["ends never noised"] == -3.0  # half the interval of 10 - 4
    assert changes["noise never seen"] == 0.0
    assert len(handed) == 12
    for xt, weight, refuse_nan, t in handed[2::3]:
        assert xt.tolist() == [[5, 2, 5], [5, 5, 2]]
        assert weight.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
        assert refuse_nan is False
        assert ((t >= 0.5) & (t < 1)).all()
    assert all((xt == 5).all() for xt, *_ in handed[0::3])
    strata = [((t - 0.5) / 0.5 * 2).floor().tolist() for *_, t in handed[::3]]
    assert strata == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    for end_id in (None, 4):
        handed.clear()
        assert "ends never noised" not in {m.name for m in audit(end_id).mistakes}
        assert len(handed) == 8


def test_an_audit_says_what_is_no_number(make_graphs, log_linear):
    graph, x0 = make_graphs(5)["absorbing"], torch.zeros(2, 3, dtype=torch.int64)
    graph.prior_kl = lambda x0, sigma: torch.full(x0.shape, math.inf)
    score = lambda x, s: torch.zeros(*x.shape, 6)  # noqa: E731
    found = audit_bound(score, graph, log_linear, x0, num_times=2)
    assert found.problems == ("the prior's term is infinite: the prior rules out what the process can end in",)
    assert not found.is_bound
    found = audit_bound(lambda x, s: torch.full((2, 3, 6), -math.inf), make_graphs(5)["absorbing"], log_linear, x0)
    assert found.problems == (
        "the model's score is NaN, or rules out jumps that happen: the diffusion term is no number",
    )
    assert found.bound.reconstruction.isnan().all()
    one = audit_bound(score, make_graphs(5)["absorbing"], log_linear, x0[:1], num_times=2)
    assert all(math.isnan(m.standard_error) for m in one.mistakes)
    for wrong in (0, 1, 3):
        with pytest.raises(ValueError, match=f"num_times must be even and at least 2, got {wrong}"):
            audit_bound(score, make_graphs(5)["absorbing"], log_linear, x0, num_times=wrong)


def test_problems_of_single_tokens_have_scores_and_laws_too(make_graphs, enumerated):
    for kind in ("uniform", "absorbing", "dense"):
        graph = make_graphs(TOKENS)[kind]
        problem, data = Problem(graph, length=1), enumerated(graph, length=1)
        data.probability = problem.probability
        level = torch.tensor([0.4, 0.4, 1.1], dtype=torch.float64)
        x = torch.tensor([[0], [2], [1]])
        torch.testing.assert_close(problem.score()(x, level), data.log_ratios(x, level), rtol=1e-5, atol=1e-6)
        off = problem.score(2.0)(x, level) - problem.score()(x, level)
        torch.testing.assert_close(off, 2 * problem.error[x[:, 0]], rtol=1e-6, atol=1e-9)
        drawn = problem.draw(20_000)[:, 0]
        for token, p in enumerate(problem.probability.tolist()):
            share = float((drawn == token).double().mean())
            assert abs(share - p) < 5 * (p * (1 - p) / 20_000) ** 0.5  # a false alarm in 1.7 million
        assert problem.probability.min() > 0
        assert float(problem.probability.sum()) == pytest.approx(1)

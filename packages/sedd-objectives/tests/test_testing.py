"""The laws pass for the losses and bounds here, and catch broken ones; the audit knows the usual mistakes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from sedd_objectives import denoising_loss, elbo_loss, likelihood_bound, masked_likelihood_bound
from sedd_objectives.testing import (
    BOUND_LAWS,
    LOSS_LAWS,
    audit_bound,
    bound_is_not_below_its_terms,
    bound_of_the_exact_score_is_the_entropy,
    loss_is_least_at_the_true_score,
    loss_is_the_enumerated_integrand,
    standard_error_is_the_spread,
)

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

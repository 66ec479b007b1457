"""Given positions stay clean, are seen, and do not count: losses and bounds are those of the others given them.

Two positions, p(x2 = 1 | x1 = 0) = 1/10: -log of it is 2.3026, where the joint's is another number.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sedd_objectives import (
    any_order_loss,
    autoregressive_loss,
    cross_entropy_loss,
    d3pm_bound,
    d3pm_loss,
    denoising_loss,
    denoising_score_entropy,
    elbo_loss,
    enumerated_implicit_score_entropy_loss,
    fused_denoising_loss,
    lambda_cross_entropy_loss,
    leave_one_out_loss,
    likelihood_bound,
    masked_likelihood_bound,
    monte_carlo,
    posterior_loss,
    reconstruction_loss,
)

JOINT = torch.tensor([[0.36, 0.04, 0.0], [0.1, 0.1, 0.1], [0.05, 0.05, 0.2]], dtype=torch.float64)
X0 = torch.tensor([[0, 1]])
MASK = torch.tensor([3])
GIVEN = torch.tensor([[True, False]])


@pytest.fixture
def absorbing(make_graphs):
    return make_graphs(3)["absorbing"]


def posterior(x, sigma):
    """Logits of p(x_i | what is unmasked), (B, 2, 4), of the joint; the mask is state 3."""
    first, second = x.T
    rows = torch.stack([JOINT[:, s] if s < 3 else JOINT.sum(1) for s in second.tolist()])
    columns = torch.stack([JOINT[s] if s < 3 else JOINT.sum(0) for s in first.tolist()])
    logits = torch.stack([rows, columns], 1).clamp_min(1e-300).log()
    return torch.cat([logits, torch.full((len(x), 2, 1), 9.0)], -1)


def score(x, sigma):
    log_p = posterior(x, sigma)[..., :3].log_softmax(-1)
    return torch.cat([log_p - sigma.double().expm1().log()[:, None, None], torch.zeros(len(x), 2, 1)], -1)


def repeated(count):
    return X0.expand(count, 2), GIVEN.expand(count, 2)


def test_bounds_of_an_absorbing_process_are_the_conditional_exactly(absorbing, log_linear, generator):
    """Within 4 standard errors (a false alarm in 16,000) of log 10 where x2 is masked at t = 1, and log 3 where not."""
    x0, given = repeated(2000)
    how: dict[str, Any] = {"given": given, "generator": generator, "num_times": 8, "num_reconstructions": 2}
    prior = 1e-3 * math.log(3)
    want = (1 - 1e-3) * math.log(10) + prior
    for bound in (
        likelihood_bound(score, absorbing, log_linear, x0, **how),
        masked_likelihood_bound(score, absorbing, log_linear, x0, **how),
        d3pm_bound(posterior, absorbing, log_linear, x0, num_steps=5, **how),
    ):
        assert bound.prior[0] == pytest.approx(prior, rel=1e-4)
        error = float(bound.value.std()) / 2000**0.5
        assert abs(float(bound.value.mean()) - want) < 4 * error + 1e-6
        assert error < 0.1
    draws = elbo_loss(score, absorbing, log_linear, x0, given=given, generator=generator)
    assert abs(float(draws.mean()) - want) < 4 * float(draws.std()) / 2000**0.5
    draws = 0.999 * posterior_loss(posterior, absorbing, log_linear, x0, given=given, generator=generator)
    assert abs(float(draws.mean()) - math.log(10)) < 4 * float(draws.std()) / 2000**0.5 + 0.01  # without its ends


def test_losses_of_posteriors_are_the_conditional_too(absorbing, generator):
    x0, given = repeated(2000)
    found = any_order_loss(posterior, absorbing, x0, given=given, generator=generator)
    torch.testing.assert_close(found, torch.full((2000,), math.log(10), dtype=torch.float64))  # one order, no spread
    draws = monte_carlo(
        lambda: lambda_cross_entropy_loss(posterior, absorbing, x0, given=given, generator=generator), 2
    )
    assert abs(float(draws.value.mean()) - math.log(10)) < 4 * float(draws.value.std()) / 2000**0.5


@pytest.mark.parametrize("kind", ["uniform", "hybrid", "dense"])
def test_under_other_graphs_they_bound_the_conditional_of_the_process_that_leaves_them_alone(
    kind, make_graphs, log_linear, enumerated, generator
):
    """The exact score of x2 at noise, x1 being 0: the mean over p(x2 | x1 = 0) is its entropy and the prior's KL."""
    graph = make_graphs(3)[kind]
    data = enumerated(graph, length=1)
    data.probability = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    count = 4000
    x0 = torch.cat([torch.zeros(count, 1, dtype=torch.int64), data.sample(count, generator)], 1)
    given = torch.tensor([[True, False]]).expand(count, 2)

    def conditional(x, sigma):
        assert (x[:, 0] == 0).all()
        own = data.log_ratios(x[:, 1:], sigma)
        return torch.cat([torch.full_like(own, 7.0), own], 1)

    how: dict[str, Any] = {"num_times": 8, "num_reconstructions": 2, "t_min": 1e-4}
    bound = likelihood_bound(conditional, graph, log_linear, x0, given=given, generator=generator, **how)
    sigma = log_linear(torch.ones(()))[0]
    p, prior = data.marginal(sigma), data.kernel(sigma) @ torch.full((3,), 1 / 3, dtype=torch.float64)
    want = data.entropy() + float(torch.where(p > 0, p * (p / prior).log(), 0).sum())
    assert abs(float(bound.value.mean()) - want) < 4 * float(bound.value.std()) / count**0.5


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid", "dense"])
def test_the_implicit_loss_is_that_of_the_conditional_process(kind, make_graphs, enumerated, float64_rates):
    """Enumerated over x2 at noise, x1 being 0 and clean: the slope at the exact conditional score is 0.

    Its excess for another score is that of the denoising score entropy of p(x2 | x1 = 0).
    """
    graph = make_graphs(3)[kind]
    data = enumerated(graph, length=1)
    data.probability = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    level, states = torch.tensor(0.7, dtype=torch.float64), graph.num_states
    law = data.marginal(level)
    x = torch.stack([torch.zeros(states, dtype=torch.int64), torch.arange(states)], 1)
    given = torch.tensor([[True, False]]).expand(states, 2)
    exact = data.log_ratios(torch.arange(states)[:, None], level.expand(states))[:, 0]
    off = torch.randn(states, states, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def mean(table):
        def score(x, sigma):
            assert (x[:, 0] == 0).all()
            return torch.stack([torch.full((len(x), states), torch.nan), table[x[:, 1]]], 1)

        return (law * enumerated_implicit_score_entropy_loss(score, graph, x, level, given=given)).sum()

    table = exact.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mean(table), table)
    assert slope.abs().max() < 1e-6
    dse = torch.zeros(2, dtype=torch.float64)
    for x0, p in enumerate(data.probability):
        q = data.kernel(level)[:, x0]
        came = q > 0
        each = [
            denoising_score_entropy(row, graph, torch.arange(states)[came], torch.full((int(came.sum()),), x0), level)
            for row in (exact[came], (exact + off)[came])
        ]
        dse += p * torch.stack([(q[came] * part).sum() for part in each])
    torch.testing.assert_close(mean(exact + off) - mean(exact), dse[1] - dse[0], rtol=1e-6, atol=1e-8)
    if graph.mask_id is not None:
        with pytest.raises(ValueError, match=r"clean where it is given, and hold no mask \(mask_id 3\) there"):
            enumerated_implicit_score_entropy_loss(lambda x, s: exact[x], graph, x.flip(1), level, given=given)


def test_what_is_given_is_seen_clean_and_weighs_nothing(graph, log_linear, generator):
    """Every loss with a batch of its own: the model is shown x0 there, and only the others contribute."""
    x0 = torch.randint(5, (6, 4), generator=generator)
    given = torch.rand(6, 4, generator=generator) < 0.5
    given[:, 0], given[:, 1] = True, False
    seen = []

    def model(x, sigma):
        seen.append(x)
        return torch.where(given[..., None], torch.nan, 0.0).expand(6, 4, graph.num_states)

    t = torch.full((6,), 0.9)
    denoising_loss(model, graph, log_linear, x0, t, given=given, generator=generator)
    reconstruction_loss(model, graph, log_linear, x0, t, given=given, generator=generator)
    d3pm_loss(model, graph, log_linear, x0, torch.full((6,), 3), num_steps=4, given=given, generator=generator)
    assert len(seen) == 3
    assert all(torch.equal(x[given], x0[given]) for x in seen)
    assert not all(torch.equal(x, x0) for x in seen)


def test_the_fused_loss_leaves_them_out(make_graphs, generator):
    graph, x0 = make_graphs(5)["uniform"], torch.randint(5, (3, 4), generator=generator)
    given = torch.tensor([[True, False, False, True]]).expand(3, 4)
    x = torch.where(given, x0, (x0 + 1) % 5)
    hidden, sigma = torch.randn(3, 4, 5, generator=generator), torch.ones(3)
    found = fused_denoising_loss(hidden, lambda h, x, s: h, graph, x, x0, sigma, sigma, given=given)
    each = denoising_score_entropy(hidden, graph, x, x0, sigma)
    torch.testing.assert_close(found.per_sequence, (each * ~given).sum(-1))
    with pytest.raises(ValueError, match="xt must be x0 where it is given, it differs at 6 of these positions"):
        fused_denoising_loss(hidden, lambda h, x, s: h, graph, (x0 + 1) % 5, x0, sigma, sigma, given=given)


def test_weights_multiply_what_is_not_given(absorbing, log_linear):
    x0, xt = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 3, 3]])
    given, weight = torch.tensor([[True, False, False]]), torch.tensor([[5.0, 0.5, 2.0]])

    def model(x, sigma):
        return torch.zeros(1, 3, 4)

    t = torch.full((1,), 0.5)
    sigma, dsigma = log_linear(t)
    found = cross_entropy_loss(model, absorbing, log_linear, x0, t, xt=xt, weight=weight, given=given)
    torch.testing.assert_close(found, 2.5 * math.log(3) * dsigma / torch.expm1(sigma))


def test_a_causal_model_is_given_a_prefix():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
    x = torch.tensor([[0, 1, 1]])
    each = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    given = torch.tensor([[True, False, False]])
    found = autoregressive_loss(lambda x: logits, x, start=0, given=given)
    torch.testing.assert_close(found, each[:, 1:].sum(-1))
    with pytest.raises(ValueError, match="given must be a prefix of each sequence"):
        autoregressive_loss(lambda x: logits, x, start=0, given=~given)


def _reconstruction(graph, noise, x0, **how):
    return reconstruction_loss(score, graph, noise, x0, torch.full((getattr(x0, "shape", (1,))[0],), 0.5), **how)


CALLS: dict[str, Any] = {
    "denoising_loss": lambda g, n, **how: denoising_loss(score, g, n, how.pop("x0"), **how),
    "likelihood_bound": lambda g, n, **how: likelihood_bound(score, g, n, how.pop("x0"), **how),
    "reconstruction_loss": lambda g, n, **how: _reconstruction(g, n, how.pop("x0"), **how),
    "cross_entropy_loss": lambda g, n, **how: cross_entropy_loss(posterior, g, n, how.pop("x0"), **how),
    "lambda_cross_entropy_loss": lambda g, n, **how: lambda_cross_entropy_loss(posterior, g, how.pop("x0"), **how),
    "masked_likelihood_bound": lambda g, n, **how: masked_likelihood_bound(score, g, n, how.pop("x0"), **how),
    "elbo_loss": lambda g, n, **how: elbo_loss(score, g, n, how.pop("x0"), **how),
    "posterior_loss": lambda g, n, **how: posterior_loss(posterior, g, n, how.pop("x0"), **how),
    "leave_one_out_loss": lambda g, n, **how: leave_one_out_loss(posterior, g, n, how.pop("x0"), **how),
    "any_order_loss": lambda g, n, **how: any_order_loss(posterior, g, how.pop("x0"), **how),
    "d3pm_loss": lambda g, n, **how: d3pm_loss(posterior, g, n, how.pop("x0"), num_steps=3, **how),
    "d3pm_bound": lambda g, n, **how: d3pm_bound(posterior, g, n, how.pop("x0"), num_steps=3, **how),
    "fused_denoising_loss": lambda g, n, **how: fused_denoising_loss(
        torch.zeros(*how["x0"].shape, 4), lambda h, x, s: h, g, how["x0"], how.pop("x0"), *[torch.ones(1)] * 2, **how
    ),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"x0": torch.tensor([[0, 3]])},
            r"no mask \(mask_id 3\) where it counts or is given, got it at 1 of 2 positions",
        ),
        (
            {"x0": torch.tensor([[3, 0]]), "weight": torch.tensor([[0, 1]]), "given": GIVEN},
            r"no mask \(mask_id 3\) where it counts or is given",
        ),
        ({"x0": X0[:0]}, r"with B and L at least 1, got \(0, 2\)"),
        ({"x0": X0[:, :0]}, r"with B and L at least 1, got \(1, 0\)"),
        ({"x0": X0, "given": torch.tensor([True, False])}, r"given must be a bool mask of x0's shape \(1, 2\)"),
        ({"x0": X0, "given": torch.tensor([[1, 0]])}, r"given must be a bool mask .*, got torch.int64"),
        ({"x0": X0, "given": torch.tensor([[True, True]])}, "given is true at every position"),
        ({"x0": X0, "given": GIVEN, "weight": torch.tensor([[1, 0]])}, "every position is given or has a weight of 0"),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_one_rule_for_clean_data_and_one_message(name, how, message, absorbing, log_linear):
    with pytest.raises(ValueError, match=message):
        CALLS[name](absorbing, log_linear, **how)


@pytest.mark.parametrize("name", CALLS)
def test_a_class_in_the_place_of_its_object_is_named(name, absorbing, log_linear):
    with pytest.raises(ValueError, match=r"the graph must be an object such as Absorbing\(50257\), got the class "):
        CALLS[name](type(absorbing), log_linear, x0=X0)
    if name not in ("lambda_cross_entropy_loss", "any_order_loss", "fused_denoising_loss"):  # which have no schedule
        with pytest.raises(ValueError, match=r"the noise must be an object such as LogLinear\(\), got the class "):
            CALLS[name](absorbing, type(log_linear), x0=X0)
        with pytest.raises(ValueError, match=r"the noise must be callable as noise\(t\) .*, got a Tensor"):
            CALLS[name](absorbing, X0, x0=X0)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "fused_denoising_loss"])
def test_arguments_in_another_order_are_named(name, absorbing, log_linear):
    with pytest.raises(ValueError, match=r"x0 must be a tensor \(B, L\) of token ids, got a \w+: is the order right"):
        CALLS[name](absorbing, log_linear, x0=log_linear)
    with pytest.raises(ValueError, match="the graph must have num_states and its rates, got a Tensor"):
        CALLS[name](X0, log_linear, x0=X0)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "fused_denoising_loss"])
def test_a_head_over_the_tokens_alone_is_told_what_to_add(name, absorbing, log_linear, monkeypatch):
    for kind in ("score", "posterior"):
        whole = globals()[kind]
        monkeypatch.setitem(globals(), kind, lambda x, sigma, whole=whole: whole(x, sigma)[..., :3])
    with pytest.raises(
        ValueError, match=r"got \(\d+, 2, 3\): if it is the mask's column that is missing, add one of -inf"
    ):
        CALLS[name](absorbing, log_linear, x0=X0.expand(50, 2))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "fused_denoising_loss"])
def test_a_network_of_the_tokens_alone_is_told_what_to_hand_in(name, absorbing, log_linear, monkeypatch):
    def alone(x, *, where=None):
        raise AssertionError

    for kind in ("score", "posterior"):
        monkeypatch.setitem(globals(), kind, alone)
    with pytest.raises(ValueError, match=r"takes the tokens alone: hand in lambda x, sigma: network\(x\)"):
        CALLS[name](absorbing, log_linear, x0=X0)

    def broken(x, sigma):
        raise TypeError("of its own")

    for kind in ("score", "posterior"):
        monkeypatch.setitem(globals(), kind, broken)
    with pytest.raises(TypeError, match="of its own"):
        CALLS[name](absorbing, log_linear, x0=X0)


@pytest.mark.parametrize("name", CALLS)
def test_padding_may_hold_the_mask(name, absorbing, log_linear):
    assert CALLS[name](absorbing, log_linear, x0=torch.tensor([[0, 3]]), weight=torch.tensor([[1, 0]])) is not None


PAIRED = [
    *("denoising_loss", "reconstruction_loss", "cross_entropy_loss", "lambda_cross_entropy_loss"),
    *("posterior_loss", "leave_one_out_loss", "d3pm_loss"),
]


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_that_cannot_be_is_named(name, absorbing, log_linear):
    """An unmasked token that is not the clean one."""
    with pytest.raises(ValueError, match="no jump leads into it, and it is another state, got such pairs at 1 of 2"):
        CALLS[name](absorbing, log_linear, x0=X0, xt=torch.tensor([[3, 2]]))
    with pytest.raises(ValueError, match="no jump leads into it, and it is another state"):
        denoising_score_entropy(torch.zeros(1, 2, 4), absorbing, torch.tensor([[1, 3]]), X0, torch.ones(1))


@pytest.mark.parametrize("name", PAIRED)
def test_padding_may_be_a_pair_that_cannot_be(name, absorbing, log_linear):
    """Nothing is asked of what weighs nothing; what weighs as little as may be is named."""
    how = {"x0": X0, "xt": torch.tensor([[3, 2]])}
    assert float(CALLS[name](absorbing, log_linear, **how, weight=torch.tensor([[1, 0]]))) > 0
    with pytest.raises(ValueError, match="got such pairs at 1 of 2"):
        CALLS[name](absorbing, log_linear, **how, weight=torch.tensor([[1, 1e-30]]))


def test_one_time_for_all_reaches_the_network_as_one_a_sequence(absorbing, log_linear):
    shapes = []

    def model(x, sigma):
        shapes.append(sigma.shape)
        return score(x, sigma)

    x0 = torch.tensor([[0, 1], [2, 2]])
    one = denoising_loss(model, absorbing, log_linear, x0, torch.tensor(0.5), xt=torch.full((2, 2), 3))
    both = denoising_loss(model, absorbing, log_linear, x0, torch.full((2,), 0.5), xt=torch.full((2, 2), 3))
    assert shapes == [(2,), (2,)]
    assert torch.equal(one, both)


@pytest.mark.parametrize(
    "name", ["cross_entropy_loss", "lambda_cross_entropy_loss", "any_order_loss", "d3pm_loss", "posterior_loss"]
)
def test_probabilities_in_the_place_of_logits_are_named(name, absorbing, log_linear, monkeypatch):
    """They would give a number, and often one that looks better."""
    logits = posterior
    monkeypatch.setitem(globals(), "posterior", lambda x, sigma: logits(x, sigma).index_fill(2, MASK, -1e9).softmax(-1))
    with pytest.raises(
        ValueError, match="got rows that are >= 0 and sum to 1: these are probabilities, pass their log"
    ):
        CALLS[name](absorbing, log_linear, x0=X0.expand(50, 2))

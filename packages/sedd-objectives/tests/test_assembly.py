"""How bounds and estimates are put together, from parts whose values are known: no tolerance for noise."""

from __future__ import annotations

import importlib
import inspect
import itertools
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
    elbo_loss,
    enumerated_implicit_score_entropy_loss,
    fused_cross_entropy_loss,
    fused_denoising_loss,
    implicit_score_entropy_loss,
    lambda_cross_entropy_loss,
    leave_one_out_loss,
    likelihood_bound,
    low_discrepancy_times,
    masked_likelihood_bound,
    posterior_loss,
    reconstruction_loss,
    stratified_times,
    time_varying_loss,
    uniform_times,
)
from sedd_objectives.checks import check_given, check_sigma, check_states, check_weight, require
from torch._subclasses import FakeTensorMode

bound_module = importlib.import_module("sedd_objectives.bound")
d3pm_module = importlib.import_module("sedd_objectives.d3pm")
X0 = torch.zeros(3, 4, dtype=torch.int64)


def constant_score(x, sigma):
    return torch.zeros(*x.shape, 6)


@pytest.fixture
def stubbed(make_graphs, log_linear, monkeypatch):
    """(diffusion losses, reconstructions, how) -> the bound of an absorbing graph, made of these."""

    def bound(losses, reconstructions, **how):
        streams = itertools.cycle(losses), itertools.cycle(reconstructions)
        for name, stream in zip(("denoising_loss", "reconstruction_loss"), streams, strict=True):
            monkeypatch.setattr(
                bound_module,
                name,
                lambda *_, stream=stream, **__: torch.full((3,), next(stream), dtype=torch.float64),
            )
        return likelihood_bound(constant_score, make_graphs(5)["absorbing"], log_linear, X0, **how)

    return bound


@pytest.mark.parametrize("t_min", [0.5, 0.1])
def test_the_integral_runs_over_the_length_of_its_interval(stubbed, t_min):
    found = stubbed([1.0], [0.25], num_times=6, num_reconstructions=2, t_min=t_min)
    assert found.diffusion.tolist() == pytest.approx([1 - t_min] * 3, rel=1e-12)
    assert found.reconstruction.tolist() == [0.25] * 3
    prior = 4 * 1e-3 * math.log(5)  # a token is left with probability e^-sigma(1) = eps, and is then one of five
    assert found.prior.tolist() == pytest.approx([prior] * 3, rel=1e-4)
    assert found.value.tolist() == pytest.approx([1 - t_min + 0.25 + prior] * 3, rel=1e-6)
    assert found.standard_error.tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_the_error_has_the_spread_within_each_pair_and_that_of_the_reconstructions(stubbed):
    """Pairs (0, 2), (4, 10): their halves' squared differences; reconstructions 0, 1, 5 with variance 7."""
    found = stubbed([0.0, 2.0, 4.0, 10.0], [0.0, 1.0, 5.0], num_times=4, num_reconstructions=3, t_min=0.5)
    assert found.diffusion.tolist() == pytest.approx([0.5 * 4] * 3)
    assert found.reconstruction.tolist() == pytest.approx([2.0] * 3)
    variance = (0.5 * 2 / 4) ** 2 + (0.5 * 6 / 4) ** 2 + 7 / 3
    assert found.standard_error.tolist() == pytest.approx([variance**0.5] * 3)


def test_the_times_of_a_pair_lie_in_one_stratum_and_all_strata_come(make_graphs, log_linear, monkeypatch):
    seen = []

    def loss(score, graph, noise, x0, t, **_):
        seen.append(t)
        return torch.zeros(3)

    monkeypatch.setattr(bound_module, "denoising_loss", loss)
    likelihood_bound(
        constant_score, make_graphs(5)["absorbing"], log_linear, X0, num_times=8, num_reconstructions=2, t_min=0.2
    )
    strata = ((torch.stack(seen) - 0.2) / 0.8 * 4).floor()
    assert torch.equal(strata, torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 3))
    assert not torch.equal(seen[0], seen[1])


def test_the_weight_multiplies_each_term(make_graphs, log_linear, monkeypatch):
    """A position's prior is eps log 5 times its weight; the other terms are handed the weights."""
    seen = []

    def term(*_, weight, **__):
        seen.append(weight)
        return torch.zeros(3)

    for name in ("denoising_loss", "reconstruction_loss"):
        monkeypatch.setattr(bound_module, name, term)
    weight = torch.tensor([[0, 1, 2, 0.5]]).expand(3, 4)
    how: dict[str, Any] = {"num_times": 2, "num_reconstructions": 2, "weight": weight}
    found = likelihood_bound(constant_score, make_graphs(5)["absorbing"], log_linear, X0, **how)
    assert found.prior.tolist() == pytest.approx([3.5 * 1e-3 * math.log(5)] * 3, rel=1e-4)
    assert len(seen) == 4
    assert all(torch.equal(one, weight) for one in seen)


def test_d3pm_s_sum_has_a_term_for_each_step(make_graphs, log_linear, monkeypatch):
    """Step i costs i: steps 2..T sum to T (T + 1) / 2 - 1, step 1 is the reconstruction."""
    seen = []

    def divergence(model, graph, noise, x0, step, *_, **__):
        seen.append(step)
        return step.double()

    monkeypatch.setattr(d3pm_module, "_divergence", divergence)
    how: dict[str, Any] = {"num_steps": 5, "num_times": 8, "num_reconstructions": 2}
    found = d3pm_bound(constant_score, make_graphs(5)["absorbing"], log_linear, X0, **how)
    assert torch.equal(torch.stack(seen[:8]), torch.arange(2, 6).repeat_interleave(2)[:, None].expand(8, 3))
    assert (torch.stack(seen[8:]) == 1).all()
    assert found.diffusion.tolist() == [14.0] * 3
    assert found.reconstruction.tolist() == [1.0] * 3
    assert found.standard_error.tolist() == [0.0] * 3
    assert found.value.tolist() == pytest.approx([15 + 4 * 1e-3 * math.log(5)] * 3, rel=1e-6)


def test_d3pm_s_error_has_both_spreads(make_graphs, log_linear, monkeypatch):
    values = iter([0.0, 2.0, 4.0, 10.0, 0.0, 1.0, 5.0])
    monkeypatch.setattr(d3pm_module, "_divergence", lambda *_, **__: torch.full((3,), next(values)).double())
    how: dict[str, Any] = {"num_steps": 3, "num_times": 4, "num_reconstructions": 3}
    found = d3pm_bound(constant_score, make_graphs(5)["absorbing"], log_linear, X0, **how)
    variance = (2 * 2 / 4) ** 2 + (2 * 6 / 4) ** 2 + 7 / 3
    assert found.standard_error.tolist() == pytest.approx([variance**0.5] * 3)


def test_a_draw_of_d3pm_is_the_number_of_steps_times_one_of_them(make_graphs, log_linear, monkeypatch):
    seen = []

    def divergence(model, graph, noise, x0, step, *_, **__):
        seen.append(step)
        return torch.ones(4)

    monkeypatch.setattr(d3pm_module, "_divergence", divergence)
    x0 = torch.zeros(4, 2, dtype=torch.int64)
    assert d3pm_loss(constant_score, make_graphs(5)["absorbing"], log_linear, x0, num_steps=4).tolist() == [4.0] * 4
    assert sorted(seen[0].tolist()) == [1, 2, 3, 4]  # as many as sequences: one each


def test_in_any_order_the_noise_level_is_the_k_th_smallest_of_uniform_numbers(make_graphs, generator):
    """E lambda = k / (L + 1), E lambda^2 = k (k + 1) / ((L + 1) (L + 2)); 20,000 draws, 4 standard errors."""
    levels = []

    def model(x, sigma):
        levels.append(-torch.expm1(-sigma.double()))
        return torch.zeros(*x.shape, 6)

    x0 = torch.zeros(20_000, 4, dtype=torch.int64)
    for k in (1, 3, 4):
        any_order_loss(model, make_graphs(5)["absorbing"], x0, num_masked=torch.full((20_000,), k), generator=generator)
        mean, square = k / 5, k * (k + 1) / 30
        error = ((square - mean**2) / 20_000) ** 0.5
        assert abs(float(levels[-1].mean()) - mean) < 4 * error
        assert abs(float((levels[-1] ** 2).mean()) - square) < 8 * error


def test_in_any_order_every_set_of_k_positions_is_as_likely(make_graphs, generator):
    """A chi-square over the six pairs of four positions, whose 99.99 % quantile at 5 degrees is 25.7."""
    seen = []

    def model(x, sigma):
        seen.append(x == 5)
        return torch.zeros(*x.shape, 6)

    x0 = torch.zeros(6000, 4, dtype=torch.int64)
    any_order_loss(model, make_graphs(5)["absorbing"], x0, num_masked=torch.full((6000,), 2), generator=generator)
    code = (seen[0] * torch.tensor([1, 2, 4, 8])).sum(-1)
    counts = torch.bincount(code, minlength=16)[[3, 5, 6, 9, 10, 12]]
    assert counts.sum() == 6000
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 25.7


def test_in_any_order_all_numbers_of_masks_come_once_in_a_batch_of_that_many(make_graphs):
    seen = []

    def model(x, sigma):
        seen.append((x == 5).sum(-1))
        return torch.zeros(*x.shape, 6)

    loss = any_order_loss(model, make_graphs(5)["absorbing"], torch.zeros(4, 4, dtype=torch.int64))
    assert sorted(seen[0].tolist()) == [1, 2, 3, 4]
    assert loss.tolist() == pytest.approx([4 * math.log(5)] * 4)  # L / k times k positions of log 5


def test_lambda_is_the_mask_probability_that_the_model_is_told(make_graphs):
    levels = []

    def model(x, sigma):
        levels.append(sigma)
        return torch.zeros(*x.shape, 6)

    share = torch.tensor([0.25, 0.5, 0.75])
    loss = lambda_cross_entropy_loss(model, make_graphs(5)["absorbing"], X0, share, xt=torch.full((3, 4), 5))
    torch.testing.assert_close(levels[0], -torch.log(1 - share))
    torch.testing.assert_close(loss, 4 * math.log(5) / share)


def test_the_loss_at_a_time_is_the_rate_times_the_score_entropy(make_graphs):
    """One mask, s = 2 everywhere, sigma = log 3, so that r = 1/2 at the clean token and 0 at four others."""

    def noise(t):
        return torch.full_like(t, math.log(3)), torch.full_like(t, 7.0)

    def score(x, sigma):
        return torch.full((*x.shape, 6), math.log(2))

    x0 = torch.tensor([[0, 1]])
    found = denoising_loss(score, make_graphs(5)["absorbing"], noise, x0, torch.ones(1), xt=torch.tensor([[5, 1]]))
    want = 7 * (4 * 2 + 2 - 0.5 * math.log(2) + 0.5 * (math.log(0.5) - 1))
    assert float(found) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("level", [-6.0, 0.0, 3.0])
def test_the_decoder_gives_nothing_to_the_mask_and_a_millionth_to_all(level, make_graphs, log_linear):
    """A mask under absorption: in proportion to the scores, whether or not they are the right total."""
    share = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    log_score = torch.cat([share.log() + level, torch.zeros(1)]).expand(5, 1, 6).double()
    x0, x = torch.arange(5)[:, None], torch.full((5, 1), 5)
    loss = reconstruction_loss(
        lambda x, s: log_score, make_graphs(5)["absorbing"], log_linear, x0, torch.full((5,), 0.3), xt=x
    )
    want = -((1 - 1e-6) * share.double() + 1e-6 / 5).log()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "hybrid", "absorbing"])
def test_the_decoder_is_bayes_rule_for_one_position(kind, make_graphs, log_linear):
    """With the exact score at a large noise: p(x0) p(x | x0), normalised, for every x."""
    graph = make_graphs(4)[kind]
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    t = torch.full((1,), 0.6, dtype=torch.float64)
    states = torch.arange(graph.num_states)
    row = graph.transition_from(torch.arange(4), log_linear(t)[0].expand(4))
    kernel = row.dense(graph.num_states).double()  # p(x | x0), (x0, x)
    log_p = (p @ kernel).log()

    def score(x, sigma):
        return log_p - log_p[x][..., None]

    for x, clean in itertools.product(states.tolist(), range(4)):
        if kernel[clean, x] == 0 or (kind == "absorbing" and x < 4):
            continue
        found = reconstruction_loss(score, graph, log_linear, torch.tensor([[clean]]), t, xt=torch.tensor([[x]]))
        joint = p * kernel[:, x]
        want = -math.log((1 - 1e-6) * float(joint[clean] / joint.sum()) + 1e-6 / 4)
        assert float(found) == pytest.approx(want, rel=1e-6)


def defaults(function):
    given = inspect.signature(function).parameters.values()
    told = {each.name: each.default for each in given if each.default is not inspect.Parameter.empty}
    return {name: value for name, value in told.items() if value is not None}


def test_numbers_unless_told_otherwise():
    late, seen = {"t_min": 1e-3}, {"refuse_nan": True}
    told: dict[Any, dict[str, Any]] = dict.fromkeys(
        (cross_entropy_loss, elbo_loss, leave_one_out_loss, posterior_loss, time_varying_loss), late
    )
    told |= dict.fromkeys((uniform_times, stratified_times, low_discrepancy_times), late)
    told |= dict.fromkeys((fused_denoising_loss, fused_cross_entropy_loss, autoregressive_loss, d3pm_loss), seen)
    drawn = any_order_loss, lambda_cross_entropy_loss, implicit_score_entropy_loss, reconstruction_loss
    told |= {function: {} for function in drawn}
    for function, values in told.items():
        assert defaults(function) == values, function
    assert defaults(denoising_loss) == late | seen
    bound = {"num_times": 128, "num_reconstructions": 16}
    assert defaults(likelihood_bound) == bound | late | {"small_noise_share": 0.0}
    assert defaults(d3pm_bound) == bound
    assert defaults(masked_likelihood_bound) == {"num_times": 108, "num_parts": 8, "num_reconstructions": 3} | late
    assert defaults(enumerated_implicit_score_entropy_loss) == {"batch_size": 1024}


@pytest.mark.parametrize(
    "loss",
    [denoising_loss, cross_entropy_loss, posterior_loss, leave_one_out_loss],
    ids=lambda loss: loss.__name__,
)
def test_times_that_are_drawn_are_one_a_stratum_from_t_min_on(loss, make_graphs, generator):
    told = []

    def noise(t):
        told.append(t)
        return -torch.log1p(-0.999 * t), 1 / (1 - t)

    x0 = torch.zeros(8, 3, dtype=torch.int64)
    loss(lambda x, s: torch.zeros(*x.shape, 6), make_graphs(5)["absorbing"], noise, x0, generator=generator, t_min=0.5)
    assert torch.equal(((told[0] - 0.5) / 0.5 * 8).floor().sort().values, torch.arange(8.0))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_gpu_checks_values_itself(monkeypatch, wrong):
    """Of a tensor that only says that it lies there: nothing is read, and the device is told what to demand."""
    asked = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, told: asked.append((right.device.type, told)))
    with FakeTensorMode():
        right = torch.zeros((), dtype=torch.bool, device="cuda") ^ wrong
        require(right, "it must be so", lambda: "and was not")
        check_states("x", torch.zeros(3, dtype=torch.int64, device="cuda"), 5)
        check_sigma("sigma", torch.zeros(3, device="cuda"))
    assert asked == [
        ("cuda", "it must be so"),
        ("cuda", "x must lie in [0, 5) (the graph's num_states)"),
        ("cuda", "sigma is a total noise and must be >= 0 everywhere"),
    ]
    if wrong:
        with pytest.raises(ValueError, match="it must be so, and was not"):
            require(torch.tensor(False), "it must be so", lambda: "and was not")


def test_what_is_just_within_bounds_is_taken_and_what_is_just_outside_is_not():
    check_states("x", torch.tensor([0, 4]), 5)
    for state in (-1, 5):
        with pytest.raises(
            ValueError, match=rf"x must lie in \[0, 5\).*, got values in \[{min(state, 2)}, {max(state, 2)}\]"
        ):
            check_states("x", torch.tensor([2, state]), 5)
    check_states("x", torch.zeros(0, dtype=torch.int64), 5)
    check_sigma("sigma", torch.zeros(2))
    for sigma in (-1e-30, math.nan):
        with pytest.raises(ValueError, match="sigma is a total noise and must be >= 0 everywhere, got a minimum of"):
            check_sigma("sigma", torch.tensor([1.0, sigma]))
    x = torch.zeros(2, 2, dtype=torch.int64)
    check_weight(torch.tensor([[0.0, 0.0], [0.0, 1e-30]]), x)
    for weight, expected in (([[1.0, -1e-30], [1, 1]], ">= 0 everywhere"), ([[0.0, 0], [0, 0]], "0 at every position")):
        with pytest.raises(ValueError, match=expected):
            check_weight(torch.tensor(weight), x)
    check_given(torch.tensor([[True, True], [True, False]]), x)
    with pytest.raises(ValueError, match="true at every position"):
        check_given(x == 0, x)

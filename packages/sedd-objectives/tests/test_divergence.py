"""The divergence of eq. 5 element by element and row by row, against integers, fractions and plain sums in float64."""

from __future__ import annotations

import importlib
import math
from fractions import Fraction

import pytest
import torch
from sedd_objectives.fast.divergence import (
    divergence,
    half_squares,
    jump_gradients,
    row_divergence,
    with_gradients,
)
from sedd_objectives.jumps import Jumps
from sedd_objectives.score_entropy import constant, plain_concrete_score_matching, plain_score_entropy

module = importlib.import_module("sedd_objectives.fast.divergence")


def phi(d):
    """e^d - 1 - d to 40 digits and more, by fractions."""
    d, term, total = Fraction(d), Fraction(1), Fraction(0)
    for k in range(1, 120):
        term = term * d / k
        total += term if k > 1 else 0
    return float(total)


DISTANCES = [-30.0, -2.0, -0.75, -0.5, -0.49, -0.25, -1e-3, -1e-8, 0.0, 1e-8, 1e-3, 0.1, 0.375, 0.499, 0.51, 3.0, 20.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_slope_and_distance_to_the_last_digits(dtype):
    """Of r = 1, where log s is d itself."""
    d = torch.tensor(DISTANCES, dtype=dtype)
    exact = torch.tensor([phi(v) for v in d.tolist()], dtype=torch.float64)
    found = divergence(d, torch.ones(1, dtype=torch.float64))
    assert found.value.dtype == found.slope.dtype == found.distance.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.value.double(), exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.slope.double(), d.double().expm1(), rtol=tolerance, atol=0)
    assert torch.equal(found.distance, d)


@pytest.mark.parametrize("ratio", [4.0, 0.125, 3e-9])
def test_the_distance_keeps_digits_that_log_r_in_float32_would_lose(ratio):
    """Of the float32 log s and the float64 r: where they are near, s - r is as well known as they are."""
    log_score = (torch.tensor(DISTANCES, dtype=torch.float64) + math.log(ratio)).float()
    d = log_score.double() - math.log(ratio)
    found = divergence(log_score, torch.tensor([ratio], dtype=torch.float64))
    torch.testing.assert_close(found.distance.double(), d, rtol=1e-6, atol=0)
    exact = torch.tensor([phi(v) for v in d.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found.value.double(), ratio * exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.slope.double(), ratio * d.expm1(), rtol=1e-6, atol=0)


def test_where_the_ratio_is_zero_it_is_the_score():
    log_score, room = torch.tensor([[0.0, 2.0, -torch.inf]]), torch.full((1, 3), torch.nan)
    found = divergence(log_score, torch.zeros(1, 1), out=room)
    assert torch.equal(found.value, log_score.exp())
    assert torch.equal(found.slope, found.value)
    assert found.value is room
    assert torch.equal(found.distance, log_score)
    some = divergence(log_score, torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(some.value, torch.tensor([[1.0, math.e**2 - 3, 0.0]]))
    torch.testing.assert_close(some.slope, torch.tensor([[1.0, math.e**2 - 1, 0.0]]))


@pytest.mark.parametrize(("log_score", "log_ratio"), [(75.0, -10.0), (60.0, -20.0), (60.0, -19.9), (80.0, -8.0)])
def test_far_scores_do_not_overflow(log_score, log_ratio):
    """E^d is no float32, or nearly none, and s is one; beside an entry that is near."""
    ratio = torch.tensor([math.exp(log_ratio), 1.0])
    found = divergence(torch.tensor([log_score, 0.25]), ratio)
    r, d = float(ratio[0]), log_score - math.log(float(ratio[0]))
    assert found.value.tolist() == pytest.approx([math.exp(log_score) - r - r * d, phi(0.25)], rel=1e-5)
    assert found.slope.tolist() == pytest.approx([math.exp(log_score) - r, math.expm1(0.25)], rel=1e-5)


def test_a_score_of_zero_against_a_ratio_costs_without_end():
    assert float(divergence(torch.tensor([-torch.inf]), torch.ones(1)).value) == math.inf


def jumps_and_dense(generator, dtype=torch.float64, ratio_dtype=torch.float64):
    """Five rows of seven states: no base in two of them, no ratio of the base in one, a state listed twice."""
    index = torch.tensor([[0, 2, 2], [1, 3, 6], [4, 4, 5], [0, 1, 6], [2, 3, 4]])
    weight = torch.rand(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    weight[0, 2] = weight[2, 0] = weight[4, 1] = 0
    ratio = torch.rand(5, 3, generator=generator, dtype=torch.float64).to(ratio_dtype)
    ratio[1, 1] = 0
    ratio[0, 1], ratio[2, 0] = ratio[0, 2], ratio[2, 1]
    base_weight = torch.tensor([0.5, 0.0, 2.0, 1.5, 0.0], dtype=dtype)
    base_ratio = torch.tensor([0.3, 0.7, 0.0, 2.0, 0.4], dtype=ratio_dtype)
    jumps = Jumps(base_weight, base_ratio, index, weight, ratio)
    weights = base_weight.double()[:, None].repeat(1, 7).scatter(-1, index, 0).scatter_add(-1, index, weight.double())
    ratios = base_ratio.double()[:, None].repeat(1, 7).scatter(-1, index, ratio.double())
    return jumps, weights, ratios


@pytest.mark.parametrize("at_a_time", [1 << 18, 15, 1])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_sum_up_and_write_their_slope(at_a_time, scaled, dtype, generator, monkeypatch):
    """Against eq. 5 as printed, with rows worked on all together, two or one at a time."""
    monkeypatch.setattr(module, "_IN_CACHE", at_a_time)
    jumps, weights, ratios = jumps_and_dense(generator, dtype)
    exact = torch.randn(5, 7, generator=generator).double().requires_grad_()
    scale = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=dtype) if scaled else None
    terms = weights * (exact.exp() - ratios * exact + constant(ratios))
    (want_slope,) = torch.autograd.grad((terms.sum(-1) * (1 if scale is None else scale)).sum(), exact)
    slope = torch.full((5, 7), torch.nan, dtype=dtype)
    log_score = exact.detach().to(dtype)
    kept = log_score.clone()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    total = row_divergence(log_score, jumps, scale=scale, slope=slope)
    torch.testing.assert_close(total.double(), terms.sum(-1).detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), want_slope, rtol=tolerance, atol=tolerance)
    assert torch.equal(row_divergence(log_score, jumps), total)
    assert torch.equal(log_score, kept)
    assert total.dtype == dtype


def test_rows_without_any_base_leave_the_other_states_a_slope_of_zero(generator):
    jumps, weights, ratios = jumps_and_dense(generator)
    jumps = jumps.at(slice(1, 2))
    log_score = torch.randn(1, 7, generator=generator, dtype=torch.float64)
    log_score[0, [0, 2]] = 1000.0  # overflows, and does not count
    slope = torch.full((1, 7), torch.nan, dtype=torch.float64)
    total = row_divergence(log_score, jumps, slope=slope)
    at = [1, 3, 6]
    want = weights[1, at] * (log_score[0, at].exp() - ratios[1, at] * log_score[0, at] + constant(ratios[1, at]))
    assert float(total) == pytest.approx(float(want.sum()))
    assert slope[0, [0, 2, 4, 5]].tolist() == [0.0] * 4
    torch.testing.assert_close(slope[0, at], weights[1, at] * (log_score[0, at].exp() - ratios[1, at]))


def test_an_overflowed_score_beside_rows_with_a_base_does_not_count(generator):
    jumps, _, _ = jumps_and_dense(generator)
    log_score = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    plain, slope = row_divergence(log_score, jumps), torch.empty(5, 7, dtype=torch.float64)
    log_score[1, 0] = log_score[4, 0] = log_score[4, 3] = 1000.0
    assert torch.equal(row_divergence(log_score, jumps, slope=slope), plain)
    assert slope.isfinite().all()
    assert slope[1, 0] == slope[4, 0] == slope[4, 3] == 0


def test_derivatives_by_weights_and_ratios_are_those_of_autograd(generator):
    """By base and listed numbers; where r = 0 by r, they are set to 0, and where a weight is 0 by its ratio."""
    jumps, _, _ = jumps_and_dense(generator)
    log_score = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    fields = [field.clone().requires_grad_(field.is_floating_point()) for field in jumps.fields()]
    base_weight, base_ratio, index, weight, ratio = fields
    listed = torch.zeros(5, 7).scatter(-1, index, 1) > 0

    def each(r, s):
        return s.exp() - r * s + constant(r)

    at_base = torch.where(listed, 0, each(base_ratio[:, None], log_score)).sum(-1)
    total = base_weight * at_base + (weight * each(ratio, log_score.gather(-1, index))).sum(-1)
    leaves = [base_weight, base_ratio, weight, ratio]
    want = list(torch.autograd.grad(total.sum(), leaves))
    want[1] = torch.where(base_ratio > 0, want[1], 0)
    want[3] = torch.where(ratio > 0, want[3], 0)
    found = jump_gradients(log_score, jumps)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-14)
    scale = torch.tensor([0.5, 2, 1, 0, 3]).double()
    learning = Jumps(base_weight, base_ratio.detach(), index, weight.detach(), ratio)
    outputs, slopes = with_gradients(log_score, learning, scale)
    assert outputs[0] is base_weight
    assert outputs[1] is ratio
    torch.testing.assert_close(slopes[0], want[0] * scale)
    torch.testing.assert_close(slopes[1], want[3] * scale[:, None])
    assert with_gradients(log_score, jumps, scale) == ([], [])
    halves = Jumps(
        *(field.detach().float().requires_grad_() if field.is_floating_point() else field for field in fields)
    )
    assert all(slope.dtype == torch.float32 for slope in with_gradients(log_score, halves, scale)[1])


def test_half_squares_of_rows_are_eq_4(generator):
    jumps, weights, ratios = jumps_and_dense(generator)
    log_score = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    found = half_squares(log_score, *jumps.fields())
    want = (weights * (log_score.exp() - ratios) ** 2 / 2).sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad(loss.sum(), log_score)[0] for loss in (found, want)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plain_formulas_by_hand(dtype):
    """S = (2, 1/2, 3), r = (1, 0, 1/4), w = (1, 2, 4): at x = 2, and at x = 0, whose own entries do not count."""
    log_score = torch.tensor([2.0, 0.5, 3.0], dtype=dtype).log().expand(2, 3)
    ratio = torch.tensor([1.0, 0.0, 0.25], dtype=dtype).expand(2, 3)
    weight, x = torch.tensor([1.0, 2.0, 4.0], dtype=dtype).expand(2, 3), torch.tensor([2, 0])
    first, second = 2 - math.log(2) - 1, 2 * 0.5
    third = 4 * (3 - 0.25 * math.log(3) + 0.25 * (math.log(0.25) - 1))
    found = plain_score_entropy(log_score, ratio, weight, x)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([first + second, second + third], rel=1e-6)
    squares = plain_concrete_score_matching(log_score, ratio, weight, x)
    assert squares.tolist() == pytest.approx([0.5 + 0.25, 0.25 + 2 * 2.75**2], rel=1e-6)
    assert constant(torch.tensor([0.0, 1.0, math.e, 0.5])).tolist() == pytest.approx(
        [0.0, -1.0, 0.0, 0.5 * (math.log(0.5) - 1)], abs=1e-6
    )

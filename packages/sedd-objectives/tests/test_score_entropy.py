from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from sedd_objectives import concrete_score_matching, denoising_score_entropy, score_entropy


def textbook(log_score, ratio, weight, x):
    """Eq. 5 as printed, in float64, over all N states."""
    log_score, ratio, weight = log_score.double(), ratio.double(), weight.double()
    k = torch.where(ratio > 0, ratio * (ratio.log() - 1), 0)
    terms = weight * (log_score.exp() - ratio * log_score + k)
    return terms.scatter(-1, x[..., None], 0).sum(-1)


def random_case(shape, n, generator, zeros=True):
    log_score = 2 * torch.randn(*shape, n, generator=generator, dtype=torch.float64)
    ratio = torch.randn(*shape, n, generator=generator, dtype=torch.float64).exp()
    weight = torch.rand(*shape, n, generator=generator, dtype=torch.float64)
    if zeros:
        ratio[torch.rand(ratio.shape, generator=generator) < 0.3] = 0
    return log_score, ratio, weight, torch.randint(n, shape, generator=generator)


def test_equals_the_textbook_form(generator):
    case = random_case((3, 4), 7, generator)
    torch.testing.assert_close(score_entropy(*case), textbook(*case), rtol=1e-12, atol=1e-12)


def test_is_zero_at_the_ratio_and_positive_elsewhere(generator):
    log_score, ratio, weight, x = random_case((50,), 5, generator, zeros=False)
    assert score_entropy(ratio.log(), ratio, weight, x).abs().max() < 1e-15
    assert (score_entropy(log_score, ratio, weight, x) > 0).all()


def test_entry_at_x_is_ignored_in_value_and_gradient(generator):
    log_score, ratio, weight, x = random_case((6,), 5, generator)
    spoilt = log_score.scatter(-1, x[:, None], float("nan")).requires_grad_()
    loss = score_entropy(spoilt, ratio, weight.scatter(-1, x[:, None], -3.0), x)
    torch.testing.assert_close(loss, textbook(log_score, ratio, weight, x), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), spoilt)
    assert (grad.gather(-1, x[:, None]) == 0).all()
    assert grad.isfinite().all()


def test_gradients_by_score_ratio_and_weight(generator):
    log_score, ratio, weight, x = random_case((4,), 5, generator, zeros=False)
    inputs = [v.requires_grad_() for v in (log_score, ratio, weight)]
    assert torch.autograd.gradcheck(lambda s, r, w: score_entropy(s, r, w, x), inputs)


def phi(d):
    """e^d - 1 - d, by its series where the difference would cancel even in float64."""
    if abs(d) > 0.1:
        return math.expm1(d) - d
    return sum(d**k / math.factorial(k) for k in range(2, 20))


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 0.3, 0.49999, 0.50001, 1.0, 30.0, 100.0])
@pytest.mark.parametrize("log_ratio", [-60.0, -25.0, -1.0, 0.0, 3.0, 25.0])
@pytest.mark.parametrize("base", [True, False])
def test_float32_keeps_relative_accuracy(distance, log_ratio, base, vector):
    """The value of the very same float32 numbers, worked out in float64."""
    ratio = torch.tensor(math.exp(log_ratio))
    for sign in (-1, 1):
        log_score = torch.tensor(math.log(float(ratio)) + sign * distance)
        exact = float(ratio) * phi(float(log_score) - math.log(float(ratio)))
        if log_score > 80 or exact < 1e-37:
            continue
        x, rows = torch.tensor([0]), torch.tensor([[0.0, 1.0, 0.0]])
        target = vector(ratio[None], torch.tensor([[0]]), torch.ones(1, 1)) if base else ratio.expand(1, 3)
        rate = vector(torch.ones(1) / 2, torch.tensor([[0]]), -torch.ones(1, 1)) if base else rows
        assert abs(float(score_entropy(log_score.expand(1, 3), target, rate, x)) / exact - 1) < 1e-6


def test_structured_rows_equal_dense_ones(graph, generator):
    n = graph.num_states
    x0 = torch.randint(5, (4, 6), generator=generator)
    sigma = torch.tensor([1e-3, 0.1, 1.0, 4.0], dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(4, 6, n, generator=generator, dtype=torch.float64)
    ratio, rates = graph.ratio(x, x0, sigma), graph.rates_into(x)

    def dense(row):
        return (
            row.base[..., None]
            .expand(*x.shape, n)
            .clone()
            .scatter(-1, row.index, row.value.to(row.base.dtype))
            .double()
        )

    want = textbook(log_score, dense(ratio), dense(rates).clamp_min(0), x)
    torch.testing.assert_close(denoising_score_entropy(log_score, graph, x, x0, sigma), want, rtol=1e-6, atol=1e-12)


def test_bfloat16_is_computed_in_float32_under_any_autocast(graph, generator):
    x0 = torch.randint(5, (4, 6), generator=generator)
    sigma = torch.tensor([1e-3, 0.1, 1.0, 4.0])
    x = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(4, 6, graph.num_states, generator=generator).bfloat16()
    plain = denoising_score_entropy(log_score.float(), graph, x, x0, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoising_score_entropy(log_score, graph, x, x0, sigma), plain)


@pytest.mark.parametrize("function", [score_entropy, concrete_score_matching])
@pytest.mark.parametrize("of_score", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_ratio", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.float64])
def test_the_sum_is_as_wide_as_the_score_or_the_ratio(function, of_score, of_ratio, of_weight, generator):
    log_score = torch.randn(3, 5, generator=generator).to(of_score)
    ratio, weight = (torch.rand(3, 5, generator=generator).to(of) for of in (of_ratio, of_weight))
    x = torch.tensor([0, 4, 2])
    found = function(log_score, ratio, weight, x)
    assert found.dtype == (torch.float64 if torch.float64 in (of_score, of_ratio) else torch.float32)
    exact = function(log_score.double(), ratio.double(), weight.double(), x)
    torch.testing.assert_close(found.double(), exact, rtol=1e-12 if found.dtype == torch.float64 else 1e-5, atol=0)


def test_a_state_that_both_rows_list_counts_once(generator):
    """Value and gradients, where the ratio's row and the weight's list the same states, in any order, and x beside."""
    log_score = torch.randn(1, 7, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
    base, x = torch.tensor([0.4], dtype=torch.float64), torch.tensor([2])
    for states in ((5, 1, 3), (1, 2, 5), (6, 5, 0)):
        ratio = SimpleNamespace(base=base, index=torch.tensor([[5, 1, 3]]), value=values[:1])
        weight = SimpleNamespace(base=2 * base, index=torch.tensor([states]), value=values[1:])
        r, w = (row.base[:, None].expand(1, 7).scatter(-1, row.index, row.value) for row in (ratio, weight))
        found, want = score_entropy(log_score, ratio, weight, x), score_entropy(log_score, r, w, x)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        slope, expected = (torch.autograd.grad(loss.sum(), log_score)[0] for loss in (found, want))
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)


def test_overflowed_scores_do_not_spoil_states_without_a_jump():
    log_score = torch.tensor([[200.0, 1.0, 200.0, 0.5]], requires_grad=True)
    loss = score_entropy(log_score, torch.ones(1, 4), torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([3]))
    assert loss.isfinite().all()
    (grad,) = torch.autograd.grad(loss.sum(), log_score)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"] + 9), "x must lie in"),
        (lambda a: a.update(x=a["x"].float()), "x holds states"),
        (lambda a: a.update(x=a["x"][:2]), "x must have shape"),
        (lambda a: a.update(ratio=a["ratio"][:2]), "ratio must have"),
        (lambda a: a.update(weight=a["weight"][..., :2]), "weight must have"),
        (lambda a: a["log_score"].fill_(float("nan")), "log_score is NaN"),
        (lambda a: a["ratio"].fill_(float("inf")), "cannot have come from"),
    ],
)
def test_bad_input_is_named(change, message, generator):
    arguments = dict(zip(("log_score", "ratio", "weight", "x"), random_case((3,), 5, generator), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=message):
        score_entropy(**arguments)

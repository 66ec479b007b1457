from __future__ import annotations

import pytest
import torch
from sedd_objectives import concrete_score_matching, plain_concrete_score_matching


def textbook(log_score, ratio, weight, x):
    """Eq. 4 as printed, weighted, in float64."""
    terms = weight.double() * (log_score.double().exp() - ratio.double()) ** 2 / 2
    return terms.scatter(-1, x[..., None], 0).sum(-1)


@pytest.fixture
def case(generator):
    log_score = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    ratio = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64).exp()
    ratio[torch.rand(ratio.shape, generator=generator) < 0.3] = 0
    weight = torch.rand(3, 4, 7, generator=generator, dtype=torch.float64)
    return log_score, ratio, weight, torch.randint(7, (3, 4), generator=generator)


def test_equals_the_textbook_form_and_its_gradients(case):
    *inputs, x = case
    inputs = [value.requires_grad_() for value in inputs]
    log_score, ratio, weight = inputs
    found, want = concrete_score_matching(log_score, ratio, weight, x), textbook(log_score, ratio, weight, x)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain_concrete_score_matching(log_score, ratio, weight, x), want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_structured_rows_equal_dense_ones_and_chunks_the_whole(graph, generator, monkeypatch):
    x0 = torch.randint(5, (4, 6), generator=generator)
    sigma = torch.tensor([1e-3, 0.1, 1.0, 4.0], dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    log_score = torch.randn(4, 6, graph.num_states, generator=generator, dtype=torch.float64).requires_grad_()
    ratio, rates = graph.ratio(x, x0, sigma), graph.rates_into(x)

    def dense(row):
        return row.base.double()[..., None].expand(log_score.shape).scatter(-1, row.index, row.value.double())

    want = textbook(log_score, dense(ratio), dense(rates).clamp_min(0), x)
    (slope,) = torch.autograd.grad(want.sum(), log_score)
    for size in (1 << 22, 40):
        monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", size)
        found = concrete_score_matching(log_score, ratio, rates, x)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), log_score)[0], slope, rtol=1e-6, atol=1e-12)


def test_what_must_not_count_does_not(case):
    """The entry at x, and overflowed scores where no jump leads from."""
    log_score, ratio, weight, x = case
    idle = torch.arange(7) == (x[..., None] + 1) % 7
    weight[idle] = 0
    want = concrete_score_matching(log_score, ratio, weight, x)
    spoilt = log_score.scatter(-1, x[..., None], torch.nan).masked_fill(idle, 1000.0).requires_grad_()
    loss = concrete_score_matching(spoilt, ratio.masked_fill(idle, torch.inf), weight, x)
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(loss.sum(), spoilt)
    assert slope.isfinite().all()
    assert (slope.gather(-1, x[..., None]) == 0).all()


@pytest.mark.parametrize("distance", [1e-6, 1e-3, 0.1, 0.99, 1.01, 10.0])
@pytest.mark.parametrize("log_ratio", [-20.0, 0.0, 15.0])
def test_float32_keeps_relative_accuracy(distance, log_ratio):
    """The value of the very same float32 numbers, worked out in float64."""
    ratio = torch.tensor(log_ratio).exp()
    for sign in (-1, 1):
        log_score = ratio.log() + sign * distance
        r = float(ratio)
        exact = 0.5 * (r * torch.expm1(log_score.double() - ratio.double().log())) ** 2
        rows = torch.tensor([[0.0, 1.0, 0.0]])
        found = concrete_score_matching(log_score.expand(1, 3), ratio.expand(1, 3), rows, torch.tensor([0]))
        assert abs(float(found) / float(exact) - 1) < 3e-6


def test_bfloat16_is_computed_in_float32_under_autocast(case):
    log_score, ratio, weight, x = case[0].bfloat16(), case[1].float(), case[2].float(), case[3]
    plain = concrete_score_matching(log_score.float(), ratio, weight, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = concrete_score_matching(log_score, ratio, weight, x)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"] + 9), "x must lie in"),
        (lambda a: a.update(x=a["x"].float()), "x holds states"),
        (lambda a: a.update(x=a["x"][:2]), "x must have shape"),
        (lambda a: a.update(ratio=a["ratio"][:2]), "ratio must have"),
        (lambda a: a.update(weight=a["weight"][..., :2]), "weight must have"),
        (lambda a: a["log_score"].fill_(float("nan")), "log_score is NaN"),
        (lambda a: a["ratio"].fill_(float("nan")), "cannot have come from"),
    ],
)
def test_bad_input_is_named(change, message, case):
    arguments = dict(zip(("log_score", "ratio", "weight", "x"), case, strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=message):
        concrete_score_matching(**arguments)

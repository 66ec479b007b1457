"""A formula worked out chunk by chunk is the formula, and nothing of the vocabulary's size is made besides a chunk."""

from __future__ import annotations

import itertools

import pytest
import torch
from sedd_objectives import (
    autoregressive_loss,
    concrete_score_matching,
    cross_entropy_loss,
    d3pm_loss,
    implicit_score_entropy_loss,
)
from sedd_objectives.fast.rows import chunks_of, each_row, equal_parts, sum_over_jumps
from sedd_objectives.jumps import Jumps
from sedd_objectives.score_entropy import constant
from torch.utils._python_dispatch import TorchDispatchMode


def formula(rows, scale, state):
    return scale * rows.exp().sum(-1) + rows.gather(-1, state[:, None])[:, 0] ** 2


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("size", [1 << 22, 12, 1])
def test_values_and_gradients_are_those_of_autograd(chosen, size, generator, monkeypatch):
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", size)
    rows = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([6, 0, 3]) if chosen else None
    count = 3 if chosen else 7
    scale = torch.rand(count, generator=generator, dtype=torch.float64).requires_grad_()
    state = torch.randint(5, (count,), generator=generator)
    found = each_row(formula, rows, positions, scale, state, dtype=torch.float64)
    want = formula(rows if positions is None else rows[positions], scale, state)
    torch.testing.assert_close(found, want)
    weight = torch.rand(count, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((weight * found).sum(), (rows, scale)),
        torch.autograd.grad((weight * want).sum(), (rows, scale)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_no_rows_give_no_values_and_a_gradient_of_zeros():
    rows = torch.randn(7, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = each_row(formula, rows, none, torch.zeros(0), none, dtype=torch.float32)
    assert found.shape == (0,)
    found.sum().backward()
    assert rows.grad is not None
    assert rows.grad.eq(0).all()


class Largest(TorchDispatchMode):
    """The number of tensors of at least `size` elements that the operations within made, views not counted."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            big = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * self.size
            if big and tensor.untyped_storage().data_ptr() not in inputs:
                self.made.append(str(func))
        return out


LOSSES = {
    "concrete": lambda logits, graph, noise, x0, x, t: concrete_score_matching(
        logits, graph.ratio(x, x0, noise(t)[0]), graph.rates_into(x), x
    ),
    "cross-entropy": lambda logits, graph, noise, x0, x, t: cross_entropy_loss(
        lambda x, s: logits, graph, noise, x0, t, xt=x
    ),
    "D3PM": lambda logits, graph, noise, x0, x, t: d3pm_loss(
        lambda x, s: logits, graph, noise, x0, torch.tensor([3, 4]), num_steps=4, xt=x
    ),
    "autoregressive": lambda logits, graph, noise, x0, x, t: autoregressive_loss(lambda x: logits, x0, start=0),
    "implicit": lambda logits, graph, noise, x0, x, t: implicit_score_entropy_loss(
        lambda x, s: logits, graph, x, noise(t)[0], generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_makes_nothing_of_the_logits_size_and_backward_their_gradient(
    name, make_graphs, log_linear, generator, monkeypatch
):
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", 4 * 51)
    graph = make_graphs(50)["absorbing"]
    x0 = torch.randint(50, (2, 40), generator=generator)
    t = torch.full((2,), 0.9)
    x = graph.sample(x0, log_linear(t)[0], generator=generator)
    logits = torch.randn(2, 40, 51, generator=generator, requires_grad=True)
    with Largest(logits.numel() // 2) as forward:
        loss = LOSSES[name](logits, graph, log_linear, x0, x, t).sum()
    assert forward.made == []
    with Largest(logits.numel() // 2) as backward:
        loss.backward()
    assert len(backward.made) <= {"implicit": 4}.get(name, 1)  # it calls the model twice: two gradients, and their sum
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("count", "size", "at_least", "ends"),
    [
        (10, 4, 1, [0, 3, 6, 10]),
        (8, 4, 1, [0, 4, 8]),
        (9, 4, 1, [0, 3, 6, 9]),
        (3, 4, 1, [0, 3]),
        (0, 4, 1, [0, 0]),
        (0, 4, 3, [0, 0, 0, 0]),
        (3, 4, 3, [0, 3, 3, 3]),
        (9, 4, 2, [0, 3, 6, 9]),
        (9, 1, 1, list(range(10))),
    ],
)
def test_equal_parts_are_few_and_as_long_as_each_other(count, size, at_least, ends):
    parts = equal_parts(count, size, at_least=at_least)
    assert [part.start for part in parts] + [parts[-1].stop] == ends
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))


def test_chunks_hold_what_they_may_and_a_row_at_least(monkeypatch):
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", 12)
    assert chunks_of(7, 5) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert chunks_of(3, 4) == [slice(0, 3)]
    assert chunks_of(4, 4) == [slice(0, 3), slice(3, 4)]
    assert chunks_of(2, 100) == [slice(0, 1), slice(1, 2)]
    assert chunks_of(13, 0) == [slice(0, 12), slice(12, 13)]
    assert chunks_of(0, 5) == []


@pytest.mark.parametrize(("width", "most"), [(None, 2), (3, 4), (13, 1)])
def test_a_formula_is_given_rows_by_the_numbers_it_makes_in_the_arithmetic_s_dtype(width, most, monkeypatch):
    """Forward and backward, autocast off; each row's fields beside it."""
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", 12)
    seen = []

    def shown(rows, field):
        seen.append((len(rows), rows.dtype, field.tolist(), torch.is_autocast_enabled("cpu")))
        return (rows.sum(-1) * field).to(torch.float64)

    rows = torch.ones(6, 5, dtype=torch.bfloat16).requires_grad_()
    positions, field = torch.tensor([5, 1, 0, 4, 2]), torch.arange(5.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = each_row(shown, rows, positions, field, dtype=torch.float32, width=width)
        assert value.dtype == torch.float32
        assert value.tolist() == [0.0, 5, 10, 15, 20]
        (slope,) = torch.autograd.grad(value.sum(), rows)
    assert slope.dtype == torch.bfloat16
    assert slope[:, 0].tolist() == [2.0, 1, 4, 0, 3, 0]
    assert {dtype for _, dtype, *_ in seen} == {torch.float32}
    assert max(count for count, *_ in seen) == most
    assert not any(on for *_, on in seen)
    assert [number for *_, part, _ in seen for number in part] == 2 * field.tolist()


@pytest.mark.parametrize(
    "learns", [("score",), ("ratio",), ("score", "weight"), ("base_weight", "base_ratio", "ratio")]
)
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("size", [1 << 22, 14])
def test_score_entropy_of_chosen_rows_has_the_slopes_of_its_formula(size, chosen, learns, generator, monkeypatch):
    """By whatever learns, and by nothing else; the jumps' inputs are those of the chunk."""
    monkeypatch.setattr("sedd_objectives.fast.rows.CHUNK_ELEMENTS", size)
    positions = torch.tensor([3, 0, 4]) if chosen else None
    count = 3 if chosen else 5
    made = {
        "score": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "base_weight": torch.rand(count, generator=generator, dtype=torch.float64),
        "base_ratio": torch.rand(count, generator=generator, dtype=torch.float64),
        "weight": torch.rand(count, 2, generator=generator, dtype=torch.float64),
        "ratio": torch.rand(count, 2, generator=generator, dtype=torch.float64),
    }
    for name in learns:
        made[name].requires_grad_()
    index = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(count)])
    score, base_weight, base_ratio, weight, ratio = made.values()
    found = sum_over_jumps(score, positions, Jumps(base_weight, base_ratio, index, weight, ratio))
    rows = score if positions is None else score[positions]
    weights = base_weight[:, None].expand(count, 7).scatter(-1, index, weight)
    ratios = base_ratio[:, None].expand(count, 7).scatter(-1, index, ratio)
    want = (weights * (rows.exp() - ratios * rows + constant(ratios))).sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    scale = torch.rand(count, generator=generator, dtype=torch.float64)
    leaves = [made[name] for name in learns]
    for one, other in zip(
        torch.autograd.grad((scale * found).sum(), leaves),
        torch.autograd.grad((scale * want).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

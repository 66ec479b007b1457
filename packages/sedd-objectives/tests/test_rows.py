"""A formula worked out chunk by chunk is the formula, and nothing of the vocabulary's size is made besides a chunk."""

from __future__ import annotations

import pytest
import torch
from sedd_objectives import (
    autoregressive_loss,
    concrete_score_matching,
    cross_entropy_loss,
    d3pm_loss,
    implicit_score_entropy_loss,
)
from sedd_objectives.fast.rows import each_row
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

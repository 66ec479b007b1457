"""Rows of rates and ratios as one set of jumps: every number at its state, counted once, in its dtype."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_objectives.jumps import DenseRow, Jumps, RatesInto, can_move, dense, merge, value_at

module = importlib.import_module("sedd_objectives.jumps")


def row(base, index, value, dtype=torch.float32):
    return DenseRow(torch.tensor(base, dtype=dtype), torch.tensor(index), torch.tensor(value, dtype=dtype))


ROW = row([0.5, 2.0], [[4, 1, 3], [0, 5, 2]], [[10.0, 11, 12], [13, 14, 15]])
FULL: list[list[float]] = [[0.5, 11, 0.5, 12, 10, 0.5], [13, 2, 15, 2, 2, 14]]


def test_a_row_s_values_at_states_whatever_their_order():
    states = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    assert value_at(ROW, states).tolist() == [FULL[0], FULL[1][::-1]]
    assert value_at(ROW, states[:, :1]).tolist() == [[0.5], [14.0]]
    none = DenseRow(ROW.base, ROW.index[:, :0], ROW.value[:, :0])
    assert value_at(none, states).tolist() == [[0.5] * 6, [2.0] * 6]
    assert value_at(DenseRow.of(torch.tensor(FULL)), states[:, 1:3]).tolist() == [[11, 0.5], [2, 2]]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_all_values_of_a_row(dtype):
    found = dense(ROW, 6, dtype)
    assert found.dtype == (dtype or torch.float32)
    assert found.tolist() == FULL
    of = DenseRow.of(found)
    assert of.base.tolist() == [0, 0]
    assert torch.equal(of.index, torch.arange(6).expand(2, 6))
    assert torch.equal(of.value, found)


@pytest.mark.parametrize(
    ("base", "index", "value", "moves"),
    [
        ([0.0], [[1, 2]], [[0.0, -3.0]], False),  # nothing leads in, and out of it no matter
        ([0.0], [[1, 2]], [[1e-30, -3.0]], True),
        ([0.0], [[2]], [[5.0]], False),  # what stands at x itself is no jump
        ([1e-30], [[2]], [[-1.0]], True),
        ([1.0], [[0, 1, 2, 3]], [[0.0, 0, -1, 0]], False),  # every state is listed, none is left for the base
        ([1.0], [[0, 1, 2]], [[0.0, 0, -1]], True),
        ([-1.0], [[0, 1, 2]], [[0.0, 0, -1]], False),
    ],
)
def test_whether_a_jump_leads_into_a_state(base, index, value, moves):
    assert can_move(row(base, index, value), torch.tensor([2]), 4).tolist() == [moves]


@pytest.mark.parametrize("rates", ["short", "all"])
@pytest.mark.parametrize("ratios", ["short", "all"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("of", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32,) * 2])
def test_jumps_hold_both_rows_at_every_state_and_none_from_x(rates, ratios, told, of, generator):
    """Whether rows list some states or all, and whether they say so: summed over what counts, by state."""
    n, x = 6, torch.tensor([3, 0])
    dtype, wide = of
    made = {
        "rates": row([0.5, 2.0], [[4, 1, 3], [0, 5, 2]], [[10.0, 0, -12], [-13, 14, 15]], torch.float64),
        "ratios": row([0.25, 0.75], [[1, 5], [2, 4]], [[0.5, 0.125], [3, 4]], wide),
    }
    full = {name: dense(each, n) for name, each in made.items()}
    if rates == "all":
        made["rates"] = DenseRow.of(full["rates"])
    if ratios == "all":
        made["ratios"] = DenseRow.of(full["ratios"])
    jumps = merge(made["rates"], made["ratios"], x, dtype, n if told else None)
    assert jumps.weight.dtype == jumps.base_weight.dtype == dtype
    assert jumps.ratio.dtype == jumps.base_ratio.dtype == torch.promote_types(dtype, wide)
    assert (jumps.index[:, 1:] >= jumps.index[:, :-1]).all()
    for i in range(2):
        weights, ratio = torch.zeros(n), torch.zeros(n)
        for state in range(n):
            listed = jumps.index[i] == state
            counting = listed & (jumps.weight[i] != 0)
            assert counting.sum() <= 1
            weights[state] = jumps.weight[i][listed].sum() if listed.any() else jumps.base_weight[i]
            there = jumps.ratio[i][listed] if listed.any() else jumps.base_ratio[i][None]
            assert (there == there[0]).all()
            ratio[state] = there[0]
        want = full["rates"][i].clone()
        want[x[i]] = 0
        torch.testing.assert_close(weights.double(), want)
        torch.testing.assert_close(ratio.double(), full["ratios"][i].double())


def test_the_fields_of_jumps_are_cut_and_taken_in_their_order():
    leaves = [torch.rand(3, requires_grad=True) for _ in range(2)]
    jumps = Jumps(leaves[0], leaves[1], torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), torch.rand(3, 2))
    assert [id(field) for field in jumps.fields()] == [
        id(getattr(jumps, name)) for name in ("base_weight", "base_ratio", "index", "weight", "ratio")
    ]
    part = jumps.at(slice(1, 3))
    assert all(torch.equal(one, other[1:]) for one, other in zip(part.fields(), jumps.fields(), strict=True))
    assert part.base_weight.requires_grad
    cut = jumps.detach()
    assert not any(field.requires_grad for field in cut.fields())
    assert all(torch.equal(one, other) for one, other in zip(cut.fields(), jumps.fields(), strict=True))


class Asked:
    def __init__(self, graph):
        self.graph, self.num_states, self.states = graph, graph.num_states, []

    def rates_into(self, x):
        self.states.append(x.tolist())
        return self.graph.rates_into(x)


@pytest.mark.parametrize("kind", ["absorbing", "hybrid", "dense"])
@pytest.mark.parametrize("waits", [False, True])
def test_rates_are_asked_once_for_each_state_there_is(kind, waits, make_graphs, monkeypatch):
    """On a GPU for all states, so that it need not tell which occur."""
    monkeypatch.setattr(module, "reading_waits", lambda device: waits)
    graph: Any = Asked(make_graphs(5)[kind])
    x = torch.tensor([[4, 1, 4], [0, 1, 3]])
    rates = RatesInto.of(graph, x)
    assert graph.states == [list(range(graph.num_states)) if waits else [0, 1, 3, 4]]
    found, want = rates.at(x.T), graph.graph.rates_into(x.T)
    for name in ("base", "index", "value"):
        assert torch.equal(getattr(found, name), getattr(want, name))
    n = graph.num_states
    assert torch.equal(rates.can_move(x.T, n), can_move(want, x.T, n))
    assert rates.can_move(x, n).any() == (kind != "absorbing")


@pytest.mark.parametrize("learnt", [(True, False), (False, True), (False, False)])
def test_rates_that_learn_are_refused(learnt):
    base, value = (
        torch.ones(shape, requires_grad=wanted) for shape, wanted in zip(((2,), (2, 1)), learnt, strict=True)
    )
    graph = SimpleNamespace(
        num_states=3, rates_into=lambda x: DenseRow(base, torch.zeros(2, 1, dtype=torch.int64), value)
    )
    if any(learnt):
        with pytest.raises(ValueError, match="rates that require a gradient"):
            RatesInto.of(graph, torch.tensor([0, 1]))
    else:
        assert RatesInto.of(graph, torch.tensor([0, 1])).states.tolist() == [0, 1]

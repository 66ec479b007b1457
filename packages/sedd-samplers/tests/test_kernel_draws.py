"""Samples drawn as a GPU draws them, by kernels in Triton's interpreter, are those that are drawn without one."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from sedd_samplers import Euler, FirstHitting, TauLeaping, Tweedie, Unmasking, sample

pytest.importorskip("triton")
reverse = importlib.import_module("sedd_samplers.reverse")
draw_kernel = importlib.import_module("sedd_samplers.fast.draw_kernel")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benchmarks/gpu.py compares with the CPU"),
    pytest.mark.usefixtures("quick_interpreter"),
]


@pytest.fixture
def by_kernels(monkeypatch):
    """Rows go to the kernels where a GPU would take them there; how many did."""
    taken, draw = [], draw_kernel.draw_moves

    def counted(log_score, x, *arguments, **how):
        taken.append(len(x))
        return draw(log_score, x, *arguments, **how)

    monkeypatch.setattr(reverse, "kernels_serve", lambda rows: rows.dtype != torch.float64)
    monkeypatch.setattr(draw_kernel, "draw_moves", counted)
    return taken


def score_of(num_states, *, where):
    table = 2 * torch.randn(num_states, num_states, generator=torch.Generator().manual_seed(0)) - 2

    def at(x, sigma):
        return table[x] - sigma.expm1().log()[:, None, None]

    if not where:
        return at
    return lambda x, sigma, where: at(x, sigma)[where]


@pytest.mark.parametrize("where", [True, False])
@pytest.mark.parametrize(
    ("kind", "method", "drawn"),
    [
        ("absorbing", Tweedie(), True),
        ("absorbing", Euler(), True),
        ("absorbing", TauLeaping(), True),
        ("absorbing", Unmasking(), True),
        ("absorbing", FirstHitting(), True),
        ("uniform", Euler(), True),
        ("uniform", TauLeaping(), True),
        ("uniform", Tweedie(), False),
        ("hybrid", Euler(), True),
        ("hybrid", Tweedie(), False),
    ],
)
def test_a_seed_leads_to_the_same_sample(kind, method, drawn, where, ref, request):
    graph = {
        "absorbing": ref.StructuredAbsorbing(6),
        "uniform": ref.StructuredUniform(7),
        "hybrid": ref.hybrid_matrix(6),
    }[kind]
    noise = ref.LogLinear()
    how = {"shape": (2, 4), "steps": 3, "seeds": torch.arange(2), "method": method}
    score = score_of(graph.num_states, where=where)
    expected = sample(score, graph, noise, **how)
    taken = request.getfixturevalue("by_kernels")
    assert torch.equal(sample(score, graph, noise, **how), expected)
    assert bool(taken) == drawn


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of arithmetic with what is no number, as asked for
def test_a_row_with_nothing_to_draw_is_named_as_without_a_kernel(bad, ref, by_kernels):
    graph = ref.StructuredAbsorbing(6)

    def score(x, sigma):
        rows = torch.zeros(*x.shape, 7)
        rows[1, 2] = bad
        return rows

    with pytest.raises(
        ValueError, match=r"the score model returned (NaN|an infinite log-score) at sequence 1, position 2"
    ):
        sample(score, graph, ref.LogLinear(), shape=(3, 5), steps=2, seeds=torch.arange(3))
    assert by_kernels


def test_the_final_step_leaves_no_mask_of_a_posterior_that_sums_to_a_tenth(ref, by_kernels):
    def score(x, sigma):
        return (-sigma.expm1().log() - math.log(60))[:, None, None].expand(*x.shape, 7)

    x = sample(score, ref.StructuredAbsorbing(6), ref.LogLinear(), shape=(3, 5), steps=1, seeds=torch.arange(3))
    assert len(by_kernels) == 2
    assert (x < 6).all()


def test_on_a_cpu_no_kernel_is_used():
    assert not reverse.kernels_serve(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("absorbing", Tweedie()), ("absorbing", Unmasking()), ("uniform", Euler()), ("uniform", Tweedie())],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_rows_and_their_shift_apart_lead_to_the_same_sample(kind, method, precision, ref, monkeypatch, request):
    """With kernels and without, static shapes or not; the rows arrive as the network made them."""
    graph = {"absorbing": ref.StructuredAbsorbing(6), "uniform": ref.StructuredUniform(7)}[kind]
    table = (2 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) - 2).to(precision)
    asked = []

    def whole(x, sigma):
        rows = table[x].float() - sigma.expm1().log()[:, None, None]
        return rows.scatter(-1, x[..., None], 0.0)

    def score(x, sigma, positions=None, apart=False):
        asked.append(apart)
        if not apart:
            return whole(x, sigma) if positions is None else whole(x, sigma).flatten(0, 1)[positions]
        shift = -sigma.expm1().log()[:, None].expand(x.shape).flatten()[positions]
        return table[x.flatten()[positions]].clone(), shift

    how = {"shape": (3, 5), "steps": 4, "seeds": torch.arange(3), "method": method}
    expected = sample(whole, graph, ref.LogLinear(), **how)
    assert torch.equal(sample(score, graph, ref.LogLinear(), **how), expected)
    assert not any(asked)  # on a CPU
    monkeypatch.setattr(importlib.import_module("sedd_samplers.model_calls"), "comes_apart", lambda device: True)
    for static in (False, True):
        asked.clear()
        assert torch.equal(sample(score, graph, ref.LogLinear(), static_shapes=static, **how), expected)
        assert all(asked)
    taken = request.getfixturevalue("by_kernels")
    assert torch.equal(sample(score, graph, ref.LogLinear(), **how), expected)
    assert bool(taken) == (kind == "absorbing" or isinstance(method, Euler))

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
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benchmarks/gpu.py compares with the CPU")


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
    how = {"shape": (3, 5), "steps": 4, "seeds": torch.arange(3), "method": method}
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

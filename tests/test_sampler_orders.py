"""benchmarks/sampler_orders.py in miniature: its methods have the orders that it is there to show."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    torch.set_default_dtype(torch.float64)
    yield importlib.import_module("sampler_orders")
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_orders_of_convergence(benchmark, name):
    graph = benchmark.graphs()[name]
    score = benchmark.ExactScore(benchmark.data(graph, 0.3), graph)
    steps = [8, 16]
    for label, (method, stages) in benchmark.methods(graph).items():
        slope = benchmark.slope(steps, [benchmark.error(score, method, stages, count) for count in steps])
        order = 2 if label == "trapezoidal" else 1
        assert abs(slope - order) < 0.25, f"{label}: {slope}"

"""What a step asks of a GPU beside the network: how many operations, each of which takes the host some microseconds."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any, cast

import pytest
import torch
from sedd_samplers import ConfidenceUnmasking, Euler, TauLeaping, Tweedie, Unmasking, trajectory
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are replaced by what a CPU can do")
VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "permute",
    "as_strided", "detach", "alias", "split", "unbind", "empty", "new_empty", "empty_like",
}  # fmt: skip
N, B, L = 7, 4, 8


class Launches(TorchDispatchMode):
    """How often each operation was called that works on a device's memory."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled inside, and to keep the compiler off each operation takes long

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in VIEWS:
            self.found[name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Nothing is read, and kernels are used: here they fill what they would write."""
    waiting = importlib.import_module("sedd_samplers.waiting")
    draw_kernel = importlib.import_module("sedd_samplers.fast.draw_kernel")
    uniform_kernel = importlib.import_module("sedd_samplers.fast.uniform_kernel")
    for module in ("waiting", "reverse", "randomness", "controls"):
        monkeypatch.setattr(f"sedd_samplers.{module}.reading_waits", lambda device: not waiting._at_once.get())
    monkeypatch.setattr("sedd_samplers.randomness.has_kernels", lambda device: True)
    monkeypatch.setattr("sedd_samplers.reverse.has_kernels", lambda device: True)

    def kernel(**written: tuple[int, float]):
        class Launched:
            def __getitem__(self, grid):
                return lambda *args, **how: [args[place].fill_(value) for place, value in written.values()]

        return Launched()

    monkeypatch.setattr(uniform_kernel, "_uniforms", kernel(out=(3, 0.9)))
    monkeypatch.setattr(draw_kernel, "_sum_of_block", kernel(sums=(7, 1.0)))
    stay = kernel(state=(10, N - 1), total=(11, 1.0), right=(12, True))
    monkeypatch.setattr(draw_kernel, "_state", stay)


def network(x, sigma, positions):
    return torch.zeros(len(positions), N)  # one operation


def launches_of_a_step(graph, noise, method, **options):
    free, score = torch.zeros(B, L, dtype=torch.bool), cast(Any, network)
    states = trajectory(score, graph, noise, x=free.long(), given=free, steps=6, method=method,
                        seeds=torch.arange(B), **options)  # fmt: skip
    next(states), next(states), next(states)
    with Launches() as launches:
        next(states)
    return launches.found


MOST: dict[str, tuple[str, Any, int]] = {  # graph, method, launches
    "Tweedie": ("absorbing", Tweedie(), 56),
    "Euler": ("absorbing", Euler(), 56),
    "Euler, uniform": ("uniform", Euler(), 44),
    "tau-leaping, uniform": ("uniform", TauLeaping(), 47),
    "unmasking": ("absorbing", Unmasking(), 69),
    "confidence": ("absorbing", ConfidenceUnmasking(), 175),
}


@pytest.mark.parametrize("name", MOST)
def test_a_step_is_few_launches(ref, as_on_a_gpu, name):
    kind, method, most = MOST[name]
    graph = ref.StructuredUniform(N) if kind == "uniform" else ref.StructuredAbsorbing(N - 1)
    noise = ref.Geometric() if kind == "uniform" else ref.LogLinear()
    found = launches_of_a_step(graph, noise, method)
    assert 20 < found.total() <= most, found
    assert launches_of_a_step(graph, noise, method, static_shapes=True).total() <= most

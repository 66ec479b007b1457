"""Devices without float64, such as Apple's MPS: nothing of the batch's size is made in it, and samples are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    EntropyBoundRenoising,
    Euler,
    FirstHitting,
    Particles,
    PredictorCorrector,
    Psi,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
    infill,
    sample,
)
from sedd_samplers.adapters import from_logits
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.controls import temperature, top_p
from sedd_samplers.precision import wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH, WORDS = 7, 5, 9


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 tensor of the batch's size or more; grids and single numbers live on the host."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and to keep the compiler off each operation takes long

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                assert tensor.numel() < BATCH, f"{func} made float64 {tuple(tensor.shape)}"
        return out


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd_samplers.precision.WITHOUT_FLOAT64", {"cpu"})


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return (x.sum(1, keepdim=True) + torch.arange(x.shape[1]))[..., None] * torch.linspace(0, 0.1, WORDS)


def test_the_precision_is_the_device_s() -> None:
    assert wide(torch.device("mps")) == torch.float32
    assert wide(torch.device("cpu")) == wide(torch.device("cuda")) == torch.float64


ANY = [Euler(), TauLeaping(), Tweedie(), Ancestral(), Trapezoidal(), PredictorCorrector(), Psi(0.9)]
MASKS = [Unmasking(), FirstHitting(), Remasking(at_rate(1.0)), ConfidenceUnmasking()]
NOISED = [Uniformization(slack=3.0), EntropyBoundRenoising()]


@pytest.mark.parametrize(
    ("graph", "method"),
    [(Masking(WORDS, 4), method) for method in ANY + MASKS] + [(Replacing(WORDS), method) for method in ANY + NOISED],
)
@pytest.mark.usefixtures("without")
def test_no_method_makes_float64(graph: Any, method: Any) -> None:
    score = from_logits(network, graph, controls=[temperature(0.9), top_p(0.95)])
    seeds = torch.arange(BATCH)
    with NoFloat64():
        x = sample(score, graph, Proportional(0.02), shape=(BATCH, LENGTH), steps=3, t_min=0.1, method=method,
                   seeds=seeds)  # fmt: skip
    assert ((x >= 0) & (x < WORDS) & (x != graph.mask_id if graph.mask_id is not None else x >= 0)).all()


@pytest.mark.usefixtures("without")
def test_particles_make_no_float64() -> None:
    graph, x = Replacing(WORDS), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    given = torch.tensor([True, False, True, False, False]).expand_as(x)
    with NoFloat64():
        y = infill(from_logits(network, graph), graph, Proportional(0.02), x=x, given=given, steps=3, t_min=0.1,
                   seeds=torch.arange(BATCH), conditioning=Particles(4))  # fmt: skip
    assert torch.equal(y[given], x[given])


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
@pytest.mark.usefixtures("without")
def test_samples_in_float32_alone_have_the_law(ref: Any, name: str) -> None:
    """Pairs that depend on each other, 60 steps; a false alarm once in 10,000 seeds."""
    graph = Masking(4, 3) if name == "absorbing" else Replacing(3)
    p0 = ref.random_data(3, 2, graph.num_states, graph.mask_id)
    Q = (ref.absorbing_matrix(3) if name == "absorbing" else ref.uniform_matrix(3)).Q
    exact = ref.ExactScore(p0, Q)
    x = sample(lambda x, sigma: exact(x, sigma).float(), graph, ref.Linear(6.0), shape=(5000, 2), steps=60, t_min=1e-3,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert ref.chi_square(x, p0) > 1e-4

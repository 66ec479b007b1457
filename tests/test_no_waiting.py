"""A sampling step of the network on every graph reads one tensor back from an accelerator: shown on the CPU.

Values that graphs, network and sampler check on the CPU are left to an accelerator's own assertions there; here that is
pretended, and the operations whose result depends on values are counted as they are dispatched.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import sedd_graphs
import torch
from sedd_graphs import (
    Absorbing,
    Clustered,
    Dense,
    Geometric,
    Hybrid,
    LogLinear,
    Masked,
    Neighbours,
    Ordinal,
    PacedAbsorbing,
    Uniform,
)
from sedd_nets import SEDD
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    Euler,
    PredictorCorrector,
    Remasking,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Unmasking,
    at_rate,
    trajectory,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
N = 12
Q = torch.rand(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).fill_diagonal_(0) / N
CLUSTERED = Clustered(torch.arange(N) % 3, within=2.0, between=0.5)
NEAR = Neighbours((torch.arange(N)[:, None] + torch.tensor([1, 2, 5])) % N)
GRAPHS: dict[str, Any] = {
    "absorbing": Absorbing(N - 1),
    "absorbing, the mask in the middle": Absorbing(N - 1, mask_id=5),
    "absorbing, each token at its own rate": PacedAbsorbing(torch.linspace(0.5, 2.0, N - 1)),
    "uniform": Uniform(N),
    "hybrid": Hybrid(N - 1, uniform_rate=0.4, mask_rate=0.7),
    "clustered": CLUSTERED,
    "clustered and masked": Masked(Clustered(torch.arange(N - 1) % 3, within=2.0, between=0.5)),
    "ordinal": Ordinal(N),
    "neighbours": NEAR,
    "dense": Dense(Q - torch.diag(Q.sum(0))),
    "dense, in detailed balance": Dense((Q + Q.T) - torch.diag((Q + Q.T).sum(0))),
}
METHODS: dict[str, Any] = {
    "Tweedie": Tweedie(),
    "Euler": Euler(),
    "tau-leaping": TauLeaping(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(),
    "corrected": PredictorCorrector(),
}
OF_MASKS: dict[str, Any] = {
    "unmasking": Unmasking(),
    "remasking": Remasking(at_rate(1.0)),
    "confidence": ConfidenceUnmasking(randomness=1.0),
}


FURTHER = {  # graphs whose rows name all states sum over them level by level, and nearest neighbours sum a series
    **{(name, "ancestral"): 3 for name in ("absorbing, each token at its own rate", "ordinal", "dense")},
    ("dense, in detailed balance", "ancestral"): 3,
    **{("neighbours", label): 2 for label in ("Tweedie", "corrected")},
    ("neighbours", "ancestral"): 9,
}


class Lists(TorchFunctionMode):
    """Counts values that are taken as a list, which is no operation on the CPU."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.reads.count += getattr(function, "__name__", "") in ("tolist", "numpy", "cpu")
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """How often the host waits."""

    def __init__(self):
        super().__init__()
        self.count, self.lists = 0, Lists(self)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.lists.__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += name in READS or by_mask
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for found in pkgutil.iter_modules(sedd_graphs.__path__, "sedd_graphs."):
        module = importlib.import_module(found.name)
        for name, stand_in in (("check_values", lambda *_, **__: None), ("readable", lambda values: False)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    for name in ("attention", "checks", "conditioning", "documents", "fast.memory_efficient"):
        monkeypatch.setattr(f"sedd_nets.{name}.on_host", lambda tensor: False)
    waiting = importlib.import_module("sedd_samplers.waiting")
    for name in ("waiting", "reverse", "randomness", "controls"):
        monkeypatch.setattr(f"sedd_samplers.{name}.reading_waits", lambda device: not waiting._at_once.get())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = SEDD(N, width=16, depth=1, heads=2, length=8, scale_by_sigma=False, dropout=0.0).eval()
    torch.nn.init.normal_(made.output_layer.linear.weight, std=0.1)
    return made


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_step_reads_one_tensor(net, name, static_shapes):
    """But where `FURTHER` says how many more."""
    graph = GRAPHS[name]
    noise = LogLinear(0.1) if graph.mask_id is not None else Geometric(0.1, 2.0)
    alike = name in ("absorbing", "absorbing, the mask in the middle")
    free, found = torch.zeros(3, 8, dtype=torch.bool), {}
    for label, method in (METHODS | (OF_MASKS if alike else {})).items():
        states = trajectory(net, graph, noise, x=free.long(), given=free, steps=4, t_min=0.1, method=method,
                            seeds=range(3), static_shapes=static_shapes)  # fmt: skip
        next(states), next(states)  # the first step looks up what is the same in all
        counts = []
        for _ in range(3):
            with Reads() as reads:
                next(states)
            counts.append(reads.count)
        found[label] = max(counts)
    assert found == {label: 1 + FURTHER.get((name, label), 0) for label in found}

"""What a sampler holds beside what the network returns, counted from the storage that tensors allocate.

A unit is one float32 for each state of each position, 4 B L N bytes: at 64 x 1024 x 50258 that is 13 GB.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..interfaces import Graph, Noise
from ..sampling import sample
from ..steps import Method

__all__ = ["Peak", "units_held", "little_is_held"]


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is entered, the bytes of the storages made inside, and the most at one time: `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._now, self._holders = 0, 0, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                self._hold(storage._cdata, storage.nbytes())
                weakref.finalize(tensor, self._release, storage._cdata, storage.nbytes())
        return out

    def _hold(self, key: int, size: int) -> None:
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self._now -= size


def units_held(run: Callable[[], object], shape: tuple[int, int, int]) -> float:
    """The most that is held while `run` runs, in units of 4 B L N bytes, shape being (B, L, N)."""
    meter = Peak()
    with meter:
        run()
    return meter.peak / (4 * shape[0] * shape[1] * shape[2])


def little_is_held(method: Method, graph: Graph, noise: Noise, *, batch: int = 8, length: int = 512) -> None:
    """At most 1.5 units in two steps, one of which is the network's answer: of its size nothing else is made.

    The graph has thousands of states, so that a piece of 4 MB is a small part of a unit.
    """
    shape = (batch, length, graph.num_states)
    unit = 4 * batch * length * graph.num_states
    if unit < 2**26:
        raise ValueError(
            f"a unit of {unit} bytes is too small beside pieces of 4 MB: take more states, or a longer batch"
        )
    network = an_answer(graph)
    held = units_held(
        lambda: sample(network, graph, noise, shape=shape[:2], steps=2, t_min=0.2, method=method, denoise=False,
                       seeds=range(batch)),
        shape,
    )  # fmt: skip
    assert held <= 1.5, f"{held:.2f} units of (B, L, N) float32 are held, the network's answer being one of them"
    assert held > 0.5, f"only {held:.2f} units are held: the network was not asked about half of the positions"


def an_answer(graph: Graph) -> Callable[..., Tensor]:
    """A network that allocates the rows asked for and nothing else: all states alike, a mask left out."""

    def answer(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(int(where.sum()), graph.num_states)

    return answer

"""How much of a number a step back needs: errors in exp(-D Q) v grow by e^(lambda D), lambda being the fastest rate.

Under absorbing graphs, where a token hides but does not change, none grow. Where tokens are noised, a step takes apart
what is nearly equal; it is worked in float64, and where that is not enough it is refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .interfaces import Graph
from .waiting import require

__all__ = ["wide", "fastest_rate", "working_dtype", "check_recoverable", "limit_law"]


WITHOUT_FLOAT64 = {"mps"}
"""Kinds of devices without float64."""


def wide(device: torch.device) -> torch.dtype:
    """The widest precision of a device: float64, or float32 where there is none (Apple's MPS).

    Times, uniform numbers and cumulative sums take it. With float32 a draw does not tell probabilities below 6e-8 from
    nothing, and steps back through noise are as precise as float32 lets them.
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def fastest_rate(graph: Graph, device: torch.device | str = "cpu") -> float:
    """lambda: by e^(lambda D) errors in exp(-D Q) v grow. 0 where only the mask can be jumped to, and none grow.

    The largest modulus of Q's eigenvalues, by power iteration from a fixed start.
    """
    states = torch.arange(graph.num_states, device=device)
    into = graph.rates_into(states)
    entered = (into.base > 0) | (into.value > 0).any(-1)
    if not bool((entered & (states != (-1 if graph.mask_id is None else graph.mask_id))).any()):
        return 0.0
    leaving = -min(float(into.base.min()), float(into.value.min()))
    precise = wide(torch.device(device))
    seeded = torch.Generator().manual_seed(0)
    v = torch.randn(1, len(states), generator=seeded, dtype=precise, device="cpu").to(device)
    growth = 1.0
    for _ in range(30):
        v = graph.propagate(v, torch.full((1,), -1 / leaving, dtype=precise, device=device))
        growth = float(v.abs().max())
        v = v / growth
    return leaving * math.log(growth)


def working_dtype(rate: float, device: torch.device) -> torch.dtype:
    """What rows are worked in: float64 where errors grow (rate > 0), if there is any on the device, else float32."""
    return wide(device) if rate > 0 else torch.float32


def check_recoverable(rate: float, sigma: Tensor, dtype: torch.dtype) -> None:
    """That a posterior can be told from a score at sigma: ValueError where e^(rate sigma) eps > 1e-3.

    On an accelerator an assertion of the device's, which nobody waits for.

    Where tokens are noised, all that the score knows of x0 is of the size e^(-rate sigma), with the graph's fastest
    rate, and what a network computes is rounded more coarsely than that.
    """
    if rate == 0 or not len(sigma):
        return
    limit = math.log(1e-3 / torch.finfo(dtype).eps) / rate
    require(
        *(sigma <= limit, "the posterior p(x0 | x_t) cannot be told from a score at such a sigma"),
        lambda: (
            f"the posterior p(x0 | x_t) cannot be told from a {dtype} score at sigma = {float(sigma.max()):.6g}: what "
            f"it knows of x0 is lost in rounding beyond {limit:.3g}. Adapt and control a model of the posterior "
            "instead (from_posterior, from_logits and their controls), or use float64"
        ),
    )


def limit_law(graph: Graph, device: torch.device) -> Tensor:
    """What the forward process tends to at a position, where a run begins: (N,), float64 where the device has it."""
    precise = wide(device)
    row = graph.prior(torch.full((), torch.inf, dtype=precise, device=device))
    return row.base.to(precise).expand(graph.num_states).scatter(0, row.index, row.value.to(precise))

"""What methods need that know tokens only as masked or not: the absorbing process in terms of its mask probability.

When every token turns into the mask at the same rate b and nothing else happens, a token is masked at total noise sigma
with probability

    lambda(sigma) = 1 - exp(-b sigma)          (called 1 - alpha in the literature of masked diffusion)

and given that it is masked, what it was does not depend on sigma: the noise level decides when, the posterior what.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interfaces import Graph
from .kernels import denoise_probs

__all__ = ["absorption_rate", "mask_probability", "clean_posterior"]


def absorption_rate(graph: Graph, device: torch.device, wanted_by: str) -> float:
    """The rate b at which every token turns into the mask.

    Args:
        graph: the forward process.
        device: where its rows are asked for.
        wanted_by: who needs to know, for the error.

    Raises:
        ValueError: if the graph is not absorbing: it has no mask, or something else can happen to a token than to turn
            into the mask, or not every token does so at the same rate.
    """
    states = torch.arange(graph.num_states, device=device)
    if graph.mask_id is None:
        raise ValueError(f"{wanted_by} needs an absorbing graph; this one has no mask (mask_id is None)")
    into = graph.rates_into(states)
    entered = (into.base > 0) | (into.value > 0).any(-1)
    if bool(entered[states != graph.mask_id].any()):
        state = int((entered & (states != graph.mask_id)).nonzero()[0])
        raise ValueError(f"{wanted_by} needs an absorbing graph; under this one a jump leads into the token {state}")
    mask = graph.rates_into(states[graph.mask_id])
    rates = mask.base.double().expand(len(states)).scatter(0, mask.index, mask.value.double())[states != graph.mask_id]
    slowest, fastest = float(rates.min()), float(rates.max())
    if slowest <= 0 or fastest - slowest > 1e-6 * fastest:
        raise ValueError(
            f"{wanted_by} needs an absorbing graph with one rate for all tokens; under this one they turn into the "
            f"mask at rates from {slowest:.6g} to {fastest:.6g}"
        )
    return fastest


def mask_probability(sigma: Tensor, rate: float = 1.0) -> Tensor:
    """1 - exp(-rate sigma), of sigma's shape."""
    return -torch.expm1(-rate * sigma)


def clean_posterior(log_score: Tensor, x: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """p(x0 | x_t) of each position as a distribution: `denoise_probs` without what is negative, normalised; (M, N)."""
    probs = denoise_probs(log_score, x, graph, sigma).clamp_(min=0)
    return probs.div_(probs.sum(-1, keepdim=True))

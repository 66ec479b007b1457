"""Score models out of models that predict something else.

A model of clean tokens, p(x0 | x_t) at each position, has the concrete score

    s(x)_y = sum_{x0} p(x0 | x) p(y | x0) / p(x | x0) = ( exp(sigma Q) [ p(. | x) / exp(sigma Q)[x, .] ] )_y

and Tweedie's theorem (18) leads back: `denoise_probs` of this score is p(x0 | x) again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .interfaces import Graph, ScoreModel

__all__ = ["from_posterior"]


def from_posterior(posterior: Callable[[Tensor, Tensor], Tensor], graph: Graph) -> ScoreModel:
    """The score model of a model that predicts the clean tokens.

    Args:
        posterior: (x (B, L) int64, sigma (B,)) -> probabilities (B, L, N) of each position's clean token, such as the
            softmax of a masked language model's logits; what it says of x0 that cannot have become x is ignored.
        graph: the forward process.

    Returns:
        (x, sigma) -> log_score (B, L, N), float32 at least; 0 at y = x, -inf where no probability leads.

    Raises:
        ValueError: when called, if the posterior returns another shape.
    """

    def score(x: Tensor, sigma: Tensor, /) -> Tensor:
        p = posterior(x, sigma)
        if p.shape != (*x.shape, graph.num_states):
            raise ValueError(f"the posterior must return shape {(*x.shape, graph.num_states)}, got {tuple(p.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            p = (p if p.dtype == torch.float64 else p.float()).flatten(0, 1)
            level = sigma.to(p.dtype)[:, None].expand(x.shape).flatten()
            into = graph.transition_into(x.flatten(), level)
            reach = into.base[:, None].to(p.dtype).expand_as(p).scatter(1, into.index, into.value.to(p.dtype))
            s = graph.propagate(torch.where(reach > 0, p / reach, 0.0), level).clamp_min(0)
            at_x = s.gather(1, x.flatten()[:, None])  # 1 but for what the posterior says of impossible tokens
            return (s / at_x).log().reshape(*x.shape, -1)

    return score

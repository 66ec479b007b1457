"""Step kernels: from the log-score at a position to the probabilities of its next state.

A kernel maps rows to rows. It knows nothing of sequences, prompts or models, and transcribes one equation. Rows come
out unnormalised and may hold negative entries where the equation gives them; the draw clamps them to 0 and
renormalises.

With s(x)_y = p_t(y) / p_t(x) the concrete score, Q the generator (columns are sources) and the reverse rate of the
jump x -> y being Q[x, y] s(x)_y (3):

    Euler (17)             delta_x(y) + dose Q[x, y] s_y                       dose = dt dsigma(t)
    tau-leaping            exp(-R) at x, (1 - exp(-R)) dose Q[x, y] s_y / R    R = sum_{y != x} dose Q[x, y] s_y
    Tweedie (19)           (exp(-D Q) s)_y exp(D Q)[x, y]                      D = sigma(t) - sigma(s)
    final denoise          Tweedie with D = sigma(t), restricted to tokens

Tweedie's equation can be read backwards: whoever knows the law p(x_s | x_t = x) of a step knows the score,

    s = exp(D Q) [ p(. | x) / exp(D Q)[x, .] ]

Euler is tau-leaping to first order in the step; tau-leaping never leaves the simplex: each jump has a clock with its
rate held fixed, and the state at the end of the step is where the clock that rang last leads. With the exact score
Tweedie gives each position its true reverse marginal whatever the step's length.

Where tokens themselves are noised, exp(-D Q) takes apart what is nearly equal: errors grow by e^D. Those of the score
itself nothing can undo, and short steps keep them small. Rounding in here is another matter: a log-score of 1e-9 is as
precise in float32 as any number, its exponential 1 + 1e-9 is not. So long steps are worked in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interfaces import Graph, Row

__all__ = [
    "euler_probs",
    "tau_leaping_probs",
    "tweedie_probs",
    "tweedie_score",
    "denoise_probs",
    "reverse_rates",
    "leap",
]


def euler_probs(log_score: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """Equation 17: delta_x(y) + dose Q[x, y] s_y.

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        dose: (M,) dt dsigma(t).

    Returns:
        (M, N), each row summing to 1; negative at x where the step is too long for its rates.
    """
    probs = reverse_rates(log_score, x, graph).mul_(dose.to(log_score.dtype)[:, None])
    return probs.scatter_(1, x[:, None], 1 - probs.sum(-1, keepdim=True))


def tau_leaping_probs(log_score: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """The law at the end of a step with the reverse rates of its beginning; arguments as for `euler_probs`.

    Returns:
        (M, N), non-negative, each row summing to 1.
    """
    return leap(reverse_rates(log_score, x, graph).mul_(dose.to(log_score.dtype)[:, None]), x)


def tweedie_probs(log_score: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """Equation 19: (exp(-D Q) s)_y exp(D Q)[x, y].

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        dose: (M,) D = sigma(t) - sigma(s).

    Returns:
        (M, N), each row summing to 1; negative entries where the score is not that of any distribution.
    """
    dtype = _precision(log_score, dose)
    dose = dose.to(dtype)
    before = graph.propagate(_concrete_score(log_score.to(dtype), x), -dose)
    return _scale(before, graph.transition_into(x, dose)).to(log_score.dtype)


def tweedie_score(probs: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """The log-score whose Tweedie step is `probs`: equation 19 read backwards.

    Args:
        probs: (M, N) float, non-negative, the law of the state a noise D earlier; rows need not sum to 1. What it says
            of states that cannot have become x is ignored.
        x: (M,) int64.
        graph: the forward process.
        dose: (M,) D > 0; with D = sigma, `probs` is the posterior p(x0 | x_t = x).

    Returns:
        (M, N): 0 at y = x, -inf where no probability leads, NaN where no state of positive probability can become x.
    """
    dtype = _precision(probs, dose)
    dose = dose.to(dtype)
    p = probs.to(dtype)
    reach = _reach(p, x, graph, dose)
    s = graph.propagate(torch.where(reach > 0, p / reach, 0.0), dose).clamp_min(0)
    at_x = s.gather(1, x[:, None])  # 1, had every row the sum 1 over the states that can have become x
    return s.div_(at_x).log_().to(probs.dtype)


def possible(probs: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """The probabilities (M, N) of earlier states without those of states that cannot have become x; a new tensor."""
    return torch.where(_reach(probs, x, graph, dose.to(probs.dtype)) > 0, probs, 0.0)


def denoise_probs(log_score: Tensor, x: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """The step that removes all remaining noise: Tweedie with D = sigma (M,), no probability on the mask.

    With the exact score this is the posterior p(x0 | x_t) of each position. Returns (M, N), entries may be negative.
    """
    probs = tweedie_probs(log_score, x, graph, sigma)
    if graph.mask_id is not None:
        probs[:, graph.mask_id] = 0
    return probs


def reverse_rates(log_score: Tensor, x: Tensor, graph: Graph) -> Tensor:
    """Equation 3: Q[x, y] s_y for y != x, and 0 at y = x; (M, N)."""
    return _scale(_concrete_score(log_score, x), graph.rates_into(x)).scatter_(1, x[:, None], 0.0)


def leap(doses: Tensor, x: Tensor) -> Tensor:
    """Tau-leaping with expected numbers of jumps `doses` (M, N), 0 at x (M,); overwrites and returns them."""
    expected = doses.sum(-1, keepdim=True)
    doses.mul_(torch.where(expected > 0, -torch.expm1(-expected) / expected, 1.0))
    return doses.scatter_(1, x[:, None], torch.exp(-expected))


def _precision(like: Tensor, dose: Tensor) -> torch.dtype:
    """What a step of the noise `dose` (M,) is worked in: float64 where e^D times float32's rounding exceeds 1e-6."""
    long = len(dose) > 0 and float(dose.max()) > 2
    return torch.float64 if long else like.dtype


def _reach(like: Tensor, x: Tensor, graph: Graph, dose: Tensor) -> Tensor:
    """Exp(dose Q)[x, .], dense (M, N)."""
    into = graph.transition_into(x, dose)
    return into.base[:, None].to(like.dtype).expand_as(like).scatter(1, into.index, into.value.to(like.dtype))


def _concrete_score(log_score: Tensor, x: Tensor) -> Tensor:
    """S = exp(log_score), a new tensor; the entry at x carries no information and its true value is 1."""
    return log_score.exp().scatter_(1, x[:, None], 1.0)


def _scale(dense: Tensor, row: Row) -> Tensor:
    """Dense (M, N) times a row, in place, without spreading the row over N states."""
    special = dense.gather(1, row.index).mul_(row.value.to(dense.dtype))
    return dense.mul_(row.base.to(dense.dtype)[:, None]).scatter_(1, row.index, special)

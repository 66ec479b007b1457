"""Steps that work on any graph with one evaluation of the score, each beside its equation.

A method is any callable `(reverse, x, t, s) -> x`: it moves the states x (B, L) from the times t (B,) to the earlier
times s (B,). Those of this module draw every position's next state from a kernel, a function of rows that transcribes
one equation. With s(x)_y = p_t(y) / p_t(x) the concrete score, Q the generator (columns are sources), the reverse rate
of the jump x -> y being Q[x, y] s(x)_y (3), and D = sigma(t) - sigma(s):

    Euler (17)             delta_x(y) + D Q[x, y] s_y                           D = dt dsigma(t) to first order
    tau-leaping            exp(-R) at x, (1 - exp(-R)) D Q[x, y] s_y / R        R = sum_{y != x} D Q[x, y] s_y
    leave-one-out          pi(x0) = (exp(-sigma Q) s)_x0, the law of x0 given the *other* positions
    posterior (18)         p(x0 | x_t) = pi(x0) exp(sigma Q)[x_t, x0]
    Tweedie (19)           (exp(-D Q) s)_y exp(D Q)[x, y]
    final denoise          Tweedie with D = sigma(t), restricted to tokens
    ancestral              sum_{x0} p(x0 | x_t) p(x_s | x_t, x0)

(18) is the paper's discrete Tweedie theorem. (20) is its choice among steps that move every position by itself: with
the exact score, (19) gives each position its true reverse marginal, whatever the step's length. Read backwards,
whoever knows the law p(x_s | x_t = x) of a step knows the score,

    s = exp(D Q) [ p(. | x) / exp(D Q)[x, .] ]

Rows come out unnormalised and may hold negative entries where the equation gives them; the draw clamps them to 0 and
renormalises. Where tokens themselves are noised, exp(-D Q) takes apart what is nearly equal, and errors grow by e^(r D)
with the graph's fastest rate r. Those of the score itself nothing can undo, and short steps keep them small.
Rounding in here is another matter: a log-score of 1e-9 is as precise in float32 as any number, its exponential 1 + 1e-9
is not. The equations are worked in the precision of their rows; `Reverse` and the adapters hand them float64 under
every graph that noises tokens (`working_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .fast import times_row
from .interfaces import Graph, Row
from .leave_one_out import carry, concrete_score, score_of, without_own
from .reverse import Reverse

__all__ = [
    "Method",
    "Euler",
    "euler_probs",
    "TauLeaping",
    "tau_leaping_probs",
    "Tweedie",
    "tweedie_probs",
    "tweedie_score",
    "tweedie_posterior",
    "final_denoise",
    "denoise_probs",
    "Ancestral",
    "ancestral_probs",
    "reverse_rates",
    "leap",
    "Weights",
    "Stay",
    "unmasking_weights",
]


Stay = Callable[[Tensor], Tensor]
"""R (M,) float64, the mass of all moves -> the mass of staying (M,)."""


@dataclass(frozen=True)
class Weights:
    """M rows, `value` at `index` and `base` elsewhere, of what scores are multiplied by."""

    base: Tensor
    index: Tensor
    value: Tensor


class Method(Protocol):
    """One step of a sampler, from times t down to times s."""

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor, /) -> Tensor:
        """New states (B, L) int64 at times s (B,), from x (B, L) at times t (B,), both float64; x is left alone."""


# --- Tweedie ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tweedie:
    """Every position is drawn from its own exact reverse marginal, equation 19; first order in the step.

    What is left of the step error is that positions which move in the same step do not see each other.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, _ = reverse.noise(t)
        delta_sigma = sigma - reverse.noise(s)[0]

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return tweedie_probs(log_score, x, reverse.graph, delta_sigma[sequence])

        def moves(x: Tensor, sequence: Tensor) -> tuple[Weights, Stay]:
            return unmasking_weights(reverse.graph, x, delta_sigma[sequence]), _what_is_left

        where = reverse.movable(x)
        return reverse.redraw(x, sigma, where, kernel, moves=None if reverse.noises_tokens else moves)


def tweedie_probs(log_score: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """Equation 19: (exp(-D Q) s)_y exp(D Q)[x, y].

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        delta_sigma: (M,) D = sigma(t) - sigma(s).

    Returns:
        (M, N), each row summing to 1; negative entries where the score is not that of any distribution.
    """
    delta_sigma = delta_sigma.to(log_score.dtype)
    before = graph.propagate(concrete_score(log_score, x), -delta_sigma)
    return times_row(before, graph.transition_into(x, delta_sigma))


def tweedie_score(probs: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """The log-score whose Tweedie step is `probs`: equation 19 read backwards.

    Args:
        probs: (M, N) float, non-negative, the law of the state a noise D earlier; rows need not sum to 1. What it says
            of states that cannot have become x is ignored.
        x: (M,) int64.
        graph: the forward process.
        delta_sigma: (M,) D > 0; with D = sigma, `probs` is the posterior p(x0 | x_t = x).

    Returns:
        (M, N): 0 at y = x, -inf where no probability leads, NaN where no state of positive probability can become x.
    """
    return score_of(without_own(probs, x, graph, delta_sigma), x, graph, delta_sigma)


def tweedie_posterior(log_score: Tensor, x: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """Equation 18, Tweedie's theorem: p(x0 | x_t = x) = (exp(-sigma Q) s)_x0 exp(sigma Q)[x, x0], a distribution.

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        sigma: (M,) the total noise of x.

    Returns:
        (M, N), each row summing to 1, 0 at the mask. Negative entries, which the score of no distribution gives, become
        0 before rows are made to sum to 1.
    """
    probs = denoise_probs(log_score, x, graph, sigma).clamp_(min=0)
    return probs.div_(probs.sum(-1, keepdim=True))


def final_denoise(reverse: Reverse, x: Tensor, t: Tensor) -> Tensor:
    """The final step from time t (B,) to no noise, over tokens only: no mask remains in what it returns, (B, L)."""
    sigma, _ = reverse.noise(t)

    def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        return denoise_probs(log_score, x, reverse.graph, sigma[sequence])

    def moves(x: Tensor, sequence: Tensor) -> tuple[Weights, Stay]:
        return unmasking_weights(reverse.graph, x, sigma[sequence]), torch.zeros_like

    where = reverse.movable(x)
    return reverse.redraw(x, sigma, where, kernel, moves=None if reverse.noises_tokens else moves)


def unmasking_weights(graph: Graph, x: Tensor, delta_sigma: Tensor) -> Weights:
    """Equation 19 where jumps lead into the mask alone: e^(D Q[x, y]) - 1 times s_y, and at x what is left of 1."""
    jumps = _scaled(graph.rates_into(x), delta_sigma)
    return Weights(jumps.base.expm1(), jumps.index, jumps.value.expm1())


def _scaled(row: Row, factor: Tensor) -> Weights:
    """M rows times one factor each (M,)."""
    return Weights(row.base * factor, row.index, row.value * factor[:, None])


def _what_is_left(leaving: Tensor) -> Tensor:
    """1 - R, no less than 0."""
    return (1 - leaving).clamp_min(0)


def denoise_probs(log_score: Tensor, x: Tensor, graph: Graph, sigma: Tensor) -> Tensor:
    """The step that removes all remaining noise: Tweedie with D = sigma (M,), no probability on the mask.

    With the exact score this is the posterior p(x0 | x_t) of each position (18). Returns (M, N), unnormalised; entries
    may be negative.
    """
    probs = tweedie_probs(log_score, x, graph, sigma)
    if graph.mask_id is not None:
        probs[:, graph.mask_id] = 0
    return probs


# --- Euler and tau-leaping -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Euler:
    """Every position jumps by itself with the probabilities of equation 17; first order in the step.

    Under log-linear noise and an absorbing graph the rate of the schedule makes this Tweedie's step, for any score.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, dsigma = reverse.noise(t)
        delta_sigma = (t - s) * dsigma

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return euler_probs(log_score, x, reverse.graph, delta_sigma[sequence])

        def moves(x: Tensor, sequence: Tensor) -> tuple[Weights, Stay]:
            return _scaled(reverse.graph.rates_into(x), delta_sigma[sequence]), _what_is_left

        return reverse.redraw(x, sigma, reverse.movable(x), kernel, moves=moves)


def euler_probs(log_score: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """Equation 17: delta_x(y) + D Q[x, y] s_y.

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        delta_sigma: (M,) dt dsigma(t), the difference of total noise to first order.

    Returns:
        (M, N), each row summing to 1; negative at x where the step is too long for its rates.
    """
    probs = expected_jumps(log_score, x, graph, delta_sigma)
    return probs.scatter_(1, x[:, None], 1 - probs.sum(-1, keepdim=True))


@dataclass(frozen=True)
class TauLeaping:
    """Every position jumps with the reverse rates of the step's beginning; first order in the step.

    Campbell et al., *A continuous time framework for discrete denoising models* (2022), with states that are labels
    rather than counts: of several jumps in one step the last decides. Each jump has a clock with its rate held fixed,
    and the state at the end of the step is where the clock that rang last leads.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma, dsigma = reverse.noise(t)
        delta_sigma = (t - s) * dsigma

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return tau_leaping_probs(log_score, x, reverse.graph, delta_sigma[sequence])

        def moves(x: Tensor, sequence: Tensor) -> tuple[Weights, Stay]:
            return _scaled(reverse.graph.rates_into(x), delta_sigma[sequence]), _odds_of_staying

        return reverse.redraw(x, sigma, reverse.movable(x), kernel, moves=moves)


def tau_leaping_probs(log_score: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """The law at the end of a step with the reverse rates of its beginning; arguments as for `euler_probs`.

    Returns:
        (M, N), non-negative, each row summing to 1.
    """
    return leap(expected_jumps(log_score, x, graph, delta_sigma), x)


def _odds_of_staying(leaving: Tensor) -> Tensor:
    """exp(-R) beside jumps of (1 - exp(-R)) / R each: R / (e^R - 1) beside the jumps themselves."""
    return torch.where(leaving > 0, leaving / leaving.expm1(), 1.0)


def reverse_rates(log_score: Tensor, x: Tensor, graph: Graph) -> Tensor:
    """Equation 3: Q[x, y] s_y for y != x, and 0 at y = x; (M, N)."""
    return times_row(concrete_score(log_score, x), graph.rates_into(x)).scatter_(1, x[:, None], 0.0)


def expected_jumps(log_score: Tensor, x: Tensor, graph: Graph, delta_sigma: Tensor) -> Tensor:
    """D Q[x, y] s_y for y != x, the reverse rates over a difference D of total noise (M,), and 0 at y = x; (M, N)."""
    weights = _scaled(graph.rates_into(x), delta_sigma)
    return times_row(concrete_score(log_score, x), weights).scatter_(1, x[:, None], 0.0)


def leap(jumps: Tensor, x: Tensor) -> Tensor:
    """Tau-leaping with expected numbers of jumps (M, N), 0 at x (M,); overwrites and returns them.

    exp(-R) at x, (1 - exp(-R)) jumps_y / R elsewhere, R = sum_y jumps_y
    """
    expected = jumps.sum(-1, keepdim=True)
    jumps.mul_(torch.where(expected > 0, -torch.expm1(-expected) / expected, 1.0))
    return jumps.scatter_(1, x[:, None], torch.exp(-expected))


# --- Ancestral -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestral:
    """Every position is drawn from the averaged posterior of D3PM; first order in the step, like Tweedie.

    Austin et al., *Structured denoising diffusion models in discrete state-spaces* (2021), equation 4, at the noise
    levels sigma_s < sigma_t of a step, D = sigma_t - sigma_s:

        p(x_s | x_t) = sum_{x0} p(x0 | x_t) q(x_s | x_t, x0)
        q(x_s | x_t, x0) = exp(D Q)[x_t, x_s] exp(sigma_s Q)[x_s, x0] / exp(sigma_t Q)[x_t, x0]

    With Tweedie's theorem (18) for p(x0 | x_t) the sum over x0 collapses,

        p(x_s | x_t) = exp(D Q)[x_t, x_s] (exp(sigma_s Q) exp(-sigma_t Q) s)_{x_s} = exp(D Q)[x_t, x_s] (exp(-D Q)
        s)_{x_s}

    which is the Tweedie step (19). The two part only where the score is not that of any distribution: here p(x0 | x_t)
    is first made a distribution over tokens, so that what is drawn from is one too. For the absorbing graph that means:
    a mask stays with its true probability lambda_s / lambda_t, however much the model's posterior sums to.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        sigma_t, sigma_s = reverse.noise(t)[0], reverse.noise(s)[0]

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return ancestral_probs(log_score, x, reverse.graph, sigma_s[sequence], sigma_t[sequence])

        return reverse.redraw(x, sigma_t, reverse.movable(x), kernel)


def ancestral_probs(log_score: Tensor, x: Tensor, graph: Graph, sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """sum_{x0} p(x0 | x_t = x) q(x_s | x_t = x, x0).

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        sigma_s: (M,) the total noise after the step.
        sigma_t: (M,) the total noise before it, at least sigma_s.

    Returns:
        (M, N), each row summing to 1; negative by no more than rounding.
    """
    clean = tweedie_posterior(log_score, x, graph, sigma_t)
    sigma_s, sigma_t = sigma_s.to(clean.dtype), sigma_t.to(clean.dtype)
    earlier = carry(without_own(clean, x, graph, sigma_t), graph, sigma_s)
    return times_row(earlier, graph.transition_into(x, sigma_t - sigma_s))

"""Steps that work on any graph with several evaluations of the score.

    Trapezoidal           tau-leaping to the middle of the step, and on from there with extrapolated rates: second order
    PredictorCorrector    a step, and then forward and reverse process at once, which forgets errors

Both are built of `leap`, tau-leaping with rates held fixed, and of the reverse rates Q[x, y] s_y (3) of `steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .fast import rows_at_a_time, spread
from .interfaces import Graph, Row
from .positions import Positions
from .reverse import Reverse
from .steps import Method, Tweedie, leap, reverse_rates

__all__ = ["Trapezoidal", "PredictorCorrector", "correct", "corrector_probs"]


@dataclass(frozen=True)
class Trapezoidal:
    """Two evaluations a step: second order where the extrapolated rates stay positive, else first with a small error.

    Ren et al., *Fast solvers for discrete diffusion models: theory and applications of high-order algorithms* (2025),
    algorithm 2. With a(x, t) the reverse rates dsigma(t) Q[x, y] s_y and h = t - s, x* is where tau-leaping with
    a(x, t) leads in theta h, and from there tau-leaping goes on for (1 - theta) h with the extrapolated rates

        ( alpha_1 a(x*, t - theta h) - alpha_2 a(x, t) )_+      alpha_1 = 1 / (2 theta (1 - theta))
                                                                alpha_2 = alpha_1 - 1

    In the paper a jump is a vector that is added to the state, so that the same jump can be taken from x and from x*. A
    state that is a label knows only where it jumps *to*. At a position that has moved, a(x, t) belongs to a state that
    is no longer there, and subtracting it costs the second order: with rates a_xy, the chance of the path x -> y -> z
    in one step is a_xy a_yz h^2 / 2, which is theta h a_xy times (1 - theta) h alpha_1 a_yz, with nothing subtracted.
    So alpha_2 takes part only at positions that stood still; at those that moved the rates are alpha_1 a(x*, t - theta
    h).

    The positive part costs the second order where it binds. What is subtracted makes up for pairs of positions that
    moved in the same stage and did not see each other; if a rate at one position falls to less than alpha_2 / alpha_1
    of itself when another moves, there is more to make up for than can be taken away, with any theta. The ratio is
    smallest, 1/2, at theta = 1/2. The first stage's rates (M, N) are kept for the second.

    Args:
        theta: where in the step the second evaluation is made, as a fraction in (0, 1).

    Raises:
        ValueError: for another theta.
    """

    theta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.theta < 1:
            raise ValueError(f"theta must lie in (0, 1), got {self.theta!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        free, most = reverse.movable(x), 4 * rows_at_a_time(reverse.graph.num_states, x.device)
        parts = []
        if x.numel() > most:  # the rates of all may be many pieces
            number = torch.arange(len(x), device=x.device)[:, None]
            parts = [free & (number % 4 == k) for k in range(min(4, len(x)))]
        at, *each = reverse.positions_of(free, *parts)
        if at.whole or len(at) <= most:
            return self._step(reverse, x, t, s, free, at)
        for part, own in zip(parts, each, strict=True):
            x = self._step(reverse, x, t, s, part, own)
        return x

    def _step(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor, free: Tensor, at: Positions) -> Tensor:
        """The positions of `free` (B, L) bool, those that can move of some sequences; `at` holds them."""
        first, second = self.theta * (t - s), (1 - self.theta) * (t - s)
        alpha_1 = 1 / (2 * self.theta * (1 - self.theta))
        alpha_2 = alpha_1 - 1
        sigma, dsigma = reverse.noise(t)
        sigma_star, dsigma_star = reverse.noise(t - first)
        slot = torch.zeros_like(x).flatten().index_put((at.flat,), torch.arange(len(at), device=x.device)).view_as(x)
        kept: list[Tensor] = []  # a(x, t), made when its precision is known

        def to_star(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            a = reverse_rates(log_score, x, reverse.graph).mul_(dsigma.to(log_score.dtype)[sequence, None])
            if not kept:
                kept.append(a.new_empty(len(at), a.shape[1]))
            kept[0][slot[sequence, position]] = a
            return leap(a.mul_(first.to(a.dtype)[sequence, None]), x)

        def from_star(log_score: Tensor, x_star: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            a_star = reverse_rates(log_score, x_star, reverse.graph)
            rates = a_star.mul_(alpha_1 * dsigma_star.to(log_score.dtype)[sequence, None])
            still = x_star == x[sequence, position]
            rates -= kept[0][slot[sequence, position]].mul_(alpha_2 * still[:, None])
            return leap(rates.clamp_(min=0).mul_(second.to(rates.dtype)[sequence, None]), x_star)

        x_star = reverse.redraw(x, sigma, free, to_star, among=at)
        return reverse.redraw(x_star, sigma_star, reverse.movable(x_star) & free, from_star, among=at)


@dataclass(frozen=True)
class PredictorCorrector:
    """A predictor's step and then corrector steps, which leave the law where it is and take the states closer to it.

    Campbell et al., *A continuous time framework for discrete denoising models* (2022), section 4.4. At noise sigma the
    forward process, at the rates Q[y, x], moves the law p_sigma one way and the reverse process, at the rates
    Q[x, y] s_y, moves it back by as much. Run both at once, at

        Q[y, x] + Q[x, y] s_y

    and p_sigma is stationary: what a predictor's step has done wrong is forgotten. A corrector step is tau-leaping with
    these rates for some noise D; its own error at the exact law is of second order in D.

    The order is the predictor's, second order excepted: the corrector's own error is of first order in total. Where the
    noise is 0 nothing is corrected. Every free position can move under the corrector, so that all of them reach the
    network's head.

    Args:
        predictor: the method that makes the step.
        corrections: how many corrector steps follow it.
        ratio: how long each is, as a multiple of the step's own noise sigma(t) - sigma(s).

    Raises:
        ValueError: for corrections < 1 or ratio <= 0; when called, for a graph without `rates_out_of`.
    """

    predictor: Method = Tweedie()  # noqa: RUF009, frozen and without state
    corrections: int = 1
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.corrections, bool) or not isinstance(self.corrections, int) or self.corrections < 1:
            raise ValueError(f"corrections must be a positive integer, got {self.corrections!r}")
        if not 0 < self.ratio < float("inf"):
            raise ValueError(f"ratio must be finite and positive, got {self.ratio!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step; see `Method`."""
        x = self.predictor(reverse, x, t, s)
        sigma = reverse.noise(s)[0]
        delta_sigma = self.ratio * (reverse.noise(t)[0] - sigma)
        for _ in range(self.corrections):
            x = correct(reverse, x, sigma, delta_sigma)
        return x


def correct(reverse: Reverse, x: Tensor, sigma: Tensor, delta_sigma: Tensor) -> Tensor:
    """One corrector step: x (B, L) at noise sigma (B,), moved for the noise D (B,) by forward and reverse at once.

    Raises:
        ValueError: for a graph without `rates_out_of`.
    """
    rates_out_of = _rates_out_of(reverse.graph)

    def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        return corrector_probs(log_score, x, reverse.graph, rates_out_of(x), delta_sigma[sequence])

    where = ~reverse.frozen & (sigma > 0)[:, None]
    return reverse.redraw(x, sigma, where, kernel, among=reverse.free())


def corrector_probs(log_score: Tensor, x: Tensor, graph: Graph, out: Row, delta_sigma: Tensor) -> Tensor:
    """Tau-leaping with the rates Q[y, x] + Q[x, y] s_y.

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        out: Q[., x], the rates of the jumps out of x.
        delta_sigma: (M,) noise for which both processes run.

    Returns:
        (M, N), non-negative, each row summing to 1.
    """
    into = graph.rates_into(x)
    entered = (into.base > 0) | (into.value > 0).any(-1)  # where nothing leads into x, its score means nothing
    back = reverse_rates(log_score, x, graph).where(entered[:, None], 0.0)
    rates = (back + spread(out, back)).scatter_(1, x[:, None], 0.0)
    return leap(rates.mul_(delta_sigma.to(back.dtype)[:, None]), x)


def _rates_out_of(graph: Graph) -> Callable[[Tensor], Row]:
    method: Callable[[Tensor], Row] | None = getattr(graph, "rates_out_of", None)
    if method is None:
        raise ValueError(
            "the corrector also runs forwards and needs graph.rates_out_of(x), the rates Q[., x] out of x; "
            f"a {type(graph).__name__} has none"
        )
    return method

"""The theta-trapezoidal method: two evaluations of the score a step, second order in its length.

Ren et al., *Fast solvers for discrete diffusion models: theory and applications of high-order algorithms* (2025),
algorithm 2. With a(x, t) the reverse rates dsigma(t) Q[x, y] s_y and h = t - s, x* is where tau-leaping with a(x, t)
leads in theta h, and from there tau-leaping goes on for (1 - theta) h with the extrapolated rates

    ( alpha_1 a(x*, t - theta h) - alpha_2 a(x, t) )_+      alpha_1 = 1 / (2 theta (1 - theta))
                                                            alpha_2 = alpha_1 - 1

In the paper a jump is a vector that is added to the state, so that the same jump can be taken from x and from x*. A
state that is a label knows only where it jumps *to*. At a position that has moved, a(x, t) belongs to a state that is
no longer there, and subtracting it costs the second order: with rates a_xy, the chance of the path x -> y -> z in one
step is a_xy a_yz h^2 / 2, which is theta h a_xy times (1 - theta) h alpha_1 a_yz, with nothing subtracted. So alpha_2
takes part only at positions that stood still; at those that moved the rates are alpha_1 a(x*, t - theta h).

The positive part costs the second order where it binds. What is subtracted makes up for pairs of positions that moved
in the same stage and did not see each other; if a rate at one position falls to less than alpha_2 / alpha_1 of itself
when another moves, there is more to make up for than can be taken away, with any theta. The ratio is smallest, 1/2, at
theta = 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kernels import leap, reverse_rates
from .reverse import Reverse

__all__ = ["Trapezoidal"]


@dataclass(frozen=True)
class Trapezoidal:
    """Second order where the extrapolated rates stay positive; where they do not, first order with a small error.

    Keeps the first stage's rates (M, N) for the second.

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
        first, second = self.theta * (t - s), (1 - self.theta) * (t - s)
        alpha_1 = 1 / (2 * self.theta * (1 - self.theta))
        alpha_2 = alpha_1 - 1
        sigma, dsigma = reverse.noise(t)
        sigma_star, dsigma_star = reverse.noise(t - first)
        free = reverse.movable(x)
        slot = free.flatten().cumsum(0).view_as(x) - 1
        kept: list[Tensor] = []  # a(x, t), made when its precision is known

        def to_star(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            a = reverse_rates(log_score, x, reverse.graph).mul_(dsigma.to(log_score.dtype)[sequence, None])
            if not kept:
                kept.append(a.new_empty(int(free.sum()), a.shape[1]))
            kept[0][slot[sequence, position]] = a
            return leap(a.mul_(first.to(a.dtype)[sequence, None]), x)

        def from_star(log_score: Tensor, x_star: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            a_star = reverse_rates(log_score, x_star, reverse.graph)
            rates = a_star.mul_(alpha_1 * dsigma_star.to(log_score.dtype)[sequence, None])
            still = x_star == x[sequence, position]
            rates[still] -= alpha_2 * kept[0][slot[sequence[still], position[still]]]
            return leap(rates.clamp_(min=0).mul_(second.to(rates.dtype)[sequence, None]), x_star)

        x_star = reverse.redraw(x, sigma, free, to_star)
        return reverse.redraw(x_star, sigma_star, reverse.movable(x_star), from_star)

"""Predictor-corrector: steps that leave the law where it is and take the states closer to it.

Campbell et al., *A continuous time framework for discrete denoising models* (2022), section 4.4. At noise sigma the
forward process, at the rates Q[y, x], moves the law p_sigma one way and the reverse process, at the rates Q[x, y] s_y,
moves it back by as much. Run both at once, at

    Q[y, x] + Q[x, y] s_y

and p_sigma is stationary: what a predictor's step has done wrong is forgotten. A corrector step is tau-leaping with
these rates for the noise `dose`; its own error at the exact law is of second order in the dose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .interfaces import Graph, Row
from .kernels import leap, reverse_rates
from .methods import Method, Tweedie
from .reverse import Reverse

__all__ = ["PredictorCorrector", "correct", "corrector_probs"]


@dataclass(frozen=True)
class PredictorCorrector:
    """A predictor's step and then corrector steps at the noise level it has come to.

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
        dose = self.ratio * (reverse.noise(t)[0] - sigma)
        for _ in range(self.corrections):
            x = correct(reverse, x, sigma, dose)
        return x


def correct(reverse: Reverse, x: Tensor, sigma: Tensor, dose: Tensor) -> Tensor:
    """One corrector step: x (B, L) at noise sigma (B,), moved for the noise `dose` (B,) by forward and reverse at once.

    Raises:
        ValueError: for a graph without `rates_out_of`.
    """
    rates_out_of = _rates_out_of(reverse.graph)

    def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        return corrector_probs(log_score, x, reverse.graph, rates_out_of(x), dose[sequence])

    return reverse.redraw(x, sigma, ~reverse.frozen & (sigma > 0)[:, None], kernel)


def corrector_probs(log_score: Tensor, x: Tensor, graph: Graph, out: Row, dose: Tensor) -> Tensor:
    """Tau-leaping with the rates Q[y, x] + Q[x, y] s_y.

    Args:
        log_score: (M, N) float.
        x: (M,) int64.
        graph: the forward process.
        out: Q[., x], the rates of the jumps out of x.
        dose: (M,) noise for which both processes run.

    Returns:
        (M, N), non-negative, each row summing to 1.
    """
    into = graph.rates_into(x)
    entered = (into.base > 0) | (into.value > 0).any(-1)  # where nothing leads into x, its score means nothing
    back = reverse_rates(log_score, x, graph).where(entered[:, None], 0.0)
    forth = out.base.to(back.dtype)[:, None].expand_as(back).scatter(1, out.index, out.value.to(back.dtype))
    return leap((back + forth).scatter_(1, x[:, None], 0.0).mul_(dose.to(back.dtype)[:, None]), x)


def _rates_out_of(graph: Graph) -> Callable[[Tensor], Row]:
    method: Callable[[Tensor], Row] | None = getattr(graph, "rates_out_of", None)
    if method is None:
        raise ValueError(
            "the corrector also runs forwards and needs graph.rates_out_of(x), the rates Q[., x] out of x; "
            f"a {type(graph).__name__} has none"
        )
    return method

"""Exact methods: the reverse process without discretisation, whatever the grid.

    FirstHitting      absorbing graphs: one position comes to light at a time, when does not depend on the model
    Uniformization    any graph: candidates for a jump at a rate that bounds the reverse rate, some of them accepted

Exact means: with the exact score, from the law at one time to the law at another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fast import Answer
from .masked import mask_probability, rate_of
from .randomness import draw_categorical
from .reverse import Kernel, Reverse
from .steps import reverse_rates, tweedie_posterior

__all__ = ["FirstHitting", "Uniformization"]


@dataclass(frozen=True)
class FirstHitting:
    """Exact for absorbing graphs, on any grid; as many evaluations of the score as positions come to light.

    Zheng et al., *Masked diffusion models are secretly time-agnostic masked models and exploit inaccurate categorical
    sampling* (2024), proposition 4.1. With K masked positions at mask probability lambda, each of them comes to light
    at a time of its own, whatever the model says: its mask probability then is uniform on [0, lambda]. The next one is
    the largest of K uniforms,

        lambda' = lambda u^(1/K),      u ~ U(0, 1],

    its position any of the K with equal chances, and its token has the model's posterior given everything that is in
    the open. The time of the event follows from lambda(sigma) = 1 - exp(-sigma).

    The sequences of a batch have their own times and their own numbers of events; each event is one call of the model
    for all sequences that have one left. A posterior that does not sum to 1 is normalised.

    Raises:
        ValueError: when called, for a graph that is not absorbing.
    """

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """All events between t and s; see `Method`."""
        rate = rate_of(reverse, "FirstHitting")
        now, end = (mask_probability(reverse.noise(time)[0], rate) for time in (t, s))
        while True:
            masked = reverse.movable(x)
            count = masked.sum(1)
            row = ((count > 0) & (now > end)).nonzero()[:, 0]
            if not len(row):
                return x
            u = 1 - reverse.uniforms(row, torch.zeros_like(row))
            now = now.index_put((row,), now[row] * u ** (1 / count[row]))
            row = row[now[row] > end[row]]
            rank = (reverse.uniforms(row, torch.zeros_like(row)) * count[row]).long()
            where = torch.zeros_like(masked)
            where[row] = masked[row] & (masked[row].cumsum(1) == rank[:, None] + 1)
            sigma = -torch.log1p(-now) / rate
            x = reverse.redraw(x, sigma, where, _unmask(reverse, sigma))


def _unmask(reverse: Reverse, sigma: Tensor) -> Kernel:
    return lambda log_score, x, sequence, _: tweedie_posterior(log_score, x, reverse.graph, sigma[sequence])


@dataclass(frozen=True)
class Uniformization:
    """Exact for any graph, on any grid that ends above zero noise.

    Chen & Ying, *Convergence analysis of discrete diffusion model: exact implementation through uniformization* (2024).
    In the variable sigma the reverse process jumps from x to y, which differ at one position, at the rate Q[x, y] s_y
    (3), R(x, sigma) in total. As long as R <= M, it is the same process as this: candidates arrive as a Poisson process
    of the constant rate M; a candidate at noise sigma is a jump with probability R(x, sigma) / M, to y in proportion to
    its rate, and nothing otherwise.

    Where M comes from decides whether that is exact. Here the state stands still until a candidate is accepted, so that
    R(x, .) is then a function of sigma alone, and no random number has to do with it: M is `slack` times the larger of
    its values at both ends of a window [shrink sigma, sigma], and a window ends when x moves. Rates grow like 1 / sigma
    at most as sigma falls, by 1 / shrink over a window. At every candidate R <= M is verified, and an excess is an
    error: to go on with another M, because of where a candidate fell, would not be exact either. What no candidate
    meets is not seen: it takes a rate that rises by more than `slack` within a window and falls again before a
    candidate comes.

    Each jump costs some four evaluations of the score: two to bound the rate, `slack` or a little more candidates. The
    sequences of a batch have their own events; each call of the model is for all that need one. The grid only sets when
    states are shown.

    Args:
        slack: what the bound is above the rates at a window's ends; at least 1.
        shrink: how far sigma falls in a window, as a fraction in (0, 1).

    Raises:
        ValueError: for such a slack or shrink as is out of range; when called, for noise levels that are not finite and
            positive, and where a candidate finds the total rate above the bound: what was drawn would not be exact.
    """

    slack: float = 1.5
    shrink: float = 0.5

    def __post_init__(self) -> None:
        if not self.slack >= 1:
            raise ValueError(f"slack must be at least 1, got {self.slack!r}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must lie in (0, 1), got {self.shrink!r}")

    def __call__(self, reverse: Reverse, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """All jumps between t and s; see `Method`."""
        now, end = reverse.noise(t)[0].clone(), reverse.noise(s)[0]
        if not (bool((end > 0).all()) and bool(now.isfinite().all())):
            raise ValueError(
                f"Uniformization needs finite noise levels above 0, got sigma = {float(now.max()):.6g} to "
                f"{float(end.min()):.6g}; end the grid at t_min > 0"
            )
        x, stop, bound = x.clone(), now.clone(), torch.zeros_like(now)
        while bool((now > end).any()):
            opening = (now > end) & (now <= stop)
            if opening.any():
                goal = torch.maximum(now * self.shrink, end)
                rates = torch.maximum(*(_rates(reverse, x, sigma, opening)[0][:, -1] for sigma in (now, goal)))
                bound, stop = torch.where(opening, self.slack * rates, bound), torch.where(opening, goal, stop)
            row = _next_candidate(reverse, now, end, stop, bound)
            row = _jump(reverse, x, now, bound, row)
            stop[row] = now[row]  # x has moved
        return x


def _next_candidate(reverse: Reverse, now: Tensor, end: Tensor, stop: Tensor, bound: Tensor) -> Tensor:
    """Moves `now` on to the next candidates, or to where their window stops; the rows that have one."""
    row = (now > end).nonzero()[:, 0]
    wait = -torch.log1p(-reverse.uniforms(row, torch.zeros_like(row))) / bound[row]
    inside = now[row] - wait > stop[row]
    now[row] = torch.where(inside, now[row] - wait, stop[row])
    return row[inside]


def _jump(reverse: Reverse, x: Tensor, sigma: Tensor, bound: Tensor, row: Tensor) -> Tensor:
    """Moves x at the candidates that are accepted; their rows."""
    candidate = torch.zeros_like(sigma, dtype=torch.bool)
    candidate[row] = True
    cumulative, rates, slot = _rates(reverse, x, sigma, candidate)
    above = (cumulative[:, -1] > bound) & candidate
    if above.any():
        b = int(above.nonzero()[0])
        raise ValueError(
            f"the reverse process of sequence {b} leaves its state at the rate {float(cumulative[b, -1]):.6g} at "
            f"sigma = {float(sigma[b]):.6g}, above the bound {float(bound[b]):.6g} relied on: the sample would "
            "not be exact; raise Uniformization's slack, or its shrink towards 1"
        )
    mark = reverse.uniforms(row, torch.zeros_like(row)) * bound[row]
    accepted = mark < cumulative[row, -1]
    row, mark = row[accepted], mark[accepted]
    position = torch.searchsorted(cumulative[row], mark[:, None], right=True)[:, 0]
    if len(row):
        x[row, position] = draw_categorical(rates[slot[row, position]], reverse.uniforms(row, position))
    return row


def _rates(reverse: Reverse, x: Tensor, sigma: Tensor, active: Tensor) -> tuple[Tensor, Answer, Tensor]:
    """The reverse rates of the active sequences (B,) at noise sigma (B,).

    Returns:
        (B, L) their sums up to each position, 0 for the other sequences; M rows of N, those of each position that can
        move; (B, L) which row of these is whose.
    """
    where = reverse.movable(x) & active[:, None]
    rates = reverse.rows(x, sigma, where, lambda log_score, x, *_: reverse_rates(log_score, x, reverse.graph))
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    sums = torch.empty(len(rates), dtype=torch.float64, device=x.device)
    for part in rates.parts():
        sums[part] = rates[part].sum(-1, dtype=torch.float64)
    total[where] = sums
    return total.cumsum(1), rates, where.flatten().cumsum(0).view_as(where) - 1

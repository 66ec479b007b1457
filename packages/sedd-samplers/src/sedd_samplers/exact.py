"""Exact methods: the reverse process without discretisation, whatever the grid.

    FirstHitting      absorbing graphs: one position comes to light at a time, when does not depend on the model
    Uniformization    any graph: candidates for a jump at a rate that bounds the reverse rate, some of them accepted

Exact means: with the exact score, from the law at one time to the law at another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fast import Answer, draw_by_blocks
from .masked import mask_probability, rate_of, redraw_clean
from .positions import Positions
from .precision import wide
from .reverse import Reverse
from .steps import reverse_rates
from .waiting import require

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

    Of each event the host reads one number, whether there was one.

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
            left = (count > 0) & (now > end)
            u = 1 - reverse.uniform_of(left)
            now = torch.where(left, now * u ** (1 / count), now)
            event = left & (now > end)
            rank = (reverse.uniform_of(event) * count).long()
            where = event[:, None] & masked & (masked.cumsum(1) == rank[:, None] + 1)
            at = reverse.positions(where)
            if not at.sequences:
                return x
            x = redraw_clean(reverse, x, -torch.log1p(-now) / rate, where, among=at)


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
    states are shown. The host reads three numbers of each candidate and of each window.

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
        now, end = reverse.noise(t)[0], reverse.noise(s)[0]
        require(
            *((end > 0) & now.isfinite(), "Uniformization needs finite noise levels above 0"),
            lambda: (
                f"Uniformization needs finite noise levels above 0, got sigma = {float(now.max()):.6g} to "
                f"{float(end.min()):.6g}; end the grid at t_min > 0"
            ),
        )
        stop, bound = now, torch.zeros_like(now)
        while bool((now > end).any()):
            opening = (now > end) & (now <= stop)
            goal = torch.maximum(now * self.shrink, end)
            where = reverse.movable(x) & opening[:, None]
            at = reverse.positions(where)
            rates = torch.maximum(*(_rates(reverse, x, sigma, where, at)[0][:, -1] for sigma in (now, goal)))
            bound, stop = torch.where(opening, self.slack * rates, bound), torch.where(opening, goal, stop)
            now, candidate = _next_candidate(reverse, now, end, stop, bound)
            x, moved = _jump(reverse, x, now, bound, candidate)
            stop = torch.where(moved, now, stop)
        return x


def _next_candidate(reverse: Reverse, now: Tensor, end: Tensor, stop: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """`now` (B,) moved on to the next candidates, or to where their window stops; which sequences (B,) have one."""
    going = now > end
    after = now + torch.log1p(-reverse.uniform_of(going)) / bound
    candidate = going & (after > stop)
    return torch.where(candidate, after, torch.where(going, stop, now)), candidate


def _jump(reverse: Reverse, x: Tensor, sigma: Tensor, bound: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """X moved at the candidates (B,) that are accepted; which those are."""
    where = reverse.movable(x) & candidate[:, None]
    cumulative, rates, slot = _rates(reverse, x, sigma, where, reverse.positions(where))
    above = (cumulative[:, -1] > bound) & candidate

    def refuse() -> None:
        if above.any():
            b = int(above.nonzero()[0])
            raise ValueError(
                f"the reverse process of sequence {b} leaves its state at the rate {float(cumulative[b, -1]):.6g} at "
                f"sigma = {float(sigma[b]):.6g}, above the bound {float(bound[b]):.6g} relied on: the sample would "
                "not be exact; raise Uniformization's slack, or its shrink towards 1"
            )

    reverse.notice(above, refuse)
    mark = reverse.uniform_of(candidate) * bound
    accepted = candidate & (mark < cumulative[:, -1])
    if not len(rates):
        return x, accepted
    position = torch.searchsorted(cumulative, mark[:, None], right=True).clamp(max=x.shape[1] - 1)
    uniform = reverse.uniform_of(accepted, position[:, 0])
    row = rates[slot.gather(1, position)[:, 0]]
    state, _ = draw_by_blocks(row, uniform)
    if reverse.log_prob is not None:
        b = accepted.nonzero()[:, 0]
        reverse.tell(b * x.shape[1] + position[b, 0], row[b], state[b], x.gather(1, position)[b, 0])
    return torch.where(accepted[:, None], x.scatter(1, position, state[:, None]), x), accepted


def _rates(reverse: Reverse, x: Tensor, sigma: Tensor, where: Tensor, at: Positions) -> tuple[Tensor, Answer, Tensor]:
    """The reverse rates at `where` (B, L) bool, at noise sigma (B,), among the positions `at`.

    Returns:
        (B, L) their sums up to each position, 0 at the others; M rows of N, those of `at`; (B, L) which row of these is
        whose.
    """
    rates = reverse.rows_at(x, sigma, at, lambda log_score, x, *_: reverse_rates(log_score, x, reverse.graph), where)
    total = torch.zeros(x.numel(), dtype=wide(x.device), device=x.device)
    for part in rates.parts():
        total[at.flat[part]] = rates[part].sum(-1, dtype=total.dtype)
    slot = torch.zeros_like(x).flatten().index_put((at.flat,), torch.arange(len(at), device=x.device))
    return torch.where(where, total.view_as(x), 0.0).cumsum(1), rates, slot.view_as(x)

"""A time grid with an error target, found by a pilot run.

A first-order step holds the reverse rates a = dsigma(t) Q[x, y] s_y of its beginning; a second-order step would take
the mean of those at both ends (the trapezoidal rule). From t to s, with y where the step has led, they differ by

    error = (t - s) / 2  mean over sequences of  sum over positions that stood still of  sum_y |a_y(y, s) - a_y(x, t)|

expected jumps, which bounds the step's total variation from the true process to leading order. It grows like the
square of the step. A step is made when its error is at most `target`; otherwise it is tried again, shorter; the next
length is the one that would just have met it.

The pilot run chooses the grid once, for the batch, and returns it: what is sampled on the grid afterwards does not
depend on the batch, and no sample is drawn again because of what it was, which would change the law.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import check_times
from .interfaces import Graph, Noise, ScoreModel
from .kernels import leap, reverse_rates
from .reverse import Kernel, Reverse
from .sampling import check_prompt

__all__ = ["adaptive_times"]


@torch.no_grad()
def adaptive_times(
    score: ScoreModel,
    graph: Graph,
    noise: Noise,
    *,
    x: Tensor,
    given: Tensor,
    target: float = 0.01,
    t_min: float = 1e-5,
    seed: int = 0,
    most: int = 10_000,
) -> Tensor:
    """The grid on which first-order steps make an error of about `target` each.

    Args:
        score: (x (B, L), sigma (B,)) -> log-score (B, L, N).
        graph: the forward process.
        noise: its schedule.
        x: (B, L) int64, the given tokens of the pilot's sequences; some tens of sequences do.
        given: (B, L) bool, the positions that never move.
        target: expected misplaced jumps a step and sequence, positive.
        t_min: the time at which the last step ends, in (0, 1).
        seed: of the pilot run.
        most: how many steps there may be.

    Returns:
        (n + 1,) float64 from 1 to t_min; two evaluations of the score for each step made or tried.

    Raises:
        ValueError: for a target, t_min or most out of range, for a prompt that makes no sense, and where `most` steps
            do not suffice.
    """
    if not 0 < target < float("inf"):
        raise ValueError(f"target must be finite and positive, got {target!r}")
    if not 0 < t_min < 1:
        raise ValueError(f"t_min must lie in (0, 1), got {t_min!r}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"most must be a positive integer, got {most!r}")
    check_prompt(x, given, graph.num_states, graph.mask_id)
    seeds = seed + torch.arange(len(x), device=x.device)
    pilot = Reverse(score, graph, noise, frozen=given, seeds=seeds)
    x = torch.where(given, x, pilot.prior())
    times, step = [1.0], (1 - t_min) / 16
    while times[-1] > t_min:
        if len(times) > most:
            raise ValueError(
                f"{most} steps only lead to t = {times[-1]:.6g}; raise the target ({target:.6g}), t_min ({t_min:.6g}) "
                "or most"
            )
        s = max(times[-1] - step, t_min)
        if t_min < s < t_min + step / 10:
            s = t_min  # no crumb at the end
        y, error = _try(pilot, x, times[-1], s)
        if error <= target or times[-1] - s < 1e-12:
            x = y
            times.append(s)
        step *= min(max(0.9 * (target / max(error, 1e-300)) ** 0.5, 0.2), 2.0)
    return check_times(torch.tensor(times, dtype=torch.float64))


def _try(pilot: Reverse, x: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    """Where tau-leaping leads from t to s, and the error of the step."""
    batch = torch.ones(len(x), dtype=torch.float64, device=x.device)
    still = pilot.movable(x)
    slot = still.flatten().cumsum(0).view_as(still) - 1
    kept: list[Tensor] = []

    def rates(time: float) -> tuple[Tensor, Kernel]:
        sigma, dsigma = pilot.noise(time * batch)

        def kernel(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            a = reverse_rates(log_score, x, pilot.graph)
            return a.mul_(dsigma.to(a.dtype)[sequence, None])

        return sigma, kernel

    def leaping(log_score: Tensor, x: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        kept.append(before(log_score, x, sequence, position))
        return leap((t - s) * kept[-1], x)

    sigma, before = rates(t)
    y = pilot.redraw(x, sigma, still, leaping)
    still &= y == x
    sigma, after = rates(s)
    difference = pilot.evaluate(y, sigma, still, after)
    if len(difference):
        difference = difference - torch.cat(kept)[slot[still]]
    return y, (t - s) / 2 * float(difference.abs().sum(dtype=torch.float64)) / len(x)

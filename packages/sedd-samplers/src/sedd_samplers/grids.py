"""Time grids 1 = t_0 > t_1 > ... > t_n = t_min: n steps, the first from 1, the last to t_min.

    uniform_grid     equal steps in time
    noise_grid       equal steps in a function of the noise
    token_grid       as many tokens a step as LLaDA unmasks
    adaptive_grid    steps of equal error, found by a pilot run

The final denoise, from t_min to 0, comes on top. A grid is a tensor, so that `times=` takes these and anybody's own
alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .interfaces import Graph, Noise, ScoreModel
from .masked import mask_probability
from .precision import limit_law, wide
from .prompts import check_prompt
from .reverse import Kernel, Reverse
from .steps import leap, reverse_rates

__all__ = [
    "uniform_grid",
    "noise_grid",
    "token_grid",
    "adaptive_grid",
    "check_times",
    "finite_start",
    "warn_of_text_left",
]


def uniform_grid(steps: int, t_min: float = 1e-5, t_max: float = 1.0) -> Tensor:
    """`steps` steps of equal length from t_max to t_min: (steps + 1,) float64. Below 1 a run needs a `start`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min!r}")
    if not t_min < t_max <= 1:
        raise ValueError(f"t_max must lie in (t_min, 1], got {t_max!r}")
    return torch.linspace(t_max, t_min, steps + 1, dtype=torch.float64)


def noise_grid(
    noise: Noise, steps: int, level: Callable[[Tensor], Tensor] = mask_probability, t_min: float = 1e-5
) -> Tensor:
    """`steps` steps that are equally long in a function of the noise level, whatever the schedule.

    Two schedules of the same graph differ only in the time they take; a grid by level is the same states of the process
    for both.

    Args:
        noise: the schedule.
        steps: how many.
        level: rising with sigma: `mask_probability` (1 - exp(-sigma)), `torch.log`, `torch.sqrt`, or the identity for
            equal steps in sigma.
        t_min: the time at which the last step ends.

    Returns:
        (steps + 1,) float64.

    Raises:
        ValueError: if the level is not finite at 1 or at t_min, or the grid does not fall strictly.
    """
    ends = uniform_grid(steps, t_min)[[0, -1]]
    high, low = level(noise(ends)[0]).double()
    if not (high.isfinite() and low.isfinite() and low < high):
        raise ValueError(
            f"the level must be finite and rise with sigma; it is {float(low):.6g} at t = {t_min:.6g} and "
            f"{float(high):.6g} at t = 1"
        )
    wanted = torch.linspace(float(high), float(low), steps + 1, dtype=torch.float64)[1:-1]
    return check_times(torch.cat([ends[:1], _times_of(noise, wanted, level, ends), ends[1:]]))


def token_grid(noise: Noise, tokens: int, steps: int, t_min: float = 1e-5) -> Tensor:
    """The grid on which `ConfidenceUnmasking` unmasks as many of `tokens` positions a step as LLaDA does.

    tokens // steps in every step, and one more in each of the first tokens % steps (Nie et al. 2025). Where steps
    divide tokens that is what `steps=` gives under log-linear noise.

    Args:
        noise: the schedule.
        tokens: how many positions are free.
        steps: how many, at most `tokens`.
        t_min: the time at which the last step ends.

    Returns:
        (steps + 1,) float64.

    Raises:
        ValueError: for more steps than tokens, or a schedule that does not reach the first step's mask probability.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= steps <= tokens:
        raise ValueError(f"steps must lie in 1..{tokens!r}, the number of tokens, got {steps!r}")
    ends = uniform_grid(steps, t_min)[[0, -1]]
    k = torch.arange(1, steps)
    wanted = 1 - (k * (tokens // steps) + k.clamp(max=tokens % steps)).double() / tokens
    return check_times(torch.cat([ends[:1], _times_of(noise, wanted, mask_probability, ends), ends[1:]]))


def _times_of(noise: Noise, wanted: Tensor, level: Callable[[Tensor], Tensor], ends: Tensor) -> Tensor:
    """When the level is what is wanted (n,), between two times (2,), the later first; float64."""
    above, below = ends[0].expand_as(wanted), ends[1].expand_as(wanted)
    for _ in range(60):  # bisection: the schedule need not know its inverse
        middle = (above + below) / 2
        too_high = level(noise(middle)[0]) > wanted
        above, below = torch.where(too_high, middle, above), torch.where(too_high, below, middle)
    return (above + below) / 2


def check_times(times: Tensor) -> Tensor:
    """A caller's own grid as float64, or ValueError: (n + 1,), n >= 1, falling, within [0, 1]."""
    times = torch.as_tensor(times).double()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must have the shape (steps + 1,) with at least one step, got {tuple(times.shape)}")
    if not ((times[1:] < times[:-1]).all() and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"times must fall strictly and lie in [0, 1], got {times.tolist()}")
    return times


@torch.no_grad()
def adaptive_grid(
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
    """The grid on which first-order steps make an error of about `target` each, found by a pilot run.

    A first-order step holds the reverse rates a = dsigma(t) Q[x, y] s_y of its beginning; a second-order step would
    take the mean of those at both ends (the trapezoidal rule). From t to s, with y where the step has led, they differ
    by

        error = (t - s) / 2  mean over sequences of  sum over positions that stood still of  sum_y |a_y(y, s) - a_y(x,
        t)|

    expected jumps, which bounds the step's total variation from the true process to leading order. It grows like the
    square of the step. A step is made when its error is at most `target`; otherwise it is tried again, shorter; the
    next length is the one that would just have met it.

    The pilot run chooses the grid once, for the batch, and returns it: what is sampled on the grid afterwards does not
    depend on the batch, and no sample is drawn again because of what it was, which would change the law.

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
    begin = float(finite_start(noise, torch.tensor([1.0, t_min], dtype=torch.float64))[0])
    times, step = [begin], (1 - t_min) / 16
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
    return check_times(torch.tensor([1.0, *times[1:]], dtype=torch.float64))


def _try(pilot: Reverse, x: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    """Where tau-leaping leads from t to s, and the error of the step."""
    batch = torch.ones(len(x), dtype=wide(x.device), device=x.device)
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
    still = still & (y == x)  # not in place: it may be what the pilot knows of its free positions
    sigma, after = rates(s)
    difference = pilot.evaluate(y, sigma, still, after)
    if len(difference):
        difference = difference - torch.cat(kept)[slot[still]]
    return y, (t - s) / 2 * float(difference.abs().sum(dtype=wide(x.device))) / len(x)


def finite_start(noise: Noise, times: Tensor) -> Tensor:
    """The grid with its first time moved to the last at which the noise is finite, by no more than float64 resolves.

    At the end of the natural schedules of masked diffusion, sigma = -log(1 - t), nothing is left of a token. Steps from
    infinite noise are limits of steps from finite noise; 1 - 1e-16 is as good.
    """
    if bool(noise(times[:1])[0].isfinite().all()):
        return times
    below, above = times[1], times[0]
    for _ in range(60):
        middle = (below + above) / 2
        sigma, dsigma = noise(middle[None])
        finite = bool((sigma.isfinite() & dsigma.isfinite()).all())
        below, above = (middle, above) if finite else (below, middle)
    if not bool(noise(below[None])[0].isfinite().all()):
        raise ValueError(f"the noise is not finite at t = {float(times[1]):.6g}, where the first step ends")
    return torch.cat([below[None], times[1:]])


def warn_of_text_left(graph: Graph, noise: Noise, t: Tensor) -> None:
    """A warning where a run begins at the prior, and at its first time t (a 0-dim tensor) texts are not noise yet.

    What is left of a token x is the total variation of exp(sigma Q)[., x] from the prior: of the first and the last.
    """
    prior, sigma = limit_law(graph, t.device), noise(t[None])[0]
    ends = [x for x in (0, graph.num_states - 1) if x != graph.mask_id]
    token = torch.zeros(len(ends), graph.num_states, dtype=prior.dtype, device=t.device)
    token[range(len(ends)), ends] = 1
    left = float((graph.propagate(token, sigma.to(prior.dtype).expand(len(ends))) - prior).abs().sum(1).max()) / 2
    if left > 0.05:
        warnings.warn(
            f"at t = {float(t):.6g} the noise is {float(sigma):.4g}, and {left:.0%} is left of a token: this run "
            "begins at the prior, as if nothing were, and its samples are off by as much. Choose a schedule that ends "
            "in more noise, or say from which states, start= (B, L)",
            stacklevel=3,
        )

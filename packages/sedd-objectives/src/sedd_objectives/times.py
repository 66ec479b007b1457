"""Times at which the diffusion loss is sampled.

The loss is an integral over t in [t_min, 1], so any sampler whose draws are marginally uniform on that interval gives
an unbiased estimate; they differ in the variance that a batch's mean keeps.

- independent: t_b ~ U.
- stratified: one independent draw in each of B equal strata, the strata in random order.
- low-discrepancy: one draw for all, shifted by b / B (Kingma et al. 2021): strata with a common offset.

Times come on the generator's device unless another is named, in torch's default dtype but float32 at least.

Importance sampling draws t from another density q and weighs the loss by 1 / q, relative to the uniform density: also
unbiased. The variance is least for q(t) proportional to the root mean square of the loss at t; that profile is measured
on the losses of earlier batches, as a step function on equal bins of t (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from .checks import sum_dtype
from .interfaces import InvertibleNoise, Noise, ScoreModel

__all__ = ["uniform_times", "stratified_times", "low_discrepancy_times", "ImportanceTimes", "NoiseTimes", "of_time"]


def uniform_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent times (batch_size,) in [t_min, 1)."""
    _check(batch_size, t_min)
    return _onto_interval(_uniform((batch_size,), generator, device), t_min)


def stratified_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """One time in each of batch_size equal parts of [t_min, 1), in random order, (batch_size,).

    The order is shuffled so that the time of a sequence does not depend on its place in the batch: every single time is
    uniform.
    """
    _check(batch_size, t_min)
    where = _device(generator, device)
    strata = torch.randperm(batch_size, generator=generator, device=where)
    offset = _uniform((batch_size,), generator, where)
    return _onto_interval((strata + offset) / batch_size, t_min)


def low_discrepancy_times(
    batch_size: int,
    *,
    generator: Generator | None = None,
    t_min: float = 1e-3,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times b / batch_size + u (mod 1) with one common u ~ U[0, 1), put onto [t_min, 1); (batch_size,)."""
    _check(batch_size, t_min)
    common = _uniform((), generator, device)
    grid = torch.arange(batch_size, device=common.device, dtype=common.dtype) / batch_size
    return _onto_interval((grid + common) % 1, t_min)


class ImportanceTimes:
    """Times drawn where the loss has been large, with the weights that make up for it.

        t, weight = times.draw(batch_size)
        loss = denoising_loss(score, graph, noise, x0, t)
        (weight * loss).mean().backward()
        times.update(t, loss)

    Until every bin has been seen the bins not seen yet are drawn like the mean of the others, at the start uniformly.

    Args:
        num_bins: equal parts of [t_min, 1) in each of which the density is constant. Few are better than many: a bin
            in which large losses are so rare that none has been seen yet is drawn too seldom (absorbing graphs, small
            t), and the weights of those that come then raise the variance.
        decay: how much of the profile is kept at an update; 1 / (1 - decay) batches count.
        uniform_share: in (0, 1], part of the draws that stay uniform: no weight exceeds 1 / uniform_share, and a bin
            whose loss grows is noticed.
        t_min: the smallest time drawn.

    Raises:
        ValueError: an argument out of its range.

    Attributes:
        square, count: (num_bins,) float64, decayed sums of the squared losses and of their number.
    """

    def __init__(
        self, num_bins: int = 16, *, decay: float = 0.99, uniform_share: float = 0.1, t_min: float = 1e-3
    ) -> None:
        _check(num_bins, t_min, "num_bins")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share must lie in (0, 1], got {uniform_share}")
        self.decay, self.uniform_share, self.t_min = decay, uniform_share, t_min
        self.square = torch.zeros(num_bins, dtype=torch.float64)
        self.count = torch.zeros(num_bins, dtype=torch.float64)

    def probability(self) -> Tensor:
        """Of each bin, (num_bins,) float64; they sum to 1."""
        seen, bins = self.count > 0, len(self.count)
        profile = (self.square / self.count.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        if not bool(seen.any()) or not bool(profile[seen].any()):
            return torch.full_like(self.count, 1 / bins)
        profile = torch.where(seen, profile, profile[seen].mean())
        return (1 - self.uniform_share) * profile / profile.sum() + self.uniform_share / bins

    def draw(
        self, batch_size: int, *, generator: Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times (batch_size,) in [t_min, 1), one in each of batch_size equally probable strata, and their weights.

        The mean of weight * f(t) is, in expectation, the mean of f over uniform times. The order is shuffled.
        """
        unit = stratified_times(batch_size, generator=generator, t_min=0.0, device=device).double().cpu()
        p = self.probability()
        upper = p.cumsum(0)
        k = torch.searchsorted(upper, unit, right=True).clamp_max(len(p) - 1)
        within = ((unit - upper[k] + p[k]) / p[k]).clamp(0, 1)
        t, weight = (k + within) / len(p), 1 / (len(p) * p[k])
        return _onto_interval(t.float(), self.t_min).to(device), weight.float().to(device)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take in the losses (B,), not weighed, at the times t (B,). On several ranks, all of theirs or each its own.

        Raises:
            ValueError: shapes that differ, or a time out of [t_min, 1]. Losses that are not finite are left out.
        """
        t, loss = t.detach().double().cpu(), loss.detach().double().cpu()
        if t.ndim != 1 or t.shape != loss.shape:
            raise ValueError(f"t and loss must be of one shape (B,), got {tuple(t.shape)} and {tuple(loss.shape)}")
        place = (t - self.t_min) / (1 - self.t_min)
        if t.numel() and not bool(((place > -1e-6) & (place < 1 + 1e-6)).all()):
            raise ValueError(f"t must lie in [{self.t_min}, 1], got times in [{float(t.min())}, {float(t.max())}]")
        bins = len(self.count)
        k, finite = (place * bins).long().clamp(0, bins - 1), loss.isfinite()
        self.square = self.decay * self.square + torch.bincount(k[finite], loss[finite] ** 2, bins)
        self.count = self.decay * self.count + torch.bincount(k[finite], minlength=bins)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on with the same profile."""
        return {"square": self.square.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`. Raises ValueError if it has another number of bins."""
        if state["square"].shape != self.square.shape or state["count"].shape != self.count.shape:
            raise ValueError(f"state must have {len(self.count)} bins, got {len(state['count'])}")
        self.square, self.count = (state[name].double().cpu().clone() for name in ("square", "count"))


class NoiseTimes:
    """Times of which a share is drawn evenly in log(1 - e^-sigma), not in t: small noise comes up as often as large.

    Where jumps are rare and dear, as on a uniform graph at small sigma, a loss of order log(1 / sigma) / sigma comes up
    with probability sigma. Over uniform times its third moment grows with log(1 / t_min), and a mean of many draws is
    skewed still; divided by a density of order dsigma / sigma the loss is of order log(1 / sigma). The density is
    constant between knots in t, so that the weights are exact whatever the schedule.

    Args:
        noise: the schedule.
        share: in [0, 1), of the draws; the others are uniform in t, and no weight exceeds 1 / (1 - share).
        t_min: the smallest time drawn, > 0.
        device: of the times.
    """

    def __init__(self, noise: Noise, share: float, *, t_min: float, device: torch.device | None = None) -> None:
        self.t_min, self.share = t_min, share
        dtype = sum_dtype(torch.device(device or "cpu"))
        even = torch.linspace(t_min, 1, 257, dtype=dtype, device=device)
        close = torch.logspace(math.log10(t_min), 0, 257, dtype=dtype, device=device)
        knots = torch.unique(torch.cat([even, close]).clamp(t_min, 1))
        sigma = noise(knots)[0].detach().to(knots.dtype)
        depth = (-torch.expm1(-sigma)).clamp_min(torch.finfo(knots.dtype).tiny).log()
        uniform = (knots - t_min) / (1 - t_min)
        self.knots, self.upper = knots, (1 - share) * uniform + share * (depth - depth[0]) / (depth[-1] - depth[0])

    def at(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """The quantiles `unit` (B,) in [0, 1) of the density, as times (B,), and the weights that make up for it (B,).

        The mean of weight * f(t) over uniform `unit` is that of f over uniform times.
        """
        if self.share == 0:
            return _onto_interval(unit, self.t_min), torch.ones_like(unit)
        place = unit.to(self.upper.dtype)
        k, width, probability = self._piece(self.upper, place)
        t = self.knots[k] + (place - self.upper[k]) / probability * width
        below_one = 1 - torch.finfo(unit.dtype).eps / 2
        return t.to(unit.dtype).clamp(self.t_min, below_one), width / probability / (1 - self.t_min)

    def density(self, t: Tensor) -> Tensor:
        """The density at times t (...), relative to the uniform one on [t_min, 1]."""
        _, width, probability = self._piece(self.knots, t.to(self.knots.dtype))
        return probability / width * (1 - self.t_min)

    def _piece(self, ends: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In which piece each place lies, by knots or quantiles, and the piece's width and probability."""
        k = (torch.searchsorted(ends, place.contiguous(), right=True) - 1).clamp(0, len(self.knots) - 2)
        return k, self.knots[k + 1] - self.knots[k], self.upper[k + 1] - self.upper[k]


def _device(generator: Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    """Where times are drawn: the generator's device unless another is named."""
    return generator.device if device is None and generator is not None else device


def of_time(network: Callable[..., Any], noise: InvertibleNoise) -> ScoreModel:
    """A model of (x, sigma), as losses call it, of a network of (x, t), as many are written.

    Some losses draw a noise level beyond the schedule's ends (`any_order_loss` and `lambda_cross_entropy_loss`, whose
    own law of sigma reaches from 0 to infinity): the network is then told the nearest end, t = 0 or t = 1.

    Args:
        network: (x (B, L) int64, t (B,) or (B, L)) -> log-scores or logits (B, L, N), for all positions.
        noise: the schedule that the network was, or is to be, trained with.

    Raises:
        ValueError: the schedule has no inverse; the usual slip is the other order.
    """
    if not callable(getattr(noise, "inverse", None)):
        raise ValueError(f"noise must be a schedule with an inverse, got a {type(noise).__name__}: is the order right?")

    def model(x: Tensor, sigma: Tensor) -> Any:
        ends = torch.tensor([0.0, 1.0], dtype=sigma.dtype, device=sigma.device)
        least, most = noise(ends)[0].to(sigma.dtype)
        return network(x, noise.inverse(sigma.clamp(least, most)).clamp(0, 1).to(sigma.dtype))

    return model


def _uniform(shape: tuple[int, ...], generator: Generator | None, device: torch.device | str | None) -> Tensor:
    """Of [0, 1), in torch's default dtype but float32 at least: in bfloat16 there are 256 times, and 1 is one."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.rand(shape, generator=generator, dtype=dtype, device=_device(generator, device))


def _onto_interval(unit: Tensor, t_min: float) -> Tensor:
    """[0, 1) onto [t_min, 1): below 1 even after rounding, where some schedules are infinite."""
    return (t_min + (1 - t_min) * unit).clamp_max(1 - torch.finfo(unit.dtype).eps / 2)


def _check(size: int, t_min: float, name: str = "batch_size") -> None:
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min}")

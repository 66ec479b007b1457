"""A schedule that learns how fast to run through another: F of sigma(t) = schedule(F(t)), piecewise quadratic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sedd_graphs._checks import check_integer, rate_dtype, widen
from sedd_graphs.noise import Noise, _reached, _times

__all__ = ["Learned"]


class Learned(nn.Module):
    """Any schedule, run through at a learnable pace: sigma(t) = schedule(F(t)) with F increasing from 0 to 1.

    F is the integral of a piecewise linear, positive density, so that F' is continuous and F has a closed inverse.
    At first F(t) = t. The bound does not depend on F, but the variance of its estimate does. With l the loss per unit
    of total noise and r_F(sigma) = dsigma/dt, the estimate dsigma l at a uniform t has the second moment

        E (dsigma l)^2 = integral of r_F(sigma) E[l^2 | sigma] dsigma,

    in which r_F alone depends on F. So no gradient needs to go through the draw of x_t, which has none:

        t = torch.rand(len(x0))
        loss = denoising_loss(score, graph, noise, x0, t=t)     # (B,); its gradient is the network's alone
        pace = noise.second_moment(t, loss).mean()              # its gradient is the schedule's alone
        (loss.mean() + pace).backward()

    Under absorption E[l^2 | sigma] grows like 1 / sigma, and the integral is finite only from a sigma(0) above 0: begin
    with `Geometric` or `Linear(sigma_min=...)` there.

    To a loss that is computed from sigma and dsigma the parameters are constants: the derivative by sigma of a loss at
    an x_t that was drawn at sigma is no derivative of its mean, and leads a schedule astray.

    Args:
        start: the schedule to begin with.
        knots: pieces of equal length, on which the density is linear.
    """

    def __init__(self, start: Noise, knots: int = 16) -> None:
        super().__init__()
        self.start = start
        self.knots = check_integer("knots", knots, least=1)
        self.log_density = nn.Parameter(torch.zeros(self.knots + 1, dtype=rate_dtype()))

    def extra_repr(self) -> str:
        """The schedule and the number of pieces."""
        return f"{self.start!r}, knots={self.knots}"

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at times t, both of t's shape; functions of t, but not of the parameters."""
        t = _times(t)
        # in float64: float32 has too few digits left where the schedule is steep
        warped, slope = self._warp(widen(t), self.log_density.detach())
        return self.start.sigma(warped).to(t.dtype), (self.start.dsigma(warped) * slope).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...), without checks; a function of the parameters, too."""
        return self.start.sigma(self._warp(widen(t), self.log_density)[0]).to(t.dtype)

    def rate(self, sigma: Tensor) -> Tensor:
        """r_F(sigma) = dsigma/dt at the time at which sigma is reached; a function of the parameters, too.

        Raises as `inverse` does.
        """
        sigma = _reached(self.sigma, sigma)
        warped = self.start.time(widen(sigma)).clamp(0, 1)
        return (self.start.dsigma(warped) * self._back(warped)[1]).to(sigma.dtype)

    def second_moment(self, t: Tensor, loss: Tensor) -> Tensor:
        """loss^2, with the gradient by the parameters that its mean over t, x0 and x_t has: what to minimise.

        Args:
            t: times uniform on [0, 1], (...), also stratified ones.
            loss: estimates dsigma l of the bound at these times, (...); taken as constants.

        Returns:
            (...), in the square of the loss's unit.
        """
        sigma, dsigma = self(t.detach())
        moment: Tensor = self.rate(sigma) * (loss.detach().square() / dsigma)
        return moment

    def inverse(self, sigma: Tensor) -> Tensor:
        """The time t in [0, 1] at which the total noise is sigma; raises as `Noise.inverse` does."""
        sigma = _reached(self.sigma, sigma)
        return self._back(self.start.time(widen(sigma)).clamp(0, 1))[0].to(sigma.dtype)

    def _warp(self, t: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """F(t) and F'(t)."""
        density, reached = self._density(log_density, t.dtype)
        piece = (t.detach() * self.knots).long().clamp(0, self.knots - 1)
        step = t - piece.to(t.dtype) / self.knots
        d = _pick(density, piece)
        slope = (_pick(density, piece + 1) - d) * self.knots
        warped = _pick(reached, piece) + d * step + slope * step * step / 2
        return warped.clamp(0, 1), d + slope * step

    def _back(self, warped: Tensor) -> tuple[Tensor, Tensor]:
        """The t at which F(t) is `warped`, and F'(t)."""
        density, reached = self._density(self.log_density, warped.dtype)
        piece = torch.searchsorted(reached.detach(), warped.detach().contiguous(), right=True) - 1
        piece = piece.clamp(0, self.knots - 1)
        missing, d = warped - _pick(reached, piece), _pick(density, piece)
        slope = (_pick(density, piece + 1) - d) * self.knots
        density_there = (d * d + 2 * missing * slope).clamp(min=0).sqrt()
        t = piece.to(d.dtype) / self.knots + 2 * missing / (d + density_there)
        return t.clamp(0, 1), density_there

    def _density(self, log_density: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """F' and F at the knots, (knots + 1,) each."""
        density = (log_density - log_density.max()).to(dtype).exp()
        areas = (density[1:] + density[:-1]) / (2 * self.knots)
        reached = torch.cat([areas.new_zeros(1), areas.cumsum(0)]) / areas.sum()
        return density / areas.sum(), reached


def _pick(values: Tensor, number: Tensor) -> Tensor:
    """Values (K,) at `number` (...), also where vmap takes the axes of `number`."""
    return values.index_select(0, number.flatten()).reshape(number.shape)

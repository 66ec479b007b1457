"""Ordered states: a walk to the neighbours with reflecting ends, as for pixel values and quantised numbers.

    Q[x +- 1, x] = rate,   rate = 1 / (2 - 2 cos(pi / N)),

so that the slowest mode decays at rate 1, as all modes of the uniform graph do: one schedule serves both, and the
limit is uniform. On N states in a row the walk is the walk on a ring of 2N states seen in a mirror,

    exp(sQ)[y, x] = C(y - x) + C(y + x + 1),   C(n) = sum over k of T(n + 2Nk),   T(n) = e^-z I_n(z),  z = 2 rate s,

T being the walk on the endless line, the discrete counterpart of a Gaussian of variance z (I_n: modified Bessel
function). While z is small a few images make the sum, all terms are positive, and every probability is accurate to
its last digits, however small. Afterwards a Fourier sum over the ring converges at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graphs._checks import check_integer, check_states, distinct, rate_dtype, readable, spread, widen
from sedd_graphs.graph import Graph, _flow, _uniform_prior, _vectors
from sedd_graphs.row import Row

__all__ = ["Ordinal"]

_ONE_JUMP = 1e-150  # z up to which z^2, the chance of two jumps, is none in float64
_FEW_IMAGES = 0.3  # total noise up to which six images are all of C(n) in float64, and from which Fourier is


class Ordinal(Graph):
    """N states in a row, each jumping to either neighbour at `rate`.

    Rates grow like N^2: with 256 states, an eighth of all tokens has moved at sigma = 1e-5 already. A bound's t_min
    must be earlier there than elsewhere; `max_rate` says how early.

    Rows of exp(sigma Q) name all N states; nothing of N x N is kept. The inverse of such a smoothing is ill-posed:
    `propagate` at sigma = -d grows by up to e^(4 rate d), so that Tweedie steps must be short; Euler steps need not be.

    Args:
        num_states: N, at least 2.

    Attributes:
        rate: rate of the jump to each neighbour.
    """

    def __init__(self, num_states: int) -> None:
        self.num_states = check_integer("num_states", num_states, least=2)
        self.rate: float = 0.25 / math.sin(math.pi / (2 * self.num_states)) ** 2

    def __repr__(self) -> str:
        return f"Ordinal(num_states={self.num_states})"

    def rates_into(self, x: Tensor) -> Row:
        """`rate` from either neighbour."""
        check_states("x", x, self.num_states)
        rate = torch.full_like(x, self.rate, dtype=rate_dtype())
        last = self.num_states - 1
        leaving = (x > 0).to(rate.dtype) + (x < last).to(rate.dtype)
        return Row.of(
            torch.zeros_like(rate),
            ((x - 1).clamp(min=0), rate),
            ((x + 1).clamp(max=last), rate),
            (x, -leaving * rate),
            num_states=self.num_states,
        )

    def rates_out_of(self, x: Tensor) -> Row:
        """Q is symmetric."""
        return self.rates_into(x)

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A discretised Gaussian of variance 2 rate sigma around x, folded at the ends."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        levels, which = distinct(widen(level.detach()))
        ring = _ring(levels, self.num_states, self.rate)
        y, x, which = torch.arange(self.num_states, device=x.device), x[..., None], which[..., None]
        p = ring[which, (y - x).remainder(2 * self.num_states)] + ring[which, y + x + 1]
        return Row.full(_flow(p, level, self._multiply).to(level.dtype))

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """exp(sigma Q) is symmetric."""
        return self.transition_from(x, sigma)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """Each Fourier mode of v and its mirror image decays at its rate; in float64."""
        v, level = _vectors(v, sigma, self.num_states)
        if v.numel() == 0:  # which Fourier transforms do not take
            return v
        modes = _modes(self.num_states, self.rate, v.device)
        decay = torch.where(modes > 0, -widen(level)[..., None] * modes, 0).exp()
        mirrored = torch.cat([v, v.flip(-1)], -1)
        moved: Tensor = torch.fft.irfft(torch.fft.rfft(widen(mirrored)) * decay, n=2 * self.num_states)
        return moved[..., : self.num_states].to(v.dtype)

    def prior(self, sigma: Tensor) -> Row:
        """1/N, at every sigma."""
        return _uniform_prior(sigma, self.num_states)

    def _multiply(self, v: Tensor) -> Tensor:
        """Q v for v (..., N): second differences, with equal neighbours beyond the ends."""
        padded = torch.cat([v[..., :1], v, v[..., -1:]], -1)
        second: Tensor = padded.diff(n=2)
        return second * self.rate


def _modes(num_states: int, rate: float, device: torch.device) -> Tensor:
    """The decay rates of the ring's Fourier modes 0 .. N, (N + 1,) float64."""
    k = torch.arange(num_states + 1, device=device, dtype=torch.float64)
    sine: Tensor = (math.pi * k / (2 * num_states)).sin()
    return sine.square() * (4 * rate)


def _ring(levels: Tensor, num_states: int, rate: float) -> Tensor:
    """C(n) for n = 0 .. 2N - 1 at each level (S,): the walk on the ring, (S, 2N) float64."""
    if len(levels) == 0:
        return levels.new_zeros(0, 2 * num_states)
    modes = _modes(num_states, rate, levels.device)
    late = torch.where(modes > 0, -levels[:, None] * modes, 0).exp()
    ring: Tensor = torch.fft.irfft(late, n=2 * num_states)
    early = levels < _FEW_IMAGES
    if readable(levels):
        ring[early] = _images(levels[early], num_states, rate)
        return ring
    return torch.where(early[:, None], _images(levels.clamp(max=_FEW_IMAGES), num_states, rate), ring)


def _images(levels: Tensor, num_states: int, rate: float) -> Tensor:
    """The same from six images, for levels up to _FEW_IMAGES."""
    if len(levels) == 0:
        return levels.new_zeros(0, 2 * num_states)
    line = _line(2 * rate * levels, 6 * num_states)
    laps = line[:, :-1].reshape(-1, 3, 2 * num_states)  # T at n, n + 2N, n + 4N
    back = line[:, 1:].flip(-1).reshape(-1, 3, 2 * num_states)  # T at 6N - n, 4N - n, 2N - n
    return laps.sum(-2) + back.sum(-2)


def _line(z: Tensor, most: int) -> Tensor:
    """T(n) = e^-z I_n(z) for n = 0 .. most at each z (S,), (S, most + 1), accurate relative to each value.

    I_n(z) is the integral of e^(z cosh u - n u) / (2 pi i) along u = alpha + i phi, phi from -pi to pi. On the line
    through the saddle, sinh(alpha) = n / z, nothing cancels; the integrand is a bump of width w^(-1/2), w = sqrt(n^2 +
    z^2), on which the trapezoidal rule converges geometrically.
    """
    n = torch.arange(most + 1, device=z.device, dtype=z.dtype)
    safe = torch.where(z > _ONE_JUMP, z, 1)[:, None]
    alpha = (n / safe).asinh()
    width = (n**2 + safe**2).sqrt()
    points = 48
    half_range = torch.where(width < 100, math.pi, 8.5 / width.sqrt().clamp(min=1))
    total = torch.full_like(width, 0.5)
    for j in range(1, points + 1):
        phi = half_range * (j / points)
        weight = 0.5 if j == points else 1.0
        total += weight * (-2 * width * (phi / 2).sin() ** 2).exp() * (n * (phi.sin() - phi)).cos()
    line = (2 * safe * (alpha / 2).sinh() ** 2 - n * alpha).exp() * total * half_range / (math.pi * points)
    one_jump = torch.where(n == 0, 1, torch.where(n == 1, z[:, None] / 2, 0))
    return torch.where(z[:, None] > _ONE_JUMP, line, one_jump)

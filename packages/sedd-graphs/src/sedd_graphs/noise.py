"""Noise schedules: the total noise sigma(t) for t in [0, 1], its derivative, and the time at which it is reached.

    log-linear   1 - e^-sigma = (1 - eps) t                 mask probability linear in t; for absorbing graphs
    cosine       e^-sigma = eps + (1 - eps) cos(pi t / 2)   slow at first
    polynomial   1 - e^-sigma = (1 - eps) t^power
    geometric    sigma = sigma_min^(1 - t) sigma_max^t      for uniform graphs; sigma(0) is sigma_min, not 0
    linear       sigma = sigma_min + (sigma_max - sigma_min) t, a constant rate

`MaskProbability` takes any mask probability; `sedd_graphs.learned` learns how fast to run through any schedule. A
schedule is called: `sigma, dsigma = noise(t)`, both of t's shape and dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graphs._checks import at_least_float32, check_values, describe

__all__ = ["Noise", "LogLinear", "Cosine", "Polynomial", "Geometric", "Linear", "MaskProbability"]


class Noise(ABC):
    """A schedule sigma(t), increasing on [0, 1]; a subclass gives sigma and dsigma, and the inverse where it is closed.

    Calls raise a `TypeError` when t is no floating-point tensor and a `ValueError` when it is outside [0, 1] or NaN.
    """

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...), without checks."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Its derivative with respect to t, (...), without checks."""

    def time(self, sigma: Tensor) -> Tensor:
        """The time t (...) at which sigma is reached, without checks: by bisection unless a subclass knows better."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(64):
            middle = (low + high) / 2
            below = self.sigma(middle) < sigma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at times t, both of t's shape."""
        t = _times(t)
        return self.sigma(t), self.dsigma(t)

    def inverse(self, sigma: Tensor) -> Tensor:
        """The time t in [0, 1] at which the total noise is sigma; of sigma's shape.

        Raises:
            TypeError: sigma is no floating-point tensor.
            ValueError: sigma lies outside sigma(0) .. sigma(1) (by more than rounding) or is NaN.
        """
        return self.time(_reached(self.sigma, sigma)).clamp(0, 1)


class LogLinear(Noise):
    """sigma = -log(1 - (1 - eps) t): the mask probability is (1 - eps) t. For absorbing graphs.

    Args:
        eps: probability of a token's survival at t = 1.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _between("eps", eps, 0, 1)

    def __repr__(self) -> str:
        return f"LogLinear(eps={self.eps})"

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...)."""
        return _noise_of(masked=(1 - self.eps) * t, survival=self._survival(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """(1 - eps) / (1 - (1 - eps) t)."""
        return (1 - self.eps) / self._survival(t)

    def time(self, sigma: Tensor) -> Tensor:
        """(1 - e^-sigma) / (1 - eps)."""
        return -(-sigma).expm1() / (1 - self.eps)

    def _survival(self, t: Tensor) -> Tensor:
        """1 - (1 - eps) t, which so written does not cancel near t = 1."""
        return (1 - t) + self.eps * t


class Polynomial(Noise):
    """sigma = -log(1 - (1 - eps) t^power): the mask probability is a power of t; power 1 is log-linear.

    Args:
        power: above 1 the noise comes late, below 1 early (dsigma is then infinite at t = 0).
        eps: probability of a token's survival at t = 1.
    """

    def __init__(self, power: float = 2.0, eps: float = 1e-3) -> None:
        self.power = _between("power", power, 0, math.inf)
        self.eps = _between("eps", eps, 0, 1)

    def __repr__(self) -> str:
        return f"Polynomial(power={self.power}, eps={self.eps})"

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...)."""
        return _noise_of(masked=(1 - self.eps) * t**self.power, survival=self._survival(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """(1 - eps) power t^(power - 1) / (1 - (1 - eps) t^power)."""
        return (1 - self.eps) * self.power * t ** (self.power - 1) / self._survival(t)

    def time(self, sigma: Tensor) -> Tensor:
        """((1 - e^-sigma) / (1 - eps))^(1 / power)."""
        return (-(-sigma).expm1() / (1 - self.eps)) ** (1 / self.power)

    def _survival(self, t: Tensor) -> Tensor:
        """1 - (1 - eps) t^power, with 1 - t^power taken from 1 - t, which is exact near t = 1."""
        late = -(self.power * torch.log1p(-(1 - t).clamp(max=0.5))).expm1()
        gone = torch.where(t < 0.5, 1 - t**self.power, late)
        return gone + self.eps * (1 - gone)


class Cosine(Noise):
    """e^-sigma = eps + (1 - eps) cos(pi t / 2): little noise for long, most of it at the end.

    Args:
        eps: probability of a token's survival at t = 1.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _between("eps", eps, 0, 1)

    def __repr__(self) -> str:
        return f"Cosine(eps={self.eps})"

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...)."""
        masked = 2 * (1 - self.eps) * (math.pi / 4 * t).sin().square()  # 1 - cos, without cancelling at t = 0
        return _noise_of(masked=masked, survival=self._survival(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """(1 - eps) pi/2 sin(pi t / 2) / (eps + (1 - eps) cos(pi t / 2))."""
        return (1 - self.eps) * math.pi / 2 * (math.pi / 2 * t).sin() / self._survival(t)

    def time(self, sigma: Tensor) -> Tensor:
        """The angle whose cosine is (e^-sigma - eps) / (1 - eps), from its sine as well: accurate at both ends."""
        masked = -(-sigma).expm1() / (1 - self.eps)
        cosine = ((-sigma).exp() - self.eps) / (1 - self.eps)
        return torch.atan2((masked * (1 + cosine)).clamp(min=0).sqrt(), cosine) * (2 / math.pi)

    def _survival(self, t: Tensor) -> Tensor:
        """e^-sigma; the cosine as the sine of what is missing to the right angle, which is exact near t = 1."""
        return self.eps + (1 - self.eps) * (math.pi / 2 * (1 - t)).sin()


class Geometric(Noise):
    """sigma = sigma_min^(1 - t) sigma_max^t. For uniform graphs.

    Args:
        sigma_min: total noise at t = 0.
        sigma_max: total noise at t = 1.
    """

    def __init__(self, sigma_min: float = 1e-4, sigma_max: float = 20.0) -> None:
        self.sigma_min = _between("sigma_min", sigma_min, 0, math.inf)
        self.sigma_max = _between("sigma_max", sigma_max, self.sigma_min, math.inf)
        self._span = math.log(self.sigma_max / self.sigma_min)

    def __repr__(self) -> str:
        return f"Geometric(sigma_min={self.sigma_min}, sigma_max={self.sigma_max})"

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...)."""
        return self.sigma_min * (self._span * t).exp()

    def dsigma(self, t: Tensor) -> Tensor:
        """Sigma log(sigma_max / sigma_min)."""
        return self._span * self.sigma(t)

    def time(self, sigma: Tensor) -> Tensor:
        """log(sigma / sigma_min) / log(sigma_max / sigma_min)."""
        return (sigma / self.sigma_min).log() / self._span


class Linear(Noise):
    """sigma = sigma_min + (sigma_max - sigma_min) t: noise at a constant rate.

    Args:
        sigma_min: total noise at t = 0, may be 0.
        sigma_max: total noise at t = 1.
    """

    def __init__(self, sigma_max: float = 7.0, sigma_min: float = 0.0) -> None:
        self.sigma_min = 0.0 if sigma_min == 0 else _between("sigma_min", sigma_min, 0, math.inf)
        self.sigma_max = _between("sigma_max", sigma_max, self.sigma_min, math.inf)

    def __repr__(self) -> str:
        return f"Linear(sigma_max={self.sigma_max}, sigma_min={self.sigma_min})"

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t (...)."""
        return self.sigma_min + (self.sigma_max - self.sigma_min) * t

    def dsigma(self, t: Tensor) -> Tensor:
        """sigma_max - sigma_min."""
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def time(self, sigma: Tensor) -> Tensor:
        """(sigma - sigma_min) / (sigma_max - sigma_min)."""
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


class MaskProbability(Noise):
    """sigma = -log(1 - m(t)) for any mask probability m; dsigma by automatic differentiation, the inverse by bisection.

    Args:
        mask: an elementwise function of t in torch, increasing from at least 0 to below 1 on [0, 1].

    Raises:
        ValueError: m leaves [0, 1), or falls somewhere on a grid of 1001 times.
    """

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            m = mask(torch.linspace(0, 1, 1001, dtype=torch.float64))
        if m.shape != (1001,) or not (m >= 0).all() or not (m < 1).all():
            found = (
                f"values from {float(m.min())} to {float(m.max())}" if m.shape == (1001,) else f"shape {tuple(m.shape)}"
            )
            raise ValueError(f"mask must map times elementwise to probabilities of at least 0 and below 1, got {found}")
        if (m.diff() < 0).any():
            t = float((m.diff() < 0).int().argmax()) / 1000
            raise ValueError(f"mask must not decrease, but falls at t = {t}")
        self.mask = mask

    def __repr__(self) -> str:
        return f"MaskProbability({getattr(self.mask, '__name__', type(self.mask).__name__)})"

    def sigma(self, t: Tensor) -> Tensor:
        """-log(1 - m(t))."""
        return -torch.log1p(-self.mask(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """m'(t) / (1 - m(t)), by automatic differentiation."""
        if torch.is_inference_mode_enabled():  # which knows no derivatives
            with torch.inference_mode(False), torch.no_grad():
                return self.dsigma(t.clone())
        masked, pull_back = torch.func.vjp(self.mask, t)[:2]
        (slope,) = pull_back(torch.ones_like(masked))
        rate: Tensor = slope / (1 - masked)
        return rate


def _noise_of(*, masked: Tensor, survival: Tensor) -> Tensor:
    """-log(1 - masked), survival being 1 - masked: from whichever of the two is small, and so has its digits."""
    return -torch.where(masked < 0.5, torch.log1p(-masked.clamp(max=0.5)), survival.log())


def _times(t: Tensor) -> Tensor:
    """The times in float32 at least; raise unless they lie in [0, 1]."""
    t = _float("t", t)
    check_values((t >= 0) & (t <= 1), "t must lie in [0, 1] everywhere", t)
    return t


def _reached(total: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
    """The noise in float32 at least; raise unless a schedule of this total noise reaches it, but for rounding."""
    sigma = _float("sigma", sigma)
    low, high = (total(torch.full_like(sigma, t)).detach() for t in (0.0, 1.0))
    slack = 1e-5 * high
    check_values(
        *((sigma >= low - slack) & (sigma <= high + slack), "sigma must lie between the ends of this schedule"),
        *(low, high, sigma),
        say=lambda low, high, sigma: (
            f"sigma must lie between {low:.6g} and {high:.6g}, which this schedule spans, found {sigma}"
        ),
    )
    return torch.minimum(torch.maximum(sigma, low), high)  # beyond the ends there may be no time at all


def _float(name: str, values: Tensor) -> Tensor:
    """The values in float32 at least; raise unless they are a floating-point tensor."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, such as torch.tensor(0.5), got {describe(values)}")
    return at_least_float32(values)


def _between(name: str, value: float, low: float, high: float) -> float:
    """The value as a float; raise unless it lies strictly between the two."""
    value = float(value)
    if not low < value < high:
        raise ValueError(f"{name} must lie strictly between {low} and {high}, got {value}")
    return value

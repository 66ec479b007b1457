"""Noise schedules: the total noise sigma(t) for t in [0, 1], its derivative, and the time at which it is reached.

    log-linear   sigma = -log(1 - (1 - eps) t)            the mask probability 1 - e^-sigma is linear in t
    geometric    sigma = sigma_min^(1 - t) sigma_max^t    for uniform noise; sigma(0) is sigma_min, not 0

A schedule is called: `sigma, dsigma = noise(t)`, both of t's shape and dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Noise", "LogLinear", "Geometric"]


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

    @abstractmethod
    def _time(self, sigma: Tensor) -> Tensor:
        """The time t (...) at which sigma is reached, without checks."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at times t, both of t's shape."""
        t = _float("t", t)
        if not torch.compiler.is_compiling():
            wrong = ~((t >= 0) & (t <= 1))
            if wrong.any():
                raise ValueError(f"t must lie in [0, 1] everywhere, found {float(t[wrong].flatten()[0])}")
        return self.sigma(t), self.dsigma(t)

    def inverse(self, sigma: Tensor) -> Tensor:
        """The time t in [0, 1] at which the total noise is sigma; of sigma's shape.

        Raises:
            ValueError: sigma lies outside sigma(0) .. sigma(1) (by more than rounding) or is NaN.
        """
        sigma = _float("sigma", sigma)
        if not torch.compiler.is_compiling():
            low, high = self.sigma(torch.tensor([0.0, 1.0], dtype=sigma.dtype, device=sigma.device)).detach()
            slack = 1e-5 * high
            wrong = ~((sigma >= low - slack) & (sigma <= high + slack))
            if wrong.any():
                found = float(sigma[wrong].flatten()[0])
                raise ValueError(
                    f"sigma must lie between {float(low):.6g} and {float(high):.6g}, which this schedule spans, "
                    f"found {found}"
                )
        return self._time(sigma).clamp(0, 1)


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
        return -torch.where(t < 0.5, torch.log1p(-(1 - self.eps) * t), self._survival(t).log())

    def dsigma(self, t: Tensor) -> Tensor:
        """(1 - eps) / (1 - (1 - eps) t)."""
        return (1 - self.eps) / self._survival(t)

    def _time(self, sigma: Tensor) -> Tensor:
        return -(-sigma).expm1() / (1 - self.eps)

    def _survival(self, t: Tensor) -> Tensor:
        """1 - (1 - eps) t, which so written does not cancel near t = 1."""
        return (1 - t) + self.eps * t


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

    def _time(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / self._span


def _float(name: str, values: Tensor) -> Tensor:
    """The values in float32 at least; raise unless they are a floating-point tensor."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, such as torch.tensor(0.5), got {kind}")
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _between(name: str, value: float, low: float, high: float) -> float:
    """The value as a float; raise unless it lies strictly between the two."""
    value = float(value)
    if not low < value < high:
        raise ValueError(f"{name} must lie strictly between {low} and {high}, got {value}")
    return value

"""The forward process on one token: a continuous-time Markov chain over N states with generator Q.

Columns are sources: Q[y, x] is the rate of the jump x -> y, and dp/dsigma = Q p (1). From a clean token x0 the state
at total noise sigma has the distribution p(. | x0) = exp(sigma Q)[., x0] (14). Positions of a sequence move
independently, so that this is all there is to know about the noise.

A graph must say five things about Q and its exponential, always as rows (see `Row`) and never as N x N matrices.
What else losses, bounds and samplers need follows from these; a subclass overrides it where a closed form is shorter
or more accurate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from sedd_graphs._checks import at_least_float32, check_states, check_values, describe, spread, widen
from sedd_graphs.row import Row

__all__ = ["Graph"]


class Graph(ABC):
    """A Markov chain over the states 0 .. N - 1; everywhere x, x0 are (...) int64 and sigma a leading part of (...).

    Rates come in torch's default dtype, everything else in sigma's (float32 at least). Every method raises a
    `ValueError` that names the argument when states are out of range, sigma's shape is no leading part of the
    states', or sigma is NaN or negative; a `TypeError` for a wrong dtype.

    Attributes:
        num_states: N.
        mask_id: the state that is no token, or None when every state is one.
    """

    num_states: int
    mask_id: int | None = None

    @abstractmethod
    def rates_into(self, x: Tensor) -> Row:
        """Q[x, .]: the rates of the jumps that lead into x, and at x the negative rate of leaving it."""

    @abstractmethod
    def rates_out_of(self, x: Tensor) -> Row:
        """Q[., x]: the rates of the jumps that lead out of x, and at x the negative of their sum."""

    @abstractmethod
    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """exp(sigma Q)[., x]: the distribution of the state that x becomes."""

    @abstractmethod
    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """exp(sigma Q)[x, .]: the probability of becoming x, for every state to start from."""

    @abstractmethod
    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v for v (..., N); sigma of either sign, its shape a leading part of (...)."""

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Row:
        """p(y | x0) / p(x | x0) for every state y: what the score network is to match (7).

        Raises:
            ValueError: x0 cannot have become x, so that there is no such ratio; the error names the two.
        """
        level = _level(sigma, x, x0, self.num_states)
        row = self.transition_from(x0, widen(sigma))
        p = row.at(x)
        _check_possible(p > 0, x, x0, level)
        return row.scale(1 / p).to(level.dtype)

    def sample(self, x0: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
        """x_t ~ exp(sigma Q)[., x0], (...) int64."""
        check_states("x0", x0, self.num_states)
        return self.transition_from(x0, sigma).sample(generator=generator)

    def posterior(self, x: Tensor, x0: Tensor, sigma_s: Tensor, sigma_t: Tensor) -> Row:
        """p(x_s | x_t = x, x_0 = x0) for sigma_s <= sigma_t, by Bayes' rule: p(x_t | x_s) p(x_s | x_0), normalised.

        NaN where x0 cannot have become x.
        """
        level = _level(sigma_t, x, x0, self.num_states, name="sigma_t")
        spread(sigma_s, x.shape, name="sigma_s")
        if sigma_s.shape != sigma_t.shape:
            shapes = f"{tuple(sigma_s.shape)} and {tuple(sigma_t.shape)}"
            raise ValueError(f"sigma_s and sigma_t must have the same shape, got {shapes}")
        between = widen(sigma_t) - widen(sigma_s)
        spread(between, x.shape, name="sigma_t - sigma_s")
        joint = self.transition_from(x0, widen(sigma_s)).combine(self.transition_into(x, between), torch.mul)
        return joint.scale(1 / joint.sum()).to(level.dtype)

    def max_rate(self) -> float:
        """The fastest rate of leaving a state: at total noise share / rate at most `share` of the tokens have moved.

        So `noise.inverse(torch.tensor(1e-3 / graph.max_rate()))` is a t_min for the bound (9) at which its
        reconstruction term has little to undo. The rate is computed anew at each call: ask once.
        """
        states = torch.arange(self.num_states)
        return -float(self.rates_out_of(states).at(states).min())

    def prior(self, sigma: Tensor) -> Row:
        """exp(sigma Q) applied to uniformly random tokens; sigma (...) and the row's batch shape agree.

        At sigma = inf it is the limit of the process. At finite sigma a graph with a mask leaves some tokens as they
        are, so that the divergence of p(. | x0) from it is finite.
        """
        level = spread(sigma)
        tokens = torch.ones(self.num_states, dtype=level.dtype, device=level.device)
        if self.mask_id is not None:
            tokens[self.mask_id] = 0
        return Row.full(self.propagate((tokens / tokens.sum()).expand(*level.shape, -1), level))

    def sample_prior(
        self,
        shape: tuple[int, ...],
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """States from the limit of the process, prior(inf), of the given shape; int64."""
        target = torch.device("cpu" if device is None else device)
        source = target if generator is None else generator.device
        wide = torch.float32 if source.type == "mps" else torch.float64
        u = torch.rand(shape, generator=generator, device=source, dtype=wide)
        limit = self.prior(torch.tensor(float("inf"), dtype=wide, device=source))
        return limit.quantile(u.flatten()).reshape(shape).to(target)

    def prior_kl(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """KL(p(. | x0) || prior(sigma)) of each position, (...) nats: the bound's (9) term at t = 1.

        Summed as p log(p / q) - p + q, whose terms are all non-negative, in float64.
        """
        check_states("x0", x0, self.num_states)
        level = spread(sigma, x0.shape, of="x0")
        prior = self.prior(widen(level).expand(x0.shape))
        return self.transition_from(x0, widen(sigma)).combine(prior, _divergence).sum().to(level.dtype)


def _level(sigma: Tensor, x: Tensor, x0: Tensor, num_states: int, *, name: str = "sigma") -> Tensor:
    """Sigma spread over x, after the checks that a pair of states needs."""
    check_states("x", x, num_states)
    check_states("x0", x0, num_states)
    if x.shape != x0.shape:
        raise ValueError(f"x and x0 must have the same shape, got {tuple(x.shape)} and {tuple(x0.shape)}")
    return spread(sigma, x.shape, name=name)


def _check_possible(possible: Tensor, x: Tensor, x0: Tensor, level: Tensor) -> None:
    """Raise unless x0 can have become x."""
    check_values(
        *(possible, "x must be a state that x0 can have become", x, x0, level),
        say=lambda x, x0, level: (
            f"x must be a state that x0 can have become, found x = {x} from x0 = {x0} at sigma = {level:.6g}"
        ),
    )


def _vectors(v: Tensor, sigma: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """V (..., N) in float32 at least, and sigma of either sign spread over (...)."""
    if not isinstance(v, Tensor) or not v.is_floating_point():
        raise TypeError(f"v must be a floating-point tensor, got {describe(v)}")
    if v.dim() == 0 or v.shape[-1] != num_states:
        raise ValueError(f"v must have the graph's {num_states} states on its last axis, got shape {tuple(v.shape)}")
    level = spread(sigma, v.shape[:-1], of="v[..., 0]", signed=True)
    return at_least_float32(v), level


class _Flow(torch.autograd.Function):
    """Vectors (..., N) that were computed apart from autograd at noise `level` (...), made functions of it.

    By (1) their derivative is Q times themselves, and so is that of any order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, level: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """P; `multiply` is Q p."""
        return p.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.multiply = inputs[2]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (p,) = ctx.saved_tensors
        return grads[0], (grads[0] * ctx.multiply(p)).sum(-1), None


def _flow(p: Tensor, level: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """P (..., N), at noise `level` that broadcasts to (...), with the derivative Q p = multiply(p) by it."""
    if not level.requires_grad:
        return p
    flowing: Tensor = _Flow.apply(p, level.expand(p.shape[:-1]).to(p.dtype), multiply)  # type: ignore[no-untyped-call]
    return flowing


def _uniform_prior(sigma: Tensor, num_states: int) -> Row:
    """The prior 1/N of a graph whose Q is doubly stochastic: uniform tokens stay uniform."""
    level = spread(sigma)
    base = torch.full_like(level, 1 / num_states)
    return Row(base, torch.zeros_like(base, dtype=torch.int64)[..., None], base[..., None], num_states)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, torch.where(p > 0, p / q, 1)) - p + q).clamp(min=0)  # rounding may take it below

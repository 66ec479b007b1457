"""Tokens that jump to their nearest neighbours, given as a sparse graph, and more rarely anywhere.

With A[y, x] the rate of the jump from x to its neighbour y, D the sums of A's columns and J/N the averaging,

    Q       = A - D + between (J/N - I)
    exp(sQ) = sum over n of e^(-rs) (rs)^n / n! P^n,   P = I + Q / r,   r = max D + between.

P is a matrix of probabilities: at the times of a Poisson process of rate r the chain makes a step by P
(uniformization; GDDS, arXiv 2603.21342, noises any graph so). x_t is drawn exactly at the cost of its jumps, whatever N
is, and P^n v is n products with a sparse matrix.

What has no short form is a row of exp(sQ): after a few jumps a walk may be anywhere. Exact at a vocabulary's size are
the draws of x_t and the rows of Q. These are all that losses and bounds by snapshots x_t ask for, the implicit score
entropy (6) among them. Transitions, ratios, posteriors and the prior are exact too, at N numbers a position.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from sedd_graphs._checks import check_rate, check_states, describe, rate_dtype, spread, widen
from sedd_graphs._constants import Constant
from sedd_graphs.graph import Graph, _flow, _vectors
from sedd_graphs.row import Row

__all__ = ["Neighbours"]

_FORGOTTEN = 45.0  # in units of 1 / between: e^-45 of the start is left, less than float64 can tell from none


class Neighbours(Graph):
    """Each token jumps to its k given neighbours, at given rates, and at `between` to any state.

    Args:
        index: (N, k) int64, the neighbours of each state: no state its own, none twice in a row.
        rates: (N, k) float, the rates of these jumps; 1 / k each unless given, so that all together come at rate 1.
        between: rate of jumping to a uniformly random state of all, above 0: it makes every start forgotten.

    Raises:
        TypeError: index is not int64, or rates are not floating-point.
        ValueError: shapes that do not fit, states out of range, a state that is its own neighbour or named twice, rates
            that are negative or not finite, between that is not above 0.
    """

    def __init__(self, index: Tensor, rates: Tensor | None = None, *, between: float = 0.1) -> None:
        index, rates = _edges(index, rates)
        self.num_states, self.num_neighbours = index.shape
        self.between = check_rate("between", between)
        if self.between == 0:
            raise ValueError("between must be above 0, got 0.0: without it the noise never forgets where it began")
        leaving = rates.sum(-1)
        self._fastest = float(leaving.max()) + self.between
        self._index, self._rates, self._leaving = Constant(index), Constant(rates), Constant(leaving)
        target = index.flatten()
        order = target.argsort(stable=True)
        self._sources = Constant(order // self.num_neighbours)
        self._sources_rates = Constant(rates.flatten()[order])
        degree = target.bincount(minlength=self.num_states)
        self._degree, self._first = Constant(degree), Constant(degree.cumsum(0) - degree)
        self._most = int(degree.max())
        self._limit = Constant(self._stationary())

    def __repr__(self) -> str:
        return f"Neighbours({self.num_states} states with {self.num_neighbours} each, between={self.between:.6g})"

    def rates_into(self, x: Tensor) -> Row:
        """between/N from every state, and its rate more from each whose neighbour x is; as many as come to the most."""
        check_states("x", x, self.num_states)
        device = x.device
        step = torch.arange(self._most, device=device)
        inside = step < self._degree.on(device)[x][..., None]
        edge = torch.where(inside, self._first.on(device)[x][..., None] + step, 0)
        source = torch.where(inside, self._sources.on(device)[edge], x[..., None])
        return self._row_of_rates(x, source, self._sources_rates.on(device)[edge])

    def rates_out_of(self, x: Tensor) -> Row:
        """between/N to every state, and its rate more to each neighbour."""
        check_states("x", x, self.num_states)
        return self._row_of_rates(x, self._index.on(x.device)[x], self._rates.on(x.device)[x])

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A column of exp(sigma Q): N numbers a position."""
        check_states("x", x, self.num_states)
        return self._row_of_probabilities(x, spread(sigma, x.shape), transposed=False)

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """A row of exp(sigma Q): N numbers a position."""
        check_states("x", x, self.num_states)
        return self._row_of_probabilities(x, spread(sigma, x.shape), transposed=True)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v by the series, in float64.

        At negative sigma its terms alternate, and e^(2 r |sigma|) of the digits go: for short steps.
        """
        v, level = _vectors(v, sigma, self.num_states)
        moved = self._series(widen(v), widen(level.detach()), transposed=False)
        return _flow(moved, level, self._multiply).to(v.dtype)

    def sample(self, x0: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
        """x_t ~ exp(sigma Q)[., x0], jump by jump: as many rounds as the most jumps of one position.

        Exact up to sigma = 45 / between, beyond which e^-45 of the start would be left. The number of rounds is the one
        value that is read back from the device.
        """
        check_states("x0", x0, self.num_states)
        level = widen(spread(sigma.detach(), x0.shape, of="x0")).clamp(max=_FORGOTTEN / self.between).expand(x0.shape)
        edges = self._index.on(x0.device), self._rates.on(x0.device)
        if torch.compiler.is_compiling() and generator is None:
            drawn: Tensor = _opaque_walk(x0, self._fastest * level, *edges, self._fastest, self.between)
            return drawn
        return _walk(x0, self._fastest * level, *edges, self._fastest, self.between, generator)

    def _row_of_rates(self, x: Tensor, index: Tensor, rates: Tensor) -> Row:
        """between/N everywhere, `rates` more at `index` where that is not x, and the negative rate of leaving at x."""
        share = self.between / self.num_states
        leaving = share - self.between - self._leaving.on(x.device)[x]
        value = torch.cat([rates + share, leaving[..., None]], -1).to(rate_dtype())
        base = torch.full_like(value[..., 0], share)
        return Row.distinct(base, torch.cat([index, x[..., None]], -1), value, self.num_states)

    def _row_of_probabilities(self, x: Tensor, level: Tensor, *, transposed: bool) -> Row:
        start = torch.zeros(*x.shape, self.num_states, dtype=widen(level).dtype, device=x.device)
        start = start.scatter(-1, x[..., None], 1.0)
        p = self._series(start, widen(level.detach()), transposed=transposed)
        multiply = self._multiply_transposed if transposed else self._multiply
        return Row.full(_flow(p, level, multiply).to(level.dtype))

    def _multiply(self, v: Tensor) -> Tensor:
        """Q v for v (..., N) float64."""
        rates, target = self._rates.on(v.device), self._index.on(v.device).flatten()
        arriving = torch.zeros_like(v).index_add(-1, target, (v[..., None] * rates).flatten(-2))
        anywhere = self.between / self.num_states * v.sum(-1, keepdim=True)
        return arriving + anywhere - (self._leaving.on(v.device) + self.between) * v

    def _multiply_transposed(self, v: Tensor) -> Tensor:
        """V Q for v (..., N) float64."""
        arriving = (v[..., self._index.on(v.device)] * self._rates.on(v.device)).sum(-1)
        anywhere = self.between / self.num_states * v.sum(-1, keepdim=True)
        return arriving + anywhere - (self._leaving.on(v.device) + self.between) * v

    def _series(self, v: Tensor, level: Tensor, *, transposed: bool) -> Tensor:
        """exp(sigma Q) v, or v exp(sigma Q), for v (..., N) float64 and levels that broadcast to (...)."""
        if v.numel() == 0:
            return v
        forever = _FORGOTTEN / self.between
        late = (level >= forever)[..., None]
        jumps = (self._fastest * torch.where(late[..., 0], 0, level))[..., None]
        edges = self._index.on(v.device), self._rates.on(v.device)
        summed = _opaque_sum if torch.compiler.is_compiling() else _sum
        total: Tensor = summed(v, jumps, *edges, self._fastest, self.between, transposed)
        limit = self._limit.on(v.device)
        forgotten = (v @ limit)[..., None].expand_as(v) if transposed else v.sum(-1, keepdim=True) * limit
        return torch.where(late, forgotten, total)

    def _stationary(self) -> Tensor:
        """Where every start ends, (N,) float64: P^n of anything."""
        p = torch.full((self.num_states,), 1 / self.num_states, dtype=torch.float64)
        edges = self._index.on(p.device), self._rates.on(p.device)
        for _ in range(math.ceil(_FORGOTTEN * self._fastest / self.between)):
            before, p = p, _step_of(p, *edges, self._fastest, self.between, False)
            p = p / p.sum()
            if bool(((p - before).abs() <= 1e-17 * p).all()):
                break
        return p


def _step_of(v: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float, transposed: bool) -> Tensor:
    """P v or v P, whose terms are not negative where those of v are not."""
    still = (fastest - between - rates.sum(-1)) / fastest * v
    anywhere = between / (fastest * len(index)) * v.sum(-1, keepdim=True)
    if transposed:
        return still + anywhere + (v[..., index] * (rates / fastest)).sum(-1)
    return (still + anywhere).index_add(-1, index.flatten(), (v[..., None] * (rates / fastest)).flatten(-2))


def _sum(
    v: Tensor, jumps: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float, transposed: bool
) -> Tensor:
    """The series at `jumps` = r sigma, which broadcast to v (..., N): as many terms as the most of them needs."""
    if v.is_meta:
        return torch.empty_like(v)
    total, power = torch.zeros_like(v), v
    for n in range(_rounds(_most(jumps.abs(), fastest * _FORGOTTEN / between))):
        weight = torch.xlogy(n, jumps.abs()) - math.lgamma(n + 1) - jumps
        sign = torch.where(jumps < 0, (-1.0) ** n, 1.0)
        total = total + sign * weight.exp() * power
        power = _step_of(power, index, rates, fastest, between, transposed)
    return total


def _walk(
    x: Tensor,
    jumps: Tensor,
    index: Tensor,
    rates: Tensor,
    fastest: float,
    between: float,
    generator: Generator | None = None,
) -> Tensor:
    """States (...) after a Poisson number of steps by P, of mean `jumps` (...)."""
    if x.is_meta:
        return torch.empty_like(x)
    source = x.device if generator is None else generator.device
    count = torch.poisson(jumps.to(source), generator=generator).to(x.device)
    for done in range(int(_most(count, _rounds(fastest * _FORGOTTEN / between)))):
        u = torch.rand(x.shape, generator=generator, device=source, dtype=jumps.dtype).to(x.device)
        x = torch.where(done < count, _step(x, u * fastest, index, rates, between), x)
    return x


def _step(x: Tensor, u: Tensor, index: Tensor, rates: Tensor, between: float) -> Tensor:
    """The state after a step by P, from u uniform on [0, r): below `between` anywhere, then neighbours, then x."""
    num_states, num_neighbours = index.shape
    anywhere = (u / between * num_states).long().clamp(max=num_states - 1)
    which = torch.searchsorted(rates[x].cumsum(-1) + between, u[..., None], right=True)
    near = index[x].gather(-1, which.clamp(max=num_neighbours - 1))[..., 0]
    return torch.where(u < between, anywhere, torch.where(which[..., 0] < num_neighbours, near, x))


def _most(values: Tensor, unread: float) -> float:
    """The greatest of the values; `unread`, the most there can be, where vmap keeps it from being read."""
    if values.numel() == 0:
        return 0.0
    try:
        return float(values.max())
    except RuntimeError:
        return unread


def _rounds(jumps: float) -> int:
    """A number that a Poisson variable of this mean does not reach but with a probability below float64's digits."""
    return int(jumps + 9 * math.sqrt(jumps)) + 26


@torch.library.custom_op("sedd_graphs::neighbours_sum", mutates_args=())
def _opaque_sum(
    v: Tensor, jumps: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float, transposed: bool
) -> Tensor:
    """The series as one operation of a compiled graph: how many terms it has depends on the noise."""
    own: Tensor = _sum(v, jumps, index, rates, fastest, between, transposed).clone()
    return own


@_opaque_sum.register_fake
def _(
    v: Tensor, jumps: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float, transposed: bool
) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("sedd_graphs::neighbours_walk", mutates_args=())
def _opaque_walk(x: Tensor, jumps: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float) -> Tensor:
    """The same of draws."""
    own: Tensor = _walk(x, jumps, index, rates, fastest, between).clone()
    return own


@_opaque_walk.register_fake
def _(x: Tensor, jumps: Tensor, index: Tensor, rates: Tensor, fastest: float, between: float) -> Tensor:
    return torch.empty_like(x)


def _edges(index: Tensor, rates: Tensor | None) -> tuple[Tensor, Tensor]:
    """The neighbours and their rates in float64; raise unless they are what they should be."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor of states, got {describe(index)}")
    if index.dim() != 2 or len(index) < 2 or index.shape[1] < 1:
        raise ValueError(f"index must be (N, k), the k neighbours of each of N >= 2 states, got {tuple(index.shape)}")
    check_states("index", index, len(index))
    own = (index == torch.arange(len(index), device=index.device)[:, None]).any(-1)
    if own.any():
        raise ValueError(
            f"index must not name a state as its own neighbour, but does for state {int(own.int().argmax())}"
        )
    twice = (index.sort(-1).values.diff() == 0).any(-1)
    if twice.any():
        raise ValueError(f"index must not name a neighbour twice, but does for state {int(twice.int().argmax())}")
    if rates is None:
        return index, torch.full(index.shape, 1 / index.shape[1], dtype=torch.float64, device=index.device)
    if not isinstance(rates, Tensor) or not rates.is_floating_point():
        raise TypeError(f"rates must be a floating-point tensor, got {describe(rates)}")
    if rates.shape != index.shape:
        raise ValueError(f"rates must have the shape of index, {tuple(index.shape)}, got {tuple(rates.shape)}")
    rates = rates.detach().double()
    wrong = ~((rates >= 0) & rates.isfinite())
    if wrong.any():
        raise ValueError(f"rates must be finite and at least 0, found {float(rates[wrong][0])}")
    return index, rates

"""A vector over the N states that is constant except at a handful of them.

Every row and column of a structured generator Q, of exp(sigma Q), and every ratio p(y|x0) / p(x|x0), has this
form: one `base` everywhere, other values at x, x0 and the mask. It is the whole secret of scaling: a batch of
rows costs (..., K) numbers instead of (..., N). A dense graph is the case K = N.

The algebra is closed: functions of one row (`map`), of two (`combine`), sums, draws, all cost K and not N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sedd_graphs._checks import widen

__all__ = ["Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """A batch of vectors over N states: `value[..., k]` at state `index[..., k]`, `base` at all the others.

    The K states of one row are distinct, so that sums and scatters need no special case; `Row.of` takes care of
    states that may coincide. Where K = N no state is left for the base, and it is 0.

    Attributes:
        base: (...) float.
        index: (..., K) int64, distinct along the last axis.
        value: (..., K) float.
        num_states: N.
    """

    base: Tensor
    index: Tensor
    value: Tensor
    num_states: int

    @classmethod
    def of(cls, base: Tensor, *exceptions: tuple[Tensor, Tensor], num_states: int) -> Row:
        """The row with `base` (...) everywhere but at the given (state, value) pairs, each (...).

        Where two states coincide, the later pair counts; the earlier one is moved to a state that has the base value
        anyway.
        """
        index = torch.stack([state.expand_as(base) for state, _ in exceptions], -1)
        value = torch.stack([v.to(base.dtype).expand_as(base) for _, v in exceptions], -1)
        return cls.distinct(base, index, value, num_states)

    @classmethod
    def distinct(cls, base: Tensor, index: Tensor, value: Tensor, num_states: int) -> Row:
        """The row of `index` and `value`, (..., K), in which a state may be named repeatedly: the last counts."""
        count = index.shape[-1]
        if count == 1:
            return cls(base, index, value, num_states)
        ascending, order = index.sort(dim=-1, stable=True)
        is_last = torch.ones_like(ascending, dtype=torch.bool)
        is_last[..., :-1] = ascending[..., :-1] != ascending[..., 1:]
        superseded = torch.zeros_like(is_last).scatter(-1, order, ~is_last)
        if count >= num_states:  # no room for a base: name every state
            where = torch.where(superseded, num_states, index)
            full = base[..., None].expand(*base.shape, num_states + 1).clone().scatter(-1, where, value)
            return cls.full(full[..., :-1])
        rank = superseded.cumsum(-1) - 1
        moved = _unnamed(torch.where(is_last, ascending, num_states).sort(-1).values, rank, num_states)
        return cls(
            base,
            torch.where(superseded, moved, index),
            torch.where(superseded, base[..., None], value),
            num_states,
        )

    @classmethod
    def full(cls, values: Tensor) -> Row:
        """The row that names every state: values (..., N)."""
        states = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
        return cls(torch.zeros_like(values[..., 0]), states, values, values.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """The batch shape (...): one row each."""
        return self.base.shape

    def map(self, function: Callable[[Tensor], Tensor]) -> Row:
        """The row with an elementwise function applied to every state's value."""
        base = self.base if self._names_all else function(self.base)
        return Row(base, self.index, function(self.value), self.num_states)

    def scale(self, factor: Tensor) -> Row:
        """The row times one number a row, `factor` (...)."""
        return Row(self.base * factor, self.index, self.value * factor[..., None], self.num_states)

    def to(self, dtype: torch.dtype) -> Row:
        """The row with values of another dtype."""
        return Row(self.base.to(dtype), self.index, self.value.to(dtype), self.num_states)

    def put(self, state: Tensor, value: Tensor) -> Row:
        """The row with one entry replaced in each: `value` (...) at `state` (...) int64."""
        return Row.distinct(
            self.base,
            torch.cat([self.index, state[..., None]], -1),
            torch.cat([self.value, value.to(self.value.dtype).expand_as(self.base)[..., None]], -1),
            self.num_states,
        )

    def combine(self, other: Row, function: Callable[[Tensor, Tensor], Tensor]) -> Row:
        """The row of function(self[y], other[y]) for every state y, for rows of the same batch shape."""
        if self._names_all or other._names_all:
            return Row.full(function(self.dense(), other.dense()))
        index = torch.cat([self.index, other.index], -1)
        value = function(self._at_each(index), other._at_each(index))
        return Row.distinct(function(self.base, other.base), index, value, self.num_states)

    def sum(self) -> Tensor:
        """The sum over all N states, (...)."""
        named = self.value.sum(-1)
        return named if self._names_all else self.base * (self.num_states - self.index.shape[-1]) + named

    def at(self, state: Tensor) -> Tensor:
        """The value at one state of each row; `state` (...) int64, result (...)."""
        return self._at_each(state[..., None])[..., 0]

    def dense(self) -> Tensor:
        """All values, (..., N). For tests, pictures and small problems."""
        full = self.base[..., None].expand(*self.shape, self.num_states).clone()
        return full.scatter(-1, self.index, self.value)

    def sample(self, *, generator: Generator | None = None) -> Tensor:
        """One state of each row, drawn with probability proportional to its value; (...) int64.

        One uniform number a row, in float64: a float32 one cannot resolve probabilities under 6e-8. Values below 0,
        such as rounding or a score that over-normalises leaves, count as 0.
        """
        source = self.base.device if generator is None else generator.device
        wide = torch.float32 if source.type == "mps" else torch.float64
        u = torch.rand(self.shape, generator=generator, device=source, dtype=wide).to(self.base.device)
        return self.quantile(u[..., None])[..., 0]

    def quantile(self, u: Tensor) -> Tensor:
        """The states at the fractions u (..., R) in [0, 1) of the rows' totals: the inverse of the cumulative sum.

        The sum runs over the named states in the order of `index` first, then over the others in ascending order;
        values below 0 count as 0. Returns (..., R) int64: R states from each row.
        """
        cumulative = widen(self.value.detach()).clamp(min=0).cumsum(-1)
        base = widen(self.base.detach()).clamp(min=0)[..., None]
        named, unnamed = self.index.shape[-1], self.num_states - self.index.shape[-1]
        total = cumulative[..., -1:] + base * unnamed
        target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
        k = torch.searchsorted(cumulative, target.contiguous(), right=True)
        state = self.index.expand(*k.shape[:-1], named).gather(-1, k.clamp(max=named - 1))
        if unnamed == 0:
            return state
        rank = (target - cumulative[..., -1:]) / torch.where(base > 0, base, 1)
        other = _unnamed(self.index.sort(-1).values, rank.long().clamp(0, unnamed - 1), self.num_states)
        return torch.where(k < named, state, other)

    @property
    def _names_all(self) -> bool:
        return self.index.shape[-1] == self.num_states

    def _at_each(self, states: Tensor) -> Tensor:
        """The values at R states of each row; `states` and the result (..., R)."""
        hit = states[..., None] == self.index[..., None, :]
        found = torch.where(hit, self.value[..., None, :], 0).sum(-1)
        return torch.where(hit.any(-1), found, self.base[..., None])


def _unnamed(ascending: Tensor, rank: Tensor, num_states: int) -> Tensor:
    """The states number `rank` (..., R), counted from 0, among those that `ascending` (..., K) does not name.

    Up to named state number i lie ascending[i] - i unnamed ones, so that as many named states precede the wanted one
    as have that number at most `rank`. Entries of `ascending` that are num_states are padding at its end.
    """
    below = ascending - torch.arange(ascending.shape[-1], device=ascending.device)
    below = torch.where(ascending < num_states, below, num_states)
    return rank + torch.searchsorted(below, rank.contiguous(), right=True)

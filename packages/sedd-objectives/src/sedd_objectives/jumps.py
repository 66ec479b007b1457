"""The jumps that lead into a state, with the two numbers that every loss needs of them.

A reverse jump x -> y has the rate s(x)_y Q[x, y] (eq. 3), so the loss at x weighs the error of s(x)_y by the rate
w_y = Q[x, y] of the forward jump y -> x, and compares s(x)_y with the ratio r_y = p(y|x0) / p(x|x0). Both are rows:
constant but at a handful of states. `Jumps` holds the two on one common set of exceptional states, which also takes in
x itself (weight 0: no formula may depend on s(x)_x). Nothing here asks what kind of graph made the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interfaces import Row

__all__ = ["Jumps", "DenseRow", "value_at", "can_move", "merge"]


@dataclass(frozen=True)
class Jumps:
    """M sets of N jumps: `base_weight` and `base_ratio` but at the states `index`, where `weight` and `ratio` hold.

    A state may be listed in `index` twice; then all but one of its weights are 0, so that sums count it once.
    """

    base_weight: Tensor
    """(M,) float, >= 0."""
    base_ratio: Tensor
    """(M,) float, >= 0."""
    index: Tensor
    """(M, K) int64."""
    weight: Tensor
    """(M, K) float, >= 0."""
    ratio: Tensor
    """(M, K) float, >= 0."""

    def rows(self, start: int, stop: int) -> Jumps:
        """The jumps of the rows start .. stop - 1."""
        return Jumps(*(field[start:stop] for field in self.fields()))

    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tensors, in the order of the constructor."""
        return self.base_weight, self.base_ratio, self.index, self.weight, self.ratio


@dataclass(frozen=True)
class DenseRow:
    """A row given by all its N values: every state is exceptional, none is left for the base."""

    base: Tensor
    index: Tensor
    value: Tensor

    @classmethod
    def of(cls, value: Tensor) -> DenseRow:
        """The row with the values (..., N)."""
        index = torch.arange(value.shape[-1], device=value.device).expand(value.shape)
        return cls(torch.zeros_like(value[..., 0]), index, value)


def value_at(row: Row, states: Tensor) -> Tensor:
    """The row's values (..., S) at the states (..., S) int64."""
    if row.index.shape[-1] == 0:
        return row.base[..., None].expand(states.shape)
    index, order = row.index.sort(-1)
    slot = torch.searchsorted(index, states.contiguous()).clamp_max(index.shape[-1] - 1)
    listed = index.gather(-1, slot) == states
    return torch.where(listed, row.value.gather(-1, order.gather(-1, slot)), row.base[..., None])


def can_move(rates_into: Row, x: Tensor, num_states: int) -> Tensor:
    """Whether any jump leads into x, (...) bool: elsewhere every loss and every reverse rate is exactly 0."""
    listed = ((rates_into.value > 0) & (rates_into.index != x[..., None])).any(-1)
    return listed | ((rates_into.base > 0) & (num_states > rates_into.index.shape[-1]))


def merge(weight: Row, ratio: Row, x: Tensor, dtype: torch.dtype) -> Jumps:
    """The jumps into x (M,) whose rates are the row `weight` and whose ratios are the row `ratio`, both of M rows."""
    index = torch.cat([x[:, None], weight.index, ratio.index], -1).sort(-1).values
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[:, 1:] = index[:, 1:] == index[:, :-1]
    unwanted = repeated | (index == x[:, None])
    return Jumps(
        base_weight=weight.base.to(dtype),
        base_ratio=ratio.base.to(dtype),
        index=index,
        weight=value_at(weight, index).to(dtype).masked_fill(unwanted, 0),
        ratio=value_at(ratio, index).to(dtype),
    )

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

from .checks import reading_waits
from .interfaces import Graph, Row

__all__ = ["Jumps", "DenseRow", "RatesInto", "value_at", "dense", "can_move", "merge"]


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
    """(M, K) float, >= 0; it and base_ratio may be wider than the weights, which bear the dtype of the arithmetic."""

    def at(self, part: slice) -> Jumps:
        """The jumps of some of the rows."""
        return Jumps(*(field[part] for field in self.fields()))

    def detach(self) -> Jumps:
        """The same numbers, cut off from what they were computed from."""
        return Jumps(*(field.detach() for field in self.fields()))

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


@dataclass(frozen=True)
class RatesInto:
    """Q[x, .] for all the states x of a batch, asked of the graph once: a row depends on its state alone.

    A dense graph's rows are N numbers each. Kept once for each distinct state they are no larger than its own matrix,
    where one for each position would be a tensor of the size of the score.
    """

    states: Tensor
    """(U,) int64, distinct and ascending."""
    rows: Row
    """Of the U states."""

    @classmethod
    def of(cls, graph: Graph, x: Tensor) -> RatesInto:
        """The rates into every state that occurs in x (...), on a GPU into every state there is.

        Raises ValueError if they require a gradient.
        """
        states = torch.arange(graph.num_states, device=x.device) if reading_waits(x.device) else torch.unique(x)
        rows = graph.rates_into(states)
        if rows.base.requires_grad or rows.value.requires_grad:
            raise ValueError(
                "graph.rates_into returned rates that require a gradient, and this loss would not pass it on: call "
                "score_entropy with the graph's rows, or rates_into under torch.no_grad()"
            )
        return cls(states, rows)

    def at(self, x: Tensor) -> DenseRow:
        """The rows of the states x (...), each of which must be among `states`."""
        place = torch.searchsorted(self.states, x.contiguous())
        return DenseRow(self.rows.base[place], self.rows.index[place], self.rows.value[place])

    def can_move(self, x: Tensor, num_states: int) -> Tensor:
        """Whether any jump leads into x, (...) bool."""
        return can_move(self.rows, self.states, num_states)[torch.searchsorted(self.states, x.contiguous())]


def value_at(row: Row, states: Tensor) -> Tensor:
    """The row's values (..., S) at the states (..., S) int64."""
    if row.index.shape[-1] == 0:
        return row.base[..., None].expand(states.shape)
    index, order = row.index.sort(-1)
    slot = torch.searchsorted(index, states.contiguous()).clamp_max(index.shape[-1] - 1)
    listed = index.gather(-1, slot) == states
    return torch.where(listed, row.value.gather(-1, order.gather(-1, slot)), row.base[..., None])


def dense(row: Row, num_states: int, dtype: torch.dtype | None = None) -> Tensor:
    """All values of rows, (..., N), in the dtype if one is given."""
    base, value = (part if dtype is None else part.to(dtype) for part in (row.base, row.value))
    return base[..., None].expand(*base.shape, num_states).scatter(-1, row.index, value)


def can_move(rates_into: Row, x: Tensor, num_states: int) -> Tensor:
    """Whether any jump leads into x, (...) bool: elsewhere every loss and every reverse rate is exactly 0."""
    listed = ((rates_into.value > 0) & (rates_into.index != x[..., None])).any(-1)
    return listed | ((rates_into.base > 0) & (num_states > rates_into.index.shape[-1]))


def merge(weight: Row, ratio: Row, x: Tensor, dtype: torch.dtype, num_states: int | None = None) -> Jumps:
    """The jumps into x (M,) whose rates are the row `weight` and whose ratios are the row `ratio`, both of M rows.

    The weights come in `dtype`, the ratios in their own if it is wider. Given num_states, rows that list all states are
    merged without sorting them.
    """
    ratio_dtype = torch.promote_types(dtype, ratio.value.dtype)
    base_weight, base_ratio = weight.base.to(dtype), ratio.base.to(ratio_dtype)
    if num_states in (weight.index.shape[-1], ratio.index.shape[-1]):
        index = torch.arange(num_states, device=x.device).expand(len(x), -1)
        weights, ratios = (dense(row, index.shape[-1]) for row in (weight, ratio))
        unwanted, base_weight = index == x[:, None], torch.zeros_like(base_weight)
    else:
        index = torch.cat([x[:, None], weight.index, ratio.index], -1).sort(-1).values
        weights, ratios = value_at(weight, index), value_at(ratio, index)
        unwanted = index == x[:, None]
        unwanted[:, 1:] |= index[:, 1:] == index[:, :-1]
    return Jumps(
        base_weight=base_weight,
        base_ratio=base_ratio,
        index=index,
        weight=weights.to(dtype).masked_fill(unwanted, 0),
        ratio=ratios.to(ratio_dtype),
    )

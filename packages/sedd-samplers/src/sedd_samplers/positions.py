"""Positions of a batch whose number the host knows.

How many positions can move is data: to make tensors of that size the host has to read a number back from the device,
once. What a model and its wrappers need to pick their rows, sequence and position of each, follows without any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Positions", "true_first", "true_indices"]


@dataclass(frozen=True)
class Positions:
    """M positions of a batch (B, L).

    Attributes:
        where: (B, L) bool, true at these.
        flat: (M,) int64, the same as indices into the flattened batch, ascending.
        sequences: how many sequences have any that matters.
        whole: whether models are to be asked at all positions, whatever they offer, so that no shape ever changes.
        wanted: (B, L) bool, at which of these it matters what comes out; None for all.
    """

    where: Tensor
    flat: Tensor
    sequences: int
    whole: bool = False
    wanted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.flat)

    @cached_property
    def sequence(self) -> Tensor:
        """(M,) int64, the row of each."""
        return self.flat // self.where.shape[1]

    @cached_property
    def position(self) -> Tensor:
        """(M,) int64, the column of each."""
        return self.flat % self.where.shape[1]

    def wanted_in(self, part: slice | Tensor) -> Tensor | None:
        """(m,) bool, for which of some of these, a part of 0..M, it matters what comes out; None for all."""
        return None if self.wanted is None else self.wanted.flatten()[self.flat[part]]

    def rows_of(self, others: Positions) -> Tensor:
        """Which of others' positions each of these is, (M,) int64: all of them must be among those."""
        return torch.searchsorted(others.flat, self.flat)

    @classmethod
    def of(cls, where: Tensor) -> Positions:
        """The true positions of `where` (B, L) bool: one read back to the host."""
        counts = where.sum(1).tolist()
        return cls(where, true_indices(where.flatten(), sum(counts)), len(counts) - counts.count(0))

    @classmethod
    def everywhere(cls, shape: torch.Size, device: torch.device, *, whole: bool = False) -> Positions:
        """All positions: nothing is read."""
        where = torch.ones(shape, dtype=torch.bool, device=device)
        return cls(where, torch.arange(where.numel(), device=device), len(where), whole)

    def in_sequences_that_have_any(self) -> tuple[Positions, Tensor]:
        """The same without the other sequences, and which those are that have any: (b,) int64."""
        some = self.where.any(1)
        rows = true_indices(some, self.sequences)
        length = self.where.shape[1]
        flat = (some.cumsum(0) - 1)[self.sequence] * length + self.position
        return Positions(self.where[rows], flat, self.sequences), rows


def true_indices(values: Tensor, count: int) -> Tensor:
    """The indices (count,) of the true entries of `values` (R,) bool, of which there are `count`: nothing is read."""
    return true_first(values)[:count]


def true_first(values: Tensor) -> Tensor:
    """The indices (R + 1,) of the true entries of `values` (R,) bool, and behind them whatever there is."""
    place = torch.where(values, values.cumsum(0) - 1, len(values))
    states = torch.arange(len(values), device=values.device)
    return states.new_empty(len(values) + 1).scatter_(0, place, states)

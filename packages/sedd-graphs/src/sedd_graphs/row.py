"""A vector over the N states that is constant except at a handful of them.

Every row and column of a structured generator Q, of exp(sigma Q), and every ratio p(y|x0) / p(x|x0), has this
form: one `base` everywhere, other values at x, x0 and the mask. It is the whole secret of scaling: a batch of
rows costs (..., K) numbers instead of (..., N). A dense graph is the case K = N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Row"]


@dataclass(frozen=True)
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
        anyway. That needs at least as many states as pairs.
        """
        if len(exceptions) > num_states:
            raise ValueError(f"a row with {len(exceptions)} exceptional states needs num_states of at least that many, got {num_states}")
        index = torch.stack([state.expand_as(base) for state, _ in exceptions], -1)
        value = torch.stack([v.to(base.dtype).expand_as(base) for _, v in exceptions], -1)
        for k in range(len(exceptions) - 1):
            repeated = (index[..., k : k + 1] == index[..., k + 1 :]).any(-1)
            value[..., k] = torch.where(repeated, base, value[..., k])
            others = index.clone()
            others[..., k] = -1
            free = torch.zeros_like(index[..., k])
            for _ in range(len(exceptions) - 1):  # the smallest state that no other pair of the row names
                free = torch.where((others == free[..., None]).any(-1), free + 1, free)
            index[..., k] = torch.where(repeated, free, index[..., k])
        return cls(base, index, value, num_states)

    @property
    def shape(self) -> torch.Size:
        """The batch shape (...): one row each."""
        return self.base.shape

    def map(self, function: Callable[[Tensor], Tensor]) -> Row:
        """The row with an elementwise function applied to every state's value."""
        return Row(function(self.base), self.index, function(self.value), self.num_states)

    def sum(self) -> Tensor:
        """The sum over all N states, (...)."""
        return self.base * (self.num_states - self.index.shape[-1]) + self.value.sum(-1)

    def at(self, state: Tensor) -> Tensor:
        """The value at one state of each row; `state` (...) int64, result (...)."""
        hit = self.index == state[..., None]
        return torch.where(hit.any(-1), (self.value * hit).sum(-1), self.base)

    def dense(self) -> Tensor:
        """All values, (..., N). For tests, pictures and small problems."""
        full = self.base[..., None].expand(*self.shape, self.num_states).clone()
        return full.scatter(-1, self.index, self.value)

"""The forward processes of the hub's models, for those that bring none: masks, uniform noise, and a schedule for both.

    Masking      Q[m, x] = 1, Q[x, x] = -1 for x != m       every token turns into the mask m at rate 1
    Replacing    Q = 1/N - I                                every token turns into any other at the same rate
    Proportional sigma(t) = -log(1 - (1 - eps) t)           a share (1 - eps) t of the tokens is masked, or noised

They meet `Graph` and `Noise` as anybody's do, no more; sedd-graphs has the same processes with much else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Masking", "Replacing", "Proportional", "SparseRow"]


@dataclass(frozen=True)
class SparseRow:
    """`value[..., k]` at the states `index[..., k]`, `base` at all the others; see `Row`."""

    base: Tensor
    index: Tensor
    value: Tensor


@dataclass(frozen=True)
class Masking:
    """Tokens turn into the mask and stay there.

    Args:
        num_states: N, the mask among them.
        mask_id: which state it is. There is no default: a guess would show a model another mask than its own.

    Raises:
        ValueError: the mask is none of the states.
    """

    num_states: int
    mask_id: int

    def __post_init__(self) -> None:
        if isinstance(self.mask_id, bool) or not isinstance(self.mask_id, int):
            raise ValueError(f"mask_id must be one of the states 0..{self.num_states - 1}, got {self.mask_id!r}")
        if not 0 <= self.mask_id < self.num_states:
            raise ValueError(f"mask_id must be one of the states 0..{self.num_states - 1}, got {self.mask_id}")

    def prior(self, sigma: Tensor) -> SparseRow:
        """Masks with 1 - e^-sigma, else any token."""
        index = torch.full((*sigma.shape, 1), self.mask_id, device=sigma.device)
        return SparseRow(torch.exp(-sigma) / (self.num_states - 1), index, -torch.expm1(-sigma)[..., None])

    def rates_into(self, x: Tensor) -> SparseRow:
        """Into the mask at rate 1 from every token, into a token from nowhere."""
        masked = (x == self.mask_id).to(torch.get_default_dtype())
        return self._row(x, masked, masked - 1, torch.zeros_like(masked))

    def rates_out_of(self, x: Tensor) -> SparseRow:
        """Out of every token at rate 1 into the mask, out of the mask nowhere."""
        token = (x != self.mask_id).to(torch.get_default_dtype())
        return self._row(x, torch.zeros_like(token), -token, token)

    def transition_into(self, x: Tensor, sigma: Tensor) -> SparseRow:
        """From a token to itself with e^-sigma, to the mask with 1 - e^-sigma."""
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)).expand(x.shape)
        masked, hidden = x == self.mask_id, -torch.expm1(-sigma)
        stay = torch.where(masked, hidden, torch.exp(-sigma))
        return self._row(x, torch.where(masked, hidden, 0.0), stay, masked.to(stay.dtype))

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v: e^-sigma v at tokens, and at the mask what they lose."""
        at_mask = v[..., self.mask_id] - torch.expm1(-sigma) * (v.sum(-1) - v[..., self.mask_id])
        index = torch.full((*v.shape[:-1], 1), self.mask_id, device=v.device)
        return (v * torch.exp(-sigma)[..., None]).scatter(-1, index, at_mask[..., None])

    def _row(self, x: Tensor, at_tokens: Tensor, at_x: Tensor, at_mask: Tensor) -> SparseRow:
        masked = x == self.mask_id
        other = torch.where(masked, 0 if self.mask_id else 1, x)  # indices are distinct
        index = torch.stack([other, torch.full_like(x, self.mask_id)], -1)
        return SparseRow(at_tokens, index, torch.stack([torch.where(masked, at_tokens, at_x), at_mask], -1))


@dataclass(frozen=True)
class Replacing:
    """Tokens turn into tokens drawn uniformly, themselves among them.

    Args:
        num_states: N.
    """

    num_states: int
    mask_id: None = None

    def prior(self, sigma: Tensor) -> SparseRow:
        """Any state."""
        nothing = torch.zeros(*sigma.shape, 0, dtype=sigma.dtype, device=sigma.device)
        return SparseRow(torch.full_like(sigma, 1 / self.num_states), nothing.long(), nothing)

    def rates_into(self, x: Tensor) -> SparseRow:
        """1/N from every other state."""
        base = torch.full(x.shape, 1 / self.num_states, device=x.device)
        return SparseRow(base, x[..., None], (base - 1)[..., None])

    def rates_out_of(self, x: Tensor) -> SparseRow:
        """The same: Q is symmetric."""
        return self.rates_into(x)

    def transition_into(self, x: Tensor, sigma: Tensor) -> SparseRow:
        """(1 - e^-sigma) / N, and e^-sigma more for x itself."""
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)).expand(x.shape)
        base = -torch.expm1(-sigma) / self.num_states
        return SparseRow(base, x[..., None], (base + torch.exp(-sigma))[..., None])

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """exp(sigma Q) v = e^-sigma v + (1 - e^-sigma)/N sum(v)."""
        sigma = sigma[..., None]
        return torch.exp(-sigma) * v - torch.expm1(-sigma) / self.num_states * v.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Proportional:
    """Sigma(t) = -log(1 - (1 - eps) t): the share of forgotten tokens is proportional to the time.

    Args:
        eps: the share that is left of the tokens at t = 1.
    """

    eps: float = 1e-3

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, dsigma) at t."""
        keep = 1 - self.eps
        return -torch.log1p(-keep * t), keep / (1 - keep * t)

    def time(self, sigma: Tensor) -> Tensor:
        """The t of a sigma."""
        return -torch.expm1(-sigma) / (1 - self.eps)

"""The absorbing graph (16): every token jumps to the mask at rate 1, and the mask stays.

    exp(sQ): a token stays with probability e^-s and is masked with 1 - e^-s
    ratio:   at x = mask, 1 / (e^s - 1) for y = x0 and 0 for the other tokens

No jump leads into a token, so that the reverse process only ever unmasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graphs._checks import check_integer, check_states, rate_dtype, spread
from sedd_graphs.graph import Graph, _check_possible, _level, _vectors
from sedd_graphs.row import Row

__all__ = ["Absorbing"]


class Absorbing(Graph):
    """Tokens that turn into a mask.

    Args:
        vocab_size: V tokens; the graph has N = V + 1 states.
        mask_id: the mask's state, V unless given. A tokenizer with a mask token of its own has it elsewhere, and counts
            it: with V its size, the graph is `Absorbing(V - 1, mask_id=m)`, whose states are its V ids. `Absorbing(V,
            mask_id=m)` has one state more, which is no token, and no one can tell.
    """

    def __init__(self, vocab_size: int, mask_id: int | None = None) -> None:
        self.vocab_size = check_integer("vocab_size", vocab_size, least=1)
        self.num_states = self.vocab_size + 1
        self.mask_id: int = (
            self.vocab_size if mask_id is None else check_integer("mask_id", mask_id, least=0, most=self.vocab_size)
        )
        self._token = 0 if self.mask_id else 1  # stands in where a row would name the mask twice

    def __repr__(self) -> str:
        return f"Absorbing(vocab_size={self.vocab_size}, mask_id={self.mask_id})"

    def rates_into(self, x: Tensor) -> Row:
        """1 from every token into the mask; into a token nothing leads."""
        check_states("x", x, self.num_states)
        masked = (x == self.mask_id).to(rate_dtype())
        return Row(masked, x[..., None], masked[..., None] - 1, self.num_states)

    def rates_out_of(self, x: Tensor) -> Row:
        """1 from a token to the mask; from the mask nothing leads."""
        check_states("x", x, self.num_states)
        moves = (x != self.mask_id).to(rate_dtype())
        return self._token_and_mask(x, -moves, moves)

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A token stays with probability e^-sigma, else becomes the mask."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        masked = x == self.mask_id
        return self._token_and_mask(x, torch.where(masked, 0, (-level).exp()), torch.where(masked, 1, _mask(level)))

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """1 - e^-sigma from every token into the mask; into a token e^-sigma from itself."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        masked = x == self.mask_id
        stay = torch.where(masked, 1, (-level).exp())
        return Row(torch.where(masked, _mask(level), 0), x[..., None], stay[..., None], self.num_states)

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Row:
        """At a mask, 1 / (e^sigma - 1) for x0; at the token x = x0, e^sigma - 1 for the mask; 0 elsewhere."""
        level = _level(sigma, x, x0, self.num_states)
        masked, same = x == self.mask_id, x == x0
        _check_possible(torch.where(same, masked | (level < torch.inf), masked & (level > 0)), x, x0, level)
        gone = torch.where(masked & ~same, level, 1)  # where it does not count, any level whose slope is finite
        from_mask = torch.where(masked & same, 0, -(-gone).exp() / (-gone).expm1())
        odds = torch.where(masked, 0, level).expm1()
        return self._token_and_mask(x0, torch.where(masked, from_mask, 1), torch.where(masked, 1, odds))

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """Tokens keep e^-sigma of their weight, the mask gains the rest."""
        v, level = _vectors(v, sigma, self.num_states)
        kept = (-level).exp()
        at_mask = v[..., self.mask_id]
        out = v * kept[..., None]
        out[..., self.mask_id] = at_mask + _mask(level) * (v.sum(-1) - at_mask)
        return out

    def prior(self, sigma: Tensor) -> Row:
        """The mask with probability 1 - e^-sigma, else any token."""
        level = spread(sigma)
        mask = torch.full_like(level, self.mask_id, dtype=torch.int64)
        return Row((-level).exp() / self.vocab_size, mask[..., None], _mask(level)[..., None], self.num_states)

    def _token_and_mask(self, x: Tensor, at_token: Tensor, at_mask: Tensor) -> Row:
        """0 but at the token x and at the mask; where x is the mask, only there."""
        mask = torch.full_like(x, self.mask_id)
        token = torch.where(x == self.mask_id, self._token, x)
        value = torch.stack([at_token, at_mask], -1)
        return Row(torch.zeros_like(value[..., 0]), torch.stack([token, mask], -1), value, self.num_states)


def _mask(level: Tensor) -> Tensor:
    """1 - e^-sigma, accurate for small sigma."""
    return -(-level).expm1()

"""Absorbing noise at a rate of its own for each token: state-dependent masking, as GenMD4 has it.

    Q[m, x] = w_x for the mask m and every token x,   Q[x, x] = -w_x
    exp(sQ): token x stays with probability e^(-w_x s), and is masked with 1 - e^(-w_x s)
    ratio:   at x = m, 1 / (e^(w_x0 s) - 1) for y = x0 and 0 for the other tokens

Tokens of a large w go first and come back last. Under a schedule sigma(t) token x survives with e^(-w_x sigma(t)): by
`LogLinear` with (1 - t)^w_x, but for eps (GenMD4, Shi et al. 2024, arXiv 2406.04329, has 1 - t^w_x). It is a Markov
chain like any other, so that the score entropy and the bound (9) with its prior hold as they stand.

The rates are given, not learnt: the bound depends on them, and its gradient by them goes through the law of the masks,
which takes a score-function term (GenMD4: REINFORCE leave-one-out) that no loss here has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graphs._checks import check_integer, check_states, describe, rate_dtype, spread
from sedd_graphs._constants import Constant
from sedd_graphs.graph import Graph, _check_possible, _level, _vectors
from sedd_graphs.row import Row

__all__ = ["PacedAbsorbing"]


class PacedAbsorbing(Graph):
    """Tokens that turn into a mask, each at its own rate. Rows of jumps into a state name all N states.

    Args:
        rates: (V,) float, the rate of masking each token, above 0; the graph has N = V + 1 states.
        mask_id: the mask's state, V unless given; the tokens are the other states, in order.

    Raises:
        TypeError: rates are no floating-point tensor.
        ValueError: rates that are not one number a token, not finite or not above 0; mask_id is no state.
    """

    def __init__(self, rates: Tensor, mask_id: int | None = None) -> None:
        if not isinstance(rates, Tensor) or not rates.is_floating_point():
            raise TypeError(f"rates must be a floating-point tensor, got {describe(rates)}")
        if rates.dim() != 1 or len(rates) < 1:
            raise ValueError(f"rates must be (V,), one for each token, got shape {tuple(rates.shape)}")
        wrong = ~((rates > 0) & rates.isfinite())
        if wrong.any():
            raise ValueError(f"rates must be finite and above 0, found {float(rates[wrong][0])}")
        last = self.vocab_size = len(rates)
        self.num_states = last + 1
        self.mask_id: int = last if mask_id is None else check_integer("mask_id", mask_id, least=0, most=last)
        m = self.mask_id
        rates = rates.detach().double()
        self._rates = Constant(torch.cat([rates[:m], rates.new_zeros(1), rates[m:]]))  # of states: the mask's is 0
        self._token = 0 if m else 1  # stands in where a row would name the mask twice

    def __repr__(self) -> str:
        return f"PacedAbsorbing({self.vocab_size} rates, mask_id={self.mask_id})"

    def rates_into(self, x: Tensor) -> Row:
        """Its rate from every token into the mask; into a token nothing leads."""
        check_states("x", x, self.num_states)
        rates = self._rates.on(x.device).to(rate_dtype())
        leaving = torch.zeros(*x.shape, self.num_states, dtype=rates.dtype, device=x.device)
        leaving = leaving.scatter(-1, x[..., None], -rates[x][..., None])
        return Row.full(torch.where((x == self.mask_id)[..., None], rates, leaving))

    def rates_out_of(self, x: Tensor) -> Row:
        """Its rate from a token to the mask; from the mask nothing leads."""
        check_states("x", x, self.num_states)
        rate = self._rates.on(x.device)[x].to(rate_dtype())
        return self._token_and_mask(x, -rate, rate)

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """A token stays with probability e^(-w sigma), else becomes the mask."""
        check_states("x", x, self.num_states)
        noise = self._noise(x, spread(sigma, x.shape))
        masked = x == self.mask_id
        return self._token_and_mask(
            x, torch.where(masked, 0, (-noise).exp()), torch.where(masked, 1, -(-noise).expm1())
        )

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """1 - e^(-w sigma) from every token into the mask; into a token e^(-w sigma) from itself."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        every = self._noise(torch.arange(self.num_states, device=x.device), level[..., None])
        from_all = (-(-every).expm1()).index_fill(-1, torch.tensor([self.mask_id], device=x.device), 1)
        stay = torch.zeros_like(from_all).expand(*x.shape, -1)
        stay = stay.scatter(-1, x[..., None], (-self._noise(x, level)).exp().expand(x.shape)[..., None])
        return Row.full(torch.where((x == self.mask_id)[..., None], from_all, stay))

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Row:
        """At a mask, 1 / (e^(w sigma) - 1) for x0; at the token x = x0, e^(w sigma) - 1 for the mask; 0 elsewhere."""
        level = _level(sigma, x, x0, self.num_states)
        masked, same = x == self.mask_id, x == x0
        _check_possible(torch.where(same, masked | (level < torch.inf), masked & (level > 0)), x, x0, level)
        noise = self._noise(x0, level)
        gone = torch.where(masked & ~same, noise, 1)  # where it does not count, any noise whose slope is finite
        from_mask = torch.where(masked & same, 0, -(-gone).exp() / (-gone).expm1())
        odds = torch.where(masked, 0, noise).expm1()
        return self._token_and_mask(x0, torch.where(masked, from_mask, 1), torch.where(masked, 1, odds))

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """Tokens keep e^(-w sigma) of their weight, the mask gains the rest."""
        v, level = _vectors(v, sigma, self.num_states)
        noise = self._noise(torch.arange(self.num_states, device=v.device), level[..., None])
        gained = (-(-noise).expm1() * v).sum(-1, keepdim=True)
        at = torch.tensor([self.mask_id], device=v.device)
        return (v * (-noise).exp()).index_add(-1, at, gained)

    def _noise(self, x: Tensor, level: Tensor) -> Tensor:
        """W sigma for the states x, in sigma's dtype; 0 for the mask, also at infinite sigma."""
        rate = self._rates.on(x.device)[x].to(level.dtype)
        return torch.where(rate > 0, rate * level, 0)

    def _token_and_mask(self, x: Tensor, at_token: Tensor, at_mask: Tensor) -> Row:
        """0 but at the token x and at the mask; where x is the mask, only there."""
        mask = torch.full_like(x, self.mask_id)
        token = torch.where(x == self.mask_id, self._token, x)
        value = torch.stack([at_token, at_mask], -1)
        return Row(torch.zeros_like(value[..., 0]), torch.stack([token, mask], -1), value, self.num_states)

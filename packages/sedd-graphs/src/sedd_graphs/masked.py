"""Any graph over tokens, with a mask added; and the hybrid of uniform and absorbing noise.

Tokens move among themselves at `rate` times the graph's own speed and are masked at rate `mask_rate`, whichever
they are. Killing at an equal rate commutes with the motion, so that with B = e^(-mask_rate s)

    exp(sQ): among tokens B exp(rate s Q_tokens), from a token to the mask 1 - B, the mask stays.

`Hybrid` is this on the uniform graph; uniform and absorbing noise are its two ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graphs._checks import at_least_float32, check_integer, check_rate, check_states, spread, times, widen
from sedd_graphs.graph import Graph, _check_possible, _level, _vectors
from sedd_graphs.row import Row
from sedd_graphs.uniform import Uniform

__all__ = ["Masked", "Hybrid"]


class Masked(Graph):
    """A graph over V tokens with an absorbing mask state added, N = V + 1.

    Args:
        tokens: a graph over the V tokens alone.
        rate: speed of the motion among tokens, in units of the graph's own.
        mask_rate: rate of masking.
        mask_id: the mask's state, V unless given; the tokens are the other states, in order.

    Raises:
        ValueError: `tokens` has a mask already, a rate is negative or not finite, or mask_id is no state.
    """

    def __init__(self, tokens: Graph, *, rate: float = 1.0, mask_rate: float = 1.0, mask_id: int | None = None) -> None:
        if tokens.mask_id is not None:
            raise ValueError(f"tokens must be a graph without a mask, got {tokens}")
        self.tokens = tokens
        self.rate = check_rate("rate", rate)
        self.mask_rate = check_rate("mask_rate", mask_rate)
        last = tokens.num_states
        self.num_states = last + 1
        self.mask_id: int = last if mask_id is None else check_integer("mask_id", mask_id, least=0, most=last)

    def __repr__(self) -> str:
        return f"Masked({self.tokens}, rate={self.rate}, mask_rate={self.mask_rate}, mask_id={self.mask_id})"

    def rates_into(self, x: Tensor) -> Row:
        """From tokens into a token the graph's rates; into the mask `mask_rate` from every token."""
        token = self._token(x)
        row = self.tokens.rates_into(token)
        row = row.scale(torch.full_like(row.base, self.rate))
        row = row.put(token, row.at(token) - self.mask_rate)
        masked = x == self.mask_id
        return self._join(row, masked, self.mask_rate, torch.zeros_like(row.base))

    def rates_out_of(self, x: Tensor) -> Row:
        """From a token to tokens the graph's rates, to the mask `mask_rate`; from the mask nothing leads."""
        token = self._token(x)
        row = self.tokens.rates_out_of(token)
        row = row.scale(torch.full_like(row.base, self.rate))
        row = row.put(token, row.at(token) - self.mask_rate)
        masked = x == self.mask_id
        return self._join(row, masked, 0.0, torch.where(masked, 0, torch.full_like(row.base, self.mask_rate)))

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """Unmasked with probability B, and then where the graph takes it."""
        token, level = self._token(x), spread(sigma, x.shape)
        row = self.tokens.transition_from(token, times(self.rate, at_least_float32(sigma)))
        masked = x == self.mask_id
        row = row.scale(self._kept(level).expand(x.shape))
        return self._join(row, masked, 0.0, torch.where(masked, 1, self._lost(level)))

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """Into a token B times the graph's probability; into the mask 1 - B from every token."""
        token, level = self._token(x), spread(sigma, x.shape)
        row = self.tokens.transition_into(token, times(self.rate, at_least_float32(sigma))).scale(
            self._kept(level).expand(x.shape)
        )
        masked = x == self.mask_id
        return self._join(row, masked, self._lost(level), masked.to(level.dtype))

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Row:
        """Between tokens the graph's ratio, in which B cancels; at the mask, the graph's p(y | x0) B / (1 - B)."""
        level = widen(_level(sigma, x, x0, self.num_states))
        row = self.tokens.transition_from(self._token(x0), times(self.rate, widen(sigma)))
        masked, from_mask = x == self.mask_id, x0 == self.mask_id
        of_x = torch.where(masked, 1, row.at(self._token(x)))  # of a token, from a token; 1 where it does not count
        lost = torch.where(masked & ~from_mask, self._lost(level), 1)
        odds = times(self.mask_rate, torch.where(masked, 0, level)).expm1()  # (1 - B) / B
        of_token = ~from_mask & (of_x > 0) & (times(self.mask_rate, level) < torch.inf)
        _check_possible(torch.where(masked, lost > 0, of_token), x, x0, level)
        row = row.scale(torch.where(masked, self._kept(level) / lost, 1 / of_x))
        at_mask = torch.where(masked, 1, odds / of_x)
        return self._join(row, masked & from_mask, 0.0, at_mask).to(spread(sigma, x.shape).dtype)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """Tokens as the graph moves them, times B; the mask gains (1 - B) of their weight."""
        v, level = _vectors(v, sigma, self.num_states)
        m = self.mask_id
        tokens = torch.cat([v[..., :m], v[..., m + 1 :]], -1)
        moved = self.tokens.propagate(tokens, times(self.rate, at_least_float32(sigma))) * self._kept(level)[..., None]
        at_mask = v[..., m] + self._lost(level) * tokens.sum(-1)
        return torch.cat([moved[..., :m], at_mask[..., None], moved[..., m:]], -1)

    def prior(self, sigma: Tensor) -> Row:
        """The mask with probability 1 - B, else the graph's prior."""
        level = spread(sigma)
        row = self.tokens.prior(times(self.rate, level)).scale(self._kept(level))
        return self._join(row, torch.zeros_like(level, dtype=torch.bool), 0.0, self._lost(level))

    def _kept(self, level: Tensor) -> Tensor:
        """B."""
        return (-times(self.mask_rate, level)).exp()

    def _lost(self, level: Tensor) -> Tensor:
        """1 - B."""
        return -(-times(self.mask_rate, level)).expm1()

    def _token(self, x: Tensor) -> Tensor:
        """The tokens' own numbering of the states x; any token for the mask."""
        check_states("x", x, self.num_states)
        token = x - (x > self.mask_id).long()
        return torch.where(x == self.mask_id, 0, token)

    def _join(self, row: Row, replaced: Tensor, replacement: Tensor | float, at_mask: Tensor) -> Row:
        """The tokens' row renumbered, with `replacement` for all of it where `replaced`; and the mask's value."""
        other = torch.as_tensor(replacement, dtype=row.base.dtype, device=row.base.device).expand_as(row.base)
        base = torch.where(replaced, other, row.base)
        value = torch.where(replaced[..., None], other[..., None], row.value)
        if row.index.shape[-1] == row.num_states:
            base = torch.zeros_like(base)
        mask = torch.full_like(row.index[..., :1], self.mask_id)
        index = torch.cat([row.index + (row.index >= self.mask_id).long(), mask], -1)
        at_mask = at_mask.to(value.dtype).expand_as(base)
        return Row(base, index, torch.cat([value, at_mask[..., None]], -1), self.num_states)


class Hybrid(Masked):
    """Tokens that turn into other tokens, at `uniform_rate` (1/V - I), and into a mask, at `mask_rate`.

    Args:
        vocab_size: V tokens, at least 2; the graph has N = V + 1 states.
        uniform_rate: rate of jumping to a uniformly random token; 0 is the absorbing graph.
        mask_rate: rate of masking; 0 is the uniform graph, with a mask that nothing reaches.
        mask_id: the mask's state, V unless given.
    """

    def __init__(self, vocab_size: int, *, uniform_rate: float, mask_rate: float, mask_id: int | None = None) -> None:
        uniform = Uniform(vocab_size)
        super().__init__(
            uniform,
            rate=check_rate("uniform_rate", uniform_rate),
            mask_rate=mask_rate,
            mask_id=mask_id,
        )
        self.vocab_size = uniform.vocab_size

    def __repr__(self) -> str:
        rates = f"uniform_rate={self.rate}, mask_rate={self.mask_rate}"
        return f"Hybrid(vocab_size={self.vocab_size}, {rates}, mask_id={self.mask_id})"

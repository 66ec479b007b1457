"""The uniform graph (15): every token jumps to a token drawn uniformly, at rate 1.

    Q       = 1/N - I
    exp(sQ) = (1 - e^-s) / N + e^-s I
    ratio:    with q = (e^s - 1) / (e^s - 1 + N): at x = x0 it is q for every y != x; else 1/q for x0 and 1 elsewhere

The rates are scaled by 1/N; without that the noise grows with the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graphs._checks import check_integer, check_states, rate_dtype, spread
from sedd_graphs.graph import Graph, _check_possible, _level, _uniform_prior, _vectors
from sedd_graphs.row import Row

__all__ = ["Uniform"]


class Uniform(Graph):
    """Tokens that turn into any other token.

    Args:
        vocab_size: V tokens; the graph's states are these, N = V, at least 2.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = self.num_states = check_integer("vocab_size", vocab_size, least=2)

    def __repr__(self) -> str:
        return f"Uniform(vocab_size={self.vocab_size})"

    def rates_into(self, x: Tensor) -> Row:
        """1/N from every state."""
        check_states("x", x, self.num_states)
        base = torch.full_like(x, 1 / self.num_states, dtype=rate_dtype())
        return Row(base, x[..., None], base[..., None] - 1, self.num_states)

    def rates_out_of(self, x: Tensor) -> Row:
        """1/N to every state: Q is symmetric."""
        return self.rates_into(x)

    def transition_from(self, x: Tensor, sigma: Tensor) -> Row:
        """(1 - e^-sigma) / N everywhere, and e^-sigma more at x."""
        check_states("x", x, self.num_states)
        level = spread(sigma, x.shape)
        leak = -(-level).expm1() / self.num_states
        stay = leak + (-level).exp()
        return Row(leak.expand(x.shape), x[..., None], stay.expand(x.shape)[..., None], self.num_states)

    def transition_into(self, x: Tensor, sigma: Tensor) -> Row:
        """exp(sigma Q) is symmetric."""
        return self.transition_from(x, sigma)

    def ratio(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Row:
        """Q everywhere but at x when x = x0; else 1/q at x0 and 1 everywhere else."""
        level = _level(sigma, x, x0, self.num_states)
        # q, divided through by e^s lest e^s overflow. Not 1 - N / (e^s - 1 + N): equal, but it cancels to 0 or below
        moved = -(-level).expm1()
        q = moved / (moved + self.num_states * (-level).exp())
        same = x == x0
        _check_possible(same | (level > 0), x, x0, level)
        safe = torch.where(same, 1, level)  # 1 / q is infinite at 0, and its slope would be NaN times 0
        at_x0 = torch.where(same, 1, 1 - self.num_states * (-safe).exp() / (-safe).expm1())
        return Row(torch.where(same, q, 1), x0[..., None], at_x0[..., None], self.num_states)

    def propagate(self, v: Tensor, sigma: Tensor) -> Tensor:
        """e^-sigma v and an equal share of the rest for every state."""
        v, level = _vectors(v, sigma, self.num_states)
        share = -(-level).expm1() / self.num_states * v.sum(-1)
        return torch.addcmul(share[..., None], v, (-level).exp()[..., None])

    def prior(self, sigma: Tensor) -> Row:
        """1/N, at every sigma."""
        return _uniform_prior(sigma, self.num_states)

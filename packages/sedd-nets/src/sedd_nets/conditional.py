"""Networks that predict the clean token: from p(x0 = y | the unmasked context) to the score and back.

For an absorbing graph the score of a masked position is s(x)_y = c_y / (e^sigma - 1), where c_y is the probability
of the token y given the unmasked tokens, whatever sigma (Ou et al. 2024). So a network that outputs a normalised c is
a score model too. RADD and MDLM are trained that way.
"""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor

from sedd_nets.checks import log_expm1, over_last_axis
from sedd_nets.transformer import Transformer

__all__ = ["ConditionalTransformer"]


class ConditionalTransformer(Transformer, ABC):
    """A trunk whose logits, normalised over the tokens, are log p(x0 = y | the unmasked context).

    Attributes:
        mask_id: the mask state, which no clean token is.
    """

    def __init__(
        self,
        num_states: int,
        *,
        width: int,
        depth: int,
        heads: int,
        cond_dim: int | None,
        dropout: float,
        length: int,
        mask_id: int | None,
    ) -> None:
        super().__init__(
            num_states, width=width, depth=depth, heads=heads, cond_dim=cond_dim, dropout=dropout, length=length
        )
        self.mask_id = num_states - 1 if mask_id is None else mask_id
        if not 0 <= self.mask_id < num_states:
            raise ValueError(f"mask_id {mask_id} is outside 0..{num_states - 1}")

    def log_conditional(self, x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        """Log p(x0 = y | the unmasked tokens of x), the posterior of the clean token at masked positions.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
            where: (B, L) bool; the rows to compute.

        Returns:
            (B, L, N) or (M, N) float32, normalised over the tokens, -inf at the mask. At an unmasked position it is
            what the network thinks, not the certainty that the token stays.
        """
        hidden, _, _ = self.rows(x, sigma, where)
        return torch.log_softmax(self.token_logits(hidden), dim=-1)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., N) of rows (..., D) of `hidden`, -inf at the mask."""
        logits: Tensor = self.output_layer.linear(hidden)
        logits[..., self.mask_id] = -torch.inf
        return logits

    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The log-score of the given rows, log c_y - log(e^sigma - 1).

        The entry at y = x is 0. No jump leads into an unmasked state, so the rest of its row is never used; the
        entry at the mask there is log(e^sigma - 1), finite, so that a weight of 0 makes it vanish.

        Args:
            hidden: (..., D), rows of `hidden`.
            x: (...) int64, the states there.
            sigma: the total noise there, its shape a leading part of x's; positive.

        Returns:
            (..., N) float32 (float64 for a float64 network).
        """
        logits = self.token_logits(hidden)
        log_rate = log_expm1(over_last_axis(sigma, x).to(logits.dtype))
        log_score = logits - (torch.logsumexp(logits, dim=-1, keepdim=True) + log_rate)
        log_score[..., self.mask_id] = log_rate[..., 0]
        return log_score.scatter_(-1, x.unsqueeze(-1), 0.0)

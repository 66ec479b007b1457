"""The same trunk read from left to right: the autoregressive model that diffusion models are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_nets.attention import ScaledDotProduct
from sedd_nets.caching import KeyValueCache
from sedd_nets.documents import Documents
from sedd_nets.pretrained import sizes_of
from sedd_nets.transformer import Transformer

__all__ = ["Causal"]


class Causal(Transformer):
    """A transformer whose row i sees x_1 ... x_i and gives the logits of the token behind them.

    Sizes, blocks and head are RADD's, so that a comparison with it, or but for the conditioning with SEDD, is one of
    objectives. Called with states alone, `net(x)`; the noise level that the family's signature has room for is ignored.

    Args:
        num_states: N; the last one is free to mark the beginning, as it marks the mask elsewhere.
        width: D.
        depth: the number of blocks.
        heads: the attention heads of a block.
        dropout: on the output of attention and MLP, in training mode.
        length: the longest sequence accepted.

    Raises:
        ValueError: a size is not positive, heads do not divide the width, or dropout is no probability.
    """

    def __init__(
        self, num_states: int, *, width: int, depth: int, heads: int, dropout: float = 0.1, length: int = 1024
    ) -> None:
        super().__init__(
            num_states, width=width, depth=depth, heads=heads, cond_dim=None, dropout=dropout, length=length
        )
        self.attention = ScaledDotProduct(causal=True)

    def forward(  # type: ignore[override]  # its logits are no log-scores, and do not come apart
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        where: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            x: (B, L) int64 states.
            sigma: ignored.
            where: (B, L) bool; the rows to compute.
            positions: (M,) int64, the same as indices into x.flatten().
            condition: None: the trunk is not modulated.
            documents: where attention stays within; None: each row is one text.
            dropout_seeds: as for the other networks.
            cache: keys and values of the positions before x, to which x's are added; the answer is the same.

        Returns:
            (B, L, N), or (M, N) for the M true positions of `where` or for `positions`; float32.

        Raises:
            ValueError, IndexError: as the other networks.
        """
        unused = torch.zeros(x.shape[:1], device=x.device)
        return super().forward(
            x,
            unused,
            where,
            positions=positions,
            condition=condition,
            documents=documents,
            dropout_seeds=dropout_seeds,
            cache=cache,
        )

    def sees(self, past: int, x: Tensor) -> Tensor:
        """Each position itself and those before it, (L, past + L) bool."""
        place = torch.arange(past + x.shape[1], device=x.device)
        return place[past:, None] >= place

    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits (..., N) of the next token, from rows (..., D) of `hidden`; x and sigma do not count."""
        logits: Tensor = self.output_layer.linear(hidden)
        return logits

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> Causal:
        """A fresh network of the sizes in a nested config. Raises ValueError for a wrong value."""
        return cls(num_states, **sizes_of(config))

    def model_section(self) -> dict[str, Any]:
        """The sizes, named as in the published config.json's `model` section."""
        return {
            "type": "causal",
            "hidden_size": self.width,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
        }

"""The score entropy discrete diffusion network (Lou, Meng & Ermon, ICML 2024): the log-score of every state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sedd_nets.checks import log_expm1, over_last_axis
from sedd_nets.pretrained import model_section_of
from sedd_nets.transformer import Transformer

__all__ = ["SEDD"]


class SEDD(Transformer):
    """A transformer, conditioned on sigma by adaLN-zero, whose output is the log-score itself.

    log s(x)_y = logit_y - log(e^sigma - 1) - log(N - 1) where `scale_by_sigma` (absorbing graphs: the true score of
    a mask is p(y | context) / (e^sigma - 1), so that a fresh network, whose logits are 0, starts at the uniform
    guess), else the logit (uniform graphs). The entry at y = x is log 1 = 0.

    Args:
        num_states: N, the mask state included.
        width, depth, heads: D, the number of blocks, the attention heads of a block.
        cond_dim: width of the embedding of sigma.
        dropout: on the output of attention and MLP, in training mode.
        scale_by_sigma: see above; True for absorbing graphs.
        length: the longest sequence accepted.

    Raises:
        ValueError: a size is not positive, heads do not divide the width, or dropout is no probability.
    """

    def __init__(
        self,
        num_states: int,
        *,
        width: int,
        depth: int,
        heads: int,
        cond_dim: int = 128,
        dropout: float = 0.1,
        scale_by_sigma: bool = True,
        length: int = 1024,
    ) -> None:
        super().__init__(
            num_states, width=width, depth=depth, heads=heads, cond_dim=cond_dim, dropout=dropout, length=length
        )
        self.scale_by_sigma = scale_by_sigma

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> SEDD:
        """A fresh network of the sizes in a published config (nested, with a `model` section)."""
        model = model_section_of(config, "SEDD", ("hidden_size", "cond_dim", "length", "n_blocks", "n_heads"))
        graph = config.get("graph", {}).get("type")
        return cls(
            num_states,
            width=model["hidden_size"],
            depth=model["n_blocks"],
            heads=model["n_heads"],
            cond_dim=model["cond_dim"],
            dropout=model.get("dropout", 0.0),
            scale_by_sigma=model.get("scale_by_sigma", graph == "absorb"),
            length=model["length"],
        )

    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""
        return {
            "type": "ddit",
            "hidden_size": self.width,
            "cond_dim": self.cond_dim,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "scale_by_sigma": self.scale_by_sigma,
            "dropout": self.dropout,
        }

    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The log-score of the given rows.

        Args:
            hidden: (..., D), rows of `hidden`.
            x: (...) int64, the states there.
            sigma: the total noise there, its shape a leading part of x's.

        Returns:
            (..., N) float32 (float64 for a float64 network).
        """
        log_score: Tensor = self.output_layer.linear(hidden)
        sigma = over_last_axis(sigma, x).to(log_score.dtype)
        if self.scale_by_sigma:
            # In place: the tensor is fresh, the largest there is, and no one's backward needs its old value.
            log_score.sub_(log_expm1(sigma) + math.log(self.num_states - 1))
        return log_score.scatter_(-1, x.unsqueeze(-1), 0.0)

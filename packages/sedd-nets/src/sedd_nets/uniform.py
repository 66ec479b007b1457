"""What the networks of the uniform graph make of the trunk's logits: the log-score, from a guess of the clean token.

UDLM (Schiff et al. 2024, arXiv 2412.10193) and Duo (Sahoo et al. 2025, arXiv 2506.10892) predict the clean token under
the uniform graph, w_y = p(x0 = y | the other positions of x) = softmax(logits)_y. A token keeps its state with
probability a = e^-sigma, else draws any of the N, so that p_t(y) is a w_y + (1 - a) / N and

    s(x)_y = (1 + r w_y) / (1 + r w_x),        r = N / (e^sigma - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_nets.checks import log_expm1, over_last_axis
from sedd_nets.conditioning import ClassTable
from sedd_nets.config import boolean, integer, section
from sedd_nets.pretrained import sizes_of
from sedd_nets.transformer import Transformer

__all__ = ["UDLM"]


class UDLM(Transformer):
    """A transformer with adaLN-zero that predicts clean tokens under the uniform graph; UDLM's and Duo's.

    Args:
        num_states: N, all of them tokens.
        width: D.
        depth: the number of blocks.
        heads: the attention heads of a block.
        cond_dim: width of the embedding of sigma.
        dropout: on the output of attention and MLP, in training mode.
        length: the longest sequence accepted.
        time_conditioning: whether the trunk sees sigma; the published checkpoints do.
        classes: the labels that `condition` takes, 0 for none. Their table has one more row, for no label (-1), and is
            added behind the activation: c = silu(embed(sigma)) + silu(table[label]).

    Raises:
        ValueError: a size is not positive, heads do not divide the width, or dropout is no probability.
    """

    key_prefix: ClassVar[str] = "backbone."

    def __init__(
        self,
        num_states: int,
        *,
        width: int,
        depth: int,
        heads: int,
        cond_dim: int = 128,
        dropout: float = 0.1,
        length: int = 1024,
        time_conditioning: bool = True,
        classes: int = 0,
    ) -> None:
        super().__init__(
            num_states, width=width, depth=depth, heads=heads, cond_dim=cond_dim, dropout=dropout, length=length
        )
        self.time_conditioning = time_conditioning
        self.cond_map = ClassTable(classes, cond_dim) if classes else None
        self.sections = {"tokens": num_states}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> UDLM:
        """A fresh network of the sizes in a nested config. Raises ValueError for a wrong value."""
        model = section(config, "model")
        graph = section(config, "graph", default={"type": "uniform"}).get("type")
        if graph != "uniform":
            raise ValueError(f"config.json: graph.type is {graph!r:.100}, and this network is the uniform graph's")
        guided = boolean(model, "cfg", default=False)
        return cls(
            num_states,
            **sizes_of(config, "cond_dim"),
            time_conditioning=boolean(model, "time_conditioning", default=True),
            classes=integer(model, "cfg_num_classes") if guided else 0,
        )

    def model_section(self) -> dict[str, Any]:
        """The sizes, named as in the published config.json."""
        classes = 0 if self.cond_map is None else self.cond_map.classes
        return {
            "type": "udlm",
            "hidden_size": self.width,
            "cond_dim": self.cond_dim,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
            "time_conditioning": self.time_conditioning,
        } | ({"cfg": True, "cfg_num_classes": classes} if classes else {})

    def graph_section(self) -> dict[str, Any]:
        """The uniform graph."""
        return {"type": "uniform"}

    def conditioning(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor | None:
        """As the trunk's, of sigma = 0 unless conditioned on time; with a table of classes, its silu added."""
        sigma = sigma if self.time_conditioning else torch.zeros_like(sigma)
        if self.cond_map is None or condition is None:
            return super().conditioning(x, sigma, condition)
        c = super().conditioning(x, sigma, None)
        labels: Tensor = self.cond_map(condition)
        return labels if c is None else c + labels

    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The log-score of the given rows, log(1 + r w_y) - log(1 + r w_x) with r = N / (e^sigma - 1).

        Args:
            hidden: (..., D), rows of `hidden`.
            x: (...) int64, the states there.
            sigma: the total noise there, its shape a leading part of x's; positive.

        Returns:
            (..., N) float32 (float64 for a float64 network), 0 at y = x.
        """
        logits: Tensor = self.output_layer.linear(hidden)
        log_r = math.log(self.num_states) - log_expm1(over_last_axis(sigma, x).to(logits.dtype))
        lifted = F.softplus(logits + (log_r - torch.logsumexp(logits, dim=-1, keepdim=True)))
        return lifted - lifted.gather(-1, x.unsqueeze(-1))

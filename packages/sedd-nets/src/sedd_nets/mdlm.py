"""The network of Sahoo et al. 2024 (arXiv 2406.07524): SEDD's trunk, trained to predict the clean tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_nets.conditional import ConditionalTransformer
from sedd_nets.pretrained import model_section_of

__all__ = ["MDLM"]


class MDLM(ConditionalTransformer):
    """A transformer with adaLN-zero whose noise level, unless `time_conditioning`, is 0 at every step.

    The zero goes into the trunk only; the score is made with the true sigma.

    Args:
        num_states: N, the mask state included.
        width, depth, heads: D, the number of blocks, the attention heads of a block.
        cond_dim: width of the embedding of sigma.
        dropout: on the output of attention and MLP, in training mode.
        length: the longest sequence accepted.
        mask_id: the mask state; the last one unless given.
        time_conditioning: whether the trunk sees sigma; the published checkpoints do not.

    Raises:
        ValueError: a size is not positive, heads do not divide the width, dropout is no probability, or the mask is
            no state.
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
        mask_id: int | None = None,
        time_conditioning: bool = False,
    ) -> None:
        super().__init__(
            num_states,
            width=width,
            depth=depth,
            heads=heads,
            cond_dim=cond_dim,
            dropout=dropout,
            length=length,
            mask_id=mask_id,
        )
        self.time_conditioning = time_conditioning
        self.sections = {"tokens": num_states - 1, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> MDLM:
        """A fresh network of the sizes in a config: nested under `model`, or flat as transformers writes it.

        Raises:
            ValueError: another family's config.
        """
        if config.get("model_type") == "mdlm":
            renamed = {"hidden_dim": "hidden_size", "model_length": "length"}
            config = {"model": {renamed.get(name, name): value for name, value in config.items()}}
        model = model_section_of(config, "MDLM", ("hidden_size", "cond_dim", "length", "n_blocks", "n_heads"))
        return cls(
            num_states,
            width=model["hidden_size"],
            depth=model["n_blocks"],
            heads=model["n_heads"],
            cond_dim=model["cond_dim"],
            dropout=model.get("dropout", 0.0),
            length=model["length"],
            mask_id=model.get("mask_id"),
            time_conditioning=model.get("time_conditioning", False),
        )

    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""
        return {
            "hidden_size": self.width,
            "cond_dim": self.cond_dim,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
            "time_conditioning": self.time_conditioning,
        } | ({} if self.mask_id == self.num_states - 1 else {"mask_id": self.mask_id})

    def conditioning(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor | None:
        """As the trunk's, of sigma = 0 unless the network is conditioned on time."""
        return super().conditioning(x, sigma if self.time_conditioning else torch.zeros_like(sigma), condition)

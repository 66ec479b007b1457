"""The time-free network of Ou et al. 2024 (arXiv 2406.03736): the conditional probabilities of the clean tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sedd_nets.conditional import ConditionalTransformer
from sedd_nets.pretrained import model_section_of

__all__ = ["RADD"]


class RADD(ConditionalTransformer):
    """A transformer that does not know the noise level: plain layer norms with bias, nothing modulated.

    Args:
        num_states: N, the mask state included.
        width, depth, heads: D, the number of blocks, the attention heads of a block.
        dropout: on the output of attention and MLP, in training mode.
        length: the longest sequence accepted.
        mask_id: the mask state; the last one unless given.

    Raises:
        ValueError: a size is not positive, heads do not divide the width, dropout is no probability, or the mask is
            no state.
    """

    def __init__(
        self,
        num_states: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.02,
        length: int = 1024,
        mask_id: int | None = None,
    ) -> None:
        super().__init__(
            num_states,
            width=width,
            depth=depth,
            heads=heads,
            cond_dim=None,
            dropout=dropout,
            length=length,
            mask_id=mask_id,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> RADD:
        """A fresh network of the sizes in a published config. Raises ValueError for another family's."""
        model = model_section_of(config, "RADD", ("hidden_size", "length", "n_blocks", "n_heads"))
        if model.get("type") == "causal":
            raise ValueError("this config.json is not RADD's: it describes a left-to-right network, Causal")
        if "cond_dim" in model:
            raise ValueError(
                "this config.json is not RADD's: its `model` section has a cond_dim, as SEDD and MDLM have"
            )
        return cls(
            num_states,
            width=model["hidden_size"],
            depth=model["n_blocks"],
            heads=model["n_heads"],
            dropout=model.get("dropout", 0.0),
            length=model["length"],
            mask_id=model.get("mask_id"),
        )

    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""
        return {
            "type": "ddit",
            "hidden_size": self.width,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
        } | ({} if self.mask_id == self.num_states - 1 else {"mask_id": self.mask_id})

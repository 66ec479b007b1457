"""What the published networks make of the trunk's logits: a log-score, log p_t(y) / p_t(x), by three parameterisations.

SEDD (Lou, Meng & Ermon, ICML 2024) predicts the log-score itself,

    log s(x)_y = logit_y - log(e^sigma - 1) - log(N - 1),

without the shift where the graph is not absorbing. RADD (Ou et al. 2024, arXiv 2406.03736) and MDLM (Sahoo et al. 2024,
arXiv 2406.07524) predict the clean token. For an absorbing graph the score of a masked position is

    s(x)_y = c_y / (e^sigma - 1),        c_y = p(x0 = y | the unmasked tokens of x) = softmax(logits)_y,

with c the same whatever sigma (Ou et al.), so that a network which outputs a normalised c is a score model too.
"""

from __future__ import annotations

import math
import os
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_nets.causal import Causal
from sedd_nets.checks import log_expm1, over_last_axis
from sedd_nets.pretrained import model_section_of, read_config, read_weights, sizes_of
from sedd_nets.transformer import LinearHead, Transformer

__all__ = ["MDLM", "RADD", "SEDD", "ConditionalTransformer", "from_pretrained"]


class SEDD(Transformer):
    """A transformer, conditioned on sigma by adaLN-zero, whose output is the log-score itself.

    log s(x)_y = logit_y - log(e^sigma - 1) - log(N - 1) where `scale_by_sigma` (absorbing graphs: the true score of
    a mask is p(y | context) / (e^sigma - 1), so that a fresh network, whose logits are 0, starts at the uniform
    guess), else the logit (uniform graphs). The entry at y = x is log 1 = 0.

    Args:
        num_states: N, the mask state included.
        width: D.
        depth: the number of blocks.
        heads: the attention heads of a block.
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
        model = model_section_of(config, "SEDD", ("cond_dim",))
        graph = config.get("graph", {}).get("type")
        return cls(
            num_states,
            **sizes_of(model),
            cond_dim=model["cond_dim"],
            scale_by_sigma=model.get("scale_by_sigma", graph == "absorb"),
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

    def linear_head(self, x: Tensor, sigma: Tensor) -> LinearHead:
        """`head` as weight, bias and the shift -log(e^sigma - 1) - log(N - 1), if it scales by sigma.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
        """
        linear, sigma = self.output_layer.linear, over_last_axis(sigma, x).reshape(sigma.shape)
        shift = -(log_expm1(sigma) + math.log(self.num_states - 1)) if self.scale_by_sigma else None
        return LinearHead(linear.weight, linear.bias, shift)


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


class RADD(ConditionalTransformer):
    """A transformer that does not know the noise level: plain layer norms with bias, nothing modulated.

    Args:
        num_states: N, the mask state included.
        width: D.
        depth: the number of blocks.
        heads: the attention heads of a block.
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
        model = model_section_of(config, "RADD")
        if model.get("type") == "causal":
            raise ValueError("this config.json is not RADD's: it describes a left-to-right network, Causal")
        if "cond_dim" in model:
            raise ValueError(
                "this config.json is not RADD's: its `model` section has a cond_dim, as SEDD and MDLM have"
            )
        return cls(
            num_states,
            **sizes_of(model),
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


class MDLM(ConditionalTransformer):
    """A transformer with adaLN-zero whose noise level, unless `time_conditioning`, is 0 at every step.

    The zero goes into the trunk only; the score is made with the true sigma.

    Args:
        num_states: N, the mask state included.
        width: D.
        depth: the number of blocks.
        heads: the attention heads of a block.
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
        model = model_section_of(config, "MDLM", ("cond_dim",))
        return cls(
            num_states,
            **sizes_of(model),
            cond_dim=model["cond_dim"],
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


def from_pretrained(
    folder_or_name: str | os.PathLike[str], *, revision: str | None = None
) -> SEDD | RADD | MDLM | Causal:
    """The network of a checkpoint folder or hub repository, of whichever family it is.

    MDLM's keys begin with `backbone.`; SEDD embeds sigma, RADD does not; a `Causal` network has RADD's keys, and its
    config says what it is. The schedule and the graph that belong to the network are in its `sections`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `SEDD.from_pretrained`.
    """
    config = read_config(folder_or_name, revision=revision)
    stored = read_weights(folder_or_name, revision=revision)
    family: type[SEDD | RADD | MDLM | Causal]
    if any(key.startswith(MDLM.key_prefix) for key in stored):
        family = MDLM
    elif any(key.startswith("sigma_map.") for key in stored):
        family = SEDD
    else:
        family = Causal if Causal.describes(config) else RADD
    return family.from_checkpoint(config, stored, source=os.fspath(folder_or_name))

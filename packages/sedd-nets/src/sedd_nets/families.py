"""What the published networks make of the trunk's logits: a log-score, log p_t(y) / p_t(x), under an absorbing graph.

SEDD (Lou, Meng & Ermon, ICML 2024) predicts the log-score itself,

    log s(x)_y = logit_y - log(e^sigma - 1) - log(N - 1),

without the shift where the graph is not absorbing. RADD (Ou et al. 2024, arXiv 2406.03736) and MDLM (Sahoo et al. 2024,
arXiv 2406.07524) predict the clean token. For an absorbing graph the score of a masked position is

    s(x)_y = c_y / (e^sigma - 1),        c_y = p(x0 = y | the unmasked tokens of x) = softmax(logits)_y,

with c the same whatever sigma (Ou et al.), so that a network which outputs a normalised c is a score model too.
For the uniform graph see `sedd_nets.uniform`.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sedd_nets.checks import at_least_float32, log_expm1, over_last_axis
from sedd_nets.config import boolean, integer, section
from sedd_nets.layers import Unembedding
from sedd_nets.pretrained import sizes_of
from sedd_nets.transformer import LinearHead, Transformer

__all__ = ["MDLM", "RADD", "SEDD", "ConditionalTransformer"]

ROWS_AT_A_TIME = 1024
"""Rows whose float32 copies exist together: 200 MB at 50,258 states."""


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
        scale_by_sigma: see above. True where the graph has a mask, False where tokens only turn into others: there is
            no default, for a fresh network of the other kind starts at hundreds of nats a token.
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
        scale_by_sigma: bool,
        length: int = 1024,
    ) -> None:
        super().__init__(
            num_states, width=width, depth=depth, heads=heads, cond_dim=cond_dim, dropout=dropout, length=length
        )
        self.scale_by_sigma = scale_by_sigma

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> SEDD:
        """A fresh network of the sizes in a nested config. Raises ValueError for a wrong value."""
        absorbing = section(config, "graph", default={}).get("type") == "absorb"
        scaled = boolean(section(config, "model"), "scale_by_sigma", default=absorbing)
        return cls(num_states, **sizes_of(config, "cond_dim"), scale_by_sigma=scaled)

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

    def head_apart(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The logits as they are made, and the shift of each row in float32; see `Transformer.head_apart`."""
        linear: Any = self.output_layer.linear
        if not isinstance(linear, Unembedding):  # an adapter around it
            return super().head_apart(hidden, x, sigma)
        rows = linear.as_made(hidden)
        level = over_last_axis(sigma, x)[..., 0].expand(x.shape)
        if not self.scale_by_sigma:
            return rows, torch.zeros_like(level)
        return rows, -(log_expm1(level) + math.log(self.num_states - 1))

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
        # What such a network predicts is the same under every schedule, so that its checkpoint may name any.
        self.sections = {"tokens": num_states - 1, "noise": {"type": "loglinear"}}

    def graph_section(self) -> dict[str, Any]:
        """The absorbing graph, with its mask where that is not the last state."""
        return {"type": "absorb"} | ({} if self.mask_id == self.num_states - 1 else {"mask_id": self.mask_id})

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

    def posterior_head(self) -> LinearHead:
        """The logits of the clean token as weight and bias, for a loss that joins head and cross-entropy."""
        return LinearHead(self.output_layer.linear.weight, self.output_layer.linear.bias, None)

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

    def head_apart(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The logits as they are made, and the shift of each row in float32; see `Transformer.head_apart`.

        Their sums are taken in float32, some rows at a time.
        """
        linear: Any = self.output_layer.linear
        if not isinstance(linear, Unembedding):  # an adapter around it
            return super().head_apart(hidden, x, sigma)
        rows = linear.as_made(hidden)
        rows[..., self.mask_id] = -torch.inf
        parts = torch.split(rows.flatten(0, -2), ROWS_AT_A_TIME)
        total = torch.cat([at_least_float32(part).logsumexp(-1) for part in parts]).view(x.shape)
        log_rate = log_expm1(over_last_axis(sigma, x)[..., 0].expand(x.shape).to(total.dtype))
        shift = -(total + log_rate)
        rows[..., self.mask_id] = (log_rate - shift).to(rows.dtype)  # finite, as in `head`, and as little used
        return rows, shift


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
        """A fresh network of the sizes in a nested config. Raises ValueError for a wrong value."""
        return cls(num_states, **sizes_of(config), mask_id=mask_of(config, num_states))

    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""
        return {
            "type": "ddit",
            "hidden_size": self.width,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
        }


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
        if time_conditioning:
            del self.sections["noise"]  # the trunk has seen the levels of one schedule: which, is to be said

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> MDLM:
        """A fresh network of the sizes in a nested config. Raises ValueError for a wrong value."""
        return cls(
            num_states,
            **sizes_of(config, "cond_dim"),
            mask_id=mask_of(config, num_states),
            time_conditioning=boolean(section(config, "model"), "time_conditioning", default=False),
        )

    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""
        return {
            "type": "mdlm",
            "hidden_size": self.width,
            "cond_dim": self.cond_dim,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
            "time_conditioning": self.time_conditioning,
        }

    def conditioning(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor | None:
        """As the trunk's, of sigma = 0 unless the network is conditioned on time."""
        return super().conditioning(x, sigma if self.time_conditioning else torch.zeros_like(sigma), condition)


def mask_of(config: Mapping[str, Any], num_states: int) -> int | None:
    """Where a config has the mask of a network for the absorbing graph; None for the last state.

    Raises:
        ValueError: another graph, or no state.
    """
    graph = section(config, "graph", default={"type": "absorb"})
    if graph.get("type") != "absorb":
        raise ValueError(
            f"config.json: graph.type is {graph.get('type')!r:.100}, and must be 'absorb' for a network that predicts "
            "the tokens behind masks"
        )
    return integer(graph, "mask_id", default=num_states - 1, least=0, most=num_states - 1)

"""The trunk that the published score networks share: embedding, blocks, final norm, and a head that is called apart.

What a network makes of the logits (its parameterisation) is the subclass's `head`.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sedd_nets.attention import Attention, sdpa
from sedd_nets.blocks import Block, OutputLayer, SigmaEmbedding, TokenEmbedding
from sedd_nets.checks import check_states, over_last_axis
from sedd_nets.pretrained import load_strictly, read_config, read_weights, write_checkpoint
from sedd_nets.rotary import Rotary

__all__ = ["Transformer"]


class Transformer(nn.Module, ABC):
    """A score model `(x, sigma) -> log_score` with a transformer trunk.

    Attributes:
        attention: the callable that attends, (B, L, 3, H, d) -> (B, L, H, d); assign another at any time.
        checkpoint_activations: when True, a backward pass keeps only each block's input and computes the block again
            (`torch.utils.checkpoint`, non-reentrant); assign at any time, results are the same.
        sections: what a checkpoint's config.json says besides `model`: `tokens`, `graph`, `noise`, ...; plain
            values that the network itself does not use, kept for whoever does and written back by `save_pretrained`.
    """

    key_prefix: ClassVar[str] = ""

    def __init__(
        self, num_states: int, *, width: int, depth: int, heads: int, cond_dim: int | None, dropout: float, length: int
    ) -> None:
        super().__init__()
        check_sizes(num_states=num_states, width=width, depth=depth, heads=heads, length=length)
        if cond_dim is not None:
            check_sizes(cond_dim=cond_dim)
        if width % (2 * heads):
            raise ValueError(f"width {width} over {heads} heads: every head needs an even, whole number of channels")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability below 1; got {dropout}")
        self.num_states, self.width, self.depth, self.heads = num_states, width, depth, heads
        self.cond_dim, self.dropout, self.length = cond_dim, dropout, length
        self.attention: Attention = sdpa
        self.checkpoint_activations = False
        self.sections: dict[str, Any] = {}

        self.vocab_embed = TokenEmbedding(num_states, width)
        self.sigma_map = None if cond_dim is None else SigmaEmbedding(cond_dim)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, cond_dim, dropout) for _ in range(depth))
        self.output_layer = OutputLayer(num_states, width, cond_dim)

    @classmethod
    @abstractmethod
    def from_model_section(cls, config: Mapping[str, Any], num_states: int) -> Self:
        """A fresh network of the sizes that a checkpoint's config gives. Raises ValueError for another family's."""

    @abstractmethod
    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""

    @abstractmethod
    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores of the rows that `hidden` gives: hidden (..., D), x (...), sigma a leading part; (..., N)."""

    def conditioning(self, x: Tensor, sigma: Tensor) -> Tensor | None:
        """What modulates the blocks: (B, 1 or L, cond_dim) float32, or None for a network without conditioning."""
        sigma = over_last_axis(sigma, x)
        if self.sigma_map is None:
            return None
        return F.silu(self.sigma_map(sigma))

    def hidden(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What enters the head.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.

        Returns:
            (B, L, D), after the final norm.

        Raises:
            ValueError: x is no (B, L) or too long, or sigma's shape is no leading part of x's.
            IndexError: a state is out of range.
        """
        check_states(x, self.length)
        c = self.conditioning(x, sigma)
        cos, sin = self.rotary_emb(x.shape[1])
        h = self.vocab_embed(x)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, c, cos, sin, self.attention, use_reentrant=False)
            else:
                h = block(h, c, cos, sin, self.attention)
        out: Tensor = self.output_layer(h, c)
        return out

    def forward(self, x: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
        """The log-score, log p_t(y) / p_t(x) for every state y of every position.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) total noise a sequence, or (B, L) a position.
            where: (B, L) bool; the rows to compute. The head sees those only.

        Returns:
            (B, L, N), or (M, N) for the M true positions of `where` in row-major order; float32.

        Raises:
            ValueError: x, sigma or where has another shape, or the sequence is too long.
            IndexError: a state is out of range.
        """
        if where is None:
            return self.head(self.hidden(x, sigma), x, sigma)
        if where.shape != x.shape or where.dtype != torch.bool:
            raise ValueError(
                f"where must be a bool mask of x's shape {tuple(x.shape)}; got {where.dtype} {tuple(where.shape)}"
            )
        rows = over_last_axis(sigma, x).expand(*x.shape, 1)[..., 0][where]
        return self.head(self.hidden(x, sigma)[where], x[where], rows)

    @classmethod
    def from_pretrained(cls, folder_or_name: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """The network of a checkpoint folder or of a repository on the Hugging Face hub, in evaluation mode.

        Args:
            folder_or_name: a folder with config.json and model.safetensors, or a hub name.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: no such folder or repository, or a file is missing in it.
            ConnectionError: no such folder, and the hub cannot be reached.
            ValueError: the config is another family's, or the weights do not match it key by key and shape by shape.
        """
        source = os.fspath(folder_or_name)
        config = read_config(folder_or_name, revision=revision)
        stored = read_weights(folder_or_name, revision=revision)
        net = cls.from_model_section(config, states_of(stored, cls, source))
        load_strictly(net, {key.removeprefix(cls.key_prefix): value for key, value in stored.items()}, source=source)
        net.sections = {name: copy.deepcopy(value) for name, value in config.items() if name != "model"}
        return net.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        sections: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write config.json and model.safetensors in the published format, each replaced atomically.

        Args:
            folder: created if need be.
            sections: top-level entries of config.json besides `model`, such as
                {"tokens": 50257, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}; added to, or in place
                of, `self.sections`. Values must be JSON.
            state_dict: weights to write instead of the network's own: an average, or shards gathered elsewhere.

        Raises:
            ValueError: `sections` brings a `model`, or `state_dict` is not this network's.
            OSError: the folder cannot be written; what it held before is intact.
        """
        if sections is not None and "model" in sections:
            raise ValueError("`sections` may not hold `model`: the network writes that one")
        own = self.state_dict()
        state = own if state_dict is None else state_dict
        if state.keys() != own.keys():
            raise ValueError(f"state_dict is not this network's; keys that differ: {sorted(state.keys() ^ own.keys())}")
        config = {**self.sections, **(sections or {}), "model": self.model_section()}
        write_checkpoint(folder, config, {self.key_prefix + key: value for key, value in state.items()})


def states_of(stored: Mapping[str, Tensor], cls: type[Transformer], source: str) -> int:
    """The number of states in a checkpoint's own weights, the only place that all published families give it."""
    key = cls.key_prefix + "vocab_embed.embedding"
    if key not in stored:
        raise ValueError(
            f"{source} holds no {key}: these are not the weights of {cls.__name__}. First keys: {sorted(stored)[:3]}"
        )
    return stored[key].shape[0]


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size that is no positive integer, by its name."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size!r}")

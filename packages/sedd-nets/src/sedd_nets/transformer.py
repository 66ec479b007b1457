"""The trunk that the published score networks share: embedding, blocks, final norm, and a head that is called apart.

What a network makes of the logits (its parameterisation) is the subclass's `head`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sedd_nets.attention import Attention, sdpa
from sedd_nets.blocks import Block, OutputLayer, SigmaEmbedding, TokenEmbedding
from sedd_nets.checks import check_sizes, check_states, over_last_axis
from sedd_nets.conditioning import LabelCondition, PromptCondition, condition_from_section
from sedd_nets.documents import Documents
from sedd_nets.fast.dropout import check_seeds, place_keys
from sedd_nets.pretrained import load_strictly, read_config, read_weights, write_checkpoint
from sedd_nets.rotary import Rotary

__all__ = ["Transformer"]


class Transformer(nn.Module, ABC):
    """A score model `(x, sigma) -> log_score` with a transformer trunk.

    Attributes:
        attention: the callable that attends; assign another at any time (see `sedd_nets.attention`).
        checkpoint_activations: when True, a backward pass keeps only each block's input and computes the block again
            (`torch.utils.checkpoint`, non-reentrant); assign at any time, results are the same.
        condition_embed: None, or what embeds a condition (see `sedd_nets.conditioning`); assign to condition on it.
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
        self.condition_embed: LabelCondition | PromptCondition | None = None
        self.sections: dict[str, Any] = {}

        self.vocab_embed = TokenEmbedding(num_states, width)
        self.sigma_map = None if cond_dim is None else SigmaEmbedding(cond_dim)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, cond_dim, dropout) for _ in range(depth))
        self.output_layer = OutputLayer(num_states, width, cond_dim)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> Self:
        """A fresh network of the sizes that a checkpoint's config gives. Raises ValueError for another family's."""

    @abstractmethod
    def model_section(self) -> dict[str, Any]:
        """The sizes as the published config.json's `model` section names them."""

    @abstractmethod
    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores of the rows that `hidden` gives: hidden (..., D), x (...), sigma a leading part; (..., N)."""

    def conditioning(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor | None:
        """What modulates the blocks: (B, 1 or L, cond_dim) float32, or None for a network without conditioning."""
        sigma = over_last_axis(sigma, x)
        if condition is not None and (self.condition_embed is None or self.sigma_map is None):
            raise ValueError(
                "a condition was given to a network without conditions: assign net.condition_embed = "
                "LabelCondition(classes, net.cond_dim) or PromptCondition(prompt_dim, net.cond_dim) and train it"
                if self.sigma_map is not None
                else f"{type(self).__name__} is not modulated and takes no condition"
            )
        if self.sigma_map is None:
            return None
        c: Tensor = self.sigma_map(sigma)
        if condition is not None and self.condition_embed is not None:
            c = c + self.condition_embed(condition)
        return F.silu(c)

    def hidden(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """What enters the head.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
            condition: class labels (B,) or prompt embeddings (B, P), for a network with a `condition_embed`.
            documents: where attention stays within; None: each row is one text.
            dropout_seeds: (B,) int64, any values. In training mode a row's dropout is then a function of its seed alone
                (`sedd_nets.fast.dropout`); None: of torch's generator. Without dropout they change nothing.

        Returns:
            (B, L, D), after the final norm.

        Raises:
            ValueError: x is no (B, L) or too long, sigma's shape is no leading part of x's, documents are another
                batch's, dropout_seeds are not one a row, or a condition is given that the network does not take.
            IndexError: a state is out of range.
        """
        if documents is not None and documents.ids.shape != x.shape:
            raise ValueError(f"documents describe a batch {tuple(documents.ids.shape)}; x is {tuple(x.shape)}")
        check_states(x, x.shape[-1] if documents is None else documents.longest, self.length)
        if dropout_seeds is not None:
            check_seeds(dropout_seeds, x)
        c = self.conditioning(x, sigma, condition)
        cos, sin = self.rotary_emb(x.shape[1])
        h = self.vocab_embed(x)
        keys = None if dropout_seeds is None else place_keys(dropout_seeds, 2 * len(self.blocks))
        for number, block in enumerate(self.blocks):
            of_block = None if keys is None else keys[:, 2 * number : 2 * number + 2]
            if self.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, c, cos, sin, self.attention, documents, of_block, use_reentrant=False)
            else:
                h = block(h, c, cos, sin, self.attention, documents, of_block)
        out: Tensor = self.output_layer(h, c)
        return out

    def rows(self, x: Tensor, sigma: Tensor, where: Tensor | None, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `head`: `hidden`, x and sigma, at the true positions of `where` or at all.

        `given` are the other arguments of `hidden`.
        """
        if where is None:
            return self.hidden(x, sigma, **given), x, sigma
        if where.shape != x.shape or where.dtype != torch.bool:
            raise ValueError(
                f"where must be a bool mask of x's shape {tuple(x.shape)}; got {where.dtype} {tuple(where.shape)}"
            )
        hidden = self.hidden(x, sigma, **given)
        return hidden[where], x[where], over_last_axis(sigma, x)[..., 0].expand(x.shape)[where]

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """The log-score, log p_t(y) / p_t(x) for every state y of every position.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) total noise a sequence, or (B, L) a position.
            where: (B, L) bool; the rows to compute. The head sees those only.
            condition: class labels (B,) or prompt embeddings (B, P), for a network with a `condition_embed`.
            documents: where attention stays within; None: each row is one text.
            dropout_seeds: (B,) int64; see `hidden`.

        Returns:
            (B, L, N), or (M, N) for the M true positions of `where` in row-major order; float32.

        Raises:
            ValueError: x, sigma, where or documents has another shape, the sequence is too long, or the network does
                not take the condition.
            IndexError: a state is out of range.
        """
        given = {"condition": condition, "documents": documents, "dropout_seeds": dropout_seeds}
        return self.head(*self.rows(x, sigma, where, **given))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: `embedding`, `conditioning` (of sigma and y), `blocks` (the rest of them), `head`."""
        counts = dict.fromkeys(("embedding", "conditioning", "blocks", "head"), 0)
        for name, parameter in self.named_parameters():
            if "adaLN" in name or name.startswith(("sigma_map", "condition_embed")):
                part = "conditioning"
            elif name.startswith("blocks"):
                part = "blocks"
            else:
                part = "embedding" if name.startswith("vocab_embed") else "head"
            counts[part] += parameter.numel()
        return counts

    def flops(self, length: int, *, rows: int | None = None) -> int:
        """Floating-point operations of the matrix products and attention of one forward on one sequence.

        A multiplication and an addition count 2. Element-wise work is left out, as in the usual utilisation figures
        (MFU). A backward pass costs twice as much again.

        Args:
            length: L.
            rows: how many positions reach the head; all unless given.
        """
        block = 2 * length * 12 * self.width**2 + 4 * length**2 * self.width
        head = 2 * (length if rows is None else rows) * self.width * self.num_states
        modulation = 0
        if self.cond_dim is not None:
            modulation = 2 * self.cond_dim * (256 + self.cond_dim + (6 * self.depth + 2) * self.width)
        return self.depth * block + head + modulation

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
        config = read_config(folder_or_name, revision=revision)
        return cls.from_checkpoint(
            config, read_weights(folder_or_name, revision=revision), source=os.fspath(folder_or_name)
        )

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], stored: Mapping[str, Tensor], *, source: str) -> Self:
        """The network of a checkpoint already read; `source` names it in errors (ValueError, as `from_pretrained`)."""
        table = cls.key_prefix + "vocab_embed.embedding"
        fresh = cls.from_config(config, len(stored[table]) if table in stored else 1)
        if table not in stored:
            raise ValueError(
                f"{source} holds no {table}: these are not the weights of {cls.__name__}. It begins with "
                + ", ".join(sorted(stored)[:3])
            )
        condition = config.get("model", {}).get("condition")
        if condition is not None and fresh.cond_dim is not None:
            fresh.condition_embed = condition_from_section(condition, fresh.cond_dim)
        load_strictly(fresh, {key.removeprefix(cls.key_prefix): value for key, value in stored.items()}, source=source)
        fresh.sections |= {name: copy.deepcopy(value) for name, value in config.items() if name != "model"}
        return fresh.eval()

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
        model = self.model_section()
        if self.condition_embed is not None:
            model["condition"] = self.condition_embed.section()
        config = {**self.sections, **(sections or {}), "model": model}
        write_checkpoint(folder, config, {self.key_prefix + key: value for key, value in state.items()})

    def push_to_hub(
        self,
        name: str,
        *,
        sections: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload the network",
    ) -> str:
        """Upload what `save_pretrained` writes to the hub repository `name`, created if need be.

        Args:
            name: "owner/repository".
            sections: as for `save_pretrained`.
            private: whether a new repository is private; None leaves it to the owner's default.
            token: a token with write access; the one of `hf auth login` unless given.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, sections=sections)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)

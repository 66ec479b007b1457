"""The network from states to what enters the head: embeddings, blocks, output layer (`sedd_nets.layers`).

What a network makes of the logits (its parameterisation) is the family's `head`: see `sedd_nets.families` and
`sedd_nets.uniform`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sedd_nets.attention import Attention, Rotary, sdpa
from sedd_nets.caching import CachedAttention, KeyValueCache
from sedd_nets.checks import check_sizes, check_states, over_last_axis
from sedd_nets.conditioning import LabelCondition, PromptCondition, SigmaEmbedding
from sedd_nets.documents import Documents
from sedd_nets.fast.dropout import check_seeds, place_words
from sedd_nets.layers import Block, OutputLayer, TokenEmbedding
from sedd_nets.pretrained import Pretrained

__all__ = ["LinearHead", "Transformer"]


class LinearHead(NamedTuple):
    """A head that is linear: log_score = hidden W^T + bias + shift, but at a position's own state."""

    weight: Tensor
    """W (N, D)."""
    bias: Tensor | None
    """(N,), or None for 0."""
    shift: Tensor | None
    """Of a sequence or a position, in sigma's shape; None for 0."""


Rows = tuple[Tensor, Tensor, Tensor]
"""What a head is asked of: what enters it, the states there, and their total noise."""


class Transformer(Pretrained):
    """A score model `(x, sigma) -> log_score` with a transformer trunk.

    Attributes:
        attention: the callable that attends; assign another at any time (see `sedd_nets.attention`).
        checkpoint_activations: when True, a backward pass keeps only each block's input and computes the block again
            (`torch.utils.checkpoint`, non-reentrant); assign at any time, results are the same.
        condition_embed: None, or what embeds a condition (see `sedd_nets.conditioning`); assign to condition on it.
        sections: what a checkpoint's config.json says besides `model`: `tokens`, `graph`, `noise`, ...; plain
            values that the network itself does not use, kept for whoever does and written back by `save_pretrained`.
    """

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

    @abstractmethod
    def head(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores of the rows that `hidden` gives: hidden (..., D), x (...), sigma a leading part; (..., N)."""

    def head_apart(self, hidden: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """`head` as rows (..., N) and what is to be added to each, (...): but at y = x, where the log-score is 0.

        Of networks whose rows differ from their logits by a number each the rows are in the precision of the product,
        and no copy of their size is made in another.
        """
        log_score = self.head(hidden, x, sigma)
        return log_score, log_score.new_zeros(x.shape)

    def linear_head(self, x: Tensor, sigma: Tensor) -> LinearHead | None:
        """`head` of a batch as weight, bias and shift, for a loss that joins the two; None where it is not linear.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
        """
        return None

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
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """What enters the head.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
            condition: class labels (B,) or prompt embeddings (B, P), for a network with a `condition_embed`.
            documents: where attention stays within; None: each row is one text.
            dropout_seeds: (B,) int64, any values. In training mode a row's dropout is then a function of its seed alone
                (`sedd_nets.fast.dropout`); None: of torch's generator. Without dropout they change nothing.
            cache: keys and values of the positions before x, to which x's are added; attention is then PyTorch's own.

        Returns:
            (B, L, D), after the final norm.

        Raises:
            ValueError: x is no (B, L) or too long, sigma's shape is no leading part of x's, documents are another
                batch's or given with a cache, dropout_seeds are not one a row, or a condition is given that the network
                does not take.
            IndexError: a state is out of range.
        """
        if documents is not None and documents.ids.shape != x.shape:
            raise ValueError(f"documents describe a batch {tuple(documents.ids.shape)}; x is {tuple(x.shape)}")
        longest = x.shape[-1]
        if documents is not None and longest > self.length:  # a row may be longer than the texts in it
            longest = documents.longest
        past = self.known(cache, documents)
        check_states(x, past + longest, self.length)
        if documents is not None and hasattr(self.attention, "prepare"):
            self.attention.prepare(documents)
        if dropout_seeds is not None:
            check_seeds(dropout_seeds, x)
        c = self.conditioning(x, sigma, condition)
        cos, sin = (a[past:] for a in self.rotary_emb(past + x.shape[1]))
        attention: Attention = self.attention
        if cache is not None:
            attention = CachedAttention(cache, self.sees(past, x))
        h = self.through_blocks(self.vocab_embed(x), c, cos, sin, attention, documents, dropout_seeds)
        out: Tensor = self.output_layer(h, c)
        return out

    def known(self, cache: KeyValueCache | None, documents: Documents | None) -> int:
        """How many positions are in the cache; ValueError for one beside documents, or where it would not be right."""
        if cache is None:
            return 0
        if documents is not None or self.checkpoint_activations:
            raise ValueError("a cache holds one text a row, for sampling: without documents or activation checkpoints")
        return cache.get_seq_length()

    def sees(self, past: int, x: Tensor) -> Tensor | None:
        """Which of `past` + L positions each of x's L sees, (L, past + L) bool; None: all."""
        return None

    def through_blocks(
        self,
        h: Tensor,
        c: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        documents: Documents | None,
        dropout_seeds: Tensor | None,
    ) -> Tensor:
        """The residual stream (B, L, D) from the first block to the last; the other arguments as for `Block`."""
        words = None
        if dropout_seeds is not None and self.training:
            words = place_words(dropout_seeds, 2 * len(self.blocks), h.shape[1], self.width)
        for number, block in enumerate(self.blocks):
            of_block = None if words is None else (words[2 * number], words[2 * number + 1])
            if self.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, c, cos, sin, attention, documents, of_block, use_reentrant=False)
            else:
                h = block(h, c, cos, sin, attention, documents, of_block)
        return h

    def rows(
        self, x: Tensor, sigma: Tensor, where: Tensor | None, positions: Tensor | None = None, **given: Any
    ) -> Rows:
        """The arguments of `head`: `hidden`, x and sigma, at the true positions of `where`, at `positions`, or at all.

        `given` are the other arguments of `hidden`.
        """
        check_which(x, where, positions)
        return picked(self.hidden(x, sigma, **given), x, sigma, where, positions)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
        apart: bool = False,
    ) -> Tensor:
        """The log-score, log p_t(y) / p_t(x) for every state y of every position.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) total noise a sequence, or (B, L) a position.
            where: (B, L) bool; the rows to compute. The head sees those only. How many there are is read from the
                device.
            positions: (M,) int64, the same as indices into x.flatten(): nothing is read.
            condition: class labels (B,) or prompt embeddings (B, P), for a network with a `condition_embed`.
            documents: where attention stays within; None: each row is one text.
            dropout_seeds: (B,) int64; see `hidden`.
            cache: keys and values of the positions before x; see `hidden` and `sedd_nets.caching`.
            apart: whether to return rows and their shift; see `head_apart`.

        Returns:
            (B, L, N), or (M, N) for the M true positions of `where` in row-major order, or for `positions`; float32.
            With `apart` a tuple.

        Raises:
            ValueError: x, sigma, where or documents has another shape, the sequence is too long, or the network does
                not take the condition.
            IndexError: a state is out of range.
        """
        given = {"condition": condition, "documents": documents, "dropout_seeds": dropout_seeds, "cache": cache}
        return self.scores(self.rows(x, sigma, where, positions, **given), apart)

    def scores(self, rows: Rows, apart: bool) -> Tensor:
        """The log-scores of rows; with `apart` a tuple, see `head_apart`."""
        # Typed as what every score model returns; a pair is for who asks for it by `apart`.
        answer: Any = self.head_apart(*rows) if apart else self.head(*rows)
        return answer  # type: ignore[no-any-return]

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks with `torch.compile`: one graph for all of them, in seconds, however deep the network.

        Weights, keys and numbers stay. What is outside of the blocks stays as it is written, and so do hooks on the
        blocks themselves, such as those of runtimes that gather a whole block's weights.

        Args:
            options: of `torch.compile`: `mode`, `dynamic`, `backend`, `fullgraph`, ...
        """
        compiled = torch.compile(Block.step, **options)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = compiled

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: `embedding`, `conditioning` (of sigma and y), `blocks` (the rest of them), `head`."""
        counts = dict.fromkeys(("embedding", "conditioning", "blocks", "head"), 0)
        for name, parameter in self.named_parameters():
            if "adaLN" in name or name.startswith(("sigma_map", "cond_map", "condition_embed")):
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


def check_which(x: Tensor, where: Tensor | None, positions: Tensor | None) -> None:
    """Raise ValueError unless at most one of them says, as it should, which of x's positions (B, L) count."""
    if positions is not None and (where is not None or positions.ndim != 1 or positions.dtype != torch.int64):
        raise ValueError(
            "positions must be indices (M,) int64 into x.flatten(), without where; got "
            f"{positions.dtype} {tuple(positions.shape)}{'' if where is None else ' and where'}"
        )
    if where is not None and (where.shape != x.shape or where.dtype != torch.bool):
        raise ValueError(
            f"where must be a bool mask of x's shape {tuple(x.shape)}; got {where.dtype} {tuple(where.shape)}"
        )


def picked(hidden: Tensor, x: Tensor, sigma: Tensor, where: Tensor | None, positions: Tensor | None) -> Rows:
    """Hidden (B, L, D), x and sigma at the true positions of `where`, at `positions`, or at all; checked arguments."""
    if positions is not None:
        level = over_last_axis(sigma, x)[..., 0].expand(x.shape)
        return hidden.flatten(0, 1)[positions], x.flatten()[positions], level.flatten()[positions]
    if where is None:
        return hidden, x, sigma
    return hidden[where], x[where], over_last_axis(sigma, x)[..., 0].expand(x.shape)[where]

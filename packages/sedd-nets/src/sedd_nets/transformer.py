"""The network from states to what enters the head, top to bottom: embeddings, adaptive norm, blocks, output layer.

A network conditioned on the noise level modulates every layer norm (adaLN-zero, Peebles & Xie 2023): from the
embedding c of sigma each block computes a shift, a scale and a gate for attention and for the MLP,

    h <- h + gate_1 attention(norm(h) (1 + scale_1) + shift_1)
    h <- h + gate_2 mlp(norm(h) (1 + scale_2) + shift_2)

Without conditioning the shifts and scales are 0 and the gates 1. What a network makes of the logits (its
parameterisation) is the family's `head`: see `sedd_nets.families`.

Module and parameter names are those of the published checkpoints. Every weight is used in the forward of the module
that owns it and nowhere else, so that runtimes which gather weights around a module's forward (ZeRO stage 3) work.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sedd_nets.attention import Attention, Rotary, sdpa
from sedd_nets.checks import at_least_float32, check_sizes, check_states, check_tokens, over_last_axis
from sedd_nets.conditioning import Float32Linear, LabelCondition, PromptCondition, SigmaEmbedding
from sedd_nets.documents import Documents
from sedd_nets.fast.dropout import Words, check_seeds, place_words
from sedd_nets.fast.memory_efficient import add_gated, gelu_linear, modulated_norm, rotated
from sedd_nets.pretrained import Pretrained

L = TypeVar("L", bound=nn.Linear)

__all__ = ["Block", "LinearHead", "Transformer"]


class TokenEmbedding(nn.Module):
    """One vector a state; the parameter is called `embedding` in the published files."""

    def __init__(self, num_states: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num_states, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """States (B, L) to vectors (B, L, D). Raises IndexError for a state out of range."""
        check_tokens(x, self.embedding.shape[0])
        return F.embedding(x, self.embedding)


class LayerNorm(nn.Module):
    """Layer norm in float32, with a bias of its own, or a shift and a scale from outside where it is modulated."""

    def __init__(self, width: int, *, modulated: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None if modulated else nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """norm(h) (1 + scale) + shift; h (B, L, D), shift and scale (B, 1 or L, D) or none; returns h's dtype."""
        with torch.autocast(h.device.type, enabled=False):
            a = at_least_float32(h)
            weight = self.weight.to(a.dtype)
            if shift is None or scale is None:
                bias = None if self.bias is None else self.bias.to(a.dtype)
                return F.layer_norm(a, a.shape[-1:], weight, bias).to(h.dtype)
            return modulated_norm(a, weight * (1 + scale), shift).to(h.dtype)


class GeluLinear(nn.Linear):
    """GELU and the linear map behind it, which together keep GELU's input only (`sedd_nets.fast.memory_efficient`)."""

    def forward(self, a: Tensor) -> Tensor:
        """linear(gelu(a)), (..., in) to (..., out), in autocast's dtype or a's own."""
        device = a.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        return gelu_linear(a.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Block(nn.Module):
    """Attention and MLP, each behind a (modulated) layer norm and added to the residual stream (gated)."""

    compiled: Callable[..., Tensor] | None = None
    """What computes `step`, if it is compiled: see `Transformer.compile_blocks`."""

    def __init__(self, width: int, heads: int, cond_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = LayerNorm(width, modulated=cond_dim is not None)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width, modulated=cond_dim is not None)
        # The published names: 0 and 2, GELU between them.
        self.mlp = nn.Sequential(OrderedDict([("0", nn.Linear(width, 4 * width)), ("2", GeluLinear(4 * width, width))]))
        self.adaLN_modulation = None if cond_dim is None else zero(Float32Linear(cond_dim, 6 * width))

    def forward(
        self,
        h: Tensor,
        c: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        documents: Documents | None = None,
        words: tuple[Words, Words] | None = None,
    ) -> Tensor:
        """One step of the residual stream.

        Args:
            h: (B, L, D).
            c: the conditioning (B, 1 or L, cond_dim), for a block that is modulated.
            cos: (L, d/2), from `Rotary`.
            sin: the same.
            attention: see `sedd_nets.attention`.
            documents: where attention stays within.
            words: what chooses the elements that the branches of attention and MLP drop (`sedd_nets.fast.dropout`);
                None: torch's generator.

        Returns:
            (B, L, D).
        """
        return (self.compiled or Block.step)(self, h, c, cos, sin, attention, documents, words)

    def step(
        self,
        h: Tensor,
        c: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        documents: Documents | None,
        words: tuple[Words, Words] | None,
    ) -> Tensor:
        """`forward` as it is written."""
        shift1: Tensor | None
        shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
        if self.adaLN_modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        dropout = self.dropout if self.training else 0.0
        words1, words2 = (None, None) if words is None else words

        qkv = self.attn_qkv(self.norm1(h, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        attended = attention(*rotated(qkv, cos, sin), documents).flatten(-2)
        h = add_gated(h, self.attn_out(attended), gate1, dropout, words1)
        return add_gated(h, self.mlp(self.norm2(h, shift2, scale2)), gate2, dropout, words2)


class Unembedding(nn.Linear):
    """The last linear map, to one logit a state; its output leaves as float32 (float64 stays)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., N)."""
        return at_least_float32(F.linear(hidden, self.weight, self.bias))


class OutputLayer(nn.Module):
    """The final (modulated) norm and the head. The two are called apart, so that few rows may enter the head."""

    def __init__(self, num_states: int, width: int, cond_dim: int | None) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, modulated=cond_dim is not None)
        self.linear = zero(Unembedding(width, num_states))
        self.adaLN_modulation = None if cond_dim is None else zero(Float32Linear(cond_dim, 2 * width))

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        """The stream (B, L, D) to what enters the head, (B, L, D)."""
        if self.adaLN_modulation is None:
            out: Tensor = self.norm_final(h)
        else:
            out = self.norm_final(h, *self.adaLN_modulation(c).chunk(2, dim=-1))
        return out


def zero(linear: L) -> L:
    """The map with weight and bias 0: a block that starts as the identity, a head that starts without opinion."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class LinearHead(NamedTuple):
    """A head that is linear: log_score = hidden W^T + bias + shift, but at a position's own state."""

    weight: Tensor
    """W (N, D)."""
    bias: Tensor | None
    """(N,), or None for 0."""
    shift: Tensor | None
    """Of a sequence or a position, in sigma's shape; None for 0."""


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
        longest = x.shape[-1]
        if documents is not None and longest > self.length:  # a row may be longer than the texts in it
            longest = documents.longest
        check_states(x, longest, self.length)
        if documents is not None and hasattr(self.attention, "prepare"):
            self.attention.prepare(documents)
        if dropout_seeds is not None:
            check_seeds(dropout_seeds, x)
        c = self.conditioning(x, sigma, condition)
        cos, sin = self.rotary_emb(x.shape[1])
        h = self.through_blocks(self.vocab_embed(x), c, cos, sin, self.attention, documents, dropout_seeds)
        out: Tensor = self.output_layer(h, c)
        return out

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

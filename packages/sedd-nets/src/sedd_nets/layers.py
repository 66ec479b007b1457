"""The layers of a trunk, top to bottom: token embedding, adaptive norm, block, output layer.

A network conditioned on the noise level modulates every layer norm (adaLN-zero, Peebles & Xie 2023): from the
embedding c of sigma each block computes a shift, a scale and a gate for attention and for the MLP,

    h <- h + gate_1 attention(norm(h) (1 + scale_1) + shift_1)
    h <- h + gate_2 mlp(norm(h) (1 + scale_2) + shift_2)

Without conditioning the shifts and scales are 0 and the gates 1.

Module and parameter names are those of the published checkpoints. Every weight is used in the forward of the module
that owns it and nowhere else, so that runtimes which gather weights around a module's forward (ZeRO stage 3) work.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_nets.attention import Attention
from sedd_nets.checks import at_least_float32, check_tokens
from sedd_nets.conditioning import Float32Linear
from sedd_nets.documents import Documents
from sedd_nets.fast.aligned import aligned_linear, suits
from sedd_nets.fast.dropout import Words
from sedd_nets.fast.memory_efficient import add_gated, gelu_linear, modulated_norm, rotated

L = TypeVar("L", bound=nn.Linear)

__all__ = ["Block", "OutputLayer", "TokenEmbedding"]


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
            cos: (L, 3, 1, d), from `Rotary`.
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
        return at_least_float32(self.as_made(hidden))

    def as_made(self, hidden: Tensor) -> Tensor:
        """The same in the precision of the product: that of autocast, where it is on."""
        if suits(hidden, len(self.weight)):
            return F.linear(hidden, self.weight, self.bias)
        return aligned_linear(hidden, self.weight, self.bias)


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

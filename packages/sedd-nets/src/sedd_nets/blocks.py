"""The parts of the score transformers: embeddings, adaptive layer norm, the block, the output layer.

A network conditioned on the noise level modulates every layer norm (adaLN-zero, Peebles & Xie 2023): from the
embedding c of sigma each block computes a shift, a scale and a gate for attention and for the MLP,

    h <- h + gate_1 attention(norm(h) (1 + scale_1) + shift_1)
    h <- h + gate_2 mlp(norm(h) (1 + scale_2) + shift_2)

Without conditioning the shifts and scales are 0 and the gates 1. Module and parameter names are those of the
published checkpoints. Every weight is used in the forward of the module that owns it and nowhere else, so that
runtimes which gather weights around a module's forward (ZeRO stage 3) work.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_nets.attention import Attention
from sedd_nets.checks import at_least_float32, check_tokens
from sedd_nets.documents import Documents
from sedd_nets.fast.memory_efficient import add_gated, gelu_linear, modulated_norm
from sedd_nets.rotary import rotate

L = TypeVar("L", bound=nn.Linear)

__all__ = [
    "Block",
    "Float32Linear",
    "GeluLinear",
    "Unembedding",
    "LayerNorm",
    "OutputLayer",
    "SigmaEmbedding",
    "TokenEmbedding",
]


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


class Float32Linear(nn.Linear):
    """A linear map computed in float32 (float64 stays) whatever autocast or the weight's dtype would have it."""

    def forward(self, a: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        with torch.autocast(a.device.type, enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            weight = at_least_float32(self.weight)
            return F.linear(a.to(weight.dtype), weight, bias)


class SigmaEmbedding(nn.Module):
    """The noise level as a vector: sinusoids of geometrically spaced frequencies through a two-layer MLP, float32."""

    def __init__(self, cond_dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Float32Linear(frequencies, cond_dim), nn.SiLU(), Float32Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """Total noise (..., 1) to (..., cond_dim)."""
        half = self.frequencies // 2
        frequency = torch.exp(torch.arange(half, device=sigma.device, dtype=sigma.dtype) * (-math.log(10_000) / half))
        angle = sigma * frequency
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return out


class LayerNorm(nn.Module):
    """Layer norm in float32, with a shift and a scale from outside where the network is conditioned."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, h: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """norm(h) (1 + scale) + shift; h (B, L, D), shift and scale (B, 1 or L, D) or none; returns h's dtype."""
        with torch.autocast(h.device.type, enabled=False):
            a = at_least_float32(h)
            weight, bias = self.weight.to(a.dtype), None if self.bias is None else self.bias.to(a.dtype)
            if shift is None or scale is None:
                return F.layer_norm(a, a.shape[-1:], weight, bias).to(h.dtype)
            if bias is not None:
                shift = shift + bias * (1 + scale)
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

    def __init__(self, width: int, heads: int, cond_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = LayerNorm(width, bias=cond_dim is None)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width, bias=cond_dim is None)
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
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """One step of the residual stream.

        Args:
            h: (B, L, D).
            c: the conditioning (B, 1 or L, cond_dim), for a block that is modulated.
            cos: (L, d/2), from `Rotary`.
            sin: the same.
            attention: see `sedd_nets.attention`.
            documents: where attention stays within.
            dropout_keys: (B, 2) int64, for the branches of attention and MLP (`sedd_nets.fast.dropout`); None: torch's
                generator chooses what is dropped.

        Returns:
            (B, L, D).
        """
        shift1: Tensor | None
        shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
        if self.adaLN_modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        dropout = self.dropout if self.training else 0.0
        key1, key2 = (None, None) if dropout_keys is None else dropout_keys.unbind(1)

        qkv = self.attn_qkv(self.norm1(h, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        attended = attention(rotate(qkv, cos, sin), documents).flatten(-2)
        h = add_gated(h, self.attn_out(attended), gate1, dropout, key1)
        return add_gated(h, self.mlp(self.norm2(h, shift2, scale2)), gate2, dropout, key2)


class Unembedding(nn.Linear):
    """The last linear map, to one logit a state; its output leaves as float32 (float64 stays)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., N)."""
        return at_least_float32(F.linear(hidden, self.weight, self.bias))


class OutputLayer(nn.Module):
    """The final (modulated) norm and the head. The two are called apart, so that few rows may enter the head."""

    def __init__(self, num_states: int, width: int, cond_dim: int | None) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, bias=cond_dim is None)
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

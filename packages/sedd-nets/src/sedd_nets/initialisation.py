"""A start for training from scratch behind the first plateau: tokens' frequencies known, attention on the neighbours.

A fresh network attends everywhere alike, its adaLN gates are shut, and its head gives every token the same logit. It
first learns the tokens' frequencies, by a direction common to all its hidden vectors; a masked position then sees an
average over the whole sequence, from which nothing about its own token follows. The loss stays at the unigram entropy
until queries and keys happen upon the positions, for hundreds of steps at best, more the larger the vocabulary. Each
of the two functions here takes away one half of that; only both together do away with the plateau.

`init_unigram_bias` writes log p(y) into the head's bias, so that no gradient is spent on it.

`init_local_attention` turns the attention. Layer norm leaves no component along (1, ..., 1), so a shift by 1 in all
channels hands each query and key projection one constant to work with, beside the token. With a rank-one addition to
the projections, head h of a block gets the constant query R(delta) k and the constant key k, all |k_i| alike, and
rotary positions turn their product into a function of the distance between the positions m and n,

    score(m, n) = sharpness * mean_i cos(omega_i (n - m - delta)),

largest at n = m + delta. As the frequencies omega_i are spaced geometrically, it falls with the logarithm of the
distance from there, hence the attention as a power of it. All parameters stay as free as ever.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_nets.layers import Block
from sedd_nets.transformer import Transformer

__all__ = ["init_unigram_bias", "init_local_attention", "offset"]


def offset(block: int, head: int) -> int:
    """Where a head looks at first, in positions: heads by pairs to the left and right, farther in later blocks.

    -1, +1, -2, +2, ... in block 0; -1, +1, -3, +3, -5, ... in block 1; block b spaces the pairs by b + 1.
    """
    distance = 1 + (head // 2) * (block + 1)
    return distance if head % 2 else -distance


@torch.no_grad()
def init_local_attention(net: Transformer, *, sharpness: float = 200.0) -> None:
    """Turn a fresh network's attention to each position's neighbours and open its gates, in place.

    Args:
        net: a network of any of the families, freshly initialised; one that is trained would be spoilt.
        sharpness: the score at the offset itself; with base-10000 rotary positions attention falls from there about as
            distance^(-sharpness / 9.2).

    Raises:
        ValueError: sharpness is not a positive number.
    """
    if not (math.isfinite(sharpness) and sharpness > 0):
        raise ValueError(f"sharpness must be a positive number, got {sharpness!r}")
    width, head_dim = net.width, net.width // net.heads
    frequencies = net.rotary_emb.inv_freq
    strength = math.sqrt(sharpness * math.sqrt(head_dim) / len(frequencies))
    for b, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        if block.adaLN_modulation is None:
            assert block.norm1.bias is not None
            block.norm1.bias.fill_(1)
        else:
            shift1, _, gate1, _, _, gate2 = block.adaLN_modulation.bias.chunk(6)
            for part in (shift1, gate1, gate2):
                part.fill_(1)
        query, key, _ = block.attn_qkv.weight.view(3, net.heads, head_dim, width)
        for h in range(net.heads):
            angle = offset(b, h) * frequencies
            query[h] += torch.cat([angle.cos(), angle.sin()])[:, None] * strength / width
            key[h, : len(frequencies)] += strength / width


@torch.no_grad()
def init_unigram_bias(net: Transformer, counts: Tensor) -> None:
    """Let a fresh network of an absorbing process predict each token with its frequency, in place.

    Args:
        net: a network of any of the families, freshly initialised: its head has weight 0.
        counts: (N,) how often each state occurs in the training data, 0 for the mask. Half an occurrence is added to
            each, for those that the data happen to lack.

    Raises:
        ValueError: counts has another shape, a negative or non-finite value, or is 0 everywhere.
    """
    if counts.shape != (net.num_states,):
        raise ValueError(f"counts must have shape ({net.num_states},), one a state, got {tuple(counts.shape)}")
    if not (bool((counts >= 0).all()) and 0 < float(counts.sum()) < math.inf):
        raise ValueError("counts must be numbers of occurrences: none negative or infinite, not all 0")
    frequency = counts.double() + 0.5
    # SEDD's head subtracts log(N - 1) from the logits, a softmax does not see it.
    net.output_layer.linear.bias.copy_(torch.log(frequency / frequency.sum() * (net.num_states - 1)))
